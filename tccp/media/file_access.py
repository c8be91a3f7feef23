"""How tccp.media reads a media file: by its path, or, in the sandbox, through a descriptor that the parent has opened.

The child process of the sandbox may open no file at all. Its parent opens the one file that a request is about and
passes the descriptor (`grant`). Functions that take paths then see this file and no other.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import NamedTuple

_MOST_AT_ONCE = 1 << 30  # bytes; the kernel reads no more in one call


class FileStatus(NamedTuple):
    """mode: type and permissions. num_bytes: size. mtime_ns: time of the last change."""

    mode: int
    num_bytes: int
    mtime_ns: int

    @property
    def is_plain(self) -> bool:
        return stat.S_ISREG(self.mode)

    @property
    def is_folder(self) -> bool:
        return stat.S_ISDIR(self.mode)


class Grant(NamedTuple):
    """An open file that stands for a path."""

    path: Path
    descriptor: int
    status: FileStatus


class _Access:
    """What this process may read: any path, or only the granted file."""

    def __init__(self) -> None:
        self.by_path = True
        self.granted: Grant | None = None

    def find(self, path: Path) -> Grant | None:
        """The grant of this path. None if the process may open any path. Raises PermissionError otherwise."""
        if self.granted is not None and self.granted.path == path.absolute():
            return self.granted
        if self.by_path:
            return None
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


_access = _Access()


def open_nothing_by_path() -> None:
    """From here on, this process reads only files that it is granted."""
    _access.by_path = False


def grant(path: Path, descriptor: int, status: FileStatus) -> None:
    """Makes `path` stand for an open file. Closes the descriptor of the file that was granted before."""
    before, _access.granted = _access.granted, Grant(path, descriptor, status)
    if before is not None:
        os.close(before.descriptor)


def file_status(path: Path) -> FileStatus:
    """Raises OSError if there is no such file, or ValueError if no file can have this name."""
    if (granted := _access.find(path)) is not None:
        return granted.status
    return _status(path.stat())


def open_descriptor(path: Path) -> tuple[int, FileStatus]:
    """Opens a file to read it, without waiting for a pipe's writer. The caller closes the descriptor."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)
    return descriptor, _status(os.fstat(descriptor))


class FileReader:
    """A file with a position of its own, as FFmpeg and Pillow read it. Use as a context manager.

    name: what FFmpeg takes for the file's address; its ending tells some formats apart.
    Raises OSError if the file cannot be opened.
    """

    def __init__(self, path: Path):
        granted = _access.find(path)
        self._owned = granted is None
        self._descriptor, self._status = open_descriptor(path) if granted is None else granted[1:]
        self._position = 0
        self.name = f"file:{path.absolute()}"

    def __enter__(self) -> FileReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def read(self, count: int = -1) -> bytes:
        if count < 0:
            count = max(0, self._status.num_bytes - self._position)
        data = os.pread(self._descriptor, min(count, _MOST_AT_ONCE), self._position)
        self._position += len(data)
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._status.num_bytes}[whence]
        if base + offset < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def close(self) -> None:
        if self._owned and self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1


def _status(found: os.stat_result) -> FileStatus:
    return FileStatus(found.st_mode, found.st_size, found.st_mtime_ns)
