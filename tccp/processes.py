"""Helpers for worker processes: they end with their parent and can import this package."""

from __future__ import annotations

import multiprocessing
import os
import threading
from multiprocessing.context import ForkServerContext
from pathlib import Path


def forking_context(module: str) -> ForkServerContext:
    """Starts processes as forks of a server that has imported `module`, which takes seconds with torch and diffusers.

    The server starts with the first process and ends with this one. Its environment stays that of its start.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module])
    return context


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
