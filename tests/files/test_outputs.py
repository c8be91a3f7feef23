"""Outputs never overwrite inputs or each other."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tccp.errors import TccpError
from tccp.files import check_outputs, check_writable, check_writable_folder


@pytest.fixture
def film(tmp_path: Path) -> Path:
    path = tmp_path / "films" / "film.mp4"
    path.parent.mkdir()
    path.write_bytes(b"film")
    return path


def spellings(film: Path) -> list[str]:
    """Other names of one file."""
    (film.parent.parent / "link").symlink_to(film)
    (film.parent.parent / "folder").symlink_to(film.parent)
    os.link(film, film.parent.parent / "hard")
    above = film.parent.parent
    return [
        str(film),
        f"{above}/./films//film.mp4",
        f"{above}/films/../films/film.mp4",
        f"{above}/link",
        f"{above}/folder/film.mp4",
        f"{above}/hard",
        f"file://{film}",
        os.path.relpath(film),
    ]


def test_every_spelling_of_an_input_is_refused_as_output(film: Path) -> None:
    for out in spellings(film):
        with pytest.raises(TccpError, match=r"^--out \S+ is --scene.*, which it would overwrite: give another name$"):
            check_outputs({"--out": out}, {"--scene": film, "--mask": None})


def test_two_outputs_with_one_name_are_refused_before_they_exist(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(TccpError, match=r"^--save-landmarks \S+/link/new is --out \S+/new, which it would overwrite"):
        check_outputs({"--out": tmp_path / "new", "--save-landmarks": tmp_path / "link" / "new"}, {})
    check_outputs({"--out": tmp_path / "new", "--save-landmarks": tmp_path / "news"}, {})


def test_two_hard_links_to_one_file_are_refused_as_outputs(film: Path, tmp_path: Path) -> None:
    os.link(film, tmp_path / "hard")
    with pytest.raises(TccpError, match=r"^--b \S+/hard is --a \S+/film.mp4"):
        check_outputs({"--a": film, "--b": tmp_path / "hard"}, {})


def test_outputs_inside_and_around_inputs_are_refused(film: Path, tmp_path: Path) -> None:
    with pytest.raises(TccpError, match=r"--out .*/films contains --scene .*/film.mp4, which it would overwrite"):
        check_outputs({"--out": film.parent}, {"--scene": film})
    with pytest.raises(TccpError, match=r"--out .*/films/new.mp4 lies in --weights .*/films, which it would change"):
        check_outputs({"--out": film.parent / "new.mp4"}, {"--weights": [tmp_path / "other", film.parent]})
    check_outputs({"OUT": [film.parent / "index", film.parent / "clips"]}, {"SOURCE": film})
    check_outputs({"OUT": tmp_path / "film"}, {"SOURCE": film})


def test_urls_are_compared_without_user_and_query(tmp_path: Path) -> None:
    inputs = {"SOURCE": ["https://me:secret@host/films/a.mp4?token=secret", "s3://bucket/films/b.mp4"]}
    for out in ("https://host/films/a.mp4", "https://host/films/./x/../a.mp4", "s3://bucket/films//b.mp4"):
        with pytest.raises(TccpError, match=r"^OUT .* is SOURCE") as caught:
            check_outputs({"OUT": out}, inputs)
        assert "secret" not in str(caught.value)
    for out in ("s3://bucket/films/", "s3://bucket", "https://host/films"):
        with pytest.raises(TccpError, match=r"^OUT .* contains SOURCE"):
            check_outputs({"OUT": out}, inputs)
    check_outputs({"OUT": "s3://other/films/b.mp4"}, inputs)


def test_unwritable_outputs_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    for path, reason in (
        (tmp_path, "is a folder"),
        (tmp_path / "pipe", "is a device or pipe"),
        (Path("/dev/null"), "is a device or pipe"),
        (tmp_path / "file" / "x.mp4", "Not a directory"),
        (Path("/proc/x/y.mp4"), "cannot write --out /proc/x/y.mp4: "),
    ):
        with pytest.raises(TccpError, match=re.escape(reason)):
            check_writable("--out", path)
    with pytest.raises(TccpError, match=r"--weights .*/file is not a folder"):
        check_writable_folder("--weights", tmp_path / "file")
    with pytest.raises(TccpError, match=r"cannot write --weights .*/file/x: Not a directory"):
        check_writable_folder("--weights", tmp_path / "file" / "x")
    check_writable("--out", tmp_path / "new" / "deep" / "x.mp4")
    check_writable_folder("--weights", tmp_path / "new" / "deep")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "pipe"]
