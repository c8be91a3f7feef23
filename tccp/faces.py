"""Face detectors and landmark backends behind one interface, and the track of one person.

`mediapipe` gives 68 points and needs its weights file; `lbp`, scikit-image's cascade, needs no download, finds frontal
faces and gives boxes only.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import cv2
import numpy as np
from jaxtyping import Float, Float32, UInt8

from tccp.config import TccpError, storage_root
from tccp.headbox import steady_boxes
from tccp.landmarks import head_pose

BackendName = Literal["mediapipe", "lbp"]
WEIGHTS_FILE = "face_landmarker.task"
MAX_FACES = 5


@dataclass(frozen=True)
class Face:
    """A face in one frame.

    box: x0 y0 x1 y1 in pixels around the face (not the head). landmarks_px: 68 iBUG points, None from a backend that
    has none. confidence: 0..1; the share of the points inside the picture, or 0.5 from a backend without a score.
    """

    box: Float32[np.ndarray, "4"]
    landmarks_px: Float32[np.ndarray, "68 2"] | None
    confidence: float

    @property
    def side(self) -> float:
        return math.sqrt(max(float((self.box[2] - self.box[0]) * (self.box[3] - self.box[1])), 0.0))

    @property
    def center(self) -> Float32[np.ndarray, "2"]:
        return (self.box[:2] + self.box[2:]) / 2


@runtime_checkable
class FaceBackend(Protocol):
    name: str

    def detect(self, frame: UInt8[np.ndarray, "h w 3"]) -> list[Face]:
        """The faces of an RGB frame, largest first; none is a valid answer. Frames do not influence one another."""

    def close(self) -> None: ...


def open_backend(name: BackendName | str, weights: Path | None = None) -> FaceBackend:
    """A detector, ready to use; close it after use (left open, MediaPipe's clean-up fails noisily at the very end).

    weights: of `mediapipe`: its file or the folder it is in; by default TCCP_WEIGHTS, else <storage>/weights.
    Raises TccpError for an unknown name and for weights that are absent or unreadable.
    """
    if name == "mediapipe":
        return MediapipeBackend(find_weights(weights))
    if name == "lbp":
        return LbpBackend()
    raise TccpError(f"unknown face backend {name!r}: choose mediapipe or lbp")


def find_weights(given: Path | None = None) -> Path:
    """The landmark model's file. Raises TccpError that says where it was looked for."""
    place = given or Path(os.environ.get("TCCP_WEIGHTS") or storage_root() / "weights")
    file = place / WEIGHTS_FILE if place.is_dir() or place.suffix != ".task" else place
    if not file.is_file():
        raise TccpError(
            f"no face landmark weights at {file}: put MediaPipe's {WEIGHTS_FILE} there, name its folder in "
            "TCCP_WEIGHTS, or take the backend that needs no download, lbp"
        )
    return file


def _iou(a: Face, b: Face) -> float:
    """Intersection over union of two faces' boxes."""
    overlap = float(np.maximum(np.minimum(a.box[2:], b.box[2:]) - np.maximum(a.box[:2], b.box[:2]), 0).prod())
    return overlap / max(a.side**2 + b.side**2 - overlap, 1e-6)


# ---- mediapipe

# Of the 478 points of MediaPipe's mesh: the lower face oval from eye height on the picture's left over the chin (152,
# twelfth) to eye height on the right, and, one to one, iBUG's points 17 to 67.
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
    """iBUG's 68 points of a MediaPipe face mesh (2D or 3D).

    The jaw is the lower face oval, 8 equal steps by arc length on each side of the chin; the others are mesh points.
    """
    oval = mesh[list(_OVAL)]
    left, right = _equal_steps(oval[: _CHIN + 1], 9), _equal_steps(oval[_CHIN:], 9)
    return np.concatenate([left, right[1:], mesh[list(_INNER)]]).astype(np.float32)


def _equal_steps(curve: np.ndarray, count: int) -> np.ndarray:
    """`count` points at equal distances along a curve, its ends among them."""
    lengths = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(curve, axis=0), axis=1))])
    at = np.linspace(0, float(lengths[-1]), count)
    return np.stack([np.interp(at, lengths, axis) for axis in curve.T], 1)


_CLOSER_LOOKS = (1.0, 0.6)  # sides of square parts, as shares of the frame's shorter side
_SMALLEST_LOOK_PX = 128


def _spread(length: int, side: int) -> list[int]:
    """Starts of parts of this side that overlap by at least half and cover the whole length."""
    count = 1 + math.ceil(2 * (length - side) / side)
    return [round(start) for start in np.linspace(0, length - side, count)]


def _distinct(faces: list[Face]) -> list[Face]:
    """Each face once, as the part of the frame saw it in which it was most complete."""
    kept: list[Face] = []
    for face in sorted(faces, key=lambda face: -face.confidence):
        if all(_iou(face, other) < 0.3 for other in kept):
            kept.append(face)
    return kept


_MAX_TURN_DEG = 80.0


def _is_plausible(points: Float32[np.ndarray, "68 2"]) -> bool:
    """False for meshes laid over an ear or a pattern: as a face, they would look away from the camera."""
    pose = head_pose(points[None])
    return bool((np.abs([pose.yaw_deg, pose.pitch_deg]) < _MAX_TURN_DEG).all())


class MediapipeBackend:
    """MediaPipe's FaceLandmarker on single pictures."""

    name = "mediapipe"

    def __init__(self, weights: Path) -> None:
        import mediapipe
        from mediapipe.tasks.python import BaseOptions, vision

        self._mediapipe = mediapipe
        with _silent_stderr():
            try:
                options = vision.FaceLandmarkerOptions(
                    base_options=BaseOptions(model_asset_buffer=weights.read_bytes()), num_faces=MAX_FACES
                )
                self._landmarker: Any = vision.FaceLandmarker.create_from_options(options)
            except (OSError, RuntimeError, ValueError) as error:
                reason = str(error).splitlines()[0][:120]
                raise TccpError(f"{weights} is not a usable MediaPipe face landmark model: {reason}") from None
            self.detect(np.zeros((64, 64, 3), np.uint8))  # the graph's threads start now, and say so

    def detect(self, frame: UInt8[np.ndarray, "h w 3"]) -> list[Face]:
        """The faces of a frame; where there seem to be none, closer looks at parts of it.

        MediaPipe's detector sees 128 x 128 pixels and misses faces below about a tenth of the longer side. A small face
        beside a large one can still be missed.
        """
        faces = self._look(frame, 0, 0)
        for share in _CLOSER_LOOKS:
            side = round(share * min(frame.shape[:2]))
            if faces or side < _SMALLEST_LOOK_PX:
                break
            corners = [(x, y) for y in _spread(frame.shape[0], side) for x in _spread(frame.shape[1], side)]
            faces = _distinct(
                [face for x, y in corners for face in self._look(frame[y : y + side, x : x + side], x, y)]
            )
        return sorted(faces, key=lambda face: -face.side)

    def _look(self, part: UInt8[np.ndarray, "h w 3"], x: int, y: int) -> list[Face]:
        """The faces in a part of a frame whose corner is at (x, y)."""
        height, width = part.shape[:2]
        # MediaPipe ignores strides: a view with padded rows would reach it sheared, and no face would be found.
        data = np.ascontiguousarray(part)
        picture = self._mediapipe.Image(image_format=self._mediapipe.ImageFormat.SRGB, data=data)
        faces = []
        for mesh in self._landmarker.detect(picture).face_landmarks:
            points = ibug_from_mesh(np.array([[p.x * width, p.y * height] for p in mesh]))
            if not _is_plausible(points):
                continue
            inside = ((points >= 0) & (points <= (width, height))).all(1).mean()
            points = points + np.array([x, y], np.float32)
            faces.append(Face(np.concatenate([points.min(0), points.max(0)]), points, float(inside)))
        return faces

    def close(self) -> None:
        self._landmarker.close()


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """MediaPipe's C++ writes start-up notes straight to the process's stderr, and no setting stops it."""
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


# ---- LBP cascade

_LBP_PX = 320  # longer side at which the cascade runs: finer, it is slower and finds more that is no face


class LbpBackend:
    """scikit-image's local-binary-pattern cascade: frontal faces, boxes only, with false positives now and then."""

    name = "lbp"

    def __init__(self) -> None:
        from skimage import data
        from skimage.feature import Cascade

        self._cascade: Any = Cascade(data.lbp_frontal_face_cascade_filename())

    def detect(self, frame: UInt8[np.ndarray, "h w 3"]) -> list[Face]:
        scale = min(1.0, _LBP_PX / max(frame.shape[:2]))
        small = cv2.resize(frame, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        smallest = max(24, min(small.shape[:2]) // 10)
        found = self._cascade.detect_multi_scale(
            img=np.ascontiguousarray(small),
            scale_factor=1.2,
            step_ratio=1,
            min_size=(smallest, smallest),
            max_size=(min(small.shape[:2]), min(small.shape[:2])),
        )
        faces = []
        for hit in found:
            x, y, width, height = (hit[key] / scale for key in ("c", "r", "width", "height"))
            faces.append(Face(np.array([x, y, x + width, y + height], np.float32), None, 0.5))
        return sorted(faces, key=lambda face: -face.side)

    def close(self) -> None:
        pass


# ---- one person over time

_MIN_IOU = 0.2


def track(frames: Sequence[Sequence[Face]], choose: tuple[float | int, float | int] | None = None) -> list[Face | None]:
    """One person's face through the frames of one shot, None where he is not seen.

    choose: a point in pixels; the person whose face covers it most often, else the one nearest to it. Without it, the
    person who is there most, larger faces counting more.
    A face is linked to the person whose last box it overlaps most; after a gap, however long, one that comes back
    within about its own size of where it left is the same person.
    """
    people: list[dict[int, Face]] = []
    for number, faces in enumerate(frames):
        free = set(range(len(people)))
        pairs = [
            (_likeness(people[p][max(people[p])], face, number - max(people[p])), p, f)
            for p in free
            for f, face in enumerate(faces)
        ]
        taken: set[int] = set()
        for likeness, p, f in sorted(pairs, key=lambda pair: -pair[0]):
            if likeness > 0 and p in free and f not in taken:
                people[p][number] = faces[f]
                free.remove(p)
                taken.add(f)
        people += [{number: face} for f, face in enumerate(faces) if f not in taken]
    if not people:
        return [None] * len(frames)
    person = max(people, key=lambda seen: sum(face.side for face in seen.values()))
    if choose is not None:
        point = np.array(choose)
        person = max(people, key=lambda seen: _covers(seen, point))
    return [person.get(number) for number in range(len(frames))]


def _covers(seen: dict[int, Face], point: np.ndarray) -> tuple[int, float]:
    """In how many frames a face covers the point; and its nearness, for when none does."""
    hits = sum(bool((face.box[:2] <= point).all() and (point <= face.box[2:]).all()) for face in seen.values())
    return hits, -min(float(np.linalg.norm(face.center - point)) for face in seen.values())


def _likeness(last: Face, face: Face, gap: int) -> float:
    """How likely two faces are one person's: 0 for no; overlap as a rule; after a gap nearness, at a lower rank."""
    iou = _iou(last, face)
    if iou >= _MIN_IOU:
        return iou
    near = float(np.linalg.norm(last.center - face.center)) < max(last.side, face.side)
    alike = 1 / 1.6 < face.side / max(last.side, 1e-6) < 1.6
    return _MIN_IOU / 2 if gap > 1 and near and alike else 0.0


LBP_SIDE, LBP_DROP = 2.0, 0.02
"""Head box from a box of the cascade, in its sides: how much larger, and how much lower its centre (see test_faces)."""


def head_boxes_from_faces(person: Sequence[Face | None]) -> Float32[np.ndarray, "f 4"]:
    """Head boxes of one shot from face boxes alone, for a backend without landmarks; coarser than `head_boxes`.

    Raises TccpError if there is no face in any frame.
    """
    sides = [face.side for face in person if face is not None]
    if not sides:
        raise TccpError(f"no face in any of the {len(person)} frames of the shot: head boxes need at least one")
    side = float(np.median(sides))
    centers = np.full((len(person), 2), np.nan)
    for number, face in enumerate(person):
        if face is not None:
            centers[number] = face.center + np.array([0, LBP_DROP * side])
    return steady_boxes(centers, LBP_SIDE * side)
