"""MediaPipe's face landmarker, with its mesh converted to iBUG's 68 points."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Float64, UInt8

from tccp.errors import TccpError
from tccp.faces.face import MAX_FACES, Face, iou
from tccp.landmarks import head_pose
from tccp.weights import weights_key

# Indices into the 478 points of MediaPipe's mesh. _OVAL: the lower face oval from eye height on the picture's left over
# the chin (152, the twelfth) to eye height on the right. _INNER: iBUG's points 17 to 67, one to one.
_OVAL = (
    *(127, 234, 93, 132, 58, 172, 136, 150, 149, 176, 148, 152),
    *(377, 400, 378, 379, 365, 397, 288, 361, 323, 454, 356),
)
_CHIN = 11
_INNER = (
    *(70, 63, 105, 66, 107, 336, 296, 334, 293, 300),  # brows
    *(168, 197, 5, 4, 98, 97, 2, 326, 327),  # nose
    *(33, 160, 158, 133, 153, 144, 362, 385, 387, 263, 373, 380),  # eyes
    *(61, 39, 37, 0, 267, 269, 291, 405, 314, 17, 84, 181),  # outer lip
    *(78, 82, 13, 312, 308, 317, 14, 87),  # inner lip
)


def ibug_from_mesh(mesh: Float[np.ndarray, "478 d"]) -> Float32[np.ndarray, "68 d"]:
    """Converts a MediaPipe face mesh (2D or 3D) to iBUG's 68 points.

    The jaw is the lower face oval, in 8 steps of equal arc length on each side of the chin. The others are mesh points.
    """
    oval = mesh[list(_OVAL)]
    left, right = _equal_steps(oval[: _CHIN + 1], 9), _equal_steps(oval[_CHIN:], 9)
    return np.concatenate([left, right[1:], mesh[list(_INNER)]]).astype(np.float32)


def _equal_steps(curve: np.ndarray, count: int) -> np.ndarray:
    """`count` points at equal distances along a curve, with both ends."""
    lengths = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(curve, axis=0), axis=1))])
    at = np.linspace(0, float(lengths[-1]), count)
    return np.stack([np.interp(at, lengths, axis) for axis in curve.T], 1)


_TILE_SHARES = (1.0, 0.6)  # sides of square tiles, as shares of the frame's shorter side
_SMALLEST_TILE_PX = 128


def _tile_starts(length: int, side: int) -> list[int]:
    """Starts of tiles of this side that overlap by at least half and cover the whole length."""
    count = 1 + math.ceil(2 * (length - side) / side)
    return [round(start) for start in np.linspace(0, length - side, count)]


def _distinct(faces: list[Face]) -> list[Face]:
    """Each face once, from the tile that shows most of it."""
    kept: list[Face] = []
    for face in sorted(faces, key=lambda face: -face.confidence):
        if all(iou(face, other) < 0.3 for other in kept):
            kept.append(face)
    return kept


_MAX_TURN_DEG = 80.0


def _is_plausible(points: Float32[np.ndarray, "68 2"]) -> bool:
    """False for meshes on an ear or a pattern: their head pose would look away from the camera."""
    pose = head_pose(points[None])
    return bool((np.abs([pose.yaw_deg, pose.pitch_deg]) < _MAX_TURN_DEG).all())


class MediapipeBackend:
    """MediaPipe's FaceLandmarker on single pictures."""

    name = "mediapipe"
    works_beside_others = True

    def __init__(self, weights: Path) -> None:
        import mediapipe
        from mediapipe.tasks.python import BaseOptions, vision
        from mediapipe.tasks.python.vision.face_landmarker import MpFaceLandmarkerResultC

        self.key = f"mediapipe {importlib.metadata.version('mediapipe')} {weights_key(weights)}"
        self._mediapipe = mediapipe
        self._result_type = MpFaceLandmarkerResultC
        with _silent_stderr():
            try:
                options = vision.FaceLandmarkerOptions(
                    base_options=BaseOptions(model_asset_buffer=weights.read_bytes()), num_faces=MAX_FACES
                )
                self._landmarker: Any = vision.FaceLandmarker.create_from_options(options)
            except (OSError, RuntimeError, ValueError) as error:
                reason = str(error).splitlines()[0][:120]
                raise TccpError(f"{weights} is not a usable MediaPipe face landmark model: {reason}") from None
            self.detect(np.zeros((64, 64, 3), np.uint8))  # starts the graph's threads, which print notes

    def detect(self, frame: UInt8[np.ndarray, "h w 3"]) -> list[Face]:
        """The faces of a frame. If there seem to be none, the detector runs on tiles of the frame.

        MediaPipe's detector works on 128 x 128 pixels and misses faces below about a tenth of the longer side. A small
        face beside a large one can still be missed.
        """
        faces = self._detect_in(frame, 0, 0)
        for share in _TILE_SHARES:
            side = round(share * min(frame.shape[:2]))
            if faces or side < _SMALLEST_TILE_PX:
                break
            corners = [(x, y) for y in _tile_starts(frame.shape[0], side) for x in _tile_starts(frame.shape[1], side)]
            faces = _distinct(
                [face for x, y in corners for face in self._detect_in(frame[y : y + side, x : x + side], x, y)]
            )
        return sorted(faces, key=lambda face: -face.side)

    def _detect_in(self, tile: UInt8[np.ndarray, "h w 3"], x: int, y: int) -> list[Face]:
        """The faces in a tile, in the coordinates of the frame. (x, y): the tile's corner."""
        height, width = tile.shape[:2]
        # MediaPipe ignores strides and would see a view with padded rows as a sheared picture.
        data = np.ascontiguousarray(tile)
        picture = self._mediapipe.Image(image_format=self._mediapipe.ImageFormat.SRGB, data=data)
        faces = []
        for mesh in self._meshes(picture):
            points = ibug_from_mesh(mesh * (width, height))
            if not _is_plausible(points):
                continue
            inside = ((points >= 0) & (points <= (width, height))).all(1).mean()
            points = points + np.array([x, y], np.float32)
            faces.append(Face(np.concatenate([points.min(0), points.max(0)]), points, float(inside)))
        return faces

    def _meshes(self, picture: Any) -> list[Float64[np.ndarray, "478 2"]]:
        """The meshes of the faces in a `mediapipe.Image`, as shares of its width and height.

        As `FaceLandmarker.detect` does, but that makes a Python object of every point, which takes a millisecond a
        face and keeps other threads waiting.
        """
        found = self._result_type()
        self._landmarker._lib.MpFaceLandmarkerDetectImage(
            self._landmarker._handle, picture._image_ptr, None, ctypes.byref(found)
        )
        try:
            return [_points_of(found.face_landmarks[face]) for face in range(found.face_landmarks_count)]
        finally:
            self._landmarker._lib.MpFaceLandmarkerCloseResult(ctypes.byref(found))

    def close(self) -> None:
        self._landmarker.close()


def _points_of(mesh: Any) -> Float64[np.ndarray, "478 2"]:
    """x and y of MediaPipe's structure of a mesh, copied."""
    point = mesh.landmarks._type_
    offsets, size = [point.x.offset, point.y.offset], ctypes.sizeof(point)
    layout = np.dtype({"names": ["x", "y"], "formats": ["f4", "f4"], "offsets": offsets, "itemsize": size})
    memory = ctypes.cast(mesh.landmarks, ctypes.POINTER(ctypes.c_char * (size * mesh.landmarks_count))).contents
    points = np.frombuffer(memory, layout)
    return np.stack([points["x"], points["y"]], axis=1).astype(np.float64)


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Drops stderr: MediaPipe's C++ code writes start-up notes straight to it, and no setting prevents that."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
