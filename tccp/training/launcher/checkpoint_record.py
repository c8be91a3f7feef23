"""Ray Train's record of complete checkpoints: a copy of it, and the removal of checkpoints that are not in it."""

from __future__ import annotations

import contextlib
import json
from typing import Any

from tccp.errors import StorageError, TccpError
from tccp.files import Folder

RAYS_RECORD = "checkpoint_manager_snapshot.json"
COPY = "checkpoints.json"
"""Ray writes its record in place, so a full disk or a machine that stops leaves half of it. Hence a copy."""


def copy_record(run: Folder) -> None:
    """Copies the record, unless it is just being written. A copy that cannot be made stops nothing."""
    with contextlib.suppress(OSError, ValueError, TccpError, StorageError):
        content = run.read(RAYS_RECORD)
        json.loads(content)
        run.write(COPY, content)


def remove_unfinished(run: Folder) -> None:
    """Removes checkpoints that were not completed: those that are not in the record. Without a record, none.

    A damaged record is replaced by its copy, reduced to the checkpoints that exist.
    Raises TccpError if there is no copy.
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
            f"{run.path(RAYS_RECORD)}, Ray's record of the checkpoints, is damaged: remove the folder {run} to train "
            "this network anew"
        )
    record: dict[str, Any] = json.loads(run.read(COPY))
    present = run.subfolders()
    kept = [
        (one, index)
        for one, index in zip(record["checkpoint_results"], record["checkpoint_report_indices"], strict=True)
        if one["checkpoint_dir_name"] in present
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
