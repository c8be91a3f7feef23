"""Generation of films with untrained networks: timing, chains, masks, landmark files and options."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import ROOT, SETTINGS, generated, pictures, request_of, write_film, write_track

from tccp.config import SAMPLE_RATE_HZ, SAMPLES_PER_FRAME, override
from tccp.errors import TccpError
from tccp.headbox import mask_from_box
from tccp.inference.components import Components, load_components
from tccp.inference.encoding import Encoder
from tccp.inference.generation import Generator
from tccp.inference.head_tracks import HeadTrack
from tccp.inference.landmark_file import LandmarkFile
from tccp.inference.pipeline import generate_film
from tccp.inference.pipeline_folder import write_untrained
from tccp.inference.scene import Extend, scene_frames, scene_indices
from tccp.media import open_audio, probe, read_metadata, write_audio_wav
from tccp.media.sandbox import Decoder
from tccp.models.variants import TWO_STAGE, VariantName
from tccp.roundtable import identity_path, read_identity, read_truth, truth_path

pytest_plugins = ["tiny_fixtures"]


@pytest.fixture(scope="module")
def tones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """0.41 s of sound: ten and a quarter frames."""
    path = tmp_path_factory.mktemp("sound") / "tones.wav"
    at = np.arange(int(0.41 * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ
    write_audio_wav(path, 0.3 * np.sin(2 * np.pi * 220 * at) * np.sin(2 * np.pi * 5 * at))
    return path


@pytest.fixture(scope="module")
def made(film: Path, weights: Path, tones: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Any]:
    """A short generated film, its landmark file and its frames."""
    folder = tmp_path_factory.mktemp("made")
    result, frames = generated(
        film, weights, folder / "film.mp4", audio=tones, save_landmarks=folder / "points.jsonl", redraw=True
    )
    assert result.generated == len(frames)
    return folder / "film.mp4", folder / "points.jsonl", frames


# Time and order


@pytest.mark.parametrize("num_samples", [1, SAMPLES_PER_FRAME, SAMPLES_PER_FRAME + 1, 5 * SAMPLES_PER_FRAME])
def test_a_film_is_as_long_as_its_sound(film: Path, weights: Path, tmp_path: Path, num_samples: int) -> None:
    write_audio_wav(tmp_path / "sound.wav", np.full(num_samples, 0.1))
    result, frames = generated(film, weights, tmp_path / "out.mp4", audio=tmp_path / "sound.wav", steps=1)
    expected = math.ceil(num_samples / SAMPLES_PER_FRAME)
    assert result.frames == result.generated == expected
    assert [frame.index for frame in frames] == list(range(expected))
    info = probe(tmp_path / "out.mp4")
    assert info.num_frames == expected
    assert info.video_start_s == info.audio_start_s == 0
    assert np.array_equal(pictures(tmp_path / "out.mp4"), np.stack([frame.picture for frame in frames]))


def test_the_sound_of_a_film_is_the_driving_sound(made: tuple[Path, Path, Any], tones: Path) -> None:
    with open_audio(made[0]) as after, open_audio(tones) as before:
        length = before.num_samples
        assert after.num_frames == before.num_frames
        assert np.corrcoef(after.samples[:length], before.samples)[0, 1] > 0.99


def test_films_are_equal_for_equal_seeds_and_differ_for_different_seeds(
    film: Path, weights: Path, tones: Path, tmp_path: Path
) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        generated(film, weights, tmp_path / f"{name}.mp4", audio=tones, seed=seed, lossless=False, steps=1)
    a, b, c = (pictures(tmp_path / f"{name}.mp4") for name in "abc")
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    assert np.array_equal(a, b)
    assert not np.array_equal(a[0], c[0])


def test_later_frames_do_not_change_finished_frames(film: Path, weights: Path, tmp_path: Path) -> None:
    """Frames can be shown as soon as they are generated: a shorter film equals the beginning of the longer one."""
    boxes = [frame.tolist() for frame in read_truth(film).head_box]
    whole = write_track(tmp_path / "whole.json", boxes, [])
    shorter = write_track(tmp_path / "short.json", [*boxes[:7], *[None] * (len(boxes) - 7)], [])
    _, long = generated(film, weights, tmp_path / "a.mp4", box=str(whole))
    _, short = generated(film, weights, tmp_path / "b.mp4", box=str(shorter))
    assert all(np.array_equal(a.picture, b.picture) for a, b in zip(long[:7], short[:7], strict=True))
    assert not np.array_equal(long[7].picture, short[7].picture)


class Calls:
    """Counts the evaluations of each network."""

    def __init__(self, pipeline: Components):
        self.count: dict[VariantName, int] = dict.fromkeys(pipeline.networks, 0)
        for name, network in pipeline.networks.items():
            network.register_forward_pre_hook(lambda module, arguments, name=name: self._add(name))

    def _add(self, name: VariantName) -> None:
        self.count[name] += 1


def run(
    film: Path, weights: Path, track: HeadTrack, num_frames: int, extend: Extend = "no", **options: Any
) -> tuple[list[Any], dict[VariantName, int]]:
    """Runs generation without writing a film; returns the frames and the number of windows per network."""
    loaded = load_components(weights)
    pipeline = dataclasses.replace(loaded, settings=override(loaded.settings, {"sampling.steps": 1}))
    calls = Calls(pipeline)
    with open_audio(film) as audio:
        generator = Generator(pipeline, audio, read_identity(film), **options)
        with Decoder() as decoder:
            frames = list(generator.frames(scene_frames(film, probe(film), track, num_frames, extend, decoder)))
    return frames, calls.count


def test_a_new_chain_starts_after_a_cut_and_after_a_gap(film: Path, weights: Path) -> None:
    boxes = read_truth(film).head_box
    gap = boxes.copy()
    gap[6:9] = np.nan
    starts = {}
    for name, track in {
        "whole": HeadTrack(boxes),
        "cut": HeadTrack(boxes, frozenset({5})),
        "gap": HeadTrack(gap),
        # A cut during the absence, or at its end, starts no further chain.
        "both": HeadTrack(gap, frozenset({3, 7, 9})),
        "never": HeadTrack(np.full_like(boxes, np.nan)),
    }.items():
        frames, calls = run(film, weights, track, 12)
        assert [frame.index for frame in frames] == list(range(12))
        assert [frame.face is None for frame in frames] == [track.box(i) is None for i in range(12)]
        assert calls["landmark_first"] == calls["face_first"]
        starts[name] = calls["face_first"]
    assert starts == {"whole": 1, "cut": 2, "gap": 2, "both": 3, "never": 0}


def test_windows_add_all_their_frames_but_the_first(film: Path, weights: Path) -> None:
    _, calls = run(film, weights, HeadTrack(read_truth(film).head_box), 11)  # 1 + 3 + 3 + 3 + 1
    assert calls == {"landmark_first": 1, "landmark_sequence": 4, "face_first": 1, "face_sequence": 4}


def test_frames_come_as_windows_finish(film: Path, weights: Path, decoder: Decoder) -> None:
    """Generation reads at most two windows of the scene ahead of the frames it yields."""
    track, read = HeadTrack(read_truth(film).head_box), 0
    pipeline = load_components(weights)

    def counted() -> Any:
        nonlocal read
        for frame in scene_frames(film, probe(film), track, 25, "no", decoder):
            read += 1
            yield frame

    with open_audio(film) as audio:
        generator = Generator(pipeline, audio, read_identity(film))
        for done, _ in enumerate(generator.frames(counted()), 1):
            assert read - done <= 2 * pipeline.settings.window


# Pixels and frames that are not generated


def test_frames_without_a_head_pass_through_untouched(film: Path, weights: Path, tmp_path: Path) -> None:
    boxes = [frame.tolist() for frame in read_truth(film).head_box]
    track = write_track(tmp_path / "track.json", [*boxes[:4], *[None] * 6, *boxes[10:]], [])
    result, frames = generated(film, weights, tmp_path / "out.mp4", box=str(track))
    before, after = pictures(film), pictures(tmp_path / "out.mp4")
    assert (result.frames, result.generated, result.passed_through) == (25, 19, 6)
    assert result.reasons == {"absent": 6}
    assert [frame.reason for frame in frames] == [None] * 4 + ["absent"] * 6 + [None] * 15
    assert result.warnings == (f"{film}: 19 of 25 frames generated; passed through 6 without the person",)
    assert np.array_equal(before[4:10], after[4:10])
    assert all(not np.array_equal(before[i], after[i]) for i in (3, 10))
    assert all(frame.points is None and frame.box is None for frame in frames[4:10])


def test_reasons_of_frames_are_counted_on_the_film_that_is_made(film: Path, weights: Path, tmp_path: Path) -> None:
    """The film plays the scene forth and back, and shows some of its frames twice."""
    boxes = [frame.tolist() for frame in read_truth(film).head_box]
    track = write_track(tmp_path / "track.json", [*[None] * 5, *boxes[5:22], None, None, boxes[24]], [])
    (sound := tmp_path / "sound.wav")
    write_audio_wav(sound, 0.1 * np.sin(np.arange(30 * 640) / 9))
    out = tmp_path / "out.mp4"
    result, _ = generated(film, weights, out, box=str(track), audio=sound, extend="pingpong", steps=1)
    assert result.reasons == {"before": 5, "absent": 4}
    assert result.frames == result.generated + result.passed_through == 30
    text = "21 of 30 frames generated; passed through 5 before the person appears, 4 without the person"
    assert result.warnings == (f"{film}: {text}",)


def test_a_film_without_a_head_in_the_frames_that_are_shown_is_refused(
    film: Path, weights: Path, tmp_path: Path
) -> None:
    track = write_track(tmp_path / "track.json", [*[None] * 20, *[[40, 20, 80, 60]] * 5], [])
    write_audio_wav(tmp_path / "sound.wav", 0.1 * np.sin(np.arange(10 * 640) / 9))
    with pytest.raises(TccpError, match=r"0 of 10 frames generated; .* 10 before the person appears, so"):
        generated(film, weights, tmp_path / "out.mp4", box=str(track), audio=tmp_path / "sound.wav", steps=1)
    assert not (tmp_path / "out.mp4").exists()


@pytest.mark.parametrize("box", [None, "-20,10,40,70", "30.5,20.25,71,60", "100,70,140,110"])
def test_pixels_outside_the_mask_are_untouched(
    film: Path, weights: Path, tones: Path, tmp_path: Path, box: str | None
) -> None:
    place = {} if box is None else {"box": box}
    _, frames = generated(film, weights, tmp_path / "out.mp4", audio=tones, **place)
    before, after = pictures(film)[: len(frames)], pictures(tmp_path / "out.mp4")
    for frame, old, new in zip(frames, before, after, strict=True):
        assert frame.box is not None
        mask = mask_from_box(frame.box, *old.shape[:2])
        assert np.array_equal(old[~mask], new[~mask])
        assert (old[mask] != new[mask]).mean() > 0.3
        if box:
            x0, y0, x1, y1 = map(float, box.split(","))
            assert frame.box[0] <= x0 and frame.box[1] <= y0 and frame.box[2] >= x1 and frame.box[3] >= y1
            assert frame.box[2] - frame.box[0] <= max(x1 - x0, y1 - y0) + 2


def test_pixels_under_the_mask_do_not_change_the_film(film: Path, weights: Path, tones: Path, tmp_path: Path) -> None:
    scene, truth = pictures(film), read_truth(film)
    for frame, box in zip(scene, truth.head_box, strict=True):
        mask = mask_from_box(box, *frame.shape[:2])
        frame[mask] = np.random.default_rng(0).integers(0, 256, (int(mask.sum()), 3), np.uint8)
    track = write_track(tmp_path / "track.json", truth.head_box.tolist(), [])
    painted = write_film(tmp_path / "painted.mp4", scene)
    for name, path in (("a", film), ("b", painted)):
        generated(film, weights, tmp_path / f"{name}.mp4", scene=path, audio=tones, box=str(track))
    assert np.array_equal(pictures(tmp_path / "a.mp4"), pictures(tmp_path / "b.mp4"))


def test_a_pipeline_with_context_none_ignores_the_scene(film: Path, weights: Path, tmp_path: Path) -> None:
    blind = tmp_path / "blind"
    write_untrained(blind, override(SETTINGS, {"context": "none"}), TWO_STAGE)
    other = write_film(tmp_path / "other.mp4", 255 - pictures(film), film)
    shutil.copy(truth_path(film), truth_path(other))
    marks = {
        name: [
            np.stack(
                [
                    frame.landmark_picture
                    for frame in generated(
                        scene, folder, tmp_path / "out.mp4", audio=film, identity=identity_path(film)
                    )[1]
                ]
            )
            for scene in (film, other)
        ]
        for name, folder in (("blind", blind), ("sighted", weights))
    }
    assert np.array_equal(*marks["blind"])
    assert not np.array_equal(*marks["sighted"])


def test_a_generated_film_is_marked_as_generated(made: tuple[Path, Path, Any]) -> None:
    tags = read_metadata(made[0])
    assert "AI-generated" in tags["comment"]
    assert "seed=0" in tags["comment"]
    assert "AI-generated" in tags["description"]


# Scenes that are shorter than the sound


@given(st.integers(1, 60), st.integers(1, 300))
def test_extended_scenes_move_by_one_frame_at_most(num_scene: int, num_frames: int) -> None:
    for extend in ("freeze", "pingpong"):
        shown = list(scene_indices(num_scene, num_frames, extend))
        assert len(shown) == num_frames
        assert shown[:num_scene] == list(range(min(num_scene, num_frames)))
        assert set(shown) == set(range(min(num_scene, num_frames)))
        assert all(abs(a - b) <= 1 for a, b in itertools.pairwise(shown))
    if num_frames > num_scene:
        assert list(scene_indices(num_scene, num_frames, "freeze"))[num_scene:] == [num_scene - 1] * (
            num_frames - num_scene
        )
        pingpong = list(scene_indices(num_scene, num_frames, "pingpong"))
        if num_scene > 1:  # no frame is repeated at the turns
            assert all(a != b for a, b in itertools.pairwise(pingpong))
        if num_frames > num_scene + 2:
            with pytest.raises(TccpError, match=r"--extend freeze or --extend pingpong"):
                scene_indices(num_scene, num_frames, "no")
        else:
            assert list(scene_indices(num_scene, num_frames, "no"))[num_scene - 1 :] == [num_scene - 1] * (
                num_frames - num_scene + 1
            )


@pytest.mark.parametrize("extend", ["freeze", "pingpong"])
def test_extended_scenes_have_the_pictures_of_their_frame_numbers(film: Path, extend: Extend, decoder: Decoder) -> None:
    """Three passes through the film, with more than one chunk played backwards."""
    info, source = probe(film), pictures(film)
    boxes = read_truth(film).head_box
    frames = list(scene_frames(film, info, HeadTrack(boxes, frozenset({10})), 77, extend, decoder))
    shown = list(scene_indices(info.num_frames, 77, extend))
    assert [frame.index for frame in frames] == list(range(77))
    for frame, index in zip(frames, shown, strict=True):
        assert np.array_equal(frame.picture, source[index])
        assert frame.box is not None
        assert np.array_equal(frame.box, boxes[index])
    between = [{a, b} == {9, 10} for a, b in itertools.pairwise(shown)]
    assert [frame.starts_shot for frame in frames] == [True, *between]


def test_a_scene_that_is_too_short_needs_an_option(film: Path, weights: Path, tmp_path: Path) -> None:
    write_audio_wav(tmp_path / "long.wav", np.full(int(1.2 * SAMPLE_RATE_HZ), 0.1))
    given_files = {"audio": tmp_path / "long.wav", "steps": 1}
    with pytest.raises(TccpError, match=rf"{film.name} lasts 1.00 s and the sound 1.20 s: .*--extend freeze"):
        generate_film(request_of(film, weights, tmp_path / "out.mp4", **given_files))
    assert not (tmp_path / "out.mp4").exists()
    result, _ = generated(film, weights, tmp_path / "out.mp4", extend="pingpong", **given_files)
    assert result.frames == probe(tmp_path / "out.mp4").num_frames == 30


# Landmarks: saved, edited, drawn again


def edit(source: Path, target: Path, change: Any) -> Path:
    """Applies `change` to the record of every frame of a landmark file."""
    header, *lines = source.read_text().splitlines()
    records = [change(json.loads(line)) for line in lines]
    target.write_text("\n".join([header, *(json.dumps(record) for record in records if record is not None)]) + "\n")
    return target


def test_saved_landmarks_generate_the_same_film(
    film: Path, weights: Path, tones: Path, made: tuple[Path, Path, Any], tmp_path: Path
) -> None:
    path, points, frames = made
    _, again = generated(film, weights, tmp_path / "again.mp4", audio=tones, landmarks=points)
    assert np.array_equal(pictures(path), pictures(tmp_path / "again.mp4"))
    for a, b in zip(frames, again, strict=True):
        assert np.array_equal(a.points, b.points, equal_nan=True)
        assert np.array_equal(a.landmark_picture, b.landmark_picture)
        assert a.confidence == b.confidence


def test_edited_landmarks_change_the_film(
    film: Path, weights: Path, tones: Path, made: tuple[Path, Path, Any], tmp_path: Path
) -> None:
    def moved(record: dict[str, Any]) -> dict[str, Any]:
        if record["frame"] >= 4:  # from the second window on
            record["points"] = [[0.5 + (x - 0.5) * 0.5, y] for x, y in record["points"] or [[0.1, 0.1]] * 68]
        return record

    edited = edit(made[1], tmp_path / "edited.jsonl", moved)
    _, frames = generated(film, weights, tmp_path / "out.mp4", audio=tones, landmarks=edited)
    same = [np.array_equal(a.picture, b.picture) for a, b in zip(made[2], frames, strict=True)]
    assert same == [True] * 4 + [False] * 7


def test_stage_one_is_not_needed_for_given_landmarks(
    film: Path, tones: Path, weights: Path, made: tuple[Path, Path, Any], tmp_path: Path
) -> None:
    manifest = json.loads((weights / "manifest.json").read_text())
    for name in ("landmark_first", "landmark_sequence"):
        del manifest["components"][name]
    partial = tmp_path / "weights"
    partial.mkdir()
    for name in ("autoencoder", "lips", "face_first", "face_sequence"):
        (partial / name).symlink_to(weights / name)
    (partial / "manifest.json").write_text(json.dumps(manifest))
    generated(film, partial, tmp_path / "out.mp4", audio=tones, landmarks=made[1])
    with pytest.raises(TccpError, match="has no landmark_first"):
        generate_film(request_of(film, partial, tmp_path / "b.mp4", audio=tones))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: None if record["frame"] == 2 else record, "has no landmarks for frame 2"),
        (lambda record: record | {"points": record["points"][:-1]}, "not as `--save-landmarks` writes it"),
        (lambda record: record | {"points": [[float("nan"), 0.0]] * 68}, "NaN is not a number"),
        (lambda record: {"frame": record["frame"]}, "KeyError: 'points'"),
        (lambda record: [1, 2], "TypeError"),
    ],
)
def test_errors_of_landmark_files_name_the_file(
    film: Path, weights: Path, tones: Path, made: tuple[Path, Path, Any], tmp_path: Path, change: Any, message: str
) -> None:
    edited = edit(made[1], tmp_path / "edited.jsonl", change)
    with pytest.raises(TccpError, match=message) as caught:
        generated(film, weights, tmp_path / "out.mp4", audio=tones, landmarks=edited, steps=1)
    assert str(edited) in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["edited.jsonl"]


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff\xfe\x00", b'{"tccp": "landmarks"}\n\xff'])
def test_other_files_than_landmark_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "points.jsonl"
    path.write_bytes(content)
    with pytest.raises(TccpError, match=r"points\.jsonl"), LandmarkFile(path) as track:
        track.read(0)
    with pytest.raises(TccpError, match="No such file"):
        LandmarkFile(tmp_path / "absent.jsonl")


def test_unreadable_points_are_those_of_the_frame_before(film: Path, weights: Path, decoder: Decoder) -> None:
    """Points are NaN, and pictures black, until stage 1 draws the first readable face."""
    pipeline = load_components(weights)
    with open_audio(film) as audio:
        generator = Generator(pipeline, audio, read_identity(film), redraw=True)
        black = {0, 1, 5}
        count = itertools.count()

        class Dark(Encoder):
            def decode(self, latents: Any, kind: Any) -> Any:
                pictures = super().decode(latents, kind)
                dark = [kind == "landmark" and next(count) in black for _ in pictures]
                return np.stack([picture * (not hidden) for picture, hidden in zip(pictures, dark, strict=True)])

        generator.encoder = Dark(pipeline.autoencoder, pipeline.settings)
        track = HeadTrack(read_truth(film).head_box)
        frames = list(generator.frames(scene_frames(film, probe(film), track, 8, "no", decoder)))
    assert [frame.confidence == 0 for frame in frames] == [i in black for i in range(8)]
    assert all(np.isnan(frames[i].points).all() and not frames[i].landmark_picture.any() for i in (0, 1))
    assert np.array_equal(frames[5].points, frames[4].points)
    assert not np.array_equal(frames[4].points, frames[3].points)


# Options


def test_one_stage_needs_neither_landmarks_nor_their_networks(
    film: Path, weights: Path, tones: Path, tmp_path: Path
) -> None:
    result, frames = generated(film, weights, tmp_path / "out.mp4", audio=tones, one_stage=True)
    assert result.generated == 11
    assert all(frame.points is None and frame.face is not None for frame in frames)
    with pytest.raises(TccpError, match="--one-stage has no landmarks"):
        generate_film(request_of(film, weights, tmp_path / "b.mp4", one_stage=True, save_landmarks=tmp_path / "x"))


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 3},
        {"solver": "ddpm"},
        {"guidance_scale": 2.0},
        {"guidance_scale": 2.0, "guidance_interval": (0.0, 0.6)},
        {"time_power": 0.5},
        {"temperature": 0.5},
        {"color_match": False},
    ],
)
def test_sampling_options_change_the_film(
    film: Path, weights: Path, tones: Path, made: tuple[Path, Path, Any], tmp_path: Path, change: dict[str, Any]
) -> None:
    _, frames = generated(film, weights, tmp_path / "out.mp4", audio=tones, redraw=True, **change)
    assert not np.array_equal(frames[0].picture, made[2][0].picture)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, r"sampling\.steps"),
        ({"steps": 1001}, "--steps 1001: give at most 1000"),
        ({"guidance_scale": float("nan")}, r"sampling\.guidance_scale"),
        ({"guidance_interval": (0.8, 0.2)}, "give the smaller time first"),
        ({"guidance_interval": (0.0, 1.5)}, r"sampling\.guidance_interval"),
        ({"time_power": 0.0}, r"sampling\.time_power"),
        ({"truth": True, "box": "0,0,9,9"}, "give only one of them"),
        ({"identity_box": "1,2,3"}, "--identity-box 1,2,3"),
        ({"identity_box": "900,900,950,950"}, "outside the picture"),
    ],
)
def test_invalid_options_are_refused(
    film: Path, weights: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(TccpError, match=message):
        generate_film(dataclasses.replace(request_of(film, weights, tmp_path / "out.mp4"), **change))
    assert not list(tmp_path.iterdir())


def test_the_identity_can_be_cut_from_a_film_or_a_picture(
    film: Path, weights: Path, tones: Path, tmp_path: Path
) -> None:
    """A film's middle head by its truth file gives the same result as the same box of that frame as a picture."""
    truth = read_truth(film)
    middle = 13  # the ninth of sixteen candidates of 25 frames
    scene = tmp_path / "scene.png"
    cv2.imwrite(str(scene), pictures(film)[middle][..., ::-1])
    box = ",".join(str(edge) for edge in truth.head_box[middle])
    for name, place in {
        "film": {"identity": film, "identity_box": None},
        "picture": {"identity": scene, "identity_box": box},
        "other": {"identity": scene, "identity_box": "0,0,40,40"},
    }.items():
        generated(film, weights, tmp_path / f"{name}.mp4", audio=tones, steps=1, **place)
    assert np.array_equal(pictures(tmp_path / "film.mp4"), pictures(tmp_path / "picture.mp4"))
    assert not np.array_equal(pictures(tmp_path / "film.mp4"), pictures(tmp_path / "other.mp4"))


def test_inputs_are_not_overwritten(film: Path, weights: Path, tmp_path: Path) -> None:
    before = film.read_bytes()
    with pytest.raises(TccpError, match=r"--out .* is --scene"):
        generate_film(request_of(film, weights, film))
    assert film.read_bytes() == before


def test_an_existing_file_is_kept_until_the_film_is_complete(
    film: Path, weights: Path, tones: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.mp4"
    out.write_bytes(b"before")

    def stop(frame: Any) -> None:
        assert out.read_bytes() == b"before"
        if frame.index == 6:
            raise KeyboardInterrupt

    request = request_of(film, weights, out, audio=tones, save_landmarks=tmp_path / "points.jsonl")
    with pytest.raises(KeyboardInterrupt):
        generate_film(request, on_frame=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]
    assert out.read_bytes() == b"before"


def test_silent_and_clipped_sound_gives_a_warning(
    film: Path, weights: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, samples in {"silent": np.zeros(3000), "clipped": np.tile([1.0, -1.0], 1500)}.items():
        write_audio_wav(tmp_path / f"{name}.wav", samples)
        request = request_of(film, weights, tmp_path / "out.mp4", audio=tmp_path / f"{name}.wav", steps=1)
        result = generate_film(request)
        assert result.frames == 5
        assert name in result.warnings[0] and f"{name}.wav" in result.warnings[0]
    assert [record.levelname for record in caplog.records if record.name.startswith("tccp")] == ["WARNING"] * 2


# Memory


@pytest.mark.slow
def test_memory_does_not_grow_with_film_length() -> None:
    """A short run of benchmarks/generation.py, which by default compares 10 s with 120 s."""
    command = [sys.executable, "benchmarks/generation.py", "--seconds", "2", "6"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}  # works without installation
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["peak_ratio"] < 1.1
