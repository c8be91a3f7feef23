"""The retry policy for storage and network, and the translation of filesystem errors into errors by who can act.

Every filesystem raises its own library's errors. `retried` sorts them into: not there (FileNotFoundError), refused
(AccessError: permission, credentials, a wrong name), this machine's disk is full (TccpError), and failures that another
attempt may pass. Those are tried again, with growing pauses, for TCCP_STORAGE_RETRY_S seconds; then StorageError.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from tccp.errors import StorageError, TccpError

logger = logging.getLogger("tccp.storage")

RETRY_S = "TCCP_STORAGE_RETRY_S"
"""Environment variable: seconds for which a failed access to storage is tried again, at least once. 0: no retry."""
DEFAULT_RETRY_S = 60.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 8.0

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_REFUSED = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG),
    *(errno.ELOOP, errno.ENOTEMPTY),
}
_OF_THIS_PROCESS = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}  # another attempt fails alike
_FAILED_DISK = {
    *(errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENODEV),
    *(errno.ENXIO, errno.EREMOTEIO, errno.ENETDOWN, errno.ENETUNREACH),
}  # as disks of this machine and of the network give them
_BUGS = (TypeError, AttributeError, NameError, AssertionError, NotImplementedError, ImportError, MemoryError)
# Of botocore, google-auth and azure-identity, by name, because none of them need be installed.
_WRONG_CREDENTIALS = {
    *(
        "NoCredentialsError",
        "PartialCredentialsError",
        "NoAuthTokenError",
        "ProfileNotFound",
        "DefaultCredentialsError",
    ),
    *("ClientAuthenticationError", "ParamValidationError", "NoRegionError", "InvalidRegionError"),
}
_HTTP_MISSING = (404, 410)
HTTP_TRANSIENT = (408, 409, 425, 429)
"""Statuses below 500 after which another attempt may succeed."""
_CORRUPTED_ON_THE_WAY = ("BadDigest", "IncompleteBody", "RequestTimeout", "XAmzContentSHA256Mismatch", "SlowDown")

_Result = TypeVar("_Result")
_lock = threading.Lock()
_retries = 0


class AccessError(TccpError):
    """A filesystem refused an access: no permission, wrong credentials, or a name that cannot be used there."""

    def __init__(self, message: str, reason: str | None = None):
        super().__init__(message)
        self.reason = reason or message


def storage_retries() -> int:
    """How often this process has tried an access to storage again, so far."""
    return _retries


def retry_seconds() -> float:
    """The setting TCCP_STORAGE_RETRY_S. Raises TccpError if it is not a number of seconds."""
    given = os.environ.get(RETRY_S, "")
    try:
        seconds = float(given or DEFAULT_RETRY_S)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise TccpError(f"{RETRY_S}={given}: give a number of seconds, 0 or more")
    return seconds


def retried(what: str, action: Callable[[], _Result]) -> _Result:
    """The result of `action`, which is called again after failures of storage or network.

    what: completes "cannot ...", for messages: `read s3://bucket/file`.
    Raises FileNotFoundError, AccessError, TccpError (disk full) at once, StorageError after the last attempt, and what
    is an error of the program unchanged.
    """
    limit_s = retry_seconds()
    started = time.monotonic()
    pause_s, attempts = _FIRST_PAUSE_S, 0
    while True:
        attempts += 1
        try:
            return action()
        except Exception as error:  # filesystems raise errors of their own libraries
            final, reason = _sorted(error, what)
            if final is error:
                raise
            if final is not None:
                raise final from error
            left_s = limit_s - (time.monotonic() - started)
            if limit_s == 0 or (left_s <= 0 and attempts > 1):
                raise _given_up(what, reason, attempts, time.monotonic() - started) from error
            wait_s = min(pause_s * random.uniform(0.7, 1.0), max(left_s, 0.0))
            logger.warning("storage: cannot %s (%s); next attempt in %.1f s", what, reason, wait_s)
        _count_retry()
        time.sleep(wait_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def _count_retry() -> None:
    global _retries
    with _lock:
        _retries += 1


def _given_up(what: str, reason: str, attempts: int, seconds: float) -> StorageError:
    tried = f"{attempts} attempts in {seconds:.0f} s" if attempts > 1 else "1 attempt"
    return StorageError(
        f"cannot {what}: {reason} ({tried}); check network and storage, then give the same command again", reason
    )


@contextmanager
def translated_errors(what: str) -> Iterator[None]:
    """For accesses that cannot be repeated: errors as `retried` raises them, after one attempt.

    Only failures of the disk, or a full one, are translated, because the block may also do other things. torch and
    safetensors wrap them into errors of their own.
    """
    try:
        yield
    except Exception as error:  # the libraries' errors have no common class; all but failures of the disk go on
        failure = _os_error_in(error)
        if failure is None:
            raise
        final, reason = _sorted(failure, what)
        if failure.errno in FULL and final is not None:
            raise final from error
        if failure.errno not in _FAILED_DISK:
            raise
        raise _given_up(what, reason, 1, 0.0) from error


def _os_error_in(error: BaseException | None) -> OSError | None:
    """The failed write that made torch (by its context) or safetensors (by its text) raise an error; or the error."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        if isinstance(error, OSError):
            return error
        if isinstance(error, TccpError | StorageError):
            return None  # it says already what is the matter
        if type(error).__name__ == "SafetensorError" and (found := re.search(r"\(os error (\d+)\)", str(error))):
            return OSError(int(found[1]), os.strerror(int(found[1])))
        seen.append(error)
        error = error.__context__
    return None


def is_storage_failure(error: BaseException) -> bool:
    """Whether another attempt may pass: a StorageError, or an OSError of a network or a network disk."""
    return isinstance(error, StorageError | TimeoutError | ConnectionError) or (
        isinstance(error, OSError) and error.errno in _FAILED_DISK
    )


def first_line(error: BaseException) -> str:
    """The first line of an error's text, without users, passwords and queries of URLs; without text, its type."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    line = next(iter(text.strip().splitlines()), "") or type(error).__name__
    return re.sub(r"(https?://[^\s?]*)\?[^\s\"]*", r"\1", re.sub(r"://[^/@\s]*@", "://", line))


def _sorted(error: Exception, what: str) -> tuple[Exception | None, str]:
    """What to raise at once (None: try again), and the reason in words."""
    if isinstance(error, (TccpError, StorageError, *_BUGS)):
        return error, first_line(error)
    error = _actual(error)
    status = _http_status(error)
    reason = f"HTTP status {status}" if status and not isinstance(error, OSError) else first_line(error)
    if isinstance(error, FileNotFoundError):
        return error, reason
    code = error.errno if isinstance(error, OSError) else None
    if status in _HTTP_MISSING:
        return FileNotFoundError(errno.ENOENT, reason, what), reason
    if code in FULL:
        return TccpError(f"cannot {what}: the disk is full; make room or choose another folder"), reason
    if code in _OF_THIS_PROCESS:
        return error, reason
    if _is_refused(error, code, status):
        return AccessError(f"cannot {what}: {reason}; check the address, credentials and permissions", reason), reason
    return None, reason


def _actual(error: Exception) -> Exception:
    """The cause of a FileNotFoundError that fsspec raises for whatever happens over HTTP; else the error itself."""
    cause = error.__cause__
    if not isinstance(error, FileNotFoundError) or not isinstance(cause, Exception):
        return error
    status = _http_status(cause)
    if status is not None:
        return error if status in _HTTP_MISSING else cause
    of_network = type(cause).__module__.partition(".")[0] == "aiohttp"
    return cause if of_network or (isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError)) else error


def _http_status(error: BaseException) -> int | None:
    """The status of an HTTP response: of aiohttp, botocore (also where s3fs has translated it), gcsfs or adlfs."""
    status: Any = getattr(error, "status", None) or getattr(error, "status_code", None)
    if status is None and not type(error).__module__.startswith("aiohttp"):  # whose `code` is one of its parser
        status = getattr(error, "code", None)
    for one in (error, error.__cause__):
        response = getattr(one, "response", None)
        if isinstance(response, dict):
            if response.get("Error", {}).get("Code") in _CORRUPTED_ON_THE_WAY:
                return 408
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    number = int(str(status)) if str(status).isdigit() else 0  # gcsfs may give digits
    return number if 300 <= number < 600 else None


def _is_refused(error: Exception, code: int | None, status: int | None) -> bool:
    if status is not None:
        return status < 500 and status not in HTTP_TRANSIENT
    if isinstance(error, json.JSONDecodeError):  # a gateway's page in place of the answer
        return False
    names = {kind.__name__ for kind in type(error).__mro__}
    return isinstance(error, PermissionError | ValueError) or code in _REFUSED or bool(names & _WRONG_CREDENTIALS)
