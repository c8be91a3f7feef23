"""What a training on a cluster refuses before it begins, and how it is spread where it fits."""

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
from tccp.cluster import CLUSTER_MAX, connected, could_have, num_nodes
from tccp.config import DeepSpeedSettings, load_settings, override, storage_root
from tccp.errors import TccpError
from tccp.files import Folder, fetched
from tccp.inference.pipeline import export, write_untrained
from tccp.training.launcher.inherited import fits, lendable
from tccp.training.launcher.rank import due
from tccp.training.launcher.records import COPY, RAYS_RECORD, keep_record, tidy
from tccp.training.launcher.request import Request, resumed_parallel
from tccp.training.launcher.sizing import READER_CPUS, check_shared, spread_over
from tccp.training.tracking import tracking_place

spread = functools.partial(spread_over, workers=None, device="auto", parallel=DeepSpeedSettings())


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
def test_defaults_fit_and_leave_cpus_to_read_with(resources: dict[str, Any], workers: int, gpu: bool) -> None:
    found = spread(resources)
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
def test_what_cannot_be_placed_is_refused_in_one_line(
    resources: dict[str, Any], asked: dict[str, Any], message: str
) -> None:
    with pytest.raises(TccpError, match=message) as error:
        spread(resources, **asked)
    assert "\n" not in str(error.value)


@pytest.mark.cluster
def test_what_the_autoscaler_may_add_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    assert could_have() == {"CPU": 2.0}
    monkeypatch.setenv(CLUSTER_MAX, "CPU=136,GPU=8")
    assert could_have() == {"CPU": 136.0, "GPU": 8.0}
    monkeypatch.setenv(CLUSTER_MAX, "many")
    with pytest.raises(TccpError, match="TCCP_CLUSTER_MAX=many: write it as CPU=64,GPU=8"):
        could_have()


@pytest.mark.cluster
@pytest.mark.slow
def test_a_cluster_of_ones_own_is_asked_about_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the one that somebody has named, or runs, on the same machine: see `connected`."""
    import ray
    from ray.util.state import get_actor

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")
    with connected():
        there = ray.remote(threading.Event).remote()
        ray.get(there.is_set.remote())
        state = ray.get(ray.remote(get_actor).remote(there._actor_id.hex(), timeout=60))
        assert state is not None and state.state == "ALIVE"
        assert num_nodes() == 1
        monkeypatch.setenv(CLUSTER_MAX, "CPU=136,GPU=8")
        assert num_nodes() == 2, "an autoscaler's machines that are not there yet"
    assert os.environ["RAY_API_SERVER_ADDRESS"] == "http://127.0.0.1:1"


@pytest.mark.cluster
@pytest.mark.slow
def test_what_is_refused_is_no_run(training_data: tuple[Path, Path], tmp_path: Path) -> None:
    """So the same command, mended, needs no other name and no --resume."""
    clips, _ = training_data
    job = [sys.executable, str(trainings.ROOT / "ray_jobs" / "train_stage2.py"), "lips.source=wav2lip"]
    job += ["--data", str(clips), "--storage", str(tmp_path / "storage"), "--name", "run"]
    done = subprocess.run(job, capture_output=True, text=True, check=False)
    assert (done.returncode, "needs weights: give --lip-weights PATH" in done.stderr) == (2, True), done.stderr
    assert not list((tmp_path / "storage").rglob("run.json"))


def test_a_folder_of_one_machine_is_no_storage_for_several(tmp_path: Path) -> None:
    check_shared("storage", Folder(tmp_path / "here"), 1)
    check_shared("storage", Folder(f"file://{tmp_path}/shared"), 3)
    with pytest.raises(TccpError, match=r"a folder of one machine, and the cluster has, or can grow to, 3: give a URL"):
        check_shared("storage", Folder(tmp_path / "here"), 3)


def test_a_database_of_one_machine_notes_no_training_of_several(tmp_path: Path) -> None:
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
    with pytest.raises(TccpError, match="is no folder of this machine: give --mlflow"):
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
    assert "unknown setting 'trainin.seed'" in say("trainin.seed=1", *storage)
    assert "unknown preset 'huge': choose one of paper, toy" in say("--preset", "huge", *storage)
    assert "unknown variant 'face': choose one of landmark_first" in say("--variants", "face", *storage)
    assert f"nothing is neither a run in {tmp_path} nor a pipeline folder" in say("--stage1", "nothing", *storage)
    assert "--stream and --data: give one of them" in say("--stream", "x.mp4", "--data", "y", *storage)
    assert "offload=parameters needs zero_stage 3" in say("--offload", "parameters", "--zero-stage", "1", *storage)
    (tmp_path / "runs" / "there").mkdir(parents=True)
    (tmp_path / "runs" / "there" / "run.json").write_text("{}")
    assert "there holds a run already: give --resume to go on with it" in say("--name", "there", *storage)
    assert "give a name without /" in say("--name", "a/b", *storage)
    assert "--register takes the pipeline to MLflow" in say("--register", "m", "--mlflow", "none", *storage)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TCCP_STORAGE", "memory://tccp-tests/jobs")
        Folder("memory://tccp-tests/jobs").write("runs/there/run.json", b"{}")
        assert "memory://tccp-tests/jobs/runs/there holds a run already" in say("--name", "there")
    assert "--keep 0: give at least 1" in say("--keep", "0", *storage)
    assert "--keep-best goes by what validation measures" in say("--keep-best", "--validate-every", "0", *storage)
    (tmp_path / "file").write_text("")
    assert "cannot write" in say("--storage", str(tmp_path / "file"))
    assert "give a file of DeepSpeed settings as JSON" in say("--deepspeed", str(tmp_path / "none.json"), *storage)


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
def test_a_zero_stage_that_is_not_given_is_the_least_that_serves(
    given: dict[str, Any], workers: int, stage: int
) -> None:
    assert DeepSpeedSettings(**given).stage(workers) == stage


def test_a_resumed_run_keeps_its_zero_stage_on_another_number_of_workers(tmp_path: Path) -> None:
    def stage(workers: int, **given: Any) -> int:
        parallel = DeepSpeedSettings(**{key: value for key, value in given.items() if key != "resume"})
        request = Request(
            (), tiny.SETTINGS, None, Folder(tmp_path), "run", given.get("resume", True), parallel=parallel
        )
        return resumed_parallel(request).stage(workers)

    assert (stage(1), stage(2)) == (0, 1), "nothing is there yet"
    Folder(tmp_path).write("runs/run/run.json", b'{"zero_stage": 1}')
    assert (stage(1), stage(2)) == (1, 1)
    assert (stage(1, zero_stage=2), stage(1, resume=False)) == (2, 0)
    with pytest.raises(TccpError, match=r"--offload parameters does not go with ZeRO stage 1, in which .* was begun"):
        stage(2, offload="parameters")
    Folder(tmp_path).write("runs/run/run.json", b"{}")
    assert (stage(1), stage(2)) == (0, 1), "of an earlier version"


def test_steps_of_a_job_hold_for_all_that_it_trains() -> None:
    settings = training._settings("toy", ["training.batch_size=8"], 7)
    assert settings.autoencoder.max_steps == 7
    for name in settings.variant_overrides:
        own = settings.for_variant(name).training
        assert (own.max_steps, own.batch_size) == (7, 8)
    assert training._settings("toy", [], None) == load_settings("toy")


def test_storage_of_the_command_line_stays_a_folder(tmp_path: Path) -> None:
    assert storage_root(tmp_path) == tmp_path
    with pytest.raises(TccpError, match="is a URL"):
        storage_root("s3://bucket/x")


def test_folders_at_urls_are_read_and_written_as_folders_here_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TCCP_CACHE", str(tmp_path / "cache"))
    (tmp_path / "tree" / "a").mkdir(parents=True)
    (tmp_path / "tree" / "a" / "one").write_text("1")
    (tmp_path / "tree" / "two").write_text("2")
    for place in (str(tmp_path / "copy"), "memory://tccp-tests/copy"):
        folder = Folder(place)
        folder.upload(tmp_path / "tree", "b")
        assert folder.tree("b") == ["two", "a/one"]
        with folder.here("b") as here:
            assert (here / "a" / "one").read_text() == "1"
        assert fetched(folder, "b/two").read_text() == "2"
        with pytest.raises(FileNotFoundError):
            fetched(folder, "b/three").read_text()
        filesystem, path = folder.arrow()
        assert (filesystem is None) == (folder.local is not None)
        assert path.endswith("copy")
        folder.remove("b")
        assert folder.tree() == []
    assert not [path for path in (tmp_path / "cache").rglob(".*") if path.is_file()]


def test_networks_are_lent_only_with_what_they_were_trained_on(tmp_path: Path) -> None:
    settings, other = tiny.SETTINGS, override(tiny.SETTINGS, {"seed": 1})
    lender, mine = tmp_path / "lender", tmp_path / "mine"
    write_untrained(lender, settings, ("landmark_first", "face_first"))
    everything = ["autoencoder", "lips", "landmark_first", "face_first"]
    assert fits(lender, settings) and not fits(tmp_path / "none", settings)
    assert not fits(lender, override(settings, {"picture_px": 64}))
    assert fits(
        lender, override(settings, {"autoencoder.max_steps": 7, "lips.liplet_steps": 7, "training.max_steps": 1})
    )
    assert lendable(lender, mine, settings, []) == everything
    assert lendable(lender, mine, settings, ["landmark_first"]) == ["autoencoder", "lips", "face_first"]
    assert lendable(lender, mine, settings, ["autoencoder"]) == ["lips"]
    export(lender, mine, ["autoencoder"])
    assert lendable(lender, mine, settings, []) == ["lips", "landmark_first", "face_first"]
    stranger = tmp_path / "stranger"
    write_untrained(stranger, other, ())
    export(stranger, mine, ["autoencoder"])
    assert lendable(lender, mine, settings, []) == ["lips"], "networks of another auto-encoder's latents"
    own_lips = tmp_path / "own_lips"
    export(lender, own_lips, ["autoencoder"])
    export(stranger, own_lips, ["lips"])
    assert lendable(lender, own_lips, settings, []) == ["landmark_first"], "face networks of other lips"


@pytest.mark.parametrize("place", ["here", "memory://tccp-tests/tidy"])
def test_checkpoints_that_are_on_record_stay_and_so_do_all_without_a_record(tmp_path: Path, place: str) -> None:
    run = Folder(place if "://" in place else tmp_path / place)
    for name in ("step-0000004-aaaaaa", "step-0000008-bbbbbb", "export"):
        run.write(f"{name}/file", b"")
    tidy(run)
    assert len(run.subfolders()) == 3
    run.write(RAYS_RECORD, rays_record("step-0000004-aaaaaa"))
    tidy(run)
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


def test_a_record_of_checkpoints_that_a_full_disk_has_cut_is_taken_from_its_copy(tmp_path: Path) -> None:
    run, names = Folder(tmp_path), ["step-0000004-aaaaaa", "step-0000008-bbbbbb", "step-0000012-cccccc"]
    for name in names:
        run.write(f"{name}/file", b"")
    run.write(RAYS_RECORD, b"")
    keep_record(run)
    with pytest.raises(TccpError, match=r"Ray's record of the checkpoints there, is damaged: remove that folder"):
        tidy(run)
    assert run.subfolders() == set(names), "nothing is removed on a guess"
    run.write(RAYS_RECORD, rays_record(*names[:2]))
    keep_record(run)
    run.write(RAYS_RECORD, b'{"checkpoint_res')
    keep_record(run)
    run.remove(names[0])  # by Ray, which keeps so many
    tidy(run)
    assert json.loads(run.read(COPY)) == json.loads(rays_record(*names[:2]))
    record = json.loads(run.read(RAYS_RECORD))
    assert record["checkpoint_results"] == [record["latest_checkpoint_result"]]
    assert record["latest_checkpoint_result"]["checkpoint_dir_name"] == names[1]
    assert record["checkpoint_report_indices"] == [1]
    assert run.subfolders() == {names[1]}


def test_validation_comes_with_the_first_checkpoint_after_so_many_steps() -> None:
    checkpoints = [0, 300, 600, 900, 1200, 1500, 1850, 2100, 2400]
    looks = [step for before, step in itertools.pairwise(checkpoints) if due(step, before, 1000, 2400)]
    assert looks == [1200, 2100, 2400]
