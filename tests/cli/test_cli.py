"""The commands: help without heavy imports, pure JSON output, and every verb as users call it."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
from tiny import ROOT, tccp_from_scratch

from ray_jobs import preprocess as preprocess_job
from ray_jobs import train_command
from tccp.cli import VERBS, main, parse
from tccp.cli.options import settings_of
from tccp.media import probe
from tccp.roundtable import identity_path, truth_path

pytest_plugins = ["tiny_fixtures"]
SETTINGS_OPTIONS = ("preset", "set", "max_steps")


def test_help_imports_no_heavy_package() -> None:
    code = (
        "import sys\n"
        "from tccp.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'numpy', 'cv2', 'av', 'diffusers', 'mediapipe', 'pyarrow', 'scipy'}\n"
        "print(sorted(heavy & sys.modules.keys()), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert all(verb in done.stdout for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([verb, "--help"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    summary = str(VERBS[verb].__doc__).split()[:4]
    assert " ".join(summary) in " ".join(printed.split())


@pytest.mark.parametrize("arguments", [["nothing"], ["generate"], ["synth"], ["describe", "--presets", "toy"]])
def test_wrong_usage_exits_with_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    assert captured.out == ""


@pytest.mark.parametrize("arguments", [["describe", "--preset", "big"], ["describe", "--set", "windw=3"]])
def test_unknown_presets_and_settings_give_a_one_line_error(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert arguments[-1].split("=")[0] in line


NOWHERE = ["evaluate", "roundtable", "--weights", "nowhere"]
TRAIN = ["--data", "nowhere", "--weights", "W"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (NOWHERE, "nowhere"),
        ([*NOWHERE, "--clips", "0"], "--clips 0"),
        ([*NOWHERE, "--jobs", "0"], "--jobs 0"),
        ([*NOWHERE, "--device", "gpu"], "--device gpu: give auto, cpu, cuda or cuda:N"),
        ([*NOWHERE, "--device", "cuda:9"], "use --device c"),
        (["train", "all", "lips", *TRAIN], "not both"),
        (["train", *TRAIN], "name components"),
        (["synth", "films", "--seconds", "nan"], "clips of nan s"),
        (["synth", "films", "--seconds", "0"], "clips of 0.0 s: give at least"),
        (["synth", "films", "--excerpt", "inf"], "excerpt of inf s"),
        (["preprocess", "films", "clips", "--max-clip-s", "inf"], "max_clip_s inf: give a number of seconds"),
        (["preprocess", "films", "clips", "--min-clip-s", "nan"], "min_clip_s nan"),
        (["export", "W", "V", "--set", "training.max_steps=3"], "sampling.* can be changed"),
    ],
)
def test_invalid_arguments_give_a_one_line_error(
    arguments: list[str],
    expected: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert not list(tmp_path.iterdir())
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert expected in line
    assert captured.out == ""


def stdout_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    capsys.readouterr()
    main([str(argument) for argument in arguments])
    return json.loads(capsys.readouterr().out)


def test_doctor(storage: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checks = stdout_of(capsys, "doctor", "--json")["checks"]
    assert {"python", "torch", "storage"} <= {check["name"] for check in checks}
    assert all(check["ok"] for check in checks if check["required"])
    (confinement,) = [check for check in checks if check["name"] == "decoder's confinement"]
    assert confinement["found"].startswith("active (seccomp): no network, no new processes, no file but its input")


def test_describe(capsys: pytest.CaptureFixture[str]) -> None:
    record = stdout_of(capsys, "describe", "--preset", "toy", "--json")
    rows = {row["variant"]: row for row in record["variants"]}
    assert len(rows) == 6
    for row in rows.values():
        assert 0 < row["control_params"] < row["params"]
        assert row["gflop_per_window"] > 0
    assert rows["face_sequence"]["gflop_per_window"] > 4 * rows["face_first"]["gflop_per_window"]


def test_synth_preprocess_and_generate_print_json(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """synth, preprocess and generate with --json: one object on stdout, progress elsewhere."""
    footage = tmp_path / "footage"
    made = stdout_of(capsys, "synth", footage, "--clips", 2, "--seconds", 1, "--seed", 3, "--json")
    films = [Path(film) for film in made["films"]]
    assert len(films) == 2
    assert all(path.is_file() for film in films for path in (film, truth_path(film), identity_path(film)))

    clips = stdout_of(capsys, "preprocess", footage, tmp_path / "clips", "--backend", "truth", "--json")
    assert (clips["clips"], clips["frames"]) == (2, 50)
    assert {Path(source["source"]).name for source in clips["sources"]} == {film.name for film in films}

    out = tmp_path / "out.mp4"
    given = {"scene": films[0], "audio": films[1], "identity": identity_path(films[0]), "weights": weights, "out": out}
    options = [f"--{name}={value}" for name, value in given.items()]
    film = stdout_of(capsys, "generate", *options, "--truth", "--steps", 1, "--device", "cpu", "--json")
    assert (film["frames"], film["generated"], film["passed_through"]) == (25, 25, 0)
    assert film["out"] == str(out)
    assert film["warnings"] == []
    assert probe(out).num_frames == 25


def test_generate_in_its_own_process(film: Path, weights: Path, tmp_path: Path) -> None:
    given = {
        "scene": film,
        "audio": film,
        "identity": identity_path(film),
        "weights": weights,
        "out": tmp_path / "a.mp4",
    }
    options = [f"--{name}={value}" for name, value in given.items()]
    done = tccp_from_scratch("generate", *options, "--truth", "--steps", 1, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["frames"] == 25
    assert "Warning" not in done.stderr


def test_missing_device_gives_an_error_with_the_fix(
    film: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    given = {"scene": film, "audio": film, "identity": film, "weights": weights, "out": tmp_path / "a.mp4"}
    with pytest.raises(SystemExit) as caught:
        main(["generate", *[f"--{name}={value}" for name, value in given.items()], "--device", "cuda"])
    assert caught.value.code == 2
    assert "--device cpu" in capsys.readouterr().err


def test_closed_pipe_causes_no_traceback() -> None:
    """`tccp describe | head -1` must not end in a traceback."""
    command = f"{sys.executable} -m tccp.cli describe --preset toy | head -n 1"
    done = subprocess.run(["sh", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert "Traceback" not in done.stderr


def test_settings_options_are_the_same_in_tccp_and_the_jobs(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--preset", "toy", "--set", "window=4", "lips.size_px=16", "--set", "window=3", "--max-steps", "7"]
    ours = parse(["train", "lips", "--data", "D", "--weights", "W", *options])
    for stage in get_args(train_command.Stage):
        calls = [ours, train_command.parse(stage, options)]
        tccp_train, job = (settings_of(*(one.keywords[key] for key in SETTINGS_OPTIONS)) for one in calls)
        assert tccp_train == job
        assert (job.window, job.lips.size_px, job.autoencoder.max_steps) == (3, 16, 7), "a --set was ignored"
        with pytest.raises(SystemExit) as caught:
            train_command.parse(stage, ["window=4"])
        assert caught.value.code == 2
    capsys.readouterr()


def test_shared_options_have_the_same_type_and_help() -> None:
    """`tccp` and the jobs use the same annotation object for each shared option."""
    of_commands = [inspect.signature(one, eval_str=True).parameters for one in (VERBS["train"], VERBS["preprocess"])]
    of_jobs = inspect.signature(train_command.train, eval_str=True).parameters
    for name in (*SETTINGS_OPTIONS, "backend", "resume", "lip_weights", "json"):
        annotations = [one[name].annotation for one in of_commands if name in one]
        assert annotations
        assert all(one == of_jobs[name].annotation for one in annotations), name
    assert preprocess_job.arguments(["a", "b", "--set", "window=4"]) == [
        "preprocess", "a", "b", "--set", "window=4", "--ray",
    ]  # fmt: skip
