"""Resuming after damage and divergence: damaged checkpoints, half lines, checkpoints of a GPU, another rate."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_networks import small
from torch import nn

from tccp.config import Settings, TrainingSettings, load_settings
from tccp.errors import TccpError
from tccp.files import Folder, atomic_folder, atomic_path
from tccp.inference.pipeline_folder import save_component
from tccp.models.liplet import Liplet
from tccp.training.averaged_weights import AveragedWeights
from tccp.training.checkpoint_files import write_contents
from tccp.training.engine import OPTIMISER_FILE, TorchEngine
from tccp.training.fit_autoencoder import fit_autoencoder
from tccp.training.fit_liplet import LipletSamples, train_liplet
from tccp.training.fit_variant import _keys_of
from tccp.training.launcher.checkpoint_record import RAYS_RECORD, newest_step, remove_unfinished
from tccp.training.lip_folds import _is_complete, _read_json
from tccp.training.loop import FitResult, NonFiniteLoss, fit
from tccp.training.run_folder import RunFolder
from tccp.training.window_files import PictureBatch

SHORT = {
    "training.max_steps": 6,
    "training.checkpoint_every": 2,
    "training.log_every": 1,
    "training.learning_rate": 0.1,
}


def settings_of(**changes: Any) -> Settings:
    return small(**SHORT | {key.replace("__", "."): value for key, value in changes.items()})


def trained(run: RunFolder, training: TrainingSettings, stop_at: int | None = None, nan_at: int = -1) -> FitResult:
    """Fits a line to noise. The result depends on every step, its random numbers and its learning rate."""
    torch.manual_seed(0)
    network = nn.Linear(3, 1)

    def loss_of(step: int, micro: int) -> torch.Tensor:
        x = torch.randn(8, 3)  # `fit` seeds each step
        return (network(x) - x.sum(1, keepdim=True)).square().mean() * (float("nan") if step == nan_at else 1)

    engine = TorchEngine(network, training)
    return fit(
        engine, loss_of, training, seed=0, ema=AveragedWeights(network.parameters(), 0.9999), run=run, stop_at=stop_at
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, FitResult]:
    """A complete run of 6 steps, with checkpoints at steps 4 and 6."""
    run = RunFolder.open(tmp_path_factory.mktemp("whole") / "run", settings_of(), "landmark_first", resume=False)
    return run, trained(run, settings_of().training)


def read_metrics(run: RunFolder, name: str = "loss") -> list[tuple[int, float]]:
    records = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    return [(record["step"], record[name]) for record in records]


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)  # blocks that never reached the disk
    path.write_bytes(content)


DAMAGE = {
    "truncated": truncate,
    "empty": lambda path: os.truncate(path, 0),
    "missing": lambda path: path.unlink(),
    "zeros": flip,
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", ["optimizer.pt", "ema.pt", "progress.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    whole: tuple[RunFolder, FitResult], tmp_path: Path, caplog: pytest.LogCaptureFixture, file: str, damage: str
) -> None:
    shutil.copytree(whole[0].path, tmp_path / "run")
    DAMAGE[damage](tmp_path / "run" / "checkpoints" / "step-0000006" / file)
    run = RunFolder.open(tmp_path / "run", settings_of(), "landmark_first", resume=True)
    assert run.latest() == 4
    with caplog.at_level(logging.WARNING, "tccp"):
        again = trained(run, settings_of().training)
    (line,) = [one.getMessage() for one in caplog.records]
    assert f"step-0000006 is damaged ({file} " in line and "training goes on from step-0000004" in line
    assert again.losses == whole[1].losses[4:]
    assert read_metrics(run) == read_metrics(whole[0])
    assert run.latest() == 6
    for name in ("optimizer.pt", "ema.pt"):
        one, other = (torch.load(path.newest() / name) for path in (run, whole[0]))  # type: ignore[operator]
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_a_checkpoint_without_or_with_half_a_list_of_files(
    whole: tuple[RunFolder, FitResult], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of an earlier version, what can be found without a list is found."""
    shutil.copytree(whole[0].path, tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    for step in (4, 6):
        (run.checkpoint(step) / "contents-0.json").unlink()
    assert run.latest() == 6
    truncate(run.checkpoint(6) / OPTIMISER_FILE)
    assert run.latest() == 4
    (run.checkpoint(4) / "progress.json").write_text("")
    assert run.latest() is None
    with caplog.at_level(logging.WARNING, "tccp"):
        assert run.newest() is None
    assert all("training goes on from its beginning" in one.getMessage() for one in caplog.records)
    assert trained(run, settings_of().training).losses == whole[1].losses
    truncate(run.checkpoint(6) / "contents-0.json")
    assert run.latest() == 4
    shutil.rmtree(run.checkpoint(4))
    run.checkpoint(4).mkdir()
    assert run.latest() is None


def test_damaged_checkpoints_of_later_steps_are_removed_once_training_has_passed_their_predecessor(
    whole: tuple[RunFolder, FitResult], tmp_path: Path
) -> None:
    shutil.copytree(whole[0].path, tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    truncate(run.checkpoint(6) / "ema.pt")
    trained(run, settings_of().training, stop_at=5)
    assert [path.name for path in run._checkpoints()] == ["step-0000004", "step-0000005"]


@pytest.mark.parametrize("tail", [b'{"step": 3, "lo', b"\x00" * 64, b"\xff\xfe{", b"[]\n", b'{"loss": 1.0}\n'])
def test_a_half_written_line_of_metrics_is_dropped_and_training_resumes(
    whole: tuple[RunFolder, FitResult], tmp_path: Path, caplog: pytest.LogCaptureFixture, tail: bytes
) -> None:
    run = RunFolder.open(tmp_path / "run", settings_of(), "landmark_first", resume=False)
    trained(run, settings_of().training, stop_at=3)
    with (run.path / "metrics.jsonl").open("ab") as file:
        file.write(tail)
    with caplog.at_level(logging.WARNING, "tccp"):
        trained(RunFolder.open(run.path, settings_of(), "landmark_first", resume=True), settings_of().training)
    assert read_metrics(run) == read_metrics(whole[0])
    assert "metrics.jsonl: 1 lines that are not whole are left out" in caplog.text


def test_a_damaged_record_of_the_run_does_not_stop_it_and_damaged_settings_are_named(tmp_path: Path) -> None:
    run = RunFolder.open(tmp_path / "run", settings_of(), "landmark_first", resume=False)
    (run.path / "run.json").write_text("")
    again = RunFolder.open(run.path, settings_of(training__learning_rate=0.05), "landmark_first", resume=True)
    assert again.git_commit == "unknown" and len(again.changes) == 1
    (run.path / "settings.json").write_text("{")
    with pytest.raises(TccpError, match=r"settings\.json is damaged .*: restore it, or remove the folder"):
        RunFolder.open(run.path, settings_of(), "landmark_first", resume=True)


@pytest.fixture
def storages_of_a_gpu() -> Iterator[None]:
    """Whatever torch saves meanwhile is marked as the content of a GPU's memory."""
    registry = torch.serialization._package_registry
    before = list(registry)
    torch.serialization.register_package(0, lambda storage: "cuda:0", lambda storage, location: None)
    yield
    registry[:] = before


def test_a_checkpoint_of_a_gpu_is_resumed_without_one(
    whole: tuple[RunFolder, FitResult], tmp_path: Path, storages_of_a_gpu: None
) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    run = RunFolder.open(tmp_path / "run", settings_of(), "landmark_first", resume=False)
    trained(run, settings_of().training, stop_at=4)
    with pytest.raises(RuntimeError, match="CUDA"):
        torch.load(run.checkpoint(4) / OPTIMISER_FILE)
    torch.serialization._package_registry[:] = torch.serialization._package_registry[1:]
    assert trained(run, settings_of().training).losses == whole[1].losses[4:]


# What is on the disk before the rename


def test_files_and_folders_reach_the_disk_before_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        events.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def renamed(source: Any, target: Any) -> None:
        events.append(("rename", str(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    with atomic_path(tmp_path / "a") as path:
        path.write_text("a")
        first = str(path)
    assert events == [("sync", first), ("rename", str(tmp_path / "a")), ("sync", str(tmp_path))]
    events.clear()
    Folder(tmp_path).write("b", b"b")
    assert [kind for kind, _ in events] == ["sync", "rename", "sync"]
    events.clear()
    with atomic_folder(tmp_path / "c") as folder:
        (folder / "d").mkdir()
        (folder / "d" / "e").write_text("e")
        temporary = str(folder)
    before = [path for kind, path in events[: events.index(("rename", str(tmp_path / "c")))]]
    assert set(before) == {temporary, f"{temporary}/d", f"{temporary}/d/e"} and before[-1] == temporary
    assert events[-1] == ("sync", str(tmp_path))


def test_the_umask_is_followed_and_never_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.umask(0o027)
    try:
        monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("the umask belongs to the whole process"))
        with atomic_path(tmp_path / "a") as path:
            path.unlink()  # as writers do that have temporary files of their own
            path.touch(0o600)
        Folder(tmp_path).write("b", b"")
        with atomic_folder(tmp_path / "c"):
            pass
    finally:
        monkeypatch.undo()
        os.umask(before)
    modes = [(tmp_path / name).stat().st_mode & 0o777 for name in "abc"]
    assert modes == [0o640, 0o640, 0o750]


@pytest.mark.parametrize("what", ["checkpoint", "component"])
def test_a_full_disk_is_one_line_and_leaves_no_part(
    whole: tuple[RunFolder, FitResult], tmp_path: Path, what: str
) -> None:
    """A limit of the size of files stands for the disk. torch and safetensors raise errors of their own."""
    shutil.copytree(whole[0].path, tmp_path / "run")
    network = Liplet(16, 4)

    def write() -> None:
        if what == "checkpoint":
            with RunFolder(tmp_path / "run").saving(8, {}) as folder:
                TorchEngine(network, settings_of().training).save(folder)
        else:
            save_component(tmp_path / "pipeline", "lips", settings_of(), network.save_pretrained, {})

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
    try:
        with pytest.raises(TccpError, match="the disk is full; make room or choose another folder") as error:
            write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(error.value)
    assert RunFolder(tmp_path / "run").latest() == 6
    folders = {"checkpoint": tmp_path / "run" / "checkpoints", "component": tmp_path / "pipeline"}
    assert not [path for path in folders[what].iterdir() if path.name.startswith(".") or "8" in path.name]


# Checkpoints of a cluster


def rays_checkpoint(run: Path, step: int, ranks: int = 2) -> str:
    name = f"step-{step:07d}-aaaaaa"
    for rank in range(ranks):
        part = run / f"part-{rank}"
        (part / "deepspeed").mkdir(parents=True)
        (part / "deepspeed" / f"rank-{rank}.pt").write_bytes(os.urandom(100))
        if rank == 0:
            (part / "progress.json").write_text('{"steps": 4}')
        write_contents(part, rank, ranks)
        shutil.copytree(part, run / name, dirs_exist_ok=True)
        shutil.rmtree(part)
    return name


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", ["deepspeed/rank-1.pt", "contents-1.json", "contents-0.json", "progress.json"])
def test_a_damaged_checkpoint_of_a_cluster_leaves_rays_record(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, file: str, damage: str
) -> None:
    run = Folder(tmp_path)
    names = [rays_checkpoint(tmp_path, step) for step in (4, 8, 12)]
    results = [{"checkpoint_dir_name": name, "metrics": {}} for name in names]
    record = {
        "checkpoint_results": [results[2], results[0], results[1]],  # with --keep-best, by their scores
        "checkpoint_report_indices": [2, 0, 1],
        "latest_checkpoint_result": results[2],
        "validated_checkpoint_dir_names": names,
    }
    run.write(RAYS_RECORD, json.dumps(record).encode())
    assert newest_step(run) == 12
    DAMAGE[damage](tmp_path / names[2] / file)
    with caplog.at_level(logging.WARNING, "tccp"):
        remove_unfinished(run)
    assert f"{names[2]} is damaged" in caplog.text and f"goes on from {names[1]}" in caplog.text
    left = json.loads(run.read(RAYS_RECORD))
    assert left["latest_checkpoint_result"] == results[1] and newest_step(run) == 8
    assert left["checkpoint_results"] == results[:2] and left["checkpoint_report_indices"] == [0, 1]
    assert left["validated_checkpoint_dir_names"] == names[:2]
    assert run.subfolders() == set(names[:2])


def test_sizes_of_a_checkpoint_at_a_url_are_compared() -> None:
    run = Folder("memory://tccp-tests/damaged")
    run.write("step-0000004-aaaaaa/ema.pt", b"123")
    listed = {"ranks": 1, "files": {"ema.pt": {"bytes": 4, "sha256": ""}}}
    run.write("step-0000004-aaaaaa/contents-0.json", json.dumps(listed).encode())
    result = {"checkpoint_dir_name": "step-0000004-aaaaaa", "metrics": {}}
    record = {"checkpoint_results": [result], "checkpoint_report_indices": [0], "latest_checkpoint_result": result}
    run.write(RAYS_RECORD, json.dumps(record).encode())
    remove_unfinished(run)
    assert json.loads(run.read(RAYS_RECORD))["latest_checkpoint_result"] is None
    run.remove("")


def test_damaged_liplets_are_trained_anew(tmp_path: Path) -> None:
    Liplet(16, 4).save_pretrained(tmp_path / "fold_0")
    assert _is_complete(tmp_path / "fold_0") and not _is_complete(tmp_path / "fold_1")
    truncate(next((tmp_path / "fold_0").glob("*.safetensors")))
    assert not _is_complete(tmp_path / "fold_0")
    (tmp_path / "folds.json").write_text('{"version')
    assert _read_json(tmp_path / "folds.json") is None and _read_json(tmp_path / "none.json") is None


# Divergence


def test_a_run_that_diverged_goes_on_with_a_lower_rate_and_says_so(
    whole: tuple[RunFolder, FitResult], tmp_path: Path
) -> None:
    run = RunFolder.open(tmp_path / "run", settings_of(), "landmark_first", resume=False)
    with pytest.raises(NonFiniteLoss) as caught:
        trained(run, settings_of().training, nan_at=5)
    assert str(caught.value) == (
        "the loss is nan at step 5; the checkpoint at step 4 is kept; go on with --resume and a lower "
        "training.learning_rate (it is 0.1), such as --set training.learning_rate=0.033, or a lower "
        f"training.gradient_clip (it is {settings_of().training.gradient_clip or 'off'})"
    )
    lower = settings_of(training__learning_rate=0.033)
    again = RunFolder.open(run.path, lower, "landmark_first", resume=True)
    assert trained(again, lower.training).losses[0] == whole[1].losses[4]
    (change,) = again.changes
    assert (change["component"], change["at_step"]) == ("landmark_first", 4)
    assert change["settings"] == {"training.learning_rate": {"was": 0.1, "is": 0.033}}
    assert change["git_commit"] and change["command"]
    rates, usual = (np.array([rate for _, rate in read_metrics(one, "learning_rate")]) for one in (run, whole[0]))
    np.testing.assert_allclose(rates / usual, [1] * 4 + [0.33] * 2, rtol=1e-9)
    # The changed settings are now the run's own.
    assert RunFolder.open(run.path, lower, "landmark_first", resume=True).changes == [change]
    assert len(RunFolder.open(run.path, settings_of(), "landmark_first", resume=True).changes) == 2


def test_a_check_of_a_run_records_nothing(tmp_path: Path) -> None:
    run = RunFolder.open(tmp_path / "run", settings_of(), "autoencoder", resume=False)
    before = {path.name: path.read_bytes() for path in run.path.iterdir()}
    other = settings_of(autoencoder__learning_rate=1e-5, training__learning_rate=1e-5, lips__liplet_learning_rate=1e-5)
    assert RunFolder.check(run.path, other, "autoencoder", resume=True)
    assert {path.name: path.read_bytes() for path in run.path.iterdir()} == before
    assert not RunFolder.check(tmp_path / "none", other, "autoencoder", resume=True)
    again = RunFolder.open(run.path, other, "autoencoder", resume=True)
    (change,) = again.changes  # the networks' rate is not the auto-encoder's
    assert list(change["settings"]) == ["autoencoder.learning_rate"]


def test_settings_that_differ_are_all_named_with_all_their_digits(tmp_path: Path) -> None:
    before = settings_of(network__dropout=0.12345678901, training__adam_betas=(0.9, 0.999))
    RunFolder.open(tmp_path / "run", before, "face_first", resume=False)
    after = settings_of(network__dropout=0.12345678902, training__adam_betas=(0.9, 0.99))
    with pytest.raises(TccpError) as caught:
        RunFolder.open(tmp_path / "run", after, "face_first", resume=True)
    assert "network.dropout was 0.12345678901 and is 0.12345678902 now" in str(caught.value)
    assert "training.adam_betas was [0.9, 0.999] and is [0.9, 0.99] now" in str(caught.value)


def test_the_message_names_the_rate_of_the_component() -> None:
    class Broken:
        def batch(self, step: int, rank: int, num_ranks: int) -> PictureBatch:
            side = settings.picture_px
            return PictureBatch(np.zeros((8, side, side, 3), np.uint8), np.arange(8))

    settings = small(**{"autoencoder.batch_size": 8, "autoencoder.kl_weight": 1e300, "autoencoder.max_steps": 2})
    with pytest.raises(NonFiniteLoss, match=r"a lower autoencoder\.learning_rate \(it is .*--set autoencoder\."):
        fit_autoencoder(settings, Broken(), None)
    own = load_settings("toy", ["variant_overrides.face_first.training.learning_rate=0.5"])
    assert _keys_of("face_first", own).learning_rate == "variant_overrides.face_first.training.learning_rate"
    assert _keys_of("face_first", own).gradient_clip == "training.gradient_clip"
    assert _keys_of("face_sequence", own).learning_rate == "training.learning_rate"
    lips = dataclasses.replace(
        LipletSamples(
            np.full((4, 80, 16), np.nan, np.float32),
            np.zeros((4, 16, 16, 3), np.uint8),
            np.array([(0, 1)] * 4),
            np.zeros((1, 16, 16, 3), np.uint8),
        )
    )
    with pytest.raises(NonFiniteLoss, match=r"liplet is nan at step 0; give a lower lips\.liplet_learning_rate"):
        train_liplet(lips, small(**{"lips.size_px": 16, "lips.liplet_channels": 4}).lips, 0)
