"""Damaged data in training: an item that cannot be read is set aside, and another one of the data takes its place."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from tccp.errors import DamagedData
from tccp.seeds import rng_seed

logger = logging.getLogger("tccp.training")

MOST_TRIED = 20
"""Items tried in place of a damaged one. If none can be read, most of the data is damaged, and training ends."""
_said: set[str] = set()

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def say_set_aside(item: str, reason: object) -> None:
    """Logs once per process that an item is left out."""
    if item not in _said:
        _said.add(item)
        logger.warning("%s is set aside: %s", item, reason)


def readable(items: Iterable[_Item], read: Callable[[_Item], _Result]) -> Iterator[_Result]:
    """The results for all items that are not damaged."""
    for item in items:
        try:
            result = read(item)
        except DamagedData as error:
            say_set_aside(f"clip {item}", error)
            continue
        yield result


def read_or_other(
    clip_id: str, item: _Item, read: Callable[[_Item], _Result], others: Callable[[], Sequence[_Item]], seed: int
) -> tuple[_Result, bool]:
    """The result for an item of the clip, or, if it is damaged, for another item; and whether it is damaged.

    The choice depends on `seed` and `others()` only, so a resumed training makes the same one.
    Raises DamagedData if MOST_TRIED others are damaged, too.
    """
    try:
        return read(item), False
    except DamagedData as error:
        damage = error
    say_set_aside(f"clip {clip_id}", damage)
    choice = others()
    for attempt in range(MOST_TRIED):
        with contextlib.suppress(DamagedData):
            return read(choice[rng_seed(seed, "set aside", attempt) % len(choice)]), True
    raise DamagedData(f"{damage}; {MOST_TRIED} others tried in its place cannot be read either")
