"""Voice activity, and features of the sound that follow the speaker's mouth; one value per frame of film."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float32, Int16

from preprocessing.reels import FilmSound
from tccp.config import SAMPLE_RATE_HZ, SAMPLES_PER_FRAME
from tccp.errors import TccpError
from tccp.sequences import true_runs

_FULL_SCALE = 32768.0

# ---- voice activity

# Samples in Silero's window, and samples of the window before it that it also receives.
_WINDOW, _CONTEXT = 512, 64
_STATE_SHAPE = (2, 1, 128)
_WARM_UP_FRAMES = 48  # 60 windows: after them, the network's output no longer depends on its initial state

_SPEECH_HZ = (300.0, 3400.0)  # the telephone band: it contains voices, but little hum, rumble or hiss
_FLOOR_FRAMES = 250  # to either side, 10 s: within 20 s every speaker pauses, so the noise floor is audible
_FLOOR_SHARE = 0.1
_SILENCE_DB = -60.0  # of full scale: least noise floor, so that faint noise after digital silence is not a voice
# Above the floor; in the shared clips with pauses, levels are 8 to 45 dB in speech and -3 to 6 dB in pauses.
_ON_DB, _OFF_DB = 9.0, 5.0
_DB_PER_LOGIT = 1.5
_SHORTEST_FRAMES = 3  # clicks are shorter than any syllable
_HANGOVER_FRAMES = 4  # the closure of a stop consonant is not a pause


def voice_activity(
    sound: FilmSound, start_frame: int, num_frames: int, weights: Path | None = None
) -> Float32[np.ndarray, " f"]:
    """Probability that a voice is heard, for each of `num_frames` frames from `start_frame` on.

    weights: silero_vad.onnx. Without it, a detector based on the level in the speech band is used; unlike Silero, it
    also reacts to music.
    Raises TccpError if the weights are missing or are not Silero's.
    """
    if num_frames == 0:
        return np.zeros(0, np.float32)
    if weights is None:
        return _by_energy(sound, start_frame, num_frames)
    return _by_silero(sound, start_frame, num_frames, weights)


def _by_silero(sound: FilmSound, start_frame: int, num_frames: int, weights: Path) -> Float32[np.ndarray, " f"]:
    network = _open_silero(weights)
    lead = _WARM_UP_FRAMES * SAMPLES_PER_FRAME
    pcm = sound.between(start_frame - _WARM_UP_FRAMES, start_frame + num_frames + 1)
    count = -(-(lead + num_frames * SAMPLES_PER_FRAME) // _WINDOW)
    samples = np.zeros(_CONTEXT + count * _WINDOW, np.float32)
    scaled = pcm[: count * _WINDOW] / np.float32(_FULL_SCALE)
    samples[_CONTEXT : _CONTEXT + len(scaled)] = scaled
    state, rate = np.zeros(_STATE_SHAPE, np.float32), np.array(SAMPLE_RATE_HZ, np.int64)
    speech = np.zeros(count, np.float32)
    try:
        for i in range(count):
            window = samples[None, i * _WINDOW : (i + 1) * _WINDOW + _CONTEXT]
            probability, state = network.run(None, {"input": window, "state": state, "sr": rate})
            speech[i] = probability[0, 0]
    except Exception as error:  # onnxruntime's exception classes, which differ between builds
        raise _not_silero(weights, error) from None
    middle = lead + (np.arange(num_frames) + 0.5) * SAMPLES_PER_FRAME
    return np.interp(middle, (np.arange(count) + 0.5) * _WINDOW, speech).astype(np.float32)


def _open_silero(weights: Path) -> Any:
    """Opens the network with one thread: it is small, and other workers use the other cores."""
    import onnxruntime

    if not weights.is_file():
        raise TccpError(f"voice activity weights {weights}: no such file; give silero_vad.onnx, or leave it out")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    try:
        network = onnxruntime.InferenceSession(weights.read_bytes(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # as above
        raise _not_silero(weights, error) from None
    if {given.name for given in network.get_inputs()} != {"input", "state", "sr"}:
        raise _not_silero(weights, None)
    return network


def _not_silero(weights: Path, error: Exception | None) -> TccpError:
    why = f" ({type(error).__name__})" if error else ""
    return TccpError(f"voice activity weights {weights}: not Silero's network{why}; give silero_vad.onnx, version 5 up")


def _by_energy(sound: FilmSound, start_frame: int, num_frames: int) -> Float32[np.ndarray, " f"]:
    """Voice activity from the level in the speech band above a moving noise floor: starts at 9 dB, ends below 5 dB."""
    before, after = start_frame - _FLOOR_FRAMES, start_frame + num_frames + _FLOOR_FRAMES
    first = max(before, min(sound.start_frame, start_frame))
    stop = min(after, max(sound.start_frame - (-len(sound.pcm) // SAMPLES_PER_FRAME), start_frame + num_frames))
    level = np.concatenate([_level_db(power, *_SPEECH_HZ) for power in _power(sound, first, stop)])
    here = slice(start_frame - first, start_frame - first + num_frames)
    above = level - np.maximum(_floor(level), _SILENCE_DB)
    speaks = _with_hysteresis(above)[here]
    logistic = 1 / (1 + np.exp(-(above[here] - (_ON_DB + _OFF_DB) / 2) / _DB_PER_LOGIT))
    return np.where(speaks, np.maximum(logistic, 0.6), np.minimum(logistic, 0.4)).astype(np.float32)


def _floor(level: Float[np.ndarray, " f"]) -> Float[np.ndarray, " f"]:
    """Noise floor: the 10 % quantile of the level around each frame, computed at every tenth frame and interpolated."""
    at = np.arange(0, len(level), 10)
    around = [level[max(i - _FLOOR_FRAMES, 0) : i + _FLOOR_FRAMES + 1] for i in at]
    return np.interp(np.arange(len(level)), at, [np.quantile(part, _FLOOR_SHARE) for part in around])


def _with_hysteresis(above: Float[np.ndarray, " f"]) -> Bool[np.ndarray, " f"]:
    """Hysteresis between _OFF_DB and _ON_DB; then short pauses are closed, and runs as short as a click removed."""
    speaks = hysteresis(above, _OFF_DB, _ON_DB)
    for first, stop in true_runs(speaks, max_gap=_HANGOVER_FRAMES):
        speaks[first:stop] = stop - first >= _SHORTEST_FRAMES
    return speaks


def hysteresis(values: Float[np.ndarray, " f"], low: float, high: float) -> Bool[np.ndarray, " f"]:
    """True in every run of values >= `low` that contains a value >= `high`; NaN ends a run."""
    from skimage.filters import apply_hysteresis_threshold  # a slow import

    if not len(values):  # scikit-image fails on an empty array
        return np.zeros(0, bool)
    # scikit-image compares with `>`: thresholds just below the given ones make that `>=`.
    just_below_low, just_below_high = np.nextafter([low, high], -np.inf)
    return apply_hysteresis_threshold(values.astype(np.float64), just_below_low, just_below_high)


# ---- the mouth in the sound

# An open mouth emits the upper formants; spread lips shorten the vocal tract, which raises the second formant. Of a
# dozen bands and pairs of bands, these distinguish a mouth's own sound from other people's best: in five real speakers
# (leave-one-out) 3 s of film are decided right in 94 of 100 cases, in RoundTable in 100 (by level alone: 77).
_OPEN_HZ = (1000.0, 4000.0)
_SPREAD_HZ, _ROUND_HZ = (1700.0, 5500.0), (200.0, 1000.0)
_DEPTH_DB = 40.0  # below the loud parts of the film; lower levels are noise


def articulation(sound: FilmSound, start_frame: int, num_frames: int) -> Float32[np.ndarray, "f 2"]:
    """Two features of the sound of each frame: one rises with the mouth's opening, the other with its width.

    In dB, with arbitrary offsets: for correlation with the movement of a mouth.
    """
    stop = start_frame + num_frames
    bands = [_OPEN_HZ, _SPREAD_HZ, _ROUND_HZ]
    parts = [np.stack([_level_db(p, *band) for band in bands], 1) for p in _power(sound, start_frame, stop)]
    level = np.concatenate([np.zeros((0, 3)), *parts])
    if not num_frames:
        return np.zeros((0, 2), np.float32)
    bottom = np.maximum(np.quantile(level, 0.95, axis=0).max() - _DEPTH_DB, _SILENCE_DB)
    opened, spread, rounded = np.maximum(level, bottom).T
    return np.stack([opened, spread - rounded], 1).astype(np.float32)


_SPECTRUM_SAMPLES = 800  # samples (50 ms) around the middle of a frame
_NFFT = 1024
_PART_FRAMES = 1000  # frames that are computed together; bounds memory


def _power(sound: FilmSound, start_frame: int, stop_frame: int) -> Iterator[Float[np.ndarray, "f bins"]]:
    """Power spectra around the middle of each frame, in parts. A full-scale sine has the power 1/4 in its bin."""
    window = np.hanning(_SPECTRUM_SAMPLES)
    margin = (SAMPLES_PER_FRAME - _SPECTRUM_SAMPLES) // 2 + SAMPLES_PER_FRAME
    for first in range(start_frame, stop_frame, _PART_FRAMES):
        stop = min(first + _PART_FRAMES, stop_frame)
        pcm: Int16[np.ndarray, " n"] = sound.between(first - 1, stop + 1)
        views = np.lib.stride_tricks.sliding_window_view(pcm[margin:], _SPECTRUM_SAMPLES)[::SAMPLES_PER_FRAME][
            : stop - first
        ]
        yield np.abs(np.fft.rfft(views * (window / _FULL_SCALE / window.sum()), _NFFT)) ** 2


def _level_db(power: Float[np.ndarray, "f bins"], low_hz: float, high_hz: float) -> Float[np.ndarray, " f"]:
    low, high = (round(hz * _NFFT / SAMPLE_RATE_HZ) for hz in (low_hz, high_hz))
    return 10 * np.log10(power[:, low:high].sum(1) + 1e-12)
