"""Figures of constructed outputs: perfect, late, frozen, or from another clip."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.linalg import sqrtm
from tiny import SETTINGS

from tccp.config import SAMPLES_PER_FRAME
from tccp.evaluation.benchmark_clips import EvaluationClip, make_clip
from tccp.evaluation.face_probe import FaceReading
from tccp.evaluation.figures import (
    CLIP_FIGURES,
    ClipOutput,
    best_lag,
    blinks_per_s,
    border_step,
    clip_figures,
    consistency,
    corr_loss,
    correlation,
    drift_figures,
    flicker,
    frechet_distance,
    listener_slope,
    psnr,
    side_accuracy,
    silent_frames,
    silent_motion,
    ssim,
)
from tccp.landmarks import head_pose

FRAMES = 80


@pytest.fixture(scope="module")
def clip() -> EvaluationClip:
    """The addressee changes in it, so the head turns far; the talker speaks in its windows 1 and 10."""
    return make_clip(44, FRAMES, SETTINGS)


@pytest.fixture(scope="module")
def other() -> EvaluationClip:
    return make_clip(24, FRAMES, SETTINGS)


def reading_of(clip: EvaluationClip, identity: np.ndarray | None = None) -> FaceReading:
    """The reading of an error-free probe, on faces whose identity varies slightly."""
    truth, f = clip.truth, clip.num_frames
    if identity is None:
        angle = 0.3 * np.sin(np.arange(f))
        identity = np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)
    return FaceReading(truth.mouth_opening, truth.mouth_width, truth.yaw_deg, identity, np.zeros((f, 3), np.float32))


def output_of(clip: EvaluationClip) -> ClipOutput:
    return ClipOutput(clip.points, clip.faces, reading_of(clip), clip.scenes)


def frozen(output: ClipOutput) -> ClipOutput:
    """The output with its first frame repeated."""
    first = output.reading
    assert first is not None
    still = FaceReading(*(np.repeat(part[:1], len(part), axis=0) for part in vars(first).values()))
    hold = {name: np.repeat(part[:1], len(part), axis=0) for name, part in vars(output).items() if name != "reading"}
    return ClipOutput(reading=still, **hold)


def late(values: np.ndarray, frames: int) -> np.ndarray:
    return np.concatenate([np.repeat(values[:1], frames, axis=0), values[:-frames]])


def level(value: float, frames: int = 20, side: int = 8) -> np.ndarray:
    return np.full((frames, side, side, 3), value, np.uint8)


# -- a whole clip -----------------------------------------------------------------------------------------------------


def test_truth_is_perfect_in_every_figure(clip, other):
    truth = output_of(clip)
    figures = clip_figures(clip, truth, truth, other)
    assert tuple(figures) == CLIP_FIGURES
    for name in ("mouth_corr_landmarks", "width_corr_landmarks"):
        assert figures[name] > 0.99, name
    for name, perfect in {
        "mouth_corr_face": 1, "width_corr_face": 1, "amplitude_ratio": 1, "amplitude_ratio_face": 1,
        "lag_frames": 0, "lag_frames_face": 0, "yaw_mae_deg_landmarks": 0, "yaw_mae_deg_face": 0,
        "side_accuracy": 1, "side_accuracy_face": 1, "head_motion_ratio": 1, "head_motion_ratio_face": 1,
        "landmark_nme": 0, "unread_landmarks": 0, "blink_rate_gap": 0,
        "ssim": 1, "seam": 1, "consistency_gap": 0, "flicker_gap": 0,
    }.items():  # fmt: skip
        assert figures[name] == pytest.approx(perfect, abs=1e-6), name
    assert figures["psnr"] == pytest.approx(58.92, abs=0.01)
    assert figures["silent_motion"] < 0.1
    assert figures["silent_motion_face"] < 0.1
    assert figures["nod_stress_corr"] > 0.3
    assert np.isfinite(list(figures.values())).all()


def test_frozen_picture_scores_badly_on_motion_figures(clip, other):
    truth = output_of(clip)
    figures = clip_figures(clip, frozen(truth), truth, other)
    for of in ("landmarks", "face"):
        assert figures[f"mouth_corr_{of}"] == figures[f"width_corr_{of}"] == 0
        assert figures[f"yaw_mae_deg_{of}"] > 1
    for ending in ("", "_face"):
        assert figures[f"silent_motion{ending}"] == 1
        assert figures[f"amplitude_ratio{ending}"] == pytest.approx(0, abs=1e-6)
        assert figures[f"head_motion_ratio{ending}"] == pytest.approx(0, abs=1e-6)
        assert np.isnan(figures[f"lag_frames{ending}"])
    assert figures["nod_stress_corr"] == 0
    assert figures["blink_rate_gap"] < 0
    assert figures["flicker_gap"] == 1
    # Frozen frames have consistency 1, so the gap is 1 minus the consistency of the truth.
    assert truth.reading is not None
    assert figures["consistency_gap"] == pytest.approx(1 - consistency(truth.reading.identity), abs=1e-6)
    assert figures["consistency_gap"] > 0.03


def test_output_of_another_clip_correlates_only_with_that_clip(clip, other):
    """The output is the other clip, so the wrong-clip control finds a correlation of 1."""
    swapped = clip_figures(clip, output_of(other), output_of(clip), other)
    for of, ending in (("landmarks", ""), ("face", "_face")):
        assert abs(swapped[f"mouth_corr_{of}"]) < 0.35
        assert swapped[f"wrong_clip_corr{ending}"] > 0.99
    assert swapped["landmark_nme"] > 0.1
    assert swapped["psnr"] < 20
    assert swapped["ssim"] < 0.7


def test_lag_of_two_frames_is_measured(clip, other):
    truth = output_of(clip)
    assert truth.reading is not None
    moved = FaceReading(*(late(part, 2) for part in vars(truth.reading).values()))
    figures = clip_figures(clip, ClipOutput(late(clip.points, 2), late(clip.faces, 2), moved), truth, other)
    assert figures["lag_frames"] == figures["lag_frames_face"] == 2
    assert 0 < figures["mouth_corr_face"] < 0.9


def test_half_the_opening_gives_half_the_amplitude_ratio(clip, other):
    reading = replace(reading_of(clip), opening=(0.5 * clip.truth.mouth_opening).astype(np.float32))
    figures = clip_figures(clip, ClipOutput(reading=reading), output_of(clip), other)
    assert figures["amplitude_ratio_face"] == pytest.approx(0.5, abs=1e-5)
    assert figures["mouth_corr_face"] == pytest.approx(1)


def test_missing_outputs_have_no_figures(clip, other):
    truth = output_of(clip)
    nothing = clip_figures(clip, ClipOutput(), truth, other)
    assert np.isnan(list(nothing.values())).all()
    landmarks = clip_figures(clip, ClipOutput(points=clip.points), truth, other)
    of_faces = {name for name in CLIP_FIGURES if name.endswith("_face")} | {
        "psnr", "ssim", "seam", "consistency_gap", "flicker_gap",
    }  # fmt: skip
    assert {name for name, value in landmarks.items() if np.isnan(value)} == of_faces


def test_unread_landmarks_count_as_no_prediction(clip, other):
    truth = output_of(clip)
    lost = clip.points.copy()
    lost[::2] = np.nan
    figures = clip_figures(clip, ClipOutput(points=lost), truth, other)
    assert figures["unread_landmarks"] == 0.5
    assert figures["landmark_nme"] == 0
    assert 0.3 < figures["mouth_corr_landmarks"] < 0.9
    true_yaw = np.abs(clip_figures(clip, ClipOutput(np.full_like(lost, np.nan)), truth, other)["yaw_mae_deg_landmarks"])
    assert figures["yaw_mae_deg_landmarks"] == pytest.approx(true_yaw / 2, rel=0.1)
    assert figures["side_accuracy"] == pytest.approx(0.5, abs=0.1)
    blank = clip_figures(clip, ClipOutput(np.full_like(lost, np.nan)), truth, other)
    assert (blank["mouth_corr_landmarks"], blank["side_accuracy"], blank["unread_landmarks"]) == (0, 0, 1)
    assert np.isnan(blank["landmark_nme"])


def test_landmark_error_is_in_units_of_the_eye_distance(clip, other):
    off = head_pose(clip.points).scale[:, None].astype(np.float32) * 0.1
    moved = clip.points.copy()
    moved[..., 0] += off
    figures = clip_figures(clip, ClipOutput(points=moved), output_of(clip), other)
    assert figures["landmark_nme"] == pytest.approx(0.1, rel=1e-4)
    assert figures["yaw_mae_deg_landmarks"] == pytest.approx(0, abs=0.01)


# -- single figures ---------------------------------------------------------------------------------------------------


def test_correlation_of_constant_or_short_series():
    wave = np.sin(np.arange(40.0))
    assert correlation(2 - 3 * wave, wave) == pytest.approx(-1)
    assert correlation(np.ones(40), wave) == 0
    assert np.isnan(correlation(wave, np.ones(40)))
    assert np.isnan(correlation(wave[:2], wave[:2]))


@pytest.mark.parametrize("lag", range(-5, 6))
def test_lag_is_positive_for_late_output(lag):
    wave = np.random.default_rng(0).normal(size=60)
    assert best_lag(np.roll(wave, lag), wave) == lag


def test_silent_frames_have_a_closed_mouth_and_no_sound():
    opening = np.array([0, 0, 0.5, 0.5, 0, 0.02])
    sound = np.repeat([0.0, 0.5, 0.5, 0.0, 0.011, 0.009], SAMPLES_PER_FRAME).astype(np.float32)
    assert silent_frames(opening, sound).tolist() == [True, False, False, False, False, True]


def test_silent_motion_is_relative_to_motion_in_speech():
    silent = np.arange(12) < 6
    opening = np.array([0, 1, 0, 1, 0, 1, 0, 4, 0, 4, 0, 4]) / 10
    assert silent_motion(opening, silent) == pytest.approx(0.25)
    assert silent_motion(np.where(silent, 0.3, opening), silent) == 0
    assert silent_motion(np.full(12, 0.3), silent) == 1
    assert np.isnan(silent_motion(opening, np.zeros(12, bool)))


def test_side_accuracy_counts_only_frames_turned_to_the_listener():
    yaw = np.array([30, 30, -30, -30, 4, -20], np.float32)
    side = np.array([1, 1, -1, -1, 1, 1], np.int8)  # in the last frame the head has not yet turned to the new listener
    clip = make_clip(44, 6, SETTINGS)
    small = replace(clip, truth=replace(clip.truth, yaw_deg=yaw, listener_side=side))
    assert side_accuracy(yaw.astype(np.float64), small) == 1
    assert side_accuracy(np.array([1.0, -9, -1, 0, -50, -50]), small) == 0.5
    ahead = replace(small, truth=replace(small.truth, yaw_deg=yaw / 10))
    assert np.isnan(side_accuracy(yaw, ahead))


def test_each_blink_is_counted_once():
    eyes = np.full(50, 0.3)
    eyes[[10, 11, 12, 30]] = 0.05
    eyes[40] = np.nan
    assert blinks_per_s(eyes) == pytest.approx(2 / 2.0)
    assert blinks_per_s(np.full(50, np.nan)) == 0


def test_listener_slope():
    true = np.array([-50.0, -20, 20, 50])
    assert listener_slope(0.7 * true + 4, true) == pytest.approx(0.7)
    assert listener_slope(np.full(4, 12.0), true) == pytest.approx(0)
    assert np.isnan(listener_slope(true, np.ones(4)))


def test_psnr_and_ssim_of_known_pictures():
    assert psnr(level(110), level(100)) == pytest.approx(20 * np.log10(25.5))
    noise = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    assert ssim(noise, noise) == 1
    assert abs(ssim(noise, noise[:, ::-1].copy())) < 0.2


def test_border_step_is_measured_only_at_the_border():
    boxes = np.array([[4, 4, 12, 12]], np.float32)
    scene = level(50, 1, 16)
    scene[0, 4:12, 4:12] = 57
    assert border_step(scene, boxes) == pytest.approx(7)
    scene[0, 6:10, 6:10] = 255
    scene[0, 0] = 255
    assert border_step(scene, boxes) == pytest.approx(7)
    # A box that extends beyond the picture is measured only at borders inside the picture.
    assert border_step(scene[:, :12, :12], boxes) == pytest.approx(7)


def test_a_pasted_patch_has_a_seam(clip, other):
    pasted = clip.scenes.copy()
    for scene, box in zip(pasted, clip.truth.head_box.astype(int), strict=True):
        scene[box[1] : box[3], box[0] : box[2]] = 255
    assert clip_figures(clip, ClipOutput(scenes=pasted), output_of(clip), other)["seam"] > 2


def test_flicker_ignores_constant_and_steadily_changing_pictures():
    assert flicker(level(9)) == 0
    rising = np.arange(20, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8)
    assert flicker(rising) == 0
    alternating = level(100)
    alternating[::2] += 6
    assert flicker(alternating) == pytest.approx(np.sqrt(12**2 / 6))
    noise = np.random.default_rng(0).normal(100, 5, (400, 8, 8, 3)).round().astype(np.uint8)
    assert flicker(noise) == pytest.approx(5, rel=0.03)


def test_excess_flicker_gives_a_gap(clip, other):
    double = np.clip(clip.faces.astype(int) * 2 - clip.faces.mean(0), 0, 255).astype(np.uint8)
    gap = clip_figures(clip, ClipOutput(faces=double), output_of(clip), other)["flicker_gap"]
    assert gap > 0.5


def test_consistency_is_the_mean_cosine_of_all_pairs():
    vectors = np.random.default_rng(0).normal(size=(7, 5))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    assert consistency(vectors) == pytest.approx((vectors @ vectors.T).mean())


def test_frechet_distance_matches_the_matrix_square_root():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(300, 6)) @ rng.normal(size=(6, 6)), rng.normal(1, 2, (200, 6))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, a + 3) == pytest.approx(6 * 9)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * sqrtm(cov_a @ cov_b).real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    # With fewer rows than features, the covariance is rank-deficient.
    assert np.isfinite(frechet_distance(a[:3], b[:4]))


# -- drift ------------------------------------------------------------------------------------------------------------


def test_truth_does_not_drift(clip):
    drift = drift_figures(clip, output_of(clip), output_of(clip), later=(10, 50))
    for name in ("drift_10", "drift_10_yaw_deg", "drift_10_yaw_deg_face", "drift_10_colour"):
        assert drift.figures[name] == pytest.approx(0, abs=1e-6), name
        assert np.isnan(drift.figures[name.replace("10", "50")]), "a clip of 80 frames has no window 50"
    assert drift.mouth[10].shape == drift.mouth_face[10].shape == (2, 2, 7)
    assert drift.mouth[50].shape == (2, 2, 0)
    np.testing.assert_allclose(drift.mouth_face[10][:, 0], clip.truth.mouth_opening[[range(1, 8), range(64, 71)]])
    assert corr_loss([drift.mouth_face[10], drift.mouth_face[10]]) == pytest.approx(0)


def test_drift_is_measured_in_the_unit_of_each_figure(clip):
    """Brightness and yaw error grow over the clip; the mouth is correct in window 1 and inverted in window 10."""
    truth = clip.truth
    brighter = np.clip(np.linspace(0, 40, FRAMES), 0, 40)[:, None, None, None]
    grey = replace(clip, faces=np.full_like(clip.faces, 100))
    faces = np.clip(grey.faces + brighter, 0, 255).astype(np.uint8)
    yaw = truth.yaw_deg + np.where(np.arange(FRAMES) < 40, 2, 9).astype(np.float32)
    opening = np.where(np.arange(FRAMES) < 40, truth.mouth_opening, 1 - truth.mouth_opening).astype(np.float32)
    output = ClipOutput(faces=faces, reading=replace(reading_of(clip), yaw_deg=yaw, opening=opening))
    drift = drift_figures(grey, output, ClipOutput(faces=grey.faces), later=(10,))
    first, last = faces[1:8].astype(float) - 100, faces[64:71].astype(float) - 100
    assert drift.figures["drift_10"] == pytest.approx(10 * np.log10((last**2).mean() / (first**2).mean()))
    assert drift.figures["drift_10_colour"] == pytest.approx((last.mean() - first.mean()) / 2.55)
    assert drift.figures["drift_10_yaw_deg_face"] == pytest.approx(7, abs=1e-4)
    assert np.isnan(drift.figures["drift_10_yaw_deg"])
    assert drift.mouth[10].shape == (2, 2, 0)
    assert corr_loss([drift.mouth_face[10]]) == pytest.approx(2)
    # If the truth brightens equally, there is no colour drift.
    alike = drift_figures(grey, output, ClipOutput(faces=faces), later=(10,))
    assert alike.figures["drift_10_colour"] == 0


def test_drift_windows_contain_only_their_new_frames(clip):
    drift = drift_figures(clip, output_of(clip), output_of(clip), window=4, later=(2,))
    np.testing.assert_allclose(drift.mouth_face[2][:, 1], clip.truth.mouth_opening[[range(1, 4), range(4, 7)]])


def test_correlations_are_pooled_over_clips():
    rng = np.random.default_rng(0)
    true = rng.uniform(size=(40, 7))
    good, bad = true + rng.normal(0, 0.05, true.shape), true + rng.normal(0, 0.5, true.shape)
    openings = [np.stack([[g, t], [b, t]]) for g, b, t in zip(good, bad, true, strict=True)]
    expected = np.corrcoef(good.ravel(), true.ravel())[0, 1] - np.corrcoef(bad.ravel(), true.ravel())[0, 1]
    assert corr_loss([*openings, np.empty((2, 2, 0))]) == pytest.approx(expected)
