"""68 points drawn as a picture that an auto-encoder keeps.

A landmark picture is three layers, one per colour channel, so that strokes of different groups that touch or cross can
never mix: red holds brows, nose bridge and outer lip, green eyes, nostrils and inner lip, blue the jaw. Lips and eyes
are filled, because the amount of colour in a filled shape survives what a blurred outline loses: a closed mouth is
a green line, and every bit of opening adds green.
"""

from __future__ import annotations

import cv2
import numpy as np
from jaxtyping import Float, UInt8

from tccp.errors import TccpError
from tccp.landmarks.geometry import GROUPS

LAYERS: tuple[tuple[str, ...], ...] = (
    ("left_brow", "right_brow", "bridge", "outer_lip"),
    ("left_eye", "right_eye", "nostrils", "inner_lip"),
    ("jaw",),
)
"""Groups of the red, green and blue channel. Within a channel no two groups are neighbours on a face."""
FILLED = ("left_eye", "right_eye", "outer_lip", "inner_lip")

_SHIFT = 4  # fractional bits of the coordinates handed to OpenCV


def _stroke(size_px: int) -> tuple[int, int]:
    """How strokes are drawn: (supersampling factor, OpenCV's thickness there).

    Drawn large and averaged down, strokes have fractional widths and exact coverage. OpenCV covers one pixel more than
    an even thickness says.
    """
    factor = 4 if size_px <= 128 else 2
    return factor, max(2, 2 * round((max(1.75, size_px / 73) * factor - 1) / 2))


def stroke_px(size_px: int) -> float:
    """Width of a stroke in a landmark picture: an f8 auto-encoder at 64 px and an f16 one at 256 px keep it."""
    factor, thickness = _stroke(size_px)
    return (thickness + 1) / factor


def draw(points: Float[np.ndarray, "f 68 2"], size_px: int) -> UInt8[np.ndarray, "f {size_px} {size_px} 3"]:
    """Landmark pictures: the points' groups on black, anti-aliased, one colour layer per set of groups (`LAYERS`).

    points: crop coordinates, 0..1 inside the picture; what lies outside is cut off. A face with a NaN point leaves its
    picture black.
    Raises TccpError if size_px is below 16.
    """
    if size_px < 16:
        raise TccpError(f"landmark pictures of {size_px} px are asked for; they need at least 16 px")
    factor, stroke = _stroke(size_px)
    large = size_px * factor
    pictures = np.zeros((len(points), size_px, size_px, 3), np.uint8)
    plane = np.zeros((large, large), np.uint8)
    # OpenCV's whole coordinates are pixel centres; the bound keeps its fixed-point arithmetic from overflowing.
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
