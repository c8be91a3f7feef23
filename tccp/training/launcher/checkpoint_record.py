"""Ray Train's record of complete checkpoints: a copy of it, and the removal of checkpoints that are not in it."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Collection
from typing import Any

from tccp.errors import StorageError, TccpError
from tccp.files import Folder
from tccp.training.checkpoint_files import damage_of

logger = logging.getLogger("tccp.training")

RAYS_RECORD = "checkpoint_manager_snapshot.json"
COPY = "checkpoints.json"
"""Ray writes its record in place, so a full disk or a machine that stops leaves half of it. Hence a copy."""
_LISTS_OF_NAMES = (
    "validated_checkpoint_dir_names",
    "timed_out_validation_checkpoint_dir_names",
    "failed_validation_checkpoint_dir_names",
)


def copy_record(run: Folder) -> None:
    """Copies the record, unless it is just being written. A copy that cannot be made stops nothing."""
    with contextlib.suppress(OSError, ValueError, TccpError, StorageError):
        content = run.read(RAYS_RECORD)
        json.loads(content)
        run.write(COPY, content)


def remove_unfinished(run: Folder) -> None:
    """Removes checkpoints that were not completed: those that are not in the record. Without a record, none.

    A damaged record is replaced by its copy, and a record whose newest checkpoints are damaged by one without them: the
    log names them, and training goes on from the one before. Checkpoints that do not exist leave the record.
    Raises TccpError if the record is damaged and there is no copy.
    """
    if not run.exists(RAYS_RECORD):
        return
    try:
        record = json.loads(run.read(RAYS_RECORD))
        names = {one["checkpoint_dir_name"] for one in record["checkpoint_results"]}
    except (ValueError, TypeError, KeyError):
        record = _copied(run)
        names = {one["checkpoint_dir_name"] for one in record["checkpoint_results"]}
        run.write(RAYS_RECORD, json.dumps(record).encode())
    present = run.subfolders()
    damaged = dict.fromkeys(names - present, "it is missing")
    for name in sorted(names & present, reverse=True):
        problem = damage_of(run, name)
        if problem is None:
            break  # older ones are not needed; each would have to be read as a whole
        damaged[name] = problem
    if damaged:
        record = _without(record, damaged.keys())
        newest = record["latest_checkpoint_result"]
        taken = "its beginning" if newest is None else newest["checkpoint_dir_name"]
        for name, problem in damaged.items():
            logger.warning("%s is damaged (%s): training goes on from %s", run.path(name), problem, taken)
        run.write(RAYS_RECORD, json.dumps(record).encode())
    for name in present:
        if name.startswith("step-") and name not in names - damaged.keys():
            run.remove(name)


def newest_step(run: Folder) -> int:
    """Steps done at the newest checkpoint in the record; 0 without one, or if the record is damaged."""
    try:
        latest = json.loads(run.read(RAYS_RECORD))["latest_checkpoint_result"]
        return int(latest["checkpoint_dir_name"].split("-")[1])
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return 0


def _copied(run: Folder) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(run.read(COPY))
        return record
    except (FileNotFoundError, ValueError):
        raise TccpError(
            f"{run.path(RAYS_RECORD)}, Ray's record of the checkpoints, is damaged: remove the folder {run} to train "
            "this network anew"
        ) from None


def _without(record: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    """The record without some checkpoints; the newest of the others takes the place of the latest."""
    kept = [
        (one, index)
        for one, index in zip(record["checkpoint_results"], record["checkpoint_report_indices"], strict=True)
        if one["checkpoint_dir_name"] not in names
    ]
    results = [one for one, _ in kept]
    latest = record["latest_checkpoint_result"]
    others = {key: [name for name in record[key] if name not in names] for key in _LISTS_OF_NAMES if key in record}
    if latest not in results:  # by their report: with --keep-best they are in the order of their scores
        latest = max(kept, key=lambda pair: pair[1])[0] if kept else None
    return {
        **record,
        **others,
        "checkpoint_results": results,
        "checkpoint_report_indices": [index for _, index in kept],
        "latest_checkpoint_result": latest,
    }
