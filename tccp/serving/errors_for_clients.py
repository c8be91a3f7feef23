"""Errors as clients see them: one line, with the names of the API, without paths of the server."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from tccp.errors import StorageError, TccpError
from tccp.files import Folder
from tccp.media import MediaError
from tccp.serving.work import JobLost

_OPTION = re.compile(r"--([a-z][a-z-]*[a-z])")
_FOLDERS = re.compile(r"(?<![\w:/.])/(?:[^\s/'\"]+/)+")  # of an absolute path; not of a URL


def code_of(error: BaseException) -> str:
    """A code that programs can compare: why a media file was refused, or `invalid_input`."""
    if isinstance(error, Refused):
        return error.code
    return error.reason if isinstance(error, MediaError) else "invalid_input"


def message_for_client(error: BaseException, storage: Folder) -> str:
    """The message without folders of this machine; options of the command line become fields of the API."""
    text = " ".join(str(error).split())
    if storage.local is None:
        text = text.replace(storage.place.rstrip("/") + "/", "")
    return _OPTION.sub(lambda option: option[1].replace("-", "_"), _FOLDERS.sub("", text))


class Refused(TccpError):
    """An error for a client, made where it arose. Other processes get it as it is."""

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code

    def __reduce__(self) -> tuple:
        return Refused, (self.code, str(self))


@contextmanager
def refused(storage: Folder) -> Iterator[None]:
    """Raises a TccpError of the context as `Refused`."""
    try:
        yield
    except Refused:
        raise
    except TccpError as error:
        raise Refused(code_of(error), message_for_client(error, storage)) from None


@contextmanager
def without_ray() -> Iterator[None]:
    """Raises an error of another process as itself; Ray wraps it in one whose text is a traceback."""
    try:
        yield
    except (TccpError, StorageError, JobLost) as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, TccpError | StorageError | JobLost):
            raise cause from None
        raise
