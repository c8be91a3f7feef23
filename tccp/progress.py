"""Reports progress of long tasks as events to a handler. Without a handler, nothing is shown.

Library code reports through `progress()`. A program that shows progress sets a handler for its process
(`set_progress_handler`), as the command line does (`tccp.cli.progress_display`), or passes one to the call.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

logger = logging.getLogger(__name__)

LINE_EVERY_S = 15.0


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


class ProgressLines:
    """A handler for logs and pipes: writes a line per task every 15 seconds, and at the end of longer tasks.

    write: called with each line; by default, lines are logged.
    """

    def __init__(self, write: Callable[[str], object] = logger.info):
        self._write = write
        self._started: dict[int, tuple[float, float]] = {}  # time and amount done at the first event
        self._written: dict[int, float] = {}

    def __call__(self, event: ProgressEvent) -> None:
        now = time.monotonic()
        started, done_then = self._started.setdefault(event.task_id, (now, event.done))
        written = self._written.setdefault(event.task_id, now)
        complete = event.total is not None and event.done >= event.total
        elapsed = now - started
        if written != float("inf") and (now - written >= LINE_EVERY_S or (complete and elapsed >= LINE_EVERY_S)):
            self._written[event.task_id] = float("inf") if complete else now
            rate = (event.done - done_then) / elapsed
            eta = (
                ""
                if complete or event.total is None or not rate
                else f", ETA {(event.total - event.done) / rate:.0f} s"
            )
            total = "?" if event.total is None else f"{event.total:g}"
            self._write(f"{event.description}: {event.done:g}/{total}, {elapsed:.0f} s{eta}")
        if event.ended:
            self._started.pop(event.task_id)
            self._written.pop(event.task_id)
