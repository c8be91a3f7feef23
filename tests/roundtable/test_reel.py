"""Reels of RoundTable scenes: pictures, truth and sound match the scenes, to the frame and the sample."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from tccp import media
from tccp.config import FPS, SAMPLES_PER_FRAME
from tccp.errors import TccpError
from tccp.roundtable import synthesise
from tccp.roundtable.reel import (
    OTHER_SOUND,
    OWN_SOUND,
    SILENCE,
    Dub,
    ReelTruth,
    Shot,
    plan_shots,
    read_reel_truth,
    reel_truth_path,
    write_reel,
)

WIDTH, HEIGHT = 128, 96
SHOTS = (Shot(1, 12, 5), Shot(2, 3), Shot(1, 10, 5, start_frame=40))


@pytest.fixture(scope="module")
def reel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reel") / "film.mp4"
    write_reel(path, SHOTS, WIDTH, HEIGHT, lossless=True)
    return path


@pytest.fixture(scope="module")
def truth(reel: Path) -> ReelTruth:
    return read_reel_truth(reel)


def sound_of(path: Path) -> np.ndarray:
    with media.open_audio(path) as track:
        return np.array(track.samples)


def sound_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation of two sounds; above 0.9 if they differ only by encoding."""
    return float(np.corrcoef(a, b)[0, 1])


def test_pictures_and_truth_match_the_scenes(reel: Path, truth: ReelTruth) -> None:
    frames = list(media.read_frames(reel))
    assert len(frames) == truth.num_frames == 25
    assert truth.cuts.tolist() == [12, 15]
    assert truth.shot.tolist() == [0] * 12 + [1] * 3 + [2] * 10
    scenes = [synthesise(s.seed, (s.start_frame + s.num_frames) / FPS, WIDTH, HEIGHT, s.person_seed) for s in SHOTS]
    for frame, shot, at in ((0, 0, 0), (11, 0, 11), (12, 1, 0), (14, 1, 2), (15, 2, 40), (24, 2, 49)):
        scene = scenes[shot]
        np.testing.assert_array_equal(frames[frame], scene.render(at))
        np.testing.assert_array_equal(truth.landmarks_px[frame], scene.landmarks_px[at])
        np.testing.assert_array_equal(truth.head_box[frame], scene.head_box[at])
        assert (truth.yaw_deg[frame], truth.mouth_opening[frame]) == (scene.yaw_deg[at], scene.mouth_opening[at])
        others = scene.others_box.shape[1]
        np.testing.assert_array_equal(truth.others_box[frame, :others], scene.others_box[at])
        assert np.isnan(truth.others_box[frame, others:]).all()
    assert truth.seeds.tolist() == [1, 2, 1]
    assert truth.person_seeds.tolist() == [5, scenes[1].person_seed, 5]


def test_sound_matches_each_shot(reel: Path, truth: ReelTruth) -> None:
    samples = sound_of(reel)
    assert len(samples) == 25 * SAMPLES_PER_FRAME
    assert (truth.sound == OWN_SOUND).all()
    for shot, start in zip(SHOTS, (0, 12, 15), strict=True):
        own = synthesise(shot.seed, (shot.start_frame + shot.num_frames) / FPS, person_seed=shot.person_seed).audio
        own = own[shot.start_frame * SAMPLES_PER_FRAME :]
        if np.abs(own).max() > 0.01:
            assert sound_correlation(samples[start * SAMPLES_PER_FRAME :][: len(own)], own) > 0.9


def test_sound_is_delayed_by_the_offset(tmp_path: Path) -> None:
    shots = [Shot(3, 25, 5)]
    write_reel(tmp_path / "film.mp4", shots, WIDTH, HEIGHT)
    plain = sound_of(tmp_path / "film.mp4")
    for offset in (4, -4):
        truth = write_reel(tmp_path / "moved.mp4", shots, WIDTH, HEIGHT, sound_offset_frames=offset)
        moved, by = sound_of(tmp_path / "moved.mp4"), 4 * SAMPLES_PER_FRAME
        late, early = (moved, plain) if offset > 0 else (plain, moved)
        assert len(moved) == len(plain) and truth.sound_offset_frames == offset
        assert sound_correlation(late[by:], early[:-by]) > 0.9 > sound_correlation(late, early)
        gap = moved[: by - 1024] if offset > 0 else moved[-by + 1024 :]  # an encoder's block smears the edge
        assert np.abs(gap).max() < 0.01


def test_dubs_replace_the_sound_with_silence_or_another_scene(tmp_path: Path) -> None:
    dubs = [Dub(5, 15), Dub(10, 25, seed=9)]
    truth = write_reel(tmp_path / "film.mp4", [Shot(3, 30, 5)], WIDTH, HEIGHT, dubs=dubs)
    assert truth.sound.tolist() == [OWN_SOUND] * 5 + [SILENCE] * 5 + [OTHER_SOUND] * 15 + [OWN_SOUND] * 5
    samples, by = sound_of(tmp_path / "film.mp4"), SAMPLES_PER_FRAME
    assert np.abs(samples[7 * by : 8 * by]).max() < 0.01
    assert sound_correlation(samples[10 * by : 25 * by], synthesise(9, 0.6).audio) > 0.9
    with pytest.raises(TccpError, match="cannot dub frames 20 to 31; the reel has 0 to 30"):
        write_reel(tmp_path / "film.mp4", [Shot(3, 30, 5)], WIDTH, HEIGHT, dubs=[Dub(20, 31)])


def test_the_same_arguments_give_the_same_film(reel: Path, tmp_path: Path) -> None:
    write_reel(tmp_path / "film.mp4", SHOTS, WIDTH, HEIGHT, lossless=True)
    assert (tmp_path / "film.mp4").read_bytes() == reel.read_bytes()
    assert reel_truth_path(tmp_path / "film.mp4").read_bytes() == reel_truth_path(reel).read_bytes()


def test_plans_have_the_requested_length_and_people() -> None:
    for seconds, shot_s, people in ((60, 5.0, 3), (7.4, 2.0, None), (0.04, 5, 1)):
        shots = plan_shots(4, seconds, shot_s, people)
        assert sum(shot.num_frames for shot in shots) == round(seconds * FPS)
        assert all(0.5 < shot.num_frames / (shot_s * FPS) < 1.6 for shot in shots) or len(shots) == 1
        assert len({shot.person_seed for shot in shots}) == (people or len(shots))
        assert all(a.person_seed != b.person_seed for a, b in itertools.pairwise(shots))
        assert shots == plan_shots(4, seconds, shot_s, people) != plan_shots(5, seconds, shot_s, people)


def test_invalid_reels_and_truth_files_are_refused(reel: Path, tmp_path: Path) -> None:
    with pytest.raises(TccpError, match="no shot was given"):
        write_reel(tmp_path / "film.mp4", [])
    with pytest.raises(TccpError, match="a shot of 0 frames"):
        Shot(1, 0)
    with pytest.raises(TccpError, match=r"at least 0\.04 s, and 0\.08 s per shot"):
        plan_shots(1, 0)
    with pytest.raises(TccpError, match="no such truth file"):
        read_reel_truth(tmp_path / "film.mp4")
    reel_truth_path(tmp_path / "film.mp4").write_bytes(b"not a truth")
    with pytest.raises(TccpError, match="not the truth of a reel"):
        read_reel_truth(tmp_path / "film.mp4")
