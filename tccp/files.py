"""Folders anywhere: on this machine, or at a URL of any fsspec filesystem; files appear in them only when whole."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from tccp.errors import TccpError


def is_url(place: str | Path) -> bool:
    """Whether a place is a URL rather than a path of this machine."""
    return re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*://", str(place)) is not None


class Folder:
    """A folder by path or URL. Names are relative, with `/`. It is made when something is written."""

    def __init__(self, place: str | Path) -> None:
        """Raises TccpError for a URL whose protocol or address cannot be used."""
        self.place = str(place)
        self.local = None if is_url(place) else Path(place)
        if is_url(place) and self.place.startswith(("file://", "local://")):
            self.local = Path(re.sub(r"^[a-z]+://", "", self.place))
        self._fs: Any = None
        if self.local is None:
            import fsspec

            try:
                # Without remembered listings: other machines write here, too.
                self._fs, self._root = fsspec.core.url_to_fs(self.place, use_listings_cache=False)
            except (ImportError, ValueError, OSError) as error:
                reason = str(error).splitlines()[0]
                raise TccpError(
                    f"{place}: {reason}; give a folder, or a URL of a storage that is set up here"
                ) from None
            self._root = self._root.rstrip("/")

    def __str__(self) -> str:
        return self.place

    def __reduce__(self) -> tuple:  # the filesystem object is made anew where it arrives
        return Folder, (self.place,)

    def path(self, name: str) -> str:
        """The full path or URL of a file in it."""
        return str(self.local / name) if self.local is not None else f"{self.place.rstrip('/')}/{name}"

    def exists(self, name: str = "") -> bool:
        if self.local is not None:
            return (self.local / name).exists()
        return bool(self._fs.exists(f"{self._root}/{name}".rstrip("/")))

    def names(self, under: str = "") -> set[str]:
        """Names of the files in a subfolder (not deeper), unfinished ones left out; none if it is not there."""
        if self.local is not None:
            folder = self.local / under
            found = [entry.name for entry in os.scandir(folder) if entry.is_file()] if folder.is_dir() else []
        else:
            place = f"{self._root}/{under}".rstrip("/")
            self._fs.invalidate_cache()
            rows = self._fs.ls(place, detail=True) if self._fs.exists(place) else []
            found = [row["name"].rsplit("/", 1)[-1] for row in rows if row["type"] == "file"]
        return {name for name in found if not name.startswith(".")}

    def subfolders(self, under: str = "") -> set[str]:
        """Names of the folders in a subfolder."""
        if self.local is not None:
            folder = self.local / under
            return {entry.name for entry in os.scandir(folder) if entry.is_dir()} if folder.is_dir() else set()
        place = f"{self._root}/{under}".rstrip("/")
        self._fs.invalidate_cache()
        rows = self._fs.ls(place, detail=True) if self._fs.exists(place) else []
        return {row["name"].rstrip("/").rsplit("/", 1)[-1] for row in rows if row["type"] == "directory"}

    def open(self, name: str) -> BinaryIO:
        """For reading, with random access. Raises FileNotFoundError."""
        return open(self.local / name, "rb") if self.local is not None else self._fs.open(f"{self._root}/{name}", "rb")

    def read(self, name: str) -> bytes:
        """Raises FileNotFoundError."""
        return (self.local / name).read_bytes() if self.local else bytes(self._fs.cat_file(f"{self._root}/{name}"))

    def download(self, name: str, to: Path) -> None:
        """Copies a file of it, at a URL, to a path of this machine. Raises FileNotFoundError."""
        assert self._fs is not None
        self._fs.get_file(f"{self._root}/{name}", str(to))

    def upload(self, tree: Path, name: str) -> None:
        """Copies a local folder into it under a name; files that are there stay or are replaced."""
        for path in sorted(tree.rglob("*")):
            if path.is_file():
                with self.writing(f"{name}/{path.relative_to(tree).as_posix()}".lstrip("/")) as temporary:
                    shutil.copyfile(path, temporary)

    def tree(self, under: str = "") -> list[str]:
        """Names of all files under a subfolder, however deep, relative to it; unfinished ones left out."""
        names = sorted(self.names(under))
        for folder in sorted(self.subfolders(under)):
            inner = f"{under}/{folder}".lstrip("/")
            names += [f"{folder}/{name}" for name in self.tree(inner)]
        return [name for name in names if not name.startswith(".")]

    @contextmanager
    def here(self, under: str = "") -> Iterator[Path]:
        """A subfolder as a folder of this machine: itself, or a copy that is there while the context is open."""
        if self.local is not None:
            yield self.local / under
            return
        with tempfile.TemporaryDirectory(prefix="tccp-") as place:
            for name in self.tree(under):
                target = Path(place) / name
                target.parent.mkdir(parents=True, exist_ok=True)
                self.download(f"{under}/{name}".lstrip("/"), target)
            yield Path(place)

    def arrow(self) -> tuple[Any, str]:
        """It as Arrow sees it: filesystem (None for this machine's) and path."""
        if self.local is not None:
            return None, str(self.local.absolute())
        from pyarrow.fs import FSSpecHandler, PyFileSystem

        return PyFileSystem(FSSpecHandler(self._fs)), self._root

    def write(self, name: str, content: bytes) -> None:
        with self.writing(name) as path:
            path.write_bytes(content)

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A path of this machine to write to; what lies there becomes the file `name` on success, as one step.

        Raises TccpError if the folder cannot be written to or the disk is full.
        """
        if self.local is not None:
            with atomic_path(self.local / name) as temporary:
                yield temporary
            return
        with tempfile.TemporaryDirectory(prefix="tccp-") as folder:
            temporary = Path(folder) / "file"
            yield temporary
            try:
                self._fs.makedirs(f"{self._root}/{name}".rsplit("/", 1)[0], exist_ok=True)
                self._fs.put_file(str(temporary), f"{self._root}/{name}")  # object stores show whole objects only
            except OSError as error:
                raise TccpError(
                    f"cannot write {self.path(name)}: {str(error).splitlines()[0]}; check the address and permissions"
                ) from None

    def remove(self, name: str) -> None:
        """Removes a file, or a folder with all that is in it; nothing happens if it is not there."""
        if self.local is not None:
            path = self.local / name
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        elif self._fs.exists(f"{self._root}/{name}"):
            self._fs.rm(f"{self._root}/{name}", recursive=True)


def cache_folder() -> Path:
    """Where copies of remote files lie: `TCCP_CACHE`, else a folder of this user in the system's temporary folder."""
    return Path(os.environ.get("TCCP_CACHE") or Path(tempfile.gettempdir()) / f"tccp-cache-{os.getuid()}")


def fetched(folder: Folder, name: str) -> Path:
    """A file of a folder as one of this machine: itself if it is here, else a copy that is made once and kept.

    Copies lie under TCCP_CACHE, else the system's temporary folder. Only for files that never change.
    Raises FileNotFoundError.
    """
    if folder.local is not None:
        return folder.local / name
    key = hashlib.blake2b(folder.path(name).encode(), digest_size=16).hexdigest()
    copy = cache_folder() / "fetched" / f"{key}-{name.rsplit('/', 1)[-1]}"
    if not copy.exists():
        with atomic_path(copy) as temporary:
            folder.download(name, temporary)
    return copy


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` that becomes `path` on success and disappears on an error.

    Raises TccpError if the folder cannot be written or the disk is full.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise TccpError(f"cannot write {path}: {error.strerror}; choose a folder that can be written") from None
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())  # mkstemp's files are private, the table is not
        temporary.replace(path)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise TccpError(f"cannot write {path}: the disk is full; make room or choose another folder") from None
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
