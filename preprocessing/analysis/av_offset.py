"""Measures whether the sound of a track is early or late, and whether that is certain enough to move the sound."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64, UInt8

from preprocessing.reels import FilmSound, Track
from tccp.config import FPS, SAMPLE_RATE_HZ, SAMPLES_PER_FRAME
from tccp.landmarks import mouth_opening, normalise, smooth_over_time
from tccp.sequences import correlation, true_runs

MAX_OFFSET = 15
"""Offsets of -15..15 frames (0.6 s) are searched; larger ones are not found."""
_LAGS = np.arange(-MAX_OFFSET, MAX_OFFSET + 1)

_BANDS_HZ = ((500, 1000), (1000, 1500), (1500, 2000), (2000, 3000), (3000, 4000))
"""Frequency bands whose power rises when the mouth opens. Below them the voice is loud with closed lips as well (m, n);
above them are s and f."""
_SLOW_FRAMES = 3.0
"""Slower changes are removed from both signals: phrases, head movement and loudness correlate at many lags."""
_WINDOW = 2 * SAMPLES_PER_FRAME
_LEAD_SAMPLES = 80
"""The sound window is centred 5 ms after the frame's time: a compromise between rendered frames, which show that
instant, and filmed ones, which show the 40 ms after it."""
_MEMORY_FRAMES = FPS

SURE_PEAK = 5.5
"""Least peak, in standard deviations of chance correlation. Of 99,000 mismatched pairs of lips and sound, rendered and
filmed, 127 exceeded 4, 15 exceeded 4.5 and one exceeded 5 (5.3)."""
SURE_MARGIN = 2.0
"""Least height of the peak above every lag more than one frame away, in the same unit."""
MIN_FRAMES = 5 * FPS
"""Below it, the estimate of the standard deviation is too uncertain: shorter tracks are never sure."""
SURE_SYNCNET = 3.0
"""Least SyncNet confidence. LatentSync (Li et al. 2024, arXiv 2412.09262) removes films below 3 from its training data
and moves the sound of the others by the offset found."""
_SHORTEST_FRAMES = 2 * FPS
"""Shorter stretches are not passed to SyncNet: near their ends, by its definition, it has nothing to compare with."""


@dataclass(frozen=True)
class Offset:
    """frames: best estimate of how many frames the sound is late (negative: early). sure: whether that estimate is
    certain enough to move the sound.

    confidence: from lip movement, the height of the peak in standard deviations of chance; from SyncNet, as published.
    """

    frames: int
    confidence: float
    sure: bool


NOT_KNOWN = Offset(0, 0.0, False)


def correction_frames(offset: Offset) -> int:
    """By how many frames to move the sound earlier: the offset if it is sure, else 0."""
    return offset.frames if offset.sure else 0


def av_offset(track: Track, sound: FilmSound, speaking: Sequence[tuple[int, int]], syncnet: Any = None) -> Offset:
    """How late the sound of a track is.

    speaking: frames [start, stop) of the source's clock in which this person talks. syncnet: a network of
    tccp.models.syncnet, used where the track has chips for it; elsewhere lip movement is compared with the sound's
    loudness. `NOT_KNOWN` if there is neither a second of lip movement with sound nor a chip for SyncNet.
    """
    talks = np.zeros(track.num_frames, bool)
    for start, stop in speaking:
        talks[max(start - track.start_frame, 0) : max(stop - track.start_frame, 0)] = True
    if syncnet is not None and (offset := _by_syncnet(syncnet, track, sound, talks)) is not None:
        return offset
    return _by_lips(track, sound, talks)


# ---- lips against loudness


def _by_lips(track: Track, sound: FilmSound, talks: Bool[np.ndarray, " f"]) -> Offset:
    """The lag at which lip movement and loudness correlate best.

    The correlation of two unrelated signals is approximately normal with the standard deviation of `_chance`, which
    takes their length into account: one threshold holds for all tracks.
    """
    detected = track.confidence > 0  # bridged frames contain no movement of their own
    lips = _lip_signals(np.where(detected[:, None, None], track.landmarks, np.float32(np.nan)))
    bands = _loudness(sound, track.start_frame - MAX_OFFSET, track.stop_frame + MAX_OFFSET)
    known = np.isfinite(lips).all(1)
    used = np.flatnonzero(talks & known & np.isfinite(bands[MAX_OFFSET:-MAX_OFFSET]).all(1))
    if len(used) < FPS:
        return NOT_KNOWN
    bands = np.log(bands + 0.01 * bands[used + MAX_OFFSET].mean(0) + 1)  # the added term makes all pauses equally quiet
    lip_signal = _summed(lips, used)[used]
    sound_signal = _summed(bands, used + MAX_OFFSET)[used + MAX_OFFSET + _LAGS[:, None]]
    chance = _chance(lip_signal, sound_signal[MAX_OFFSET])
    height = _correlations(lip_signal, sound_signal) / chance
    best = int(np.argmax(height))
    peak = float(height[best])
    if peak <= 0:
        return NOT_KNOWN
    halves = (
        _correlations(lip_signal[half], sound_signal[:, half]) for half in np.array_split(np.arange(len(used)), 2)
    )
    sure = (
        len(used) >= MIN_FRAMES
        and peak >= SURE_PEAK
        and peak - height[np.abs(_LAGS - _LAGS[best]) > 1].max() >= SURE_MARGIN
        and abs(_LAGS[best]) < MAX_OFFSET  # a peak at the edge may be the slope of one beyond it
        and all(abs(int(np.argmax(half)) - best) <= 1 for half in halves)
    )
    return Offset(int(_LAGS[best]), peak, bool(sure))


def _lip_signals(landmarks: Float32[np.ndarray, "f 68 2"]) -> Float64[np.ndarray, "f 4"]:
    """Distances that grow when the mouth opens: inner lips, outer lips, lower lip and chin below the nose."""
    points = landmarks.astype(np.float64)
    upright = normalise(points)[..., 1]
    nose = upright[:, 33]
    outer = (upright[:, [58, 57, 56]] - upright[:, [50, 51, 52]]).mean(1)
    # The square root: opening a closed mouth changes the sound more than opening an open one wider.
    return np.stack([np.sqrt(mouth_opening(points)), outer, upright[:, 57] - nose, upright[:, 8] - nose], 1)


def _loudness(sound: FilmSound, start_frame: int, stop_frame: int) -> Float64[np.ndarray, "n bands"]:
    """Power in each of `_BANDS_HZ` around each frame; NaN for frames without sound."""
    pcm = sound.between(start_frame - 1, stop_frame + 1, _LEAD_SAMPLES).astype(np.float64)
    windows = np.lib.stride_tricks.sliding_window_view(pcm, _WINDOW)[::SAMPLES_PER_FRAME][: stop_frame - start_frame]
    power = np.abs(np.fft.rfft(windows * np.hanning(_WINDOW + 1)[:-1], axis=1)) ** 2
    bins = [np.array(band) * _WINDOW // SAMPLE_RATE_HZ for band in _BANDS_HZ]
    bands = np.stack([power[:, low:high].sum(1) for low, high in bins], 1)
    frame = np.arange(start_frame, stop_frame) - sound.start_frame
    bands[(frame < 0) | (frame >= len(sound.pcm) // SAMPLES_PER_FRAME)] = np.nan
    return bands


def _summed(signals: Float64[np.ndarray, "n s"], used: Int64[np.ndarray, " k"]) -> Float64[np.ndarray, " n"]:
    """Sum of the signals without slow changes, each scaled to a standard deviation of 1 over the frames used."""
    fast = signals - smooth_over_time(signals, _SLOW_FRAMES)
    return (fast / np.maximum(fast[used].std(0), 1e-9)).sum(1)


def _correlations(
    lip_signal: Float64[np.ndarray, " n"], sound_signal: Float64[np.ndarray, "lags n"]
) -> Float64[np.ndarray, " lags"]:
    """Pearson's correlation for each lag, over the frames with sound at that lag (others are NaN); 0 if undefined."""
    return np.nan_to_num([correlation(lip_signal, sound) for sound in sound_signal])


def _chance(lip_signal: Float64[np.ndarray, " n"], sound_signal: Float64[np.ndarray, " n"]) -> float:
    """Standard deviation of the correlation of two unrelated signals with the autocorrelations r and s of these two.

    sqrt((1 + 2 sum_k r_k s_k) / n) (Bartlett 1946), with weights that fall with the lag.
    """
    of_lips, of_sound = _autocorrelation(lip_signal), _autocorrelation(sound_signal)
    weights = 1 - np.arange(1, _MEMORY_FRAMES + 1) / (_MEMORY_FRAMES + 1)
    related = 1 + 2 * float((weights * of_lips * of_sound).sum())
    return float(np.sqrt(max(related, 0.3) / len(lip_signal)))  # floor: estimates from few frames may be near 0


def _autocorrelation(signal: Float64[np.ndarray, " n"]) -> Float64[np.ndarray, " k"]:
    """At lags 1.._MEMORY_FRAMES."""
    centred = signal - signal.mean()
    products = [float(centred[lag:] @ centred[: len(signal) - lag]) for lag in range(_MEMORY_FRAMES + 1)]
    return np.array(products[1:]) / max(products[0], 1e-9)


# ---- SyncNet


def _by_syncnet(network: Any, track: Track, sound: FilmSound, talks: Bool[np.ndarray, " f"]) -> Offset | None:
    """SyncNet's offset as published, with the windows of all stretches with chips pooled; None if there are none."""
    from tccp.models.syncnet import distances, lip_embeddings, read_offset, sound_embeddings

    tables = []
    for start, stop in _stretches(track, talks):
        lips = lip_embeddings(network, _pictures(track.chips, start, stop))
        tables.append(distances(lips, sound_embeddings(network, sound.between(start, stop))))
    if not tables:
        return None
    found = read_offset(np.concatenate(tables))
    sure = found.confidence >= SURE_SYNCNET and abs(found.offset) < MAX_OFFSET
    return Offset(-found.offset, found.confidence, sure)


def _stretches(track: Track, talks: Bool[np.ndarray, " f"]) -> list[tuple[int, int]]:
    """Stretches [start, stop) of the source's clock in which the person talks and each frame has a chip."""
    has_chip = np.array([frame in track.chips for frame in range(track.start_frame, track.stop_frame)], bool)
    runs = [run for run in true_runs(talks & has_chip) if run[1] - run[0] >= _SHORTEST_FRAMES]
    return [(track.start_frame + start, track.start_frame + stop) for start, stop in runs]


def _pictures(chips: Mapping[int, bytes], start: int, stop: int) -> Iterator[UInt8[np.ndarray, "224 224 3"]]:
    for frame in range(start, stop):
        picture = cv2.imdecode(np.frombuffer(chips[frame], np.uint8), cv2.IMREAD_COLOR_RGB)
        assert picture is not None
        yield picture.astype(np.uint8, copy=False)
