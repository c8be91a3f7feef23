"""Trainings on Ray clusters, as jobs and after kills of every part: the losses are those of an undisturbed training."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import outages
import psutil
import pytest
import tiny
import trainings
from object_storage import object_storage
from trainings import ROOT, assert_same_trace, command, committed, run_folder, trace

from tccp.inference.manifest import read_manifest
from tccp.roundtable import identity_path

pytest_plugins = ["tiny_fixtures"]
pytestmark = [pytest.mark.cluster, pytest.mark.slow]
JOB_STEPS = 12  # enough after the first checkpoint, at 4, that the driver is killed before the last one


@pytest.fixture(scope="module")
def data(training_data: tuple[Path, Path]) -> tuple[Path, Path]:
    return training_data


@pytest.fixture
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A cluster of two CPUs as `ray start --head` makes it: the environment that commands need to reach it."""
    home = tmp_path_factory.mktemp("home")
    address = f"http://127.0.0.1:{trainings.free_port()}"
    environment = {
        "HOME": str(home),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_API_SERVER_ADDRESS": address,
        "OMP_NUM_THREADS": "1",
    }
    options = ["--num-cpus=2", f"--port={trainings.free_port()}", f"--dashboard-port={address.rpartition(':')[2]}"]
    run = subprocess.run(
        [str(Path(sys.executable).parent / "ray"), "get-auth-token", "--generate"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    with (home / "ray.log").open("w") as log:
        process = subprocess.Popen(
            [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--disable-usage-stats", *options],
            env={**os.environ, **environment},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 120
        while "Ray runtime started" not in (home / "ray.log").read_text() and time.monotonic() < deadline:
            assert process.poll() is None, (home / "ray.log").read_text()
            time.sleep(0.2)
        yield environment
    finally:
        below = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
        trainings.end(below)


def submit(environment: dict[str, str], arguments: list[str], log: Path) -> subprocess.Popen[str]:
    job = [str(Path(sys.executable).parent / "ray"), "job", "submit", "--working-dir", str(ROOT), "--", "python"]
    relative = [str(Path(arguments[1]).relative_to(ROOT)), *arguments[2:]]
    return trainings.start([*job, *relative], log, **environment)


def test_jobs_submitted_to_a_cluster_train_a_pipeline_through_the_loss_of_their_driver_and_a_worker(
    data: tuple[Path, Path],
    head: dict[str, str],
    film: Path,
    tmp_path: Path,
) -> None:
    clips, untrained = data
    storage, log = tmp_path / "storage", tmp_path / "log"
    first = run_folder(storage, "landmark_first")
    stage1 = command("stage1", clips, storage, "--autoencoder", str(untrained), steps=JOB_STEPS)
    stage1[stage1.index("--mlflow") :] = stage1[stage1.index("--mlflow") + 2 :]  # so with a database in the storage
    job = submit(head, stage1, log)
    assert trainings.wait_for(first, 4, job), log.read_text()
    (driver,) = (one for one in psutil.process_iter() if is_driver(one, storage))
    driver.kill()
    assert trainings.ended(job) not in (0, None), log.read_text()
    assert 4 <= committed(first) < JOB_STEPS
    resumed = submit(head, [*stage1, "--resume"], log)
    assert trainings.wait_for(first, 8, resumed), log.read_text()
    trainings.kill_rank(os.getpid(), random.Random(0))
    assert trainings.ended(resumed) == 0, log.read_text()
    plain = trainings.plain_trace("landmark_first", clips, untrained, tmp_path / "plain", JOB_STEPS)
    assert_same_trace(trace(first), plain)
    for run in (first, run_folder(storage, "landmark_sequence")):
        assert json.loads((run / "result.json").read_text())["workers"] == 2
        checkpoint = next(run.glob(f"step-{JOB_STEPS:07d}-*"))
        assert len(list((checkpoint / "deepspeed").glob("zero_pp_rank_*_optim_states.pt"))) == 2

    runs = mlflow_runs(storage)
    assert {run["name"] for run in runs} == {
        "run/landmark_first",
        "run/landmark_sequence",
    }  # one each, driver killed or not
    for run in runs:
        assert run["status"] == "FINISHED", (run["name"], log.read_text())
        assert run["loss_steps"] == list(range(JOB_STEPS))
        assert {"grad_norm", "windows_per_s", "data_wait", "cpu_use", "memory_mib", "learning_rate"} <= run["metrics"]

    stage2 = command("stage2", clips, storage, "--stage1", "run", "--name", "whole", "--workers", "1", steps=4)
    assert trainings.ended(submit(head, stage2, log)) == 0, log.read_text()
    pipeline = storage / "runs" / "whole" / "pipeline"
    assert set(read_manifest(pipeline)["components"]) == {
        *("autoencoder", "lips", "landmark_first", "landmark_sequence", "face_first", "face_sequence")
    }
    out = tmp_path / "out.mp4"
    options = [
        "--scene",
        film,
        "--audio",
        film,
        "--identity",
        identity_path(film),
        "--identity-box",
        "whole",
        "--truth",
    ]
    made = tiny.tccp("generate", *options, "--weights", pipeline, "--out", out)
    assert made.returncode == 0, made.stderr
    assert len(tiny.pictures(out)) == 25


def mlflow_runs(storage: Path) -> list[dict[str, Any]]:
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{storage}/mlflow.db")
    (experiment,) = (one for one in client.search_experiments() if one.name == "tccp")
    return [
        {
            "name": run.info.run_name,
            "status": run.info.status,
            "metrics": set(run.data.metrics),
            "loss_steps": sorted({one.step for one in client.get_metric_history(run.info.run_id, "loss")}),
        }
        for run in client.search_runs([experiment.experiment_id])
    ]


def is_driver(process: psutil.Process, storage: Path) -> bool:
    """Whether a process is the job itself, not the command that submitted it, nor the shell around it."""
    with contextlib.suppress(psutil.Error):
        line = process.cmdline()
        return str(storage) in line and line[1].endswith("train_stage1.py")
    return False


@pytest.mark.soak
def test_a_training_survives_its_workers_and_machines(data: tuple[Path, Path], tmp_path: Path) -> None:
    from ray.cluster_utils import Cluster

    clips, untrained = data
    log, run = tmp_path / "log", run_folder(tmp_path / "storage", "landmark_first")
    # In the same storage, where the training on Ray finds what it has encoded.
    plain = trainings.plain_trace("landmark_first", clips, untrained, tmp_path / "storage")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": True})
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=2)
        options = ["--variants", "landmark_first", "--autoencoder", str(untrained)]
        arguments = command("stage1", f"file://{clips}", f"file://{tmp_path}/storage", *options)
        process = trainings.start(arguments, log, RAY_ADDRESS=cluster.address)
        assert trainings.wait_for(run, 4, process), log.read_text()
        trainings.kill_rank(os.getpid(), random.Random(0))
        assert trainings.wait_for(run, 12, process), log.read_text()
        trainings.kill_raylet(cluster)
        assert trainings.ended(process) == 0, log.read_text()
    finally:
        below = trainings.ray_below(os.getpid())
        cluster.shutdown()
        trainings.end(below)
    assert_same_trace(trace(run), plain)
    assert len(list(run.glob("step-*"))) == 2  # checkpoints that attempts left unfinished are removed


@pytest.mark.soak
def test_a_training_on_s3_survives_outages_and_the_loss_of_a_worker_and_of_a_machine(
    data: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.cluster_utils import Cluster

    plain = trainings.plain_trace(outages.COMPONENT, *data, tmp_path / "plain", overrides=outages.OVERRIDES)
    with object_storage(tmp_path / "moto") as server:
        training = outages.Training(server, "storage", data, tmp_path)
        training.copy_encoded(tmp_path / "plain")
        places = ("latents", "lips", "checkpoint", "record", "export", "pipeline")
        for place in places:
            server.proxy.fail_at(outages.PLACES[place], 2.0)
        for name, value in training.environment.items():  # of the machines
            monkeypatch.setenv(name, value)
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": True})
        try:
            for _ in range(2):
                cluster.add_node(num_cpus=2)
            process = training.start(RAY_ADDRESS=cluster.address)
            assert training.wait_for(4, process), training.log.read_text()
            trainings.kill_rank(os.getpid(), random.Random(0))
            assert training.wait_for(12, process), training.log.read_text()
            trainings.kill_raylet(cluster)
            assert trainings.ended(process) == 0, training.log.read_text()
        finally:
            below = trainings.ray_below(os.getpid())
            cluster.shutdown()
            trainings.end(below)
        assert_same_trace(training.trace(), plain)
        assert len(training.checkpoints()) == 2, "checkpoints that attempts have left unfinished are removed"
        assert len(server.proxy.outages) == len(places), server.proxy.outages
        assert "mistake" not in " ".join(one for one in server.proxy.requests if one.startswith("PUT"))


@pytest.mark.soak
@pytest.mark.parametrize(
    "options",
    [
        ["--latents", "in-step"],
        ["--offload", "optimizer"],
        ["--offload", "parameters"],
        ["--workers", "1"],
        ["--compile"],
        ["--set", "network.gradient_checkpointing=true"],
        ["--set", "training.accumulation=2"],
    ],
    ids=lambda options: "_".join(options).strip("-"),
)
def test_every_way_to_train_gives_the_same_losses(data: tuple[Path, Path], tmp_path: Path, options: list[str]) -> None:
    clips, untrained = data
    arguments = command("stage1", clips, tmp_path, "--variants", "landmark_first", "--autoencoder", str(untrained))
    process = trainings.start([*arguments, *options], tmp_path / "log")
    assert trainings.ended(process) == 0, (tmp_path / "log").read_text()
    plain = trainings.plain_trace("landmark_first", clips, untrained, tmp_path / "plain")
    assert_same_trace(trace(run_folder(tmp_path, "landmark_first")), plain)


@pytest.mark.soak
def test_a_control_branch_alone_is_trained_on_the_video_branch_of_another_run(
    data: tuple[Path, Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    clips, untrained = data
    log = tmp_path / "log"
    options = ["--variants", "one_stage_first", "--autoencoder", str(untrained)]
    first = command("stage1", clips, tmp_path, *options, steps=4)
    assert trainings.ended(trainings.start(first, log)) == 0, log.read_text()
    again = command("stage1", clips, tmp_path, *options, "--control-from", "run", "--name", "control", steps=4)
    again += ["--set", "training.freeze_video_branch=true"]
    assert trainings.ended(trainings.start(again, log)) == 0, log.read_text()
    weights = "pipeline/one_stage_first/diffusion_pytorch_model.safetensors"
    before, after = (load_file(tmp_path / "runs" / name / weights) for name in ("run", "control"))
    assert {name.split(".")[0] for name in before if not before[name].equal(after[name])} == {"control"}


@pytest.mark.soak
@pytest.mark.parametrize(
    "options", [["--stream", "films", "--backend", "truth"], ["--keep-best", "--validate-every", "8"]], ids=" ".join
)
def test_a_second_driver_continues_after_the_first_was_killed_with_its_ray(
    data: tuple[Path, Path], tmp_path: Path, options: list[str]
) -> None:
    clips, untrained = data
    log = tmp_path / "log"
    traces = []
    for name, kill in (("whole", False), ("killed", True)):
        storage = tmp_path / name
        arguments = command("stage1", clips, storage, "--variants", "landmark_first", "--autoencoder", str(untrained))
        if "--stream" in options:
            given = arguments.index("--data")
            arguments[given : given + 2] = []
        arguments += [str(clips.parent / one) if one == "films" else one for one in options]
        process = trainings.start(arguments, log)
        run = run_folder(storage, "landmark_first")
        if kill:
            assert trainings.wait_for(run, 8, process), log.read_text()
            trainings.kill_driver(process)
            assert 8 <= committed(run) < trainings.STEPS
            process = trainings.start([*arguments, "--resume"], log)
        assert trainings.ended(process) == 0, log.read_text()
        assert committed(run) == trainings.STEPS
        traces.append(trace(run))
    assert [step for step, _, _ in traces[0]] == list(range(trainings.STEPS))
    assert traces[0] == traces[1]


@pytest.mark.soak
def test_a_second_driver_takes_the_checkpoint_before_a_damaged_one_and_a_lower_rate(
    data: tuple[Path, Path], tmp_path: Path
) -> None:
    """As after a loss of power: a file of the newest checkpoint is cut short, and Ray's record names it."""
    clips, untrained = data
    log, run = tmp_path / "log", run_folder(tmp_path / "storage", "landmark_first")
    options = ["--variants", "landmark_first", "--autoencoder", str(untrained)]
    arguments = command("stage1", clips, tmp_path / "storage", *options)
    process = trainings.start(arguments, log)
    assert trainings.wait_for(run, 8, process), log.read_text()
    trainings.kill_driver(process)
    record = json.loads((run / "checkpoint_manager_snapshot.json").read_text())
    newest = run / record["latest_checkpoint_result"]["checkpoint_dir_name"]
    (cut,) = newest.rglob("zero_pp_rank_1_*optim_states.pt")
    os.truncate(cut, cut.stat().st_size // 2)
    done = committed(run)
    lower = [*arguments, "--resume"]
    lower[lower.index("--data") : lower.index("--data")] = ["training.learning_rate=1e-6"]
    assert trainings.ended(trainings.start(lower, log)) == 0, log.read_text()
    assert f"{newest} is damaged ({cut.relative_to(newest)} has" in log.read_text()
    done -= trainings.EVERY
    plain = trainings.plain_trace("landmark_first", clips, untrained, tmp_path / "plain")
    found = trace(run)
    assert_same_trace(found[: done + 1], plain[: done + 1])
    assert len(found) == trainings.STEPS
    (change,) = json.loads((run.parent / "run.json").read_text())["changes"]
    assert (change["component"], change["at_step"]) == ("landmark_first", done)
    provenance = read_manifest(run.parent / "pipeline")["components"]["landmark_first"]["provenance"]
    assert provenance["changes"] == [change]
    assert change["settings"]["training.learning_rate"]["is"] == 1e-6


@pytest.mark.soak
@pytest.mark.parametrize("comes_back", [True, False])
def test_a_storage_that_is_away_for_longer_than_its_retries_costs_an_attempt(
    data: tuple[Path, Path], tmp_path: Path, comes_back: bool
) -> None:
    clips, untrained = data
    log, run = tmp_path / "log", run_folder(tmp_path / "storage", "landmark_first")
    options = ["--variants", "landmark_first", "--autoencoder", str(untrained)]
    options += [] if comes_back else ["--max-failures", "1"]
    process = trainings.start(command("stage1", clips, tmp_path / "storage", *options), log)
    assert trainings.wait_for(run, 8, process), log.read_text()
    ranks = {one.pid for one in trainings.ranks_below(process.pid)}
    away = tmp_path / "away"
    run.rename(away)
    run.write_text("like a mount that is gone: nothing below can be read or written")
    if not comes_back:
        assert trainings.ended(process) == 3
        last = log.read_text().splitlines()[-1]
        assert "the training of landmark_first is given up: it failed more often than --max-failures 1 allows" in last
        assert f"the last failure: cannot write {run}" in last and last.endswith(": --resume goes on from there")
        return
    deadline = time.monotonic() + 120
    while ranks & {one.pid for one in trainings.ranks_below(process.pid)} and time.monotonic() < deadline:
        time.sleep(0.1)
    assert process.poll() is None, log.read_text()
    run.unlink()
    away.rename(run)
    assert trainings.ended(process) == 0, log.read_text()
    plain = trainings.plain_trace("landmark_first", clips, untrained, tmp_path / "plain")
    assert_same_trace(trace(run), plain)
