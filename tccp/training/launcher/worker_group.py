"""Ray Train's part: it trains a component with a group of workers, and starts them again after failures."""

from __future__ import annotations

import itertools
import json
import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeVar

from tccp.errors import StorageError, TccpError
from tccp.files import Folder, is_storage_failure
from tccp.files.arrow import arrow_filesystem
from tccp.training.launcher.checkpoint_record import remove_unfinished
from tccp.training.launcher.entry import train_rank
from tccp.training.launcher.job import ComponentJob
from tccp.training.launcher.rank import RESULT, Validate, mistake_of
from tccp.training.tracking import Tracker

logger = logging.getLogger("tccp.training")

START_ATTEMPTS = 20
"""How often Ray Train tries to start a group of workers for which machines are lacking."""
START_TIMEOUT_S = 120
STORAGE_PAUSE_S = 15
"""Pause before a new attempt after the storage has failed for longer than `tccp.files.retry` tries."""
PROBE = ".writable"
"""An empty file in the run's folder, written before each attempt."""

_Result = TypeVar("_Result")


def fit_on_cluster(
    job: ComponentJob, validate: Validate | None, tracked: tuple[str, str] | None = None
) -> dict[str, Any]:
    """Trains a component with Ray Train, from its newest checkpoint if it has one; returns `result.json`.

    tracked: URI and id of the MLflow run.
    Raises TccpError for a user's mistake, for a loss that is not finite, and if workers have failed more often than
    allowed; StorageError if that, or the end of Ray's controller, was the storage's failure.
    """
    if job.run.exists(RESULT):
        if tracked:  # the driver may have stopped between the end of the training and its record in MLflow
            Tracker(*tracked).ensure_finished()
        return dict(json.loads(job.run.read(RESULT)))

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
    finally:
        if tracker:
            tracker.end(status)
    return repeat_after_outages(lambda: _finished(job), job.allocation.max_failures)


def _finished(job: ComponentJob) -> dict[str, Any]:
    remove_unfinished(job.run)
    return dict(json.loads(job.run.read(RESULT)))


def repeat_after_outages(action: Callable[[], _Result], max_failures: int) -> _Result:
    """The result of `action`, which is called again, after a pause, up to `max_failures` times after a StorageError."""
    for failures in itertools.count(1):
        try:
            return action()
        except StorageError as error:
            if failures > max_failures:
                raise
            logger.warning("storage: %s; next attempt in %d s", error, STORAGE_PAUSE_S)
            time.sleep(STORAGE_PAUSE_S)
    raise AssertionError


def _fit(job: ComponentJob, validate: Validate | None) -> None:
    """Ray Train's attempts, repeated if Ray gives up at once: when its controller cannot write its own record."""
    from ray.train import ControllerError, TrainingFailedError

    def attempt() -> None:
        try:
            _check_writable(job.run)
            remove_unfinished(job.run)
            _trainer(job, validate).fit()
        except (ControllerError, OSError) as error:
            failure = getattr(error, "controller_failure", error)
            if isinstance(failure, OSError | StorageError):
                raise StorageError(_last_line(error)) from error
            raise

    often = f"it failed more often than --max-failures {job.allocation.max_failures} allows"
    try:
        repeat_after_outages(attempt, job.allocation.max_failures)
    except StorageError as error:
        raise StorageError(_given_up(job, often, error)) from error
    except TrainingFailedError as error:
        with suppress(StorageError):
            mistake = mistake_of(job)
            if mistake is not None:
                raise TccpError(mistake) from None
        reason = "Ray could not continue" if isinstance(error, ControllerError) else often
        kind = StorageError if _was_storage(error) else TccpError
        raise kind(_given_up(job, reason, error)) from error


def _given_up(job: ComponentJob, reason: str, error: Exception) -> str:
    return (
        f"the training of {job.component} is given up: {reason}; the last failure: {_last_line(error)}; what was "
        f"trained is kept in {job.run}: --resume goes on from there"
    )


def _was_storage(error: Exception) -> bool:
    """Whether a worker of Ray Train's ended with a failure of the storage."""
    failures = getattr(error, "worker_failures", {}).values()
    return any(is_storage_failure(getattr(one, "_base_exc", one)) for one in failures)


def _check_writable(run: Folder) -> None:
    """Raises StorageError, with a reason. Ray's controller would only end.

    The folder could be written when the launch began, so a folder that cannot is the storage's failure by now.
    """
    try:
        run.write(PROBE, b"")
    except TccpError as error:
        raise StorageError(str(error)) from error


def _trainer(job: ComponentJob, validate: Validate | None) -> Any:
    from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    given = job.allocation
    os.environ["RAY_TRAIN_COLLECTIVE_TIMEOUT_S"] = str(given.timeout_s)
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(START_TIMEOUT_S))
    filesystem, path = arrow_filesystem(Folder(job.run.place.rsplit("/", 1)[0]))
    best = {"checkpoint_score_attribute": "score", "checkpoint_score_order": "max"}
    return TorchTrainer(
        train_rank,
        train_loop_config={"job": job, "validate": validate},
        torch_config=TorchConfig(backend="nccl" if given.use_gpu else "gloo", timeout_s=int(given.timeout_s)),
        scaling_config=ScalingConfig(
            num_workers=given.workers,
            use_gpu=given.use_gpu,
            resources_per_worker={"CPU": given.cpus_per_worker, **({"GPU": 1} if given.use_gpu else {})},
        ),
        run_config=RunConfig(
            name=job.component,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=given.max_failures, controller_failure_limit=START_ATTEMPTS),
            checkpoint_config=CheckpointConfig(num_to_keep=given.keep, **(best if given.keep_best else {})),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )


def _last_line(error: Exception) -> str:
    """The last line of the traceback in Ray's error: what was raised."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300]
