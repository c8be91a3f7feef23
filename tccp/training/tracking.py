"""MLflow tracking: one run per training, kept across restarts, with metrics, artifacts and the pipeline."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tccp.errors import TccpError
from tccp.files import Folder, is_url

EXPERIMENT = "tccp"
DATABASE = "mlflow.db"


def tracking_place(given: str | None, storage: Folder, num_nodes: int) -> str:
    """The tracking URI: `given`, or else a database in the storage folder.

    Raises TccpError for a file or database of one machine if the cluster has several machines.
    """
    local = given is None or not is_url(given) or given.startswith(("sqlite:", "file:"))
    if local and num_nodes > 1:
        raise TccpError(
            f"MLflow's {given or 'database in a folder'} can be written by one machine only, and the cluster has, or "
            f"can grow to, {num_nodes}: give --mlflow http://HOST:PORT of an MLflow server, or --mlflow none"
        )
    if given is not None:
        return given if is_url(given) else f"sqlite:///{Path(given).absolute()}"
    if storage.local is None:
        raise TccpError(f"storage {storage} is not a folder of this machine: give --mlflow http://HOST:PORT, or none")
    return f"sqlite:///{storage.local.absolute() / DATABASE}"


def _client(uri: str) -> Any:
    # Set before the import: MLflow would otherwise contact a server of its developers and print links to its runs.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    try:
        import mlflow
    except ImportError:
        raise TccpError(
            "tracking needs MLflow: pip install -c constraints.txt -e '.[train]', or give --mlflow none"
        ) from None
    logging.getLogger("mlflow").setLevel(logging.WARNING)  # it logs every table that it creates
    return mlflow.MlflowClient(tracking_uri=uri)


class Tracker:
    """Writes to one MLflow run. Only rank 0 or the driver uses one.

    A failed write is printed once and does not stop training.
    """

    def __init__(self, uri: str, run_id: str):
        self.client, self.run_id = _client(uri), run_id

    @classmethod
    def start(
        cls, uri: str, name: str, params: Mapping[str, object], artifacts: str | None = None, run_id: str | None = None
    ) -> Tracker:
        """Starts a new run, or resumes `run_id`. artifacts: their location, for a local database without a server.

        Raises TccpError if the server or database cannot be used.
        """
        try:
            client = _client(uri)
            if run_id is not None:
                client.update_run(run_id, status="RUNNING")
                return cls(uri, run_id)
            experiment = client.get_experiment_by_name(EXPERIMENT)
            place = artifacts if uri.startswith("sqlite:") else None
            number = experiment.experiment_id if experiment else client.create_experiment(EXPERIMENT, place)
            run = client.create_run(number, run_name=name, tags={"mlflow.source.name": "tccp"})
            tracker = cls(uri, run.info.run_id)
            for key, value in params.items():
                client.log_param(tracker.run_id, key, str(value)[:6000])
            return tracker
        except Exception as error:  # sqlalchemy, requests and MLflow raise many kinds
            if isinstance(error, TccpError):
                raise
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise TccpError(f"MLflow at {uri} cannot be used ({reason}): check the address, or --mlflow none") from None

    def metrics(self, step: int, values: Mapping[str, float | int]) -> None:
        """Logs the metrics of a step."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        entries = [Metric(name, float(value), now, step) for name, value in values.items()]
        self._try(lambda: self.client.log_batch(self.run_id, metrics=entries))

    def artifact(self, path: Path, under: str | None = None) -> None:
        self._try(lambda: self.client.log_artifact(self.run_id, str(path), under))

    def ended(self, status: str) -> None:
        """status: FINISHED, FAILED or KILLED."""
        self._try(lambda: self.client.set_terminated(self.run_id, status))

    def settled(self) -> None:
        """Sets the status to FINISHED unless it is; a recorded end time is kept."""

        def settle() -> None:
            if self.client.get_run(self.run_id).info.status != "FINISHED":
                self.client.set_terminated(self.run_id, "FINISHED")

        self._try(settle)

    def register(self, pipeline: Path, model: str, alias: str) -> bool:
        """Logs the pipeline folder as an artifact, registers it as a new model version, and points the alias to it.

        Returns whether that succeeded; prints the reason if not.
        """
        from mlflow.exceptions import MlflowException

        def register() -> None:
            self.client.log_artifacts(self.run_id, str(pipeline), "pipeline")
            with contextlib.suppress(MlflowException):  # the model exists already
                self.client.create_registered_model(model)
            source = f"{self.client.get_run(self.run_id).info.artifact_uri}/pipeline"
            version = self.client.create_model_version(model, source, self.run_id)
            self.client.set_registered_model_alias(model, alias, version.version)

        return self._try(register)

    _failure_printed = False

    def _try(self, action: Any) -> bool:
        try:
            action()
            return True
        except Exception as error:  # the server, its database and the network raise many kinds
            if not self._failure_printed:
                self._failure_printed = True
                reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
                print(f"tccp: cannot write to MLflow; training continues ({reason})", flush=True)
            return False
