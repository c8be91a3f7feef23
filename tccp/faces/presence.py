"""When a person counts as present, of whom a detector finds the face in some frames: one rule for all footage."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Bool

from tccp.config import FPS
from tccp.sequences import true_runs

MAX_BRIDGED_FRAMES = FPS // 2
"""Longest gap without a face that is bridged, just under half a second; longer gaps end a stretch."""
MIN_SEEN_FRAMES = 5
"""Faces found in fewer frames of a stretch are mostly false detections."""
MIN_STRETCH_FRAMES = 16
"""Shorter stretches, of less than 0.64 s, are left out."""


def with_gaps_closed(seen: Bool[np.ndarray, " f"]) -> Bool[np.ndarray, " f"]:
    """The frames of a shot in which a person is seen, or was and will be within MAX_BRIDGED_FRAMES."""
    filled = seen.copy()
    for start, stop in true_runs(seen, MAX_BRIDGED_FRAMES):
        filled[start:stop] = True
    return filled


def stretches(
    seen: Bool[np.ndarray, " f"], least_share: float, least_seen: int = MIN_SEEN_FRAMES
) -> list[tuple[int, int]]:
    """The stretches [start, stop) of a shot in which a person is present.

    seen: frames of the shot in which the person's face is found. Gaps of up to MAX_BRIDGED_FRAMES are bridged. A
    stretch needs `least_seen` frames with the face, in which it is found in at least the share `least_share` of its
    frames, and a length of MIN_STRETCH_FRAMES; in a shorter shot, of `least_share` of the shot.
    """
    least = MIN_STRETCH_FRAMES if len(seen) >= MIN_STRETCH_FRAMES else math.ceil(least_share * len(seen))
    runs = true_runs(seen, MAX_BRIDGED_FRAMES)
    parts = [(start + a, start + b) for start, stop in runs for a, b in _seen_often(seen[start:stop], least_share)]
    return [(a, b) for a, b in parts if b - a >= least and seen[a:b].sum() >= least_seen]


def _seen_often(seen: Bool[np.ndarray, " f"], least_share: float) -> list[tuple[int, int]]:
    """The parts of a stretch with enough frames with the face: it is cut at its longest gap until all have."""
    parts, waiting = [], [(0, len(seen))]
    while waiting:
        start, stop = waiting.pop()
        if seen[start:stop].mean() >= least_share:
            parts.append((start, stop))
            continue
        gaps = true_runs(~seen[start:stop])
        a, b = max(gaps, key=lambda gap: gap[1] - gap[0])
        waiting += [(start + b, stop), (start, start + a)]
    return sorted(parts)
