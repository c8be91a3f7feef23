"""The face in a track's small pictures: decoded, its landmarks in their pixels, colours at places of the face."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Float, Float32, UInt8

from preprocessing.reels import CHIP_PX, Track, chip_box
from tccp.landmarks.geometry import MIRROR, NUM_POINTS

SPACING_FRAMES = 5
"""Chips looked at are at least so far apart: neighbours show the same."""


@dataclass(frozen=True, eq=False)
class Chip:
    """picture: RGB, CHIP_PX a side. points: 68 landmarks in its pixels, whole numbers being pixel centres."""

    frame: int
    picture: UInt8[np.ndarray, "s s 3"]
    points: Float32[np.ndarray, "68 2"]


def chip_frames(track: Track) -> list[int]:
    """Frames, ascending and SPACING_FRAMES apart or more, at which the track has a chip and landmarks."""
    frames: list[int] = []
    for frame in sorted(track.chips):
        known = np.isfinite(track.landmarks[frame - track.start_frame]).all()
        if known and (not frames or frame - frames[-1] >= SPACING_FRAMES):
            frames.append(frame)
    return frames


def read_chip(track: Track, frame: int, side_px: int | None = CHIP_PX) -> Chip:
    """The chip of a frame, shrunk to `side_px` if it is larger; None leaves it as it is."""
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
class Places:
    """Places of the face, each a weighted mean of landmarks.

    half: -1 on the half of the face that is on the picture's left, 1 on the other, 0 on the midline.
    """

    weights: Float[np.ndarray, "p 68"]
    half: Float[np.ndarray, " p"]

    @classmethod
    def of(cls, *left: tuple[int, int, float]) -> Places:
        """(a, b, share): so far on the way from landmark a to landmark b; those off the midline on both halves."""
        weights, half = [], []
        for a, b, share in left:
            place = np.zeros(NUM_POINTS)
            place[a] += 1 - share
            place[b] += share
            mirrored = np.zeros(NUM_POINTS)
            mirrored[MIRROR] = place
            middle = np.array_equal(place, mirrored)
            weights += [place] if middle else [place, mirrored]
            half += [0] if middle else [-1, 1]
        return cls(np.array(weights), np.array(half, np.float64))


def values_at(
    picture: Float32[np.ndarray, "s s c"], points: Float32[np.ndarray, "68 2"], places: Places
) -> Float32[np.ndarray, "p c"]:
    """A picture's values at places of the face, interpolated."""
    at = (places.weights @ points.astype(np.float64)).astype(np.float32)
    values = cv2.remap(picture, at[None, :, 0], at[None, :, 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(values[0], np.float32)


def lab(picture: UInt8[np.ndarray, "a b 3"], sigma_px: float) -> Float32[np.ndarray, "a b 3"]:
    """Lightness and the two colour axes, 0..255 each, of a blurred picture."""
    blurred = cv2.GaussianBlur(picture, (0, 0), sigma_px)
    return cv2.cvtColor(blurred, cv2.COLOR_RGB2LAB).astype(np.float32)


CHEEKS = Places.of(
    *((eye, 31, share) for eye in (40, 41) for share in (0.35, 0.55, 0.75)),
    *((eye, jaw, share) for eye, jaw in ((41, 2), (36, 1)) for share in (0.35, 0.5)),
    *((point, point, 0.0) for point in (27, 28, 29, 30)),
    (21, 22, 0.5),
)
"""Skin of the upper face: cheeks, bridge of the nose, between the brows."""
