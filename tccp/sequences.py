"""Runs of True in masks, and the correlation of two sequences."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float

_LEAST_RANGE = 1e-6  # a sequence whose values differ by less is constant: what remains is rounding error


def true_runs(mask: Bool[np.ndarray, " n"], max_gap: int = 0) -> list[tuple[int, int]]:
    """[start, stop) of each run of True values, in ascending order.

    Runs that are separated by at most `max_gap` False values count as one run.
    """
    edges = np.flatnonzero(np.diff(mask, prepend=False, append=False))
    runs: list[tuple[int, int]] = []
    for start, stop in edges.reshape(-1, 2).tolist():
        if runs and start - runs[-1][1] <= max_gap:
            runs[-1] = (runs[-1][0], stop)
        else:
            runs.append((start, stop))
    return runs


def correlation(a: Float[np.ndarray, " n"], b: Float[np.ndarray, " n"]) -> float:
    """Pearson's correlation coefficient, -1..1, over the samples at which both sequences are finite.

    NaN if there are fewer than 3 such samples, or if either sequence varies by less than 1e-6 over them.
    """
    known = np.isfinite(a) & np.isfinite(b)
    if known.sum() < 3:
        return np.nan
    a, b = a[known].astype(np.float64), b[known].astype(np.float64)
    if min(np.ptp(a), np.ptp(b)) < _LEAST_RANGE:
        return np.nan
    a, b = a - a.mean(), b - b.mean()
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))
