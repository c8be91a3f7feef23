"""A list of films to generate, and the record of what became of them, so that an interrupted run can go on."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tccp.errors import TccpError
from tccp.files import atomic_path, check_outputs
from tccp.inference.film import FilmRequest, FilmResult, request_inputs
from tccp.inference.manifest import pipeline_files
from tccp.strict_json import parse_json

RECORD = "films.json"


def _switch(text: str) -> bool:
    if text.lower() not in ("true", "false", "yes", "no", "1", "0"):
        raise ValueError("give true or false")
    return text.lower() in ("true", "yes", "1")


def _point(text: str) -> tuple[float, float]:
    x, y = map(float, text.replace(",", " ").split())
    return x, y


_READ: dict[str, Callable[[str], Any]] = {
    "scene": Path, "audio": Path, "identity": Path, "out": Path, "mask": Path, "landmarks": Path,
    "save_landmarks": Path, "box": str, "truth": _switch, "person": _point, "identity_box": str, "extend": str,
    "seed": int, "steps": int, "solver": str, "guidance_scale": float, "time_power": float, "temperature": float,
    "redraw": _switch, "color_match": _switch, "lossless": _switch, "exact_size": _switch,
}  # fmt: skip
_NEEDED = ("scene", "audio", "identity")
_OUTPUTS = ("out", "save_landmarks")
_CHOICES = {"extend": ("no", "freeze", "pingpong"), "solver": ("ddpm", "ddim", "dpmpp")}


def read_film_list(path: Path, out: Path, **options: Any) -> list[FilmRequest]:
    """The requests of a CSV file: a column for each field of `FilmRequest` that a film has of its own.

    Columns: scene, audio and identity; optional: out and others, whose empty cells mean the default. Inputs are
    relative to the list's folder; outputs are in the folder `out`. The default out is the number of the row: 0001.mp4.
    options: fields of all requests. Raises TccpError for a list that cannot be read, naming row and column, and for
    outputs that would overwrite an input or each other.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file, strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise TccpError(f"{path} cannot be read ({reason}): give a CSV file in UTF-8") from None
    if not rows:
        raise TccpError(f"{path} lists no film: give a line with {', '.join(_NEEDED)}, and a line for each film")
    _check_columns(path, list(rows[0]))
    requests = [_request(path, out, number, row, options) for number, row in enumerate(rows, 1)]
    outputs: dict[str, Any] = {"the record": out / RECORD}
    inputs: dict[str, Any] = {"the list": path, "--weights": request_inputs(requests[0])["--weights"]}
    for number, request in enumerate(requests, 1):
        outputs |= {f"{name} of row {number}": getattr(request, name) for name in _OUTPUTS}
        for option, given in request_inputs(request).items():
            if option != "--weights":
                inputs[f"{option.removeprefix('--')} of row {number}"] = given
    check_outputs(outputs, inputs)
    return requests


def _check_columns(path: Path, columns: list[str | None]) -> None:
    if None in columns:
        raise TccpError(f"{path}: row 1 has more cells than the first line has names: give one name for each column")
    if unknown := [name for name in columns if name not in _READ]:
        raise TccpError(f"{path} has a column {unknown[0]!r}: give columns among {', '.join(_READ)}")
    if missing := [name for name in _NEEDED if name not in columns]:
        raise TccpError(f"{path} has no column {missing[0]!r}: every film needs {', '.join(_NEEDED)}")


def _request(path: Path, out: Path, number: int, row: Mapping[str, str | None], options: dict[str, Any]) -> FilmRequest:
    given: dict[str, Any] = {"out": f"{number:04d}.mp4"}
    for name, text in row.items():
        if name is None or text is None:
            raise TccpError(f"{path}: row {number} has another number of cells than the first line")
        if text.strip():
            given[name] = _value(path, number, name, text.strip())
    for name in _NEEDED:
        if name not in given:
            raise TccpError(f"{path}: row {number} has no {name}: every film needs {', '.join(_NEEDED)}")
    for name, value in given.items():
        if name in _OUTPUTS:
            if Path(value).is_absolute() or ".." in Path(value).parts:
                raise TccpError(
                    f"{path}: row {number}, {name}: {value} is not in {out}: give a path within that folder"
                )
            given[name] = out / value
        elif isinstance(value, Path):
            given[name] = path.parent / value
    box = given.get("box")
    if box is not None and box.endswith(".json"):
        given["box"] = str(path.parent / box)
    return FilmRequest(**given, **options)


def _value(path: Path, number: int, name: str, text: str) -> Any:
    try:
        value = _READ[name](text)
    except ValueError:
        kind = {int: "a whole number", float: "a number", _switch: "true or false", _point: "two numbers, x y"}
        raise TccpError(f"{path}: row {number}, {name}: {text!r} is not {kind[_READ[name]]}") from None
    if name in _CHOICES and value not in _CHOICES[name]:
        raise TccpError(f"{path}: row {number}, {name}: {text!r} is none of {', '.join(_CHOICES[name])}")
    return value


class FilmRecord:
    """What became of the films of a list, in `films.json` in their folder. It is written after every film."""

    def __init__(self, folder: Path):
        """Raises TccpError if there is a record that is damaged."""
        self.path = folder / RECORD
        self._rows: dict[str, dict[str, Any]] = {}
        if self.path.exists():
            try:
                self._rows = {row["out"]: row for row in parse_json(self.path.read_bytes())["films"]}
            except (OSError, ValueError, KeyError, TypeError):
                raise TccpError(f"{self.path} is damaged: remove it; then all films are made again") from None

    def made(self, request: FilmRequest) -> bool:
        """Whether the film is there, made from the same inputs with the same options."""
        row = self._rows.get(str(request.out))
        return row is not None and "error" not in row and row["key"] == _key(request) and Path(row["out"]).exists()

    def add(self, request: FilmRequest, result: FilmResult | None, error: str | None) -> None:
        row: dict[str, Any] = {"out": str(request.out), "key": _key(request)}
        row |= {"error": error} if result is None else result.to_json()
        self._rows[row["out"]] = row
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(self.path) as part:
            rows = sorted(self._rows.values(), key=lambda row: row["out"])
            part.write_text(json.dumps({"films": rows}, indent=1) + "\n")


def _key(request: FilmRequest) -> str:
    """Identifies a request: its options, its input files by size and time, and its weights."""
    options = dataclasses.asdict(request)
    for name in ("overlap", "device", "batch"):
        del options[name]
    files = []
    for given in request_inputs(request).values():
        for file in given if isinstance(given, list) else [given]:
            if file is not None and Path(file).is_file():
                stat = Path(file).stat()
                files.append((str(file), stat.st_size, stat.st_mtime_ns))
    of_weights = pipeline_files(request.weights, ())
    manifest = of_weights[0].read_text() if of_weights and of_weights[0].is_file() else ""
    text = json.dumps([options, files, manifest], default=str, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
