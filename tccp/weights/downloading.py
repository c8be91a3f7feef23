"""Downloads weights, continues interrupted downloads and checks the result."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import hashlib
import http.client
import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedRandom
from pathlib import Path
from typing import Any

from tccp import __version__
from tccp.errors import StorageError, TccpError
from tccp.files import HTTP_TRANSIENT, check_outputs, retried
from tccp.files.retry import first_line
from tccp.weights.weight_files import default_folder, weights_key
from tccp.weights.weight_table import Weight, entry

MIRROR_VARIABLE = "TCCP_WEIGHTS_URL"
"""Environment variable: URL of a folder with the files under their names. It replaces the publishers' addresses."""
_TIMEOUT_S = 60.0  # without a byte
_BLOCK_BYTES = 1 << 18


@dataclass(frozen=True)
class Fetched:
    """The result of `fetch`. verified: True if the SHA-256 equals the published one, False if none is published."""

    name: str
    path: Path
    sha256: str
    verified: bool
    downloaded: bool

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"path": str(self.path)}

    def __str__(self) -> str:
        doubt = "" if self.verified else f"; NOT verified: no published hash is known, its SHA-256 is {self.sha256}"
        return f"{self.name}: {self.path}{'' if self.downloaded else ' (already present)'}{doubt}"


def fetch(which: str | Weight, url: str | None = None, to: Path | None = None) -> Fetched:
    """Downloads a file of weights unless it is present. The file gets its name only when complete and verified.

    url: address of the file (http, https or file); by default, in the folder of TCCP_WEIGHTS_URL if that is set, else
    the published address. to: target folder; by default `default_folder()`.
    A download that the network interrupts is tried again; if the hash is known, from where it broke off, also in the
    next call.
    Raises TccpError, or StorageError if the network or the server fails. Either leaves the target unchanged.
    """
    weight = entry(which)
    folder = default_folder() if to is None else to
    present = next((folder / name for name in weight.names if (folder / name).is_file()), None)
    if present is not None:
        digest = weights_key(present)
        if weight.sha256 not in (None, digest):
            raise TccpError(
                f"{present} exists, but is not the published file (its SHA-256 is {digest}, not {weight.sha256}): "
                "remove it to fetch the published one"
            )
        return Fetched(weight.name, present, digest, weight.sha256 is not None, downloaded=False)
    target = folder / weight.file
    source = url or _source(weight)
    check_outputs({"the file in --to": [target, _partial_path(target)]}, {"--url": url})
    with _partial(target) as part:
        _download(weight, source, part)
        part.seek(0)
        digest = hashlib.file_digest(part, "sha256").hexdigest()
        if weight.sha256 not in (None, digest):
            _truncate(part)
            raise TccpError(
                f"{weight.name} from {source} is not the published file: its SHA-256 is {digest}, not {weight.sha256}; "
                "nothing was kept, try another source with --url"
            )
        os.fsync(part.fileno())
        os.replace(part.name, target)
    return Fetched(weight.name, target, digest, weight.sha256 is not None, downloaded=True)


def _source(weight: Weight) -> str:
    mirror = os.environ.get(MIRROR_VARIABLE)
    return f"{mirror.rstrip('/')}/{weight.file}" if mirror else weight.url


def _partial_path(target: Path) -> Path:
    return target.with_name(f".{target.name}.part")


@contextmanager
def _partial(target: Path) -> Iterator[BufferedRandom]:
    """Opens the partial file of `target` with the content of an earlier try, and removes it at the end if empty."""
    path = _partial_path(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as part:
            try:
                fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise TccpError(f"{target} is being fetched by another process: wait for it to finish") from None
            try:
                yield part
            finally:
                part.flush()
                if path.exists() and path.stat().st_size == 0:
                    path.unlink()
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "make room" if full else "choose a writable folder with --to"
        raise TccpError(f"cannot write {target}: {error.strerror}; {advice}") from None


def _download(weight: Weight, url: str, part: BufferedRandom) -> None:
    """Receives the file, and tries again as long as more of it arrives. Raises TccpError, StorageError."""
    while True:
        before = part.seek(0, os.SEEK_END)
        try:
            return retried(f"fetch {url}", lambda: _receive(weight, url, part))
        except StorageError as error:
            if weight.sha256 is None or part.seek(0, os.SEEK_END) <= before:
                raise StorageError(
                    f"{error}; or give another source with --url, which may be file://..., or copy the file there by "
                    "hand",
                    error.reason,
                ) from None


def _receive(weight: Weight, url: str, part: BufferedRandom) -> None:
    """Appends the missing bytes of the file to `part`.

    Raises TccpError if it is another file, ConnectionError if the server or the network fails.
    """
    from tccp.progress import progress

    start = part.seek(0, os.SEEK_END)
    if weight.sha256 is None or start > (weight.size_bytes or start):
        start = _truncate(part)
    if start and start == weight.size_bytes:
        return
    response, offset = _opened(url, start)
    with response, progress() as bar:
        if offset < start:
            start = _truncate(part)
        length = response.headers.get("Content-Length")
        total = weight.size_bytes if length is None else start + int(length)
        if weight.size_bytes not in (None, total):
            raise TccpError(
                f"{url} offers {total} bytes, but {weight.file} has {weight.size_bytes}: it is not that file; open the "
                "address in a browser, or give another with --url"
            )
        # In megabytes, because progress shows whole numbers.
        task = bar.add_task(f"{weight.name}, MB", total=None if total is None else total / 1e6)
        done = start
        for block in _blocks(response, url):
            part.write(block)
            done += len(block)
            bar.update(task, completed=done / 1e6)
            if done > (total or done):
                _truncate(part)
                raise TccpError(f"{url} sends more than the {total} bytes of {weight.file}: it is not that file")
    if done < (total or 1):
        if weight.sha256 is None:
            _truncate(part)
        raise ConnectionError(f"it broke off after {done} of {total or '?'} bytes")


def _truncate(part: BufferedRandom) -> int:
    part.seek(0)
    part.truncate()
    return 0


def _opened(url: str, start: int) -> tuple[Any, int]:
    """An open response and the offset of its first byte: `start`, or 0 if the server does not support ranges."""
    if not re.match(r"(https?|file)://", url):
        raise TccpError(f"{url!r} is not an address of weights: give one that begins with http://, https:// or file://")
    # Some servers refuse Python's default User-Agent.
    headers = {"User-Agent": f"tccp/{__version__}"} | ({"Range": f"bytes={start}-"} if start else {})
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT_S)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE and start:
            return _opened(url, 0)
        if error.code >= 500 or error.code in HTTP_TRANSIENT:
            raise ConnectionError(f"{error.code} {error.reason}") from None
        raise TccpError(
            f"{url}: {error.code} {error.reason}; try another source with --url, or {MIRROR_VARIABLE}"
        ) from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, FileNotFoundError | ValueError | http.client.InvalidURL):
            said = str(reason).splitlines() or [type(error).__name__]
            raise TccpError(f"{url}: {said[0]}; give the address of the file with --url") from None
        raise ConnectionError(first_line(reason) if isinstance(reason, Exception) else str(reason)) from None
    partial = str(response.headers.get("Content-Range", "")).startswith(f"bytes {start}-")
    return response, start if start and response.status == http.client.PARTIAL_CONTENT and partial else 0


def _blocks(response: Any, url: str) -> Iterator[bytes]:
    while True:
        try:
            block = response.read(_BLOCK_BYTES)
        except (OSError, http.client.HTTPException) as error:
            raise ConnectionError(f"it broke off ({error})") from None
        if not block:
            return
        yield block
