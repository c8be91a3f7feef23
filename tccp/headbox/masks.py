"""Masks of head boxes, and the colours around a mask."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Float32, UInt8

from tccp.errors import TccpError

SURROUND_VERSION = 1
"""Increased when `surround` gives another picture: cached latents are keyed by it."""
MASK_FILL = 127
"""Grey value of masked pixels in every masked scene, in training and in generation."""


def touched(box: Float[np.ndarray, "4"]) -> tuple[int, int, int, int]:
    """The pixels that a box touches, as (x0, y0, x1, y1), not clipped to the picture.

    Raises TccpError for a box without area.
    """
    if not np.isfinite(box).all() or box[2] <= box[0] or box[3] <= box[1]:
        raise TccpError(f"box {np.round(box, 2).tolist()} is not x0 < x1, y0 < y1")
    # Boxes are stored as float32, so a value just above an integer means that integer.
    x0, y0 = np.floor(box[:2] + 1e-3)
    x1, y1 = np.ceil(box[2:] - 1e-3)
    return int(x0), int(y0), int(x1), int(y1)


def clipped(box: Float[np.ndarray, "4"], height: int, width: int) -> tuple[slice, slice]:
    """Slices (rows, columns) of the pixels that a box touches inside a picture of this size."""
    x0, y0, x1, y1 = touched(box)
    return slice(max(y0, 0), max(min(y1, height), 0)), slice(max(x0, 0), max(min(x1, width), 0))


def mask_from_box(box: Float[np.ndarray, "4"], height: int, width: int) -> Bool[np.ndarray, "{height} {width}"]:
    """True for the pixels that the box touches. Raises TccpError for a box without area."""
    mask = np.zeros((height, width), bool)
    mask[clipped(box, height, width)] = True
    return mask


def crop_box_from_mask(mask: Bool[np.ndarray, "h w"]) -> Float32[np.ndarray, "4"] | None:
    """The crop box of a mask, None for an empty mask. Training and generation both use only this function.

    The box is the smallest square around the mask. If the picture's border cuts the shorter side of a mask, the square
    extends beyond that border; otherwise it grows evenly on both sides.
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


def mask_scene(
    scenes: UInt8[np.ndarray, "f h w 3"], boxes_fitted: Float[np.ndarray, "f 4"]
) -> UInt8[np.ndarray, "f h w 3"]:
    """The scenes with every pixel that the box touches set to MASK_FILL, so that they contain nothing of the head."""
    masked = scenes.copy()
    for picture, box in zip(masked, boxes_fitted, strict=True):
        picture[clipped(box, *picture.shape[:2])] = MASK_FILL
    return masked


def surround(
    masked_scenes: UInt8[np.ndarray, "f s s 3"], boxes_fitted: Float[np.ndarray, "f 4"]
) -> UInt8[np.ndarray, "f s s 3"]:
    """A picture in the place of the crop that continues the colours just outside each mask over the head box.

    Each pixel is a mean of the colours at the box's four edges, weighted by the inverse square of the distance. Edges
    outside the picture are left out; if all are outside, the result is MASK_FILL. Never reads pixels under the mask.
    """
    size = masked_scenes.shape[1]
    along = (np.arange(size, dtype=np.float32) + 0.5) / size
    near, far = 1 / along**2, 1 / (1 - along) ** 2
    vertical = np.broadcast_to(np.stack([near, far])[:, :, None], (2, size, size))
    weights = np.concatenate([vertical, vertical.swapaxes(1, 2)])
    filled = np.full_like(masked_scenes, MASK_FILL)
    for picture, scene, box in zip(filled, masked_scenes, boxes_fitted, strict=True):
        total, weight = np.zeros((size, size, 3), np.float32), np.zeros((size, size), np.float32)
        edges = colours_outside(scene, touched(box), 1)
        for number, (edge, edge_weights) in enumerate(zip(edges, weights, strict=True)):
            known = np.isfinite(edge).all(1)
            if not known.any():
                continue
            at = along * len(edge) - 0.5
            line = np.stack([np.interp(at, np.flatnonzero(known), channel[known]) for channel in edge.T], 1)
            total += edge_weights[..., None] * (line[None] if number < 2 else line[:, None])
            weight += edge_weights
        if weight.any():
            picture[:] = np.clip(np.rint(total / weight[..., None]), 0, 255)
    return filled


# Colours along an edge are arrays (n, 3): top and bottom from left to right, left and right from top to bottom.


def colours_outside(
    frame: UInt8[np.ndarray, "h w 3"], box: tuple[int, int, int, int], depth: int
) -> list[Float32[np.ndarray, "n 3"]]:
    """The frame's colours at the box's top, bottom, left and right edge, from the pixels just outside the box.

    depth: width in pixels of the two bands whose means give the colour. NaN for parts of an edge outside the frame.
    """
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
            colour[low - b0 : high - b0] = at_edge(near, far)
        edges.append(colour)
    return edges


def at_edge(near: Float32[np.ndarray, "d n 3"], far: Float32[np.ndarray, "d n 3"]) -> Float32[np.ndarray, "n 3"]:
    """Extrapolates the colour at the edge itself from the means of two bands beside it (depth first)."""
    return 1.5 * near.mean(0) - 0.5 * far.mean(0)
