"""Lists the sources of a run in their order, with their sizes; duplicates are set aside."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from preprocessing.sources.finding import find_sources
from tccp.files import is_url
from tccp.media import MediaError
from tccp.media.remote import content_hash, version_of


def list_sources(given: Sequence[str | Path]) -> pa.Table:
    """The table of `find_sources` with columns for set-aside sources, `order`, and `bytes` (0 for URLs).

    A film with the same content as an earlier one is set aside as `duplicate`.
    """
    table = find_sources(given)
    sizes: list[int] = []
    first_with: dict[object, int] = {}  # content to the number of the first source
    reasons: list[str | None] = []
    messages: list[str | None] = []
    by_size: dict[int, list[int]] = {}
    paths, names = table.column("path").to_pylist(), table.column("source").to_pylist()
    for number, path in enumerate(paths):
        sizes.append(_size(path))
        by_size.setdefault(sizes[-1], []).append(number)
    for number, path in enumerate(paths):
        reason = message = None
        if sizes[number] and not is_url(path) and len(by_size[sizes[number]]) > 1:
            first = first_with.setdefault(_content(path, number), number)
            if first != number:
                reason, message = "duplicate", f"{path}: has the same content as {names[first]}"
        reasons.append(reason)
        messages.append(message)
    for name, column in (
        ("reason", pa.array(reasons, pa.string())),
        ("message", pa.array(messages, pa.string())),
        ("order", pa.array(range(len(paths)), pa.int64())),
        ("bytes", pa.array(sizes, pa.int64())),
    ):
        table = table.append_column(name, column)
    return table


def _size(path: str) -> int:
    try:
        return 0 if is_url(path) else version_of(path)[1]
    except MediaError:
        return 0


def _content(path: str, number: int) -> object:
    try:
        return content_hash(Path(path))
    except OSError:
        return number  # not a duplicate; the step that reads the film reports the error
