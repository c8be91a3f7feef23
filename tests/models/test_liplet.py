"""Liplet: geometry, training and cross-fitting; no network serves a clip that it was trained on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from tccp.clips.clip_table import Clip, ClipTable, Quality, clip_id_of, encode_still, stored_box_of, write_table
from tccp.config import SAMPLES_PER_FRAME, LipSettings, Settings, load_settings
from tccp.errors import TccpError
from tccp.headbox import crop
from tccp.landmarks import MEAN_FACE, mouth_opening
from tccp.media.mel import mel_windows
from tccp.models.lip_sources import LipletSource, load_liplet, open_lip_source
from tccp.models.liplet import Liplet, identity_picture, mouth_picture, mouth_region, mouth_transform
from tccp.roundtable import synthesise
from tccp.training.fit_liplet import augment, collect_samples, mouth_loss, mouths_of, train_liplet
from tccp.training.lip_folds import LipTable, assign_folds, lip_pictures, open_lip_sources, train_liplets

SIZE = 16
NUM_FRAMES = 24


def _settings(**lips: float) -> Settings:
    values = {"size_px": SIZE, "liplet_channels": 8, "liplet_steps": 3, "liplet_batch_size": 4, **lips}
    return load_settings("toy", [f"lips.{name}={value}" for name, value in values.items()])


def _points(opening: float, yaw_deg: float = 0, roll_deg: float = 0, scale: float = 0.42) -> np.ndarray:
    """The mean face in crop coordinates, with its jaw lowered and its head turned."""
    face = MEAN_FACE.copy()
    face[[55, 56, 57, 58, 59, 65, 66, 67], 1] += opening
    yaw, roll = np.radians([yaw_deg, roll_deg])
    turn = np.array([[np.cos(yaw), 0, -np.sin(yaw)], [0, 1, 0], [np.sin(yaw), 0, np.cos(yaw)]])
    lean = np.array([[np.cos(roll), -np.sin(roll)], [np.sin(roll), np.cos(roll)]])
    return ((turn @ face.T)[:2].T @ lean.T * scale + (0.5, 0.4)).astype(np.float32)


def _draw(points: np.ndarray, size: int, skin: Sequence[int] = (200, 160, 140)) -> np.ndarray:
    """A cartoon: skin, red lips, dark mouth."""
    picture = np.full((4 * size, 4 * size, 3), skin, np.uint8)
    scaled = np.round(points * 4 * size * 16 - 8).astype(np.int32)
    cv2.fillPoly(picture, [scaled[48:60]], (170, 60, 60), cv2.LINE_AA, 4)
    cv2.fillPoly(picture, [scaled[60:68]], (30, 10, 10), cv2.LINE_AA, 4)
    return cv2.resize(picture, (size, size), interpolation=cv2.INTER_AREA)


def _clip(seed: int, source_hash: str = "", num_frames: int = NUM_FRAMES) -> Clip:
    """A clip whose mouth follows the loudness of a tone."""
    rng = np.random.default_rng(seed)
    opening = np.convolve(rng.random(num_frames + 4), np.ones(5) / 5, "valid").astype(np.float32)
    opening = (opening - opening.min()) / np.ptp(opening) * 0.3
    loud = np.interp(np.arange(num_frames * SAMPLES_PER_FRAME) / SAMPLES_PER_FRAME - 0.5, range(num_frames), opening)
    tone = np.sin(np.arange(len(loud)) * 2 * np.pi * 300 / 16_000)
    skin = tuple(int(x) for x in rng.integers(120, 220, 3))
    box = np.tile(np.array([20, 10, 84, 74], np.float32), (num_frames, 1))
    stored = stored_box_of(box)
    points = np.stack([_points(x) for x in opening])
    in_stored = (box[0, :2] + points * 64 - stored[0, :2]) / (stored[0, 2] - stored[0, 0])
    silence = np.zeros(0, np.int16)
    return Clip(
        clip_id=clip_id_of(source_hash or str(seed), 0, seed),
        source=f"{seed}.mp4",
        source_hash=source_hash or str(seed),
        track=0,
        start_s=seed * num_frames / 25,
        num_frames=num_frames,
        source_width=96,
        source_height=96,
        picture_px=64,
        head_box=box,
        stored_box=stored,
        landmarks=points,
        landmark_confidence=np.ones(num_frames, np.float32),
        scene=[b""] * num_frames,
        face=[encode_still(_draw(frame, 80, skin)) for frame in in_stored],
        identity=[encode_still(_draw(_points(0.0), 64, skin))],
        audio=np.round(tone * loud * 80_000).astype(np.int16),
        audio_before=silence,
        audio_after=silence,
        quality=Quality(blur=0.0, face_px=40.0, brightness=0.5, yaw_deg=0.0),
    )


def _roundtable_clip(seed: int, seconds: float = 2.0) -> Clip:
    scene = synthesise(seed, seconds)
    stored = stored_box_of(scene.head_box)
    side = scene.head_box[:, None, 2:] - scene.head_box[:, None, :2]
    pictures = list(scene.frames())
    faces = [encode_still(crop(frame, box, 80)) for frame, box in zip(pictures, stored, strict=True)]
    return replace(
        _clip(seed, num_frames=scene.num_frames),
        source_width=pictures[0].shape[1],
        source_height=pictures[0].shape[0],
        head_box=scene.head_box,
        stored_box=stored,
        landmarks=((scene.landmarks_px - scene.head_box[:, None, :2]) / side).astype(np.float32),
        face=faces,
        identity=[encode_still(scene.identity)],
        audio=np.round(scene.audio * 32767).astype(np.int16),
    )


def _table(clips: list[Clip], tmp_path: Path, name: str = "clips.parquet") -> ClipTable:
    write_table(clips, tmp_path / name)
    return ClipTable(tmp_path / name)


# --- the canonical mouth picture


@pytest.mark.parametrize(("yaw", "roll"), [(0, 0), (0, 25), (35, 0), (-40, -15)])
def test_transform_removes_pose_and_keeps_opening(yaw, roll):
    """Points in the plane of the lips map to their frontal position at any head pose."""
    for opening in (0.0, 0.25):
        frontal, turned = _points(opening), _points(opening, yaw, roll, scale=0.3)
        at = []
        for points in (frontal, turned):
            transform = mouth_transform(points, 100)
            assert transform is not None
            at.append(points @ transform[:, :2].T + transform[:, 2])
        gap = [mapped[66, 1] - mapped[62, 1] for mapped in at]
        assert gap[0] == pytest.approx((MEAN_FACE[66, 1] - MEAN_FACE[62, 1] + opening) * 100 / 0.96, rel=1e-3)
        assert gap[1] == pytest.approx(gap[0], rel=1e-3)
        # Lips are not flat: a point in front of or behind the mouth corners shifts sideways with its depth.
        depth = MEAN_FACE[48:68, 2] - MEAN_FACE[48, 2]
        shift = np.column_stack([-np.tan(np.radians(yaw)) * depth * 100 / 0.96, np.zeros(20)])
        np.testing.assert_allclose((at[1] - at[0])[48:68], shift, atol=0.05)


def test_transform_ignores_soft_points_and_centres_the_mouth():
    """Moving jaw, brows, lids and lips changes nothing; a mouth off to one side is centred."""
    points = _points(0.1, 20)
    moved = points.copy()
    soft = [i for i in (*range(27), 37, 38, 40, 41, 43, 44, 46, 47, *range(48, 68)) if i not in (48, 54)]
    moved[soft] += np.random.default_rng(0).normal(scale=0.1, size=(len(soft), 2)).astype(np.float32)
    moved[[48, 54], 0] += np.array([-0.02, 0.02], np.float32)  # a smile
    still, smiling = mouth_transform(points, 32), mouth_transform(moved, 32)
    assert still is not None
    assert smiling is not None
    np.testing.assert_allclose(still, smiling, atol=1e-5)
    aside = _points(0.1)
    aside[48:68, 0] += 0.05
    transform = mouth_transform(aside, 32)
    assert transform is not None
    assert (aside[[48, 54]] @ transform[0, :2] + transform[0, 2]).mean() == pytest.approx(16)


def test_mouth_picture_paints_over_the_background():
    points = _points(0.1, yaw_deg=40)
    face, room = _draw(points, 200), _draw(points, 200)
    hull = cv2.fillConvexPoly(np.zeros((200, 200), np.uint8), cv2.convexHull((points * 200).astype(np.int32)), 1)
    room[hull == 0] = (0, 255, 0)
    plain, painted = mouth_picture(face, points, 64), mouth_picture(room, points, 64)
    assert plain is not None
    assert painted is not None
    assert np.abs(painted.astype(int) - plain).max() < 40
    green = (painted[..., 1].astype(int) - painted[..., 0]) > 50
    assert not green.any()


def test_mouth_picture_agrees_with_the_transform():
    for turn in ({}, {"yaw_deg": 30, "roll_deg": 20, "scale": 0.33}):
        points = _points(0.2, **turn)
        picture, transform = mouth_picture(_draw(points, 200), points, 64), mouth_transform(points, 64)
        assert picture is not None
        assert transform is not None
        dark = np.argwhere(picture.max(-1) < 100)[:, ::-1] + 0.5
        inner = points[60:68] @ transform[:, :2].T + transform[:, 2]
        polygon = cv2.fillPoly(np.zeros((64 * 8, 64 * 8), np.uint8), [np.round(inner * 8).astype(int)], 1)
        want = np.argwhere(polygon)[:, ::-1] / 8
        assert np.abs(dark.mean(0) - want.mean(0)).max() < 0.35  # half a pixel off would be a wrong pixel convention
        assert len(dark) == pytest.approx(len(want) / 64, rel=0.15)


def test_no_mouth_picture_without_points_or_in_profile():
    face = np.zeros((64, 64, 3), np.uint8)
    missing = _points(0.1)
    missing[36] = np.nan
    assert mouth_picture(face, missing, 32) is None
    assert mouth_picture(face, _points(0.1, 80), 32) is None
    assert mouth_picture(face, np.zeros((68, 2), np.float32), 32) is None
    assert mouth_picture(face, _points(0.1, 50), 32) is not None


def test_mouth_region_contains_open_and_closed_lips():
    region = mouth_region(64)
    for opening in (0.0, 0.3):
        points = _points(opening)
        transform = mouth_transform(points, 64)
        assert transform is not None
        columns, rows = (points[48:68] @ transform[:, :2].T + transform[:, 2]).astype(int).T
        assert region[rows, columns].all()
    assert 0.2 < region.mean() < 0.5


# --- the network


@pytest.mark.parametrize(("size_px", "channels"), [(32, 16), (96, 32), (16, 8)])
def test_output_shape_and_range(size_px, channels):
    network = Liplet(size_px, channels)
    lips = network(torch.randn(2, 80, 16), torch.rand(2, 3, size_px, size_px) * 2 - 1)
    assert lips.shape == (2, 3, size_px, size_px)
    assert lips.abs().max() <= 1


@pytest.mark.parametrize(("size_px", "channels"), [(20, 16), (32, 6), (0, 16)])
def test_invalid_sizes_are_refused(size_px, channels):
    with pytest.raises(TccpError, match="a size that is a multiple of 8, channels of 4"):
        Liplet(size_px, channels)


def test_folder_round_trip_and_source(tmp_path):
    network = Liplet(SIZE, 8).eval()
    LipletSource(network).save(tmp_path / "liplet")
    assert sorted(path.suffix for path in (tmp_path / "liplet").iterdir()) == [".json", ".safetensors"]
    source = open_lip_source(LipSettings(source="liplet", size_px=SIZE), tmp_path / "liplet")
    assert source is not None
    assert source.hash == LipletSource(network).hash != LipletSource(Liplet(SIZE, 8)).hash

    rng = np.random.default_rng(0)
    mel = rng.normal(size=(40, 80, 16)).astype(np.float32)
    identity = rng.integers(256, size=(50, 50, 3), dtype=np.uint8)
    lips = source.lips(mel, identity)
    small = torch.from_numpy(identity_picture(identity, SIZE)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        expected = network(torch.from_numpy(mel), small.repeat(40, 1, 1, 1)).permute(0, 2, 3, 1)
    assert np.abs(lips - (expected.numpy() + 1) * 127.5).max() <= 0.51
    samples = rng.normal(size=16_000, scale=0.1).astype(np.float32)
    np.testing.assert_array_equal(source.windows(samples, 3, 4), mel_windows(samples, 3, 4))


def test_bad_folders_are_refused_with_the_cause(tmp_path):
    with pytest.raises(TccpError, match="not a folder with config"):
        load_liplet(tmp_path)
    Liplet(SIZE, 8).save_pretrained(tmp_path / "liplet")
    with pytest.raises(TccpError, match=r"makes 16 px pictures; lips\.size_px is 32"):
        open_lip_source(LipSettings(source="liplet", size_px=32), tmp_path / "liplet")
    (tmp_path / "liplet" / "diffusion_pytorch_model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(TccpError, match="liplet: cannot be loaded"):
        load_liplet(tmp_path / "liplet")


# --- training


def test_loss_gives_the_mouth_more_weight():
    target = torch.zeros(1, 3, 32, 32)
    region = torch.from_numpy(mouth_region(32))
    assert mouth_loss(target + 0.5, target) == pytest.approx(0.5)
    inside = mouth_loss(target + region, target) / region.sum()
    outside = mouth_loss(target + ~region, target) / (~region).sum()
    assert inside / outside == pytest.approx(5.0, rel=1e-4)


def test_augmentation_changes_both_pictures_of_a_person_equally():
    pictures = torch.rand(8, 3, SIZE, SIZE) - 0.5
    identity, mouths = augment(pictures, pictures.clone(), np.random.default_rng(0))
    assert torch.equal(identity, mouths)
    flipped = 0
    for before, after in zip(pictures, identity, strict=True):
        fits = []
        for image in (before, before.flip(-1)):
            slope = [np.corrcoef(image[c].flatten(), after[c].flatten())[0, 1] for c in range(3)]
            fits.append(min(slope))
        assert max(fits) > 0.99  # a linear tint of the picture or of its mirror image
        flipped += fits[1] > fits[0]
    assert 0 < flipped < 8


def test_training_depends_only_on_samples_settings_and_seed():
    lips = _settings().lips
    samples = collect_samples([_clip(1), _clip(2)], 2 * NUM_FRAMES, SIZE)
    assert samples.mel.shape == (2 * NUM_FRAMES, 80, 16)
    assert samples.identity_range[[0, -1]].tolist() == [[0, 1], [1, 2]]
    torch.manual_seed(1)
    first = LipletSource(train_liplet(samples, lips, seed=3)).hash
    torch.manual_seed(2)
    assert LipletSource(train_liplet(samples, lips, seed=3)).hash == first
    assert LipletSource(train_liplet(samples, lips, seed=4)).hash != first


def test_frames_without_landmarks_are_left_out():
    clip = _clip(1)
    confidence = clip.landmark_confidence.copy()
    confidence[:5] = 0
    assert len(collect_samples([replace(clip, landmark_confidence=confidence)], NUM_FRAMES, SIZE).mel) == NUM_FRAMES - 5
    with pytest.raises(TccpError, match="no frame of these clips shows a mouth"):
        collect_samples([replace(clip, landmark_confidence=confidence * 0)], NUM_FRAMES, SIZE)


def test_lips_of_unseen_clips_follow_the_sound():
    """On clips whose mouth follows loudness, held-out lips correlate with their own truth, not with another clip's."""
    lips = _settings(liplet_steps=400, liplet_batch_size=16, liplet_learning_rate=3e-3).lips
    clips = [_clip(seed) for seed in range(1, 7)]
    source = LipletSource(train_liplet(collect_samples(clips, 6 * NUM_FRAMES, SIZE), lips, seed=0))
    held_out = [_clip(seed) for seed in (11, 12)]
    dark = [255.0 - lip_pictures(clip, source)[:, mouth_region(SIZE)].mean((1, 2)) for clip in held_out]
    truth = [clip.landmarks[:, 66, 1] for clip in held_out]
    for i in range(2):
        assert np.corrcoef(dark[i], truth[i])[0, 1] > 0.9
        assert abs(np.corrcoef(dark[i], truth[1 - i])[0, 1]) < 0.5


@pytest.mark.slow
def test_lips_on_roundtable_follow_the_sound_of_unseen_people():
    """A linear probe reads the true mouth opening from lips made for the sound of unseen talkers."""
    train, held_out = ([_roundtable_clip(seed) for seed in seeds] for seeds in (range(10), range(100, 104)))
    settings = _settings(size_px=32, liplet_channels=16, liplet_steps=250, liplet_batch_size=32)
    lips = settings.lips.model_copy(update={"liplet_learning_rate": 3e-3})
    source = LipletSource(train_liplet(collect_samples(train, sum(c.num_frames for c in train), 32), lips, seed=0))

    def features(pictures: Sequence[np.ndarray | None]) -> np.ndarray:
        grey = np.stack([picture for picture in pictures if picture is not None]).mean(-1)
        return (grey / grey.mean((1, 2), keepdims=True)).reshape(len(grey), -1)

    mouths = [mouth for clip in train for mouth in mouths_of(clip, range(0, clip.num_frames, 2), 32)]
    seen = [mouth is not None for mouth in mouths]
    trained_on = np.concatenate([mouth_opening(clip.landmarks[::2]) for clip in train])[seen]
    probe = Ridge(alpha=10).fit(features(mouths), trained_on)
    opening = [probe.predict(features(list(lip_pictures(clip, source)))) for clip in held_out]
    truth = [mouth_opening(clip.landmarks) for clip in held_out]
    right, wrong = (
        np.mean([np.corrcoef(opening[i], truth[(i + shift) % 4])[0, 1] for i in range(4)]) for shift in (0, 1)
    )
    assert right > 0.85
    assert abs(wrong) < 0.35


# --- cross-fitting


def test_folds_keep_sources_together_and_ignore_order():
    sources = {f"clip{i}": f"source{i // 3}" for i in range(15)}
    folds = assign_folds(sources)
    assert folds == assign_folds(dict(reversed(sources.items())))
    by_source: dict[str, set[int]] = {}
    for clip_id, source in sources.items():
        by_source.setdefault(source, set()).add(folds[clip_id])
    assert all(len(seen) == 1 for seen in by_source.values())
    assert sorted(folds.values()).count(0) in (6, 9)

    one_source = assign_folds({f"clip{i}": "the only one" for i in range(9)})
    assert sorted(one_source.values()).count(0) in (4, 5)
    with pytest.raises(TccpError, match="needs 2 clips or more, given 1"):
        assign_folds({"clip": "source"})


def test_no_network_is_trained_on_the_clips_it_serves(tmp_path):
    """If all clips of fold 0 change, the network that serves fold 0 stays the same and the other one changes."""
    clips = [_clip(seed) for seed in range(1, 5)]
    settings = _settings()
    before = train_liplets(_table(clips, tmp_path), settings, tmp_path / "before", seed=0)
    folds = json.loads((before / "folds.json").read_text())["folds"]
    assert set(folds.values()) == {0, 1}
    changed = []
    for clip in clips:
        other = _clip(int(clip.start_s) + 50)
        other = replace(other, clip_id=clip.clip_id, source_hash=clip.source_hash)
        changed.append(other if folds[clip.clip_id] == 0 else clip)
    after = train_liplets(_table(changed, tmp_path, "changed.parquet"), settings, tmp_path / "after", seed=0)

    old, new = (open_lip_sources(settings.lips, folder) for folder in (before, after))
    assert old is not None
    assert new is not None
    assert old.sources[0].hash == new.sources[0].hash  # serves fold 0, trained on fold 1
    assert old.sources[1].hash != new.sources[1].hash
    for clip in clips:
        assert old.for_clip(clip.clip_id, clip.source_hash) is old.sources[folds[clip.clip_id]]
    assert old.for_new_footage is old.sources[0]
    assert old.hash != new.hash


def test_unknown_clips_get_a_network_not_trained_on_their_file(tmp_path):
    clips = [_clip(seed) for seed in (1, 2)]
    settings = _settings()
    sources = open_lip_sources(settings.lips, train_liplets(_table(clips, tmp_path), settings, tmp_path / "a", seed=0))
    assert sources is not None
    for clip in clips:
        expected = sources.for_clip(clip.clip_id, clip.source_hash)
        assert sources.for_clip("another cut", clip.source_hash) is expected
    assert sources.for_clip("another cut", "another file") is sources.for_new_footage

    same_file = [_clip(seed, "file") for seed in (1, 2)]
    folder = train_liplets(_table(same_file, tmp_path, "same.parquet"), settings, tmp_path / "b", seed=0)
    sources = open_lip_sources(settings.lips, folder)
    assert sources is not None
    with pytest.raises(TccpError, match="all of them were trained on other clips of the same file"):
        sources.for_clip("another cut", "file")


def test_complete_folds_are_kept_and_missing_ones_are_retrained(tmp_path):
    table, settings = _table([_clip(1), _clip(2)], tmp_path), _settings()
    done = []
    folder = train_liplets(table, settings, tmp_path / "lips", 0, lambda fold, step, loss: done.append((fold, step)))
    assert done == [(fold, step) for fold in (0, 1) for step in (1, 2, 3)]
    first = open_lip_sources(settings.lips, folder)
    assert first is not None
    for path in (folder / "fold_1").iterdir():
        path.unlink()
    (folder / "fold_1").rmdir()
    with pytest.raises(TccpError, match="fold_1: not a folder with config"):
        open_lip_sources(settings.lips, folder)
    done.clear()
    train_liplets(table, settings, folder, 0, lambda fold, step, loss: done.append((fold, step)))
    assert {fold for fold, _ in done} == {1}
    second = open_lip_sources(settings.lips, folder)
    assert second is not None
    assert second.hash == first.hash
    assert not list(folder.glob(".*"))
    with pytest.raises(TccpError, match="holds liplets of other clips, settings or seed"):
        train_liplets(table, settings, folder, seed=1)
    with pytest.raises(TccpError, match="holds no cross-fitted liplets"):
        open_lip_sources(settings.lips, tmp_path / "nowhere")
    assert open_lip_sources(LipSettings(source="none"), None) is None


def test_lips_depend_only_on_sound_and_identity(tmp_path):
    """The faces, scenes and landmarks of a clip do not affect its lips."""
    clip, other = _clip(1), _clip(2)
    source = LipletSource(Liplet(SIZE, 8))
    lips = lip_pictures(clip, source)
    retargeted = replace(
        clip, face=other.face, scene=other.face, landmarks=other.landmarks, head_box=other.head_box + 3
    )
    np.testing.assert_array_equal(lip_pictures(retargeted, source), lips)
    assert (lip_pictures(replace(clip, audio=other.audio), source) != lips).any()
    assert (lip_pictures(replace(clip, identity=other.identity), source) != lips).any()


def test_lip_table_renders_each_clip_once_and_reads_frame_ranges(tmp_path):
    table, settings = _table([_clip(1), _clip(2)], tmp_path), _settings()
    sources = open_lip_sources(settings.lips, train_liplets(table, settings, tmp_path / "lips", seed=0))
    assert sources is not None
    lips = LipTable(tmp_path / "table", sources)
    with pytest.raises(TccpError, match="render the lip table"):
        lips.read(table.ids[0])
    seen = []
    assert lips.write(table, lambda done, of: seen.append((done, of))) == 2
    assert seen == [(1, 2), (2, 2)]
    assert lips.write(table) == 0
    for clip in table:
        whole = lip_pictures(clip, sources.for_clip(clip.clip_id, clip.source_hash))
        np.testing.assert_array_equal(lips.read(clip.clip_id), whole)
        np.testing.assert_array_equal(lips.read(clip.clip_id, 5, 8), whole[5:13])
        with pytest.raises(TccpError, match="frames 20 to 28"):
            lips.read(clip.clip_id, 20, 8)
    assert {path.suffix for path in (tmp_path / "table" / sources.hash).iterdir()} == {".npy"}
