"""Ray Train's record of the checkpoints that are whole, and what becomes of those that are not."""

from __future__ import annotations

import contextlib
import json
from typing import Any

from tccp.errors import TccpError
from tccp.files import Folder

RAYS_RECORD = "checkpoint_manager_snapshot.json"
COPY = "checkpoints.json"
"""Ray writes its record in place: a full disk, or the end of the machine, leaves half of it. So there is a copy."""


def keep_record(run: Folder) -> None:
    """Copies the record as it stands, unless it is just being written."""
    with contextlib.suppress(OSError, ValueError, TccpError):  # a copy less, on a disk that is full, stops nothing
        content = run.read(RAYS_RECORD)
        json.loads(content)
        run.write(COPY, content)


def tidy(run: Folder) -> None:
    """Removes checkpoints that were never finished: those that the record does not have; none without a record.

    A damaged record is replaced by its copy, with those of its checkpoints that are there. Raises TccpError if there is
    no copy.
    """
    if not run.exists(RAYS_RECORD):
        return
    try:
        record = json.loads(run.read(RAYS_RECORD))
    except ValueError:
        record = _restored(run)
    kept = {one["checkpoint_dir_name"] for one in record["checkpoint_results"]}
    for name in run.subfolders():
        if name.startswith("step-") and name not in kept:
            run.remove(name)


def _restored(run: Folder) -> dict[str, Any]:
    if not run.exists(COPY):
        raise TccpError(
            f"{run.path(RAYS_RECORD)}, Ray's record of the checkpoints there, is damaged: remove that folder to train "
            "this network anew"
        )
    record: dict[str, Any] = json.loads(run.read(COPY))
    there = run.subfolders()
    kept = [
        (one, index)
        for one, index in zip(record["checkpoint_results"], record["checkpoint_report_indices"], strict=True)
        if one["checkpoint_dir_name"] in there
    ]
    results = [one for one, _ in kept]
    latest = record["latest_checkpoint_result"]
    record |= {
        "checkpoint_results": results,
        "checkpoint_report_indices": [index for _, index in kept],
        "latest_checkpoint_result": latest if latest in results else (results[-1] if results else None),
    }
    run.write(RAYS_RECORD, json.dumps(record).encode())
    return record
