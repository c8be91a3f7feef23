"""No command overwrites one of its inputs, whatever the option, and the refusal comes before any work."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tiny import write_track

from preprocessing.plan import make_plan
from preprocessing.run import preprocess
from tccp.cli import main
from tccp.clips.clip_table import ClipTable
from tccp.inference.manifest import TOY_WEIGHTS
from tccp.roundtable import identity_path, truth_path

pytest_plugins = ["tiny_fixtures"]


@pytest.fixture
def films(film: Path, tmp_path: Path) -> Path:
    """A folder with one film, its truth and its identity picture, to be overwritten if anything is."""
    folder = tmp_path / "films"
    folder.mkdir()
    for path in (film, truth_path(film), identity_path(film)):
        shutil.copy(path, folder)
    (folder / "points.jsonl").write_text('{"tccp": "landmarks"}\n')
    write_track(folder / "track.json", [[40, 20, 80, 60]] * 25, [])
    return folder


@pytest.fixture(scope="module")
def table(film: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("table") / "clips"
    preprocess([film], folder, make_plan(32, "truth"))
    return folder


@contextmanager
def kept(folder: Path, capsys: pytest.CaptureFixture[str], *expected: str) -> Iterator[None]:
    """Requires a refusal in the last line, with nothing in `folder` changed."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        yield
    assert caught.value.code == 2
    *notes, line = capsys.readouterr().err.splitlines()
    assert line.startswith("tccp: error: ")
    assert all("no films" in text for text in notes)  # files that a folder holds besides films
    for text in expected:
        assert text in line
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


INPUTS = {
    "scene": "roundtable_4_0000.mp4",
    "identity": "roundtable_4_0000.identity.png",
    "landmarks": "points.jsonl",
    "box": "track.json",
    "mask": "roundtable_4_0000.mp4",
    "truth": "roundtable_4_0000.truth.npz",
}


def generate(films: Path, weights: Path, *options: object) -> None:
    film = films / "roundtable_4_0000.mp4"
    given = ["--scene", film, "--audio", film, "--identity", identity_path(film), "--weights", weights, *options]
    main(["generate", *map(str, given), "--device", "cpu"])


@pytest.mark.parametrize("output", ["out", "save-landmarks"])
@pytest.mark.parametrize("option", INPUTS)
def test_generate_keeps_its_inputs(
    films: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], output: str, option: str
) -> None:
    target = films / INPUTS[option]
    given = [f"--{option}", *([] if option == "truth" else [target])] if option in ("box", "mask", "truth") else []
    given += ["--landmarks", target] if option == "landmarks" else []
    other = {"out": [], "save-landmarks": ["--out", tmp_path / "out.mp4"]}[output]
    (tmp_path / "link").symlink_to(films)
    spelt = tmp_path / "link" / "." / target.name
    with kept(tmp_path, capsys, f"--{output} {spelt} is --", "which it would overwrite: give another name"):
        generate(films, weights, f"--{output}", spelt, *given, *other)


def test_generate_keeps_weights_and_its_other_output(
    films: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = shutil.copytree(weights, tmp_path / "weights")
    box = ["--box", "40,20,80,60"]
    for place in ("manifest.json", "face_first/points.jsonl", "lips"):
        with kept(tmp_path, capsys, f"--save-landmarks {own / place} ", "--weights"):
            generate(films, own, *box, "--out", tmp_path / "out.mp4", "--save-landmarks", own / place)
    with kept(tmp_path, capsys, "--save-landmarks", "is --out"):
        generate(films, own, *box, "--out", tmp_path / "a.mp4", "--save-landmarks", tmp_path / "x" / ".." / "a.mp4")
    os.link(films / INPUTS["scene"], tmp_path / "hard.mp4")
    with kept(tmp_path, capsys, "--out", "hard.mp4 is --scene"):
        generate(films, own, *box, "--out", tmp_path / "hard.mp4")


def test_preprocess_keeps_films_manifests_and_pictures(
    films: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A table has folders of its own, from which it removes what it did not write."""
    inside = tmp_path / "out" / "clips" / "monday"
    inside.parent.mkdir(parents=True)
    films.rename(inside)
    for source in (inside, tmp_path / "out", inside / INPUTS["scene"]):
        with kept(tmp_path, capsys, "OUT", "clips contains the film", "give another name"):
            main(["preprocess", str(source), str(tmp_path / "out"), "--backend", "truth"])
    manifest = tmp_path / "table" / "work" / "films.csv"
    manifest.parent.mkdir(parents=True)
    manifest.write_text(f"path\n{inside / INPUTS['scene']}\n")
    with kept(tmp_path, capsys, "table/work contains SOURCE", "films.csv"):
        main(["preprocess", str(manifest), str(tmp_path / "table"), "--backend", "truth"])


def test_a_table_beside_its_films_removes_nothing_of_the_user(films: Path) -> None:
    (films / "clips" / "mine").mkdir(parents=True)
    (films / "clips" / "mine" / "notes.txt").write_text("mine")
    main(["preprocess", str(films), str(films), "--backend", "truth"])
    assert (films / "clips" / "mine" / "notes.txt").read_text() == "mine"
    assert (films / INPUTS["scene"]).exists()
    assert (films / "index.parquet").exists()


def test_inspect_keeps_the_table(table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = shutil.copytree(table, tmp_path / "table")
    part = next((own / "clips").rglob("*.parquet"))
    for place in (own / "index.parquet", part, own / "clips" / "sheet.png"):
        with kept(tmp_path, capsys, f"--out {place}", "TABLE"):
            main(["inspect", str(own), "--out", str(place)])
    with ClipTable(own) as opened, kept(tmp_path, capsys, f"--out {part}", "lies in TABLE"):
        main(["inspect", str(own), "--clip", opened.ids[0], "--out", str(part)])
    main(["inspect", str(own), "--out", str(own / "sheet.png")])
    main(["inspect", str(own), "--out", str(own / "sheet.png")])  # an own output of before is replaced


def test_train_keeps_its_inputs(table: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = shutil.copytree(weights, tmp_path / "weights")
    train = ["train", "lips", "--data", str(table), "--device", "cpu"]
    for given, expected in (
        (["--storage", str(tmp_path / "s"), "--control-from", str(own)], "is --control-from"),
        (["--storage", str(tmp_path / "s"), "--autoencoder", str(own / "lips")], "is --autoencoder"),
        (["--storage", str(own)], "--storage"),
    ):
        settings = ["--set", *_overrides(own)]
        with kept(tmp_path, capsys, "--weights", expected):
            main([*train, "--weights", str(own), *given, *settings])


def _overrides(weights: Path) -> list[str]:
    """The settings of a pipeline, as options."""
    settings = json.loads((weights / "manifest.json").read_text())["settings"]
    settings.pop("preset")
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


def test_export_and_evaluate_keep_the_pipeline(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = shutil.copytree(weights, tmp_path / "weights")
    (tmp_path / "link").symlink_to(own)
    for out in (own, tmp_path / "link", own / "face_first"):
        with kept(tmp_path, capsys, f"OUT {out}", "WEIGHTS"):
            main(["export", str(own), str(out), "--half"])
    for sheet in ("manifest.json", "lips/sheet.png"):
        with kept(tmp_path, capsys, f"--sheet {own / sheet}", "--weights"):
            main(["evaluate", "roundtable", "--weights", str(own), "--sheet", str(own / sheet)])
    ablations = shutil.copytree(own, tmp_path / "ablations" / "one_stage").parent
    sheet = str(ablations / "one_stage" / "manifest.json")
    with kept(tmp_path, capsys, "--sheet", "one_stage/manifest.json is --ablations"):
        main(["evaluate", "roundtable", "--weights", "toy", "--ablations", str(ablations), "--sheet", sheet])
    assert TOY_WEIGHTS.is_dir()


def test_demo_and_weights_keep_their_inputs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out" / "demo.json").mkdir(parents=True)
    with kept(tmp_path, capsys, "demo.json is a folder"):
        main(["demo", "--out", str(tmp_path / "out"), "--storage", str(tmp_path / "storage"), "--device", "cpu"])
    with kept(tmp_path, capsys, "--out", "lies in --storage"):
        place = tmp_path / "storage" / "demo" / "mine"
        main(["demo", "--out", str(place), "--storage", str(tmp_path / "storage"), "--device", "cpu"])
    part = tmp_path / ".face_landmarker.task.part"
    part.write_bytes(b"not a model")
    with kept(tmp_path, capsys, f"the file in --to {part} is --url, which"):
        main(["weights", "fetch", "mediapipe", "--url", f"file://{part}", "--to", str(tmp_path)])
