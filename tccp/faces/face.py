"""The face type and the interface that all face backends share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, UInt8

MAX_FACES = 5
"""A backend returns at most this many faces per frame, the largest ones."""


@dataclass(frozen=True)
class Face:
    """A face in one frame.

    box: x0 y0 x1 y1 in pixels around the face (not the head). landmarks_px: 68 iBUG points, None from a backend without
    landmarks. confidence: 0..1, the share of points inside the picture, or 0.5 from a backend without a score.
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
    """key: everything that the results depend on, in one line: backend, version of its package, weights.

    works_beside_others: several in one process work at the same time, each with one thread.
    """

    name: str
    key: str
    works_beside_others: bool

    def detect(self, frame: UInt8[np.ndarray, "h w 3"]) -> list[Face]:
        """The faces of an RGB frame, largest first; the list may be empty. Frames do not influence each other."""

    def close(self) -> None: ...


def iou(a: Face, b: Face) -> float:
    """Intersection over union of two faces' boxes."""
    overlap = float(np.maximum(np.minimum(a.box[2:], b.box[2:]) - np.maximum(a.box[:2], b.box[:2]), 0).prod())
    return overlap / max(a.side**2 + b.side**2 - overlap, 1e-6)
