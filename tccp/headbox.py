"""The head box: from landmarks to a steady square, from a mask to the crop, and back into the picture.

A box is (x0, y0, x1, y1) in the continuous coordinates of `tccp.landmarks`: pixel (column i, row j) covers
[i, i + 1) x [j, j + 1). Head boxes have whole corners, so that a box, its mask and its crop say exactly the same
(`crop_box_from_mask` inverts `mask_from_box`), and pasting at native size resamples nothing.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Bool, Float, Float32, UInt8

from tccp.config import HeadBoxSettings
from tccp.errors import TccpError
from tccp.landmarks import head_pose, smooth_over_time

SIDE = 3.9
"""Side of the head box in units of the distance between the outer eye corners (MEAN_FACE's unit). The face, brows to
chin, is 1.6: above the brows there is room for the skull and hair (1.4), below the chin for neck and collar (0.9)."""
CENTER = np.array([0.0, 0.25, 0.75])
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

    axes = pose.rotation[:, :2] * scale
    moves, at_center = axes - axes.mean(0), pose.origin + axes @ CENTER
    drift = at_center - at_center.mean(0)
    # Least squares over (pivot - CENTER): the path it leaves is uncorrelated with the entries of the rotation matrix.
    normal = np.einsum("fij,fik->jk", moves, moves) + _PIVOT_PRIOR * scale**2 * len(moves) * np.eye(3)
    pivot = -np.linalg.solve(normal, np.einsum("fij,fi->j", moves, drift))
    pivot *= min(1.0, _PIVOT_REACH / max(float(np.linalg.norm(pivot)), 1e-9))
    path = at_center.mean(0) + drift + moves @ pivot

    centers = np.full((len(known), 2), np.nan)
    centers[known] = path
    return steady_boxes(centers, SIDE * scale)


def steady_boxes(centers: Float[np.ndarray, "f 2"], side: float) -> Float32[np.ndarray, "f 4"]:
    """Boxes of one size with whole corners whose centres follow `centers`, smoothed over about two seconds.

    Rows of NaN are interpolated; at least one must be known.
    """
    known, frames = np.isfinite(centers).all(1), np.arange(len(centers))
    whole_side = max(2, round(side))
    filled = np.stack([np.interp(frames, frames[known], centers[known, axis]) for axis in (0, 1)], 1)
    corner = _whole_steps(smooth_over_time(filled, _PATH_SIGMA_FRAMES) - whole_side / 2)
    return np.concatenate([corner, corner + whole_side], 1).astype(np.float32)


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


def surround(
    masked_scenes: UInt8[np.ndarray, "f s s 3"], boxes_fitted: Float[np.ndarray, "f 4"]
) -> UInt8[np.ndarray, "f s s 3"]:
    """The colours just outside each mask, carried on over the whole head box: what surrounds it, in the crop's place.

    Pixels are means of the colours at the box's four edges, weighted by the inverse square of the distance. Edges
    beyond the picture say nothing; without any, all is MASK_FILL. What the mask covers is never looked at.
    """
    size = masked_scenes.shape[1]
    along = (np.arange(size, dtype=np.float32) + 0.5) / size
    near, far = 1 / along**2, 1 / (1 - along) ** 2
    vertical = np.broadcast_to(np.stack([near, far])[:, :, None], (2, size, size))
    weights = np.concatenate([vertical, vertical.swapaxes(1, 2)])
    filled = np.full_like(masked_scenes, MASK_FILL)
    for picture, scene, box in zip(filled, masked_scenes, boxes_fitted, strict=True):
        total, weight = np.zeros((size, size, 3), np.float32), np.zeros((size, size), np.float32)
        for number, (edge, of_edge) in enumerate(zip(_surround(scene, _touched(box), 1), weights, strict=True)):
            known = np.isfinite(edge).all(1)
            if not known.any():
                continue
            at = along * len(edge) - 0.5
            line = np.stack([np.interp(at, np.flatnonzero(known), channel[known]) for channel in edge.T], 1)
            total += of_edge[..., None] * (line[None] if number < 2 else line[:, None])
            weight += of_edge
        if weight.any():
            picture[:] = np.clip(np.rint(total / weight[..., None]), 0, 255)
    return filled


def to_crop(points_px: Float[np.ndarray, "*f 2"], box: Float[np.ndarray, "4"]) -> Float32[np.ndarray, "*f 2"]:
    """Picture pixels to crop coordinates, 0..1 inside the box."""
    return ((points_px - box[:2]) / (box[2:] - box[:2])).astype(np.float32)


def from_crop(points: Float[np.ndarray, "*f 2"], box: Float[np.ndarray, "4"]) -> Float32[np.ndarray, "*f 2"]:
    """Inverse of `to_crop`."""
    return (points * (box[2:] - box[:2]) + box[:2]).astype(np.float32)


def _resample(
    picture: Float32[np.ndarray, "h w 3"], origin: tuple[float, float], step: tuple[float, float], size: tuple[int, int]
) -> Float32[np.ndarray, "y x 3"]:
    """`size` = (width, height) pixels, `step` input pixels apart, the first one's corner at `origin`; edges repeated.

    Where there are fewer than in the input, each is the mean over its own area.
    """
    oversample = max(1, int(np.ceil(max(step) - 1e-6)))
    (x, y), (sx, sy) = origin, (step[0] / oversample, step[1] / oversample)
    # OpenCV's whole coordinates are pixel centres; ours are pixel corners.
    matrix = np.array([[sx, 0, x + sx / 2 - 0.5], [0, sy, y + sy / 2 - 0.5]])
    interpolation = cv2.INTER_CUBIC if max(step) < 1 - 1e-6 else cv2.INTER_LINEAR
    large = (size[0] * oversample, size[1] * oversample)
    flags = interpolation | cv2.WARP_INVERSE_MAP
    out = cv2.warpAffine(picture, matrix, large, flags=flags, borderMode=cv2.BORDER_REPLICATE)
    return out if oversample == 1 else cv2.resize(out, size, interpolation=cv2.INTER_AREA)


def crop(
    frame: UInt8[np.ndarray, "h w 3"], box: Float[np.ndarray, "4"], size_px: int
) -> UInt8[np.ndarray, "{size_px} {size_px} 3"]:
    """What the box shows, as a square picture; beyond the border the edge pixels are repeated.

    Raises TccpError for a box without area.
    """
    x0, y0, x1, y1 = _touched(box)
    height, width = frame.shape[:2]
    # Only what is needed, as floats: rounding to 8 bits twice would brighten the crop.
    left, top = int(np.clip(x0 - 2, 0, width - 1)), int(np.clip(y0 - 2, 0, height - 1))
    part = frame[top : max(y1 + 2, top + 1), left : max(x1 + 2, left + 1)].astype(np.float32)
    origin = (float(box[0]) - left, float(box[1]) - top)
    step = (float(box[2] - box[0]) / size_px, float(box[3] - box[1]) / size_px)
    picture = _resample(part, origin, step, (size_px, size_px))
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


FEATHER = 0.06
"""Width of the feathered edge, as a fraction of the box's side; it lies inside the box."""
_RING = 0.004  # depth of the bands compared on both sides of the border, as a fraction of the side: deeper ones
# would compare different things
_KNOTS_PER_SIDE = 8
_FIELD_PX = 17  # resolution of the colour offset over the box
_MAX_OFFSET = (4.0, 30.0)  # levels by which a knot may leave the median: beyond, the pictures differ, not their colours


def paste(
    frame: UInt8[np.ndarray, "h w 3"],
    face: UInt8[np.ndarray, "s s 3"],
    box: Float[np.ndarray, "4"],
    color_match: bool = True,
) -> UInt8[np.ndarray, "h w 3"]:
    """The frame with the generated face in its box; pixels that the box does not touch are bit-equal.

    What `frame` shows under the mask is never looked at. The face's border is compared with the visible ring around the
    mask. First (`color_match`) the low frequencies of the difference, taken robustly along the border, are spread over
    the whole face and removed: the generator's colour drift. What is then left at the edge is faded in over FEATHER of
    the side, so that no seam remains where the two pictures disagree. Where the box leaves the picture there is no
    ring, and nothing to match.
    Raises TccpError for a box without area.
    """
    x0, y0, x1, y1 = _touched(box)
    rows, columns = _clipped(box, *frame.shape[:2])
    if rows.start >= rows.stop or columns.start >= columns.stop:
        return frame.copy()
    step = (face.shape[1] / float(box[2] - box[0]), face.shape[0] / float(box[3] - box[1]))
    origin = ((x0 - float(box[0])) * step[0], (y0 - float(box[1])) * step[1])
    patch = _resample(face.astype(np.float32), origin, step, (x1 - x0, y1 - y0))

    depth = max(1, round(_RING * (x1 - x0)))
    surround = _surround(frame, (x0, y0, x1, y1), depth)
    if color_match:
        patch = patch + _color_offset([s - e for s, e in zip(surround, _edges(patch, depth), strict=True)], patch.shape)
    patch = patch + _feather([s - e for s, e in zip(surround, _edges(patch, depth), strict=True)], patch.shape)

    out = frame.copy()
    inside = patch[rows.start - y0 : rows.stop - y0, columns.start - x0 : columns.stop - x0]
    out[rows, columns] = np.clip(np.rint(inside), 0, 255).astype(np.uint8)
    return out


# Along an edge, values are arrays (n, 3): top and bottom from left to right, left and right from top to bottom.


def _at_edge(near: np.ndarray, far: np.ndarray) -> np.ndarray:
    """The value at the edge itself, continued from the means of two bands beside it (depth first)."""
    return 1.5 * near.mean(0) - 0.5 * far.mean(0)


def _edges(patch: np.ndarray, depth: int) -> list[np.ndarray]:
    """A patch's colour at its top, bottom, left and right edge, seen from inside."""
    views = (patch, patch[::-1], patch.swapaxes(0, 1), patch.swapaxes(0, 1)[::-1])
    depth = min(depth, max(1, len(patch) // 2))
    return [
        _at_edge(view[:depth], view[depth : 2 * depth] if len(view) >= 2 * depth else view[:depth]) for view in views
    ]


def _surround(frame: np.ndarray, box: tuple[int, int, int, int], depth: int) -> list[np.ndarray]:
    """The frame's colour at the box's four edges, seen from outside; NaN where the frame does not go that far."""
    x0, y0, x1, y1 = box
    height, width = frame.shape[:2]
    edges = []
    for swap, flip in ((False, False), (False, True), (True, False), (True, True)):
        view = frame.swapaxes(0, 1) if swap else frame
        (a0, a1), (b0, b1), size = ((x0, x1), (y0, y1), width) if swap else ((y0, y1), (x0, x1), height)
        view, edge = (view[::-1], size - a1) if flip else (view, a0)  # the box begins at row `edge`, looking inward
        colour = np.full((b1 - b0, 3), np.nan, np.float32)
        if edge >= 1 and edge <= len(view):
            low, high = max(b0, 0), min(b1, view.shape[1])
            band = view[max(edge - 2 * depth, 0) : edge, low:high].astype(np.float32)[::-1]
            near, far = (band[:depth], band[depth:]) if len(band) == 2 * depth else (band, band)
            colour[low - b0 : high - b0] = _at_edge(near, far)
        edges.append(colour)
    return edges


@functools.cache
def _field_weights() -> Float32[np.ndarray, "cells knots"]:
    """Inverse-distance weights from the knots, in the order of the edges, to the cells of the colour offset."""
    along = (np.arange(_KNOTS_PER_SIDE) + 0.5) / _KNOTS_PER_SIDE
    zero, one = np.zeros_like(along), np.ones_like(along)
    pairs = ((along, zero), (along, one), (zero, along), (one, along))
    knots = np.concatenate([np.stack(pair, 1) for pair in pairs])
    grid = np.linspace(0, 1, _FIELD_PX)
    cells = np.stack(np.meshgrid(grid, grid), -1).reshape(-1, 2)
    weights = 1 / (((cells[:, None] - knots) ** 2).sum(-1) + 1e-3)
    return weights.astype(np.float32)


def _color_offset(differences: list[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """A smooth offset over the box that follows the border's differences, robustly."""
    parts = [part for edge in differences for part in np.array_split(edge, _KNOTS_PER_SIDE)]
    seen = np.array([len(part) > 0 and bool(np.isfinite(part).all(1).any()) for part in parts])
    if not seen.any():
        return np.zeros(shape, np.float32)
    knots = np.stack([np.nanmedian(part, 0) for part, s in zip(parts, seen, strict=True) if s])
    middle = np.median(knots, 0)
    spread = np.clip(4.4 * np.median(np.abs(knots - middle), 0), *_MAX_OFFSET)  # three deviations, were they normal
    knots = np.clip(knots, middle - spread, middle + spread)
    weights = _field_weights()[:, seen]
    cells = (weights / weights.sum(1, keepdims=True)) @ knots
    field = cells.reshape(_FIELD_PX, _FIELD_PX, 3).astype(np.float32)
    # Cells are corners, pixels are areas: the pixels' centres are looked up between the corners.
    y, x = (((np.arange(n, dtype=np.float32) + 0.5) / n * (_FIELD_PX - 1)) for n in shape[:2])
    return cv2.remap(field, np.tile(x, (shape[0], 1)), np.tile(y[:, None], (1, shape[1])), cv2.INTER_LINEAR)


def _feather(differences: list[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """The edges' differences, smoothed along the edge, fading to nothing over FEATHER of the side."""
    height, width = shape[:2]
    reach = max(2.0, FEATHER * width)
    rows, columns = np.arange(height, dtype=np.float32), np.arange(width, dtype=np.float32)
    distances = (
        np.tile(rows[:, None], (1, width)),
        np.tile(rows[::-1, None], (1, width)),
        np.tile(columns[None], (height, 1)),
        np.tile(columns[None, ::-1], (height, 1)),
    )
    total, weight = np.zeros(shape, np.float32), np.zeros(shape[:2], np.float32)
    for number, (difference, distance) in enumerate(zip(differences, distances, strict=True)):
        known = np.isfinite(difference).all(1)
        if not known.any():
            continue
        line = np.stack([np.interp(np.arange(len(known)), np.flatnonzero(known), d[known]) for d in difference.T], 1)
        line = cv2.GaussianBlur(
            line.astype(np.float32)[None], (0, 0), max(0.5, reach / 8), borderType=cv2.BORDER_REPLICATE
        )[0]
        fade = np.maximum(1 - distance / reach, 0).astype(np.float32) ** 2
        # In a corner two edges speak: each with its own weight, and both together no louder than one.
        total += (fade**2)[..., None] * (line[None] if number < 2 else line[:, None])
        weight += fade
    return total / np.maximum(weight, 1e-6)[..., None]
