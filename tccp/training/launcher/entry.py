"""The function that Ray Train runs on every worker.

Ray Train's controller also imports this module, so torch is imported only inside the function.
"""

from __future__ import annotations

import logging
import os
from typing import Any

from tccp.cluster import QUIET_RAY
from tccp.progress import ProgressLines, set_progress_handler


def train_rank(config: dict[str, Any]) -> None:
    """Calls `tccp.training.launcher.rank.train` with the job."""
    for name, value in QUIET_RAY.items():
        os.environ.setdefault(name, value)
    _log_to_stderr()
    from tccp.training.launcher.rank import train

    train(config["job"], config["validate"])


def _log_to_stderr() -> None:
    """Sends the library's log records, with progress among them, to the worker's log. Ray shows that to the driver."""
    logger = logging.getLogger("tccp")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("tccp: %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
    set_progress_handler(ProgressLines())
