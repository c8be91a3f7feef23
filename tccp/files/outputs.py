"""Refuses outputs of a command that would overwrite its inputs or each other, and outputs that cannot be written."""

from __future__ import annotations

import os
import posixpath
import re
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from tccp.errors import TccpError
from tccp.files.urls import is_url, local_path, redacted

Place = str | Path
Places = Mapping[str, Place | Iterable[Place] | None]
"""Paths and URLs by the option that names them, such as `--out`; None for options that are not given."""


def check_outputs(outputs: Places, inputs: Places) -> None:
    """Raises TccpError if an output is an input or another output, lies in one, or contains one.

    Give for a folder that the command fills the files and subfolders that it writes or removes there, and for a folder
    that it reads those that it reads. Links, hard links and different spellings of a path are one place; the outputs
    need not exist yet.
    """
    read, written = list(_listed(inputs)), list(_listed(outputs))
    by_place: dict[str, tuple[str, str]] = {}
    known: dict[tuple[int, int], tuple[str, str]] = {}  # files by device and inode
    replaces = any(_inode(place) for _, place in written)
    for option, place in read:
        by_place.setdefault(_resolved(place), (option, place))
        if replaces and (inode := _inode(place)) is not None:
            known.setdefault(inode, (option, place))
    for option, place in written:
        resolved, inode = _resolved(place), _inode(place)
        if inode in known:
            raise _overlap(option, place, "is", *known[inode])
        _check_apart(option, place, resolved, by_place)
        if inode is not None:
            known[inode] = option, place
        by_place[resolved] = option, place


def check_writable(option: str, path: Path) -> None:
    """Raises TccpError if a file cannot be created at `path`. Leaves nothing behind."""
    _check_file(option, path)
    _try_folder(option, path, path.absolute().parents)


def check_writable_folder(option: str, path: Path) -> None:
    """Raises TccpError if files cannot be created in the folder `path`, which need not exist. Leaves nothing behind."""
    if os.path.lexists(path) and not path.is_dir():
        raise TccpError(f"{option} {path} is not a folder: give the name of a folder")
    _try_folder(option, path, (path.absolute(), *path.absolute().parents))


def _check_file(option: str, path: Path) -> None:
    """Only a regular file can be replaced: to write to a device or pipe would remove it."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return  # there is none yet, or `_try_folder` says why it cannot be made
    if stat.S_ISDIR(mode):
        raise TccpError(f"{option} {path} is a folder: give the name of a file")
    if not stat.S_ISREG(mode):
        raise TccpError(f"{option} {path} is a device or pipe, not a file: give the name of a file")


def _try_folder(option: str, path: Path, folders: Iterable[Path]) -> None:
    folder = next(folder for folder in folders if os.path.lexists(folder))
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise TccpError(
            f"cannot write {option} {path}: {error.strerror} ({folder}); give a folder that can be written"
        ) from None


def _listed(places: Places) -> Iterator[tuple[str, str]]:
    for option, given in places.items():
        if given is not None:
            for place in [given] if isinstance(given, str | Path) else given:
                yield option, local_path(str(place))


def _resolved(place: str) -> str:
    """One text for all spellings of a place: the path behind links, or the URL without user and query."""
    if not is_url(place):
        return os.path.realpath(place)
    protocol, _, rest = re.sub(r"://[^/@]*@", "://", place).partition("://")
    host, _, path = rest.partition("/")
    if protocol.startswith("http"):
        path = path.partition("?")[0].partition("#")[0]
    return f"{protocol.lower()}://{host}{posixpath.normpath('/' + path)}".rstrip("/")


def _inode(place: str) -> tuple[int, int] | None:
    """Device and inode of an existing file, which hard links share."""
    if is_url(place):
        return None
    try:
        found = os.stat(place)
    except (OSError, ValueError):
        return None
    return (found.st_dev, found.st_ino) if stat.S_ISREG(found.st_mode) else None


def _check_apart(option: str, place: str, resolved: str, others: Mapping[str, tuple[str, str]]) -> None:
    if resolved in others:
        raise _overlap(option, place, "is", *others[resolved])
    above = posixpath.dirname(resolved)
    while above not in ("", posixpath.dirname(above)):
        if above in others:
            raise _overlap(option, place, "lies in", *others[above])
        above = posixpath.dirname(above)
    below = resolved.rstrip("/") + "/"
    for other, named in others.items():
        if other.startswith(below):
            raise _overlap(option, place, "contains", *named)


def _overlap(option: str, place: str, how: str, other: str, at: str) -> TccpError:
    named = other if at == place else f"{other} {redacted(at)}"
    harm = "change" if how == "lies in" else "overwrite"
    return TccpError(f"{option} {redacted(place)} {how} {named}, which it would {harm}: give another name")
