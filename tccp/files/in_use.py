"""Whether a process reads the files of a folder: readers lock the folder itself, and who removes files asks for it.

The lock (`flock`) leaves no file behind, needs no right to write, and ends with its process.
"""

from __future__ import annotations

import fcntl
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

from tccp.files.folder import Folder


class Reading:
    """Says that its holder reads files of a folder of this machine, until `close`, or until nothing refers to it.

    Does nothing for a URL, and for a folder that does not exist or whose filesystem has no locks.
    """

    def __init__(self, folder: Folder) -> None:
        self.close = lambda: None
        descriptor = _opened(folder)
        if descriptor is not None:
            self.close = weakref.finalize(self, os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH)
            except OSError:
                self.close()


@contextmanager
def without_readers(folder: Folder) -> Iterator[bool]:
    """Whether no process reads files of the folder; if so, new readers wait until the context ends.

    False for a URL, where readers are on other machines, and for a filesystem without locks.
    """
    descriptor = _opened(folder)
    if descriptor is None:
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True
    finally:
        os.close(descriptor)


def _opened(folder: Folder) -> int | None:
    try:
        return None if folder.local is None else os.open(folder.local, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return None
