"""Lists the sources of a run in their order, with their sizes; duplicates are set aside."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa

from preprocessing.sources.finding import files_left_out, find_sources
from tccp.files import is_url
from tccp.media import MediaError
from tccp.media.remote import content_hash, version_of

logger = logging.getLogger(__name__)
_MOST_KINDS = 12  # named in one line


def list_sources(given: Sequence[str | Path]) -> pa.Table:
    """The table of `find_sources` with columns for set-aside sources, `order`, and `bytes` (0 for URLs).

    A film with the same content as an earlier one is set aside as `duplicate`. Logs what folders hold besides films.
    """
    table = find_sources(given)
    if others := files_left_out(table):
        logger.info("%s", described(others))
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


def described(left_out: Mapping[str, int]) -> str:
    """One line about the files of `files_left_out`."""
    kinds = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    listed = ", ".join(f"{count:,} {suffix or 'without an ending'}" for suffix, count in kinds[:_MOST_KINDS])
    rest = sum(count for _, count in kinds[_MOST_KINDS:])
    more = f", {rest:,} others" if rest else ""
    return f"{sum(left_out.values()):,} files in the folders are no films and left out: {listed}{more}"


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
