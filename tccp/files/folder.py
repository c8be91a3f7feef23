"""Folders on this machine, or at a URL of any fsspec filesystem."""

from __future__ import annotations

import io
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from tccp.errors import TccpError
from tccp.files.atomic import atomic_path, sync, write_atomic
from tccp.files.cache import remote_copy
from tccp.files.retry import first_line, retried, translated_errors
from tccp.files.urls import is_url, local_path, open_filesystem, redacted

_Result = TypeVar("_Result")
_OBJECT_STORES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss")
"""Protocols without real folders: to make one would make the bucket, where its name is misspelled."""


class Folder:
    """A folder by path or URL. Names are relative, with `/`. It comes into being when something is written.

    All methods repeat what fails as `tccp.files.retry.retried` does, and raise its errors: AccessError, StorageError,
    and TccpError if the disk of this machine is full.
    """

    def __init__(self, place: str | Path) -> None:
        """Raises TccpError for a URL whose protocol or address cannot be used."""
        self.place = str(place)
        self.local: Path | None = None
        self._fs: Any = None
        if not is_url(path := local_path(self.place)):
            self.local = Path(path)
            return
        self._fs, root = open_filesystem(self.place)
        self.root = root.rstrip("/")

    def __str__(self) -> str:
        return self.place

    def __reduce__(self) -> tuple:  # the process that receives it opens a filesystem of its own
        return Folder, (self.place,)

    def path(self, name: str) -> str:
        """The full path or URL of a file in it."""
        return str(self.local / name) if self.local is not None else f"{self.place.rstrip('/')}/{name}"

    @property
    def in_object_store(self) -> bool:
        return self.place.partition("://")[0] in _OBJECT_STORES

    def exists(self, name: str = "") -> bool:
        if self.local is not None:
            return self._tried("look for", name, (self.local / name).exists)
        try:
            # Not fs.exists, which takes every failure for an absence.
            self._tried("look for", name, lambda: self._fs.info(self._key(name)))
        except FileNotFoundError:
            return False
        return True

    def size(self, name: str) -> int | None:
        """Bytes in a file; None if there is no such file."""
        try:
            if self.local is not None:
                status = self._tried("look for", name, (self.local / name).stat)
                return status.st_size if stat.S_ISREG(status.st_mode) else None
            info = self._tried("look for", name, lambda: self._fs.info(self._key(name)))
        except FileNotFoundError:
            return None
        return int(info["size"]) if info["type"] == "file" else None

    def names(self, under: str = "") -> set[str]:
        """Names of the files in a subfolder, not deeper, without hidden ones; an empty set if it does not exist."""
        return {name for name, is_file in self._entries(under).items() if is_file and not name.startswith(".")}

    def subfolders(self, under: str = "") -> set[str]:
        """Names of the folders in a subfolder; an empty set if it does not exist."""
        return {name for name, is_file in self._entries(under).items() if not is_file}

    def _entries(self, under: str) -> dict[str, bool]:
        """Names in a subfolder, and whether each is a file."""
        try:
            return self._tried("list", under, lambda: self._entries_now(under))
        except FileNotFoundError:
            return {}

    def _entries_now(self, under: str) -> dict[str, bool]:
        if self.local is not None:
            folder = self.local / under
            if not folder.is_dir():
                return {}
            with os.scandir(folder) as entries:
                kinds = {entry.name: (entry.is_file(), entry.is_dir()) for entry in entries}
            return {name: is_file for name, (is_file, is_folder) in kinds.items() if is_file or is_folder}
        key = self._key(under)
        self._fs.invalidate_cache()
        rows = self._fs.ls(key, detail=True)
        below = [row for row in rows if row["name"].strip("/") != key.strip("/")]  # a file lists itself
        return {row["name"].rstrip("/").rsplit("/", 1)[-1]: row["type"] == "file" for row in below}

    def open(self, name: str) -> io.BufferedReader:
        """For reading, with random access. Raises FileNotFoundError."""
        if self.local is not None:
            path = self.local / name
            return self._tried("read", name, lambda: path.open("rb"))
        file = self._tried("read", name, lambda: self._fs.open(self._key(name), "rb"))
        return io.BufferedReader(RetriedReader(file, self._what("read", name)), buffer_size=1 << 16)

    def read(self, name: str) -> bytes:
        """Raises FileNotFoundError."""
        if self.local is not None:
            return self._tried("read", name, (self.local / name).read_bytes)
        return self._tried("read", name, lambda: bytes(self._fs.cat_file(self._key(name))))

    @contextmanager
    def local_file(self, name: str) -> Iterator[Path]:
        """A file of it as one of this machine: itself, or a copy in the cache that nothing removes within the context.

        Only for files whose content never changes: a copy is not compared with the original again.
        Raises FileNotFoundError.
        """
        if self.local is not None:
            yield self.local / name
            return
        with remote_copy(self.path(name), immutable=True) as copy:
            yield copy

    @contextmanager
    def as_local(self, under: str = "", writable: bool = False) -> Iterator[Path]:
        """A subfolder as a folder of this machine: itself, or a copy that exists within the context.

        writable: whether the caller may change files of the copy; if not, they share their content with the cache.
        """
        if self.local is not None:
            yield self.local / under
            return
        with tempfile.TemporaryDirectory(prefix="tccp-") as place:
            for name in self.tree(under):
                target = Path(place) / name
                target.parent.mkdir(parents=True, exist_ok=True)
                with remote_copy(self.path(f"{under}/{name}".lstrip("/"))) as copy:
                    if not writable and _linked(copy, target):
                        continue
                    shutil.copyfile(copy, target)
            yield Path(place)

    def tree(self, under: str = "") -> list[str]:
        """Names of all files below a subfolder, relative to it, without hidden ones."""
        entries = self._entries(under)
        names = sorted(name for name, is_file in entries.items() if is_file and not name.startswith("."))
        for folder in sorted(name for name, is_file in entries.items() if not is_file):
            names += [f"{folder}/{name}" for name in self.tree(f"{under}/{folder}".lstrip("/"))]
        return [name for name in names if not name.startswith(".")]

    def write(self, name: str, content: bytes) -> None:
        if self.local is not None:
            write_atomic(self.local / name, content)
            return
        with self.writing(name) as path:
            path.write_bytes(content)

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A path of this machine to write to. On success its content becomes the file `name`, in one step."""
        if self.local is not None:
            with atomic_path(self.local / name) as temporary:
                yield temporary
            return
        with tempfile.TemporaryDirectory(prefix="tccp-") as folder:
            temporary = Path(folder) / "file"
            with translated_errors(f"write {temporary}"):
                yield temporary
            self.upload_file(temporary, name)

    def copy(self, name: str, target: str) -> None:
        """Copies a file within it, in one step. Neither may change later: on this machine they may share their content.

        Raises FileNotFoundError.
        """
        if self.local is not None:
            source, path = self.local / name, self.local / target
            path.parent.mkdir(parents=True, exist_ok=True)
            if _linked(source, path):
                sync(path.parent)
                return
            with atomic_path(path) as temporary:
                shutil.copyfile(source, temporary)
            return

        def copied() -> None:
            key = self._key(target)
            if not self.in_object_store:
                self._fs.makedirs(key.rsplit("/", 1)[0], exist_ok=True)
            self._fs.cp_file(self._key(name), key)

        self._tried("copy", name, copied)

    def upload(self, tree: Path, name: str) -> None:
        """Copies a local folder into it under a name; files that exist there stay or are replaced."""
        for path in sorted(tree.rglob("*")):
            if path.is_file():
                target = f"{name}/{path.relative_to(tree).as_posix()}".lstrip("/")
                if self.local is None:
                    self.upload_file(path, target)
                    continue
                with self.writing(target) as temporary:
                    shutil.copyfile(path, temporary)

    def upload_file(self, path: Path, name: str) -> None:
        """Copies a local file to the URL of this folder. Raises TccpError if it cannot be written there."""

        def upload() -> None:
            key = self._key(name)
            if not self.in_object_store:
                self._fs.makedirs(key.rsplit("/", 1)[0], exist_ok=True)
            self._fs.put_file(str(path), key)  # object stores show whole objects only

        try:
            self._tried("write", name, upload)
        except FileNotFoundError as error:
            place = redacted(self.path(name))
            raise TccpError(
                f"cannot write {place}: {first_line(error)}; check the address: the bucket must exist"
            ) from None

    def remove(self, name: str) -> None:
        """Removes a file, or a folder with all that is in it; does nothing if it does not exist."""
        if self.local is not None:
            path = self.local / name
            self._tried("remove", name, lambda: _remove(path))
        elif self.exists(name):
            with suppress(FileNotFoundError):
                self._tried("remove", name, lambda: self._fs.rm(self._key(name), recursive=True))

    def _key(self, name: str) -> str:
        """The path of a file in the filesystem."""
        return f"{self.root}/{name}".rstrip("/")

    def _what(self, verb: str, name: str) -> str:
        return f"{verb} {redacted(self.path(name)) if name else redacted(self.place)}"

    def _tried(self, verb: str, name: str, action: Callable[[], _Result]) -> _Result:
        return retried(self._what(verb, name), action)


def check_shared(what: str, folder: Folder, nodes: int) -> None:
    """Raises TccpError for a folder of one machine where work runs on several: `file://` says that they share it."""
    if nodes > 1 and not is_url(folder.place):
        raise TccpError(
            f"{what} {folder} is a folder of one machine, and the cluster has, or can grow to, {nodes}: give a URL "
            "(s3://..., gs://...), or file:///... for a folder that all of them share"
        )


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _linked(copy: Path, target: Path) -> bool:
    try:
        os.link(copy, target)
    except OSError:  # another disk, or one without links
        return False
    return True


class RetriedReader(io.RawIOBase):
    """A file of an fsspec filesystem whose reads are repeated after failures."""

    mode = "rb"

    def __init__(self, file: Any, what: str) -> None:
        self._file, self._what = file, what

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def readinto(self, buffer: Any) -> int:
        place = self._file.tell()

        def read() -> bytes:
            self._file.seek(place)
            return bytes(self._file.read(len(buffer)))

        content = retried(self._what, read)
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()
