"""FAN's landmarks on S3FD's faces, as the paper takes them: the `face-alignment` package (Bulat & Tzimiropoulos 2017).

On a CPU a frame takes some four seconds, and the first face of a process, for which numba compiles, twenty.
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
"""Longer side at which S3FD looks: its smallest anchor, 16 pixels, is then a fortieth of it, less than is of use."""


class FanBackend:
    """Boxes are S3FD's: from forehead to chin, as the speech networks expect them."""

    name = "fan"

    def __init__(self, fan: Path, s3fd: Path) -> None:
        """The published files, or others of their layout. Works on the first CUDA device where there is one."""
        import torch

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        version = importlib.metadata.version("face-alignment")
        self.key = f"fan face-alignment {version} {weights_key(fan)} {weights_key(s3fd)}"
        with _own_cudnn_settings():
            self._aligner = _local_aligner(fan, s3fd, self.device)

    def detect(self, frame: UInt8[np.ndarray, "h w 3"]) -> list[Face]:
        """The faces of a frame. Where S3FD sees more than MAX_FACES, the landmarks of the largest are looked for."""
        height, width = frame.shape[:2]
        scale = min(1.0, _DETECTOR_PX / max(height, width))
        small = frame if scale == 1 else cv2.resize(frame, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        with _own_cudnn_settings():
            found = self._aligner.face_detector.detect_from_image(np.ascontiguousarray(small))
        # By what the small picture really is of the frame's sides; the last number of a row is S3FD's score.
        across = np.tile([width / small.shape[1], height / small.shape[0]], 2)
        boxes = np.array([row[:4] for row in found], np.float32).reshape(-1, 4) * across.astype(np.float32)
        return self.align(frame, boxes)

    def align(self, frame: UInt8[np.ndarray, "h w 3"], boxes: Float32[np.ndarray, "n 4"]) -> list[Face]:
        """The faces in boxes (x0 y0 x1 y1, pixels, forehead to chin) that are known, largest first.

        Boxes outside the frame hold none. A face's confidence is the mean of its 68 heat maps' maxima.
        """
        height, width = frame.shape[:2]
        inside = np.clip(boxes, 0, [width, height, width, height])
        boxes = boxes[((inside[:, 2:] - inside[:, :2]) > 0).all(1)]
        largest = boxes[np.argsort(-(boxes[:, 2:] - boxes[:, :2]).prod(1), kind="stable")[:MAX_FACES]]
        if len(largest) == 0:  # of which the package would warn
            return []
        known = list(largest.astype(np.float64))  # single numbers of float32 are none that PyTorch takes
        with _own_cudnn_settings():
            points, scores, _ = self._aligner.get_landmarks_from_image(
                np.ascontiguousarray(frame), detected_faces=known, return_landmark_score=True
            )
        # The package's points are indices of pixels; ours are continuous, and a pixel's centre lies at its middle.
        return [
            Face(box, (p + 0.5).astype(np.float32), float(np.clip(np.mean(s), 0, 1)))
            for box, p, s in zip(largest, points, scores, strict=True)
        ]

    def close(self) -> None:
        pass


def _local_aligner(fan: Path, s3fd: Path, device: str) -> Any:
    """face-alignment's FaceAlignment on two files of this machine, where the package itself would download them."""
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
            flip_input=False,  # else twice as slow, and the heat maps' maxima are sums of two, not scores
            face_detector="sfd",
            face_detector_kwargs={"path_to_detector": str(s3fd)},
            compile=False,  # it would take minutes, and write below the home folder
        )


@contextlib.contextmanager
def _usable(file: Path, what: str) -> Iterator[None]:
    try:
        yield
    except (TccpError, ImportError):
        raise
    except Exception as error:  # on bytes that are no pickle the unpickler raises anything
        reason = " ".join(str(error).split())[:120]
        raise TccpError(f"{file} is not a usable {what} model ({type(error).__name__}: {reason})") from None


@contextlib.contextmanager
def _own_cudnn_settings() -> Iterator[None]:
    """The package turns cuDNN's benchmark on for the whole process, where it would change others' results."""
    import torch

    before = torch.backends.cudnn.benchmark
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
