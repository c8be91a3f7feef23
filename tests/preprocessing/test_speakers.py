"""Active speakers: voice activity, mouth motion and voice attribution, on synthetic mouths, RoundTable and film."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preprocessing.analysis.look import encode_chip
from preprocessing.analysis.mouths import mouth_motion
from preprocessing.analysis.speakers import MOVES, Stretch, score_track, speaking_stretches
from preprocessing.analysis.voice_activity import articulation, hysteresis, voice_activity
from preprocessing.reels import SPEECH_CHIP_PX, FilmSound, Track
from tccp.config import FPS, SAMPLES_PER_FRAME
from tccp.errors import TccpError
from tccp.faces import Face, MediapipeBackend, iou
from tccp.landmarks import MEAN_FACE
from tccp.media import open_audio, probe, read_frames
from tccp.models.light_asd import load_light_asd
from tccp.roundtable import synthesise
from tccp.sequences import true_runs

# ---- synthetic mouths

_UNIT_PX = 60.0
_LOWER_LIP = (65, 66, 67)


def _face(opening: np.ndarray, x: float = 0.0, noise_px: float = 0.0, seed: int = 0) -> np.ndarray:
    """Landmarks of a face with the given inner-lip gap, in units of the distance between the outer eye corners."""
    points = np.repeat(MEAN_FACE[None, :, :2], len(opening), 0)
    points[:, _LOWER_LIP, 1] += opening[:, None]
    noise = np.random.default_rng(seed).normal(0, noise_px, points.shape)
    return (points * _UNIT_PX + np.array([x, 100.0]) + noise).astype(np.float32)


def _track(number: int, landmarks: np.ndarray, start_frame: int = 0, box: tuple[float, ...] | None = None) -> Track:
    boxes = (
        np.concatenate([landmarks.min(1), landmarks.max(1)], 1) if box is None else np.tile(box, (len(landmarks), 1))
    )
    ones = np.ones(len(landmarks), np.float32)
    return Track(number, 0, start_frame, boxes.astype(np.float32), landmarks.astype(np.float32), ones, {})


def _speech(frames: int, seed: int = 0, size: float = 0.12) -> np.ndarray:
    """A mouth opening that rises and falls irregularly, about four times a second."""
    rng = np.random.default_rng(seed)
    at = np.cumsum(rng.integers(2, 5, frames))
    return np.interp(np.arange(frames), at, np.where(np.arange(frames) % 2, rng.uniform(0.4, 1, frames) * size, 0))


def _only_in(opening: np.ndarray, *parts: tuple[int, int]) -> np.ndarray:
    """The opening inside these frame ranges, a closed mouth elsewhere."""
    mask = np.zeros(len(opening), bool)
    for first, stop in parts:
        mask[first:stop] = True
    return np.where(mask, opening, 0.0)


def _voice(frames: int, *parts: tuple[int, int]) -> np.ndarray:
    return _only_in(np.ones(frames), *parts).astype(np.float32)


def _kept(stretches: Sequence[Stretch], number: int) -> list[tuple[int, int]]:
    return [(s.start_frame, s.stop_frame) for s in stretches if s.track == number and s.reason is None]


def _count_frames(stretches: Sequence[Stretch], number: int, reason: str | None = None) -> int:
    return sum(s.stop_frame - s.start_frame for s in stretches if s.track == number and s.reason == reason)


def _check_cover(tracks: Sequence[Track], stretches: Sequence[Stretch]) -> None:
    """Checks that stretches cover each track without gaps or overlap, and that one person speaks at a time."""
    for track in tracks:
        own = [s for s in stretches if s.track == track.number]
        edges = [(s.start_frame, s.stop_frame) for s in own]
        if edges:
            assert edges[0][0] == track.start_frame and edges[-1][1] == track.stop_frame
        assert all(before[1] == after[0] for before, after in pairwise(edges))
        assert {s.reason for s in own} <= {None, "not_speaking", "several_speak"}
    kept = sorted((s.start_frame, s.stop_frame) for s in stretches if s.reason is None)
    assert all(before[1] <= after[0] for before, after in pairwise(kept))


def test_stretch_keeps_short_pauses_and_a_second_of_silence_at_both_ends():
    frames = 400
    spoken = [(60, 130), (170, 200), (290, 350)]  # pauses of 1.6 and of 3.6 s
    track = _track(3, _face(_only_in(_speech(frames), *spoken)), start_frame=1000)
    stretches = speaking_stretches([track], _voice(frames, *spoken), 1000)
    _check_cover([track], stretches)
    # Mouth motion is extended by a third of a second, but only while there is voice.
    assert _kept(stretches, 3) == [(1035, 1225), (1265, 1375)]
    assert {s.reason for s in stretches} == {None, "not_speaking"}
    assert all(s.score > 0.95 for s in stretches if s.reason is None)


def test_short_mouth_pauses_count_as_speech_and_long_ones_do_not():
    frames = 250
    opening = _speech(frames)
    short = speaking_stretches(
        [_track(0, _face(_only_in(opening, (25, 112), (126, 225))))], _voice(frames, (25, 225)), 0
    )
    assert _kept(short, 0) == [(0, 250)]
    long = speaking_stretches(
        [_track(0, _face(_only_in(opening, (25, 110), (160, 225))))], _voice(frames, (25, 225)), 0
    )
    (first, second) = _kept(long, 0)
    assert first[0] == 0 and second[1] == 250 and second[0] - first[1] >= 20


def test_speech_needs_both_voice_and_mouth_motion():
    frames = 150
    still = _track(0, _face(np.zeros(frames)))
    moving = _track(0, _face(_speech(frames)))
    everything, nothing = _voice(frames, (0, frames)), _voice(frames)
    for track, voice in ((still, everything), (moving, nothing), (still, nothing)):
        assert speaking_stretches([track], voice, 0) == [Stretch(0, 0, frames, "not_speaking")]
    assert _kept(speaking_stretches([moving], everything, 0), 0) == [(0, frames)]
    # Half a second of speech is too short to keep.
    assert not _kept(speaking_stretches([moving], _voice(frames, (70, 82)), 0), 0)
    # Occasional mouth motion during somebody else's speech is mostly rejected.
    now_and_then = _only_in(_speech(frames), *((at, at + 6) for at in range(10, frames, 50)))
    assert _count_frames(speaking_stretches([_track(0, _face(now_and_then))], everything, 0), 0) < frames / 2


def test_frames_without_audio_count_as_silence():
    track = _track(0, _face(_speech(200)), start_frame=100)
    stretches = speaking_stretches([track], _voice(60, (0, 60)), 150)
    _check_cover([track], stretches)
    assert _kept(stretches, 0) == [(125, 235)]
    assert speaking_stretches([], _voice(60), 0) == []


def test_long_silence_between_turns_is_dropped_and_short_silence_is_split_in_half():
    frames = 220

    def turns(first_stop: int, second_start: int) -> tuple[tuple[int, int], tuple[int, int]]:
        opening = _speech(frames)
        tracks = [
            _track(0, _face(_only_in(opening, (20, first_stop)))),
            _track(1, _face(_only_in(opening, (second_start, 200)), x=400)),
        ]
        stretches = speaking_stretches(tracks, _voice(frames, (20, first_stop), (second_start, 200)), 0)
        _check_cover(tracks, stretches)
        (one,), (other,) = _kept(stretches, 0), _kept(stretches, 1)
        return one, other

    one, other = turns(90, 150)
    assert one == (0, 102) and other == (138, 220)
    one, other = turns(90, 106)
    assert one == (0, 98) and other == (98, 220)


def test_voice_goes_to_the_mouth_that_matches_the_audio_or_to_none():
    frames = 200
    mine, theirs = _speech(frames, 1), _speech(frames, 2)
    tracks = [_track(0, _face(theirs)), _track(1, _face(mine, x=400))]
    voice = _voice(frames, (0, frames))
    # Level in dB with some noise; the width channel is zero.
    level = np.random.default_rng(0).normal(60 * mine, 1.0).astype(np.float32)
    heard = np.stack([level, np.zeros(frames, np.float32)], 1)
    stretches = speaking_stretches(tracks, voice, 0, articulation=heard)
    _check_cover(tracks, stretches)
    assert _kept(stretches, 1) == [(0, frames)] and _count_frames(stretches, 0, "not_speaking") == frames
    # Audio that is 80 ms late still matches the same mouth.
    late = np.roll(heard, 2, axis=0)
    assert _kept(speaking_stretches(tracks, voice, 0, articulation=late), 1) == [(0, frames)]
    third = np.stack([60 * _speech(frames, 3), np.zeros(frames)], 1).astype(np.float32)
    for other in (third, None):
        stretches = speaking_stretches(tracks, voice, 0, articulation=other)
        assert {s.reason for s in stretches} == {"several_speak"}
        _check_cover(tracks, stretches)


def test_listener_with_small_mouth_motion_is_not_the_speaker():
    frames = 150
    speaker, listener = _speech(frames, 1, size=0.2), _speech(frames, 2, size=0.05)
    assert mouth_motion(_face(listener)).mean() > MOVES
    tracks = [_track(0, _face(listener)), _track(1, _face(speaker, x=400))]
    heard = np.stack([40 * speaker + np.random.default_rng(0).normal(0, 6, frames), np.zeros(frames)], 1)
    stretches = speaking_stretches(tracks, _voice(frames, (0, frames)), 0, articulation=heard.astype(np.float32))
    assert _kept(stretches, 1) == [(0, frames)] and not _kept(stretches, 0)


def test_one_word_from_another_person_does_not_split_a_stretch():
    frames = 200
    opening = _speech(frames, 1)
    tracks = [
        _track(0, _face(_only_in(opening, (0, 90), (105, 200)))),
        _track(1, _face(_only_in(_speech(frames, 2), (92, 103)), x=400)),
    ]
    heard = np.stack([60 * opening, np.zeros(frames)], 1).astype(np.float32)
    stretches = speaking_stretches(tracks, _voice(frames, (0, frames)), 0, articulation=heard)
    assert _kept(stretches, 0) == [(0, frames)] and not _kept(stretches, 1)


def test_choose_assigns_the_voice_to_the_person_at_the_point():
    frames = 120
    tracks = [
        _track(0, _face(_speech(frames))),
        _track(1, _face(np.zeros(frames), x=400)),
        _track(2, _face(np.zeros(30)), 130),
    ]
    voice = _voice(160, (0, frames))
    stretches = speaking_stretches(tracks, voice, 0, choose=(400.0, 130.0))
    _check_cover(tracks, stretches)
    assert _kept(stretches, 1) == [(0, frames)] and {s.reason for s in stretches if s.track != 1} == {"not_speaking"}
    # Two tracks at the point at different times both belong to that person.
    stretches = speaking_stretches(tracks, voice, 0, choose=(0.0, 130.0))
    assert _kept(stretches, 0) == [(0, frames)] and _kept(stretches, 2) == [(130, 160)]
    # Of two faces at the point at once, the one present for more frames is chosen.
    long, short = _track(0, _face(np.zeros(100))), _track(1, _face(np.zeros(40)), 30)
    stretches = speaking_stretches([short, long], voice, 0, choose=(0.0, 130.0))
    assert _kept(stretches, 0) == [(0, 100)] and not _kept(stretches, 1)
    assert {s.reason for s in speaking_stretches(tracks, voice, 0, choose=(900.0, 900.0))} == {"not_speaking"}


def test_without_landmarks_one_face_gets_the_voice_and_two_are_undecided():
    nothing = np.full((150, 68, 2), np.nan, np.float32)
    box = (0.0, 0.0, 80.0, 80.0)
    alone, second = _track(0, nothing, box=box), _track(1, nothing[:60], 90, box=(200.0, 0.0, 280.0, 80.0))
    voice = _voice(150, (30, 150))
    assert _kept(speaking_stretches([alone], voice, 0), 0) == [(5, 150)]
    stretches = speaking_stretches([alone, second], voice, 0)
    _check_cover([alone, second], stretches)
    # The stretch may extend a few frames into the undecided voice, as into silence.
    ((first, stop),) = _kept(stretches, 0)
    assert first == 5 and 90 <= stop <= 96
    assert (
        _count_frames(stretches, 0, "several_speak") == 150 - stop
        and _count_frames(stretches, 1, "several_speak") == 60
    )
    # The scores of a speech network decide.
    scores = {0: np.full(150, 3.0, np.float32), 1: np.full(60, -2.0, np.float32)}
    assert _kept(speaking_stretches([alone, second], voice, 0, scores), 0) == [(5, 150)]


def test_network_scores_decide_whose_mouth_moves_but_not_whose_voice_it_is():
    frames = 150
    mine, theirs = _speech(frames, 1), _speech(frames, 2)
    tracks = [_track(4, _face(theirs)), _track(7, _face(mine, x=400))]
    heard = np.stack([60 * mine, np.zeros(frames)], 1).astype(np.float32)
    voice = _voice(frames, (0, frames))
    talk, still = np.full(frames, 3.0, np.float32), np.full(frames, -1.5, np.float32)
    assert _kept(speaking_stretches(tracks, voice, 0, {4: talk, 7: still}, None, heard), 4) == [(0, frames)]
    assert _kept(speaking_stretches(tracks, voice, 0, {4: talk, 7: talk}, None, heard), 7) == [(0, frames)]
    assert _kept(speaking_stretches(tracks, voice, 0, {7: still}, None, heard), 4) == [(0, frames)]
    both_still = speaking_stretches(tracks, voice, 0, {4: still, 7: still}, None, heard)
    assert {s.reason for s in both_still} == {"not_speaking"}


@given(st.integers(0, 10**6))
@settings(max_examples=20)
def test_random_tracks_are_covered_exactly_once_and_deterministically(seed: int) -> None:
    rng = np.random.default_rng(seed)
    tracks, scores = [], {}
    for number in range(int(rng.integers(1, 5))):
        frames = int(rng.integers(1, 160))
        pauses = rng.integers(0, frames, (3, 2))
        landmarks = _face(_only_in(_speech(frames, int(rng.integers(99))), *map(tuple, pauses)), x=200.0 * number)
        if rng.random() < 0.3:
            landmarks[int(rng.integers(frames)) :] = np.nan
        tracks.append(
            _track(number, landmarks, int(rng.integers(0, 80)), (200.0 * number, 0.0, 200.0 * number + 90, 90.0))
        )
        if rng.random() < 0.3:
            scores[number] = rng.normal(1.5, 2, frames).astype(np.float32)
    voice = _voice(200, *map(tuple, rng.integers(0, 200, (3, 2))))
    heard = rng.normal(0, 5, (200, 2)).astype(np.float32)
    choose = (50.0, 50.0) if rng.random() < 0.2 else None
    stretches = speaking_stretches(tracks, voice, 20, scores, choose, heard)
    _check_cover(tracks, stretches)
    assert stretches == speaking_stretches(tracks, voice, 20, scores, choose, heard)


def test_head_motion_and_landmark_noise_are_not_mouth_motion():
    frames = 100
    at = np.arange(frames) / FPS
    still = _face(np.full(frames, 0.02))
    turned = MEAN_FACE[None] + np.zeros((frames, 1, 1))
    yaw, nod = np.radians(25 * np.sin(2.5 * at)), np.radians(10 * np.sin(4 * at))
    x, y, z = np.moveaxis(turned, -1, 0)
    x, z = x * np.cos(yaw)[:, None] - z * np.sin(yaw)[:, None], x * np.sin(yaw)[:, None] + z * np.cos(yaw)[:, None]
    y = y * np.cos(nod)[:, None] - z * np.sin(nod)[:, None]
    head = (np.stack([x, y], -1) * _UNIT_PX * (1 + 0.1 * np.sin(3 * at))[:, None, None]).astype(np.float32)
    # Eye corners 60 px and 24 px apart; MediaPipe's landmark noise is 0.1 to 0.3 px.
    for face in (still, head, _face(np.zeros(frames), noise_px=0.5), 0.4 * _face(np.zeros(frames), noise_px=0.8)):
        assert np.median(mouth_motion(face)) < MOVES / 2 and (mouth_motion(face) >= MOVES).mean() < 0.1
    for noise_px in (0.0, 0.5, 0.8):
        assert np.median(mouth_motion(0.4 * _face(_speech(frames), noise_px=noise_px))) > 1.5 * MOVES
    assert np.isnan(mouth_motion(np.full((9, 68, 2), np.nan, np.float32))).all()


def test_chips_reach_the_speech_network_one_per_frame():
    seen = []

    class MeanScorer:
        """Returns the mean of each chip as its score."""

        def score(self, pcm: np.ndarray, chips: np.ndarray) -> np.ndarray:
            seen.append((pcm, chips.shape))
            return chips.mean((1, 2)).astype(np.float32)

    landmarks = _face(np.zeros(6))
    face = Face(np.array([10, 10, 90, 90], np.float32), None, 1.0)
    pictures = {20 + i: np.full((120, 120, 3), 40 * i, np.uint8) for i in (1, 2, 4)}
    chips = {frame: encode_chip(picture, face, SPEECH_CHIP_PX) for frame, picture in pictures.items()}
    track = Track(0, 0, 20, np.tile(face.box, (6, 1)), landmarks, np.ones(6, np.float32), chips)
    sound = FilmSound(np.arange(30 * SAMPLES_PER_FRAME, dtype=np.int16), 0)
    scores = score_track(MeanScorer(), track, sound)
    np.testing.assert_allclose(scores, [40, 40, 80, 80, 160, 160], atol=2)
    ((pcm, shape),) = seen
    assert shape == (6, 112, 112) and np.array_equal(pcm, sound.pcm[20 * SAMPLES_PER_FRAME : 26 * SAMPLES_PER_FRAME])


# ---- RoundTable


def _pcm(samples: np.ndarray) -> np.ndarray:
    return np.clip(np.round(samples * 32768), -32768, 32767).astype(np.int16)


def test_roundtable_talkers_are_kept_and_bystanders_and_decoys_are_not():
    seconds, scenes = 3.0, 20
    clips = [synthesise(seed, seconds, width=640, height=480) for seed in range(scenes)]
    clear = 0
    for number, clip in enumerate(clips):
        sound = FilmSound(_pcm(clip.audio), 0)
        voice, heard = voice_activity(sound, 0, clip.num_frames), articulation(sound, 0, clip.num_frames)
        talker = _track(0, clip.landmarks_px)
        others = [_track(1 + i, actor.landmarks[..., :2]) for i, actor in enumerate(clip.scene.others)]
        stretches = speaking_stretches([talker, *others], voice, 0, articulation=heard)
        _check_cover([talker, *others], stretches)
        assert _count_frames(stretches, 0) >= 0.95 * clip.num_frames
        assert {s.reason for s in stretches if s.track > 0} == {"not_speaking"}
        # A mouth of the same size and shape that moves to another voice.
        decoy = _track(1, clips[(number + 1) % scenes].landmarks_px)
        stretches = speaking_stretches([talker, decoy], voice, 0, articulation=heard)
        assert _count_frames(stretches, 1) == 0
        clear += _count_frames(stretches, 0) >= 0.9 * clip.num_frames
    assert clear >= 0.85 * scenes  # the rest are undecided


def _kept_alone(landmarks: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """For each frame, whether the voice is given to the only visible person. Landmarks have a detector's noise."""
    noise = np.random.default_rng(0).normal(0, 0.3, landmarks.shape)
    sound, frames = FilmSound(_pcm(samples), 0), len(landmarks)
    track = _track(0, (landmarks + noise).astype(np.float32))
    voice, heard = voice_activity(sound, 0, frames), articulation(sound, 0, frames)
    stretches = speaking_stretches([track], voice, 0, articulation=heard)
    _check_cover([track], stretches)
    kept = np.zeros(frames, bool)
    for first, stop in _kept(stretches, 0):
        kept[first:stop] = True
    return kept


def test_voice_of_a_hidden_talker_belongs_to_nobody():
    """A person who moves the mouth is seen, another is heard. Without the comparison, all frames are the visible's."""
    one, other = (synthesise(seed, 12.0, width=640, height=480) for seed in (1, 2))
    assert min(_kept_alone(clip.landmarks_px, clip.audio).mean() for clip in (one, other)) > 0.98
    late = _kept_alone(one.landmarks_px, np.roll(one.audio, 5 * SAMPLES_PER_FRAME))
    assert late.mean() > 0.95  # also if the film's sound is late
    voices = [np.roll(clip.audio, seconds * 16000) for clip in (one, other) for seconds in (3, 5, 7, 9)]
    hidden = [_kept_alone(clip.landmarks_px, voice).mean() for clip in (one, other) for voice in voices]
    assert np.mean(hidden) < 0.25 and np.median(hidden) == 0
    # The visible person speaks for twelve seconds, then someone off screen while the mouth goes on moving.
    shown, heard = np.concatenate([one.landmarks_px, other.landmarks_px]), np.concatenate([one.audio, voices[1]])
    kept, half = _kept_alone(shown, heard), one.num_frames
    assert kept[: half - 2 * FPS].mean() > 0.95 and kept[half + 4 * FPS :].mean() < 0.1


# ---- voice


def _tone_words(frames: int, words: Sequence[tuple[int, int]], level: float) -> np.ndarray:
    """A buzz of 120 Hz with its harmonics, in words."""
    at = np.arange(frames * SAMPLES_PER_FRAME)
    buzz = sum(np.sin(2 * np.pi * 120 * k * at / 16000) / k for k in range(1, 30))
    return level * buzz * np.repeat(_only_in(np.ones(frames), *words), SAMPLES_PER_FRAME)


def test_noise_floor_adapts_to_the_film():
    frames = 1500
    words = [(at, at + 40) for at in range(20, frames - 40, 80)]
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 1, frames * SAMPLES_PER_FRAME) * np.repeat(np.where(np.arange(frames) < 750, 20, 400), 640)
    samples = noise + _tone_words(frames, words, 3000)
    sound = FilmSound(np.clip(samples, -32768, 32767).astype(np.int16), 100)
    voice = voice_activity(sound, 100, frames)
    truth = _voice(frames, *words) > 0
    settled = np.r_[0:500, 1000:1500]  # excludes the step in the noise level
    assert ((voice >= 0.5) == truth)[settled].mean() > 0.95
    # A part gives the values of the whole where the noise floor's context is available.
    np.testing.assert_allclose(voice_activity(sound, 400, 200), voice[300:500], atol=0.02)


@pytest.mark.parametrize("kind", ["silence", "noise", "hum", "none"])
def test_silence_noise_and_hum_are_not_voice(kind: str, request: pytest.FixtureRequest) -> None:
    at = np.arange(5 * 16000)
    samples = {
        "silence": np.zeros(len(at)),
        "noise": np.random.default_rng(0).normal(0, 300, len(at)),
        "hum": 3000 * np.sin(2 * np.pi * 100 * at / 16000),
        "none": np.zeros(0),
    }[kind]
    sound = FilmSound(samples.astype(np.int16), 0)
    assert voice_activity(sound, 0, 125).max(initial=0) < 0.45
    if kind in ("silence", "none"):
        assert voice_activity(sound, 0, 125).max() < 0.01
        assert np.array_equal(articulation(sound, 0, 125), np.full((125, 2), [-60, 0], np.float32))
    assert voice_activity(sound, 0, 0).shape == (0,) and articulation(sound, 0, 0).shape == (0, 2)
    weights = request.getfixturevalue("shared_weights") / "silero_vad.onnx"
    assert voice_activity(sound, 0, 125, weights).max() < 0.45


def test_hysteresis_keeps_runs_that_reach_the_upper_threshold():
    values = np.array([0.0, 1, 2, 1, 0, 1, 1, 3, 0])
    assert hysteresis(values, 1.0, 2.5).tolist() == [False] * 5 + [True] * 3 + [False]
    assert hysteresis(values, 1.0, 3.0).tolist() == [False] * 5 + [True] * 3 + [False]
    assert hysteresis(np.array([1.0, np.nan, 3.0]), 1.0, 3.0).tolist() == [False, False, True]
    assert hysteresis(np.zeros(0), 1.0, 3.0).shape == (0,)


@given(st.lists(st.sampled_from([0.0, 1.0, 2.0, 3.0, np.nan]), max_size=60), st.integers(0, 3), st.integers(0, 3))
def test_hysteresis_matches_a_loop_over_runs(numbers: list[float], lower: int, rise: int) -> None:
    values, low, high = np.array(numbers, np.float64), float(lower), float(lower + rise)
    expected = np.zeros(len(values), bool)
    for start, stop in true_runs(values >= low):
        expected[start:stop] = values[start:stop].max() >= high
    np.testing.assert_array_equal(hysteresis(values, low, high), expected)


def test_articulation_correlates_with_mouth_opening_and_width():
    clip = synthesise(3, 6.0, width=640, height=480)
    heard = articulation(FilmSound(_pcm(clip.audio), 7), 7, clip.num_frames)
    said = np.stack([clip.mouth_opening, clip.mouth_width], 1)
    for i in (0, 1):
        assert np.corrcoef(heard[:, i], said[:, i])[0, 1] > 0.4
    later = articulation(FilmSound(_pcm(clip.audio), 7), 17, 50)
    np.testing.assert_allclose(np.diff(later, axis=0), np.diff(heard[10:60], axis=0), atol=12)


def test_invalid_voice_weights_give_a_one_line_error(tmp_path: Path, shared_weights: Path) -> None:
    sound = FilmSound(np.zeros(16000, np.int16), 0)
    text = tmp_path / "text.onnx"
    text.write_bytes(b"not a network")
    for path, what in (
        (tmp_path / "none.onnx", "no such file"),
        (text, "not Silero's network"),
        (shared_weights / "face_landmarker.task", "not Silero's network"),
    ):
        with pytest.raises(TccpError, match=what) as error:
            voice_activity(sound, 0, 25, path)
        assert "\n" not in str(error.value) and "silero_vad.onnx" in str(error.value)


# ---- real film


@dataclass(frozen=True)
class _Film:
    tracks: list[Track]
    sound: FilmSound
    num_frames: int


def _link_detections(frames: Sequence[Sequence[Face]], chips: Sequence[Sequence[bytes]]) -> list[Track]:
    """Links detections into tracks by IoU; gaps of up to half a second are interpolated linearly."""
    chains: list[list[tuple[int, Face, bytes]]] = []
    for at, (found, pictures) in enumerate(zip(frames, chips, strict=True)):
        free = list(range(len(found)))
        for chain in chains:
            if at - chain[-1][0] <= FPS // 2 and free:
                best = max(free, key=lambda i: iou(chain[-1][1], found[i]))
                if iou(chain[-1][1], found[best]) > 0.3:
                    chain.append((at, found[best], pictures[best]))
                    free.remove(best)
        chains += [[(at, found[i], pictures[i])] for i in free]
    tracks = []
    for number, chain in enumerate(chains):
        known = np.array([at for at, _, _ in chain])
        every = np.arange(known[0], known[-1] + 1)

        def interpolated(values: np.ndarray, known: np.ndarray = known, every: np.ndarray = every) -> np.ndarray:
            columns = values.reshape(len(values), -1).T
            lines = [np.interp(every, known, column) for column in columns]
            return np.stack(lines, 1).reshape(len(every), *values.shape[1:]).astype(np.float32)

        box = interpolated(np.stack([face.box for _, face, _ in chain]))
        landmarks = interpolated(np.stack([face.landmarks_px for _, face, _ in chain if face.landmarks_px is not None]))
        confidence = np.isin(every, known).astype(np.float32)
        by_frame = {at: jpeg for at, _, jpeg in chain}
        tracks.append(Track(number, 0, int(known[0]), box, landmarks, confidence, by_frame))
    return tracks


def _sound(path: Path) -> FilmSound:
    with open_audio(path) as audio:
        return FilmSound(_pcm(np.array(audio.samples)), 0)


Look = Callable[..., _Film]


@pytest.fixture(scope="module")
def look(shared_clips: Path, shared_weights: Path) -> Iterator[Look]:
    """Tracks and audio of a shared clip; detections are cached. sound: another clip, whose audio replaces its own."""
    detector = MediapipeBackend(shared_weights / "face_landmarker.task")
    seen: dict[tuple[str, int], list[Track]] = {}

    def look(name: str, most: int = 75, sound: str | None = None) -> _Film:
        path = shared_clips / name
        count = min(most, probe(path).num_frames)
        if (name, count) not in seen:
            frames, chips = [], []
            for picture in read_frames(path, 0, count):
                frames.append(detector.detect(picture))
                chips.append([encode_chip(picture, face, SPEECH_CHIP_PX) for face in frames[-1]])
            seen[name, count] = _link_detections(frames, chips)
        return _Film(seen[name, count], _sound(shared_clips / (sound or name)), count)

    yield look
    detector.close()


def _find_stretches(film: _Film, vad: Path | None, network: Path | None = None) -> list[Stretch]:
    scores = None
    if network is not None:
        light_asd = load_light_asd(network)
        scores = {track.number: score_track(light_asd, track, film.sound) for track in film.tracks}
    voice = voice_activity(film.sound, 0, film.num_frames, vad)
    heard = articulation(film.sound, 0, film.num_frames)
    stretches = speaking_stretches(film.tracks, voice, 0, scores, None, heard)
    _check_cover(film.tracks, stretches)
    return stretches


def _share_kept(film: _Film, stretches: Sequence[Stretch]) -> float:
    return sum(_count_frames(stretches, track.number) for track in film.tracks) / film.num_frames


@pytest.mark.parametrize("detector", ["silero", "own"])
@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("grid_bbaf2n.mpg", 1.0),
        ("grid_brbk7n.mpg", 1.0),
        ("grid_lwbsza.mpg", 1.0),
        pytest.param("latentsync_demo1.mp4", 1.0, marks=pytest.mark.slow),
        pytest.param("latentsync_demo2.mp4", 1.0, marks=pytest.mark.slow),
        ("lowres_180x320.mp4", 0.9),  # a face of 42 px
        pytest.param("fps_29.97.mp4", 0.9, marks=pytest.mark.slow),
        pytest.param(
            "audio_short_2s.mp4", 0.9, marks=pytest.mark.slow
        ),  # the audio ends after two of the three seconds
        ("sync_grid_audio_late_200ms.mp4", 0.9),
    ],
)
def test_single_speakers_are_kept_with_silence_at_both_ends(
    name: str, share: float, detector: str, look: Look, shared_weights: Path
) -> None:
    film = look(name)
    stretches = _find_stretches(film, shared_weights / "silero_vad.onnx" if detector == "silero" else None)
    assert _share_kept(film, stretches) >= share


@pytest.mark.parametrize("detector", ["silero", "own"])
def test_speakers_who_take_turns_are_separated(detector: str, look: Look, shared_weights: Path) -> None:
    film = look("two_person_turns.mp4", 148)
    stretches = _find_stretches(film, shared_weights / "silero_vad.onnx" if detector == "silero" else None)
    _check_turns(film, stretches)


def _check_turns(film: _Film, stretches: Sequence[Stretch]) -> None:
    left, right = sorted(film.tracks, key=lambda track: track.box[:, 0].mean())
    assert len(film.tracks) == 2
    assert all(stop <= 74 for _, stop in _kept(stretches, left.number))
    assert all(start >= 73 for start, _ in _kept(stretches, right.number))
    assert _share_kept(film, stretches) >= 0.85


def test_overlapping_speech_is_not_attributed(look: Look, shared_weights: Path) -> None:
    film = look("two_person_overlap.mp4")
    for vad in (shared_weights / "silero_vad.onnx", None):
        stretches = _find_stretches(film, vad)
        assert _share_kept(film, stretches) == 0
        assert all(
            _count_frames(stretches, track.number, "several_speak") >= 0.8 * track.num_frames for track in film.tracks
        )


@pytest.mark.parametrize("sound", ["grid_bbaf2n.mpg", "grid_brbk7n.mpg", "latentsync_demo1.mp4"])
def test_printed_face_and_signer_are_not_speakers(sound: str, look: Look, shared_weights: Path) -> None:
    film = look("intel_asl_again.mkv", sound=sound)
    assert film.tracks
    for vad in (shared_weights / "silero_vad.onnx", None):
        assert _share_kept(film, _find_stretches(film, vad)) == 0


@pytest.mark.slow
def test_voice_is_never_given_to_another_moving_mouth(look: Look) -> None:
    """Three seconds are often too short to attribute the voice; it must then be undecided, never wrong."""
    names = ["grid_bbaf2n.mpg", "grid_brbk7n.mpg", "grid_lwbsza.mpg", "latentsync_demo1.mp4", "latentsync_demo2.mp4"]
    right = 0
    for name in names:
        film = look(name)
        voice, heard = voice_activity(film.sound, 0, 75), articulation(film.sound, 0, 75)
        for other in set(names) - {name}:
            pair = [_track(0, film.tracks[0].landmarks), _track(1, look(other).tracks[0].landmarks)]
            stretches = speaking_stretches(pair, voice, 0, articulation=heard)
            assert _count_frames(stretches, 1) == 0
            right += _count_frames(stretches, 0) >= 60
    assert right >= 4  # of 20


def test_both_voice_detectors_agree(shared_clips: Path, shared_weights: Path) -> None:
    for name, share in (("grid_bbaf2n.mpg", 0.95), ("grid_lwbsza.mpg", 0.95), ("latentsync_demo2.mp4", 0.9)):
        sound = _sound(shared_clips / name)
        frames = len(sound.pcm) // SAMPLES_PER_FRAME
        silero = voice_activity(sound, 0, frames, shared_weights / "silero_vad.onnx") >= 0.5
        own = voice_activity(sound, 0, frames) >= 0.5
        assert 0.3 < silero.mean() < 0.9 and (silero == own).mean() >= share
    music = _sound(shared_clips / "moviepy_chaplin.mp4")
    assert (voice_activity(music, 0, 200, shared_weights / "silero_vad.onnx") >= 0.5).mean() == 0
    # Detection that starts in the middle agrees with detection from the start.
    part = voice_activity(sound, 200, 100, shared_weights / "silero_vad.onnx") >= 0.5
    assert (part == silero[200:300]).mean() >= 0.95


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grid_bbaf2n.mpg", "grid_lwbsza.mpg", "lowres_180x320.mp4", "fps_29.97.mp4"])
def test_single_speakers_are_kept_with_light_asd(name: str, look: Look, shared_weights: Path) -> None:
    film = look(name)
    stretches = _find_stretches(
        film, shared_weights / "silero_vad.onnx", shared_weights / "light_asd_finetuning_TalkSet.model"
    )
    assert _share_kept(film, stretches) >= 0.9


@pytest.mark.slow
def test_light_asd_separates_turns_and_rejects_overlap_and_signer(look: Look, shared_weights: Path) -> None:
    network, vad = shared_weights / "light_asd_finetuning_TalkSet.model", shared_weights / "silero_vad.onnx"
    film = look("two_person_turns.mp4", 148)
    _check_turns(film, _find_stretches(film, vad, network))
    film = look("two_person_overlap.mp4")
    stretches = _find_stretches(film, vad, network)
    assert _share_kept(film, stretches) == 0 and {s.reason for s in stretches} >= {"several_speak"}
    film = look("intel_asl_again.mkv", sound="grid_brbk7n.mpg")
    assert _share_kept(film, _find_stretches(film, vad, network)) == 0
