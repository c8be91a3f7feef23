"""The storage folder and the commit of the code in use."""

from __future__ import annotations

import functools
import os
import re
import subprocess
from pathlib import Path

from tccp.errors import TccpError


def git_commit() -> str:
    """The commit of the code in use, with `+changes` if the tree differs from it, or `unknown` outside a checkout."""
    root = Path(__file__).resolve().parent.parent.parent
    try:
        run = functools.partial(subprocess.run, cwd=root, capture_output=True, text=True, timeout=10, check=True)
        if Path(run(["git", "rev-parse", "--show-toplevel"]).stdout.strip()) != root:
            return "unknown"
        commit = run(["git", "rev-parse", "HEAD"]).stdout.strip()
        return commit + ("+changes" if run(["git", "status", "--porcelain"]).stdout.strip() else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def storage_root(given: str | Path | None = None) -> Path:
    """The folder of runs and artifacts: `given` (--storage), else `TCCP_STORAGE`, else `~/.tccp`.

    Raises TccpError for a URL.
    """
    storage = str(given or os.environ.get("TCCP_STORAGE") or "~/.tccp")
    if re.match(r"[a-z][a-z0-9+]*:/", storage):  # one slash, because Path turns two into one
        raise TccpError(f"storage {storage} is a URL: give a folder of this machine or a mounted one")
    return Path(storage).expanduser()
