"""Records in MLflow, in the database of one machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from tccp.config import DeepSpeedSettings, load_settings
from tccp.errors import TccpError
from tccp.files import Folder
from tccp.training.launcher.job import ComponentJob
from tccp.training.launcher.launch import NEWEST
from tccp.training.launcher.rank import RESULT
from tccp.training.launcher.sizing import allocate
from tccp.training.launcher.worker_group import fit_on_cluster
from tccp.training.tracking import Tracker

pytestmark = pytest.mark.slow  # MLflow makes some fifty tables


def test_a_run_is_continued_and_each_training_registers_one_version(tmp_path: Path) -> None:
    uri, artifacts = f"sqlite:///{tmp_path}/mlflow.db", (tmp_path / "artifacts").as_uri()
    (tmp_path / "pipeline" / "autoencoder").mkdir(parents=True)
    (tmp_path / "pipeline" / "autoencoder" / "config.json").write_text("{}")
    first = Tracker.start(uri, "a", {"workers": 2}, artifacts)
    first.metrics(3, {"loss": 0.5})
    first.end("FAILED")
    again = Tracker.start(uri, "a", {"workers": 2}, artifacts, first.run_id)
    again.metrics(4, {"loss": 0.25})
    again.register(tmp_path / "pipeline", "talker", NEWEST)
    again.register(tmp_path / "pipeline", "talker", NEWEST)
    again.end("FINISHED")
    client = again.client
    (run,) = client.search_runs([client.get_experiment_by_name("tccp").experiment_id])
    assert (run.info.run_id, run.info.status, run.data.params) == (first.run_id, "FINISHED", {"workers": "2"})
    noted = [(one.step, one.value) for one in client.get_metric_history(run.info.run_id, "loss")]
    assert noted == [(3, 0.5), (4, 0.25)]
    newest = client.get_model_version_by_alias("talker", NEWEST)
    assert (int(newest.version), newest.run_id) == (2, first.run_id)
    (config,) = (tmp_path / "artifacts").rglob("config.json")
    assert config.parent.name == "autoencoder"


def test_a_training_that_ended_without_its_driver_is_recorded_as_finished_once(tmp_path: Path) -> None:
    uri, run = f"sqlite:///{tmp_path}/mlflow.db", Folder(tmp_path / "run")
    tracker = Tracker.start(uri, "a", {})
    run.write(RESULT, b'{"steps": 8}')
    allocation = allocate({"CPU": 2}, workers=None, device="auto", parallel=DeepSpeedSettings())
    job = ComponentJob("landmark_first", load_settings("toy"), None, Folder(tmp_path), run, allocation, "launch")
    ends = []
    for _ in range(2):
        assert fit_on_cluster(job, None, (uri, tracker.run_id)) == {"steps": 8}
        info = tracker.client.get_run(tracker.run_id).info
        assert info.status == "FINISHED"
        ends.append(info.end_time)
    assert ends[0] == ends[1] is not None


def test_writes_that_mlflow_refuses_are_logged_once_and_stop_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    Tracker.start(uri, "a", {})
    no_run = Tracker(uri, "0" * 32)
    no_run.metrics(1, {"loss": 1.0})
    assert not no_run.register(tmp_path, "talker", NEWEST)
    assert caplog.text.count("MLflow cannot be written, which stops no training") == 1


def test_a_database_that_cannot_be_used_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TccpError, match=r"MLflow at sqlite:.* cannot be used .*: check the address, or --mlflow none"):
        Tracker.start(f"sqlite:///{tmp_path}/file/mlflow.db", "a", {})
