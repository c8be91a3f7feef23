"""MLflow: one run per training, which restarts continue; metrics, artifacts, and the registered pipeline."""

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

logger = logging.getLogger("tccp.training")

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
    # Set before the import, after which MLflow reports usage to its makers.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    try:
        import mlflow
    except ImportError:
        raise TccpError(
            "tracking needs MLflow: pip install -c constraints.txt -e '.[train]', or give --mlflow none"
        ) from None
    logging.getLogger("mlflow").setLevel(logging.WARNING)  # it logs each table that it makes
    return mlflow.MlflowClient(tracking_uri=uri)


class Tracker:
    """Writes to one MLflow run. Only rank 0 and the driver have one.

    A failure to write is logged once and stops nothing: the training does not depend on its record.
    """

    def __init__(self, uri: str, run_id: str):
        self.client, self.run_id = _client(uri), run_id

    @classmethod
    def start(
        cls, uri: str, name: str, params: Mapping[str, object], artifacts: str | None = None, run_id: str | None = None
    ) -> Tracker:
        """A new run, or the run `run_id`, continued. artifacts: place of artifacts, if no server decides it.

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
        """Notes values under a step."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        entries = [Metric(name, float(value), now, step) for name, value in values.items()]
        self._try(lambda: self.client.log_batch(self.run_id, metrics=entries))

    def artifact(self, path: Path, under: str | None = None) -> None:
        self._try(lambda: self.client.log_artifact(self.run_id, str(path), under))

    def end(self, status: str) -> None:
        """Ends the run. status: FINISHED, FAILED or KILLED."""
        self._try(lambda: self.client.set_terminated(self.run_id, status))

    def ensure_finished(self) -> None:
        """Ends the run as FINISHED, unless it is. The time of an earlier end stays."""

        def finish() -> None:
            if self.client.get_run(self.run_id).info.status != "FINISHED":
                self.client.set_terminated(self.run_id, "FINISHED")

        self._try(finish)

    def register(self, pipeline: Path, model: str, alias: str) -> bool:
        """Stores the pipeline folder as an artifact, and registers it as a new version of a model, with the alias.

        Returns whether MLflow accepted it; if not, the reason is logged.
        """
        from mlflow.exceptions import MlflowException

        def register() -> None:
            self.client.log_artifacts(self.run_id, str(pipeline), "pipeline")
            with contextlib.suppress(MlflowException):  # it exists already
                self.client.create_registered_model(model)
            source = f"{self.client.get_run(self.run_id).info.artifact_uri}/pipeline"
            version = self.client.create_model_version(model, source, self.run_id)
            self.client.set_registered_model_alias(model, alias, version.version)

        return self._try(register)

    _warned = False

    def _try(self, action: Any) -> bool:
        try:
            action()
            return True
        except Exception as error:  # of whatever the server, its database or the network may raise
            if not self._warned:
                self._warned = True
                reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
                logger.warning("MLflow cannot be written, which stops no training (%s)", reason)
            return False
