"""Motion over time at 25 values per second: smooth drift, gaze that follows a target with a lag, blinks."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Float64

from tccp.config import FPS


def drift(rng: np.random.Generator, num_frames: int, size: float, fastest_hz: float = 0.5) -> Float64[np.ndarray, " f"]:
    """Slow random motion around 0 with standard deviation `size`: four sines of random frequency and phase."""
    hz = rng.uniform(0.08, fastest_hz, 4)
    phase = rng.uniform(0, 2 * np.pi, 4)
    seconds = np.arange(num_frames)[:, None] / FPS
    return size * np.sqrt(2 / 4) * np.sin(2 * np.pi * hz * seconds + phase).sum(axis=1)


def glide(start: float, end: float, at_s: float, lasts_s: float, num_frames: int) -> Float64[np.ndarray, " f"]:
    """A minimum-jerk transition from start to end between at_s and at_s + lasts_s (10 s^3 - 15 s^4 + 6 s^5)."""
    s = np.clip((np.arange(num_frames) / FPS - at_s) / lasts_s, 0, 1)
    return start + (end - start) * s**3 * (10 - 15 * s + 6 * s**2)


def follow(target: Float[np.ndarray, " f"], lag_s: float, lasts_s: float) -> Float64[np.ndarray, " f"]:
    """The target, delayed by lag_s; a jump takes lasts_s. Causal: no value depends on later values of the target."""
    steps = max(1, round(lasts_s * FPS))
    shape = np.diff(glide(0.0, 1.0, 0.0, lasts_s, steps + 1)) if steps > 1 else np.ones(1)
    delay = round(lag_s * FPS)
    kernel = np.concatenate([np.zeros(delay), shape / shape.sum()])
    padded = np.concatenate([np.full(len(kernel) - 1, target[0]), target])
    return np.convolve(padded, kernel, mode="valid")


def blinks(rng: np.random.Generator, num_frames: int) -> Float64[np.ndarray, " f"]:
    """Eyelids, 0 open .. 1 closed, with a blink of 0.2 s every 2 to 5 s."""
    lids = np.zeros(num_frames + 5)
    at = int(rng.integers(5, 3 * FPS))
    while at < num_frames:
        lids[at : at + 5] = (0.5, 1.0, 1.0, 0.6, 0.2)
        at += int(rng.integers(2 * FPS, 5 * FPS))
    return lids[:num_frames]
