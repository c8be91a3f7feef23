"""Several shots and several films that share evaluations of the networks, and lists of films."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import generated, pictures, request_of, tccp, write_track

from tccp.config import override
from tccp.errors import TccpError
from tccp.inference.film import FilmRequest
from tccp.inference.film_generation import FilmOutcome
from tccp.inference.film_list import read_film_list
from tccp.inference.frames import GeneratedFrame, SceneFrame
from tccp.inference.generation import Film, Generator, generate
from tccp.inference.head_tracks import HeadTrack
from tccp.inference.pipeline import Pipeline, generate_films
from tccp.inference.scene import scene_frames
from tccp.media import open_audio, probe, write_audio_wav
from tccp.media.sandbox import Decoder
from tccp.roundtable import identity_path, read_identity, read_truth

pytest_plugins = ["tiny_fixtures"]


def shots_of(film: Path, path: Path) -> str:
    """A track with three shots and an absence."""
    boxes = [frame.tolist() for frame in read_truth(film).head_box]
    return str(write_track(path, [*boxes[:12], None, None, *boxes[14:]], [6]))


def sizes_of(pipeline: Pipeline) -> dict[str, list[int]]:
    """The batch sizes of each network's evaluations from now on."""
    sizes: dict[str, list[int]] = {name: [] for name in pipeline.networks}
    for name, network in pipeline.networks.items():
        network.register_forward_pre_hook(lambda module, given, name=name: sizes[name].append(len(given[0])))
    return sizes


def assert_nearly_equal(a: np.ndarray, b: np.ndarray) -> None:
    difference = np.abs(a.astype(int) - b)
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01


# Shots of one film


def test_shots_of_a_film_are_generated_together(film: Path, weights: Path, tmp_path: Path) -> None:
    track = shots_of(film, tmp_path / "track.json")
    made = {}
    for name, batch in (("alone", 1), ("together", 3), ("again", 3)):
        result, frames = generated(film, weights, tmp_path / f"{name}.mp4", box=track, batch=batch)
        assert (result.frames, result.generated, result.reasons) == (25, 23, {"absent": 2})
        assert [frame.index for frame in frames] == list(range(25))
        made[name] = pictures(tmp_path / f"{name}.mp4")
    assert (tmp_path / "together.mp4").read_bytes() == (tmp_path / "again.mp4").read_bytes()
    assert_nearly_equal(made["alone"], made["together"])


def test_shots_share_evaluations(film: Path, weights: Path, tmp_path: Path) -> None:
    pipeline = Pipeline.from_pretrained(weights)
    sizes = sizes_of(pipeline)
    options: dict[str, Any] = {"box": shots_of(film, tmp_path / "t.json"), "identity_box": "whole", "steps": 1}
    list(pipeline.generate(film, film, identity_path(film), **options, batch=3))
    # Shots of 6, 6 and 11 frames: 1 + 3 + 2, 1 + 3 + 2, and, found a round later, 1 + 3 + 3 + 3 + 1.
    assert sizes["face_first"] == sizes["landmark_first"] == [2, 1]
    assert sizes["face_sequence"] == sizes["landmark_sequence"] == [2, 3, 1, 1, 1]


def test_landmarks_of_several_shots_are_read_in_order(film: Path, weights: Path, tmp_path: Path) -> None:
    track, points = shots_of(film, tmp_path / "track.json"), tmp_path / "points.jsonl"
    generated(film, weights, tmp_path / "a.mp4", box=track, save_landmarks=points, redraw=True)
    generated(film, weights, tmp_path / "b.mp4", box=track, landmarks=points)
    assert_nearly_equal(pictures(tmp_path / "a.mp4"), pictures(tmp_path / "b.mp4"))


@pytest.mark.parametrize("batch", [0, 65])
def test_a_batch_out_of_range_is_refused(film: Path, weights: Path, tmp_path: Path, batch: int) -> None:
    with pytest.raises(TccpError, match=f"batch {batch}: give 1 to 64 windows"):
        generated(film, weights, tmp_path / "out.mp4", batch=batch)
    with pytest.raises(TccpError, match=f"batch {batch}: give 1 to 64 windows"):
        list(generate_films([], pipeline=Pipeline.from_pretrained(weights, variants=()), batch=batch))


# Several films


def requests_of(film: Path, weights: Path, folder: Path, lengths: list[int]) -> list[FilmRequest]:
    """Films of different lengths and seeds."""
    requests = []
    for number, length in enumerate(lengths):
        sound = folder / f"{number}.wav"
        write_audio_wav(sound, 0.1 * np.sin(np.arange(length * 640) / (5 + number)))
        requests.append(request_of(film, weights, folder / f"{number}.mp4", audio=sound, seed=number, steps=1))
    return requests


def test_films_are_the_same_together_and_alone(film: Path, weights: Path, tmp_path: Path) -> None:
    requests = requests_of(film, weights, tmp_path, [4, 18, 6])
    pipeline = Pipeline.from_pretrained(weights)
    sizes = sizes_of(pipeline)
    outcomes = list(generate_films(requests, pipeline=pipeline, batch=2))
    assert max(sizes["face_sequence"]) == max(sizes["landmark_sequence"]) == 2
    assert [outcome.request.seed for outcome in outcomes] == [0, 2, 1]  # as they end
    for outcome, request in zip(sorted(outcomes, key=lambda one: one.request.seed), requests, strict=True):
        assert outcome.result is not None
        assert outcome.result.generated == outcome.result.frames == [4, 18, 6][request.seed]
        together = pictures(tmp_path / f"{request.seed}.mp4")
        generated(film, weights, tmp_path / "alone.mp4", audio=request.audio, seed=request.seed, steps=1)
        assert_nearly_equal(together, pictures(tmp_path / "alone.mp4"))


def test_a_film_that_cannot_be_made_leaves_the_others(film: Path, weights: Path, tmp_path: Path) -> None:
    (tmp_path / "folder.mp4").mkdir()
    good, no_sound, no_place, last = requests_of(film, weights, tmp_path, [5, 5, 5, 4])
    no_sound.audio.unlink()
    requests = [good, no_sound, FilmRequest(**(vars(no_place) | {"out": good.audio / "out.mp4"})), last]
    pipeline = Pipeline.from_pretrained(weights)
    outcomes: dict[int, FilmOutcome] = {
        outcome.request.seed: outcome for outcome in generate_films(requests, pipeline=pipeline)
    }
    assert sorted(outcomes) == [0, 1, 2, 3]
    assert outcomes[0].error is None and outcomes[3].error is None
    assert "1.wav" in (outcomes[1].error or "")
    assert "0.wav" in (outcomes[2].error or "")
    assert len(pictures(tmp_path / "0.mp4")) == 5 and len(pictures(tmp_path / "3.mp4")) == 4
    assert not list(tmp_path.glob(".*"))


def test_a_film_that_ends_early_is_closed_when_stage_one_has_let_go_of_it(film: Path, weights: Path) -> None:
    """Its pictures cannot be read a second time. The other film comes out whole."""
    pipeline = Pipeline.from_pretrained(weights)
    pipeline = dataclasses.replace(pipeline, settings=override(pipeline.settings, {"sampling.steps": 1}))
    track, info = HeadTrack(read_truth(film).head_box, frozenset({6})), probe(film)

    def again() -> Iterator[SceneFrame]:
        with Decoder() as second:
            yield from islice(scene_frames(film, info, track, 25, "no", second), 3)
        raise TccpError("the file is gone")

    with open_audio(film) as audio, Decoder() as a, Decoder() as b:
        generator = Generator(pipeline, audio, read_identity(film))
        broken = Film(generator, scene_frames(film, info, track, 25, "no", a), again())
        whole = Film(generator, scene_frames(film, info, track, 25, "no", b))
        seen: dict[Film, list[object]] = {broken: [], whole: []}
        for made, event in generate([broken, whole], batch=2):
            seen[made].append(event.index if isinstance(event, GeneratedFrame) else event)
            if event is None:
                made.close()
    error, end = seen[broken].pop(-2), seen[broken].pop()
    assert seen[broken] == [0, 1, 2] and end is None
    assert isinstance(error, TccpError) and "gone" in str(error)
    assert seen[whole] == [*range(25), None]


def test_films_that_are_not_finished_leave_nothing(film: Path, weights: Path, tmp_path: Path) -> None:
    outcomes = generate_films(
        requests_of(film, weights, tmp_path, [2, 11, 11]), pipeline=Pipeline.from_pretrained(weights), batch=3
    )
    assert next(outcomes).request.seed == 0
    outcomes.close()  # type: ignore[attr-defined]
    assert [path.name for path in tmp_path.glob("*.mp4")] == ["0.mp4"]
    assert not list(tmp_path.glob(".*"))


def test_films_that_write_the_same_file_are_refused(film: Path, weights: Path, tmp_path: Path) -> None:
    pipeline = Pipeline.from_pretrained(weights, variants=())
    with pytest.raises(TccpError, match="films 1 and 2 both write"):
        list(generate_films([request_of(film, weights, tmp_path / "a.mp4")] * 2, pipeline=pipeline))


# Lists


def write_list(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_list_gives_the_fields_of_its_columns(tmp_path: Path) -> None:
    listed = write_list(
        tmp_path / "list.csv",
        "scene,audio,identity,out,seed,person,truth,box,lossless",
        "a.mp4,b.wav,c.png,,7,3 4.5,,,yes",
        "a.mp4,/b.wav,c.png,sub/x.mp4,,,,track.json,",
    )
    first, second = read_film_list(listed, tmp_path / "out", weights="w", batch=2)
    expected = FilmRequest(
        tmp_path / "a.mp4", tmp_path / "b.wav", tmp_path / "c.png", "w", tmp_path / "out/0001.mp4", seed=7,
        person=(3.0, 4.5), lossless=True, batch=2,
    )  # fmt: skip
    assert first == expected
    assert second.audio == Path("/b.wav") and second.out == tmp_path / "out/sub/x.mp4" and second.seed == 0
    assert second.box == str(tmp_path / "track.json")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([""], "lists no film"),
        (["scene,audio,identity"], "lists no film"),
        (["scene,audio", "a,b"], "has no column 'identity'"),
        (["scene,audio,identity,sead", "a,b,c,1"], "has a column 'sead'"),
        (["scene,audio,identity,seed", "a,b,c,x"], "row 1, seed: 'x' is not a whole number"),
        (["scene,audio,identity,person", "a,b,c,1", "a,b,c,1"], "row 1, person: '1' is not two numbers"),
        (["scene,audio,identity,extend", "a,b,c,never"], "row 1, extend: 'never' is none of no, freeze, pingpong"),
        (["scene,audio,identity", "a,b,c", "a,b"], "row 2 has another number of cells"),
        (["scene,audio,identity", "a,b,c,d"], "row 1 has more cells"),
        (["scene,audio,identity", "a,b,c", "a,,c"], "row 2 has no audio"),
        (["scene,audio,identity,out", "a,b,c,x.mp4", "a,b,c,x.mp4"], "^out of row 2 .* is out of row 1"),
        (["scene,audio,identity,out", "out/x.mp4,b,c,x.mp4"], "^out of row 1 .* is scene of row 1"),
        (["scene,audio,identity,out", "a,b,c,../x.mp4"], "row 1, out: ../x.mp4 is not in .*: give a path within"),
        (["scene,audio,identity,out", "a,b,c,/x.mp4"], "row 1, out: /x.mp4 is not in .*: give a path within"),
    ],
)
def test_lists_that_cannot_be_used_are_refused(tmp_path: Path, lines: list[str], message: str) -> None:
    listed = write_list(tmp_path / "list.csv", *lines)
    with pytest.raises(TccpError, match=message):
        read_film_list(listed, tmp_path / "out")


def test_a_second_run_makes_what_is_missing(film: Path, weights: Path, tmp_path: Path) -> None:
    for number, length in enumerate((3, 5)):
        write_audio_wav(tmp_path / f"{number}.wav", 0.1 * np.sin(np.arange(length * 640) / 9))
    listed = write_list(
        tmp_path / "list.csv",
        "scene,audio,identity,identity_box,truth,steps",
        *(f"{film},{name}.wav,{identity_path(film)},whole,true,1" for name in ("0", "absent", "1")),
    )
    out = tmp_path / "out"
    command = ["films", listed, "--out", out, "--weights", weights, "--device", "cpu", "--json"]

    def run(code: int) -> dict[str, Any]:
        result = tccp(*command)
        assert result.returncode == code, result.stderr
        return json.loads(result.stdout)

    first = run(1)
    assert (first["made"], first["made_before"], len(first["not_made"])) == (2, 0, 1)
    assert "absent.wav" in first["not_made"][0]
    times = {path.name: path.stat().st_mtime_ns for path in out.glob("*.mp4")}
    assert sorted(times) == ["0001.mp4", "0003.mp4"]
    write_audio_wav(tmp_path / "absent.wav", 0.1 * np.sin(np.arange(2 * 640) / 9))
    second = run(0)
    assert (second["made"], second["made_before"], second["not_made"]) == (1, 2, [])
    assert all((out / name).stat().st_mtime_ns == time for name, time in times.items())
    write_audio_wav(tmp_path / "1.wav", 0.2 * np.sin(np.arange(6 * 640) / 9))  # other sound
    third = run(0)
    assert (third["made"], third["made_before"]) == (1, 2)
    assert len(pictures(out / "0003.mp4")) == 6
    rows = json.loads((out / "films.json").read_text())["films"]
    assert [row["frames"] for row in rows] == [3, 2, 6]
