"""Progress with an ETA, on stderr, so that stdout stays clean for `--json`."""

from __future__ import annotations

import os
import time
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

LINE_EVERY_S = 15.0
LINES_ONLY = "TCCP_PROGRESS_LINES"
"""Environment variable that asks for lines on a terminal too."""


class LineProgress(Progress):
    """For logs and pipes: a plain line per task now and then, and one at the end of a task that took so long."""

    def __init__(self, *columns: Any, **options: Any):
        super().__init__(*columns, **options)
        self._printed: dict[TaskID, float] = {}

    def update(self, task_id: TaskID, *args: Any, **fields: Any) -> None:
        super().update(task_id, *args, **fields)
        self._line(self._tasks[task_id])

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        self._line(self._tasks[task_id])

    def _line(self, task: Task) -> None:
        now = time.monotonic()
        last = self._printed.setdefault(task.id, now)
        done = task.total is not None and task.completed >= task.total
        due = now - last >= LINE_EVERY_S or (done and (task.elapsed or 0) >= LINE_EVERY_S)
        if last == float("inf") or not due:
            return
        self._printed[task.id] = float("inf") if done else now
        total = "?" if task.total is None else f"{task.total:g}"
        eta = "" if done or task.time_remaining is None else f", ETA {task.time_remaining:.0f} s"
        self.console.print(f"{task.description}: {task.completed:g}/{total}, {task.elapsed or 0:.0f} s{eta}")


def progress(shown: bool = True) -> Progress:
    """A live bar on a terminal; elsewhere a line every quarter of a minute."""
    console = Console(stderr=True, soft_wrap=True, quiet=not shown)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    if console.is_terminal and not os.environ.get(LINES_ONLY):
        return Progress(*columns, console=console)
    return LineProgress(*columns, console=console, disable=True)
