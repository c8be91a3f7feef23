"""Reports progress of long tasks as events to a handler. Without a handler, nothing is shown.

Library code reports through `progress()`. A program that shows progress sets a handler for its process
(`set_progress_handler`), as the command line does (`tccp.cli.progress_display`), or passes one to the call.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

logger = logging.getLogger(__name__)

FIRST_LINE_S, LINE_EVERY_S = 3.0, 15.0
"""After so many seconds a task writes its first line, and then another one."""
_BEAT_S = 0.5


@dataclass(frozen=True)
class ProgressEvent:
    """The progress of one task.

    task_id: the same for all events of a task, unique in its process. description: for display; it may change.
    done, total: in units of the task; total is None while it is unknown. ended: whether this is the task's last event.
    """

    task_id: int
    description: str
    done: float | int = 0
    total: float | int | None = None
    ended: bool = False


ProgressHandler = Callable[[ProgressEvent], object]

_handler: ProgressHandler | None = None
_numbers = itertools.count()


def set_progress_handler(handler: ProgressHandler | None) -> None:
    """Sets the handler for calls in this process that are given none. Child processes do not inherit it."""
    global _handler
    _handler = handler


def progress_handler() -> ProgressHandler | None:
    return _handler


class Tasks:
    """Tasks that report to one handler; see `progress`."""

    def __init__(self, handler: ProgressHandler | None):
        self._handler = handler
        self._tasks: dict[int, ProgressEvent] = {}

    def add_task(self, description: str, total: float | int | None = None, completed: float | int = 0.0) -> int:
        """Starts a task; returns its id for `advance` and `update`."""
        task_id = next(_numbers)
        self._report(ProgressEvent(task_id, description, completed, total))
        return task_id

    def advance(self, task_id: int, advance: float | int = 1) -> None:
        self.update(task_id, advance=advance)

    def update(
        self,
        task_id: int,
        *,
        completed: float | int | None = None,
        advance: float | int = 0,
        total: float | int | None = None,
        description: str | None = None,
    ) -> None:
        """completed: units done in total. advance: units done since the last event."""
        event = self._tasks[task_id]
        done = event.done + advance if completed is None else completed
        self._report(
            replace(
                event,
                done=done,
                total=event.total if total is None else total,
                description=description or event.description,
            )
        )

    def end(self) -> None:
        for event in list(self._tasks.values()):
            self._report(replace(event, ended=True))

    def _report(self, event: ProgressEvent) -> None:
        self._tasks[event.task_id] = event
        if self._handler is not None:
            self._handler(event)


@contextmanager
def progress(handler: ProgressHandler | None = None, shown: bool = True) -> Iterator[Tasks]:
    """Tasks that report to `handler`, or by default to the process's handler. If not `shown`, they report nothing."""
    tasks = Tasks((handler or _handler) if shown else None)
    try:
        yield tasks
    finally:
        tasks.end()


def duration_text(seconds: float | int) -> str:
    """A duration in the unit in which people would say it: `0.25 s`, `15 s`, `12 min`, `3.2 h`."""
    for unit, size, most in (("s", 1.0, 120.0), ("min", 60.0, 120.0)):
        if seconds / size < most - 0.5:
            return f"{_figures(seconds / size)} {unit}"
    return f"{_figures(seconds / 3600)} h"


def _figures(value: float) -> str:
    """Two significant digits, or all those before the point."""
    return f"{value:,.0f}" if value >= 9.95 else f"{value:.2g}"


class ProgressLines:
    """A handler for logs and pipes: writes a line per task after 3 seconds, then every 15 seconds, and at the end.

    A task that ends within 3 seconds writes nothing. Lines come from a thread of their own, so that they also appear
    while a step takes long. write: called with each line; by default, lines are logged.
    """

    def __init__(self, write: Callable[[str], object] = logger.info):
        self._write = write
        self._tasks: dict[int, _TaskLines] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def __call__(self, event: ProgressEvent) -> None:
        with self._lock:
            lines = self._tasks.setdefault(event.task_id, _TaskLines(event, time.monotonic()))
            lines.event = event
            if lines.is_complete and not lines.said_complete and lines.written_at is not None:
                self._say(lines)
            if event.ended:
                self._tasks.pop(event.task_id)
            if self._tasks and self._thread is None:
                self._thread = threading.Thread(target=self._beat, daemon=True)
                self._thread.start()

    def __reduce__(self) -> tuple[type[ProgressLines], tuple[Any, ...]]:  # a copy in another process has own tasks
        return type(self), (self._write,)

    def _beat(self) -> None:
        """Writes the lines that are due, until all tasks have ended."""
        while True:
            time.sleep(_BEAT_S)
            with self._lock:
                if not self._tasks:
                    self._thread = None
                    return
                for lines in self._tasks.values():
                    if lines.due(time.monotonic()):
                        self._say(lines)

    def _say(self, lines: _TaskLines) -> None:
        lines.written_at = time.monotonic()
        lines.said_complete = lines.is_complete
        self._write(lines.text(lines.written_at))


@dataclass
class _TaskLines:
    """A task of `ProgressLines`: its newest event, and when its lines were written."""

    event: ProgressEvent
    started_at: float
    done_then: float | int = field(init=False)
    written_at: float | None = None
    said_complete: bool = False

    def __post_init__(self) -> None:
        self.done_then = self.event.done

    @property
    def is_complete(self) -> bool:
        return self.event.total is not None and self.event.done >= self.event.total

    def due(self, now: float) -> bool:
        if self.said_complete:
            return False
        since, wait = (self.started_at, FIRST_LINE_S) if self.written_at is None else (self.written_at, LINE_EVERY_S)
        return now - since >= wait

    def text(self, now: float) -> str:
        event, elapsed = self.event, now - self.started_at
        if event.total is None and not event.done:
            return f"{event.description}: {elapsed:.0f} s"
        rate = (event.done - self.done_then) / max(elapsed, 1e-3)
        eta = ""
        if event.total is not None and not self.is_complete and rate > 0:
            eta = f", ETA {duration_text((event.total - event.done) / rate)}"
        total = "?" if event.total is None else _amount(event.total)
        return f"{event.description}: {_amount(event.done)}/{total}, {elapsed:.0f} s{eta}"


def _amount(value: float | int) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:g}"
