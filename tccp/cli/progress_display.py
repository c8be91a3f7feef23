"""Shows progress and log lines of the library on stderr, so that `--json` has stdout to itself."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from tccp.progress import ProgressEvent, ProgressHandler, ProgressLines, set_progress_handler

LINES_ONLY = "TCCP_PROGRESS_LINES"
"""Environment variable: if set, progress is shown as lines on a terminal too."""


class _Bars:
    """Live bars on a terminal. A copy in another process writes lines: live displays would overwrite each other."""

    def __init__(self) -> None:
        self._live: Progress | None = None
        self._tasks: dict[int, TaskID] = {}

    def __call__(self, event: ProgressEvent) -> None:
        if self._live is None:
            self._live = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                console=Console(stderr=True, soft_wrap=True),
            )
            self._live.start()
        if event.task_id not in self._tasks:
            self._tasks[event.task_id] = self._live.add_task(event.description, total=event.total)
        self._live.update(
            self._tasks[event.task_id], completed=event.done, total=event.total, description=event.description
        )
        if event.ended:
            self._tasks.pop(event.task_id)
            if not self._tasks:
                self._live.stop()
                self._live = None

    def __reduce__(self) -> tuple[type[_StderrLines], tuple[()]]:
        return _StderrLines, ()


class _StderrLines(ProgressLines):
    """Writes lines to stderr, in this process and in processes that get a copy."""

    def __init__(self) -> None:
        super().__init__(lambda line: print(line, file=sys.stderr, flush=True))

    def __reduce__(self) -> tuple[type[_StderrLines], tuple[()]]:
        return _StderrLines, ()


class _LogLines(logging.Handler):
    """Prints the library's log records as lines of the command line."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"tccp: {' '.join(self.format(record).split())}", file=sys.stderr, flush=True)


@contextmanager
def shown_on_stderr() -> Iterator[None]:
    """Shows progress and warnings of the library while the context is open."""
    bars = sys.stderr.isatty() and not os.environ.get(LINES_ONLY)
    handler: ProgressHandler = _Bars() if bars else _StderrLines()
    set_progress_handler(handler)
    lines = _LogLines(logging.INFO)
    loggers = [logging.getLogger(name) for name in ("tccp", "preprocessing", "ray_jobs")]
    before = [(one.level, one.propagate) for one in loggers]
    for one in loggers:
        one.addHandler(lines)
        one.setLevel(logging.INFO)
        one.propagate = False
    try:
        yield
    finally:
        set_progress_handler(None)
        for one, (level, propagate) in zip(loggers, before, strict=True):
            one.removeHandler(lines)
            one.setLevel(level)
            one.propagate = propagate
