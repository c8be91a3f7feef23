"""What processes that share work have in common."""

from __future__ import annotations

import multiprocessing
import os
import threading
from pathlib import Path


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


def importable_in_children() -> None:
    """Processes started from now on find this very package, whatever lies in the folder they are started in.

    A folder named `tccp` there, such as a clone, would hide an editable install from Ray's workers.
    """
    root = str(Path(__file__).resolve().parent.parent)
    known = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if root not in known:
        os.environ["PYTHONPATH"] = os.pathsep.join([root, *filter(None, known)])
