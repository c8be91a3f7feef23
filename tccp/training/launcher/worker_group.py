"""Ray Train's part: a group of workers for one component, brought up again where it dies."""

from __future__ import annotations

import itertools
import json
import os
import time
from contextlib import suppress
from dataclasses import replace
from typing import Any

from tccp.errors import TccpError
from tccp.files import Folder
from tccp.training.launcher.entry import train_rank
from tccp.training.launcher.job import ComponentJob
from tccp.training.launcher.rank import RESULT, Validate, mistake_of
from tccp.training.launcher.records import tidy
from tccp.training.tracking import Tracker

STARTS_TRIED = 20
"""How often a group of workers that does not come up is tried anew, for want of machines, before it is given up."""
START_TIMEOUT_S = 120
STORAGE_PAUSE_S = 15
"""Before a training is begun again that its storage has ended."""
PROBE = ".writable"
"""An empty file in the run's folder, written before each beginning."""


def fit_on_cluster(
    job: ComponentJob, validate: Validate | None, tracked: tuple[str, str] | None = None
) -> dict[str, Any]:
    """Trains a component with Ray Train, from its newest checkpoint if it has one; returns `result.json`.

    Raises TccpError for a user's mistake, for a loss that is not finite, and where it is given up after failures.
    """
    if job.run.exists(RESULT):
        if tracked:  # the driver may have been lost after the training's end, before it could say so
            Tracker(*tracked).settled()
        return dict(json.loads(job.run.read(RESULT)))
    from ray.train import ControllerError, TrainingFailedError

    if tracked is not None:
        job = replace(job, tracking_uri=tracked[0], tracking_run=tracked[1])
    tracker = Tracker(*tracked) if tracked else None
    status = "FAILED"
    try:
        _fit(job, validate)
        mistake = mistake_of(job)
        if mistake is not None:
            raise TccpError(mistake)
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    except TccpError:
        raise
    except (TrainingFailedError, OSError) as error:
        with suppress(OSError):  # of a storage that is still away
            mistake = mistake_of(job)
            if mistake is not None:
                raise TccpError(mistake) from None
        often = f"it failed more often than --max-failures {job.spread.max_failures} allows"
        alone = isinstance(error, ControllerError) and _storage_failure(error) is None
        raise TccpError(
            f"the training of {job.component} is given up: {'Ray could not go on' if alone else often}; the last "
            f"failure: {_last_line(error)}; what was trained is kept in {job.run}: --resume goes on from there"
        ) from error
    finally:
        if tracker:
            tracker.ended(status)
    tidy(job.run)
    return dict(json.loads(job.run.read(RESULT)))


def _fit(job: ComponentJob, validate: Validate | None) -> None:
    """Ray Train's, begun again where Ray gives up at once: when it cannot write its own record of checkpoints."""
    from ray.train import ControllerError

    for failures in itertools.count(1):
        try:
            _check_writable(job.run)
            tidy(job.run)
            _trainer(job, validate).fit()
            return
        except (ControllerError, OSError) as error:
            if _storage_failure(error) is None or failures > job.spread.max_failures:
                raise
            print(f"tccp: storage: {_last_line(error)}; tried again in {STORAGE_PAUSE_S} s", flush=True)
            time.sleep(STORAGE_PAUSE_S)


def _check_writable(run: Folder) -> None:
    """Before Ray's controller finds out, whose end would not say why."""
    try:
        run.write(PROBE, b"")
    except TccpError as error:
        raise OSError(str(error)) from error


def _storage_failure(error: Exception) -> OSError | None:
    """Unlike a worker's failure, that of Ray's controller comes as what was raised there."""
    failure = getattr(error, "controller_failure", error)
    return failure if isinstance(failure, OSError) else None


def _trainer(job: ComponentJob, validate: Validate | None) -> Any:
    from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    spread = job.spread
    os.environ["RAY_TRAIN_COLLECTIVE_TIMEOUT_S"] = str(spread.timeout_s)
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(START_TIMEOUT_S))
    filesystem, path = Folder(job.run.place.rsplit("/", 1)[0]).arrow()
    best = {"checkpoint_score_attribute": "score", "checkpoint_score_order": "max"}
    return TorchTrainer(
        train_rank,
        train_loop_config={"job": job, "validate": validate},
        torch_config=TorchConfig(backend="nccl" if spread.use_gpu else "gloo", timeout_s=int(spread.timeout_s)),
        scaling_config=ScalingConfig(
            num_workers=spread.workers,
            use_gpu=spread.use_gpu,
            resources_per_worker={"CPU": spread.cpus_per_worker, **({"GPU": 1} if spread.use_gpu else {})},
        ),
        run_config=RunConfig(
            name=job.component,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=spread.max_failures, controller_failure_limit=STARTS_TRIED),
            checkpoint_config=CheckpointConfig(num_to_keep=spread.keep, **(best if spread.keep_best else {})),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )


def _last_line(error: Exception) -> str:
    """Of the traceback in Ray's error: what was raised."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300]
