"""Finds weights on this machine and identifies their content."""

from __future__ import annotations

import functools
import hashlib
import os
from pathlib import Path
from typing import Any

from tccp.config import storage_root
from tccp.errors import TccpError
from tccp.weights.weight_table import WEIGHTS, Weight, entry

FOLDER_VARIABLE = "TCCP_WEIGHTS"
"""Environment variable: a folder that replaces <storage>/weights. Files that are not in it count as absent."""


def default_folder() -> Path:
    """The folder of weights: TCCP_WEIGHTS, else <storage>/weights."""
    return Path(os.environ.get(FOLDER_VARIABLE) or storage_root() / "weights").expanduser()


def find(which: str | Weight, given: Path | None = None) -> Path:
    """Finds a file of weights on this machine. Does not download it or check its content.

    given: the file, under any name, or its folder; by default `default_folder()`.
    Raises TccpError that names the path searched and the command that fetches the file.
    """
    weight = entry(which)
    candidates = [(given or default_folder()) / name for name in weight.names]
    if given is not None and (given.is_file() or (not given.is_dir() and given.suffix == Path(weight.file).suffix)):
        candidates = [given]
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        raise TccpError(_absent(weight, candidates[0], given))
    return found


def _absent(weight: Weight, path: Path, given: Path | None) -> str:
    alternative = f"; or {weight.alternative}" if weight.alternative else ""
    if given is None:
        return (
            f"no {weight.label} weights at {path}: fetch them with `tccp weights fetch {weight.name}`, put the file "
            f"there, or name its folder in {FOLDER_VARIABLE}{alternative}"
        )
    where = f"{path}" if given.exists() else f"{path} ({given} does not exist)"
    return (
        f"no {weight.label} weights at {where}: give {weight.file} or its folder, which `tccp weights fetch "
        f"{weight.name} --to FOLDER` writes, or leave the option out to use those of {default_folder()}{alternative}"
    )


def available(which: str | Weight, given: Path | None = None) -> Path | None:
    """Like `find`, but returns None if there is no such file."""
    weight = entry(which)
    try:
        return find(weight, given)
    except TccpError:
        return None


def weights_key(path: Path) -> str:
    """SHA-256 of a file's content in hex, for the hashes of results made with it. Cached until the file changes."""
    stat = path.stat()
    return _digest_of(str(path.resolve()), stat.st_size, stat.st_mtime_ns)


@functools.cache
def _digest_of(path: str, size: int, mtime_ns: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def listing(given: Path | None = None) -> list[dict[str, Any]]:
    """One record per entry of the table: its fields, `path` (None if absent), and `state`.

    state: `verified`, `unverified` (no hash is known), `differs` (not the published file) or `absent`.
    """
    records = []
    for weight in WEIGHTS.values():
        path = available(weight, given)
        record = {key: getattr(weight, key) for key in ("name", "file", "purpose", "licence", "extra", "url", "sha256")}
        record |= {"size_bytes": weight.size_bytes, "path": None if path is None else str(path), "state": "absent"}
        if path is not None:
            same = weights_key(path) == weight.sha256
            record["state"] = "unverified" if weight.sha256 is None else "verified" if same else "differs"
        records.append(record)
    return records


def text_table(records: list[dict[str, Any]]) -> str:
    """The records of `listing` as text, one line each."""
    lines = []
    for record in records:
        size = "?" if record["size_bytes"] is None else f"{record['size_bytes'] / 1e6:.1f}"
        about = f"{record['purpose']} ({record['licence']})"
        lines.append(f"{record['name']:10}  {record['state']:10}  {size:>5} MB  {record['path'] or about}")
    return "\n".join(lines)
