"""Head boxes from landmarks: squares of one size per shot, on a steady path."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Float32

from tccp.config import HeadBoxSettings
from tccp.errors import TccpError
from tccp.landmarks import head_pose, smooth_over_time

SIDE = 3.9
"""Side of the head box in units of the distance between the outer eye corners (MEAN_FACE's unit). The face, brows to
chin, takes 1.6; above the brows is room for skull and hair (1.4), below the chin for neck and collar (0.9)."""
CENTER = np.array([0.0, 0.25, 0.75])
"""Centre of the head box in MEAN_FACE's coordinates. Its height follows from the margins of SIDE; its depth is near the
axis of the neck, so that turning the head does not move it."""

_PATH_SIGMA_FRAMES = 20.0
_PIVOT_PRIOR = 2e-3  # strength of the prior that the pivot is CENTER, as a variance of the head's rotation matrix
_PIVOT_REACH = 0.6


def head_boxes(
    landmarks_px: Float[np.ndarray, "f 68 2"], confidence: Float[np.ndarray, "f"] | None = None
) -> Float32[np.ndarray, "f 4"]:
    """The head box of each frame of one shot: a square of constant size with integer corners, on a steady path.

    landmarks_px: in picture pixels; frames without a face are NaN (or have confidence 0) and get an interpolated box.
    Size and position come from the rigid points only and describe the head seen from the front, so they depend neither
    on yaw nor on the mouth. The centre is the point of the head that moves least in this shot (its pivot, near the
    neck).
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
    # Least squares over (pivot - CENTER): the remaining path is uncorrelated with the entries of the rotation matrix.
    normal = np.einsum("fij,fik->jk", moves, moves) + _PIVOT_PRIOR * scale**2 * len(moves) * np.eye(3)
    pivot = -np.linalg.solve(normal, np.einsum("fij,fi->j", moves, drift))
    pivot *= min(1.0, _PIVOT_REACH / max(float(np.linalg.norm(pivot)), 1e-9))
    path = at_center.mean(0) + drift + moves @ pivot

    centers = np.full((len(known), 2), np.nan)
    centers[known] = path
    return steady_boxes(centers, SIDE * scale)


def steady_boxes(centers: Float[np.ndarray, "f 2"], side: float) -> Float32[np.ndarray, "f 4"]:
    """Boxes of constant size with integer corners whose centres follow `centers`, smoothed over about two seconds.

    Interpolates rows of NaN; at least one row must be known.
    """
    known, frames = np.isfinite(centers).all(1), np.arange(len(centers))
    whole_side = max(2, round(side))
    filled = np.stack([np.interp(frames, frames[known], centers[known, axis]) for axis in (0, 1)], 1)
    corner = _integer_steps(smooth_over_time(filled, _PATH_SIGMA_FRAMES) - whole_side / 2)
    return np.concatenate([corner, corner + whole_side], 1).astype(np.float32)


def _integer_steps(path: Float[np.ndarray, "f 2"]) -> Float[np.ndarray, "f 2"]:
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
