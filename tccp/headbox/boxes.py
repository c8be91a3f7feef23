"""Head boxes from landmarks: squares on a steady path, of one size unless the head's size in the picture changes."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Float32

from tccp.config import FPS, HeadBoxSettings
from tccp.errors import TccpError
from tccp.landmarks import head_pose, smooth_over_time

SIDE = 3.9
"""Side of the head box in units of the distance between the outer eye corners (MEAN_FACE's unit). The face, brows to
chin, takes 1.6; above the brows is room for skull and hair (1.4), below the chin for neck and collar (0.9)."""
CENTER = np.array([0.0, 0.25, 0.75])
"""Centre of the head box in MEAN_FACE's coordinates. Its height follows from the margins of SIDE; its depth is near the
axis of the neck, so that turning the head does not move it."""

SIZE_CHANGE, SIZE_PLAY = 0.1, 0.03
"""Smallest change of a head's size within a shot that its box follows, and the play with which it does."""
_SIZE_REACH_FRAMES = FPS  # frames to either side of which the median is taken
_SIZE_END_FRAMES = 5  # whose median stands for the frames before the first one, and after the last one
_SIZE_CHANGED_FRAMES = FPS // 2
_SIZE_SIGMA_FRAMES = 10.0
_PATH_SIGMA_FRAMES = 20.0
_PIVOT_PRIOR = 2e-3  # strength of the prior that the pivot is CENTER, as a variance of the head's rotation matrix
_PIVOT_REACH = 0.6


def head_boxes(
    landmarks_px: Float[np.ndarray, "f 68 2"], confidence: Float[np.ndarray, "f"] | None = None
) -> Float32[np.ndarray, "f 4"]:
    """The head box of each frame of one shot: a square with integer corners, on a steady path (`steady_boxes`).

    landmarks_px: in picture pixels; frames without a face are NaN (or have confidence 0) and get an interpolated box.
    Size and position come from the rigid points only and describe the head seen from the front, so they depend neither
    on yaw nor on the mouth. The size is constant unless the camera zooms or the person comes closer (`steady_size`).
    The centre is the point of the head that moves least in this shot (its pivot, near the neck).
    Raises TccpError if no frame has a face.
    """
    known = np.isfinite(landmarks_px).all((1, 2))
    if confidence is not None:
        known &= confidence > 0
    if not known.any():
        raise TccpError(f"no face in any of the {len(landmarks_px)} frames of the shot: head boxes need at least one")
    pose = head_pose(landmarks_px[known].astype(np.float64))
    sizes = np.full(len(known), np.nan)
    sizes[known] = pose.scale
    size = steady_size(sizes)
    scale = size[known, None, None]

    moves = (pose.rotation - pose.rotation.mean(0))[:, :2] * scale
    at_center = pose.origin + pose.rotation[:, :2] @ CENTER * scale[:, 0]
    drift = at_center - at_center.mean(0)
    # A zoom moves the head in proportion to its size: that part of the path is no movement of the head.
    growth = scale[:, 0, 0] - scale.mean()
    turned, moved = _without(moves, growth), _without(drift, growth)
    # Least squares over (pivot - CENTER): the remaining path is uncorrelated with the entries of the rotation matrix.
    prior = _PIVOT_PRIOR * float((scale**2).mean()) * len(moves)
    normal = np.einsum("fij,fik->jk", turned, turned) + prior * np.eye(3)
    pivot = -np.linalg.solve(normal, np.einsum("fij,fi->j", turned, moved))
    pivot *= min(1.0, _PIVOT_REACH / max(float(np.linalg.norm(pivot)), 1e-9))
    path = at_center.mean(0) + drift + moves @ pivot

    centers = np.full((len(known), 2), np.nan)
    centers[known] = path
    return steady_boxes(centers, SIDE * size)


def _without(series: Float[np.ndarray, "f *rest"], by: Float[np.ndarray, "f"]) -> Float[np.ndarray, "f *rest"]:
    """The series without its part in proportion to `by`, which has mean 0."""
    total = float(by @ by)
    return series if total == 0 else series - np.multiply.outer(by, np.tensordot(by, series, 1) / total)


def steady_size(sizes: Float[np.ndarray, "f"], bound: float = SIZE_CHANGE) -> Float[np.ndarray, "f"]:
    """A head's size in each frame of one shot, from measured sizes: their median, unless the size changes slowly.

    sizes: in any unit; NaN in frames without a face, of which at least one must have a face. bound: share by which the
    trend, a median over two seconds, must differ from the median of the shot, for half a second, to count as a change:
    less is an error of the measure when the head turns. In a shot with a change, the size follows the trend, smoothed,
    with a play of SIZE_PLAY. The trend contains nothing that lasts less than a second: no syllable and no nod.
    """
    known, frames = np.isfinite(sizes), np.arange(len(sizes))
    usual = float(np.median(sizes[known]))
    ratio = np.log(np.interp(frames, frames[known], sizes[known]) / usual)
    reach = _SIZE_REACH_FRAMES
    ends = np.median(ratio[:_SIZE_END_FRAMES]), np.median(ratio[-_SIZE_END_FRAMES:])
    padded = np.concatenate([np.full(reach, ends[0]), ratio, np.full(reach, ends[1])])
    trend = np.median(np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1), axis=1)
    if (np.abs(trend) > np.log1p(bound)).sum() < _SIZE_CHANGED_FRAMES:
        return np.full(len(sizes), usual)
    with_play = (_with_play(trend, SIZE_PLAY) + _with_play(trend[::-1], SIZE_PLAY)[::-1]) / 2
    return usual * np.exp(smooth_over_time(with_play, _SIZE_SIGMA_FRAMES))


def _with_play(series: Float[np.ndarray, "f"], play: float) -> Float[np.ndarray, "f"]:
    """Starts near 0 and moves only as far as needed to stay within `play` of the series."""
    followed, at = np.empty(len(series)), 0.0
    for i, value in enumerate(series):
        at = followed[i] = min(max(at, value - play), value + play)
    return followed


def steady_boxes(centers: Float[np.ndarray, "f 2"], side: Float[np.ndarray, "f"] | float) -> Float32[np.ndarray, "f 4"]:
    """Squares with integer corners whose centres follow `centers`, smoothed over about two seconds.

    Interpolates rows of NaN; at least one row must be known. side: of all boxes, or of each.
    """
    known, frames = np.isfinite(centers).all(1), np.arange(len(centers))
    each = np.broadcast_to(side, (len(centers),)).astype(np.float64)
    sides = np.maximum(_integer_steps(each[:, None]), 2)
    filled = np.stack([np.interp(frames, frames[known], centers[known, axis]) for axis in (0, 1)], 1)
    # A zoom also moves the head, in proportion to its size. Smoothing that part would be late where the zoom begins.
    rest = _without(filled, each - each.mean())
    path = smooth_over_time(rest, _PATH_SIGMA_FRAMES) + (filled - rest)
    corner = _integer_steps(path - sides / 2)
    return np.concatenate([corner, corner + sides], 1).astype(np.float32)


def _integer_steps(path: Float[np.ndarray, "f d"]) -> Float[np.ndarray, "f d"]:
    """Rounds the path, but moves only when it is 3/4 pixel off, so that it does not flicker between two pixels."""
    steps = np.rint(path)
    for i in range(1, len(steps)):
        steps[i] = np.where(np.abs(path[i] - steps[i - 1]) <= 0.75, steps[i - 1], steps[i])
    return steps


def jitter(
    boxes: Float[np.ndarray, "f 4"], settings: HeadBoxSettings, rng: np.random.Generator
) -> Float32[np.ndarray, "f 4"]:
    """Moves and resizes the boxes of a clip by one random sample, keeping integer corners.

    The sample holds for the whole clip. Mask, crop and landmarks are all derived from the result, so neither position
    nor size of the mask reveals the pose.
    """
    side = boxes[:, 2] - boxes[:, 0]
    dx, dy = rng.uniform(-settings.jitter_center, settings.jitter_center, 2)
    new_side = np.maximum(np.rint(side * (1 + rng.uniform(-settings.jitter_size, settings.jitter_size))), 2)
    # Rounding offsets instead of corners keeps a steady path steady.
    corner = boxes[:, :2] + np.rint(side[:, None] * (dx, dy) + (side - new_side)[:, None] / 2)
    return np.concatenate([corner, corner + new_side[:, None]], 1).astype(np.float32)
