"""Wav2Lip's mel spectrogram, whole or in windows that follow the frames of a film.

Sound is 16 kHz mono. A mel has 80 bands and 80 columns a second (3.2 a frame); column c is centred on sample 200 c.
Every column is computed from the samples under it alone, so a window of a long recording equals the same columns of
the whole.
"""

from __future__ import annotations

import functools
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Float32, Float64, Integer

from tccp.config import FPS, SAMPLE_RATE_HZ
from tccp.errors import TccpError

MEL_BANDS = 80
MEL_COLUMNS_PER_S = 80
WINDOW_COLUMNS = 16  # 0.2 s, what the networks and Wav2Lip see of the sound around one frame
SILENCE = -4.0  # the floor of the normalised mel

_N_FFT = 800
_HOP = SAMPLE_RATE_HZ // MEL_COLUMNS_PER_S
_PRE_EMPHASIS = 0.97
_LOWEST_HZ, _HIGHEST_HZ = 55.0, 7600.0
_FLOOR = 1e-5
_REFERENCE_DB, _RANGE_DB, _RANGE = 20.0, 100.0, 4.0
_CHUNK_COLUMNS = 2048  # bounds memory: 2048 columns are 13 MB of spectrum

_SILENT_PEAK = 1e-3  # -60 dBFS
_CLIPPED_LEVEL, _CLIPPED_SHARE = 0.999, 1e-3


@runtime_checkable
class HasSamples(Protocol):
    """E.g. an AudioTrack of tccp.media."""

    samples: np.ndarray


Sound = Float[np.ndarray, "n"] | HasSamples


def mel(samples: Sound) -> Float32[np.ndarray, "80 columns"]:
    """Wav2Lip's mel of the whole sound: 1 + n // 200 columns, values in [-4, 4].

    Pre-emphasis 0.97; magnitude STFT (800-point Hann, hop 200, centred, reflected at both ends); 80 Slaney bands
    55-7600 Hz; 20 log10(max(1e-5, x)) - 20 dB; 8 (dB + 100) / 100 - 4, clipped.
    Raises TccpError for sound of no length.
    """
    samples = _checked(samples)
    return _columns(samples, 0, num_columns(len(samples)))


def num_columns(num_samples: int) -> int:
    """Columns of the mel of so many samples."""
    return 1 + num_samples // _HOP


def mel_windows(samples: Sound, start_frame: int, num_frames: int) -> Float32[np.ndarray, "f 80 16"]:
    """The networks' window of each frame: the 16 columns centred on it, silence where the sound has not begun or has
    ended.

    Frame i lasts from i/25 to (i+1)/25 s, so its middle lies at column 3.2 i + 1.6; sixteen columns around that begin
    at 3.2 i - 5.9, rounded to the nearest. Computed from the samples under the windows alone.
    """
    first = (16 * np.arange(start_frame, start_frame + num_frames) - 27) // 5  # round(3.2 i - 5.9), in integers
    return _windows(_checked(samples), first)


def wav2lip_windows(samples: Sound, start_frame: int, num_frames: int) -> Float32[np.ndarray, "f 80 16"]:
    """Wav2Lip's own window of each frame: 16 columns from int(80 i / 25), the last ones repeating the final 16.

    It looks ahead only, and slips against the picture at the end of the sound: for feeding Wav2Lip, nothing else.
    """
    samples = _checked(samples)
    first = MEL_COLUMNS_PER_S * np.arange(start_frame, start_frame + num_frames) // FPS
    return _windows(samples, np.minimum(first, max(0, num_columns(len(samples)) - WINDOW_COLUMNS)))


def check_audio(samples: Sound) -> list[str]:
    """Warnings about sound that is valid but odd: silent, or clipped.

    Raises TccpError for sound of no length, or with values that are not numbers.
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
    """Sixteen columns from each of `first` (ascending), silence where there are none."""
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


def _spectra(samples: Float[np.ndarray, "n"], begin: int, end: int) -> Float64[np.ndarray, "columns 401"]:
    """Magnitudes under columns begin .. end - 1."""
    # Reflection happens after pre-emphasis, so it is a matter of where each pre-emphasised sample is taken from.
    wanted = _reflected(np.arange(_HOP * begin - _N_FFT // 2, _HOP * (end - 1) + _N_FFT // 2), len(samples))
    low, high = int(wanted.min()), int(wanted.max()) + 1
    here = np.asarray(samples[max(low - 1, 0) : high], np.float64)
    before = np.concatenate([np.zeros(1 if low == 0 else 0), here[:-1]])
    emphasised = here[len(here) - (high - low) :] - _PRE_EMPHASIS * before[len(before) - (high - low) :]
    strips = np.lib.stride_tricks.sliding_window_view(emphasised[wanted - low], _N_FFT)[::_HOP]
    return np.abs(np.fft.rfft(strips * _hann(), axis=1))


def _reflected(index: Integer[np.ndarray, "k"], length: int) -> Integer[np.ndarray, "k"]:
    """Indices beyond the ends mirrored back, the end samples themselves not repeated, as often as it takes."""
    if length == 1:
        return np.zeros_like(index)
    period = 2 * (length - 1)
    index = np.mod(index, period)
    return np.minimum(index, period - index)


def _normalised(spectra: Float64[np.ndarray, "columns 401"]) -> Float32[np.ndarray, "80 columns"]:
    decibel = 20 * np.log10(np.maximum(_FLOOR, spectra @ mel_filters().T)) - _REFERENCE_DB
    scaled = 2 * _RANGE * (decibel + _RANGE_DB) / _RANGE_DB - _RANGE
    return np.clip(scaled, -_RANGE, _RANGE).T.astype(np.float32)


@functools.cache
def _hann() -> Float64[np.ndarray, "800"]:
    return 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(_N_FFT) / _N_FFT)  # periodic, as spectral analysis wants it


@functools.cache
def mel_filters() -> Float64[np.ndarray, "80 401"]:
    """Slaney's triangular bands of equal area: 80 of them over the bins of an 800-point spectrum."""
    lowest, highest = _hz_to_mel(np.array([_LOWEST_HZ, _HIGHEST_HZ]))
    edges_hz = _mel_to_hz(np.linspace(lowest, highest, MEL_BANDS + 2))
    bins_hz = np.arange(_N_FFT // 2 + 1) * SAMPLE_RATE_HZ / _N_FFT
    low, centre, high = edges_hz[:-2, None], edges_hz[1:-1, None], edges_hz[2:, None]
    triangles = np.minimum((bins_hz - low) / (centre - low), (high - bins_hz) / (high - centre))
    return np.maximum(triangles, 0) * 2 / (high - low)


# Slaney's scale: linear up to 1 kHz (15 mel), logarithmic above with 27 steps per factor 6.4.
def _hz_to_mel(hz: Float64[np.ndarray, "k"]) -> Float64[np.ndarray, "k"]:
    return np.where(hz < 1000, hz * 3 / 200, 15 + 27 * np.log(np.maximum(hz, 1000) / 1000) / np.log(6.4))


def _mel_to_hz(mels: Float64[np.ndarray, "k"]) -> Float64[np.ndarray, "k"]:
    return np.where(mels < 15, mels * 200 / 3, 1000 * np.exp(np.log(6.4) * (np.maximum(mels, 15) - 15) / 27))
