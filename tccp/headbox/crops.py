"""Scenes fitted into a square, and crops of head boxes."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Float, Float32, UInt8

from tccp.errors import TccpError
from tccp.headbox.masks import MASK_FILL, touched

LETTERBOX_FILL = 0
"""Value of the bars beside a fitted scene. Black, so that networks can distinguish bars from the mask."""
OUTSIDE_FILL = MASK_FILL
"""Value of a crop's pixels beyond the picture's border, where nothing is known. Losses leave them out."""


@dataclass(frozen=True)
class SceneFit:
    """Fits a scene of any shape into a square picture: scales it, centres it and adds bars of LETTERBOX_FILL."""

    source_width: int
    source_height: int
    size_px: int

    @property
    def _placed(self) -> tuple[int, int, int, int]:
        """x, y, width and height of the scene inside the square, in integer pixels."""
        scale = self.size_px / max(self.source_width, self.source_height)
        width, height = max(1, round(self.source_width * scale)), max(1, round(self.source_height * scale))
        return (self.size_px - width) // 2, (self.size_px - height) // 2, width, height

    def fit(self, frame: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "size size 3"]:
        """Raises TccpError if the frame is not of the source's size."""
        if frame.shape[:2] != (self.source_height, self.source_width):
            raise TccpError(
                f"frame is {frame.shape[1]}x{frame.shape[0]}, the scene {self.source_width}x{self.source_height}: "
                "every frame of a scene must have the scene's size"
            )
        x, y, width, height = self._placed
        smaller = width < self.source_width
        picture = np.full((self.size_px, self.size_px, 3), LETTERBOX_FILL, np.uint8)
        picture[y : y + height, x : x + width] = cv2.resize(
            frame, (width, height), interpolation=cv2.INTER_AREA if smaller else cv2.INTER_LINEAR
        )
        return picture

    def points(self, points_px: Float[np.ndarray, "*f 2"]) -> Float32[np.ndarray, "*f 2"]:
        """Converts source pixels to fitted pixels."""
        x, y, width, height = self._placed
        scale = np.array([width / self.source_width, height / self.source_height])
        return (points_px * scale + (x, y)).astype(np.float32)

    def boxes(self, boxes: Float[np.ndarray, "f 4"]) -> Float32[np.ndarray, "f 4"]:
        """Converts source pixels to fitted pixels. The corners are no longer integers."""
        return self.points(boxes.reshape(-1, 2, 2)).reshape(-1, 4)


def to_crop(points_px: Float[np.ndarray, "*f 2"], box: Float[np.ndarray, "4"]) -> Float32[np.ndarray, "*f 2"]:
    """Converts picture pixels to crop coordinates, 0..1 inside the box."""
    return ((points_px - box[:2]) / (box[2:] - box[:2])).astype(np.float32)


def from_crop(points: Float[np.ndarray, "*f 2"], box: Float[np.ndarray, "4"]) -> Float32[np.ndarray, "*f 2"]:
    """Inverse of `to_crop`."""
    return (points * (box[2:] - box[:2]) + box[:2]).astype(np.float32)


def resample(
    picture: Float32[np.ndarray, "h w 3"], origin: tuple[float, float], step: tuple[float, float], size: tuple[int, int]
) -> Float32[np.ndarray, "y x 3"]:
    """Resamples a picture to `size` = (width, height) pixels that are `step` input pixels apart.

    origin: position of the first pixel's corner in the input. Beyond the input, its edge pixels are repeated. If there
    are fewer pixels than in the input, each is the mean over its own area.
    """
    oversample = max(1, int(np.ceil(max(step) - 1e-6)))
    (x, y), (sx, sy) = origin, (step[0] / oversample, step[1] / oversample)
    # OpenCV's integer coordinates are pixel centres; ours are pixel corners.
    matrix = np.array([[sx, 0, x + sx / 2 - 0.5], [0, sy, y + sy / 2 - 0.5]])
    interpolation = cv2.INTER_CUBIC if max(step) < 1 - 1e-6 else cv2.INTER_LINEAR
    large = (size[0] * oversample, size[1] * oversample)
    flags = interpolation | cv2.WARP_INVERSE_MAP
    out = cv2.warpAffine(picture, matrix, large, flags=flags, borderMode=cv2.BORDER_REPLICATE)
    return out if oversample == 1 else cv2.resize(out, size, interpolation=cv2.INTER_AREA)


def inside_picture(box: Float[np.ndarray, "4"], width: int, height: int) -> Float32[np.ndarray, "4"]:
    """The part of a box that lies in a picture of this size: x0 y0 x1 y1 in crop coordinates, each within 0..1.

    0 0 1 1 for a box inside the picture. x0 = x1 or y0 = y1 for a box outside it.
    """
    corners = np.array([[0, 0], [width, height]], np.float64)
    return np.clip(to_crop(corners, box.astype(np.float64)), 0, 1).reshape(4)


def mark_outside(picture: UInt8[np.ndarray, "s s 3"], inside: Float32[np.ndarray, "4"]) -> UInt8[np.ndarray, "s s 3"]:
    """The crop with OUTSIDE_FILL in the pixels whose centres are not in `inside` (`inside_picture`)."""
    if (inside == (0, 0, 1, 1)).all():
        return picture
    centers = (np.arange(len(picture)) + 0.5) / len(picture)
    columns, rows = ((inside[axis] < centers) & (centers < inside[axis + 2]) for axis in (0, 1))
    return np.where((rows[:, None] & columns)[..., None], picture, np.uint8(OUTSIDE_FILL))


LITTLE_VISIBLE = 0.15
"""Share of a picture outside the head box below which users are warned: networks see little of the scene."""


def visible_share(boxes: Float[np.ndarray, "f 4"], width: int, height: int) -> Float32[np.ndarray, "f"]:
    """The share of a picture of this size that each head box leaves visible: 1 is all of it, 0 nothing."""
    sides = np.minimum(boxes[:, 2:], (width, height)) - np.maximum(boxes[:, :2], 0)
    return (1 - np.maximum(sides, 0).prod(1) / (width * height)).astype(np.float32)


def crop(
    frame: UInt8[np.ndarray, "h w 3"], box: Float[np.ndarray, "4"], size_px: int, repeat_edge: bool = False
) -> UInt8[np.ndarray, "{size_px} {size_px} 3"]:
    """The content of the box as a square picture. Pixels beyond the frame's border are OUTSIDE_FILL.

    repeat_edge: repeat the frame's edge there instead, so that the picture can be cropped again up to the border.
    Raises TccpError for a box without area.
    """
    x0, y0, x1, y1 = touched(box)
    height, width = frame.shape[:2]
    # Converts only the needed part to float. Rounding to 8 bits twice would brighten the crop.
    left, top = int(np.clip(x0 - 2, 0, width - 1)), int(np.clip(y0 - 2, 0, height - 1))
    part = frame[top : max(y1 + 2, top + 1), left : max(x1 + 2, left + 1)].astype(np.float32)
    origin = (float(box[0]) - left, float(box[1]) - top)
    step = (float(box[2] - box[0]) / size_px, float(box[3] - box[1]) / size_px)
    picture = resample(part, origin, step, (size_px, size_px))
    rounded = np.clip(np.rint(picture), 0, 255).astype(np.uint8)
    return rounded if repeat_edge else mark_outside(rounded, inside_picture(box, width, height))
