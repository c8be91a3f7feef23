"""What processes that share work have in common."""

from __future__ import annotations

import multiprocessing
import os
import threading


def end_with_parent() -> None:
    """Called in a process started by `multiprocessing`: it ends as soon as the process that started it does.

    A parent that is killed cannot tell its workers, which would go on, write checkpoints, and be in the way of the run
    that is started next.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
