"""Head boxes must leak nothing, crops must be exact, and pasting must leave no seam and change nothing else."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jaxtyping import Float, UInt8
from sklearn.ensemble import RandomForestRegressor
from sklearn.model_selection import GroupKFold, cross_val_predict

from tccp import headbox
from tccp.config import HeadBoxSettings
from tccp.errors import TccpError
from tccp.landmarks import MEAN_FACE, MIRROR
from tccp.roundtable import synthesise


def rotation(yaw_deg: np.ndarray, pitch_deg: np.ndarray) -> np.ndarray:
    yaw, pitch = np.radians(yaw_deg), np.radians(pitch_deg)
    zero, one = np.zeros_like(yaw), np.ones_like(yaw)
    turn = np.stack([np.cos(yaw), zero, -np.sin(yaw), zero, one, zero, np.sin(yaw), zero, np.cos(yaw)], -1)
    nod = np.stack([one, zero, zero, zero, np.cos(pitch), -np.sin(pitch), zero, np.sin(pitch), np.cos(pitch)], -1)
    return nod.reshape(-1, 3, 3) @ turn.reshape(-1, 3, 3)


def talking_shot(rng: np.random.Generator, frames: int = 60) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """68 points in pixels, yaw and mouth opening of a random face that turns, nods, sways and speaks."""
    face = MEAN_FACE * (1 + rng.normal(0, 0.05, 3))
    detail = rng.normal(0, 0.012, (68, 3))
    face = face + (detail + detail[MIRROR] * (-1, 1, 1)) / 2
    time = np.arange(frames) / 25
    yaw = np.clip(
        rng.normal(0, 25) + rng.choice([0.0, 25.0]) * np.sin(time * rng.uniform(1, 4) + rng.uniform(0, 6)), -55, 55
    )
    pitch = 5 * np.sin(time * 5 + rng.uniform(0, 6))
    opening = np.abs(np.sin(time * rng.uniform(8, 14) + rng.uniform(0, 6))) * rng.uniform(0, 0.4)
    shapes = np.repeat(face[None], frames, 0)
    shapes[:, [65, 66, 67, 55, 56, 57, 58, 59], 1] += opening[:, None]
    shapes[:, 5:12, 1] += 0.7 * opening[:, None]
    pivot = np.array([0, 0.4, rng.normal(0.75, 0.1)])
    sway = np.cumsum(np.cumsum(rng.normal(0, 2e-4, (frames, 2)), 0), 0)
    turned = np.einsum("fij,fpj->fpi", rotation(yaw, pitch), shapes - pivot)[..., :2] + sway[:, None]
    points = turned * rng.uniform(40, 70) + rng.uniform((250, 200), (900, 500))
    return points + rng.normal(0, 0.3, points.shape), yaw, opening


def probe_gain(boxes: list[np.ndarray], targets: list[np.ndarray]) -> float:
    """The share of the mean predictor's error that a forest on the box geometry removes, on held-out clips."""
    features = []
    for clip in boxes:
        center, side = (clip[:, :2] + clip[:, 2:]) / 2, clip[:, 2:3] - clip[:, :1]
        within = center - center.mean(0)
        features.append(np.concatenate([center, side, within, within / side, np.gradient(center, axis=0)], 1))
    clips = np.repeat(np.arange(len(boxes)), [len(clip) for clip in boxes])
    target = np.concatenate(targets)
    forest = RandomForestRegressor(60, min_samples_leaf=20, random_state=0)
    guess = cross_val_predict(forest, np.concatenate(features), target, groups=clips, cv=GroupKFold(5))
    return 1 - float(np.abs(guess - target).mean() / np.abs(target - np.mean(target)).mean())


def naive_boxes(points: np.ndarray) -> np.ndarray:
    """Boxes around the points of each frame, like a detector's."""
    low, high = points.min(1), points.max(1)
    center, side = (low + high) / 2, (high - low).max(1, keepdims=True) * 1.6
    return np.concatenate([center - side / 2, center + side / 2], 1)


# ---- head boxes


def test_box_geometry_predicts_yaw_and_mouth_no_better_than_the_mean():
    rng = np.random.default_rng(0)
    shots = [talking_shot(rng) for _ in range(40)]
    boxes = [headbox.head_boxes(points) for points, _, _ in shots]
    yaw, opening = [shot[1] for shot in shots], [shot[2] for shot in shots]
    assert probe_gain(boxes, yaw) < 0.03
    assert probe_gain(boxes, [np.abs(y) for y in yaw]) < 0.03
    assert probe_gain(boxes, opening) < 0.03
    # Control: the same probe does find the opening from a box that follows the face.
    leaking = [naive_boxes(points) for points, _, _ in shots]
    assert probe_gain(leaking, opening) > 0.1


def test_box_does_not_follow_the_turning_head_within_a_shot():
    rng = np.random.default_rng(3)
    for _ in range(10):
        points, yaw, _ = talking_shot(rng, frames=100)
        boxes, naive = headbox.head_boxes(points), naive_boxes(points)
        if np.std(yaw) < 5:
            continue
        scale = boxes[0, 2] - boxes[0, 0]
        slope = [abs(np.polyfit(yaw, b[:, 0] / scale, 1)[0]) * np.ptp(yaw) for b in (boxes, naive)]
        assert slope[0] < 0.03  # shift over the whole turn, in units of the box's side
        assert slope[0] < 0.3 * slope[1]


def test_boxes_of_roundtable_landmarks_leak_nothing():
    clips = [synthesise(seed, 2) for seed in range(40)]
    boxes = [headbox.head_boxes(clip.landmarks_px) for clip in clips]
    assert probe_gain(boxes, [clip.yaw_deg for clip in clips]) < 0.05
    assert probe_gain(boxes, [clip.mouth_opening for clip in clips]) < 0.05


def test_box_is_a_steady_integer_square_of_constant_size():
    rng = np.random.default_rng(1)
    for _ in range(10):
        points, _, _ = talking_shot(rng)
        boxes = headbox.head_boxes(points)
        np.testing.assert_array_equal(boxes, np.rint(boxes))
        sides = boxes[:, 2:] - boxes[:, :2]
        assert len(np.unique(sides)) == 1
        assert np.abs(np.diff(boxes[:, :2], axis=0)).max() <= 2
        path_length = np.abs(np.diff(boxes[:, :2], axis=0)).sum(0)
        travel = np.abs(boxes[-1, :2] - boxes[0, :2])
        assert (path_length <= travel + 0.1 * sides[0, 0] + 4).all()  # no trembling


def test_box_contains_hair_neck_and_collar():
    points = np.repeat((MEAN_FACE[:, :2] * 100 + 500)[None], 10, 0)
    box = headbox.head_boxes(points)[0]
    brows, chin, face = points[0, 17:27, 1].min(), points[0, 8, 1], 160
    assert box[1] < brows - 0.8 * face
    assert box[3] > chin + 0.5 * face
    assert box[0] < points[0, :, 0].min() - 0.5 * face
    assert (box[2] - box[0]) == pytest.approx(headbox.SIDE * 100, abs=1)


def test_box_follows_a_walking_person():
    rng = np.random.default_rng(2)
    points, _, _ = talking_shot(rng, 150)
    walking = points + np.linspace(0, 600, 150)[:, None, None] * (1, 0)
    moved = headbox.head_boxes(walking)
    assert moved[-1, 0] - moved[0, 0] == pytest.approx(600, rel=0.1)


def test_frames_without_a_face_are_interpolated():
    points, _, _ = talking_shot(np.random.default_rng(4))
    whole = headbox.head_boxes(points)
    gap = points.copy()
    gap[20:35] = np.nan
    gap[:3] = np.nan
    np.testing.assert_allclose(headbox.head_boxes(gap), whole, atol=4)
    confidence = np.isfinite(gap).all((1, 2)).astype(np.float32)
    np.testing.assert_array_equal(headbox.head_boxes(points, confidence), headbox.head_boxes(gap))


def test_a_shot_without_any_face_is_refused():
    with pytest.raises(TccpError, match="no face in any of the 5 frames"):
        headbox.head_boxes(np.full((5, 68, 2), np.nan))


def test_a_single_frame_has_a_box():
    assert headbox.head_boxes((MEAN_FACE[:, :2] * 30 + 100)[None]).shape == (1, 4)


# ---- size


def zoomed(points: np.ndarray, factor: float) -> np.ndarray:
    """The points of a shot in which the camera zooms towards a point of the picture, between two still parts."""
    frames = len(points)
    zoom = factor ** np.interp(np.arange(frames), (0.2 * frames, 0.8 * frames), (0, 1))
    return (points - (300, 200)) * zoom[:, None, None] + (300, 200)


def relative_sides(boxes: np.ndarray, points: np.ndarray, factor: float) -> np.ndarray:
    """Sides of the boxes of a zoomed shot, in units of those that the shot without the zoom has."""
    unzoomed = headbox.head_boxes(points)
    growth = zoomed(np.array([[[301.0, 200.0]]] * len(points)), factor)[:, 0, 0] - 300
    return (boxes[:, 2] - boxes[:, 0]) / (unzoomed[0, 2] - unzoomed[0, 0]) / growth


@pytest.mark.parametrize("factor", [2.0, 0.5, 1.3])
def test_box_follows_a_zoom(factor):
    """One size per shot would be off by 41 % at the ends of a zoom by a factor of 2."""
    rng = np.random.default_rng(7)
    shots = [talking_shot(rng, 150)[0] for _ in range(8)] + [synthesise(seed, 5).landmarks_px for seed in range(8)]
    for points in shots:
        boxes = headbox.head_boxes(zoomed(points, factor))
        assert np.abs(relative_sides(boxes, points, factor) - 1).max() < 0.1
        np.testing.assert_array_equal(boxes, np.rint(boxes))
        side = boxes[:, 2] - boxes[:, 0]
        np.testing.assert_array_equal(side, boxes[:, 3] - boxes[:, 1])
        assert np.abs(np.diff(side)).max() <= 0.03 * side.max()
        # It also stays on the head: the eyes are where they are without the zoom.
        eyes = (zoomed(points, factor)[:, 36:48].mean(1) - boxes[:, :2]) / side[:, None]
        unzoomed = headbox.head_boxes(points)
        before = (points[:, 36:48].mean(1) - unzoomed[:, :2]) / (unzoomed[:, 2:] - unzoomed[:, :2])
        assert np.abs(eyes - before).max() < 0.12


def test_box_grows_while_a_person_walks_to_the_camera():
    """Ten seconds, from far away to three times the size, with two gaps."""
    points, _, _ = talking_shot(np.random.default_rng(11), 250)
    centre = points.mean((0, 1))
    growth = np.linspace(1, 3, 250)
    near = (points - centre) * growth[:, None, None] + centre
    near[60:72] = near[150:160] = np.nan
    side = np.ptp(headbox.head_boxes(near)[:, ::2], axis=1)
    still = np.ptp(headbox.head_boxes(points)[0, ::2])
    assert np.abs(side / (still * growth) - 1).max() < 0.08


def test_size_does_not_follow_the_mouth_nods_or_turns():
    """Each of them alone, slow or fast, on a face that is not the mean face."""
    rng, time = np.random.default_rng(5), np.arange(200) / 25
    for period_s in (0.3, 1, 4, 16):
        wave = np.sin(2 * np.pi * time / period_s)
        for yaw, pitch, opening in ((55, 0, 0), (0, 25, 0), (0, 0, 0.5), (50, 15, 0.4)):
            face = MEAN_FACE * (1 + rng.normal(0, 0.05, 3))
            shapes = np.repeat(face[None], len(time), 0)
            shapes[:, [65, 66, 67, 55, 56, 57, 58, 59], 1] += opening * np.abs(wave)[:, None]
            shapes[:, 5:12, 1] += 0.7 * opening * np.abs(wave)[:, None]
            pivot = np.array([0, 0.4, 0.75])
            turned = np.einsum("fij,fpj->fpi", rotation(yaw * wave, pitch * wave), shapes - pivot)[..., :2]
            boxes = headbox.head_boxes(turned * 60 + 300)
            assert len(np.unique(boxes[:, 2] - boxes[:, 0])) == 1


def test_boxes_of_a_zoom_predict_yaw_and_mouth_no_better_than_the_mean():
    rng = np.random.default_rng(0)
    shots = [talking_shot(rng) for _ in range(40)]
    boxes = [headbox.head_boxes(zoomed(points, rng.choice([0.5, 0.7, 1.5, 2]))) for points, _, _ in shots]
    assert all(len(np.unique(clip[:, 2] - clip[:, 0])) > 5 for clip in boxes)
    yaw, opening = [shot[1] for shot in shots], [shot[2] for shot in shots]
    assert probe_gain(boxes, yaw) < 0.05
    assert probe_gain(boxes, [np.abs(y) for y in yaw]) < 0.05
    assert probe_gain(boxes, opening) < 0.05


def test_a_few_wrong_sizes_do_not_move_the_box():
    sizes = np.full(100, 50.0)
    sizes[[0, 3, 99]], sizes[40:50], sizes[70:80] = 150, 90, np.nan
    np.testing.assert_array_equal(headbox.steady_size(sizes), np.full(100, 50.0))


# ---- jitter


@given(st.integers(0, 2**31))
def test_jitter_is_constant_within_a_shot_and_bounded(seed):
    boxes = headbox.head_boxes(talking_shot(np.random.default_rng(5))[0])
    limits = HeadBoxSettings(jitter_center=0.06, jitter_size=0.1)
    moved = headbox.jitter(boxes, limits, np.random.default_rng(seed))
    np.testing.assert_array_equal(moved, headbox.jitter(boxes, limits, np.random.default_rng(seed)))
    np.testing.assert_array_equal(moved, np.rint(moved))
    side, new_side = boxes[0, 2] - boxes[0, 0], moved[:, 2] - moved[:, 0]
    assert len(np.unique(new_side)) == 1
    assert abs(new_side[0] / side - 1) <= 0.1 + 1 / side
    shift = (moved[:, :2] + moved[:, 2:] - boxes[:, :2] - boxes[:, 2:]) / 2
    assert np.ptp(shift, axis=0).max() == 0
    assert np.abs(shift).max() <= 0.06 * side + 1


def test_zero_jitter_changes_nothing():
    boxes = headbox.head_boxes(talking_shot(np.random.default_rng(5))[0])
    still = HeadBoxSettings(jitter_center=0, jitter_size=0)
    np.testing.assert_array_equal(headbox.jitter(boxes, still, np.random.default_rng(0)), boxes)


# ---- masks


@given(st.integers(-30, 130), st.integers(-30, 90), st.integers(2, 80))
def test_mask_and_crop_box_invert_each_other(x, y, side):
    """Also if one border cuts the box; not if two neighbouring or two opposite borders cut it."""
    width, height = 150, 120
    box = np.array([x, y, x + side, y + side], np.float32)
    found = headbox.crop_box_from_mask(headbox.mask_from_box(box, height, width))
    visible_width = min(x + side, width) - max(x, 0)
    visible_height = min(y + side, height) - max(y, 0)
    if visible_width <= 0 or visible_height <= 0:
        assert found is None
    elif max(visible_width, visible_height) == side:
        np.testing.assert_array_equal(found, box)
    else:
        assert found is not None
        assert found[2] - found[0] == found[3] - found[1]


def test_crop_box_of_a_free_form_mask_is_the_square_around_it():
    mask = np.zeros((100, 200), bool)
    mask[40:60, 50:90] = True
    np.testing.assert_array_equal(headbox.crop_box_from_mask(mask), [50, 30, 90, 70])


@given(st.floats(-20, 60), st.floats(-20, 60), st.floats(0.5, 70))
def test_every_touched_pixel_is_masked(x, y, side):
    box = np.array([x, y, x + side, y + side])
    mask = headbox.mask_from_box(box, 48, 64)
    for row, column in [(0, 0), (20, 30), (47, 63), (int(np.clip(y, 0, 47)), int(np.clip(x, 0, 63)))]:
        overlap = min(x + side, column + 1) - max(x, column), min(y + side, row + 1) - max(y, row)
        if min(overlap) > 2e-3:
            assert mask[row, column]
        if min(overlap) < 0:
            assert not mask[row, column]


def test_masked_scene_contains_nothing_of_the_head():
    scenes = np.random.default_rng(0).integers(128, 255, (2, 64, 64, 3), np.uint8)
    boxes = np.array([[10.4, 20.2, 40.6, 50.9], [-5, -5, 12, 12]], np.float32)
    masked = headbox.mask_scene(scenes, boxes)
    for scene, before, box in zip(masked, scenes, boxes, strict=True):
        inside = headbox.mask_from_box(box, 64, 64)
        assert (scene[inside] == headbox.MASK_FILL).all()
        np.testing.assert_array_equal(scene[~inside], before[~inside])
    assert not np.shares_memory(masked, scenes)


@pytest.mark.parametrize("box", [[10, 10, 10, 20], [10, 20, 30, 15], [np.nan, 0, 5, 5]])
def test_a_box_without_area_is_refused(box):
    with pytest.raises(TccpError, match="not x0 < x1"):
        headbox.mask_from_box(np.array(box, np.float32), 64, 64)


# ---- fitting scenes


@pytest.mark.parametrize(("width", "height"), [(256, 192), (1080, 1920), (64, 64), (40, 30), (33, 97)])
def test_scene_and_boxes_are_fitted_by_the_same_transform(width, height):
    """A white square in the source lies under its fitted box, and the bars are black."""
    box = np.array([width // 4, height // 3, width // 4 + width // 3, height // 3 + width // 3], np.float32)
    frame = np.full((height, width, 3), 40, np.uint8)
    frame[headbox.mask_from_box(box, height, width)] = 255
    fit = headbox.SceneFit(width, height, 64)
    picture = fit.fit(frame).astype(float)
    fitted = fit.boxes(box[None])[0]
    weight = (picture[..., 0] - 40).clip(0)
    ys, xs = np.mgrid[:64, :64] + 0.5
    center = (weight * xs).sum() / weight.sum(), (weight * ys).sum() / weight.sum()
    np.testing.assert_allclose(center, (fitted[:2] + fitted[2:]) / 2, atol=0.35)
    corners = fit.points(np.array([[0.0, 0.0], [width, height]]))
    outside = (xs < corners[0, 0]) | (ys < corners[0, 1]) | (xs > corners[1, 0]) | (ys > corners[1, 1])
    assert (picture[outside] == headbox.LETTERBOX_FILL).all()


def test_a_frame_of_another_size_is_refused():
    with pytest.raises(TccpError, match="frame is 20x10, the scene 30x10"):
        headbox.SceneFit(30, 10, 64).fit(np.zeros((10, 20, 3), np.uint8))


# ---- crops


def gradient(height: int, width: int) -> UInt8[np.ndarray, "h w 3"]:
    """Linear in x, in y and in both: the colour of a pixel gives its position."""
    ys, xs = np.mgrid[:height, :width]
    return np.stack([xs, ys, (xs + ys) // 2], -1).astype(np.uint8)


def places(box: Float[np.ndarray, "4"], size: int) -> Float[np.ndarray, "s s 2"]:
    """The gradient's colours at the pixels of a crop: the positions of their centres minus half a pixel."""
    centers = (np.arange(size) + 0.5) / size
    xs, ys = np.meshgrid(box[0] + centers * (box[2] - box[0]), box[1] + centers * (box[3] - box[1]))
    return np.stack([xs, ys], -1) - 0.5


@settings(max_examples=40)
@example(5.0, 5.0, 64.0, 32)
@given(st.floats(5, 60), st.floats(5, 60), st.floats(20, 170), st.sampled_from([32, 64, 96, 128]))
def test_crop_matches_the_content_of_the_box(x, y, side, size):
    """Downscaled, upscaled and sub-pixel crops: colours match positions up to 8-bit rounding."""
    box = np.array([x, y, x + side, y + side])
    picture = headbox.crop(gradient(240, 240), box, size).astype(float)
    inner = np.s_[2:-2, 2:-2]
    np.testing.assert_allclose(picture[..., :2][inner], places(box, size)[inner], atol=1.01)
    # A shift by half a pixel, the usual mistake, would show as half a level. Positions at half a level do not count,
    # because either rounding is right there; with even steps, that can be all pixels.
    place = places(box, size)
    decided = np.abs(place % 1 - 0.5)[inner] > 0.02
    differences = (picture[..., :2] - np.rint(place))[inner][decided]
    assert not len(differences) or abs(differences.mean()) < 0.1


def test_crop_at_native_size_is_a_copy():
    frame = np.random.default_rng(0).integers(0, 255, (90, 120, 3), np.uint8)
    np.testing.assert_array_equal(headbox.crop(frame, np.array([30, 20, 94, 84], np.float32), 64), frame[20:84, 30:94])


def test_crop_averages_and_does_not_alias():
    """A checkerboard of single pixels turns grey, whatever the factor."""
    board = (np.indices((200, 200)).sum(0) % 2 * 255).astype(np.uint8)[..., None].repeat(3, 2)
    for side in (128, 150, 190):
        picture = headbox.crop(board, np.array([3, 4, 3 + side, 4 + side], np.float32), 32)
        assert np.abs(picture.astype(float) - 127.5).max() < 32


def test_crop_marks_what_lies_beyond_the_border():
    frame = gradient(100, 100)
    box = np.array([-32, 20, 32, 84], np.float32)
    picture, repeated = headbox.crop(frame, box, 64), headbox.crop(frame, box, 64, repeat_edge=True)
    np.testing.assert_array_equal(picture[:, 32:], frame[20:84, :32])
    np.testing.assert_array_equal(repeated[:, 32:], frame[20:84, :32])
    assert (picture[:, :32] == headbox.OUTSIDE_FILL).all()
    np.testing.assert_array_equal(repeated[:, :32], np.repeat(frame[20:84, :1], 32, 1))
    np.testing.assert_array_equal(headbox.inside_picture(box, 100, 100), [0.5, 0, 1, 1])


@given(st.integers(-80, 120), st.integers(-80, 120), st.integers(8, 160))
def test_exactly_the_pixels_of_the_picture_are_shown(x, y, side):
    """At native size, for boxes inside, across borders and corners, larger than the picture, and outside it."""
    width, height = 90, 70
    frame = np.random.default_rng(0).integers(128, 256, (height, width, 3), np.uint8)
    box = np.array([x, y, x + side, y + side], np.float32)
    picture = headbox.crop(frame, box, side)
    columns, rows = np.arange(x, x + side), np.arange(y, y + side)
    shown = ((rows >= 0) & (rows < height))[:, None] & ((columns >= 0) & (columns < width))
    assert (picture[~shown] == headbox.OUTSIDE_FILL).all()
    expected = frame[rows.clip(0, height - 1)][:, columns.clip(0, width - 1)]
    np.testing.assert_array_equal(picture[shown], expected[shown])
    x0, y0, x1, y1 = headbox.inside_picture(box, width, height) * side
    assert (x1 - x0) * (y1 - y0) == pytest.approx(shown.sum(), abs=1e-3 * side**2)


def test_visible_share_of_a_picture():
    boxes = np.array([[10, 10, 60, 60], [-20, -20, 30, 30], [-50, -50, 250, 250], [200, 0, 300, 100]], np.float32)
    np.testing.assert_allclose(headbox.visible_share(boxes, 200, 100), [7 / 8, 1 - 0.045, 0, 1], atol=1e-6)


@given(st.floats(-50, 50), st.floats(-50, 50), st.floats(1, 200))
def test_crop_coordinates_invert(x, y, side):
    box = np.array([x, y, x + side, y + side])
    points = np.random.default_rng(0).uniform(-20, 120, (3, 68, 2))
    np.testing.assert_allclose(headbox.from_crop(headbox.to_crop(points, box), box), points, atol=1e-2)
    np.testing.assert_allclose(headbox.to_crop(box.reshape(2, 2), box), [[0, 0], [1, 1]], atol=1e-6)


# ---- pasting

BOXES = [
    pytest.param((40, 30, 104, 94), id="inside"),
    pytest.param((-20, 30, 60, 110), id="left"),
    pytest.param((100, -25, 170, 45), id="top"),
    pytest.param((110, 70, 190, 150), id="corner"),
    pytest.param((-10, -10, 190, 190), id="larger"),
    pytest.param((50.3, 40.7, 110.3, 100.7), id="sub-pixel"),
]


def scene(seed: int = 0) -> UInt8[np.ndarray, "h w 3"]:
    """A picture similar to a photograph: shading, shapes with edges, grain."""
    rng = np.random.default_rng(seed)
    ys, xs = np.mgrid[:128, :160]
    picture = np.stack([80 + 0.5 * xs, 120 + 0.3 * ys, 150 - 0.4 * xs + 0.2 * ys], -1)
    for _ in range(12):
        x, y, radius = rng.integers(0, 160), rng.integers(0, 128), rng.integers(6, 30)
        picture[(xs - x) ** 2 + (ys - y) ** 2 < radius**2] += rng.normal(0, 30, 3)
    picture = cv2.GaussianBlur(picture, (0, 0), 0.8) + rng.normal(0, 2, picture.shape)
    return np.clip(picture, 0, 255).astype(np.uint8)


def seam(picture: np.ndarray, mask: np.ndarray) -> float:
    """Mean step across the mask's border, in levels."""
    levels, steps = picture.astype(float), []
    for axis in (0, 1):
        across = np.abs(np.diff(levels, axis=axis)).mean(-1)
        steps.append(across[np.diff(mask.astype(int), axis=axis) != 0])
    return float(np.concatenate(steps).mean())


@pytest.mark.parametrize("box", BOXES)
def test_pasting_truth_back_reproduces_the_frame(box):
    frame, place = scene(), np.array(box, np.float32)
    side = round(box[2] - box[0])
    mask = headbox.mask_from_box(place, 128, 160)
    result = headbox.paste(frame, headbox.crop(frame, place, side), place)
    np.testing.assert_array_equal(result[~mask], frame[~mask])
    error = np.abs(result.astype(float) - frame)[mask]
    assert error.mean() < (3 if "." in str(box) else 1.2)


@pytest.mark.parametrize("box", [(40, 30, 104, 94), (40.4, 30.6, 104.4, 94.6), (100, 30, 180, 110)])
@pytest.mark.parametrize("size", [32, 64, 128])
def test_pasting_truth_back_on_a_gradient_is_nearly_exact(box, size):
    """Without texture, all remaining error is geometric, and it must be small."""
    frame, place = gradient(128, 160), np.array(box, np.float32)
    mask = headbox.mask_from_box(place, 128, 160)
    xy = places(place, size)
    exact = np.concatenate([xy, xy.mean(-1, keepdims=True)], -1)
    # Rounded at random: with even steps, plain rounding would shift the whole gradient by up to half a level.
    face = np.floor(exact + np.random.default_rng(0).uniform(0, 1, exact.shape)).clip(0, 255).astype(np.uint8)
    plain = (headbox.paste(frame, face, place, color_match=False).astype(float) - frame)[mask][:, :2]
    assert np.abs(plain).max() <= 3
    assert np.abs(plain.mean(0)).max() < 0.15
    matched = (headbox.paste(frame, face, place).astype(float) - frame)[mask][:, :2]
    assert np.abs(matched).max() <= 3
    assert np.abs(matched.mean(0)).max() < 0.4


@pytest.mark.parametrize("box", BOXES)
def test_paste_keeps_pixels_outside_and_ignores_pixels_under_the_mask(box):
    place, rng = np.array(box, np.float32), np.random.default_rng(1)
    frame, face = scene(), rng.integers(0, 255, (48, 48, 3), np.uint8)
    mask = headbox.mask_from_box(place, 128, 160)
    result = headbox.paste(frame, face, place)
    np.testing.assert_array_equal(result[~mask], frame[~mask])
    hidden = frame.copy()
    hidden[mask] = headbox.MASK_FILL
    np.testing.assert_array_equal(headbox.paste(hidden, face, place), result)
    assert (frame == scene()).all()


def test_surround_extends_edges_inward_and_ignores_masked_pixels():
    """A wall of two colours and a floor: each fills the part of the box that is next to it."""
    scene = np.zeros((64, 64, 3), np.uint8)
    scene[:, :32], scene[:, 32:], scene[41:] = (200, 40, 40), (40, 40, 200), (40, 200, 40)
    box = np.array([[22.4, 20.7, 41.6, 40.2]], np.float32)
    filled = headbox.surround(headbox.mask_scene(scene[None], box), box)[0].astype(int)
    np.testing.assert_allclose(filled[16:40, 1], np.tile(scene[30, 10], (24, 1)), atol=6)
    np.testing.assert_allclose(filled[16:40, -2], np.tile(scene[30, 50], (24, 1)), atol=6)
    np.testing.assert_allclose(filled[-2, 16:48], np.tile(scene[50, 30], (32, 1)), atol=6)
    assert filled[32, 20, 0] > filled[32, 44, 0] + 40
    other = headbox.mask_scene(scene[None], box)
    other[0, 25:35, 25:35] = 255
    np.testing.assert_array_equal(headbox.surround(other, box)[0], filled)


def test_surround_of_one_colour_has_that_colour_and_ignores_edges_outside():
    scenes = np.full((3, 32, 32, 3), (10, 120, 230), np.uint8)
    boxes = np.array([[8, 8, 20, 20], [-5, -3, 20, 22], [-1, -1, 33, 33]], np.float32)
    filled = headbox.surround(headbox.mask_scene(scenes, boxes), boxes)
    assert (filled[:2] == (10, 120, 230)).all()
    assert (filled[2] == headbox.MASK_FILL).all()


@pytest.mark.parametrize("box", BOXES[:4])
def test_paste_removes_the_seam_and_the_colour_shift_of_a_face(box):
    frame, place = scene(2), np.array(box, np.float32)
    mask = headbox.mask_from_box(place, 128, 160)
    face = headbox.crop(frame, place, round(box[2] - box[0])).astype(float)
    shifted = np.clip(face * 0.92 + (18, -14, 10), 0, 255).astype(np.uint8)
    hard = frame.copy()
    ys, xs = np.nonzero(mask)
    hard[mask] = shifted[ys - round(box[1]), xs - round(box[0])]
    matched = headbox.paste(frame, shifted, place)
    natural = seam(frame, mask)
    assert seam(hard, mask) > natural + 4
    assert seam(matched, mask) < natural + 1
    before, after = (np.abs(p.astype(float) - frame)[mask].mean() for p in (hard, matched))
    assert after < 0.55 * before


def test_feathering_alone_hides_the_seam_and_keeps_the_middle():
    frame, place = scene(3), np.array((40, 30, 104, 94), np.float32)
    mask = headbox.mask_from_box(place, 128, 160)
    shifted = np.clip(headbox.crop(frame, place, 64).astype(int) + 20, 0, 255).astype(np.uint8)
    result = headbox.paste(frame, shifted, place, color_match=False)
    assert seam(result, mask) < seam(frame, mask) + 1.5
    margin = int(np.ceil(headbox.FEATHER * 64)) + 1
    inner = np.s_[30 + margin : 94 - margin, 40 + margin : 104 - margin]
    np.testing.assert_array_equal(result[inner], shifted[margin:-margin, margin:-margin])


def test_colour_matching_ignores_an_object_that_crosses_the_border():
    """A dark sleeve that the generator did not draw must not darken the face."""
    frame, place = np.full((128, 160, 3), 140, np.uint8), np.array((40, 30, 104, 94), np.float32)
    face = np.full((64, 64, 3), 140, np.uint8)
    frame[90:128, 60:78] = 10
    result = headbox.paste(frame, face, place).astype(float)
    assert np.abs(result[35:75, 50:95] - 140).max() < 6


def test_small_faces_are_enlarged_in_place():
    """From 16 to 64 px: bright spots stay at their position in the box."""
    frame, place = np.zeros((128, 160, 3), np.uint8), np.array((40, 30, 104, 94), np.float32)
    face = np.zeros((16, 16, 3), np.uint8)
    face[6:10, 3:7] = 200
    result = headbox.paste(frame, face, place, color_match=False).astype(float)[..., 0]
    ys, xs = np.mgrid[:128, :160] + 0.5
    assert (result * xs).sum() / result.sum() == pytest.approx(40 + 64 * 5 / 16, abs=0.2)
    assert (result * ys).sum() / result.sum() == pytest.approx(30 + 64 * 8 / 16, abs=0.2)


def test_box_outside_the_picture_changes_nothing():
    frame = scene()
    away = np.array((300, 300, 350, 350), np.float32)
    np.testing.assert_array_equal(headbox.paste(frame, np.zeros((50, 50, 3), np.uint8), away), frame)


@settings(max_examples=60)
@given(st.floats(-90, 150), st.floats(-90, 120), st.floats(1, 140), st.sampled_from([8, 32, 64]), st.booleans())
def test_paste_never_fails_and_never_changes_pixels_outside(x, y, side, size, color_match):
    frame, place = scene(), np.array((x, y, x + side, y + side), np.float32)
    face = np.random.default_rng(0).integers(0, 255, (size, size, 3), np.uint8)
    result = headbox.paste(frame, face, place, color_match=color_match)
    mask = headbox.mask_from_box(place, 128, 160)
    np.testing.assert_array_equal(result[~mask], frame[~mask])
