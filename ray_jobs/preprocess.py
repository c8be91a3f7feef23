"""`tccp preprocess` on a Ray cluster: `ray job submit --working-dir . -- python ray_jobs/preprocess.py SOURCE OUT`.

The options are those of the command; workers are as many as the cluster has CPUs unless --workers says otherwise. On
several machines SOURCE and OUT are URLs, for the folder that a job runs in is a throw-away copy.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a job's folder is no installed package

from tccp.cli import main


def arguments(given: Sequence[str]) -> list[str]:
    """The command line of `tccp` for that of this job."""
    return ["preprocess", *given, "--ray"]


if __name__ == "__main__":
    main(arguments(sys.argv[1:]))
