"""The head box: from landmarks to a steady square, from a mask to the crop, and back into the picture.

A box is (x0, y0, x1, y1) in the continuous coordinates of `tccp.landmarks`: pixel (column i, row j) covers
[i, i + 1) x [j, j + 1). Head boxes have whole corners, so that a box, its mask and its crop say exactly the same
(`crop_box_from_mask` inverts `mask_from_box`), and pasting at native size resamples nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Bool, Float, Float32, UInt8

from tccp.config import HeadBoxSettings, TccpError
from tccp.landmarks import head_pose, smooth_over_time

SIDE = 3.6
"""Side of the head box in units of the distance between the outer eye corners (MEAN_FACE's unit). The face, brows to
chin, is 1.6: above the brows there is room for the skull and hair (1.2), below the chin for neck and collar (0.8)."""
CENTER = np.array([0.0, 0.32, 0.6])
"""Centre of the head box in MEAN_FACE's coordinates: in height as SIDE says, in depth near the axis of the neck, so
that turning the head does not move it."""
MASK_FILL = 127
"""Grey value of masked pixels in every masked scene, of training and of generation."""
LETTERBOX_FILL = 0
"""Value of what a fitted scene does not cover; black, so that it cannot be taken for the mask."""

_PATH_SIGMA_FRAMES = 20.0
_PIVOT_PRIOR = 2e-3  # how firmly the pivot stays at CENTER, as a variance of the head's rotation matrix
_PIVOT_REACH = 0.6


def head_boxes(
    landmarks_px: Float[np.ndarray, "f 68 2"], confidence: Float[np.ndarray, "f"] | None = None
) -> Float32[np.ndarray, "f 4"]:
    """The head box of each frame of one shot: square, of one size, with whole corners, on a steady path.

    landmarks_px: in picture pixels; frames without a face are NaN (or have confidence 0), their box is interpolated.
    Size and place come from the rigid points alone and are those of the head seen from the front, so they follow
    neither yaw nor mouth: the centre is the point of the head that moves least in this shot (its pivot), near the neck.
    Raises TccpError if no frame has a face.
    """
    known = np.isfinite(landmarks_px).all((1, 2))
    if confidence is not None:
        known &= confidence > 0
    if not known.any():
        raise TccpError(f"no face in any of the {len(landmarks_px)} frames of the shot: head boxes need at least one")
    pose = head_pose(landmarks_px[known].astype(np.float64))
    scale = float(np.median(pose.scale))
    side = max(2, round(SIDE * scale))

    axes = pose.rotation[:, :2] * scale
    moves, at_center = axes - axes.mean(0), pose.origin + axes @ CENTER
    drift = at_center - at_center.mean(0)
    # Least squares over (pivot - CENTER): the path it leaves is uncorrelated with the entries of the rotation matrix.
    normal = np.einsum("fij,fik->jk", moves, moves) + _PIVOT_PRIOR * scale**2 * len(moves) * np.eye(3)
    pivot = -np.linalg.solve(normal, np.einsum("fij,fi->j", moves, drift))
    pivot *= min(1.0, _PIVOT_REACH / max(float(np.linalg.norm(pivot)), 1e-9))
    path = at_center.mean(0) + drift + moves @ pivot

    frames = np.arange(len(known))
    filled = np.stack([np.interp(frames, frames[known], path[:, axis]) for axis in (0, 1)], 1)
    corner = _whole_steps(smooth_over_time(filled, _PATH_SIGMA_FRAMES) - side / 2)
    return np.concatenate([corner, corner + side], 1).astype(np.float32)


def _whole_steps(path: Float[np.ndarray, "f 2"]) -> Float[np.ndarray, "f 2"]:
    """The path rounded, but left where it is until it is 3/4 pixel off: no flicker between two neighbours."""
    steps = np.rint(path)
    for i in range(1, len(steps)):
        steps[i] = np.where(np.abs(path[i] - steps[i - 1]) <= 0.75, steps[i - 1], steps[i])
    return steps


def jitter(
    boxes: Float[np.ndarray, "f 4"], settings: HeadBoxSettings, rng: np.random.Generator
) -> Float32[np.ndarray, "f 4"]:
    """The boxes of a clip moved and resized by one random draw, again with whole corners.

    One draw for the whole clip: mask, crop and landmarks all follow from the result, so neither place nor size of the
    mask betrays the pose.
    """
    side = boxes[:, 2] - boxes[:, 0]
    dx, dy = rng.uniform(-settings.jitter_center, settings.jitter_center, 2)
    new_side = np.maximum(np.rint(side * (1 + rng.uniform(-settings.jitter_size, settings.jitter_size))), 2)
    # Offsets are rounded, not corners: a steady path stays steady.
    corner = boxes[:, :2] + np.rint(side[:, None] * (dx, dy) + (side - new_side)[:, None] / 2)
    return np.concatenate([corner, corner + new_side[:, None]], 1).astype(np.float32)


def _touched(box: Float[np.ndarray, "4"]) -> tuple[int, int, int, int]:
    """The pixels that a box touches, as (x0, y0, x1, y1), not cut at the picture's border."""
    if not np.isfinite(box).all() or box[2] <= box[0] or box[3] <= box[1]:
        raise TccpError(f"box {np.round(box, 2).tolist()} is not x0 < x1, y0 < y1")
    # Boxes travel as float32: a hair over a whole number is that number.
    x0, y0 = np.floor(box[:2] + 1e-3)
    x1, y1 = np.ceil(box[2:] - 1e-3)
    return int(x0), int(y0), int(x1), int(y1)


def _clipped(box: Float[np.ndarray, "4"], height: int, width: int) -> tuple[slice, slice]:
    x0, y0, x1, y1 = _touched(box)
    return slice(max(y0, 0), max(min(y1, height), 0)), slice(max(x0, 0), max(min(x1, width), 0))


def mask_from_box(box: Float[np.ndarray, "4"], height: int, width: int) -> Bool[np.ndarray, "{height} {width}"]:
    """True where the box touches a pixel. Raises TccpError for a box without area."""
    mask = np.zeros((height, width), bool)
    mask[_clipped(box, height, width)] = True
    return mask


def crop_box_from_mask(mask: Bool[np.ndarray, "h w"]) -> Float32[np.ndarray, "4"] | None:
    """THE way from a mask to the crop box, in training and in generation; None for an empty mask.

    The smallest square around the mask. A mask cut by the picture's border is completed beyond that border, as long as
    its longer side is whole; else the square grows evenly to both sides.
    """
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    if not len(columns):
        return None
    low = np.array([columns[0], rows[0]])
    high = np.array([columns[-1], rows[-1]]) + 1
    missing = (high - low).max() - (high - low)
    for axis, length in enumerate((mask.shape[1], mask.shape[0])):
        cut_low, cut_high = low[axis] == 0, high[axis] == length
        before = missing[axis] if cut_low and not cut_high else 0 if cut_high and not cut_low else missing[axis] // 2
        low[axis] -= before
        high[axis] += missing[axis] - before
    return np.concatenate([low, high]).astype(np.float32)


@dataclass(frozen=True)
class SceneFit:
    """How a scene of any shape becomes a square picture: scaled to fit, centred, bars of LETTERBOX_FILL."""

    source_width: int
    source_height: int
    size_px: int

    @property
    def _placed(self) -> tuple[int, int, int, int]:
        """x, y, width, height of the scene inside the square, whole pixels."""
        scale = self.size_px / max(self.source_width, self.source_height)
        width, height = max(1, round(self.source_width * scale)), max(1, round(self.source_height * scale))
        return (self.size_px - width) // 2, (self.size_px - height) // 2, width, height

    def fit(self, frame: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "size size 3"]:
        """Raises TccpError if the frame is not of the source's size."""
        if frame.shape[:2] != (self.source_height, self.source_width):
            raise TccpError(
                f"frame is {frame.shape[1]}x{frame.shape[0]}, the scene {self.source_width}x{self.source_height}: "
                "every frame of a scene has the scene's size"
            )
        x, y, width, height = self._placed
        smaller = width < self.source_width
        picture = np.full((self.size_px, self.size_px, 3), LETTERBOX_FILL, np.uint8)
        picture[y : y + height, x : x + width] = cv2.resize(
            frame, (width, height), interpolation=cv2.INTER_AREA if smaller else cv2.INTER_LINEAR
        )
        return picture

    def points(self, points_px: Float[np.ndarray, "*f 2"]) -> Float32[np.ndarray, "*f 2"]:
        """Source pixels to fitted pixels."""
        x, y, width, height = self._placed
        scale = np.array([width / self.source_width, height / self.source_height])
        return (points_px * scale + (x, y)).astype(np.float32)

    def boxes(self, boxes: Float[np.ndarray, "f 4"]) -> Float32[np.ndarray, "f 4"]:
        """Source pixels to fitted pixels; corners are no longer whole."""
        return self.points(boxes.reshape(-1, 2, 2)).reshape(-1, 4)


def mask_scene(
    scenes: UInt8[np.ndarray, "f h w 3"], boxes_fitted: Float[np.ndarray, "f 4"]
) -> UInt8[np.ndarray, "f h w 3"]:
    """Scenes with every pixel that the box touches set to MASK_FILL: nothing of the head bleeds through."""
    masked = scenes.copy()
    for picture, box in zip(masked, boxes_fitted, strict=True):
        picture[_clipped(box, *picture.shape[:2])] = MASK_FILL
    return masked


def to_crop(points_px: Float[np.ndarray, "*f 2"], box: Float[np.ndarray, "4"]) -> Float32[np.ndarray, "*f 2"]:
    """Picture pixels to crop coordinates, 0..1 inside the box."""
    return ((points_px - box[:2]) / (box[2:] - box[:2])).astype(np.float32)


def from_crop(points: Float[np.ndarray, "*f 2"], box: Float[np.ndarray, "4"]) -> Float32[np.ndarray, "*f 2"]:
    """Inverse of `to_crop`."""
    return (points * (box[2:] - box[:2]) + box[:2]).astype(np.float32)


def _resample(
    picture: np.ndarray, origin: tuple[float, float], step: tuple[float, float], size: tuple[int, int], border: int
) -> np.ndarray:
    """`size` = (width, height) pixels, `step` input pixels apart, the first one's corner at `origin`.

    Where pixels are left out, each output pixel is the mean over its own area.
    """
    oversample = max(1, int(np.ceil(max(step) - 1e-6)))
    (x, y), (sx, sy) = origin, (step[0] / oversample, step[1] / oversample)
    # OpenCV's whole coordinates are pixel centres; ours are pixel corners.
    matrix = np.array([[sx, 0, x + sx / 2 - 0.5], [0, sy, y + sy / 2 - 0.5]])
    interpolation = cv2.INTER_CUBIC if max(step) < 1 - 1e-6 else cv2.INTER_LINEAR
    large = (size[0] * oversample, size[1] * oversample)
    out = cv2.warpAffine(picture, matrix, large, flags=interpolation | cv2.WARP_INVERSE_MAP, borderMode=border)
    return out if oversample == 1 else cv2.resize(out, size, interpolation=cv2.INTER_AREA)


def crop(
    frame: UInt8[np.ndarray, "h w 3"], box: Float[np.ndarray, "4"], size_px: int
) -> UInt8[np.ndarray, "{size_px} {size_px} 3"]:
    """What the box shows, as a square picture; beyond the border the edge pixels are repeated.

    Raises TccpError for a box without area.
    """
    _touched(box)
    step = (float(box[2] - box[0]) / size_px, float(box[3] - box[1]) / size_px)
    return _resample(frame, (float(box[0]), float(box[1])), step, (size_px, size_px), cv2.BORDER_REPLICATE)
