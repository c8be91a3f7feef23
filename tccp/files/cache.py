"""The cache of this machine for copies of remote files: bounded, shared by processes, and safe against their end.

A copy in use has a shared lock, one that is being made (`.part`) an exclusive one. Locks end with their process.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import posixpath
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tccp.errors import TccpError
from tccp.files.retry import FULL, retried
from tccp.files.urls import bare, open_filesystem, redacted

PLACE, SIZE_GB = "TCCP_CACHE", "TCCP_CACHE_GB"
"""Environment variables: the cache's folder (default: one in the folder for temporary files), and its size."""
DEFAULT_GB = 20.0
_WAIT_S = 0.05  # between looks at another process's download
# What different filesystems call the signs that an object is another one than before.
_VERSION_KEYS = (
    *("ETag", "etag", "Content-MD5", "md5Hash", "md5", "generation", "VersionId", "version_id"),
    *("mtime", "LastModified", "Last-Modified", "last_modified", "updated", "created"),
)
_OURS = re.compile(r"tccp-[0-9a-f]{32}(\.\w{1,12})?")  # files and folders that the cache may remove
_FILES_PER_CLEANING = 100
_until_cleaning: dict[Path, int] = {}
_held_folders: dict[Path, int] = {}


def cache_folder() -> Path:
    """TCCP_CACHE, else a folder of this user in the system's folder for temporary files."""
    return Path(os.environ.get(PLACE) or Path(tempfile.gettempdir()) / f"tccp-cache-{os.getuid()}").absolute()


@contextmanager
def remote_copy(
    url: str, folder: Path | None = None, max_bytes: int | None = None, immutable: bool = False
) -> Iterator[Path]:
    """A copy of a remote file on this machine. Nothing removes it within the context.

    folder: of the copies, in place of TCCP_CACHE. Processes may share it; one of them fetches what several ask for.
    max_bytes: in place of TCCP_CACHE_GB. Copies that no process uses are removed, the longest unused first, to stay
    within it; a copy that is larger than that is removed after use. immutable: the file never changes, so that a copy
    needs no request.
    Raises FileNotFoundError, IsADirectoryError, AccessError or StorageError if the file cannot be fetched, and
    TccpError if the cache cannot be written.
    """
    place = cache_folder() if folder is None else folder.absolute()
    limit = _max_bytes() if max_bytes is None else max_bytes
    try:
        _make(place, own=folder is None and not os.environ.get(PLACE))
        copy, held = _fetched(url, place, limit, immutable)
    except _NotFetched as failure:
        raise failure.error from None
    except OSError as error:
        raise _unusable(place, error) from None
    try:
        yield copy
    finally:
        too_large = os.fstat(held).st_size > limit
        os.close(held)
        with suppress(OSError):  # the caller has used the copy by now
            _clean(place, limit, at_once=too_large)


def kept_folder(name: str) -> Path:
    """The cache's folder of this name, in which the caller keeps files. Nothing removes it while this process lives.

    It counts towards TCCP_CACHE_GB; once no process uses it, it is removed like any other copy. `make_room` removes
    others that it has displaced. Raises TccpError if the cache cannot be written.
    """
    place = cache_folder()
    folder = place / f"tccp-{hashlib.blake2b(name.encode(), digest_size=16).hexdigest()}"
    if folder in _held_folders and folder.is_dir():
        return folder
    try:
        _make(place, own=not os.environ.get(PLACE))
        held = None
        while held is None:  # until no other process has just removed it
            folder.mkdir(exist_ok=True)
            held = _locked(folder, fcntl.LOCK_SH, folder=True)
        os.utime(folder)
    except OSError as error:
        raise _unusable(place, error) from None
    _held_folders[folder] = held
    return folder


def make_room() -> None:
    """Removes copies that no process uses until the rest is within TCCP_CACHE_GB, the longest unused first."""
    with suppress(OSError):
        _clean(cache_folder(), _max_bytes(), at_once=True)


def _make(place: Path, own: bool) -> None:
    """Makes the cache's folder. own: it is the default one, in a folder where other users may write."""
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    if own and place.stat().st_uid != os.getuid():
        raise PermissionError(errno.EACCES, "it belongs to another user")


def version_key(url: str) -> tuple[str, int | None]:
    """A key that changes with a remote file, as far as that can be known without reading it; and its size in bytes.

    Raises as `remote_copy`.
    """
    try:
        _, _, key, size = _object(url)
    except _NotFetched as failure:
        raise failure.error from None
    return key, size


class _NotFetched(Exception):
    """The remote file cannot be fetched; an OSError without this wrapping comes from the cache's folder."""

    def __init__(self, error: Exception):
        self.error = error


def _max_bytes() -> int:
    given = os.environ.get(SIZE_GB, "")
    try:
        size = float(given or DEFAULT_GB)
    except ValueError:
        size = -1.0
    if not 0 < size < float("inf"):
        raise TccpError(f"{SIZE_GB}={given}: give a number of gigabytes above 0")
    return round(size * 1e9)


def _fetched(url: str, folder: Path, max_bytes: int, immutable: bool) -> tuple[Path, int]:
    """The complete copy, and a descriptor with its lock."""
    source = None
    if immutable:
        key = hashlib.blake2b(url.encode(), digest_size=16).hexdigest()
    else:
        source = _object(url)
        key = source[2]
    suffix = posixpath.splitext(bare(url))[1]  # decoders look at it
    final = folder / f"tccp-{key}{suffix}"
    if not _OURS.fullmatch(final.name) or suffix == ".part":
        final = folder / f"tccp-{key}"
    part = folder / f"tccp-{key}.part"
    while True:
        if (held := _locked(final, fcntl.LOCK_SH)) is not None:
            now = time.time_ns()  # the system's own "now" is some milliseconds coarse
            os.utime(held, ns=(now, now))  # copies are removed in the order of their last use
            return final, held
        if (making := _locked(part, fcntl.LOCK_EX | fcntl.LOCK_NB, os.O_CREAT)) is None:
            time.sleep(_WAIT_S)
            continue
        try:
            if final.exists():  # another process was quicker
                part.unlink()
            else:
                fs, path, _, size = source or _object(url)
                _clean(folder, max_bytes, size or 0)
                _download(fs, path, url, part, size)
                os.fsync(making)  # or a machine that stops could keep the name without the content
                part.rename(final)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        finally:
            os.close(making)


def _object(url: str) -> tuple[Any, str, str, int | None]:
    """Filesystem, path in it, a key that changes with the object, and the size in bytes where that is known."""
    try:
        fs, path = open_filesystem(url)
        info = retried(f"read {redacted(url)}", lambda: fs.info(path))
    except Exception as error:  # of the file, not of the cache folder; remote_copy raises it again
        raise _NotFetched(error) from None
    if info["type"] == "directory":
        raise _NotFetched(IsADirectoryError(errno.EISDIR, "is a folder, not a file", redacted(url)))
    version = [url, info.get("size"), *(str(info[key]) for key in _VERSION_KEYS if key in info)]
    key = hashlib.blake2b(repr(version).encode(), digest_size=16).hexdigest()
    return fs, path, key, info.get("size")


def _download(fs: Any, path: str, url: str, part: Path, size: int | None) -> None:
    """Raises _NotFetched if the file does not arrive complete, or if there is no room for it."""

    def download() -> None:
        try:
            fs.get_file(path, str(part))
        except OSError as error:
            if error.errno in FULL:
                raise _unusable(part.parent, error) from None
            raise
        arrived = part.stat().st_size
        if size is not None and arrived != size:
            raise OSError(errno.EIO, f"only {arrived} of {size} bytes arrived")

    try:
        retried(f"read {redacted(url)}", download)
    except Exception as error:  # as above
        raise _NotFetched(error) from None


def _unusable(folder: Path, error: OSError) -> TccpError:
    text = error.strerror or str(error)
    return TccpError(f"cache {folder}: {text}; make room there, or set {PLACE} to another folder")


def _locked(path: Path, how: int, flags: int = 0, folder: bool = False) -> int | None:
    """A descriptor with the lock. None without such a file, or if another process has it and `how` is not to wait."""
    try:
        descriptor = os.open(path, (os.O_RDONLY | os.O_DIRECTORY if folder else os.O_RDWR) | flags, 0o600)
    except FileNotFoundError:
        return None
    with suppress(BlockingIOError, FileNotFoundError):
        fcntl.flock(descriptor, how)
        if os.path.samestat(os.fstat(descriptor), path.stat()):  # else it was removed, or renamed, meanwhile
            return descriptor
    os.close(descriptor)
    return None


def _clean(folder: Path, max_bytes: int, needed: int = 0, at_once: bool = False) -> None:
    """Removes copies that no process holds: leftovers, too large ones, and the longest unused until the rest fit.

    needed: bytes of a copy that is to come. Looking at n files takes long where there are many, so only each n/100th
    call does it, unless `at_once`: a process exceeds the size by about a hundredth at most.
    """
    waits = _until_cleaning.get(folder, 0)
    if waits > 0 and not at_once:
        _until_cleaning[folder] = waits - 1
        return
    copies = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if _OURS.fullmatch(entry.name):
                with suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    is_folder = entry.is_dir(follow_symlinks=False)
                    size = _bytes_in(Path(entry)) if is_folder else status.st_size
                    copies.append((status.st_mtime_ns, entry.name, size, is_folder))
    _until_cleaning[folder] = len(copies) // _FILES_PER_CLEANING
    total = sum(size for size in (needed, *(copy[2] for copy in copies)) if size <= max_bytes)
    for _, name, size, is_folder in sorted(copies):
        stays = size <= max_bytes and not name.endswith(".part")
        if stays and total <= max_bytes:
            continue
        path = folder / name
        if (held := _locked(path, fcntl.LOCK_EX | fcntl.LOCK_NB, folder=is_folder)) is not None:
            if is_folder:
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
            os.close(held)
            total -= size if size <= max_bytes else 0


def _bytes_in(folder: Path) -> int:
    """Of the files in a folder; another process may remove them meanwhile."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):
            total += path.lstat().st_size
    return total
