"""`tccp films` on a Ray cluster: `ray job submit --working-dir . -- python ray_jobs/generate.py LIST.csv --out OUT`.

The options are those of `tccp films`. A second run makes what is missing. On several machines, all of them must see the
list's files and OUT under the same paths, and OUT must be a file:// URL.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a job's folder is not an installed package

from tccp.cli import main


def arguments(given: Sequence[str]) -> list[str]:
    """The `tccp` command line that this job runs."""
    return ["films", *given, "--ray"]


if __name__ == "__main__":
    main(arguments(sys.argv[1:]))
