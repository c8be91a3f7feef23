"""MLflow runs of a launch: one for each component, found again when the training is resumed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tccp.files import Folder
from tccp.models.variants import VARIANTS
from tccp.training.launcher.job import ComponentJob
from tccp.training.launcher.rank import RESULT
from tccp.training.launcher.request import Request
from tccp.training.tracking import Tracker

TRACKING = "mlflow.json"
"""File in a component's run folder with the id of its MLflow run."""


def start_tracking(
    uri: str, request: Request, job: ComponentJob, zero_stage: int, footage: Mapping[str, object]
) -> tuple[str, str] | None:
    """URI and id of the MLflow run of a component's training: an existing one if the training is resumed.

    None if the training was finished without one. footage: parameters that describe the data.
    Raises TccpError if MLflow cannot be used.
    """
    run_id = run_id_of(job.run)
    if job.run.exists(RESULT):
        return None if run_id is None else (uri, run_id)
    own = job.settings.for_variant(job.component) if job.component in VARIANTS else job.settings
    allocation = job.allocation
    params = {
        "component": job.component,
        "preset": own.preset,
        "workers": allocation.workers,
        "device": "cuda" if allocation.use_gpu else "cpu",
        **_flat({"deepspeed": {**allocation.parallel.model_dump(), "zero_stage": zero_stage}}),
        **_flat(own.model_dump(include={"seed", "picture_px", "window", "training", "network", "diffusion"})),
        **footage,
    }
    local = request.storage.local
    artifacts = None if local is None else (local.absolute() / "mlflow-artifacts").as_uri()
    tracker = Tracker.start(uri, f"{request.name}/{job.component}", params, artifacts, run_id)
    if run_id is None:
        job.run.write(TRACKING, json.dumps({"run_id": tracker.run_id, "uri": uri}).encode())
    return uri, tracker.run_id


def run_id_of(run: Folder) -> str | None:
    """The id of the MLflow run that belongs to a component's run folder, if it has one."""
    return str(json.loads(run.read(TRACKING))["run_id"]) if run.exists(TRACKING) else None


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
