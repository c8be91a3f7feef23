"""Helpers for worker processes: they end with their parent and can import this package."""

from __future__ import annotations

import multiprocessing
import os
import threading
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext, ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any


def forking_context(module: str) -> ForkServerContext:
    """Starts processes as forks of a server that has imported `module`, which takes seconds with torch.

    The server starts with the first process and ends with this one. Its environment stays that of its start.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module])
    return context


def in_processes(
    context: BaseContext,
    jobs: int,
    work: Callable[..., object],
    calls: Sequence[tuple[Any, ...]],
    start: Callable[..., object],
    start_arguments: tuple[Any, ...] = (),
) -> None:
    """Calls `work(*call)` for each of the calls, up to `jobs` at a time, each in a process of its own.

    start: called first in every process, with `start_arguments`. The first error ends the other processes, at once, and
    is raised here; an interruption ends them, too. No other child of this process is touched.
    Raises RuntimeError if a process ends without a result: because it was killed, or memory ran out.
    """
    waiting = list(calls)
    running: dict[Connection, BaseProcess] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(  # type: ignore[attr-defined]
                    target=_run, args=(sender, work, waiting.pop(0), start, start_arguments), daemon=False
                )
                process.start()
                sender.close()  # else the end of the process would not end the pipe
                running[receiver] = process
            ready = wait(list(running))
            for receiver in [one for one in running if one in ready]:
                error = _result_of(receiver, running[receiver])
                del running[receiver]
                if error is not None:
                    raise error
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.join(_END_S)
            if process.is_alive():
                process.kill()
                process.join()


_END_S = 10.0
"""How long a process may take to end before it is killed."""


def _run(
    sender: Connection,
    work: Callable[..., object],
    call: tuple[Any, ...],
    start: Callable[..., object],
    start_arguments: tuple[Any, ...],
) -> None:
    try:
        start(*start_arguments)
        work(*call)
        error = None
    except Exception as caught:  # whatever it is, the process that waits raises it
        caught.add_note("in another process:\n" + traceback.format_exc())  # its traceback does not travel
        error = caught
    try:
        sender.send(error)
    except Exception:  # an error that cannot be pickled
        sender.send(RuntimeError("".join(traceback.format_exception(error))))


def _result_of(receiver: Connection, process: BaseProcess) -> BaseException | None:
    try:
        error: BaseException | None = receiver.recv()
    except EOFError:
        process.join()
        return RuntimeError(f"a process ended with status {process.exitcode} and without a result: did memory run out?")
    finally:
        receiver.close()
    process.join()
    return error


def end_with_parent() -> None:
    """Ends this process as soon as its parent ends. Call it in a process started by `multiprocessing`.

    A killed parent cannot stop its workers. They would continue, write checkpoints and disturb the next run.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def importable_in_children() -> None:
    """Adds this package to PYTHONPATH, so that processes started from now on import this copy of it.

    Otherwise a folder named `tccp` in their working directory, such as a clone, would hide an editable install from
    Ray's workers.
    """
    root = str(Path(__file__).resolve().parent.parent)
    known = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if root not in known:
        os.environ["PYTHONPATH"] = os.pathsep.join([root, *filter(None, known)])
