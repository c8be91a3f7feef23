"""What a checkpoint folder contains, and whether it still does: each rank lists its files with sizes and hashes.

A loss of power or a full disk can leave a folder whose files are cut short, empty or missing. A training then takes the
checkpoint before it.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

from tccp.files import Folder
from tccp.training.engine import DEEPSPEED_TAG, OPTIMISER_FILE

EMA_FILE = "ema.pt"
PROGRESS_FILE = "progress.json"
CONTENTS = "contents-{rank}.json"


def write_contents(folder: Path, rank: int = 0, num_ranks: int = 1) -> None:
    """Lists the files that a rank has written to its part of a checkpoint, in the folder of that part."""
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    record = {"ranks": num_ranks, "files": files}
    (folder / CONTENTS.format(rank=rank)).write_text(json.dumps(record, indent=1) + "\n")


def damage_of(folder: Folder, name: str) -> str | None:
    """Why the checkpoint `name` in a folder cannot be used: the first file that is damaged, and how; None if none is.

    Files of this machine are compared with their hashes, those at a URL by their sizes alone: object stores show whole
    objects only. Of a checkpoint without lists, which an earlier version wrote, it finds what can be found without.
    """
    try:
        first = _contents(folder, name, 0)
        if first is None:
            return _damage_without_contents(folder, name)
        for rank in range(first["ranks"]):
            record = first if rank == 0 else _contents(folder, name, rank)
            if record is None:
                return f"{CONTENTS.format(rank=rank)} is missing"
            for file, expected in record["files"].items():
                problem = _difference(folder, f"{name}/{file}", expected)
                if problem is not None:
                    return f"{file} {problem}"
    except _DamagedList as error:
        return str(error)
    return None


class _DamagedList(Exception):
    pass


def _contents(folder: Folder, name: str, rank: int) -> dict[str, Any] | None:
    file = CONTENTS.format(rank=rank)
    try:
        record = json.loads(folder.read(f"{name}/{file}"))
        return {"ranks": int(record["ranks"]), "files": dict(record["files"])}
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError):
        raise _DamagedList(f"{file} is cut short") from None


def _difference(folder: Folder, file: str, expected: dict[str, Any]) -> str | None:
    size = folder.size(file)
    if size is None:
        return "is missing"
    if size != expected["bytes"]:
        return f"has {size} of {expected['bytes']} bytes"
    if folder.local is not None and _sha256(folder.local / file) != expected["sha256"]:
        return "has other content than was written"
    return None


def _damage_without_contents(folder: Folder, name: str) -> str | None:
    names = folder.tree(name)
    engines = (OPTIMISER_FILE, DEEPSPEED_TAG)
    if not names:
        return "it is empty"
    if not any(file.split("/")[0] in (*engines, EMA_FILE, PROGRESS_FILE) for file in names):
        return None  # not from this package: nothing is known about it
    for needed in (EMA_FILE, PROGRESS_FILE):
        if needed not in names:
            return f"{needed} is missing"
    if not any(file.split("/")[0] in engines for file in names):
        return f"{OPTIMISER_FILE} is missing"
    for file in names:
        if not folder.size(f"{name}/{file}"):
            return f"{file} is empty"
        if folder.local is not None and not _is_whole(folder.local / name / file):
            return f"{file} is cut short"
    return None


def _is_whole(path: Path) -> bool:
    """Whether a JSON file, or an archive of torch, can be read to its end. Others are taken as whole."""
    try:
        if path.suffix == ".json":
            json.loads(path.read_bytes())
        if path.suffix == ".pt":
            with zipfile.ZipFile(path) as archive:
                return archive.testzip() is None
    except (ValueError, zipfile.BadZipFile):
        return False
    return True


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
