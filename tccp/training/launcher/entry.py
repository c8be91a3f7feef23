"""The function that Ray Train runs on every worker.

Ray Train's controller also imports this module, so torch is imported only inside the function.
"""

from __future__ import annotations

import os
from typing import Any

from tccp.cluster import QUIET_RAY


def train_rank(config: dict[str, Any]) -> None:
    """Calls `tccp.training.launcher.rank.train` with the job."""
    for name, value in QUIET_RAY.items():
        os.environ.setdefault(name, value)
    from tccp.training.launcher.rank import train

    train(config["job"], config["validate"])
