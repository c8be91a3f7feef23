"""Files that appear under their names only when they are complete."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from tccp.errors import StorageError, TccpError
from tccp.files.retry import AccessError, first_line, retried, translated_errors

_Result = TypeVar("_Result")


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that is renamed to `path` on success and removed after an error.

    Raises TccpError if the folder cannot be written or the disk is full, StorageError if its disk fails.
    """
    temporary = _tried(path, lambda: _created(path))
    try:
        with translated_errors(f"write {path}"):
            yield temporary
        _tried(path, lambda: _renamed(temporary, path))
    finally:
        _removed(temporary)


def write_atomic(path: Path, content: bytes) -> None:
    """Writes a file in one step, and again if its disk fails. Raises as `atomic_path`."""

    def write() -> None:
        temporary = _created(path)
        try:
            temporary.write_bytes(content)
            _renamed(temporary, path)
        finally:
            _removed(temporary)

    _tried(path, write)


def _tried(path: Path, action: Callable[[], _Result]) -> _Result:
    try:
        return retried(f"write {path}", action)
    except (AccessError, FileNotFoundError) as error:
        reason = error.reason if isinstance(error, AccessError) else first_line(error)
        raise TccpError(f"cannot write {path}: {reason}; choose a folder that can be written") from None


def _created(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    return Path(name)


def _renamed(temporary: Path, path: Path) -> None:
    try:
        temporary.chmod(0o666 & ~_umask())  # mkstemp's files are private, the result is not
        temporary.replace(path)
    except FileNotFoundError:
        reason = "its folder has disappeared meanwhile"
        raise StorageError(
            f"cannot write {path}: {reason}; check the disk, then give the same command again", reason
        ) from None


def _removed(temporary: Path) -> None:
    with suppress(OSError):
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
