"""What can be checked without a network is refused before torch is imported, which takes seconds."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from tiny import write_film

from tccp.cli import main
from tccp.cli.options import settings_of, unshortened
from tccp.roundtable import identity_path

pytest_plugins = ["tiny_fixtures"]

_SLOW = "torch", "diffusers", "ray", "mediapipe"
_NOT_OF_FILMS = "diffusers", "ray", "mediapipe", "librosa", "numba", "scipy", "pandas", "pyarrow"
_LINE = """
import sys
from tccp.cli import main
code = None
for line in sys.stdin:
    try:
        main(line.rstrip("\\n").split("\\t"))
        code = 0
    except SystemExit as error:
        code = error.code
    print(code, sorted(set(sys.argv[1:]) & sys.modules.keys()), flush=True)
"""


@contextmanager
def watched(packages: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """A process that runs command lines, and says after each its exit code and which of the packages are imported."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, "-c", _LINE, *packages], text=True, **pipes) as process:
        yield process
        process.stdin.close()  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def fresh() -> Iterator[subprocess.Popen[str]]:
    with watched(_SLOW) as process:
        yield process


def asked(process: subprocess.Popen[str], *command: object) -> str:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("\t".join(map(str, command)) + "\n")
    process.stdin.flush()
    while not (line := process.stdout.readline().strip()).endswith("]"):
        assert line, "the process has ended"
    return line


def test_refusals_do_not_wait_for_torch(
    film: Path, weights: Path, shared_weights: Path, tmp_path: Path, fresh: subprocess.Popen[str]
) -> None:
    small = write_film(tmp_path / "small.mp4", np.zeros((25, 48, 64, 3), np.uint8))
    base = ["generate", "--scene", film, "--audio", film, "--identity", identity_path(film), "--identity-box", "whole"]
    base += ["--weights", weights, "--out", tmp_path / "out.mp4", "--device", "cpu"]
    box = ["--box", "40,20,80,60"]
    (tmp_path / "track.json").write_text("{}")
    for wrong in (
        ["--box", "900,1,950,51"],
        ["--box", tmp_path / "track.json"],
        ["--mask", small],
        ["--person", "900", "900"],
        ["--person", "9", "9", *box],
        ["--detector-weights", tmp_path / "none"],
        [*box, "--out", film],
        [*box, "--out", "/proc/out.mp4"],
        [*box, "--weights", tmp_path / "none"],
        [*box, "--weights", "nope"],
        [*box, "--preset", "nosuch"],
        [*box, "--preset", "paper"],
        [*box, "--steps", "0"],
        [*box, "--steps", "5000"],
        [*box, "--identity-box", "900,1,950,51"],
        [*box, "--landmarks", tmp_path / "track.json"],
        [*box, "--scene", tmp_path / "none.mp4"],
    ):
        assert asked(fresh, *base, *wrong) == "2 []", wrong
    for command in (
        ["preprocess", tmp_path / "none.mp4", tmp_path / "clips"],
        ["preprocess", film, "/proc/clips", "--backend", "truth"],
        ["preprocess", film, tmp_path / "clips", "--weights", tmp_path / "none"],
        ["preprocess", film, tmp_path / "clips", "--workers", "0"],
        ["train", "nosuch", "--data", tmp_path, "--weights", weights],
        ["train", "all", "--data", tmp_path / "none", "--weights", tmp_path / "w"],
        ["evaluate", "roundtable", "--weights", "nope"],
        ["evaluate", "roundtable", "--weights", "toy", "--sheet", "/proc/sheet.png"],
        ["evaluate", "roundtable", "--weights", "toy", "--clips", "1"],
        ["export", "nope", tmp_path / "out"],
        ["inspect", tmp_path / "none"],
        ["demo", "--out", "/proc/demo", "--device", "cpu"],
    ):
        assert asked(fresh, *command) == "2 []", command


def test_a_film_needs_no_package_that_is_slow_to_import(film: Path, weights: Path, tmp_path: Path) -> None:
    command = ["generate", "--scene", film, "--audio", film, "--identity", film, "--truth", "--weights", weights]
    with watched(["torch", *_NOT_OF_FILMS]) as process:
        assert asked(process, *command, "--out", tmp_path / "out.mp4", "--device", "cpu") == "0 ['torch']"


def test_training_all_says_at_once_that_all_is_there(
    tmp_path: Path, fresh: subprocess.Popen[str], capsys: pytest.CaptureFixture[str]
) -> None:
    toy = shutil.copytree("tccp/toy", tmp_path / "toy")
    command = ["train", "all", "--data", tmp_path, "--weights", toy, "--storage", tmp_path / "storage"]
    assert asked(fresh, *command) == "0 []"
    assert asked(fresh, *command, "--set", "window=4") == "2 []"  # other settings are refused all the same


def test_what_training_max_steps_leaves_alone_is_said() -> None:
    given = (("training.max_steps=5",),)
    text = unshortened(("autoencoder", "lips", "face_first"), given, None, settings_of("toy", given))
    assert text is not None
    assert "autoencoder trains 16,000 steps (autoencoder.max_steps)" in text
    assert "lips trains 1,200 steps (lips.liplet_steps)" in text and "--max-steps N applies to every component" in text
    assert unshortened(("face_first",), given, None, settings_of("toy", given)) is None
    assert unshortened(("autoencoder", "lips"), given, 5, settings_of("toy", given, 5)) is None
    both = (("training.max_steps=5", "autoencoder.max_steps=5"), ("lips.liplet_steps=5",))
    assert unshortened(("autoencoder", "lips"), both, None, settings_of("toy", both)) is None
    published = (*given, ("lips.source=wav2lip", "lips.size_px=96"))
    text = unshortened(("autoencoder", "lips"), published, None, settings_of("toy", published))
    assert text is not None and "lips" not in text.replace("liplet", "")


def test_max_steps_shortens_every_component() -> None:
    settings = settings_of("toy", (), 7)
    assert settings.autoencoder.max_steps == settings.lips.liplet_steps == 7
    assert {settings.for_variant(name).training.max_steps for name in settings.variant_overrides} == {7}


def test_resume_and_restart_exclude_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "lips", "--data", "D", "--weights", str(tmp_path / "w"), "--resume", "--restart"])
    assert "--resume continues a run and --restart removes it: give one of them" in capsys.readouterr().err
