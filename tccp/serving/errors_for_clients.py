"""Errors as clients see them: one line, with the names of the API, without paths of the server."""

from __future__ import annotations

import re

from tccp.files import Folder
from tccp.media import MediaError

_OPTION = re.compile(r"--([a-z][a-z-]*[a-z])")


def code_of(error: BaseException) -> str:
    """A code that programs can compare: why a media file was refused, or `invalid_input`."""
    return error.reason if isinstance(error, MediaError) else "invalid_input"


def message_for_client(error: BaseException, storage: Folder) -> str:
    """The message without paths of this machine; options of the command line become fields of the API."""
    text = " ".join(str(error).split())
    roots = {storage.place, str(storage.local or storage.place)}
    for root in sorted(roots, key=len, reverse=True):
        text = re.sub(re.escape(root.rstrip("/")) + r"/(?:[\w.-]+/)*", "", text)
    return _OPTION.sub(lambda option: option[1].replace("-", "_"), text)
