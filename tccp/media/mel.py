"""Wav2Lip's mel spectrogram, of a whole recording or in windows that follow the frames of a film.

Sound is 16 kHz mono. A mel has 80 bands and 80 columns a second (3.2 a frame); column c is centred on sample 200 c.
Each column depends only on the samples under it, so a window of a long recording equals the same columns of the whole.

Window and filters equal librosa's, which is not used here because it takes two seconds to import.
"""

from __future__ import annotations

import functools
import math
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Float32, Float64, Integer

from tccp.clock import FPS, SAMPLE_RATE_HZ
from tccp.errors import TccpError

MEL_VERSION = 1
"""Increased when the same sound gives another mel: what is computed from mels and kept is keyed by it."""
MEL_BANDS = 80
MEL_COLUMNS_PER_S = 80
WINDOW_COLUMNS = 16  # 0.2 s of sound around one frame, for the networks and Wav2Lip
SILENCE = -4.0  # the floor of the normalised mel

_N_FFT = 800
_HOP = SAMPLE_RATE_HZ // MEL_COLUMNS_PER_S
_PRE_EMPHASIS = 0.97
_LOWEST_HZ, _HIGHEST_HZ = 55.0, 7600.0
_FLOOR = 1e-5
_REFERENCE_DB, _RANGE_DB, _RANGE = 20.0, 100.0, 4.0
_CHUNK_COLUMNS = 2048  # bounds memory: 2048 columns are 13 MB of spectrum

_HANN: Float64[np.ndarray, " 800"] = 0.5 + 0.5 * np.cos(np.linspace(-np.pi, np.pi, _N_FFT + 1)[:-1])
# Slaney's mel scale: linear up to a frequency, logarithmic above it.
_BREAK_HZ, _LINEAR_STEP_HZ, _LOG_STEP = 1000.0, 200 / 3, math.log(6.4) / 27
_BREAK_MELS = _BREAK_HZ / _LINEAR_STEP_HZ

_SILENT_PEAK = 1e-3  # -60 dBFS
_CLIPPED_LEVEL, _CLIPPED_SHARE = 0.999, 1e-3


@runtime_checkable
class HasSamples(Protocol):
    """For example an AudioTrack of tccp.media."""

    samples: np.ndarray


Sound = Float[np.ndarray, "n"] | HasSamples


def mel(samples: Sound) -> Float32[np.ndarray, "80 columns"]:
    """Wav2Lip's mel of the whole sound: 1 + n // 200 columns, values in [-4, 4].

    Pre-emphasis 0.97; magnitude STFT (800-point Hann, hop 200, centred, reflected at both ends); 80 Slaney bands
    55-7600 Hz; 20 log10(max(1e-5, x)) - 20 dB; 8 (dB + 100) / 100 - 4, clipped.
    Raises TccpError if there are no samples.
    """
    samples = _checked(samples)
    return _columns(samples, 0, num_columns(len(samples)))


def num_columns(num_samples: int) -> int:
    """How many columns the mel of this many samples has."""
    return 1 + num_samples // _HOP


def mel_windows(samples: Sound, start_frame: int, num_frames: int) -> Float32[np.ndarray, "f 80 16"]:
    """The window of each frame for the networks: the 16 columns centred on it, silence before and after the sound.

    Frame i lasts from i/25 to (i+1)/25 s, so its middle lies at column 3.2 i + 1.6. Sixteen columns around the middle
    begin at 3.2 i - 5.9, rounded to the nearest column. Reads only the samples under the windows.
    """
    first = (16 * np.arange(start_frame, start_frame + num_frames) - 27) // 5  # round(3.2 i - 5.9), in integers
    return _windows(_checked(samples), first)


def wav2lip_windows(samples: Sound, start_frame: int, num_frames: int) -> Float32[np.ndarray, "f 80 16"]:
    """Wav2Lip's own window of each frame: 16 columns from int(80 i / 25). The last windows repeat the final 16 columns.

    It only looks ahead, and lags behind the picture at the end of the sound. Use it for Wav2Lip only.
    """
    samples = _checked(samples)
    first = MEL_COLUMNS_PER_S * np.arange(start_frame, start_frame + num_frames) // FPS
    return _windows(samples, np.minimum(first, max(0, num_columns(len(samples)) - WINDOW_COLUMNS)))


def check_audio(samples: Sound) -> list[str]:
    """Warnings about valid but unusual sound: silent or clipped.

    Raises TccpError if there are no samples, or if some are not finite.
    """
    peak, clipped = 0.0, 0
    samples = _checked(samples)
    for start in range(0, len(samples), 1 << 20):
        block = np.abs(samples[start : start + (1 << 20)])
        if not np.isfinite(block).all():
            at_s = (start + int(np.argmin(np.isfinite(block)))) / SAMPLE_RATE_HZ
            raise TccpError(f"the audio holds values that are not numbers, first at {at_s:.2f} s; export it again")
        peak = max(peak, float(block.max()))
        clipped += int((block >= _CLIPPED_LEVEL).sum())
    warnings = []
    if peak < _SILENT_PEAK:
        warnings.append("the audio is silent (peak below -60 dBFS): the mouth will stay closed")
    if clipped > _CLIPPED_SHARE * len(samples):
        warnings.append(
            f"the audio is clipped ({clipped / len(samples):.1%} of its samples at full scale): lips may suffer"
        )
    return warnings


def _checked(samples: Sound) -> Float[np.ndarray, "n"]:
    array = samples if isinstance(samples, np.ndarray) else samples.samples
    if len(array) == 0:
        raise TccpError("the audio has no length; give at least one sample")
    return array


def _windows(samples: Float[np.ndarray, "n"], first: Integer[np.ndarray, "f"]) -> Float32[np.ndarray, "f 80 16"]:
    """Sixteen columns from each column in `first` (ascending), silence outside the sound."""
    columns = np.full((MEL_BANDS, int(first[-1] - first[0]) + WINDOW_COLUMNS if len(first) else 0), SILENCE, np.float32)
    if len(first):
        low, high = int(first[0]), int(first[0]) + columns.shape[1]
        begin, end = max(low, 0), min(high, num_columns(len(samples)))
        if begin < end:
            columns[:, begin - low : end - low] = _columns(samples, begin, end)
    windows = np.empty((len(first), MEL_BANDS, WINDOW_COLUMNS), np.float32)
    for window, start in zip(windows, first - first[:1], strict=True):
        window[:] = columns[:, start : start + WINDOW_COLUMNS]
    return windows


def _columns(samples: Float[np.ndarray, "n"], begin: int, end: int) -> Float32[np.ndarray, "80 columns"]:
    chunks = [
        _normalised(_spectra(samples, at, min(at + _CHUNK_COLUMNS, end))) for at in range(begin, end, _CHUNK_COLUMNS)
    ]
    return np.concatenate(chunks, axis=1)


def _spectra(samples: Float[np.ndarray, "n"], begin: int, end: int) -> Float64[np.ndarray, "401 columns"]:
    """Magnitudes under columns begin .. end - 1. Equal to librosa.stft of the whole with pad_mode="reflect"."""
    # The definition reflects the pre-emphasised sound, so the indices of the pre-emphasised samples are reflected here.
    wanted = _reflected(np.arange(_HOP * begin - _N_FFT // 2, _HOP * (end - 1) + _N_FFT // 2), len(samples))
    low, high = int(wanted.min()), int(wanted.max()) + 1
    here = np.asarray(samples[max(low - 1, 0) : high], np.float64)
    before = np.concatenate([np.zeros(1 if low == 0 else 0), here[:-1]])
    emphasised = here[len(here) - (high - low) :] - _PRE_EMPHASIS * before[len(before) - (high - low) :]
    strips = np.lib.stride_tricks.sliding_window_view(emphasised[wanted - low], _N_FFT)[::_HOP]
    return np.abs(np.fft.rfft(strips * _HANN)).T


def _reflected(index: Integer[np.ndarray, "k"], length: int) -> Integer[np.ndarray, "k"]:
    """Reflects indices beyond the ends back into 0..length - 1, repeatedly if needed, without repeating the ends."""
    if length == 1:
        return np.zeros_like(index)
    period = 2 * (length - 1)
    index = np.mod(index, period)
    return np.minimum(index, period - index)


def _normalised(spectra: Float64[np.ndarray, "401 columns"]) -> Float32[np.ndarray, "80 columns"]:
    decibel = 20 * np.log10(np.maximum(_FLOOR, _filters() @ spectra)) - _REFERENCE_DB
    scaled = 2 * _RANGE * (decibel + _RANGE_DB) / _RANGE_DB - _RANGE
    return np.clip(scaled, -_RANGE, _RANGE).astype(np.float32)


@functools.cache
def _filters() -> Float64[np.ndarray, "80 401"]:
    """Slaney's triangular bands of equal area over the bins of an 800-point spectrum (Auditory Toolbox, 1998)."""
    edges = _hz(np.linspace(_mels(_LOWEST_HZ), _mels(_HIGHEST_HZ), MEL_BANDS + 2))
    away = edges[:, None] - np.fft.rfftfreq(_N_FFT, 1 / SAMPLE_RATE_HZ)
    widths = np.diff(edges)[:, None]
    rising, falling = -away[:-2] / widths[:-1], away[2:] / widths[1:]
    area = 2 / (edges[2:] - edges[:-2])
    return np.maximum(0, np.minimum(rising, falling)) * area[:, None]


def _mels(hz: float) -> float:
    """Frequency in Slaney's mels."""
    return hz / _LINEAR_STEP_HZ if hz < _BREAK_HZ else _BREAK_MELS + math.log(hz / _BREAK_HZ) / _LOG_STEP


def _hz(mels: Float64[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
    """The inverse of `_mels`."""
    above = _BREAK_HZ * np.exp(_LOG_STEP * (mels - _BREAK_MELS))
    return np.where(mels < _BREAK_MELS, mels * _LINEAR_STEP_HZ, above)
