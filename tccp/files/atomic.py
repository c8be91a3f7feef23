"""Files and folders that appear under their names only when they are complete, and then survive a loss of power.

What is written goes to the disk (`fsync`) before the rename that gives it its name, and the rename goes there after it.
Otherwise a machine that stops may keep the name and lose the content.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from tccp.errors import StorageError, TccpError
from tccp.files.retry import AccessError, first_line, retried, translated_errors

_Result = TypeVar("_Result")
_FOLDERS_WITHOUT_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES}
"""How filesystems say that they cannot sync a folder. What they do to a rename is then out of our hands."""


def sync(path: Path) -> None:
    """Waits until the disk has a file's content, or the names in a folder. Raises OSError if the disk fails."""
    is_folder = path.is_dir()
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if not is_folder or error.errno not in _FOLDERS_WITHOUT_SYNC:
            raise


def sync_tree(folder: Path) -> None:
    """`sync` for a folder and everything in it."""
    for path in folder.rglob("*"):
        if not path.is_symlink():
            sync(path)
    sync(folder)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that is renamed to `path` on success and removed after an error.

    Raises TccpError if the folder cannot be written or the disk is full, StorageError if its disk fails.
    """
    temporary, mode = _tried(path, lambda: _created(path))
    try:
        with translated_errors(f"write {path}"):
            yield temporary
            # Not repeated after a failure: the system reports it once, and the second time as a success.
            _synced(temporary)
        _tried(path, lambda: _renamed(temporary, path, mode))
    finally:
        _removed(temporary)


@contextmanager
def atomic_folder(final: Path) -> Iterator[Path]:
    """A temporary folder beside `final` that takes its place on success and is removed after an error.

    Raises TccpError if the disk is full, StorageError if it fails.
    """
    with translated_errors(f"write {final}"):
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = _new_folder(final)
    try:
        with translated_errors(f"write {final}"):
            yield temporary
            sync_tree(temporary)
            if final.exists():
                shutil.rmtree(final)
            os.replace(temporary, final)
            sync(final.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_atomic(path: Path, content: bytes) -> None:
    """Writes a file in one step, and again if its disk fails. Raises as `atomic_path`."""

    def write() -> None:
        temporary, mode = _created(path)
        try:
            temporary.write_bytes(content)
            _synced(temporary)
            _renamed(temporary, path, mode)
        finally:
            _removed(temporary)

    _tried(path, write)


def _tried(path: Path, action: Callable[[], _Result]) -> _Result:
    try:
        return retried(f"write {path}", action)
    except (AccessError, FileNotFoundError) as error:
        reason = error.reason if isinstance(error, AccessError) else first_line(error)
        raise TccpError(f"cannot write {path}: {reason}; choose a folder that can be written") from None


def _created(path: Path) -> tuple[Path, int]:
    """A new, empty file beside `path`, and the permissions that this process's umask gives to new files.

    Not by `tempfile.mkstemp`, whose files are private: to learn the umask, a process has to change it for a moment, and
    files that other threads create in that moment can be written by everybody.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        with suppress(FileExistsError):
            descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666)
            try:
                return temporary, stat.S_IMODE(os.fstat(descriptor).st_mode)
            finally:
                os.close(descriptor)


def _new_folder(final: Path) -> Path:
    while True:
        temporary = final.with_name(f".{final.name}.{secrets.token_hex(4)}")
        with suppress(FileExistsError):
            temporary.mkdir()
            return temporary


def _synced(temporary: Path) -> None:
    with suppress(FileNotFoundError):  # `_renamed` says that its folder has disappeared
        sync(temporary)


def _renamed(temporary: Path, path: Path, mode: int) -> None:
    try:
        temporary.chmod(mode)  # a writer may have put a file of other permissions in its place
        os.replace(temporary, path)
    except FileNotFoundError:
        reason = "its folder has disappeared meanwhile"
        raise StorageError(
            f"cannot write {path}: {reason}; check the disk, then give the same command again", reason
        ) from None
    sync(path.parent)


def _removed(temporary: Path) -> None:
    with suppress(OSError):
        temporary.unlink(missing_ok=True)
