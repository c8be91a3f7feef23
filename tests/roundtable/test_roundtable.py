"""RoundTable: truth matches pictures, sound determines the mouth, and nothing outside the head box leaks the answer."""

from __future__ import annotations

import contextlib
import dataclasses
import subprocess
import sys

import cv2
import numpy as np
import pytest
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

from tccp.config import SAMPLES_PER_FRAME
from tccp.errors import TccpError
from tccp.media import open_audio, probe, read_frames
from tccp.media.mel import mel_windows
from tccp.roundtable import (
    Truth,
    identity_path,
    make_person,
    read_identity,
    read_truth,
    synthesise,
    truth_path,
    write_clips,
)
from tccp.roundtable.head import Expression, landmarks_3d
from tccp.roundtable.motion import drift, follow
from tccp.roundtable.people import HAIR_STYLES
from tccp.roundtable.voice import Voice, speak


@pytest.fixture(scope="module")
def short_film(tmp_path_factory):
    """A film of ten frames."""
    (path,) = write_clips(tmp_path_factory.mktemp("film"), 1, 0.4, width=128, height=96)
    return path


def same_truth(first: Truth, second: Truth) -> bool:
    return all(
        np.array_equal(getattr(first, field.name), getattr(second, field.name)) for field in dataclasses.fields(Truth)
    )


def outside(picture: np.ndarray, box: np.ndarray) -> np.ndarray:
    x0, y0, x1, y1 = box.astype(int)
    rest = picture.copy()
    rest[y0:y1, x0:x1] = 0
    return rest


ALONE_WITH_LISTENER = (0, 3, 11)
"""Seeds of clips with one other person; in the last clip that person moves."""


# -- determinism ------------------------------------------------------------------------------------------------------


def test_seed_determines_the_clip_bit_for_bit_in_any_process():
    script = (
        "import hashlib\nfrom tccp.roundtable import synthesise\nclip = synthesise(11, 0.4)\n"
        "parts = [clip.audio, clip.landmarks_px, clip.identity, *clip.frames()]\n"
        "print(hashlib.sha256(b''.join(part.tobytes() for part in parts)).hexdigest())"
    )
    hashes = {subprocess.check_output([sys.executable, "-c", script], text=True) for _ in range(2)}
    assert len(hashes) == 1
    assert not np.array_equal(synthesise(11, 0.4).render(0), synthesise(12, 0.4).render(0))


def test_frames_do_not_depend_on_the_rendering_order():
    clip = synthesise(3, 0.4)
    forwards = list(clip.frames())
    assert all(np.array_equal(clip.render(i), forwards[i]) for i in (7, 2, 7, 0))


def test_person_seed_puts_the_same_person_in_another_scene():
    first, second = synthesise(1, 0.2, person_seed=5), synthesise(2, 0.2, person_seed=5)
    assert first.person_id == second.person_id == make_person(5).person_id
    assert first.scene.talker.model.person == second.scene.talker.model.person
    assert first.scene.talker.outfit != second.scene.talker.outfit
    assert not np.array_equal(first.identity, second.identity)
    # Another person does not change the scene.
    other = synthesise(1, 0.2, person_seed=6)
    assert np.array_equal(other.target_deg, first.target_deg)
    assert np.array_equal(other.head_box, first.head_box)


def test_longer_clip_has_the_same_person_and_room():
    short, long = synthesise(8, 0.4), synthesise(8, 4.0)
    assert short.person_seed == long.person_seed
    assert np.array_equal(short.scene.room.picture, long.scene.room.picture)


# -- shapes and refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seconds", "num_frames"), [(0.04, 1), (0.5, 12), (1.0, 25)])
def test_sound_and_tracks_match_the_number_of_frames(seconds, num_frames):
    clip = synthesise(4, seconds, width=320, height=240)
    assert clip.num_frames == num_frames
    assert clip.audio.shape == (num_frames * SAMPLES_PER_FRAME,)
    assert clip.landmarks_px.shape == (num_frames, 68, 2)
    assert clip.render(num_frames - 1).shape == (240, 320, 3)
    assert 0.01 < np.abs(clip.audio).max() < 1 or num_frames == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": 0, "seconds": 0.0}, "at least one frame"),
        ({"seed": 0, "seconds": 1.0, "width": 100}, "128x96"),
        ({"seed": 0, "seconds": 1.0, "width": 257}, "even"),
        ({"seed": -1, "seconds": 1.0}, "give seeds of at least 0"),
    ],
)
def test_invalid_arguments_are_refused_with_the_allowed_values(arguments, message):
    with pytest.raises(TccpError, match=message):
        synthesise(**arguments)


def test_a_frame_beyond_the_end_is_refused():
    with pytest.raises(TccpError, match="frames 0 to 4"):
        synthesise(0, 0.2).render(5)


# -- truth against pictures -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_pixels_outside_the_head_box_do_not_depend_on_yaw_or_mouth(seed):
    clip = synthesise(seed, 0.2)
    for yaw in (-65.0, 0.0, 65.0):
        other = clip.with_head(
            yaw_deg=np.full(clip.num_frames, yaw, np.float32),
            mouth_opening=np.ones(clip.num_frames, np.float32),
            mouth_width=np.zeros(clip.num_frames, np.float32),
        )
        assert np.array_equal(other.head_box, clip.head_box)
        drawn, redrawn = clip.render(2), other.render(2)
        assert not np.array_equal(drawn, redrawn)
        assert np.array_equal(outside(drawn, clip.head_box[2]), outside(redrawn, clip.head_box[2]))


@pytest.mark.parametrize("style", HAIR_STYLES)
def test_every_hair_style_stays_in_the_head_box(style):
    seed = next(seed for seed in range(400) if make_person(seed).hair_style == style)
    clip = synthesise(30, 0.2, person_seed=seed)
    nod = np.full(clip.num_frames, 14, np.float32)
    turns = [clip.with_head(np.full_like(nod, yaw), pitch) for yaw in (-65, 0, 65) for pitch in (-nod, nod)]
    rests = [outside(turn.render(2), clip.head_box[2]) for turn in turns]
    assert all(np.array_equal(rests[0], rest) for rest in rests[1:])


@pytest.mark.parametrize("seed", [2, 5, 9])
def test_head_box_is_a_steady_integer_square_around_all_landmarks(seed):
    clip = synthesise(seed, 4.0)
    sides = clip.head_box[:, 2:] - clip.head_box[:, :2]
    assert 64 <= sides[0, 0] <= 80
    assert (sides == sides[0, 0]).all()
    assert np.array_equal(clip.head_box, np.rint(clip.head_box))
    assert np.abs(np.diff(clip.head_box, axis=0)).max() <= 2
    inside = (clip.landmarks_px - clip.head_box[:, None, :2]) / sides[:, None]
    assert inside.min() > 0.03
    assert inside.max() < 0.97


def test_landmarks_match_the_drawn_mouth():
    """Pixels that change with the mouth lie near its landmarks; pixels between lip landmarks have the lips' colour."""
    clip = synthesise(14, 2.0)
    frame = int(np.argmax(clip.mouth_opening))
    lips = np.array(clip.scene.talker.model.person.lips)
    picture = clip.render(frame).astype(int)
    points = clip.landmarks_px[frame]
    # Points midway between inner and outer lip are on the lip; the middle of an open mouth is not.
    for outer, inner in ((51, 62), (57, 66)):
        x, y = (points[outer] + points[inner]) / 2
        assert np.abs(picture[int(y), int(x)] - lips).max() < 60
    x, y = points[62] + 0.55 * (points[66] - points[62])
    assert np.abs(picture[int(y), int(x)] - lips).max() > 25

    shut = clip.with_head(mouth_opening=np.zeros(clip.num_frames, np.float32))
    changed = np.argwhere(np.abs(picture - shut.render(frame)).max(axis=-1) > 24)[:, ::-1]
    moved = np.concatenate([points[:17], points[48:68], shut.landmarks_px[frame][48:68]])
    assert (changed + 0.5 >= moved.min(axis=0) - 2).all()
    assert (changed + 0.5 <= moved.max(axis=0) + 2).all()


def test_landmarks_turn_like_a_rigid_head():
    """Yaw moves rigid points along x by z sin(yaw): the tip of the nose moves further than the eye corners."""
    clip = synthesise(1, 0.2)
    flat, turned = (clip.with_head(yaw_deg=np.full(clip.num_frames, yaw, np.float32)) for yaw in (0.0, 30.0))
    shift = (turned.landmarks_px - flat.landmarks_px)[..., 0]
    assert (shift[:, 30] > shift[:, 27]).all()
    assert (shift[:, 27] > shift[:, 36]).all()
    eyes = turned.landmarks_px[:, 45, 0] - turned.landmarks_px[:, 36, 0]
    flat_eyes = flat.landmarks_px[:, 45, 0] - flat.landmarks_px[:, 36, 0]
    np.testing.assert_allclose(eyes / flat_eyes, np.cos(np.deg2rad(30)), atol=0.02)


def test_landmarks_follow_mouth_opening_mouth_width_and_blinks():
    values = np.linspace(0, 1, 11).astype(np.float32)
    rest = np.zeros(11, np.float32)
    person = make_person(3)
    opened = landmarks_3d(person, Expression(values, rest + 0.5, rest, rest))
    gap = opened[:, 66, 1] - opened[:, 62, 1]
    np.testing.assert_allclose(np.diff(gap), np.diff(gap)[0], rtol=1e-5)
    widened = landmarks_3d(person, Expression(rest, values, rest, rest))
    span = widened[:, 54, 0] - widened[:, 48, 0]
    np.testing.assert_allclose(np.diff(span), np.diff(span)[0], rtol=1e-5)
    assert span[-1] > 1.5 * span[0]
    blinking = landmarks_3d(person, Expression(rest, rest, rest, values))
    lids = blinking[:, 41, 1] - blinking[:, 37, 1]
    assert lids[-1] < 0.15 * lids[0]


# -- sound and mouth --------------------------------------------------------------------------------------------------


def test_mel_determines_the_mouth():
    """A linear readout of mel windows, fitted on some voices, predicts the mouth of others, not of another clip."""

    def examples(seeds):
        windows, mouths = [], []
        for seed in seeds:
            rng = np.random.default_rng(seed)
            speech = speak(rng, make_person(seed).voice, 200)
            windows.append(np.asarray(mel_windows(speech.audio, 0, 200)).reshape(200, -1))
            mouths.append(np.stack([speech.opening, speech.width], axis=-1))
        return np.concatenate(windows), np.concatenate(mouths)

    train_x, train_y = examples(range(24))
    test_x, test_y = examples(range(100, 108))
    scaler = StandardScaler().fit(train_x)
    read = Ridge(3000.0).fit(scaler.transform(train_x), train_y).predict(scaler.transform(test_x))
    opening, width = (np.corrcoef(read[:, k], test_y[:, k])[0, 1] for k in (0, 1))
    wrong_clip = np.corrcoef(np.roll(read[:, 0], 200), test_y[:, 0])[0, 1]
    print(f"mouth from mel, linear: opening {opening:.3f}, width {width:.3f}, another clip's {wrong_clip:.3f}")
    assert opening > 0.9
    assert width > 0.85
    assert abs(wrong_clip) < 0.3


def test_mouth_follows_only_sound_within_the_mel_window():
    """Sounds that differ only after time t give the same mouth until 0.1 s before t."""
    voice = Voice(120.0, 1.0, 1.0, 0.02)
    one = speak(np.random.default_rng(5), voice, 100)
    other = speak(np.random.default_rng(5), dataclasses.replace(voice, rate=1.01), 100)
    apart = np.flatnonzero(np.abs(one.opening - other.opening) > 1e-6)[0]
    sound = np.flatnonzero(np.abs(one.audio - other.audio) > 1e-3)[0]
    assert apart / 25 >= sound / 16_000 - 0.1


def test_mouth_is_closed_in_silence():
    clip = synthesise(6, 8.0)
    loudness = np.sqrt((clip.audio.reshape(-1, SAMPLES_PER_FRAME) ** 2).mean(axis=1))
    quiet = np.convolve(loudness > 2e-3, np.ones(7), mode="same") == 0
    assert quiet.sum() > 5
    assert clip.mouth_opening[quiet].max() < 0.02
    assert clip.mouth_opening.max() > 0.8


@pytest.mark.parametrize("f0_hz", [100.0, 200.0])
def test_voice_has_the_requested_pitch(f0_hz):
    speech = speak(np.random.default_rng(2), Voice(f0_hz, 1.0, 1.0, 0.0), 150)
    blocks = speech.audio.reshape(150, SAMPLES_PER_FRAME)
    loud = blocks[np.argsort((blocks**2).sum(axis=1))[-40:]]
    lags = np.arange(16_000 // 400, 16_000 // 70)
    peaks = [lags[np.argmax([np.dot(b[:-lag], b[lag:]) / len(b[lag:]) for lag in lags])] for b in loud]
    assert 0.85 * f0_hz < 16_000 / np.median(peaks) < 1.5 * f0_hz


def test_stress_raises_loudness_brows_and_head_pitch():
    clips = [synthesise(seed, 8.0) for seed in range(6)]
    stress = np.concatenate([clip.stress for clip in clips])
    loudness = np.concatenate([np.log((c.audio.reshape(-1, SAMPLES_PER_FRAME) ** 2).mean(axis=1)) for c in clips])
    speaking = np.concatenate([clip.mouth_opening > 0.2 for clip in clips])
    assert np.corrcoef(stress[speaking], loudness[speaking])[0, 1] > 0.4
    for clip in clips:
        points = clip.landmarks_px
        brow = (points[:, [36, 45], 1].mean(axis=1) - points[:, 17:27, 1].mean(axis=1)) / np.ptp(clip.head_box[:, ::2])
        assert np.corrcoef(brow, clip.stress)[0, 1] > 0.3
        assert np.corrcoef(clip.pitch_deg, clip.stress)[0, 1] > 0.3


# -- the conversation -------------------------------------------------------------------------------------------------


def test_addressee_changes_or_moves_in_half_of_the_clips():
    kinds = [synthesise(seed, 0.2).kind for seed in range(120)]
    assert 0.4 < np.mean([kind != "still" for kind in kinds]) < 0.6
    assert {"change", "move"} <= set(kinds)


def test_head_turns_to_the_addressee_after_a_lag():
    moving = [clip for clip in (synthesise(seed, 4.0) for seed in range(30)) if clip.kind != "still"]
    for clip in moving:
        assert 0.2 <= clip.lag_s <= 0.5
        event = round(float(clip.event_s[0]) * 25)
        before, after = clip.target_deg[event - 1], clip.target_deg[min(event + 28, clip.num_frames - 1)]
        assert abs(after - before) > 8
        # During the lag, only drift moves the head; then it follows the addressee.
        waiting = clip.yaw_deg[event : event + round(clip.lag_s * 25)]
        assert np.abs(waiting - waiting[0]).max() < 0.25 * abs(after - before) + 4
    error = np.concatenate([(clip.yaw_deg - follow(clip.target_deg, clip.lag_s, 0.5)) for clip in moving])
    assert np.sqrt((error**2).mean()) < 4
    sides = np.concatenate([np.sign(clip.target_deg) == clip.listener_side for clip in moving])
    assert sides.all()


def test_addressee_is_in_the_scene_on_the_listener_side():
    for seed in range(20):
        clip = synthesise(seed, 1.0)
        middle = clip.head_box[:, ::2].mean(axis=1)
        box = clip.others_box[np.arange(clip.num_frames), clip.addressee]
        at = box[:, ::2].mean(axis=1)
        assert (np.sign(at - middle) == clip.listener_side).all()
        assert at.min() > 0
        assert at.max() < clip.width


@pytest.mark.parametrize("seed", range(10))
def test_other_people_do_not_overlap_the_head_box(seed):
    """Otherwise a generated head would include another person's shoulder, and the crop would leak their position."""
    clip = synthesise(seed, 2.0)
    alone = dataclasses.replace(clip, scene=dataclasses.replace(clip.scene, others=()))
    for frame in (0, 49):
        x0, y0, x1, y1 = clip.head_box[frame].astype(int)
        drawn, empty = clip.render(frame), alone.render(frame)
        assert not np.array_equal(drawn, empty)
        assert np.array_equal(drawn[y0:y1, x0:x1], empty[y0:y1, x0:x1])


def test_follow_is_causal_monotonic_and_reaches_its_target():
    target = np.concatenate([np.zeros(20), np.ones(40)])
    followed = follow(target, 0.4, 0.5)
    assert followed.shape == target.shape
    assert (followed[:30] == 0).all()
    assert np.flatnonzero(followed > 0.5)[0] in range(34, 39)
    np.testing.assert_allclose(followed[45:], 1)
    assert (np.diff(followed) >= -1e-12).all()


def test_drift_has_the_requested_size():
    tracks = np.stack([drift(np.random.default_rng(seed), 500, 3.0) for seed in range(60)])
    assert np.sqrt((tracks**2).mean()) == pytest.approx(3.0, rel=0.1)
    assert np.abs(np.diff(tracks, axis=1)).max() < 3.0


# -- the counterfactual: only the listener moves -----------------------------------------------------------------------


@pytest.mark.parametrize("seed", ALONE_WITH_LISTENER)
@pytest.mark.parametrize("listener_deg", [-52.0, -24, 35.0])
def test_only_the_listener_and_the_head_turn_change(seed, listener_deg):
    clip = synthesise(seed, 1.2)
    moved = synthesise(seed, 1.2, listener_deg=listener_deg)
    turning = {"yaw_deg", "pitch_deg", "landmarks_px", "target_deg", "listener_side", "others_box", "kind", "event_s"}
    for field in dataclasses.fields(Truth):
        same = np.array_equal(getattr(clip, field.name), getattr(moved, field.name))
        assert same or field.name in turning, field.name
    assert np.array_equal(clip.audio, moved.audio)
    assert np.array_equal(clip.identity, moved.identity)
    for frame in (0, 29):
        drawn, redrawn = clip.render(frame), moved.render(frame)
        listener = np.zeros(drawn.shape[:2], bool)
        for version, picture in ((clip, drawn), (moved, redrawn)):
            alone = dataclasses.replace(version, scene=dataclasses.replace(version.scene, others=()))
            listener |= (alone.render(frame) != picture).any(-1)
        assert 0.02 < listener.mean() < 0.7
        assert not np.array_equal(drawn[listener], redrawn[listener])
        for picture in (drawn, redrawn):
            picture[listener] = 0
        assert np.array_equal(outside(drawn, clip.head_box[frame]), outside(redrawn, clip.head_box[frame]))


@pytest.mark.parametrize("seed", ALONE_WITH_LISTENER)
def test_yaw_follows_the_moved_listener(seed):
    bearings = (-60.0, -40.0, -20.0, 20.0, 40.0, 60.0)
    clips = [synthesise(seed, 1.2, listener_deg=bearing) for bearing in bearings]
    for clip, bearing in zip(clips, bearings, strict=True):
        assert (clip.kind, len(clip.event_s)) == ("still", 0)
        np.testing.assert_allclose(clip.target_deg, bearing, atol=1e-4)
        assert (clip.listener_side == np.sign(bearing)).all()
        middle = clip.head_box[:, ::2].mean(axis=1)
        assert (np.sign(clip.others_box[:, 0, ::2].mean(axis=1) - middle) == np.sign(bearing)).all()
        # The rest of the yaw is the head's own drift, which does not depend on the listener's position.
        np.testing.assert_allclose(clip.yaw_deg - bearing, clips[0].yaw_deg - bearings[0], atol=1e-3)
        assert np.abs(clip.yaw_deg - bearing).max() < 6


def test_listener_out_of_range_or_one_of_several_is_refused():
    for bearing in (-61, 0, 19.9):
        with pytest.raises(TccpError, match="20 to 60 degrees"):
            synthesise(ALONE_WITH_LISTENER[0], 0.2, listener_deg=bearing)
    seed = next(seed for seed in range(50) if synthesise(seed, 0.2).others_box.shape[1] == 2)
    with pytest.raises(TccpError, match="has 2: take another seed"):
        synthesise(seed, 0.2, listener_deg=30)


# -- files ------------------------------------------------------------------------------------------------------------


def test_written_films_have_sound_truth_and_identity(tmp_path):
    progress = []
    paths = write_clips(tmp_path / "a", 3, 0.6, seed=7, people=2, progress=lambda *step: progress.append(step))
    assert progress[-1] == (paths[-1].name, 15, 15)
    info = probe(paths[0])
    assert (info.width, info.height, info.num_frames) == (256, 192, 15)
    truth = read_truth(paths[0])
    assert truth.person_id == read_truth(paths[2]).person_id != read_truth(paths[1]).person_id
    again = synthesise(truth.seed, 0.6, person_seed=truth.person_seed)
    assert same_truth(truth, again)
    assert np.array_equal(read_identity(paths[0]), again.identity)
    frames = list(read_frames(paths[0]))
    assert np.abs(frames[9].astype(int) - again.render(9)).mean() < 3
    with open_audio(paths[0]) as track:
        heard = np.asarray(track.samples[: len(again.audio)])
    assert np.corrcoef(heard, again.audio[: len(heard)])[0, 1] > 0.97
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == sorted(
        f(p).name for p in paths for f in (lambda p: p, truth_path, identity_path)
    )


def test_lossless_films_reproduce_the_rendered_pixels(tmp_path):
    (path,) = write_clips(tmp_path, 1, 0.2, seed=1, lossless=True)
    truth = read_truth(path)
    clip = synthesise(truth.seed, 0.2, person_seed=truth.person_seed)
    for read, drawn in zip(read_frames(path), clip.frames(), strict=True):
        assert np.array_equal(read, drawn)


def test_excerpt_equals_part_of_the_whole_clip(tmp_path):
    paths = write_clips(tmp_path, 4, 1.6, seed=3, lossless=True, excerpt_s=0.24)
    starts = []
    for path in paths:
        truth = read_truth(path)
        whole = synthesise(truth.seed, 1.6, person_seed=truth.person_seed)
        (start,) = [k for k in range(35) if np.array_equal(whole.landmarks_px[k : k + 6], truth.landmarks_px)]
        starts.append(start)
        assert same_truth(truth, whole.between(start, start + 6))
        assert np.allclose(truth.event_s, whole.event_s - start / 25)
        for frame, read in enumerate(read_frames(path)):
            assert np.array_equal(read, whole.render(start + frame))
        with open_audio(path) as track:
            heard = np.asarray(track.samples[:3840])
        assert np.corrcoef(heard, whole.audio[640 * start : 640 * start + len(heard)])[0, 1] > 0.97
    assert len(set(starts)) > 1
    with pytest.raises(TccpError, match="at most the whole clip"):
        write_clips(tmp_path, 1, 0.2, excerpt_s=0.4)


def test_missing_and_broken_files_are_named_in_the_error(tmp_path):
    with pytest.raises(TccpError, match=r"x\.truth\.npz: no such truth file"):
        read_truth(tmp_path / "x.mp4")
    (tmp_path / "y.truth.npz").write_bytes(b"not a zip")
    with pytest.raises(TccpError, match=r"y\.truth\.npz: not a RoundTable truth file"):
        read_truth(tmp_path / "y.mp4")
    np.savez(tmp_path / "z.truth.npz", seed=1)
    with pytest.raises(TccpError, match=r"z\.truth\.npz: not a RoundTable truth file"):
        read_truth(tmp_path / "z.truth.npz")
    with pytest.raises(TccpError, match=r"x\.identity\.png: no readable picture"):
        read_identity(tmp_path / "x.mp4")


def test_unwritable_folder_and_zero_clips_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TccpError, match="choose another"):
        write_clips(tmp_path / "file" / "folder", 1, 0.2)
    with pytest.raises(TccpError, match="at least 1"):
        write_clips(tmp_path, 0, 0.2)


def test_identity_has_the_same_skin_and_another_background():
    clip = synthesise(2, 0.2)
    assert clip.identity.shape == (128, 128, 3)
    x0, y0, x1, y1 = clip.head_box[0].astype(int)
    crop = cv2.resize(clip.render(0)[y0:y1, x0:x1], (128, 128))
    skin = np.array(clip.scene.talker.model.person.skin)

    def skin_share(picture):
        return (np.abs(picture.astype(int) - skin).max(axis=-1) < 12).mean()

    assert skin_share(clip.identity) > 0.05
    assert skin_share(crop) > 0.05
    assert np.abs(clip.identity[:8].astype(int).mean(axis=(0, 1)) - crop[:8].mean(axis=(0, 1))).max() > 5


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"landmarks_px": np.full((10, 68, 2), 1e30, np.float32)}, "a position is not a number of pixels"),
        ({"head_box": np.full((10, 4), np.nan, np.float32)}, "a position is not a number of pixels"),
        ({"head_box": np.tile(np.array([9, 9, 9, 20], np.float32), (10, 1))}, "a head box is empty"),
        ({"head_box": np.zeros((3, 4), np.float32)}, "frames|shape|check"),
        ({"landmarks_px": np.zeros((10, 5, 2), np.float32)}, "shape|check"),
        ({"width": np.array(10**9)}, "a picture of 1000000000x"),
        ({"width": np.array(np.inf)}, "cannot convert float infinity"),
        ({"kind": np.arange(3)}, "array of size 1"),
    ],
)
def test_impossible_truth_is_refused_in_one_line(short_film, tmp_path, changes, reason):
    with np.load(truth_path(short_film)) as stored:
        values = dict(stored) | changes
    np.savez(tmp_path / "film.truth.npz", **values)
    with pytest.raises(TccpError, match=rf"film\.truth\.npz: not a RoundTable truth file .*({reason})") as caught:
        read_truth(tmp_path / "film.mp4")
    assert "\n" not in str(caught.value)


def test_damaged_truth_is_refused(short_film, tmp_path):
    """Every tenth byte in turn: the file's directory, its headers and its compressed data."""
    whole = truth_path(short_film).read_bytes()
    for place in range(0, len(whole), max(len(whole) // 60, 1)):
        damaged = bytearray(whole)
        damaged[place] ^= 0x5A
        (tmp_path / "film.truth.npz").write_bytes(damaged)
        with contextlib.suppress(TccpError):
            read_truth(tmp_path / "film.mp4")


def test_numbers_of_clips_and_people_are_named_as_given(tmp_path):
    with pytest.raises(TccpError, match=r"^0 clips: give at least 1$"):
        write_clips(tmp_path, 0, 1.0)
    with pytest.raises(TccpError, match=r"^2 clips of 0 people: give at least 1 of each$"):
        write_clips(tmp_path, 2, 1.0, people=0)
