"""FAN's landmarks on S3FD's faces, as in the paper, by the `face-alignment` package (Bulat & Tzimiropoulos 2017).

On a CPU a frame takes about four seconds. The first face of a process takes twenty, because numba compiles.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jaxtyping import Float32, UInt8

from tccp.errors import TccpError
from tccp.faces.face import MAX_FACES, Face
from tccp.weights import weights_key

_DETECTOR_PX = 640
"""S3FD works on a picture with this longer side. Its smallest anchor, 16 pixels, is then small enough: a fortieth."""


class FanBackend:
    """Returns S3FD's boxes, from forehead to chin, as the speech networks expect them."""

    name = "fan"
    works_beside_others = False

    def __init__(self, fan: Path, s3fd: Path) -> None:
        """Loads the published files or others of the same layout. Uses the first CUDA device if there is one."""
        import torch

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        version = importlib.metadata.version("face-alignment")
        self.key = f"fan face-alignment {version} {weights_key(fan)} {weights_key(s3fd)}"
        with _own_cudnn_settings():
            self._aligner = _local_aligner(fan, s3fd, self.device)

    def detect(self, frame: UInt8[np.ndarray, "h w 3"]) -> list[Face]:
        """The faces of a frame. If S3FD finds more than MAX_FACES, only the largest get landmarks."""
        height, width = frame.shape[:2]
        scale = min(1.0, _DETECTOR_PX / max(height, width))
        small = frame if scale == 1 else cv2.resize(frame, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        with _own_cudnn_settings():
            found = self._aligner.face_detector.detect_from_image(np.ascontiguousarray(small))
        # The exact ratios, because resizing rounds the sides. The last number of a row is S3FD's score.
        ratios = np.tile([width / small.shape[1], height / small.shape[0]], 2)
        boxes = np.array([row[:4] for row in found], np.float32).reshape(-1, 4) * ratios.astype(np.float32)
        return self.align(frame, boxes)

    def align(self, frame: UInt8[np.ndarray, "h w 3"], boxes: Float32[np.ndarray, "n 4"]) -> list[Face]:
        """The faces in the given boxes (x0 y0 x1 y1, pixels, forehead to chin), largest first.

        Ignores boxes outside the frame. A face's confidence is the mean of the maxima of its 68 heat maps.
        """
        height, width = frame.shape[:2]
        inside = np.clip(boxes, 0, [width, height, width, height])
        boxes = boxes[((inside[:, 2:] - inside[:, :2]) > 0).all(1)]
        largest = boxes[np.argsort(-(boxes[:, 2:] - boxes[:, :2]).prod(1), kind="stable")[:MAX_FACES]]
        if len(largest) == 0:  # the package would print a warning
            return []
        detected = list(largest.astype(np.float64))  # PyTorch does not accept NumPy's float32 scalars
        with _own_cudnn_settings():
            points, scores, _ = self._aligner.get_landmarks_from_image(
                np.ascontiguousarray(frame), detected_faces=detected, return_landmark_score=True
            )
        # The package's points are pixel indices. Our coordinates are continuous, with pixel centres at + 0.5.
        return [
            Face(box, (p + 0.5).astype(np.float32), float(np.clip(np.mean(s), 0, 1)))
            for box, p, s in zip(largest, points, scores, strict=True)
        ]

    def close(self) -> None:
        pass


def _local_aligner(fan: Path, s3fd: Path, device: str) -> Any:
    """face-alignment's FaceAlignment with two local files instead of the package's own downloads."""
    import torch
    from face_alignment import FaceAlignment, LandmarksType
    from face_alignment.models import FAN

    class LocalFaceAlignment(FaceAlignment):
        def _load_native(self, network_name: str, network_size: int, device: str, dtype: torch.dtype) -> Any:
            network = FAN(network_size)
            with _usable(fan, "FAN landmark"):
                network.load_state_dict(torch.load(fan, map_location="cpu", weights_only=True))
            return network.to(device, dtype=dtype).eval()

    with _usable(s3fd, "S3FD face detector"):
        return LocalFaceAlignment(
            LandmarksType.TWO_D,
            device=device,
            flip_input=False,  # True takes twice as long and makes the maxima sums of two heat maps instead of scores
            face_detector="sfd",
            face_detector_kwargs={"path_to_detector": str(s3fd)},
            compile=False,  # compiling takes minutes and writes into the home folder
        )


@contextlib.contextmanager
def _usable(file: Path, what: str) -> Iterator[None]:
    try:
        yield
    except (TccpError, ImportError):
        raise
    except Exception as error:  # the unpickler may raise any exception for bytes that are not a pickle
        reason = " ".join(str(error).split())[:120]
        raise TccpError(f"{file} is not a usable {what} model ({type(error).__name__}: {reason})") from None


@contextlib.contextmanager
def _own_cudnn_settings() -> Iterator[None]:
    """Restores cuDNN's benchmark mode, which the package turns on for the whole process and so for other networks."""
    import torch

    before = torch.backends.cudnn.benchmark
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
