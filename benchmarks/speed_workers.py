"""Processes that measure for benchmarks/speed.py: each takes one job at a time, so that several can take turns.

A worker is a script that calls `serve`. It reads a job per line (JSON) and answers each with a line.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ONE_THREAD = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")} | {"OPENCV_FOR_THREADS_NUM": "1"}


def clean_environment(tree: Path) -> dict[str, str]:
    """The environment of a process that imports `tccp` from `tree`, without settings of this process."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "TCCP_", "PYTHON"))}
    return kept | {"PYTHONPATH": str(tree)}


class Worker:
    """A script of benchmarks/ in a process of its own, with one thread. Use as a context manager."""

    def __init__(self, script: str, tree: Path, **environment: str):
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name(script))],
            env=clean_environment(tree) | ONE_THREAD | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, job: str, **arguments: Any) -> Any:
        """The result of a job. Raises RuntimeError if the worker ended; it has printed why."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps({"job": job, **arguments}), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self._process.args} ended in the job {job} {arguments}")
        return json.loads(answer)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.communicate()


def serve(jobs: Mapping[str, Callable[..., Any]]) -> None:
    """Answers jobs until the parent ends. What jobs print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        arguments = json.loads(line)
        print(json.dumps(jobs[arguments.pop("job")](**arguments)), file=answers, flush=True)


def cpu_seconds(call: Callable[[], object], repeats: int = 1) -> float:
    """The least CPU time of this process for a call: other work on the machine only adds to it."""
    times = []
    for _ in range(repeats):
        began = time.process_time()
        call()
        times.append(time.process_time() - began)
    return min(times)


def median_of(records: list[dict[str, float]], digits: int = 2) -> dict[str, float]:
    """The median of each figure over repeated measurements."""
    return {name: round(statistics.median(record[name] for record in records), digits) for name in records[0]}


@contextmanager
def worktree(commit: str, place: Path) -> Iterator[Path]:
    """Within the block, `place` holds the files of a commit."""
    subprocess.run(["git", "worktree", "add", "-q", "--detach", place, commit], cwd=ROOT, check=True)
    try:
        yield place
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", place], cwd=ROOT, check=True)
