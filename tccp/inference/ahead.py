"""Runs an iterator ahead of its consumer, in a thread."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Generator, Iterable
from typing import TypeVar

T = TypeVar("T")
_LOOK_S = 0.1  # how often a thread that waits for room looks whether it is still needed


class Stopped(Exception):
    """The consumer needs no more items."""


def ahead(make: Callable[[Callable[[], None]], Iterable[T]], depth: int = 1) -> Generator[T, None, None]:
    """The items of `make(check)`, made by a thread up to `depth` items ahead of those that are taken.

    check: `make` calls it where it can stop; it raises Stopped once the consumer has closed this iterator. The thread
    has ended when this iterator has. Errors of `make` are raised here, after the items before them.
    """
    items: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(depth)
    stop = threading.Event()

    def check() -> None:
        if stop.is_set():
            raise Stopped

    def put(item: T | None, error: BaseException | None = None) -> None:
        while True:
            check()
            try:
                return items.put((item, error), timeout=_LOOK_S)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in make(check):
                put(item)
            put(None, StopIteration())
        except Stopped:
            pass
        except BaseException as error:  # it is raised in the consumer's thread
            with contextlib.suppress(Stopped):
                put(None, error)

    thread = threading.Thread(target=work, name="tccp-ahead", daemon=True)
    thread.start()
    try:
        while True:
            item, error = items.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item  # type: ignore[misc]
    finally:
        stop.set()
        thread.join()
