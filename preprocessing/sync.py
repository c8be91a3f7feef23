"""Whether the sound of a track belongs to its picture frame by frame, or comes early or late."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float64

from preprocessing.reels import FilmSound, Track
from tccp.config import SAMPLE_RATE_HZ, SAMPLES_PER_FRAME
from tccp.landmarks import mouth_opening, normalise, smooth_over_time

MAX_OFFSET = 15
_LAGS = np.arange(-MAX_OFFSET, MAX_OFFSET + 1)
_BANDS_HZ = ((500, 1000), (1000, 1500), (1500, 2000), (2000, 3000), (3000, 4000))
_SLOW_FRAMES = 12.0
_WINDOW = 2 * SAMPLES_PER_FRAME
_LEAD = 80


def lip_signal(landmarks):
    points = landmarks.astype(np.float64)
    upright = normalise(points)
    outer = (upright[:, [56, 57, 58], 1] - upright[:, [52, 51, 50], 1]).mean(1)
    lower = upright[:, 57, 1] - upright[:, 33, 1]
    jaw = upright[:, 8, 1] - upright[:, 33, 1]
    return np.stack([np.sqrt(mouth_opening(points)), outer, lower, jaw], 1)


def sound_signal(sound, start_frame, stop_frame):
    half = _WINDOW // 2
    num_frames = stop_frame - start_frame
    # a frame more on each side so that the windows of the first and last fit
    pcm = sound.between(start_frame - 1, stop_frame + 1, _LEAD).astype(np.float64)
    windows = np.lib.stride_tricks.sliding_window_view(pcm, _WINDOW)[SAMPLES_PER_FRAME - half :: SAMPLES_PER_FRAME]
    windows = windows[:num_frames]
    power = np.abs(np.fft.rfft(windows * np.hanning(_WINDOW + 1)[:-1], axis=1)) ** 2
    hz = np.arange(power.shape[1]) * SAMPLE_RATE_HZ / _WINDOW
    bands = np.stack([power[:, (hz >= low) & (hz < high)].sum(1) for low, high in _BANDS_HZ], 1)
    frame = np.arange(start_frame, stop_frame) - sound.start_frame
    there = (frame >= 0) & (frame < len(sound.pcm) // SAMPLES_PER_FRAME)
    bands[~there] = np.nan
    return bands


def fast(values):
    return values - smooth_over_time(values, _SLOW_FRAMES)


def correlations(lips, heard):
    """lips n, heard lags x n with NaN; -> per lag"""
    known = np.isfinite(heard)
    count = np.maximum(known.sum(1), 1)
    h = np.where(known, heard, 0.0)
    hm = h - known * (h.sum(1) / count)[:, None]
    v = known * lips
    vm = v - known * (v.sum(1) / count)[:, None]
    return (vm * hm).sum(1) / np.sqrt((vm**2).sum(1) * (hm**2).sum(1) + 1e-12)


def acf(x, reach=25):
    x = x - x.mean()
    full = np.correlate(x, x, "full")[len(x) - 1 : len(x) + reach]
    full = np.pad(full, (0, reach + 1 - len(full)))
    return full / (full[0] + 1e-12)


class Peak(NamedTuple):
    lag: int
    n: int
    c: np.ndarray
    sd: float
    parts: list


def look(track, sound, speaking):
    frames = np.arange(track.start_frame, track.stop_frame)
    talks = np.zeros(len(frames), bool)
    for a, b in speaking:
        talks |= (frames >= a) & (frames < b)
    lips = lip_signal(track.landmarks)
    used = talks & (track.confidence > 0) & np.isfinite(lips).all(1)
    at = np.flatnonzero(used)
    lips = fast(lips)
    lips = (lips - lips[at].mean(0)) / (lips[at].std(0) + 1e-12)
    lips = lips.sum(1)[at]
    bands = sound_signal(sound, track.start_frame - MAX_OFFSET, track.stop_frame + MAX_OFFSET)
    inside = bands[at + MAX_OFFSET]
    floor = 1e-2 * np.nanmean(inside, axis=0) + 1
    heard = fast(np.log(bands + floor))
    ref = heard[at + MAX_OFFSET]
    heard = ((heard - np.nanmean(ref, axis=0)) / (np.nanstd(ref, axis=0) + 1e-12)).sum(1)
    table = heard[at[None] + MAX_OFFSET + _LAGS[:, None]]
    c = correlations(lips, table)
    n = len(at)
    K = 25
    z = np.nan_to_num(table[MAX_OFFSET])
    tap = 1 - np.arange(K + 1) / (K + 1)
    sd = float(np.sqrt(max((1 + 2 * (acf(lips)[1:] * acf(z)[1:] * tap[1:]).sum()), 0.3) / n))
    parts = []
    for P in (2, 3, 4):
        parts.append([correlations(lips[q], table[:, q]) for q in np.array_split(np.arange(n), P)])
    return Peak(int(_LAGS[np.argmax(c)]), n, c, sd, parts)
