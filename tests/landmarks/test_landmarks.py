"""Landmark pictures are read back as points; mouth measures do not depend on head pose."""

from __future__ import annotations

import time

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tccp import landmarks
from tccp.errors import TccpError
from tccp.landmarks import GROUPS, LAYERS, MEAN_FACE, MIRROR, draw, read


def rotation(yaw_deg: float, pitch_deg: float = 0.0, roll_deg: float = 0.0) -> np.ndarray:
    """Positive as in the product: nose to the picture's right, nose down, clockwise."""
    yaw, pitch, roll = np.radians([yaw_deg, pitch_deg, roll_deg])
    turn = np.array([[np.cos(yaw), 0, -np.sin(yaw)], [0, 1, 0], [np.sin(yaw), 0, np.cos(yaw)]])
    nod = np.array([[1, 0, 0], [0, np.cos(pitch), -np.sin(pitch)], [0, np.sin(pitch), np.cos(pitch)]])
    lean = np.array([[np.cos(roll), -np.sin(roll), 0], [np.sin(roll), np.cos(roll), 0], [0, 0, 1]])
    return lean @ nod @ turn


def shaped_face(rng: np.random.Generator, opening: float, width: float = 1.0, closed_eyes: bool = False) -> np.ndarray:
    """A 3D face of random shape: proportions, symmetric detail, brows, mouth, eyelids."""
    face = MEAN_FACE * (1 + rng.normal(0, 0.06, 3))
    detail = rng.normal(0, 0.012, (68, 3))
    face = face + (detail + detail[MIRROR] * (-1, 1, 1)) / 2
    face[[65, 66, 67, 55, 56, 57, 58, 59], 1] += opening
    face[[60, 64, 48, 54], 1] += 0.35 * opening
    face[5:12, 1] += 0.7 * opening * np.array([0.3, 0.6, 0.9, 1, 0.9, 0.6, 0.3])
    face[48:68, 0] *= width
    face[17:27, 1] -= rng.uniform(-0.06, 0.1)
    if closed_eyes:
        for upper, lower in ((37, 41), (38, 40), (43, 47), (44, 46)):
            face[[upper, lower], 1] = face[[upper, lower], 1].mean()
    return face


def random_faces(count: int, max_yaw_deg: float = 40, seed: int = 0) -> np.ndarray:
    """Faces as in head-box crops: turned, speaking, blinking, off centre, of several sizes."""
    rng = np.random.default_rng(seed)
    faces = []
    for _ in range(count):
        face = shaped_face(rng, 0.45 * rng.uniform() ** 1.5, 1 + rng.normal(0, 0.1), rng.uniform() < 0.15)
        turn = rotation(rng.uniform(-max_yaw_deg, max_yaw_deg), rng.uniform(-15, 15), rng.uniform(-15, 15))
        flat = ((face - (0, 0.3, 0.6)) @ turn.T)[:, :2]
        faces.append(flat / (3.7 * rng.uniform(0.93, 1.08)) + 0.5 + rng.uniform(-0.05, 0.05, 2))
    return np.array(faces)


def blurred(pictures: np.ndarray, sigma_px: float, noise: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(7)
    soft = np.stack([cv2.GaussianBlur(picture, (0, 0), sigma_px) for picture in pictures]).astype(float)
    return np.clip(soft + rng.normal(0, noise, soft.shape) if noise else soft, 0, 255).astype(np.uint8)


def compressed(pictures: np.ndarray, quality: int = 85) -> np.ndarray:
    encoded = [cv2.imencode(".jpg", p, [cv2.IMWRITE_JPEG_QUALITY, quality])[1] for p in pictures]
    return np.stack([np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR)) for data in encoded])


def errors_percent(read_points: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Distance of each point in % of the face's height (brows to chin)."""
    height = np.ptp(truth[:, :, 1], axis=1)[:, None]
    return 100 * np.linalg.norm(read_points - truth, axis=-1) / height


# ---- drawing


def test_groups_partition_the_68_points_and_each_is_in_one_layer():
    assert [i for group in GROUPS.values() for i in group] == list(range(68))
    assert sorted(name for layer in LAYERS for name in layer) == sorted(GROUPS)


def test_mean_face_is_its_own_mirror_image():
    np.testing.assert_allclose(MEAN_FACE[MIRROR] * (-1, 1, 1), MEAN_FACE)
    assert np.linalg.norm(MEAN_FACE[45] - MEAN_FACE[36]) == pytest.approx(1)


@pytest.mark.parametrize("size_px", [32, 64, 96, 128, 256])
def test_strokes_have_the_stated_width_and_place(size_px):
    """The profile across a straight horizontal jaw is stroke_px wide and centred on the points."""
    points = np.full((1, 68, 2), -1.0)
    points[0, :17] = np.stack([np.linspace(0.1, 0.9, 17), np.full(17, 0.4321)], 1)
    profile = draw(points, size_px)[0, :, size_px // 2, 2].astype(float) / 255
    assert profile.sum() == pytest.approx(landmarks.stroke_px(size_px), rel=0.02)
    center = (profile * (np.arange(size_px) + 0.5)).sum() / profile.sum()
    # The supersampled grid, four or two per pixel, is the finest step.
    assert abs(center - 0.4321 * size_px) < 0.3


def test_drawing_is_clipped_at_the_border_and_absent_faces_are_black():
    faces = random_faces(3)
    faces[0] += 0.5
    faces[1, 30] = np.nan
    faces[2] *= 1e6
    pictures = draw(faces, 64)
    assert pictures[0].any()
    assert not pictures[1].any()
    assert pictures.dtype == np.uint8


def test_opening_the_mouth_only_adds_green_and_red():
    shut, ajar = (shaped_face(np.random.default_rng(3), o)[None, :, :2] / 3.7 + 0.45 for o in (0.0, 0.05))
    ajar[:, :17] = shut[:, :17]
    difference = draw(ajar, 64).astype(int).sum((0, 1, 2)) - draw(shut, 64).astype(int).sum((0, 1, 2))
    assert difference[1] > 255
    assert difference[2] == 0


def test_too_small_a_picture_is_refused():
    with pytest.raises(TccpError, match="at least 16 px"):
        draw(random_faces(1), 8)


def test_drawing_is_fast():
    faces = np.repeat(random_faces(50), 4, 0)
    draw(faces[:10], 64)
    start = time.process_time()
    draw(faces, 64)
    assert len(faces) / (time.process_time() - start) > 1000


# ---- reading

# Size, disturbance, largest mean error in % of face height, smallest correlation of the mouth's opening with the truth.
CASES = [
    pytest.param(64, lambda p: p, 1.5, 0.995, id="64-clean"),
    pytest.param(64, lambda p: blurred(p, 0.8), 1.6, 0.99, id="64-blur"),
    pytest.param(64, lambda p: blurred(p, 0.8, noise=8), 1.8, 0.99, id="64-blur-noise"),
    pytest.param(256, lambda p: p, 1.4, 0.995, id="256-clean"),
    pytest.param(256, lambda p: blurred(p, 3.2), 1.6, 0.99, id="256-blur"),
    pytest.param(256, lambda p: blurred(p, 2.0, noise=8), 1.6, 0.99, id="256-blur-noise"),
    pytest.param(256, compressed, 1.6, 0.99, id="256-jpeg"),
]


@pytest.mark.parametrize(("size_px", "degrade", "mean_error", "correlation"), CASES)
def test_points_are_read_back(size_px, degrade, mean_error, correlation):
    truth = random_faces(60)
    points, confidence = read(degrade(draw(truth, size_px)))
    errors = errors_percent(points, truth)
    assert errors.mean() < mean_error
    assert np.median(errors) < 1.0  # jaw spacing, which the drawing does not mark, raises the mean
    assert np.percentile(errors.mean(1), 95) < 3
    assert confidence.min() > 0.85
    opening = np.corrcoef(landmarks.mouth_opening(truth), landmarks.mouth_opening(points))[0, 1]
    assert opening > correlation
    yaw = np.abs(landmarks.yaw_deg(truth) - landmarks.yaw_deg(points))
    assert yaw.mean() < 2


def test_mouth_follows_speech_in_one_face_under_blur():
    """Opening and width of one speaker's mouth, which measure sync, are read from blurred 64 px pictures."""
    frames = np.arange(60)
    opening = 0.15 + 0.13 * np.sin(frames / 3)
    width = 1 + 0.15 * np.cos(frames / 5)
    truth = np.array(
        [
            (shaped_face(np.random.default_rng(5), o, w) @ rotation(20).T)[:, :2] / 3.7 + (0.5, 0.42)
            for o, w in zip(opening, width, strict=True)
        ]
    )
    points, _ = read(blurred(draw(truth, 64), 0.8, noise=5))
    assert np.corrcoef(landmarks.mouth_opening(points), opening)[0, 1] > 0.99
    assert np.corrcoef(landmarks.mouth_width(points), width)[0, 1] > 0.97


def test_heads_at_large_yaw_are_read_back():
    truth = random_faces(60, max_yaw_deg=58, seed=2)
    points, _ = read(blurred(draw(truth, 64), 0.6))
    assert errors_percent(points, truth).mean() < 2
    assert np.corrcoef(landmarks.mouth_opening(truth), landmarks.mouth_opening(points))[0, 1] > 0.97


def test_reading_and_drawing_again_changes_little():
    """`redraw_landmarks` relies on this: drawing the read points reproduces the picture."""
    pictures = draw(random_faces(30), 64)
    again = draw(read(pictures)[0], 64)
    assert np.abs(again.astype(int) - pictures).mean() < 2.5
    assert np.abs(again.astype(int) - pictures).mean() < 0.25 * pictures.mean()


@pytest.mark.parametrize("missing", list(GROUPS))
def test_confidence_falls_when_a_group_is_missing(missing):
    truth = random_faces(12)
    whole, lacking = draw(truth, 64), truth.copy()
    lacking[:, GROUPS[missing]] = -2
    points, confidence = read(draw(lacking, 64))
    assert (confidence < read(whole)[1] - 0.08).all()
    others = [i for name, group in GROUPS.items() if name not in (missing, "jaw", "outer_lip") for i in group]
    assert np.median(errors_percent(points, truth)[:, others]) < 1.5
    assert np.isfinite(points).all()


def test_confidence_falls_with_noise():
    pictures = draw(random_faces(20), 64)
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 255, pictures.shape, np.uint8)
    mixes = [((1 - share) * pictures + share * noise).astype(np.uint8) for share in (0, 0.15, 0.3, 1)]
    clean, good, doubtful, none = (read(mix)[1] for mix in mixes)
    assert clean.min() > 0.95
    assert clean.min() > good.max() > good.min() > doubtful.max() > doubtful.min() > none.max()
    assert none.max() < 0.4


def test_black_picture_gives_nan_points_and_zero_confidence():
    points, confidence = read(np.zeros((2, 64, 64, 3), np.uint8))
    assert np.isnan(points).all()
    assert (confidence == 0).all()


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1), st.sampled_from([32, 64, 128]))
def test_reading_never_fails(seed, size_px):
    """Inputs as a sampler may produce: noise, blobs, single dots."""
    rng = np.random.default_rng(seed)
    kinds = rng.normal(128, 80, (3, size_px, size_px, 3))
    kinds[1] = cv2.GaussianBlur(kinds[1], (0, 0), 4) * 1.5
    kinds[2] = 0
    kinds[2, tuple(rng.integers(0, size_px, (2, 6)))] = 255
    points, confidence = read(np.clip(kinds, 0, 255).astype(np.uint8))
    assert ((confidence >= 0) & (confidence <= 1)).all()
    assert (np.isfinite(points).all((1, 2)) | (confidence == 0)).all()


# ---- geometry


@pytest.mark.parametrize(("yaw", "pitch", "roll"), [(0, 0, 0), (35, 0, 0), (-35, 10, -20), (10, -15, 30), (55, 5, 5)])
def test_pose_of_the_mean_face_is_exact(yaw, pitch, roll):
    points = ((MEAN_FACE @ rotation(yaw, pitch, roll).T)[:, :2] * 80 + (200, 100))[None]
    pose = landmarks.head_pose(points)
    assert pose.scale[0] == pytest.approx(80)
    np.testing.assert_allclose(pose.rotation[0], rotation(yaw, pitch, roll), atol=1e-9)
    assert pose.yaw_deg[0] == pytest.approx(
        np.degrees(np.arctan2(-rotation(yaw, pitch, roll)[0, 2], rotation(yaw, pitch, roll)[2, 2]))
    )
    np.testing.assert_allclose(pose.project(MEAN_FACE[8])[0], points[0, 8], atol=1e-6)


def test_pose_signs_match_the_picture():
    """Nose right, nose down and clockwise roll are positive, as checked in the picture itself."""
    nose, eyes = 30, (36, 45)
    for yaw, pitch, roll in ((20, 0, 0), (0, 20, 0), (0, 0, 20)):
        points = (MEAN_FACE @ rotation(yaw, pitch, roll).T)[:, :2][None]
        pose = landmarks.head_pose(points)
        middle = points[0, list(eyes)].mean(0)
        rest = MEAN_FACE[nose, :2]
        if yaw:
            assert points[0, nose, 0] > middle[0] + 0.1
            assert pose.yaw_deg[0] == pytest.approx(20)
        if pitch:
            assert points[0, nose, 1] - middle[1] > rest[1] + 0.1
            assert pose.pitch_deg[0] == pytest.approx(20)
        if roll:
            assert points[0, 45, 1] > points[0, 36, 1]  # the picture's right eye is lower
            assert pose.roll_deg[0] == pytest.approx(20)


def test_mouth_measures_do_not_depend_on_head_pose():
    rng = np.random.default_rng(1)
    for _ in range(20):
        face = MEAN_FACE.copy()
        opening, width = rng.uniform(0, 0.4), rng.uniform(0.8, 1.2)
        face[[65, 66, 67], 1] += opening
        face[48:68, 0] *= width
        turn = rotation(rng.uniform(-30, 30), rng.uniform(-12, 12), rng.uniform(-20, 20))
        points = ((face @ turn.T)[:, :2] * rng.uniform(10, 300) + rng.uniform(0, 500, 2))[None]
        assert landmarks.mouth_opening(points)[0] == pytest.approx(0.035 + opening, abs=0.02)
        assert landmarks.mouth_width(points)[0] == pytest.approx(0.56 * width, abs=0.02)


@given(st.floats(-180, 180), st.floats(0.1, 50), st.floats(-300, 300), st.floats(-300, 300))
def test_normalised_points_do_not_depend_on_position_size_and_roll(roll, scale, x, y):
    points = random_faces(2, seed=4) - 0.5
    expected = landmarks.normalise(points)
    moved = points @ rotation(0, 0, roll)[:2, :2].T * scale + (x, y)
    np.testing.assert_allclose(landmarks.normalise(moved), expected, atol=1e-6)
    eyes = expected[:, 36:48].reshape(2, 2, 6, 2)[:, :, [0, 3]].mean(2)
    np.testing.assert_allclose(eyes.mean(1), 0, atol=1e-6)
    np.testing.assert_allclose(eyes[:, 0, 1], eyes[:, 1, 1], atol=1e-6)


def test_smoothing_removes_jitter_and_keeps_speech():
    frames = np.arange(100)
    truth = np.repeat(shaped_face(np.random.default_rng(0), 0.1)[None, :, :2] * 80 + 200, len(frames), 0)
    truth += np.stack([40 * np.sin(frames / 20), 10 * np.cos(frames / 25)], 1)[:, None]
    truth[:, [65, 66, 67], 1] += (8 * np.sin(2 * np.pi * 5 * frames / 25))[:, None]  # 5 Hz
    noisy = truth + np.random.default_rng(1).normal(0, 1.5, (len(frames), 1, 2))  # jitter of the detector's box
    smoothed = landmarks.smooth(noisy)
    assert np.abs(smoothed - truth).mean() < 0.6 * np.abs(noisy - truth).mean()
    gain = np.std(landmarks.mouth_opening(landmarks.smooth(truth))) / np.std(landmarks.mouth_opening(truth))
    assert gain > 0.75


def test_smoothing_keeps_linear_motion_and_gaps():
    points = np.linspace(0, 50, 30)[:, None, None] + MEAN_FACE[:, :2] * 40
    np.testing.assert_allclose(landmarks.smooth(points), points, atol=1e-6)
    points[10:14] = np.nan
    smoothed = landmarks.smooth(points)
    assert np.isnan(smoothed[10:14]).all()
    assert np.isfinite(np.delete(smoothed, np.s_[10:14], 0)).all()


def test_measures_of_absent_faces_are_nan():
    points = random_faces(3)
    points[1] = np.nan
    for measure in (landmarks.yaw_deg, landmarks.mouth_opening, landmarks.mouth_width):
        assert np.isnan(measure(points)).tolist() == [False, True, False]
