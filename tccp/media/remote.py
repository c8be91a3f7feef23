"""Films and recordings by path or URL: as files of this machine, with MediaError where one cannot be had."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tccp.errors import StorageError
from tccp.files import AccessError, is_url, local_path, redacted, remote_copy
from tccp.files.cache import version_key
from tccp.media import MediaError


@contextmanager
def local_copy(path: str, cache: Path | None = None, max_bytes: int | None = None) -> Iterator[Path]:
    """A source as a file of this machine within the context: itself, or a copy of what a URL names.

    cache, max_bytes: as `folder` and `max_bytes` of `tccp.files.remote_copy`.
    Raises MediaError `missing`, `unreadable` or `not_a_file` (naming the URL) if it does not arrive complete, and
    TccpError if the cache cannot be written.
    """
    if not is_url(path := local_path(path)):
        yield Path(path)
        return
    with ExitStack() as stack:
        with _media_errors(path):  # of fetching it, not of what the caller does with it
            copy = stack.enter_context(remote_copy(path, cache, max_bytes))
        yield copy


def version_of(path: str) -> tuple[str, int]:
    """A key that changes with the file, of what can be known without reading it; and its size in bytes, 0 if unknown.

    Raises MediaError as `local_copy` if it does not exist.
    """
    if is_url(path := local_path(path)):
        with _media_errors(path):
            key, size = version_key(path)
        return key, size or 0
    try:
        status = Path(path).stat()
    except OSError as error:
        raise MediaError(path, "missing", f"{_absence(error)}; check the path") from None
    seen = [os.path.abspath(path), status.st_size, status.st_mtime_ns]
    return hashlib.blake2b(repr(seen).encode(), digest_size=16).hexdigest(), status.st_size


def content_hash(path: Path) -> str:
    """The identity of a film: BLAKE2b of its bytes, 16 bytes as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


@contextmanager
def _media_errors(url: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise MediaError(redacted(url), "missing", "there is nothing at this address") from None
    except IsADirectoryError:
        raise MediaError(redacted(url), "not_a_file", "is a folder, not a file") from None
    except (AccessError, StorageError) as error:
        raise MediaError(redacted(url), "unreadable", f"cannot be fetched: {error.reason}") from None


def _absence(error: OSError) -> str:
    return "there is no such file" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
