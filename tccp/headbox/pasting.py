"""Pastes a generated face into its head box without a visible seam."""

from __future__ import annotations

import functools

import cv2
import numpy as np
from jaxtyping import Float, Float32, UInt8

from tccp.headbox.crops import resample
from tccp.headbox.masks import at_edge, clipped, colours_outside, touched

FEATHER = 0.06
"""Width of the feathered edge inside the box, as a fraction of the box's side."""
# Depth of the compared bands on both sides of the border, as a fraction of the side. Deeper bands would compare
# different objects.
_RING = 0.004
_KNOTS_PER_SIDE = 8
_FIELD_PX = 17  # resolution of the colour offset over the box
_MAX_OFFSET = (4.0, 30.0)  # bounds of a knot's distance from the median, in levels; beyond, the content itself differs


def paste(
    frame: UInt8[np.ndarray, "h w 3"],
    face: UInt8[np.ndarray, "s s 3"],
    box: Float[np.ndarray, "4"],
    color_match: bool = True,
) -> UInt8[np.ndarray, "h w 3"]:
    """The frame with the generated face in its box. Pixels that the box does not touch stay bit-equal.

    Never reads the pixels of `frame` under the mask. The function compares the border of the face with the visible ring
    around the mask. First (`color_match`) it removes the generator's colour drift: a smooth offset over the whole face,
    from a robust estimate of the difference along the border. Then it fades the remaining difference at the edge out
    over FEATHER of the side, so that there is no seam. Where the box leaves the picture there is no ring to match.
    Raises TccpError for a box without area.
    """
    x0, y0, x1, y1 = touched(box)
    rows, columns = clipped(box, *frame.shape[:2])
    if rows.start >= rows.stop or columns.start >= columns.stop:
        return frame.copy()
    step = (face.shape[1] / float(box[2] - box[0]), face.shape[0] / float(box[3] - box[1]))
    origin = ((x0 - float(box[0])) * step[0], (y0 - float(box[1])) * step[1])
    patch = resample(face.astype(np.float32), origin, step, (x1 - x0, y1 - y0))

    depth = max(1, round(_RING * (x1 - x0)))
    outside = colours_outside(frame, (x0, y0, x1, y1), depth)
    if color_match:
        patch = patch + _color_offset([o - e for o, e in zip(outside, _edges(patch, depth), strict=True)], patch.shape)
    patch = patch + _feather([o - e for o, e in zip(outside, _edges(patch, depth), strict=True)], patch.shape)

    out = frame.copy()
    inside = patch[rows.start - y0 : rows.stop - y0, columns.start - x0 : columns.stop - x0]
    out[rows, columns] = np.clip(np.rint(inside), 0, 255).astype(np.uint8)
    return out


def _edges(patch: np.ndarray, depth: int) -> list[np.ndarray]:
    """A patch's colours at its top, bottom, left and right edge, from the pixels inside, like `colours_outside`."""
    views = (patch, patch[::-1], patch.swapaxes(0, 1), patch.swapaxes(0, 1)[::-1])
    depth = min(depth, max(1, len(patch) // 2))
    return [
        at_edge(view[:depth], view[depth : 2 * depth] if len(view) >= 2 * depth else view[:depth]) for view in views
    ]


@functools.cache
def _field_weights() -> Float32[np.ndarray, "cells knots"]:
    """Inverse-distance weights from the knots along the edges, in their order, to the cells of the colour offset."""
    along = (np.arange(_KNOTS_PER_SIDE) + 0.5) / _KNOTS_PER_SIDE
    zero, one = np.zeros_like(along), np.ones_like(along)
    pairs = ((along, zero), (along, one), (zero, along), (one, along))
    knots = np.concatenate([np.stack(pair, 1) for pair in pairs])
    grid = np.linspace(0, 1, _FIELD_PX)
    cells = np.stack(np.meshgrid(grid, grid), -1).reshape(-1, 2)
    weights = 1 / (((cells[:, None] - knots) ** 2).sum(-1) + 1e-3)
    return weights.astype(np.float32)


def _color_offset(differences: list[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """A smooth offset over the box, fitted robustly to the differences along the border."""
    parts = [part for edge in differences for part in np.array_split(edge, _KNOTS_PER_SIDE)]
    seen = np.array([len(part) > 0 and bool(np.isfinite(part).all(1).any()) for part in parts])
    if not seen.any():
        return np.zeros(shape, np.float32)
    finite = (part[np.isfinite(part).all(1)] for part in parts)
    knots = np.stack([np.median(part, 0) for part in finite if len(part)])
    middle = np.median(knots, 0)
    bound = np.clip(4.4 * np.median(np.abs(knots - middle), 0), *_MAX_OFFSET)  # 4.4 MAD are 3 sigma if normal
    knots = np.clip(knots, middle - bound, middle + bound)
    weights = _field_weights()[:, seen]
    cells = (weights / weights.sum(1, keepdims=True)) @ knots
    field = cells.reshape(_FIELD_PX, _FIELD_PX, 3).astype(np.float32)
    # Cells are points at the corners; pixel centres are interpolated between them.
    y, x = (((np.arange(n, dtype=np.float32) + 0.5) / n * (_FIELD_PX - 1)) for n in shape[:2])
    return cv2.remap(field, np.tile(x, (shape[0], 1)), np.tile(y[:, None], (1, shape[1])), cv2.INTER_LINEAR)


def _feather(differences: list[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """The differences at the edges, smoothed along the edge and faded to zero over FEATHER of the side."""
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
        # In a corner the result is the weighted mean of two edges.
        total += (fade**2)[..., None] * (line[None] if number < 2 else line[:, None])
        weight += fade
    return total / np.maximum(weight, 1e-6)[..., None]
