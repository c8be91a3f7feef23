"""The a/v offset of a track: known offsets are found, and no wrong offset is marked sure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import pytest
from jaxtyping import Float32, Int16
from scipy.signal import lfilter
from tiny_syncnet import brightness_reader, hiss, story

from preprocessing.analysis import av_offset as sync
from preprocessing.analysis.av_offset import NOT_KNOWN, Offset, av_offset, correction_frames
from preprocessing.reels import FilmSound, Track
from tccp.config import SAMPLES_PER_FRAME
from tccp.faces import MediapipeBackend
from tccp.media import open_audio, read_frames
from tccp.roundtable import synthesise

Landmarks = Float32[np.ndarray, "f 68 2"]
Film = tuple[Landmarks, Int16[np.ndarray, " n"]]


@cache
def synthetic_film(seed: int, seconds: int = 12) -> Film:
    """Synthetic landmarks with detector-like noise, and audio."""
    clip = synthesise(seed, seconds)
    eyes_px = np.linalg.norm(clip.landmarks_px[:, 45] - clip.landmarks_px[:, 36], axis=1).mean()
    noise = np.random.default_rng(seed).normal(0, 0.02 * eyes_px, clip.landmarks_px.shape)
    return (clip.landmarks_px + noise).astype(np.float32), np.rint(clip.audio * 32767).astype(np.int16)


def track_of(landmarks: Landmarks, start_frame: int = 0, confidence: float = 1.0) -> Track:
    frames = len(landmarks)
    box = np.zeros((frames, 4), np.float32)
    return Track(0, 0, start_frame, box, landmarks, np.full(frames, confidence, np.float32), {})


def whole(track: Track) -> list[tuple[int, int]]:
    return [(track.start_frame, track.stop_frame)]


@pytest.mark.parametrize(("seed", "late"), [(1, 0), (2, 5), (3, -5), (4, 8), (1, -8), (2, 14)])
def test_known_offset_is_found(seed: int, late: int) -> None:
    landmarks, pcm = synthetic_film(seed)
    track = track_of(landmarks, 1000)
    found = av_offset(track, FilmSound(pcm, 1000 + late), whole(track))
    assert found.sure
    assert found.frames == late == correction_frames(found)


@pytest.mark.parametrize("away", [30, -60])
def test_offset_beyond_the_search_range_is_not_sure(away: int) -> None:
    landmarks, pcm = synthetic_film(1)
    assert not av_offset(track_of(landmarks), FilmSound(pcm, away), [(0, len(landmarks))]).sure


def test_peak_at_the_edge_of_the_search_range_is_not_sure() -> None:
    landmarks, pcm = synthetic_film(1)
    found = av_offset(track_of(landmarks), FilmSound(pcm, 15), [(0, len(landmarks))])
    assert found.frames == 15
    assert not found.sure


@pytest.mark.parametrize("seed", range(1, 5))
def test_audio_of_another_person_is_never_sure(seed: int) -> None:
    landmarks, _ = synthetic_film(seed)
    for other in range(1, 5):
        if other != seed:
            found = av_offset(track_of(landmarks), FilmSound(synthetic_film(other)[1], 0), [(0, len(landmarks))])
            assert not found.sure
            assert correction_frames(found) == 0
            assert 0 < found.confidence < sync.SURE_PEAK


def test_short_tracks_give_a_guess_that_is_not_sure() -> None:
    landmarks, pcm = synthetic_film(2)
    found = av_offset(track_of(landmarks[:124]), FilmSound(pcm, 4), [(0, 124)])
    assert found.frames == 4
    assert found.confidence > 3
    assert not found.sure


def test_only_speaking_frames_count() -> None:
    landmarks, pcm = synthetic_film(3, 20)
    other = synthetic_film(4, 20)[1]
    half = len(landmarks) // 2
    mixed = np.concatenate([pcm[: half * SAMPLES_PER_FRAME], other[half * SAMPLES_PER_FRAME :]])
    track, sound = track_of(landmarks), FilmSound(mixed, -3)
    right = av_offset(track, sound, [(-100, 70), (80, half - 5)])  # ranges may reach beyond the track
    assert right.sure
    assert right.frames == -3
    assert not av_offset(track, sound, [(half, 10_000)]).sure
    assert av_offset(track, sound, whole(track)).confidence < right.confidence


def test_frames_without_a_face_do_not_count() -> None:
    landmarks, pcm = synthetic_film(4)
    track = track_of(landmarks.copy())
    track.confidence[100:140] = 0
    track.landmarks[100:140] = landmarks[100]  # bridged
    track.landmarks[200:210] = np.nan
    found = av_offset(track, FilmSound(pcm, 2), whole(track))
    assert found.sure
    assert found.frames == 2
    track.landmarks[100:140] = 0  # values in frames without a face are ignored
    assert av_offset(track, FilmSound(pcm, 2), whole(track)).frames == 2


def test_offset_does_not_depend_on_audio_level_or_face_size() -> None:
    landmarks, pcm = synthetic_film(2)
    usual = av_offset(track_of(landmarks), FilmSound(pcm, -2), [(0, len(landmarks))])
    quiet = av_offset(track_of(landmarks * 4 + 300), FilmSound(pcm // 8, -2), [(0, len(landmarks))])
    assert quiet.sure and usual.sure
    assert quiet.frames == usual.frames == -2
    assert quiet.confidence == pytest.approx(usual.confidence, rel=0.1)


def test_missing_audio_does_not_count_as_silence() -> None:
    landmarks, pcm = synthetic_film(1)
    short = FilmSound(pcm[: 200 * SAMPLES_PER_FRAME], 3)
    found = av_offset(track_of(landmarks), short, [(0, len(landmarks))])
    without_the_rest = av_offset(track_of(landmarks[:203]), short, [(0, 203)])
    assert found.frames == without_the_rest.frames == 3
    assert found.confidence == pytest.approx(without_the_rest.confidence, rel=0.05)


def test_missing_signals_give_an_unknown_offset() -> None:
    landmarks, pcm = synthetic_film(1)
    track, sound = track_of(landmarks), FilmSound(pcm, 0)
    assert av_offset(track, sound, []) == NOT_KNOWN
    assert av_offset(track, sound, [(0, 20)]) == NOT_KNOWN
    assert av_offset(track, FilmSound(pcm[:0], 0), whole(track)) == NOT_KNOWN
    assert av_offset(track, FilmSound(np.zeros_like(pcm), 0), whole(track)) == NOT_KNOWN
    assert av_offset(track_of(np.full_like(landmarks, np.nan)), sound, whole(track)) == NOT_KNOWN
    assert av_offset(track_of(landmarks, confidence=0.0), sound, whole(track)) == NOT_KNOWN
    still = av_offset(track_of(np.repeat(landmarks[:1], len(landmarks), 0)), sound, whole(track))
    assert not still.sure


def test_only_sure_offsets_are_corrected() -> None:
    assert correction_frames(Offset(4, 6.0, True)) == 4
    assert correction_frames(Offset(-4, 6.0, False)) == 0
    assert correction_frames(NOT_KNOWN) == 0


@pytest.mark.parametrize(("lips", "sound"), [(0.0, 0.0), (0.6, 0.6), (0.8, -0.3), (0.9, 0.5)])
def test_chance_level_is_the_deviation_for_unrelated_signals(lips: float, sound: float) -> None:
    """1000 pairs of independent first-order autoregressive signals."""
    rng = np.random.default_rng(0)
    heights = []
    for _ in range(1000):
        moving, heard = (lfilter([1], [1, -memory], rng.normal(size=350))[100:] for memory in (lips, sound))
        # Private functions: every threshold is in this unit, which the public functions do not return.
        heights.append(sync._correlations(moving, heard[None])[0] / sync._chance(moving, heard))
    assert 0.9 < np.std(heights) < 1.12
    assert abs(np.mean(heights)) < 0.1


# ---- SyncNet


def chips(brightness: Iterable[float], start_frame: int) -> dict[int, bytes]:
    pictures = (np.full((224, 224, 3), round(10 * value), np.uint8) for value in brightness)
    return {frame: cv2.imencode(".jpg", picture)[1].tobytes() for frame, picture in enumerate(pictures, start_frame)}


@pytest.mark.slow
def test_syncnet_finds_the_offset_from_face_chips() -> None:
    network, signal, late = brightness_reader(), story(1, 100), 4
    landmarks, start = np.full((70, 68, 2), np.nan, np.float32), 500
    seen = Track(
        0, 0, start, np.zeros((70, 4), np.float32), landmarks, np.ones(70, np.float32), chips(signal[10:80], start)
    )
    sound = FilmSound(hiss(signal), start - 10 + late)  # the audio of frame `start` comes `late` frames later
    found = av_offset(seen, sound, [(start + 8, start + 60)], network)
    assert found.frames == late
    assert 0 < found.confidence < sync.SURE_SYNCNET  # low, since the signal has one dimension
    assert not found.sure


def test_lips_give_the_offset_when_chips_are_not_consecutive() -> None:
    landmarks, pcm = synthetic_film(2)
    track = track_of(landmarks)
    every_fifth = Track(0, 0, 0, track.box, landmarks, track.confidence, chips([15], 0) | chips([15], 5))
    by_lips = av_offset(track, FilmSound(pcm, 3), whole(track))
    assert av_offset(every_fifth, FilmSound(pcm, 3), whole(track), brightness_reader()) == by_lips
    assert by_lips.frames == 3


# ---- real film


@pytest.fixture(scope="module")
def real(shared_clips: Path, shared_weights: Path) -> Iterator[Callable[[str], Film]]:
    backend = MediapipeBackend(shared_weights / "face_landmarker.task")

    @cache
    def film(name: str) -> Film:
        points = [backend.detect(frame)[0].landmarks_px for frame in read_frames(shared_clips / name)]
        with open_audio(shared_clips / name) as audio:
            return np.stack(points), np.rint(np.clip(audio.samples, -1, 1) * 32767).astype(np.int16)  # type: ignore[arg-type]

    yield film
    backend.close()


def offset_of(film: Film) -> Offset:
    landmarks, pcm = film
    return av_offset(track_of(landmarks), FilmSound(pcm, 0), [(0, len(landmarks))])


def test_shifted_grid_clips_give_right_offsets_that_are_not_sure(real: Callable[[str], Film]) -> None:
    guesses = {
        shift: offset_of(real(f"sync_grid_{name}.mp4"))
        for shift, name in ((0, "0"), (5, "audio_late_200ms"), (-5, "audio_early_200ms"))
    }
    assert {shift: found.frames for shift, found in guesses.items()} == {0: 0, 5: 5, -5: -5}
    assert not any(found.sure for found in guesses.values())  # three seconds


def test_concatenated_grid_clips_give_a_sure_offset_of_zero(real: Callable[[str], Film]) -> None:
    films = [real(f"grid_{name}.mpg") for name in ("bbaf2n", "brbk7n", "lwbsza")]
    sounds = [np.resize(np.pad(pcm, (0, SAMPLES_PER_FRAME)), 75 * SAMPLES_PER_FRAME) for _, pcm in films]
    landmarks = np.concatenate([points for points, _ in films])
    together = offset_of((landmarks, np.concatenate(sounds)))
    assert together.sure
    assert together.frames == 0
    assert not offset_of((landmarks, np.concatenate(sounds[1:] + sounds[:1]))).sure


@pytest.mark.slow
def test_only_the_latentsync_clip_with_its_own_audio_is_sure(real: Callable[[str], Film]) -> None:
    """The second clip has its own audio; the first clip's audio matches its lips at no lag up to 2.4 s."""
    in_step = offset_of(real("latentsync_demo2.mp4"))
    assert in_step.sure
    assert in_step.frames == 0
    assert not offset_of(real("latentsync_demo1.mp4")).sure
