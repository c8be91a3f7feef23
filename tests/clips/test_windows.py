"""Views and windows: jitter moves all parts together, masks hide the head, the training order is a pure function."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_clips import make_clip

from tccp import headbox
from tccp.clips import windows as data
from tccp.clips.clip_table import (
    AUDIO_CONTEXT_FRAMES,
    STORED_MARGIN,
    Clip,
    audio_context_start,
    clips_to_table,
    decode_still,
    encode_still,
    stored_box_of,
)
from tccp.clips.order import PlannedWindow, TrainingOrder, WindowId, epoch_order, step_slice, window_ids
from tccp.clips.windows import view, windows
from tccp.config import SAMPLES_PER_FRAME, override, toy
from tccp.errors import TccpError
from tccp.media import mel as audio
from tccp.seeds import rng_seed

TOY = override(toy(), {"headbox.mirror": False})
SIZE = TOY.picture_px
WIDTH, HEIGHT = 256, 192
CORNERS = (0, 16, 8)  # landmarks that carry a dot in `dotted_clip`


def dotted_clip(number: int = 0, num_frames: int = 16, head: tuple[int, int, int] = (255, 0, 255)) -> Clip:
    """A scene with a plain head that moves to the right, with a dot at three of its landmarks.

    head: its colour. The background is noise, the same for every colour.
    """
    rng = np.random.default_rng(number)
    ground = rng.integers(0, 256, (HEIGHT // 4, WIDTH // 4, 3), np.uint8).repeat(4, 0).repeat(4, 1)
    x = 80 + np.arange(num_frames, dtype=np.float32)[:, None]
    head_box = np.concatenate([x, np.full_like(x, 40), x + 96, np.full_like(x, 136)], 1)
    points = rng.uniform(0.35, 0.65, (num_frames, 68, 2)).astype(np.float32)
    points[:, CORNERS] = np.array([[0.3, 0.3], [0.7, 0.35], [0.5, 0.75]], np.float32)
    fit = headbox.SceneFit(WIDTH, HEIGHT, SIZE)
    stored_box = stored_box_of(head_box)
    scene, face = [], []
    for box, stored, shape in zip(head_box, stored_box, points, strict=True):
        frame = ground.copy()
        x0, y0, x1, y1 = box.astype(int)
        frame[y0:y1, x0:x1] = head
        for dot in headbox.from_crop(shape[list(CORNERS)], box):
            # cv2.circle's whole coordinates are pixel centres
            center = tuple(round(float(c - 0.5) * 16) for c in dot)
            cv2.circle(frame, center, 4 * 16, (255, 255, 255), -1, cv2.LINE_AA, shift=4)
        scene.append(encode_still(fit.fit(frame), lossless=True))
        face.append(encode_still(headbox.crop(frame, stored, round(1.25 * STORED_MARGIN * SIZE))))
    return dataclasses.replace(
        make_clip(number, num_frames, picture_px=SIZE),
        source_width=WIDTH,
        source_height=HEIGHT,
        head_box=head_box,
        stored_box=stored_box,
        landmarks=points,
        scene=scene,
        face=face,
    )


@given(jitter=st.integers(0, 10_000), seed=st.integers(0, 5))
@settings(max_examples=15, deadline=None)
def test_landmarks_stay_on_their_picture_content_under_jitter(jitter: int, seed: int) -> None:
    seen = view(CLIP, TOY, jitter, seed, num_frames=4)
    for picture, points in zip(seen.face, seen.landmarks, strict=True):
        white = picture.min(axis=2).astype(float) / 255
        for x, y in points[list(CORNERS)] * SIZE:
            left, top = int(x) - 5, int(y) - 5
            patch = white[top : top + 11, left : left + 11]
            rows, columns = np.mgrid[: patch.shape[0], : patch.shape[1]] + 0.5
            centroid = left + (patch * columns).sum() / patch.sum(), top + (patch * rows).sum() / patch.sum()
            assert abs(centroid[0] - x) < 0.25 and abs(centroid[1] - y) < 0.25, "more than a quarter of a pixel off"


@given(jitter=st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_scene_mask_matches_the_crop_box(jitter: int) -> None:
    """The box measured in the masked picture is the one that the face crop and the landmarks use."""
    seen = view(CLIP, TOY, jitter, 0, num_frames=3)
    fit = headbox.SceneFit(WIDTH, HEIGHT, SIZE)
    for i, (scene, box, points) in enumerate(zip(seen.masked_scene, seen.mask_box, seen.landmarks, strict=True)):
        masked = (scene != decode_still(CLIP.scene[i])).any(axis=2)
        rows, columns = np.flatnonzero(masked.any(1)), np.flatnonzero(masked.any(0))
        assert (scene[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] == headbox.MASK_FILL).all()
        found = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        assert found == [*np.floor(box[:2] + 1e-3), *np.ceil(box[2:] - 1e-3)]  # each pixel that the box touches
        in_source = headbox.from_crop(CLIP.landmarks[i], CLIP.head_box[i])
        in_scene = headbox.from_crop(points, box)
        np.testing.assert_allclose(in_scene, fit.points(in_source), atol=1e-2)


def test_jitter_changes_position_and_size_and_is_constant_within_a_clip():
    boxes = np.stack([view(CLIP, TOY, jitter, 0).mask_box for jitter in range(40)])
    side = boxes[..., 2] - boxes[..., 0]
    center = (boxes[..., 0] + boxes[..., 2]) / 2
    plain = view(CLIP, TOY, None, 0).mask_box
    plain_side = plain[0, 2] - plain[0, 0]
    assert np.ptp(side[:, 0]) > 0.5 * 2 * TOY.headbox.jitter_size * plain_side
    assert np.ptp(center[:, 0]) > 0.5 * 2 * TOY.headbox.jitter_center * plain_side
    assert np.ptp(side, axis=1).max() < 1e-3  # constant within a clip
    np.testing.assert_allclose(
        np.diff(center, axis=1), np.diff(plain[:, [0, 2]].mean(1))[None].repeat(40, 0), atol=1e-3
    )


def test_a_masked_scene_shows_no_pixel_of_the_head():
    """Two films that differ only inside the head box give the same masked scene, bit for bit."""
    one, other = dotted_clip(1, head=(255, 0, 255)), dotted_clip(1, head=(0, 90, 10))
    a, b = view(one, TOY, None, 0), view(other, TOY, None, 0)
    assert (a.face != b.face).any() and one.scene != other.scene
    np.testing.assert_array_equal(a.masked_scene, b.masked_scene)


def test_odd_views_are_mirrored_in_all_parts():
    """The same jitter with left and right exchanged: pictures, landmarks with their indices, and the mask."""
    both = override(TOY, {"headbox.mirror": True})
    for jitter in (None, 0, 2):
        np.testing.assert_array_equal(view(CLIP, both, jitter, 0).masked_scene, view(CLIP, TOY, jitter, 0).masked_scene)
    plain, turned = view(CLIP, TOY, 3, 0), view(CLIP, both, 3, 0)
    for name in ("face", "masked_scene", "identity"):
        np.testing.assert_array_equal(getattr(turned, name), getattr(plain, name)[..., ::-1, :])
    np.testing.assert_allclose(turned.landmarks[:, 36, 0], 1 - plain.landmarks[:, 45, 0], atol=1e-6)
    np.testing.assert_allclose(turned.landmarks[:, 36, 1], plain.landmarks[:, 45, 1], atol=1e-6)
    drawn = turned.landmark_pictures.astype(int) - plain.landmark_pictures[..., ::-1, :]
    assert np.abs(drawn).mean() < 0.5
    np.testing.assert_array_equal(turned.mel, plain.mel)
    masked = headbox.mask_scene(turned.masked_scene, turned.mask_box)
    np.testing.assert_array_equal(masked, turned.masked_scene)


def test_view_of_a_part_equals_the_part_of_the_view():
    whole, part = view(CLIP, TOY, 3, 7), view(CLIP, TOY, 3, 7, start_frame=5, num_frames=8)
    for field in dataclasses.fields(data.ClipView):
        one = getattr(whole, field.name)
        np.testing.assert_array_equal(one if field.name == "identity" else one[5:13], getattr(part, field.name))
    with pytest.raises(TccpError, match="frames 10 to 18 are not in clip"):
        view(CLIP, TOY, 3, 7, start_frame=10, num_frames=8)


def test_view_is_a_pure_function_of_seed_clip_and_jitter_number():
    again = view(dotted_clip(), TOY, 3, 7)
    np.testing.assert_array_equal(view(CLIP, TOY, 3, 7).face, again.face)
    for other in (view(CLIP, TOY, 4, 7), view(CLIP, TOY, 3, 8), view(dotted_clip(2), TOY, 3, 7)):
        assert (other.mask_box != again.mask_box).any()


def test_mel_at_the_ends_of_a_clip_matches_the_whole_film():
    rng = np.random.default_rng(0)
    film = np.clip(rng.normal(0, 0.1, 60 * SAMPLES_PER_FRAME + 100), -1, 1)
    pcm = np.rint(film * 32768).astype(np.int16)
    whole = audio.mel_windows(pcm.astype(np.float32) / 32768, 0, 60)
    for first, length in ((0, 16), (2, 16), (20, 20), (44, 16)):
        begin, end = first * SAMPLES_PER_FRAME, (first + length) * SAMPLES_PER_FRAME
        clip = dataclasses.replace(
            dotted_clip(num_frames=length),
            audio=pcm[begin:end],
            audio_before=pcm[audio_context_start(first) * SAMPLES_PER_FRAME : begin],
            audio_after=pcm[end : end + AUDIO_CONTEXT_FRAMES * SAMPLES_PER_FRAME],
        )
        np.testing.assert_allclose(view(clip, TOY, 0, 0).mel, whole[first : first + length], atol=1e-4)


def test_view_marks_what_is_bridged_and_what_lies_beyond_the_picture():
    """The head is cut by the picture's left border: that part of the face is filled, also in mirrored views."""
    clip = dotted_clip(num_frames=4)
    shift = np.array([-110, 0, -110, 0], np.float32)
    confidence = np.array([1, 0, 0, 0.4], np.float32)
    clip = dataclasses.replace(
        clip, head_box=clip.head_box + shift, stored_box=clip.stored_box + shift, landmark_confidence=confidence
    )
    plain = view(clip, TOY, None, 0)
    assert plain.known.tolist() == [True, False, False, True]
    np.testing.assert_allclose(plain.inside, [[(30 - i) / 96, 0, 1, 1] for i in range(4)], atol=1e-6)
    whole = view(CLIP, TOY, None, 0, num_frames=4)
    columns = np.arange(SIZE) + 0.5
    for i in range(4):
        beyond = columns < (30 - i) / 96 * SIZE
        assert (plain.face[i][:, beyond] == headbox.OUTSIDE_FILL).all()
        np.testing.assert_array_equal(plain.face[i][:, ~beyond], whole.face[i][:, ~beyond])
    assert (whole.inside == (0, 0, 1, 1)).all()
    mirroring = override(toy(), {"headbox.mirror": True})
    mirrored, not_mirrored = view(clip, mirroring, 1, 0), view(clip, TOY, 1, 0)
    np.testing.assert_array_equal(mirrored.face, not_mirrored.face[:, :, ::-1])
    np.testing.assert_allclose(mirrored.inside[:, 2], 1 - not_mirrored.inside[:, 0], atol=1e-6)


def test_views_with_mismatched_settings_are_refused():
    with pytest.raises(TccpError, match="picture_px=64, these settings have 128: preprocess again"):
        view(CLIP, TOY.model_copy(update={"picture_px": 128}), 0, 0)
    wild = TOY.model_copy(update={"headbox": TOY.headbox.model_copy(update={"jitter_center": 0.2})})
    with pytest.raises(TccpError, match=r"lower headbox\.jitter_center"):
        view(CLIP, wild, 0, 0)


CLIP = dotted_clip()


def test_windows_are_slices_of_views_with_fixed_shapes():
    batch = clips_to_table([dotted_clip(0, 20), dotted_clip(1, 16)])
    columns = windows(batch, TOY, window=8, stride=7, seed=5, jitters=(0, 2))
    assert columns["start_frame"].tolist() == [0, 7, 12] * 2 + [0, 7, 8] * 2
    assert columns["jitter"].tolist() == [0] * 3 + [2] * 3 + [0] * 3 + [2] * 3
    assert columns["face"].shape == columns["landmark_pictures"].shape == columns["masked_scene"].shape
    assert columns["face"].shape == (12, 8, SIZE, SIZE, 3) and columns["identity"].shape == (12, SIZE, SIZE, 3)
    assert columns["mel"].shape == (12, 8, 80, 16) and columns["landmarks"].shape == (12, 8, 68, 2)
    seen = view(dotted_clip(1, 16), TOY, 2, 5, start_frame=8, num_frames=8)
    for name in ("face", "landmark_pictures", "masked_scene", "landmarks", "mel", "known", "inside"):
        np.testing.assert_array_equal(columns[name][-1], getattr(seen, name))
    assert len(set(columns["clip_hash"].tolist())) == 2
    none = windows(batch.slice(0, 0), TOY, window=8, stride=7)
    assert {name: (c.shape[1:], c.dtype) for name, c in none.items()} == {
        name: (c.shape[1:], c.dtype) for name, c in columns.items()
    }
    assert len(windows(batch, TOY, window=21, stride=7)["face"]) == 0


@pytest.mark.cluster
def test_ray_data_gives_the_same_windows(ray_with_two_cpus: Any) -> None:
    import ray.data

    batch = clips_to_table([dotted_clip(0, 20), dotted_clip(1, 16)])
    arguments: dict[str, Any] = {"settings": TOY, "window": 8, "stride": 7}
    rows = ray.data.from_arrow(batch).map_batches(windows, fn_kwargs=arguments, batch_format="pyarrow").take_all()
    here = windows(batch, **arguments)
    assert len(rows) == len(here["face"]) == 6
    place = {(r["clip_hash"], r["start_frame"]): r for r in rows}
    for i, key in enumerate(zip(here["clip_hash"].tolist(), here["start_frame"].tolist(), strict=True)):
        for name, column in here.items():
            np.testing.assert_array_equal(place[key][name], column[i])


@given(num_frames=st.integers(0, 60), window=st.integers(1, 9), stride=st.integers(1, 9))
def test_windows_cover_every_frame_of_a_clip(num_frames: int, window: int, stride: int) -> None:
    ids = window_ids(["clip"], [num_frames], window, stride)
    assert len(set(ids)) == len(ids)
    assert all(0 <= w.start_frame <= num_frames - window for w in ids)
    covered = {w.start_frame + i for w in ids for i in range(window)}
    if num_frames < window:
        assert not ids
    elif stride <= window:
        assert covered == set(range(num_frames))


def test_window_arguments_are_checked():
    with pytest.raises(TccpError, match="at least 1 frame"):
        window_ids(["clip"], [16], 8, 0)


IDS = window_ids([f"clip{i}" for i in range(5)], [30, 16, 9, 8, 40], 8, 7)


def test_epoch_order_is_a_permutation_that_depends_on_seed_and_epoch_only():
    one = epoch_order(IDS, 3, 1)
    assert sorted(one) == sorted(IDS) and one != sorted(IDS)
    assert epoch_order(reversed(IDS), 3, 1) == one
    assert epoch_order(IDS, 3, 2) != one and epoch_order(IDS, 4, 1) != one


def test_epoch_order_is_the_same_in_another_process():
    code = (
        "from tccp.clips.order import *; from tccp.seeds import rng_seed; "
        "print(epoch_order([WindowId('a', i) for i in range(20)], 3, 1), rng_seed('x', 1, .5, b'y'))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    here = f"{epoch_order([WindowId('a', i) for i in range(20)], 3, 1)} {rng_seed('x', 1, 0.5, b'y')}"
    assert run.stdout.strip() == here


def test_every_window_comes_first_equally_often():
    first = [epoch_order(IDS, seed, 0)[0] for seed in range(600)]
    counts = [first.count(w) for w in IDS]
    expected = 600 / len(IDS)
    chi_squared = sum((c - expected) ** 2 / expected for c in counts)
    assert chi_squared < 2 * len(IDS) + 10


@given(n=st.integers(1, 30), batch=st.integers(1, 8), ranks=st.sampled_from([1, 2, 3, 4]), steps=st.integers(1, 20))
def test_steps_take_each_window_once_per_epoch_for_any_number_of_workers(
    n: int, batch: int, ranks: int, steps: int
) -> None:
    batch *= ranks
    stream = [place for step in range(steps) for place in step_slice(n, step, batch)]
    assert stream == [(i // n, i % n) for i in range(steps * batch)]
    for step in range(steps):
        parts = [step_slice(n, step, batch, rank, ranks) for rank in range(ranks)]
        assert len({len(part) for part in parts}) == 1
        assert [place for part in parts for place in part] == step_slice(n, step, batch)


def test_training_order_follows_the_epoch_order_and_can_start_at_any_step():
    fresh, order = TrainingOrder(IDS, 9), TrainingOrder(list(reversed(IDS)), 9)
    steps = [order.step(k, 4) for k in range(12)]
    assert fresh.step(7, 4) == steps[7]
    flat = [w for step in steps for w in step]
    n = len(IDS)
    assert flat[n : 2 * n] == [PlannedWindow(1, w) for w in epoch_order(IDS, 9, 1)]
    assert order.step(3, 4, rank=1, num_ranks=2) == steps[3][2:]
    few = TrainingOrder(IDS[:3], 9).step(0, 8)  # an epoch shorter than a batch
    assert [w.epoch for w in few] == [0, 0, 0, 1, 1, 1, 2, 2]


def test_invalid_training_orders_are_refused():
    with pytest.raises(TccpError, match="no training windows"):
        step_slice(0, 0, 4)
    with pytest.raises(TccpError, match="cannot be divided among 3 workers"):
        step_slice(9, 0, 4, 0, 3)
    with pytest.raises(TccpError, match="listed twice"):
        TrainingOrder([*IDS, IDS[0]], 0)


def test_rng_seed_distinguishes_its_parts():
    parts = [("ab", "c"), ("a", "bc"), ("abc",), (1, 2), (12,), ("12",), (b"12",), (1.0, 2), (-1, 2), (2, 1)]
    assert len({rng_seed(*p) for p in parts}) == len(parts)
    assert all(0 <= rng_seed(*p) < 2**63 for p in parts)
    assert rng_seed(np.int64(5), np.float64(0.5)) == rng_seed(5, 0.5)
    assert rng_seed(0, "noise", "clip", 8, 1) == 5423930835137396629  # existing runs were trained with this value
