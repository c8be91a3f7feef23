"""Draws 68 points as a picture that survives an auto-encoder.

A landmark picture has three layers, one per colour channel, so that strokes of different groups that touch or cross do
not mix: red holds brows, nose bridge and outer lip, green holds eyes, nostrils and inner lip, blue holds the jaw. Lips
and eyes are filled, because blur keeps the amount of colour in a filled shape but destroys a thin outline: a closed
mouth is a green line, and opening it adds green in proportion.
"""

from __future__ import annotations

import cv2
import numpy as np
from jaxtyping import Float, UInt8

from tccp.errors import TccpError
from tccp.landmarks.geometry import GROUPS

DRAWING_VERSION = 1
"""Increased when the same points give another picture: cached latents are keyed by it."""
LAYERS: tuple[tuple[str, ...], ...] = (
    ("left_brow", "right_brow", "bridge", "outer_lip"),
    ("left_eye", "right_eye", "nostrils", "inner_lip"),
    ("jaw",),
)
"""The groups of the red, green and blue channel. No two groups of one channel are neighbours on a face."""
FILLED = ("left_eye", "right_eye", "outer_lip", "inner_lip")

_SHIFT = 4  # fractional bits of the coordinates for OpenCV


def _stroke(size_px: int) -> tuple[int, int]:
    """The supersampling factor of a picture, and OpenCV's line thickness in the enlarged picture.

    Drawing large and averaging down gives fractional widths and exact coverage. OpenCV covers one pixel more than an
    even thickness.
    """
    factor = 4 if size_px <= 128 else 2
    return factor, max(2, 2 * round((max(1.75, size_px / 73) * factor - 1) / 2))


def stroke_px(size_px: int) -> float:
    """Width of a stroke in a landmark picture. An f8 auto-encoder at 64 px and an f16 one at 256 px preserve it."""
    factor, thickness = _stroke(size_px)
    return (thickness + 1) / factor


def draw(points: Float[np.ndarray, "f 68 2"], size_px: int) -> UInt8[np.ndarray, "f {size_px} {size_px} 3"]:
    """Draws landmark pictures: the groups of points on black, anti-aliased, one colour channel per entry of `LAYERS`.

    points: crop coordinates, 0..1 inside the picture; parts outside are cut off. A face with a NaN point gives a black
    picture.
    Raises TccpError if size_px is below 16.
    """
    if size_px < 16:
        raise TccpError(f"landmark pictures of {size_px} px are too small: use at least 16 px")
    factor, stroke = _stroke(size_px)
    large = size_px * factor
    pictures = np.zeros((len(points), size_px, size_px, 3), np.uint8)
    plane = np.zeros((large, large), np.uint8)
    # OpenCV's integer coordinates are pixel centres. The bound prevents an overflow in its fixed-point arithmetic.
    fixed = np.clip((points * large - 0.5) * 2**_SHIFT, -(2**20), 2**20)
    for index, face in enumerate(fixed):
        if not np.isfinite(face).all():
            continue
        face = np.rint(face).astype(np.int32)
        for channel, groups in enumerate(LAYERS):
            plane[:] = 0
            for group in groups:
                line = face[GROUPS[group][0] : GROUPS[group][-1] + 1]
                if group in FILLED:
                    cv2.fillPoly(plane, [line], 255, cv2.LINE_8, _SHIFT)
                cv2.polylines(plane, [line], group in FILLED, 255, stroke, cv2.LINE_8, _SHIFT)
            pictures[index, :, :, channel] = cv2.resize(plane, (size_px, size_px), interpolation=cv2.INTER_AREA)
    return pictures
