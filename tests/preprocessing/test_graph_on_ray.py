"""The graph on Ray Data, and runs killed and resumed, give the same table as one uninterrupted process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from preprocessing.frame_progress import FrameProgress, ReelKey
from preprocessing.graph import Pools, clip_rows, pools_for
from preprocessing.lip_step import AddLips, LipWork, lip_work
from preprocessing.plan import make_plan
from preprocessing.run import preprocess
from preprocessing.sources.listing import list_sources
from preprocessing.worker_frames import SentFrames, frames_of_workers
from tccp import roundtable
from tccp.clips.clip_table import ClipTable
from tccp.clips.order import shuffled
from tccp.clips.windows import windows
from tccp.cluster import CLUSTER_MAX
from tccp.config import load_settings, toy
from tccp.errors import TccpError
from tccp.models.autoencoder import PictureAutoencoder
from tccp.progress import ProgressEvent, Tasks
from tccp.training.latent_cache import LatentCache
from tccp.training.lip_folds import lip_pictures, train_liplets

ROOT = Path(__file__).resolve().parent.parent.parent
TOY = toy()
SHORT = {"max_clip_s": 1.4}


def rows_of(out: Path) -> list[dict[str, Any]]:
    with ClipTable(out) as opened:
        return opened.rows(opened.ids).to_pylist()


@pytest.fixture(scope="module")
def footage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven films of two seconds, and a text file with a film's suffix."""
    folder = tmp_path_factory.mktemp("footage")
    roundtable.write_clips(folder, 7, 2.0, seed=5, width=128, height=96)
    (folder / "none.mp4").write_text("no film")
    return folder


@pytest.fixture(scope="module")
def whole(footage: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The table of one uninterrupted process."""
    out = tmp_path_factory.mktemp("whole") / "out"
    preprocess([footage], out, make_plan(TOY.picture_px, "truth", **SHORT))
    return out


SMALL_LIPS = load_settings("toy", ["lips.size_px=16", "lips.liplet_channels=8", "lips.liplet_steps=3"])


@pytest.fixture(scope="module")
def liplets(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> LipWork:
    folder = tmp_path_factory.mktemp("liplets") / "lips"
    with ClipTable(whole) as table:
        return lip_work(SMALL_LIPS.lips, train_liplets(table, SMALL_LIPS, folder, seed=0))


def lip_files(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted((out / "lips").rglob("*.npy"))}


# Killed and resumed


def command(footage: Path, out: Path, *options: str) -> list[str]:
    return [
        *(sys.executable, "-m", "tccp.cli", "preprocess", str(footage), str(out)),
        *("--backend", "truth", "--max-clip-s", str(SHORT["max_clip_s"]), *options),
    ]


def parts_in(out: Path) -> int:
    return len(list(out.glob("clips/*/*.parquet")))


def kill_after(footage: Path, out: Path, parts: int, *options: str) -> bool:
    """Kills a run with SIGKILL once it has written this many parts; returns whether it was still running."""
    run = subprocess.Popen(
        command(footage, out, *options),
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 240
    while parts_in(out) < parts and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    running = run.poll() is None
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    return running


@pytest.mark.parametrize("parts", [1, 4])
def test_killed_and_resumed_run_gives_the_table_of_an_uninterrupted_run(
    footage: Path, whole: Path, tmp_path: Path, parts: int
) -> None:
    out = tmp_path / "out"
    assert kill_after(footage, out, parts)
    assert not (out / "index.parquet").exists()
    left = parts_in(out)
    assert parts <= left < 7
    report = preprocess([footage], out, make_plan(TOY.picture_px, "truth", **SHORT))
    assert {step.name: step.items for step in report.steps}["render"] == 7 - left  # no part is rendered twice
    assert rows_of(out) == rows_of(whole)
    assert (out / "index.parquet").read_bytes() == (whole / "index.parquet").read_bytes()
    assert not [path for path in out.rglob(".*") if path.is_file() and path.stat().st_mtime > time.time()]


# On Ray


@pytest.mark.cluster
@pytest.mark.slow
def test_ray_gives_the_same_table_and_lips_as_one_process(
    ray_with_two_cpus: Any, footage: Path, whole: Path, liplets: LipWork, tmp_path: Path
) -> None:
    out, plan = tmp_path / "out", make_plan(TOY.picture_px, "truth", **SHORT)
    report = preprocess([footage], out, plan, workers=2, lips=liplets)
    assert rows_of(out) == rows_of(whole)
    assert (out / "index.parquet").read_bytes() == (whole / "index.parquet").read_bytes()
    assert report.reasons == {"not_media": 1} and len(report.sources) == 8
    again = preprocess([footage], out, plan, workers=2)
    assert "render" not in {step.name for step in again.steps}
    preprocess([footage], tmp_path / "here", plan, lips=liplets)
    assert lip_files(out) == lip_files(tmp_path / "here") != {}


@pytest.mark.cluster
@pytest.mark.slow
def test_frames_of_workers_reach_the_driver_while_they_work(ray_with_two_cpus: Any) -> None:
    def work(sent: SentFrames, reel: ReelKey) -> None:
        sent.begin(reel)
        for _ in range(30):
            sent.on_frame()
        sent.begin((9, 9))  # sends the rest

    events: list[ProgressEvent] = []
    with frames_of_workers(FrameProgress(Tasks(events.append), "frames", {0: 0})) as sent:
        task = ray_with_two_cpus.remote(num_cpus=0.5)(work)
        ray_with_two_cpus.get([task.remote(sent, (0, start)) for start in (0, 30)])
        deadline = time.monotonic() + 20
        while events[-1].done < 30 and time.monotonic() < deadline:
            time.sleep(0.1)
    assert events[-1].done == 30


@pytest.mark.cluster
@pytest.mark.slow
def test_an_output_of_one_machine_is_refused_where_machines_may_be_added(
    ray_with_two_cpus: Any, footage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cluster has one machine now. Those that its autoscaler adds would write to folders of their own."""
    monkeypatch.setenv(CLUSTER_MAX, "CPU=64")
    plan = make_plan(TOY.picture_px, "truth", **SHORT)
    with pytest.raises(TccpError, match=r"output .* is a folder of one machine, and the cluster .* can grow to, 2"):
        preprocess([footage], tmp_path / "out", plan, workers=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.cluster
@pytest.mark.slow
def test_windows_streamed_from_film_equal_windows_from_the_table(
    ray_with_two_cpus: Any, footage: Path, whole: Path, liplets: LipWork
) -> None:
    from preprocessing.graph import clip_dataset, in_order, table_dataset, window_dataset, with_lips

    plan = make_plan(TOY.picture_px, "truth", **SHORT)
    listing = list_sources([footage])
    with in_order():
        streamed, stored = (
            list(
                window_dataset(with_lips(clips, liplets), SMALL_LIPS, 8, 7, jitters=(0, 1)).iter_batches(
                    batch_size=4, batch_format="numpy"
                )
            )
            for clips in (clip_dataset(listing, plan, workers=2), table_dataset(whole))
        )
    assert len(streamed) == len(stored) > 5
    for one, other in zip(streamed, stored, strict=True):
        assert one["lips"].shape[1:] == (8, 16, 16, 3)
        for name in other:
            np.testing.assert_array_equal(one[name], other[name])
    plain = windows(pa.concat_tables(clip_rows(listing, plan)), SMALL_LIPS, 8, 7, jitters=(0, 1))
    np.testing.assert_array_equal(np.concatenate([batch["face"] for batch in streamed]), plain["face"])


# Lip references


def test_lip_pictures_are_stored_where_training_reads_them(footage: Path, liplets: LipWork, tmp_path: Path) -> None:
    out, plan = tmp_path / "out", make_plan(TOY.picture_px, "truth", **SHORT)
    report = preprocess([footage], out, plan, lips=liplets)
    sources = liplets.open()
    with ClipTable(out) as table:
        assert lip_files(out).keys() == {f"lips/{liplets.hash}/{clip_id}.npy" for clip_id in table.ids}
        cache = LatentCache(
            tmp_path / "storage", table, SMALL_LIPS, PictureAutoencoder.from_settings(SMALL_LIPS.autoencoder), sources
        )
        assert cache.lips is not None and cache.lips.write(table) == 0, "training must reuse the stored lips"
        for clip in table:
            expected = lip_pictures(clip, sources.for_clip(clip.clip_id, clip.source_hash))
            np.testing.assert_array_equal(cache.lips.read(clip.clip_id), expected)
        rows = table.rows(table.ids)
        assert AddLips(liplets, str(out))(rows).equals(AddLips(liplets)(rows)), "stored and computed lips must be equal"
    assert report.settings["lips"] == {"source": "liplet", "hash": liplets.hash}
    assert {step.name: step.items for step in report.steps}["lips"] == report.clips

    first = lip_files(out)
    os.remove(out / next(iter(first)))
    again = preprocess([footage], out, plan, lips=liplets)
    assert lip_files(out) == first
    assert {step.name: step.items for step in again.steps}["lips"] == 1, "only the missing lips must be computed"
    preprocess([footage / "roundtable_5_0000.mp4"], out, plan, lips=liplets)
    with ClipTable(out) as table:
        assert len(lip_files(out)) == len(table.ids) < len(first), "lips of removed clips must be deleted"


def test_unusable_lip_weights_are_refused(liplets: LipWork, tmp_path: Path) -> None:
    with pytest.raises(TccpError, match=r"lips\.source=none: choose a source"):
        lip_work(load_settings("toy", ["lips.source=none"]).lips, liplets.weights)
    with pytest.raises(TccpError, match="no cross-fitted liplets"):
        lip_work(SMALL_LIPS.lips, tmp_path)
    with pytest.raises(TccpError, match="the run began with 0123: give every machine the same weights"):
        replace(liplets, hash="0123").open()


def test_shuffled_order_is_equal_for_film_and_table_and_differs_by_epoch(footage: Path, whole: Path) -> None:
    def ids(rows: Any, epoch: int, buffer: int) -> list[tuple[int, int]]:
        batches = (windows(row, TOY, 8, 7) for row in rows)
        pairs = (pair for b in batches for pair in zip(b["clip_hash"].tolist(), b["start_frame"].tolist(), strict=True))
        return list(shuffled(pairs, seed=1, epoch=epoch, buffer=buffer))

    plan = make_plan(TOY.picture_px, "truth", **SHORT)
    with ClipTable(whole) as table:
        stored = [table.rows([clip_id]) for clip_id in table.ids]
    first = ids(stored, 0, 16)
    assert ids(clip_rows(list_sources([footage]), plan), 0, 16) == first
    assert ids(stored, 1, 16) != first and sorted(ids(stored, 1, 16)) == sorted(first)
    assert ids(stored, 0, 1) != first and len(set(first)) == len(first)


def test_pools_fit_two_cpus_and_grow_with_the_cluster() -> None:
    two = pools_for({"CPU": 2.0}, None, on_gpu=False)
    assert (two.find, two.look, two.cut, two.look_gpus) == (1, 2, 1, 0.0)
    large = pools_for({"CPU": 64.0, "GPU": 4.0}, None, on_gpu=False)
    assert large.look > 32 and large.look_gpus == 0
    gpus = pools_for({"CPU": 64.0, "GPU": 4.0}, None, on_gpu=True)
    assert gpus.look == 4 and gpus.look_gpus == 1
    assert pools_for({"CPU": 1.0}, 8, on_gpu=False).look == 1
    beside = pools_for({"CPU": 2.0}, None, on_gpu=False, held=1.0, later=0.75)  # two ranks, then lips and windows
    assert (beside.find, beside.look, beside.cut) == (1, 1, 1)
    assert beside.scale * (Pools.FIND_CPUS + Pools.LOOK_CPUS + Pools.CUT_CPUS + 0.75) == pytest.approx(1)
    with pytest.raises(TccpError, match=r"has 0\.5 CPUs, preprocessing needs 1: start Ray with more"):
        pools_for({"CPU": 0.5}, None, on_gpu=False)


def test_zero_workers_are_refused(footage: Path, tmp_path: Path) -> None:
    with pytest.raises(TccpError, match="workers 0: give at least 1"):
        preprocess([footage], tmp_path / "out", make_plan(TOY.picture_px, "truth"), workers=0)
    assert not (tmp_path / "out").exists()
