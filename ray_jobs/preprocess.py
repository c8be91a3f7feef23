"""`tccp preprocess` on a Ray cluster: `ray job submit --working-dir . -- python ray_jobs/preprocess.py SOURCE OUT`.

The options are those of `tccp preprocess`. Without --workers, the job uses as many workers as the cluster has CPUs for.
On several machines SOURCE and OUT must be URLs, because a job runs in a temporary copy of the code.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a job's folder is not an installed package

from tccp.cli import main


def arguments(given: Sequence[str]) -> list[str]:
    """The `tccp` command line that this job runs."""
    return ["preprocess", *given, "--ray"]


if __name__ == "__main__":
    main(arguments(sys.argv[1:]))
