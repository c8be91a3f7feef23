"""Wav2Lip's mel against its definition, librosa and golden values; mel windows against the mel of the whole audio."""

from __future__ import annotations

import math
import wave
from pathlib import Path

import hypothesis
import librosa
import numpy as np
import pytest
from hypothesis import strategies as st

from tccp.errors import TccpError
from tccp.media import open_audio
from tccp.media.mel import _HANN, SILENCE, _filters, check_audio, mel, mel_windows, num_columns, wav2lip_windows


def speech_like(num_samples: int, seed: int = 0) -> np.ndarray:
    """Gliding harmonics, intermittent noise and a section of digital silence."""
    n = np.arange(num_samples)
    rng = np.random.default_rng(seed)
    pitch = np.cumsum(2 * np.pi * (140 + 40 * np.sin(n / 9000)) / 16000)
    voice = sum(np.sin(k * pitch) / k for k in range(1, 25)) * (0.5 + 0.5 * np.sin(n / 1500))
    sound = 0.2 * voice + 0.05 * rng.standard_normal(num_samples) * (np.sin(n / 2500) > 0)
    sound[num_samples // 2 : num_samples // 2 + 3000] = 0
    return sound.astype(np.float32)


def slow_mel(samples: np.ndarray) -> np.ndarray:
    """The definition as explicit sums, without a library's FFT, window function or filter bank."""
    n = len(samples)
    emphasised = [float(samples[i]) - 0.97 * (float(samples[i - 1]) if i else 0.0) for i in range(n)]

    def at(i: int) -> float:  # reflected at both ends, the end sample itself not repeated
        while n > 1 and not 0 <= i < n:
            i = -i if i < 0 else 2 * (n - 1) - i
        return emphasised[i if n > 1 else 0]

    def hz(mels: float) -> float:
        return mels * 200 / 3 if mels < 15 else 1000 * 6.4 ** ((mels - 15) / 27)

    top = 15 + 27 * math.log(7.6) / math.log(6.4)
    edges = [hz(55 * 3 / 200 + (top - 55 * 3 / 200) * k / 81) for k in range(82)]
    columns = []
    for column in range(1 + n // 200):
        strip = [at(200 * column - 400 + i) * (0.5 - 0.5 * math.cos(2 * math.pi * i / 800)) for i in range(800)]
        magnitudes = [
            math.hypot(
                sum(x * math.cos(2 * math.pi * k * i / 800) for i, x in enumerate(strip)),
                sum(x * math.sin(2 * math.pi * k * i / 800) for i, x in enumerate(strip)),
            )
            for k in range(401)
        ]
        bands = []
        for low, centre, high in zip(edges, edges[1:], edges[2:], strict=False):
            total = 0.0
            for k, magnitude in enumerate(magnitudes):
                f = 20.0 * k
                if low < f < high:
                    rise = (f - low) / (centre - low) if f <= centre else (high - f) / (high - centre)
                    total += magnitude * rise * 2 / (high - low)
            decibel = 20 * math.log10(max(1e-5, total)) - 20
            bands.append(min(4.0, max(-4.0, 8 * (decibel + 100) / 100 - 4)))
        columns.append(bands)
    return np.array(columns).T


@pytest.mark.parametrize("num_samples", [1, 2, 150, 399, 400, 401, 1100])
def test_mel_matches_its_definition(num_samples: int):
    samples = speech_like(num_samples, seed=num_samples)
    np.testing.assert_allclose(mel(samples), slow_mel(samples), atol=1e-5)


@pytest.mark.parametrize("num_samples", [800, 16000, 70_123])
def test_mel_matches_librosa_on_the_whole_audio(num_samples: int):
    """mel processes the audio in pieces and reflects its ends itself."""
    samples = speech_like(num_samples)
    emphasised = librosa.effects.preemphasis(samples.astype(np.float64), coef=0.97, zi=[0.0])
    spectrum = np.abs(librosa.stft(emphasised, n_fft=800, hop_length=200, win_length=800, pad_mode="reflect"))
    bank = librosa.filters.mel(sr=16000, n_fft=800, n_mels=80, fmin=55, fmax=7600, dtype=np.float64)
    decibel = 20 * np.log10(np.maximum(1e-5, bank @ spectrum)) - 20
    reference = np.clip(8 * (decibel + 100) / 100 - 4, -4, 4)
    np.testing.assert_allclose(mel(samples), reference, atol=1e-4)


GOLDEN = {  # (band, column), computed once by `slow_mel`
    (0, 0): -0.11053,
    (3, 2): -1.55768,
    (10, 1): 1.47237,
    (15, 10): 0.27523,
    (25, 7): -3.23364,
    (30, 10): 0.46901,
    (40, 9): 1.44442,
    (60, 4): -4.0,
    (79, 10): -0.84138,
}


def test_mel_of_a_chirp_matches_golden_values():
    """A chirp from 200 to 2200 Hz."""
    n = np.arange(2000)
    chirp = (0.5 * np.sin(2 * np.pi * (n * 200 + n * n / 2) / 16000)).astype(np.float32)
    columns = mel(chirp)
    assert columns.shape == (80, 11)
    assert columns.mean() == pytest.approx(-1.890781, abs=1e-4)
    for (band, column), value in GOLDEN.items():
        assert columns[band, column] == pytest.approx(value, abs=1e-4), (band, column)


def test_mel_matches_the_values_the_packaged_weights_were_trained_on():
    samples = speech_like(16000)
    columns = mel(samples).astype(np.float64)
    assert (columns.mean(), columns.std()) == pytest.approx((-1.074819, 1.667268), abs=1e-5)
    bands = [-2.585098, -1.745875, -1.780015, -1.411578, -1.00524, -0.579583, -0.605851, -1.430518]
    np.testing.assert_allclose(columns[::10].mean(axis=1), bands, atol=1e-5)
    band_40 = [-0.28582, 0.128176, 0.570596, -0.206327, 0.005869, -4.0, -0.759655, -1.050538, -2.032286]
    np.testing.assert_allclose(columns[40, ::9], band_40, atol=1e-4)
    windows = mel_windows(samples, 0, 25).astype(np.float64)
    assert (windows.mean(), windows[0].mean(), windows[24].mean()) == pytest.approx(
        (-1.238047, -1.444696, -2.402809), abs=1e-5
    )


def test_filters_and_window_equal_those_of_librosa():
    bank = librosa.filters.mel(sr=16000, n_fft=800, n_mels=80, fmin=55, fmax=7600, dtype=np.float64)
    np.testing.assert_allclose(_filters(), bank, rtol=0, atol=1e-15)
    sound = np.random.default_rng(0).standard_normal(20_000)
    spectra = np.abs(librosa.stft(sound, n_fft=800, hop_length=200, center=False))
    strips = np.lib.stride_tricks.sliding_window_view(sound, 800)[::200]
    np.testing.assert_allclose(np.abs(np.fft.rfft(strips * _HANN)).T, spectra, rtol=0, atol=1e-12)


def test_silence_is_the_minimum_and_loud_noise_stays_in_range():
    assert (mel(np.zeros(3200, np.float32)) == SILENCE).all()
    loud = mel(np.random.default_rng(0).choice([-1.0, 1.0], 16000))
    assert loud.max() <= 4
    assert loud.max() > 2
    assert mel(speech_like(16000)).dtype == np.float32


def window_by_hand(whole: np.ndarray, first: int) -> np.ndarray:
    window = np.full((80, 16), -4.0, np.float32)
    for j in range(16):
        if 0 <= first + j < whole.shape[1]:
            window[:, j] = whole[:, first + j]
    return window


@hypothesis.settings(max_examples=40)
@hypothesis.given(num_samples=st.integers(1, 20_000), start=st.integers(0, 40), count=st.integers(0, 20))
def test_windows_of_a_range_match_the_whole_mel(num_samples: int, start: int, count: int):
    samples = speech_like(num_samples, seed=num_samples)
    whole = mel(samples)
    assert whole.shape[1] == num_columns(num_samples)
    windows = mel_windows(samples, start, count)
    assert windows.shape == (count, 80, 16)
    for i, window in enumerate(windows, start):
        # Columns first .. first + 15 are centred as closely as possible on 3.2 i + 1.6, the middle of the frame.
        first = min(range(-10, 200), key=lambda f: (abs(10 * f + 75 - (32 * i + 16)), -f))  # the later of two equals
        np.testing.assert_allclose(window, window_by_hand(whole, first), atol=1e-6)


@hypothesis.settings(max_examples=25)
@hypothesis.given(num_samples=st.integers(3200, 20_000), start=st.integers(0, 40), count=st.integers(0, 20))
def test_wav2lip_windows_look_ahead_and_repeat_the_last_16_columns(num_samples: int, start: int, count: int):
    samples = speech_like(num_samples, seed=num_samples)
    whole = mel(samples)
    for i, window in enumerate(wav2lip_windows(samples, start, count), start):
        first = int(i * 80 / 25)
        expected = whole[:, first : first + 16] if first + 16 <= whole.shape[1] else whole[:, -16:]
        np.testing.assert_allclose(window, expected, atol=1e-6)


def test_windows_are_centred_on_their_frame():
    """A click in the middle of frame 20 is in the middle of its window, to within half a column."""
    samples = np.zeros(32000, np.float32)
    samples[20 * 640 + 320] = 1
    window = mel_windows(samples, 20, 1)[0]
    loudness = window.mean(axis=0) + 4
    centre = (loudness * np.arange(16)).sum() / loudness.sum()
    assert centre == pytest.approx(7.5, abs=0.55)  # 3.2 columns per frame: the resolution is half a column


def test_short_audio_is_padded_with_silence_for_wav2lip():
    windows = wav2lip_windows(speech_like(1000), 0, 3)
    np.testing.assert_allclose(windows[2][:, :6], mel(speech_like(1000)), atol=1e-6)
    assert (windows[:, :, 6:] == SILENCE).all()


def test_mel_windows_of_a_track_on_disk_match_the_whole_mel(tmp_path: Path):
    """The 40 s track is read from disk."""
    samples = speech_like(16000 * 40)
    with wave.open(str(tmp_path / "long.wav"), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes((samples * 32767).astype("<i2").tobytes())
    with open_audio(tmp_path / "long.wav") as track:
        whole = mel(track)
        assert whole.shape == (80, 3201)
        np.testing.assert_allclose(mel_windows(track, 990, 10)[0], whole[:, 3162 : 3162 + 16], atol=1e-6)
        assert check_audio(track) == []


def test_odd_audio_gives_a_warning_and_invalid_audio_is_refused():
    fine = speech_like(16000)
    assert check_audio(fine) == []
    assert "silent" in check_audio(np.zeros(16000, np.float32))[0]
    assert "clipped" in check_audio(np.clip(20 * fine, -1, 1))[0]
    for value in (np.nan, np.inf, -np.inf):
        broken = fine.copy()
        broken[8000] = value
        with pytest.raises(TccpError, match=r"not numbers, first at 0\.50 s"):
            check_audio(broken)
    nothing = np.zeros(0, np.float32)
    for use in (check_audio, mel):
        with pytest.raises(TccpError, match="no length"):
            use(nothing)
    for windows in (mel_windows, wav2lip_windows):
        with pytest.raises(TccpError, match="no length"):
            windows(nothing, 0, 1)
