"""The server on a Ray cluster: `ray job submit --working-dir . -- python ray_jobs/serve.py --storage URL --store URL`.

The options are those of `tccp serve`. The job ends once the server is up; `serve shutdown -y` on the cluster ends the
server. On several machines the storage must be a URL and the store PostgreSQL.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a job's folder is not an installed package

from tccp.cli import main


def arguments(given: Sequence[str]) -> list[str]:
    """The `tccp` command line that this job runs."""
    return ["serve", *given, "--detach"]


if __name__ == "__main__":
    main(arguments(sys.argv[1:]))
