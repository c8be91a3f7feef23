"""Jobs for the tests of the server."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from tccp.files import Folder
from tccp.roundtable import identity_path, read_truth
from tccp.serving.job_folder import JobFolder
from tccp.serving.spec import Role, VideoSpec
from tccp.serving.store import Job, JobStore, NewJob
from tccp.serving.store.job_store import new_id

CONSENT = "drawn people: nobody needs to agree"


def track_file(film: Path, folder: Path, cuts: tuple[int, ...] = (), absent: tuple[int, ...] = ()) -> Path:
    """The truth's head boxes as a track file. cuts: frames at which a new shot is said to start."""
    boxes: list[Any] = read_truth(film).head_box.tolist()
    for frame in absent:
        boxes[frame] = None
    path = folder / f"{film.stem} {cuts} {absent}.json"
    path.write_text(json.dumps({"boxes": boxes, "cuts": list(cuts)}))
    return path


def new_job(film: Path, track: Path, storage: Folder, weights: str, owner: str = "tester", **spec: Any) -> NewJob:
    """A job whose inputs are in the storage: a film of RoundTable generated anew into itself."""
    job_id = new_id("video")
    files: dict[Role, Path] = {"scene": film, "audio": film, "identity": identity_path(film), "track": track}
    inputs = {}
    for role, path in files.items():
        with storage.writing(JobFolder(storage, job_id).input_name(role)) as target:
            shutil.copyfile(path, target)
        inputs[role] = {"name": path.name, "bytes": path.stat().st_size}
    given = {"consent": CONSENT, "identity_box": "whole", "lossless": True, **spec}
    options = VideoSpec(**given).model_dump(mode="json")
    digest = hashlib.sha256(json.dumps([options, sorted(inputs)]).encode()).hexdigest()
    return NewJob(job_id, owner, options, inputs, "default", weights, digest, 3600.0)


def add(store: JobStore, new: NewJob) -> Job:
    return store.add(new, most_waiting=1000, most_of_owner=1000)[0]
