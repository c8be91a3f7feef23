"""How mouths move, and how well their movement matches the sound."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32, Float64, Int64

from tccp.landmarks import MEAN_FACE, RIGID, head_pose, mouth_opening, mouth_width, smooth_over_time
from tccp.sequences import correlation

SLOW_FRAMES = 12.0
"""What changes more slowly than speech (smiles, distance, loudness) is removed."""
_MOTION_REACH = 8  # frames to either side, a third of a second: a syllable with its closure
_JITTER_SHARE = 0.5  # of the rigid points' noise, as a path of the opening (which is a mean of three gaps, smoothed)


def mouth_motion(landmarks: Float32[np.ndarray, "f 68 2"]) -> Float64[np.ndarray, " f"]:
    """How much the mouth opens and closes around each frame: path per frame, in distances of the outer eye corners.

    Movement of the head is removed, and so is the noise of the landmarks, which is larger in small faces. NaN where no
    landmarks are near.
    """
    points = landmarks.astype(np.float64)
    opening = mouth_shape(points)[:, 0]
    step = np.abs(np.diff(opening, prepend=opening[:1]))
    path = mean_around(step, _MOTION_REACH)
    return np.sqrt(np.maximum(path**2 - (_JITTER_SHARE * _jitter(points)) ** 2, 0))


def mouth_shape(points: Float64[np.ndarray, "f 68 2"]) -> Float64[np.ndarray, "f 2"]:
    """Opening and width of the mouth, slightly smoothed over time."""
    return smooth_over_time(np.stack([mouth_opening(points), mouth_width(points)], 1), 0.7)


_RIGID_FACE = np.column_stack([MEAN_FACE[list(RIGID)], np.ones(len(RIGID))])
_RIGID_MOVES = _RIGID_FACE @ np.linalg.pinv(_RIGID_FACE)


def _jitter(points: Float64[np.ndarray, "f 68 2"]) -> float:
    """Standard deviation of the noise of points that cannot move on a head, in distances of the outer eye corners.

    Measured on what remains of them without the head's motion. The second difference of white noise has six times its
    variance.
    """
    rigid = points[:, list(RIGID)]
    rest = (rigid - _RIGID_MOVES @ rigid) / head_pose(points).scale[:, None, None]
    bend = np.abs(rest[2:] - 2 * rest[1:-1] + rest[:-2])
    bend = bend[np.isfinite(bend)]
    return float(np.median(bend)) / 0.6745 / np.sqrt(6) if len(bend) else 0.0


def mean_around(values: Float64[np.ndarray, " f"], reach: int) -> Float64[np.ndarray, " f"]:
    """Mean over the finite values at most `reach` frames away; NaN where there are none."""
    known = np.isfinite(values)
    ends = np.arange(len(values))
    low, high = np.maximum(ends - reach, 0), np.minimum(ends + reach + 1, len(values))
    total = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0))])
    count = np.concatenate([[0], np.cumsum(known)])
    number = count[high] - count[low]
    return np.where(number > 0, (total[high] - total[low]) / np.maximum(number, 1), np.nan)


def without_slow_changes(
    series: Float64[np.ndarray, "f 2"], slow_frames: float = SLOW_FRAMES
) -> Float64[np.ndarray, "f 2"]:
    return series - smooth_over_time(series, slow_frames)


def best_match(
    mouth: Float64[np.ndarray, "f 2"], sound: Float64[np.ndarray, "f 2"], window: Int64[np.ndarray, " w"], lags: range
) -> float:
    """How well a mouth follows the sound: the correlations of opening and width, added, at the best lag."""
    best = -2.0
    for lag in lags:
        heard = sound[np.clip(window + lag, 0, len(sound) - 1)]
        heard = np.where(np.isfinite(heard), heard, 0)
        both = [correlation(mouth[window, i], heard[:, i]) for i in (0, 1)]
        best = max(best, float(np.nansum(both)))
    return best
