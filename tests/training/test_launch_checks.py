"""Checks before a training on a cluster: allocation, refusals in one line, folders, reuse, checkpoint records."""

from __future__ import annotations

import functools
import itertools
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import tiny
import trainings

from ray_jobs import train_command as training
from tccp.cli.options import settings_of
from tccp.cluster import CLUSTER_MAX, max_resources, num_nodes, ray_cluster
from tccp.config import DeepSpeedSettings, load_settings, override, storage_root
from tccp.errors import TccpError
from tccp.files import Folder, check_shared
from tccp.files.arrow import arrow_filesystem
from tccp.inference.pipeline_folder import export, write_untrained
from tccp.training.launcher.checkpoint_record import COPY, RAYS_RECORD, copy_record, remove_unfinished
from tccp.training.launcher.rank import validation_due
from tccp.training.launcher.request import Request, resumed_parallel
from tccp.training.launcher.reuse import has_matching_settings, reusable_components
from tccp.training.launcher.sizing import READER_CPUS, allocate
from tccp.training.tracking import tracking_place

allocation = functools.partial(allocate, workers=None, device="auto", parallel=DeepSpeedSettings())


@pytest.mark.parametrize(
    ("resources", "workers", "gpu"),
    [
        ({"CPU": 1}, 1, False),
        ({"CPU": 2}, 2, False),
        ({"CPU": 64}, 2, False),
        ({"CPU": 16, "GPU": 1}, 1, True),
        ({"CPU": 136, "GPU": 8}, 8, True),
    ],
)
def test_default_allocations_leave_cpus_for_readers(resources: dict[str, Any], workers: int, gpu: bool) -> None:
    found = allocation(resources)
    assert (found.workers, found.use_gpu) == (workers, gpu)
    left = resources["CPU"] - found.workers * found.cpus_per_worker
    assert found.workers * found.readers * READER_CPUS <= left
    assert resources["CPU"] < 2 or left >= 1
    assert 1 <= found.readers <= 4


@pytest.mark.parametrize(
    ("resources", "asked", "message"),
    [
        (
            {"CPU": 2},
            {"workers": 4},
            r"4 workers and their readers need 3 CPUs, .* has, or can grow to, 2: give --workers 2",
        ),
        ({"CPU": 0.5}, {}, r"training needs 0.75 CPUs, and the cluster has 0.5: start Ray with more"),
        ({"CPU": 8, "GPU": 1}, {"workers": 2, "device": "cuda"}, r"2 workers need 2 GPUs, .* 1: give fewer --workers"),
        ({"CPU": 8}, {"device": "cuda"}, r"1 workers need 1 GPUs, and the cluster has, or can grow to, 0"),
        ({"CPU": 8}, {"workers": 0}, r"--workers 0: give at least 1"),
        ({"CPU": 8}, {"device": "tpu"}, r"--device tpu: give auto, cpu or cuda"),
    ],
)
def test_requests_that_do_not_fit_the_cluster_are_refused_in_one_line(
    resources: dict[str, Any], asked: dict[str, Any], message: str
) -> None:
    with pytest.raises(TccpError, match=message) as error:
        allocation(resources, **asked)
    assert "\n" not in str(error.value)


@pytest.mark.cluster
def test_machines_that_an_autoscaler_may_add_count_as_resources(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    assert max_resources() == {"CPU": 2.0}
    monkeypatch.setenv(CLUSTER_MAX, "CPU=136,GPU=8")
    assert max_resources() == {"CPU": 136.0, "GPU": 8.0}
    monkeypatch.setenv(CLUSTER_MAX, "many")
    with pytest.raises(TccpError, match="TCCP_CLUSTER_MAX=many: write it as CPU=64,GPU=8"):
        max_resources()


@pytest.mark.cluster
@pytest.mark.slow
def test_a_new_cluster_answers_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not another cluster that RAY_API_SERVER_ADDRESS names or that runs on the same machine: see `ray_cluster`."""
    import ray
    from ray.util.state import get_actor

    ray.shutdown()  # of another test
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")
    with ray_cluster():
        there = ray.remote(threading.Event).remote()
        ray.get(there.is_set.remote())
        state = ray.get(ray.remote(get_actor).remote(there._actor_id.hex(), timeout=60))
        assert state is not None and state.state == "ALIVE"
        assert num_nodes() == 1
        monkeypatch.setenv(CLUSTER_MAX, "CPU=136,GPU=8")
        assert num_nodes() == 2, "machines that the autoscaler may add"
    assert os.environ["RAY_API_SERVER_ADDRESS"] == "http://127.0.0.1:1"


@pytest.mark.cluster
@pytest.mark.slow
def test_a_refused_request_leaves_no_run_record(training_data: tuple[Path, Path], tmp_path: Path) -> None:
    """So the corrected command needs neither another name nor --resume."""
    clips, _ = training_data
    job = [sys.executable, str(trainings.ROOT / "ray_jobs" / "train_stage2.py"), "--set", "lips.source=wav2lip"]
    job += ["--data", str(clips), "--storage", str(tmp_path / "storage"), "--name", "run"]
    done = subprocess.run(job, capture_output=True, text=True, check=False)
    assert (done.returncode, "needs weights: give --lip-weights PATH" in done.stderr) == (2, True), done.stderr
    assert not list((tmp_path / "storage").rglob("run.json"))


def test_a_folder_of_one_machine_is_refused_as_storage_of_several(tmp_path: Path) -> None:
    check_shared("storage", Folder(tmp_path / "here"), 1)
    check_shared("storage", Folder(f"file://{tmp_path}/shared"), 3)
    with pytest.raises(TccpError, match=r"a folder of one machine, and the cluster has, or can grow to, 3: give a URL"):
        check_shared("storage", Folder(tmp_path / "here"), 3)


def test_a_database_of_one_machine_is_refused_for_trainings_on_several(tmp_path: Path) -> None:
    storage = Folder(tmp_path)
    assert tracking_place(None, storage, 1) == f"sqlite:///{tmp_path}/mlflow.db"
    assert tracking_place(str(tmp_path / "x.db"), storage, 1) == f"sqlite:///{tmp_path}/x.db"
    assert tracking_place("http://head:5000", storage, 5) == "http://head:5000"
    for given in (None, str(tmp_path / "x.db"), f"sqlite:///{tmp_path}/x.db"):
        with pytest.raises(
            TccpError,
            match=r"can be written by one machine only, and the cluster has, or can grow to, 2: give --mlflow http",
        ):
            tracking_place(given, storage, 2)
    with pytest.raises(TccpError, match="is not a folder of this machine: give --mlflow"):
        tracking_place(None, Folder("memory://bucket/x"), 1)


def refused(capsys: pytest.CaptureFixture[str], stage: training.Stage, *arguments: str) -> str:
    """The one line that a job ends with."""
    with pytest.raises(SystemExit) as ended:
        training.run(stage, list(arguments))
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_mistakes_on_a_jobs_command_line_end_in_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    say = functools.partial(refused, capsys, "stage2")
    storage = ("--storage", str(tmp_path))
    assert "unknown setting 'trainin.seed'" in say("--set", "trainin.seed=1", *storage)
    assert "unknown preset 'huge': choose one of paper, toy" in say("--preset", "huge", *storage)
    assert "unknown variant 'face': choose one of landmark_first" in say("--variants", "face", *storage)
    assert f"nothing is neither a run in {tmp_path} nor a pipeline folder" in say("--stage1", "nothing", *storage)
    assert "--stream and --data: give one of them" in say("--stream", "x.mp4", "--data", "y", *storage)
    assert "offload=parameters needs zero_stage 3" in say("--offload", "parameters", "--zero-stage", "1", *storage)
    (tmp_path / "runs" / "there").mkdir(parents=True)
    (tmp_path / "runs" / "there" / "run.json").write_text("{}")
    assert "there holds a run already: give --resume to continue it" in say("--name", "there", *storage)
    assert "give a name without /" in say("--name", "a/b", *storage)
    assert "--register needs MLflow" in say("--register", "m", "--mlflow", "none", *storage)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TCCP_STORAGE", "memory://tccp-tests/jobs")
        Folder("memory://tccp-tests/jobs").write("runs/there/run.json", b"{}")
        assert "memory://tccp-tests/jobs/runs/there holds a run already" in say("--name", "there")
    assert "--keep 0: give at least 1" in say("--keep", "0", *storage)
    assert "--keep-best ranks checkpoints by validation" in say("--keep-best", "--validate-every", "0", *storage)
    (tmp_path / "file").write_text("")
    assert "cannot write" in say("--storage", str(tmp_path / "file"))
    assert "give a JSON file of DeepSpeed settings" in say("--deepspeed", str(tmp_path / "none.json"), *storage)


@pytest.mark.parametrize(
    ("given", "workers", "stage"),
    [
        ({}, 1, 0),
        ({}, 2, 1),
        ({}, 64, 1),
        ({"offload": "optimizer"}, 1, 1),
        ({"offload": "parameters"}, 2, 3),
        ({"zero_stage": 0}, 8, 0),
        ({"zero_stage": 2}, 1, 2),
    ],
)
def test_the_default_zero_stage_is_the_lowest_that_suffices(given: dict[str, Any], workers: int, stage: int) -> None:
    assert DeepSpeedSettings(**given).stage(workers) == stage


def test_a_resumed_run_keeps_its_zero_stage_on_another_number_of_workers(tmp_path: Path) -> None:
    def stage(workers: int, **given: Any) -> int:
        parallel = DeepSpeedSettings(**{key: value for key, value in given.items() if key != "resume"})
        request = Request(
            (), tiny.SETTINGS, None, Folder(tmp_path), "run", given.get("resume", True), parallel=parallel
        )
        return resumed_parallel(request).stage(workers)

    assert (stage(1), stage(2)) == (0, 1), "no run exists yet"
    Folder(tmp_path).write("runs/run/run.json", b'{"zero_stage": 1}')
    assert (stage(1), stage(2)) == (1, 1)
    assert (stage(1, zero_stage=2), stage(1, resume=False)) == (2, 0)
    with pytest.raises(TccpError, match=r"--offload parameters does not work with ZeRO stage 1, with which .* began"):
        stage(2, offload="parameters")
    Folder(tmp_path).write("runs/run/run.json", b"{}")
    assert (stage(1), stage(2)) == (0, 1), "a record of an earlier version"


def test_max_steps_of_a_job_apply_to_every_network() -> None:
    settings = settings_of("toy", (("training.batch_size=8",),), 7)
    assert settings.autoencoder.max_steps == 7
    for name in settings.variant_overrides:
        own = settings.for_variant(name).training
        assert (own.max_steps, own.batch_size) == (7, 8)
    assert settings_of("toy") == load_settings("toy")


def test_the_command_line_accepts_only_local_storage(tmp_path: Path) -> None:
    assert storage_root(tmp_path) == tmp_path
    with pytest.raises(TccpError, match="is a URL"):
        storage_root("s3://bucket/x")


def test_folders_at_urls_read_and_write_like_local_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TCCP_CACHE", str(tmp_path / "cache"))
    (tmp_path / "tree" / "a").mkdir(parents=True)
    (tmp_path / "tree" / "a" / "one").write_text("1")
    (tmp_path / "tree" / "two").write_text("2")
    for place in (str(tmp_path / "copy"), "memory://tccp-tests/copy"):
        folder = Folder(place)
        folder.upload(tmp_path / "tree", "b")
        assert folder.tree("b") == ["two", "a/one"]
        for writable in (False, True):
            with folder.as_local("b", writable) as copy:
                assert (copy / "a" / "one").read_text() == "1"
        with folder.local_file("b/two") as path:
            assert path.read_text() == "2"
        with pytest.raises(FileNotFoundError), folder.local_file("b/three") as path:
            path.read_text()
        filesystem, path = arrow_filesystem(folder)
        assert (filesystem is None) == (folder.local is not None)
        assert str(path).endswith("copy")
        folder.remove("b")
        assert folder.tree() == []
    assert not [path for path in (tmp_path / "cache").rglob(".*") if path.is_file()]


def test_networks_are_reused_only_with_the_components_they_were_trained_with(tmp_path: Path) -> None:
    settings, other = tiny.SETTINGS, override(tiny.SETTINGS, {"seed": 1})
    source, mine = tmp_path / "source", tmp_path / "mine"
    write_untrained(source, settings, ("landmark_first", "face_first"))
    everything = ["autoencoder", "lips", "landmark_first", "face_first"]
    assert has_matching_settings(source, settings) and not has_matching_settings(tmp_path / "none", settings)
    assert not has_matching_settings(source, override(settings, {"picture_px": 64}))
    assert has_matching_settings(
        source, override(settings, {"autoencoder.max_steps": 7, "lips.liplet_steps": 7, "training.max_steps": 1})
    )
    assert reusable_components(source, mine, settings, []) == everything
    assert reusable_components(source, mine, settings, ["landmark_first"]) == ["autoencoder", "lips", "face_first"]
    assert reusable_components(source, mine, settings, ["autoencoder"]) == ["lips"]
    export(source, mine, ["autoencoder"])
    assert reusable_components(source, mine, settings, []) == ["lips", "landmark_first", "face_first"]
    other_pipeline = tmp_path / "other_pipeline"
    write_untrained(other_pipeline, other, ())
    export(other_pipeline, mine, ["autoencoder"])
    assert reusable_components(source, mine, settings, []) == ["lips"], "networks of another auto-encoder's latents"
    own_lips = tmp_path / "own_lips"
    export(source, own_lips, ["autoencoder"])
    export(other_pipeline, own_lips, ["lips"])
    assert reusable_components(source, own_lips, settings, []) == ["landmark_first"], "face networks of other lips"


@pytest.mark.parametrize("place", ["here", "memory://tccp-tests/tidy"])
def test_checkpoints_that_are_not_in_the_record_are_removed_if_there_is_one(tmp_path: Path, place: str) -> None:
    run = Folder(place if "://" in place else tmp_path / place)
    for name in ("step-0000004-aaaaaa", "step-0000008-bbbbbb", "export"):
        run.write(f"{name}/file", b"")
    remove_unfinished(run)
    assert len(run.subfolders()) == 3
    run.write(RAYS_RECORD, rays_record("step-0000004-aaaaaa"))
    remove_unfinished(run)
    assert run.subfolders() == {"step-0000004-aaaaaa", "export"}


def rays_record(*names: str) -> bytes:
    results = [{"checkpoint_dir_name": name, "metrics": {}} for name in names]
    indices = list(range(len(names)))
    record = {
        "checkpoint_results": results,
        "checkpoint_report_indices": indices,
        "latest_checkpoint_result": results[-1],
    }
    return json.dumps(record).encode()


def test_a_damaged_record_of_checkpoints_is_restored_from_its_copy(tmp_path: Path) -> None:
    run, names = Folder(tmp_path), ["step-0000004-aaaaaa", "step-0000008-bbbbbb", "step-0000012-cccccc"]
    for name in names:
        run.write(f"{name}/file", b"")
    run.write(RAYS_RECORD, b"")
    copy_record(run)
    with pytest.raises(TccpError, match=r"Ray's record of the checkpoints, is damaged: remove the folder"):
        remove_unfinished(run)
    assert run.subfolders() == set(names), "without a record nothing is removed"
    run.write(RAYS_RECORD, rays_record(*names[:2]))
    copy_record(run)
    run.write(RAYS_RECORD, b'{"checkpoint_res')
    copy_record(run)
    run.remove(names[0])  # as Ray does with the oldest
    remove_unfinished(run)
    assert json.loads(run.read(COPY)) == json.loads(rays_record(*names[:2]))
    record = json.loads(run.read(RAYS_RECORD))
    assert record["checkpoint_results"] == [record["latest_checkpoint_result"]]
    assert record["latest_checkpoint_result"]["checkpoint_dir_name"] == names[1]
    assert record["checkpoint_report_indices"] == [1]
    assert run.subfolders() == {names[1]}


def test_validation_is_due_at_the_first_checkpoint_after_each_interval() -> None:
    checkpoints = [0, 300, 600, 900, 1200, 1500, 1850, 2100, 2400]
    looks = [step for before, step in itertools.pairwise(checkpoints) if validation_due(step, before, 1000, 2400)]
    assert looks == [1200, 2100, 2400]
