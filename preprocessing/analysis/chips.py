"""Reads a track's chips (small face pictures): pixels, landmarks in their pixels, and colours at points of the face."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Float, Float32, UInt8

from preprocessing.reels import CHIP_PX, Track, chip_box
from tccp.landmarks.geometry import MIRROR, NUM_POINTS

SPACING_FRAMES = 5
"""Least distance between the chips that are used: neighbouring chips look alike."""


@dataclass(frozen=True, eq=False)
class Chip:
    """picture: RGB, CHIP_PX on each side. points: 68 landmarks in its pixels; whole numbers are pixel centres."""

    frame: int
    picture: UInt8[np.ndarray, "s s 3"]
    points: Float32[np.ndarray, "68 2"]


def chip_frames(track: Track) -> list[int]:
    """Frames with a chip and landmarks, ascending and at least SPACING_FRAMES apart."""
    frames: list[int] = []
    for frame in sorted(track.chips):
        known = np.isfinite(track.landmarks[frame - track.start_frame]).all()
        if known and (not frames or frame - frames[-1] >= SPACING_FRAMES):
            frames.append(frame)
    return frames


def read_chip(track: Track, frame: int, side_px: int | None = CHIP_PX) -> Chip:
    """The chip of a frame, resized to `side_px`; None keeps its size."""
    data = cv2.imdecode(np.frombuffer(track.chips[frame], np.uint8), cv2.IMREAD_COLOR)
    assert data is not None, "chips are JPEG pictures"
    if side_px is not None and data.shape[0] != side_px:
        shrinks = data.shape[0] > side_px
        data = cv2.resize(data, (side_px, side_px), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    box = chip_box(track.box[frame - track.start_frame])
    scale = data.shape[0] / float(box[2] - box[0])
    points = (track.landmarks[frame - track.start_frame] - box[:2]) * scale - 0.5
    return Chip(frame, np.asarray(cv2.cvtColor(data, cv2.COLOR_BGR2RGB), np.uint8), points.astype(np.float32))


@dataclass(frozen=True, eq=False)
class FacePoints:
    """p points of the face, each a weighted mean of landmarks.

    half: -1 for points on the half of the face that is left in the picture, 1 on the other half, 0 on the midline.
    """

    weights: Float[np.ndarray, "p 68"]
    half: Float[np.ndarray, " p"]

    @classmethod
    def of(cls, *left: tuple[int, int, float]) -> FacePoints:
        """Points between landmarks a and b, at `share` of the way, each given as (a, b, share).

        Points off the midline are mirrored to the other half as well.
        """
        weights, half = [], []
        for a, b, share in left:
            point = np.zeros(NUM_POINTS)
            point[a] += 1 - share
            point[b] += share
            mirrored = np.zeros(NUM_POINTS)
            mirrored[MIRROR] = point
            middle = np.array_equal(point, mirrored)
            weights += [point] if middle else [point, mirrored]
            half += [0] if middle else [-1, 1]
        return cls(np.array(weights), np.array(half, np.float64))


def values_at(
    picture: Float32[np.ndarray, "s s c"], points: Float32[np.ndarray, "68 2"], face_points: FacePoints
) -> Float32[np.ndarray, "p c"]:
    """A picture's values at points of the face, interpolated. points: the landmarks in the picture's pixels."""
    at = (face_points.weights @ points.astype(np.float64)).astype(np.float32)
    values = cv2.remap(picture, at[None, :, 0], at[None, :, 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(values[0], np.float32)


def lab(picture: UInt8[np.ndarray, "a b 3"], sigma_px: float) -> Float32[np.ndarray, "a b 3"]:
    """The picture, blurred, in the Lab colour space: lightness and two colour axes, 0..255 each."""
    blurred = cv2.GaussianBlur(picture, (0, 0), sigma_px)
    return cv2.cvtColor(blurred, cv2.COLOR_RGB2LAB).astype(np.float32)


CHEEKS = FacePoints.of(
    *((eye, 31, share) for eye in (40, 41) for share in (0.35, 0.55, 0.75)),
    *((eye, jaw, share) for eye, jaw in ((41, 2), (36, 1)) for share in (0.35, 0.5)),
    *((point, point, 0.0) for point in (27, 28, 29, 30)),
    (21, 22, 0.5),
)
"""Points on the skin of the upper face: cheeks, bridge of the nose, between the brows."""
