"""Iterators that run ahead in a thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from tccp.inference.ahead import ahead


def numbers(check: Callable[[], None], made: list[int]) -> Iterator[int]:
    for number in range(1000):
        check()
        made.append(number)
        yield number


def test_items_come_in_order_and_few_are_made_ahead() -> None:
    made: list[int] = []
    items = ahead(lambda check: numbers(check, made), depth=1)
    assert [next(items) for _ in range(3)] == [0, 1, 2]
    time.sleep(0.3)
    assert len(made) <= 5  # one waits in the queue, one in the thread
    assert list(items) == list(range(3, 1000))


def test_the_thread_ends_with_its_consumer() -> None:
    made: list[int] = []
    items = ahead(lambda check: numbers(check, made))
    next(items)
    items.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "tccp-ahead"]
    assert len(made) < 10


def test_an_error_comes_after_the_items_before_it_with_its_own_type() -> None:
    def failing(check: Callable[[], None]) -> Iterator[int]:
        yield 1
        raise ValueError("no more")

    items = ahead(failing)
    assert next(items) == 1
    with pytest.raises(ValueError, match="no more"):
        next(items)
    assert not [thread for thread in threading.enumerate() if thread.name == "tccp-ahead"]


def test_two_sides_work_at_the_same_time() -> None:
    """Both sides wait for each other's work, which would be impossible one after the other."""
    barrier = threading.Barrier(2, timeout=10)

    def meeting(check: Callable[[], None]) -> Iterator[int]:
        yield 0
        barrier.wait()
        yield 1

    items = ahead(meeting)
    next(items)
    barrier.wait()
    assert next(items) == 1
