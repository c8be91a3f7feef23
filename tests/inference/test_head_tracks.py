"""Head tracks from masks, boxes, track files, truth files and detectors."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import generated, pictures, request_of, write_film, write_track

from tccp import faces, headbox
from tccp.errors import TccpError
from tccp.inference.head_tracks import (
    HeadTrack,
    find_cuts,
    square_box,
    track_from_boxes,
    track_from_detector,
    track_from_mask,
    track_from_truth,
)
from tccp.inference.pipeline import generate_film
from tccp.media import VideoWriter, probe, read_frames, write_audio_wav
from tccp.media.sandbox import Decoder
from tccp.roundtable import read_truth

pytest_plugins = ["tiny_fixtures"]


@pytest.fixture(scope="module")
def short_sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sound") / "sound.wav"
    write_audio_wav(path, 0.3 * np.sin(np.arange(8 * 640) / 9))
    return path


def masks_of(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """Mask pictures: white boxes on black."""
    shown = [headbox.mask_from_box(box, height, width) for box in boxes]
    return np.repeat((np.stack(shown) * 255).astype(np.uint8)[..., None], 3, axis=3)


def test_mask_box_and_truth_give_the_same_film(film: Path, weights: Path, short_sound: Path, tmp_path: Path) -> None:
    boxes = read_truth(film).head_box
    steady = np.tile(boxes[:1], (len(boxes), 1))
    info = probe(film)
    ways: dict[str, dict[str, Any]] = {
        "truth": {"truth": True},
        "track": {"box": str(write_track(tmp_path / "track.json", boxes.tolist(), []))},
        "mask": {"mask": write_film(tmp_path / "white.mp4", masks_of(boxes, info.height, info.width))},
        "box": {"box": ",".join(str(edge) for edge in boxes[0])},
        "steady": {"mask": write_film(tmp_path / "white_box.mp4", masks_of(steady, info.height, info.width))},
    }
    films = {}
    for name, way in ways.items():
        generated(film, weights, tmp_path / f"{name}.mp4", audio=short_sound, steps=1, **way)
        films[name] = pictures(tmp_path / f"{name}.mp4")
    assert np.array_equal(films["truth"], films["track"])
    assert np.array_equal(films["truth"], films["mask"])
    assert np.array_equal(films["box"], films["steady"])


def test_a_lossy_mask_gives_the_same_boxes(film: Path, tmp_path: Path, decoder: Decoder) -> None:
    boxes, info = read_truth(film).head_box, probe(film)
    with VideoWriter(tmp_path / "mask.mp4", info.width, info.height) as writer:
        for frame in masks_of(boxes, info.height, info.width):
            writer.write(frame)
    assert np.array_equal(track_from_mask(info, tmp_path / "mask.mp4", decoder).boxes, boxes)


def test_frames_without_a_mask_have_no_box(film: Path, tmp_path: Path, decoder: Decoder) -> None:
    boxes, info = read_truth(film).head_box, probe(film)
    masks = masks_of(boxes, info.height, info.width)
    masks[[0, 7, 24]] = 0
    track = track_from_mask(info, write_film(tmp_path / "mask.mp4", masks), decoder)
    assert [i for i in range(25) if track.box(i) is None] == [0, 7, 24]
    assert track.cuts is None


@given(
    st.tuples(st.floats(-30, 127), st.floats(-30, 95), st.floats(2.1, 200), st.floats(2.1, 200)).filter(
        lambda box: box[0] + box[2] > 0.5 and box[1] + box[3] > 0.5
    )
)
def test_any_box_becomes_the_smallest_whole_square_around_it(box: tuple[float, float, float, float]) -> None:
    x, y, width, height = box
    given_box = np.array([x, y, x + width, y + height])
    square = square_box(given_box, 128, 96, "--box")
    assert np.array_equal(square, np.rint(square))
    side = square[2] - square[0]
    assert side == square[3] - square[1]
    assert (square[:2] <= given_box[:2] + 1e-3).all() and (square[2:] >= given_box[2:] - 1e-3).all()
    assert max(width, height) - 2e-3 <= side < max(width, height) + 2
    assert np.array_equal(square_box(square.astype(np.float64), 128, 96, "--box"), square)


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ("200,10,240,50", r"--box 200,10,240,50: box \[200.*outside the picture of 128x96"),
        ("-60,-60,-20,-20", "outside the picture"),
        (
            "0.1,0.1,0.4,0.4",
            r"no head box .*: it is 0.3x0.3 pixels; give pixels, not shares .* at least 2 on",
        ),
        ("50,50,20,80", "no head box .*: give x0,y0,x1,y1 in pixels with x0 < x1 and y0 < y1"),
        ("50,50,80,50", "no head box .*: give .* with x0 < x1 and y0 < y1"),
        ("nan,1,20,20", "no head box .*: give four finite numbers"),
        ("0,0,1e9,1e9", r"no head box .*: it is 1e\+09x1e\+09 pixels; give at most 512 on each side"),
        ("-1e308,0,1e308,9", "no head box .*: it is infx9 pixels; give at most 512"),
        ("1,2,3", "four numbers"),
        ("nowhere.json", "nowhere.json is neither a box nor a track file"),
    ],
)
def test_invalid_boxes_are_refused(film: Path, box: str, message: str) -> None:
    with pytest.raises(TccpError, match=message):
        track_from_boxes(probe(film), box)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"boxes": [[1, 2, 40, 41]] * 24}, "has 24 frames, .* has 25"),
        ({"boxes": [None] * 25}, "no head in any frame"),
        ({"boxes": [[1, 2, 40]] * 25}, "neither a box nor a track file"),
        ({"boxes": [[500, 2, 540, 42]] * 25}, "frame 0: box .* outside"),
        ({"boxes": 5}, "neither a box nor a track file"),
        ({"boxes": [[1, 2, 40, 41]] * 25, "cuts": "x"}, "neither a box nor a track file"),
        ({"boxes": [[1, 2, 40, 41]] * 25, "cuts": [3, 25]}, "cut 25 is not a frame of the film, 0 to 24"),
        ({"boxes": [[1, 2, 40, 41]] * 25, "cuts": [-1]}, "cut -1 is not a frame"),
        ({"boxes": [[1, 2, 40, 41]] * 25, "cuts": [2.5]}, "cut 2.5 is not a frame"),
        ({"boxes": [[1, 2, 40, 41]] * 25, "cuts": [True]}, "cut True is not a frame"),
        ({"boxes": [[1, 2, 40, 41]] * 25, "cuts": [10**200]}, "cut 10{30,} ?.*is not a frame"),
        ({"boxes": [[1, 2, 10**290, 10**290]] * 25}, "frame 0: .* no head box"),
        ({"boxes": {"0": [1, 2, 40, 41]}}, "boxes is not a list"),
        ([1], "neither a box nor a track file"),
    ],
)
def test_errors_of_track_files_name_the_file(film: Path, tmp_path: Path, record: Any, message: str) -> None:
    path = tmp_path / "track.json"
    path.write_text(json.dumps(record))
    with pytest.raises(TccpError, match=message) as caught:
        track_from_boxes(probe(film), str(path))
    assert "track.json" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "levels deep"),
        ('{"boxes": [' + "[" * 100_000, "levels deep"),
        ('{"boxes": [[1, 2, 1e400, 9]]}', "1e400 is too large"),
        ('{"boxes": [null], "cuts": [1e400]}', "1e400 is too large"),
        ('{"boxes": [[1, 2, NaN, 9]]}', "NaN is not a number"),
        ('{"boxes": [[1, 2, ' + "9" * 5000 + ", 9]]}", "too large"),
    ],
)
def test_hostile_track_files_are_refused_in_one_line(film: Path, tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "track.json"
    path.write_text(text)
    with pytest.raises(TccpError, match=message) as caught:
        track_from_boxes(probe(film), str(path))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_errors_of_masks_name_the_file(film: Path, tmp_path: Path, decoder: Decoder) -> None:
    info = probe(film)
    masks = masks_of(read_truth(film).head_box, info.height, info.width)
    with pytest.raises(TccpError, match=r"small\.mp4 is 64x48, .* 128x96"):
        track_from_mask(info, write_film(tmp_path / "small.mp4", masks[:, ::2, ::2]), decoder)
    with pytest.raises(TccpError, match=r"short\.mp4 has 20 frames, .* has 25"):
        track_from_mask(info, write_film(tmp_path / "short.mp4", masks[:20]), decoder)
    with pytest.raises(TccpError, match=r"dark\.mp4 has no head in any frame"):
        track_from_mask(info, write_film(tmp_path / "dark.mp4", masks * 0), decoder)
    write_audio_wav(tmp_path / "sound.wav", np.zeros(16000))
    with pytest.raises(TccpError, match=r"sound\.wav: the mask has no pictures"):
        track_from_mask(info, tmp_path / "sound.wav", decoder)


def test_a_truth_file_of_another_film_is_refused(film: Path, tmp_path: Path) -> None:
    path = write_film(tmp_path / film.name, pictures(film)[:20])
    (tmp_path / film.with_suffix(".truth.npz").name).write_bytes(film.with_suffix(".truth.npz").read_bytes())
    with pytest.raises(TccpError, match=r"has 25 frames, .* has 20"):
        track_from_truth(probe(path))


def test_cuts_are_detected_if_only_a_box_is_given(
    film: Path, weights: Path, short_sound: Path, tmp_path: Path, decoder: Decoder
) -> None:
    """Two joined films are two shots: the second starts from noise, not from the last head of the first."""
    frames = pictures(film)
    joined = write_film(tmp_path / "joined.mp4", np.concatenate([frames[:6], 255 - frames[6:, :, ::-1]]))
    info = probe(joined)
    assert find_cuts(info, decoder) == {6}
    assert find_cuts(probe(film), decoder) == frozenset()
    box = "40,20,80,60"
    _, found = generated(film, weights, tmp_path / "a.mp4", scene=joined, audio=short_sound, box=box, steps=1)
    track = write_track(tmp_path / "track.json", [[40, 20, 80, 60]] * 25, [6])
    _, with_cut = generated(film, weights, tmp_path / "b.mp4", scene=joined, audio=short_sound, box=str(track), steps=1)
    track = write_track(tmp_path / "track.json", [[40, 20, 80, 60]] * 25, [])
    _, no_cut = generated(film, weights, tmp_path / "c.mp4", scene=joined, audio=short_sound, box=str(track), steps=1)
    assert all(np.array_equal(a.picture, b.picture) for a, b in zip(found, with_cut, strict=True))
    assert not np.array_equal(found[6].picture, no_cut[6].picture)


def test_little_context_gives_a_warning_with_the_share(film: Path, weights: Path, short_sound: Path, tmp_path: Path):
    result, _ = generated(film, weights, tmp_path / "a.mp4", audio=short_sound, box="2,-20,126,104", steps=1)
    (warning,) = result.warnings
    assert "the head box leaves 3.1% of the picture visible" in warning and str(film) in warning
    result, _ = generated(film, weights, tmp_path / "b.mp4", audio=short_sound, box="40,20,80,60", steps=1)
    assert not result.warnings


# Detectors


class Known:
    """A detector that returns given faces, frame by frame."""

    name = "known"
    key = "known"
    works_beside_others = False

    def __init__(self, found: list[list[faces.Face]]):
        self._found = iter(found)

    def detect(self, frame: np.ndarray) -> list[faces.Face]:
        return next(self._found)

    def close(self) -> None:
        pass


def face_at(x: float, y: float, side: float) -> faces.Face:
    return faces.Face(np.array([x, y, x + side, y + side], np.float32), None, 0.9)


def test_short_absences_are_bridged_and_long_ones_pass_through(tmp_path: Path, decoder: Decoder) -> None:
    scene = probe(write_film(tmp_path / "scene.mp4", np.full((60, 48, 64, 3), 90, np.uint8)))
    found = [[face_at(20, 12, 16)] if not (5 <= i < 10 or 20 <= i < 40) else [] for i in range(60)]
    track = track_from_detector(scene, Known(found), decoder)
    assert [track.box(i) is None for i in range(60)] == [20 <= i < 40 for i in range(60)]
    assert track.cuts == frozenset()


def test_a_head_that_leaves_the_picture_is_no_error(tmp_path: Path, decoder: Decoder) -> None:
    scene = probe(write_film(tmp_path / "scene.mp4", np.full((60, 48, 64, 3), 90, np.uint8)))
    track = track_from_detector(scene, Known([[face_at(20 + 3 * i, 12, 16)] for i in range(60)]), decoder)
    gone = [track.box(i) is None for i in range(60)]
    assert not gone[0] and gone[-1]
    assert gone == sorted(gone)
    assert {track.reason(i) for i in range(60)} == {None, "left_picture"}


def seen_in(tmp_path: Path, frames: Iterable[int], total: int = 75, cut: int | None = None) -> HeadTrack:
    """The track of a face that is found in these frames of a film."""
    shown = np.full((total, 48, 64, 3), 90, np.uint8)
    if cut is not None:
        shown[cut:] = (0, 200, 40)
    scene = probe(write_film(tmp_path / "scene.mp4", shown))
    there = set(frames)
    known = Known([[face_at(20, 12, 16)] if i in there else [] for i in range(total)])
    with Decoder() as decoder:
        return track_from_detector(scene, known, decoder)


@pytest.mark.parametrize(
    ("frames", "found"),
    [
        ([30, 31], 2),  # a false detection
        ([10, 20, 30, 40, 50], 5),  # false detections that gaps could be bridged between
        (range(20, 35), 15),  # one frame too short
        ([*range(4), *range(60, 64)], 8),
    ],
)
def test_a_scene_without_a_person_for_long_enough_is_refused(tmp_path: Path, frames: Iterable[int], found: int) -> None:
    message = rf"no face found in .* with known for long enough: there is one in {found} of 75 frames: .*--box"
    with pytest.raises(TccpError, match=message):
        seen_in(tmp_path, frames)


def test_false_detections_get_no_box_and_move_no_other_box(tmp_path: Path) -> None:
    steady = seen_in(tmp_path, range(20, 36))
    track = seen_in(tmp_path, [0, 1, *range(20, 36), 60])
    reasons = [track.reason(i) for i in range(75)]
    expected = {0: "too_short", 2: "before", 19: "before", 20: None, 35: None, 36: "after", 60: "too_short"}
    assert {i: reasons[i] for i in expected} == expected
    assert [reason is None for reason in reasons] == [20 <= i < 36 for i in range(75)]
    assert np.array_equal(track.boxes, steady.boxes, equal_nan=True)


def test_a_short_shot_needs_the_person_in_half_of_its_frames(tmp_path: Path) -> None:
    """Another rule would refuse every film of less than 0.64 s."""
    track = seen_in(tmp_path, range(3, 12), total=40, cut=12)
    assert track.cuts == frozenset({12})
    assert [i for i in range(40) if track.box(i) is not None] == list(range(3, 12))


def test_the_rule_of_presence() -> None:
    """Gaps of up to 12 frames, at least 5 faces, in at least half of the frames, for at least 16 frames."""

    def of(*runs: tuple[int, int], total: int = 100, share: float = 0.5) -> list[tuple[int, int]]:
        seen = np.zeros(total, bool)
        for start, stop in runs:
            seen[start:stop] = True
        return faces.stretches(seen, share)

    assert of((10, 26)) == [(10, 26)]
    assert of((10, 25)) == []
    assert of((10, 30), (42, 60)) == [(10, 60)]
    assert of((10, 30), (43, 60)) == [(10, 30), (43, 60)]
    assert of((10, 30), (40, 44), share=0.75) == [(10, 30)]  # cut at the gap, the rest is too short
    assert of((10, 14), (26, 30), (42, 58)) == [(10, 58)]  # the face is in 24 of 48 frames
    assert of((10, 13), (25, 29), (41, 57)) == [(25, 57)]  # in 23 of 47, and in 20 of 32 after the first gap
    assert of((0, 7), total=12) == [(0, 7)]
    assert of((0, 5), total=12) == []
    assert of((0, 4), total=4) == []
    assert faces.stretches(np.ones(3, bool), 0.5, least_seen=3) == [(0, 3)]


def test_the_requested_person_is_tracked(tmp_path: Path, decoder: Decoder) -> None:
    scene = probe(write_film(tmp_path / "scene.mp4", np.full((30, 48, 96, 3), 90, np.uint8)))

    def found() -> Known:
        return Known([[face_at(60, 14, 18), face_at(10, 14, 14)] for _ in range(30)])

    def center(track: Any) -> float:
        return float((track.boxes[0, 0] + track.boxes[0, 2]) / 2)

    assert center(track_from_detector(scene, found(), decoder)) == pytest.approx(69, abs=3)
    assert center(track_from_detector(scene, found(), decoder, (17.0, 20.0))) == pytest.approx(17, abs=3)


def test_a_scene_without_faces_is_refused(tmp_path: Path, decoder: Decoder) -> None:
    scene = probe(write_film(tmp_path / "empty.mp4", np.full((10, 48, 64, 3), 90, np.uint8)))
    with pytest.raises(TccpError, match=r"no face found in .*empty\.mp4 with known: .*--box or --mask"):
        track_from_detector(scene, Known([[]] * 10), decoder)


def small(path: Path, out: Path, start: int, count: int, width: int) -> Path:
    """Part of a real clip, scaled down, lossless and silent, so that detectors are fast."""
    import cv2

    frames = []
    for frame in read_frames(path, start, count):
        height = round(frame.shape[0] * width / frame.shape[1] / 2) * 2
        frames.append(cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA))
    return write_film(out, np.stack(frames), np.zeros(count * 640, np.float32))


def test_detectors_and_cut_detection_read_only_the_needed_frames(tmp_path: Path, decoder: Decoder) -> None:
    scene = probe(write_film(tmp_path / "scene.mp4", np.full((40, 48, 64, 3), 90, np.uint8)))
    frames_read = 0

    def count() -> None:
        nonlocal frames_read
        frames_read += 1

    track = track_from_detector(scene, Known([[face_at(20, 12, 16)]] * 7), decoder, num_frames=7, on_frame=count)
    assert len(track.boxes) == frames_read == 7
    find_cuts(scene, decoder, 9, count)
    assert frames_read == 16


@pytest.mark.clips
def test_detectors_agree_on_a_real_person(
    shared_clips: Path, shared_weights: Path, weights: Path, tmp_path: Path
) -> None:
    """mediapipe and LBP put the head at the same place, and the person's own frames serve as identity."""
    scene = small(shared_clips / "grid_lwbsza.mpg", tmp_path / "scene.mp4", 0, 8, 320)
    boxes = {}
    for detector in ("mediapipe", "lbp"):
        result, frames = generated(
            scene,
            weights,
            tmp_path / f"{detector}.mp4",
            identity=scene,
            identity_box=None,
            detector=detector,
            detector_weights=shared_weights,
            steps=1,
        )
        assert result.generated == result.frames == 8
        boxes[detector] = frames[0].box
    a, b = boxes["mediapipe"], boxes["lbp"]
    overlap = np.maximum(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0).prod()
    union = (a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - overlap
    assert overlap / union > 0.6


@pytest.mark.clips
def test_the_mask_selects_one_of_several_people(shared_clips: Path, weights: Path, tmp_path: Path) -> None:
    scene = small(shared_clips / "two_person_turns.mp4", tmp_path / "scene.mp4", 0, 5, 320)
    info, before = probe(scene), pictures(scene)
    for name, x in (("left", 40), ("right", 200)):
        box = np.array([[x, 10, x + 90, 100]] * 5, np.float32)
        mask = write_film(tmp_path / f"{name}.mask.mp4", masks_of(box, info.height, info.width))
        out = tmp_path / f"{name}.mp4"
        generated(scene, weights, out, mask=mask, identity=scene, steps=1)
        changed = (pictures(out) != before).any(axis=(0, 1, 3))
        assert changed[x : x + 90].all()
        assert not changed[:x].any() and not changed[x + 90 :].any()


@pytest.mark.clips
def test_frames_without_the_face_pass_through_and_keep_timing(
    shared_clips: Path, shared_weights: Path, weights: Path, tmp_path: Path
) -> None:
    """face_gap.mp4 shows a face for two seconds, no face for two, and the same face for two."""
    scene, out = small(shared_clips / "face_gap.mp4", tmp_path / "scene.mp4", 44, 62, 320), tmp_path / "out.mp4"
    result = generate_film(
        request_of(scene, weights, out, identity=scene, detector="mediapipe", detector_weights=shared_weights, steps=1)
    )
    before, after = pictures(scene), pictures(out)
    untouched = [np.array_equal(a, b) for a, b in zip(before, after, strict=True)]
    assert result.frames == 62
    assert result.passed_through == sum(untouched)
    assert untouched == [50 <= i < 100 for i in range(44, 106)]
