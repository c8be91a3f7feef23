"""Mel-frequency cepstra exactly as python_speech_features computes them: the sound input of SyncNet and Light-ASD.

librosa's filters differ: they do not place the corners of the triangles on whole bins.
"""

from __future__ import annotations

import numpy as np
import scipy.fft
from jaxtyping import Float, Float32, Int16

from tccp.config import SAMPLE_RATE_HZ

SMALLEST = np.finfo(np.float64).eps
"""Replaces an energy of exactly zero before its logarithm is taken."""


def mel_filters(sample_rate: int, num_filters: int, nfft: int) -> Float[np.ndarray, "bands bins"]:
    """Triangles with peaks of 1, evenly spaced in mel from 0 Hz to half the sample rate, with corners on whole bins."""
    top = 2595 * np.log10(1 + sample_rate / 2 / 700)
    hertz = 700 * (10 ** (np.linspace(0, top, num_filters + 2) / 2595) - 1)
    corner = np.floor((nfft + 1) * hertz / sample_rate).astype(np.int64)
    filters = np.zeros((num_filters, nfft // 2 + 1))
    for band, (low, peak, high) in enumerate(zip(corner, corner[1:], corner[2:], strict=False)):
        filters[band, low:peak] = (np.arange(low, peak) - low) / max(peak - low, 1)
        filters[band, peak:high] = (high - np.arange(peak, high)) / max(high - peak, 1)
    return filters


def mfcc(
    samples: Float[np.ndarray, " n"] | Int16[np.ndarray, " n"],
    *,
    sample_rate: int = SAMPLE_RATE_HZ,
    window_seconds: float = 0.025,
    step_seconds: float = 0.01,
    num_cepstra: int = 13,
    num_filters: int = 26,
    nfft: int = 512,
    pre_emphasis: float = 0.97,
    lifter: int = 22,
    energy_first: bool = True,
    window: Float[np.ndarray, " w"] | None = None,
) -> Float32[np.ndarray, "steps cepstra"]:
    """Cepstra, one row per step: 1 + ceil((n - w) / step) rows, or one if n <= w. Silence fills up the last window.

    samples: mono, on the scale of 16-bit PCM (-32768..32767) for either type: the networks were trained on that scale,
    and c0 depends on it. window: weights of the w samples of a window, None for ones.
    lifter: L in the weights 1 + L/2 sin(pi i / L), 0 for no weights. energy_first: c0 is the logarithm of the step's
    energy. If a window is longer than nfft, its tail is ignored, as in the original.
    """
    length, step = (int(np.floor(seconds * sample_rate + 0.5)) for seconds in (window_seconds, step_seconds))
    samples = samples.astype(np.float64)
    emphasised = np.append(samples[:1], samples[1:] - pre_emphasis * samples[:-1])
    num_steps = 1 + max(0, -((length - len(samples)) // step))
    padded = np.zeros((num_steps - 1) * step + length)
    padded[: len(emphasised)] = emphasised
    frames = np.lib.stride_tricks.sliding_window_view(padded, length)[::step]
    if window is not None:
        frames = frames * window
    power = np.abs(np.fft.rfft(frames, nfft)) ** 2 / nfft
    bands = power @ mel_filters(sample_rate, num_filters, nfft).T
    cepstra = scipy.fft.dct(np.log(np.where(bands == 0, SMALLEST, bands)), type=2, axis=1, norm="ortho")
    cepstra = cepstra[:, :num_cepstra]
    if lifter:
        cepstra *= 1 + lifter / 2 * np.sin(np.pi * np.arange(num_cepstra) / lifter)
    if energy_first:
        energy = power.sum(1)
        cepstra[:, 0] = np.log(np.where(energy == 0, SMALLEST, energy))
    return cepstra.astype(np.float32)
