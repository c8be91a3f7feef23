"""What lies at a URL of any fsspec filesystem, and a copy of it on this machine."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import posixpath
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from tccp.errors import TccpError
from tccp.files import is_url
from tccp.media import MediaError

CACHE_BYTES = 20_000_000_000
_ATTEMPTS = 3
_PAUSE_S = 0.5  # before the second attempt, and once more before each further one
_WAIT_S = 0.05  # between looks at another process's download
# What different filesystems call the signs that an object is another one than before.
_VERSION_KEYS = (
    *("ETag", "etag", "Content-MD5", "md5Hash", "md5", "generation", "VersionId", "version_id"),
    *("mtime", "LastModified", "Last-Modified", "last_modified", "updated", "created"),
)
_CACHED = re.compile(r"tccp-[0-9a-f]{32}(\.\w{1,8})?")  # files that are ours to remove


def is_http(url: str) -> bool:
    return url.startswith(("http://", "https://"))


def bare(path: str, root: str = "") -> str:
    """A path or URL without protocol, user and query: what is fit for a name. root: of a path that is relative."""
    if is_http(root or path):
        path = unquote(path.partition("?")[0].partition("#")[0])
    return re.sub(r"^[a-zA-Z][a-zA-Z0-9+.-]*://([^/@]*@)?", "", path)


def shown(path: str) -> str:
    """A path or URL as messages give it: users, passwords and signed queries are nobody else's business."""
    if not is_url(path):
        return path
    path = path.partition("?")[0] if is_http(path) else path
    return re.sub(r"://[^/@]*@", "://", path)


def local_path(path: str) -> str:
    """A `file://` URL as the path that it stands for; anything else as it is."""
    protocol, _, place = path.partition("://")
    return place if is_url(path) and protocol in ("file", "local") else path


def filesystem(url: str) -> tuple[Any, str]:
    """The filesystem of a URL, and the path in it."""
    from fsspec.core import url_to_fs

    if "::" in url:
        raise TccpError(f"{shown(url)} joins several addresses; unpack what is packed, and give one")
    options = {}
    if is_http(url):
        import aiohttp

        # By default a transfer ends after five minutes, whether it goes on or hangs.
        options = {"client_kwargs": {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)}}
    return url_to_fs(url, **options)


@contextmanager
def reaching(url: str) -> Iterator[None]:
    """Whatever goes wrong at an address, in one line. Filesystems raise what their own libraries do."""
    try:
        yield
    except TccpError:
        raise
    except ImportError as error:
        raise TccpError(f"{shown(url)}: a package is missing for such addresses: {_first_line(error, url)}") from None
    except FileNotFoundError:
        raise TccpError(f"{shown(url)}: there is nothing; check the address") from None
    except Exception as error:  # every filesystem raises its own library's errors
        text = f"cannot be reached: {_first_line(error, url)}; check address, network and credentials"
        raise TccpError(f"{shown(url)} {text}") from None


def _first_line(error: BaseException, url: str) -> str:
    status = getattr(error, "status", None)
    text = f"HTTP status {status}" if isinstance(status, int) else str(error).replace(url, shown(url))
    return next(iter(text.splitlines()), "") or type(error).__name__


# Copies on this machine


@contextmanager
def local_copy(path: str, cache: Path | None = None, max_bytes: int = CACHE_BYTES) -> Iterator[Path]:
    """A source as a file of this machine, for as long as the context is open: itself, or a copy of what a URL names.

    cache: folder of the copies; by default TCCP_CACHE, else one in the folder for temporary files. It may be shared by
    processes, of which one fetches what several ask for. Copies that nobody has open are removed, the longest unused
    first, to keep it within `max_bytes`; a copy that is longer than that goes after use.
    Raises MediaError `missing`, `unreadable` or `not_a_file` (naming the URL) if it does not arrive whole, and
    TccpError if the cache cannot be written.
    """
    if not is_url(path := local_path(path)):
        yield Path(path)
        return
    default = os.environ.get("TCCP_CACHE") or Path(tempfile.gettempdir()) / f"tccp-cache-{os.getuid()}"
    folder = Path(cache or default).absolute()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_uid != os.getuid() and not (cache or os.environ.get("TCCP_CACHE")):
            raise PermissionError(errno.EACCES, "it is another user's")
        file, held = _fetched(path, folder, max_bytes)
    except OSError as error:
        text = error.strerror or str(error)
        raise TccpError(f"cache {folder}: {text}; make room there, or set TCCP_CACHE to another folder") from None
    try:
        yield file
    finally:
        os.close(held)
        with suppress(OSError):  # what was to be done with the film is done
            _make_room(folder, max_bytes)


def version_of(path: str) -> tuple[str, int]:
    """A key that changes with the file, of what can be known without reading it; and its size in bytes, 0 if unknown.

    Raises MediaError as `local_copy` if it is not there.
    """
    if is_url(path := local_path(path)):
        _, _, key, size = _object(path)
        return key, size or 0
    try:
        status = Path(path).stat()
    except OSError as error:
        raise MediaError(path, "missing", f"{_absence(error)}; check the path") from None
    seen = [os.path.abspath(path), status.st_size, status.st_mtime_ns]
    return hashlib.blake2b(repr(seen).encode(), digest_size=16).hexdigest(), status.st_size


def _absence(error: OSError) -> str:
    return "there is no such file" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"


def content_hash(path: Path) -> str:
    """The identity of a film: BLAKE2b of its bytes, 16 bytes as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _fetched(url: str, folder: Path, max_bytes: int) -> tuple[Path, int]:
    """The whole copy, and a descriptor that holds it: as long as it is open, nobody removes the file.

    A copy in use has a shared lock, one in the making (`.part`) an exclusive one. Locks end with their process.
    """
    fs, place, key, size = _object(url)
    suffix = posixpath.splitext(bare(url))[1]  # decoders look at it
    final = folder / f"tccp-{key}{suffix}"
    if not _CACHED.fullmatch(final.name) or suffix == ".part":
        final = folder / f"tccp-{key}"
    part = folder / f"tccp-{key}.part"
    while True:
        if (held := _locked(final, fcntl.LOCK_SH)) is not None:
            now = time.time_ns()  # the system's own "now" is some milliseconds coarse
            os.utime(held, ns=(now, now))  # the order of removal is that of use
            return final, held
        if (making := _locked(part, fcntl.LOCK_EX | fcntl.LOCK_NB, os.O_CREAT)) is None:
            time.sleep(_WAIT_S)
            continue
        try:
            if final.exists():  # another was quicker
                part.unlink()
            else:
                _make_room(folder, max_bytes, size or 0)
                _download(fs, place, url, part, size)
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
        fs, place = filesystem(url)
        info = fs.info(place)
    except TccpError:
        raise
    except Exception as error:  # as in `reaching`
        raise _media_error(url, error) from None
    if info["type"] == "directory":
        raise MediaError(shown(url), "not_a_file", "is a folder, not a file")
    version = [url, info.get("size"), *(str(info[key]) for key in _VERSION_KEYS if key in info)]
    key = hashlib.blake2b(repr(version).encode(), digest_size=16).hexdigest()
    return fs, place, key, info.get("size")


def _media_error(url: str, error: Exception) -> MediaError:
    # fsspec turns whatever happens over HTTP into FileNotFoundError; what did happen is its cause.
    cause = error.__cause__ if isinstance(error, FileNotFoundError) else None
    gone = isinstance(error, FileNotFoundError) and getattr(cause, "status", 404) in (404, 410)
    if gone and (cause is None or hasattr(cause, "status")):
        return MediaError(shown(url), "missing", "there is nothing at this address")
    return MediaError(shown(url), "unreadable", f"cannot be fetched: {_first_line(cause or error, url)}")


def _download(fs: Any, place: str, url: str, part: Path, size: int | None) -> None:
    """Raises MediaError if the object does not arrive whole, and OSError if there is no room for it."""
    for attempt in range(_ATTEMPTS):
        time.sleep(_PAUSE_S * attempt)
        try:
            fs.get_file(place, str(part))
        except Exception as error:  # as in `reaching`
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                raise
            failure = _media_error(url, error)
        else:
            arrived = part.stat().st_size
            if size is None or arrived == size:
                return
            failure = MediaError(shown(url), "unreadable", f"only {arrived} of {size} bytes arrived")
        if failure.reason == "missing":
            break
    raise failure


def _locked(path: Path, how: int, flags: int = 0) -> int | None:
    """A descriptor that holds the lock; None if there is no such file, or `how` is not to wait and another has it."""
    try:
        descriptor = os.open(path, os.O_RDWR | flags, 0o600)
    except FileNotFoundError:
        return None
    with suppress(BlockingIOError, FileNotFoundError):
        fcntl.flock(descriptor, how)
        if os.path.samestat(os.fstat(descriptor), path.stat()):  # else it was removed, or renamed, meanwhile
            return descriptor
    os.close(descriptor)
    return None


def _make_room(folder: Path, max_bytes: int, needed: int = 0) -> None:
    """Removes copies that nobody holds: leftovers, ones too large, and the longest unused until the rest fit."""
    copies = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if _CACHED.fullmatch(entry.name):
                with suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    copies.append((status.st_mtime_ns, entry.name, status.st_size))
    total = sum(size for size in (needed, *(size for _, _, size in copies)) if size <= max_bytes)
    for _, name, size in sorted(copies):
        stays = size <= max_bytes and not name.endswith(".part")
        if stays and total <= max_bytes:
            continue
        path = folder / name
        if (held := _locked(path, fcntl.LOCK_EX | fcntl.LOCK_NB)) is not None:
            path.unlink()
            os.close(held)
            total -= size if size <= max_bytes else 0
