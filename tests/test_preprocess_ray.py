"""The graph on Ray Data, and runs that are killed: the same table as in one process, in one go."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from preprocessing.pipeline import clip_rows, list_sources, pools_for, preprocess
from preprocessing.plan import make_plan
from tccp import roundtable
from tccp.clip import ClipTable
from tccp.config import TccpError, toy
from tccp.data import shuffled, windows

ROOT = Path(__file__).resolve().parent.parent
TOY = toy()
SHORT = {"max_clip_s": 1.4}


def rows_of(out: Path) -> list[dict[str, Any]]:
    with ClipTable(out) as opened:
        return opened.rows(opened.ids).to_pylist()


@pytest.fixture(scope="module")
def footage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven films of two seconds, and a file that is none."""
    folder = tmp_path_factory.mktemp("footage")
    roundtable.write_clips(folder, 7, 2.0, seed=5, width=128, height=96)
    (folder / "none.mp4").write_text("no film")
    return folder


@pytest.fixture(scope="module")
def whole(footage: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The table as one process makes it in one go."""
    out = tmp_path_factory.mktemp("whole") / "out"
    preprocess([footage], out, TOY, "truth", **SHORT)
    return out


# Killed and run again


def command(footage: Path, out: Path, *options: str) -> list[str]:
    return [
        *(sys.executable, "-m", "tccp.cli", "preprocess", str(footage), str(out)),
        *("--backend", "truth", "--max-clip-s", str(SHORT["max_clip_s"]), *options),
    ]


def parts_in(out: Path) -> int:
    return len(list(out.glob("clips/*/*.parquet")))


def kill_after(footage: Path, out: Path, parts: int, *options: str) -> bool:
    """Kills a run with SIGKILL, and all it started, once so many parts are there; whether it was still at work."""
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
    at_work = run.poll() is None
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    return at_work


@pytest.mark.parametrize("parts", [1, 4])
def test_a_killed_run_run_again_gives_the_table_of_one_that_was_not(
    footage: Path, whole: Path, tmp_path: Path, parts: int
) -> None:
    out = tmp_path / "out"
    assert kill_after(footage, out, parts)
    assert not (out / "index.parquet").exists()
    left = parts_in(out)
    assert parts <= left < 7
    report = preprocess([footage], out, TOY, "truth", **SHORT)
    assert {step.name: step.items for step in report.steps}["render"] == 7 - left  # nothing twice
    assert rows_of(out) == rows_of(whole)
    assert (out / "index.parquet").read_bytes() == (whole / "index.parquet").read_bytes()
    assert not [path for path in out.rglob(".*") if path.is_file() and path.stat().st_mtime > time.time()]


# On Ray


@pytest.fixture(scope="module")
def ray_of_two() -> Iterator[Any]:
    ray = pytest.importorskip("ray")
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


@pytest.mark.cluster
@pytest.mark.slow
def test_ray_gives_the_table_of_one_process(ray_of_two: Any, footage: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = preprocess([footage], out, TOY, "truth", workers=2, **SHORT)
    assert rows_of(out) == rows_of(whole)
    assert (out / "index.parquet").read_bytes() == (whole / "index.parquet").read_bytes()
    assert report.reasons == {"not_media": 1} and len(report.sources) == 8
    again = preprocess([footage], out, TOY, "truth", workers=2, **SHORT)
    assert "render" not in {step.name for step in again.steps}


@pytest.mark.cluster
@pytest.mark.slow
def test_windows_straight_from_film_are_those_of_the_table_in_its_order(
    ray_of_two: Any, footage: Path, whole: Path
) -> None:
    from preprocessing.pipeline import clip_dataset, in_order, table_dataset, window_dataset

    plan = make_plan(TOY.picture_px, "truth", **SHORT)
    listing = list_sources([footage])
    with in_order():
        here = [
            list(window_dataset(clips, TOY, 8, 7).iter_batches(batch_size=4, batch_format="numpy"))
            for clips in (clip_dataset(listing, plan, workers=2), table_dataset(whole))
        ]
    streamed, stored = here
    assert len(streamed) == len(stored) > 5
    for one, other in zip(streamed, stored, strict=True):
        for name in other:
            np.testing.assert_array_equal(one[name], other[name])
    plain = windows(pa.concat_tables(clip_rows(listing, plan)), TOY, 8, 7)
    np.testing.assert_array_equal(np.concatenate([batch["face"] for batch in streamed]), plain["face"])


def test_a_shuffled_stream_is_the_same_from_film_and_table_and_another_in_every_epoch(
    footage: Path, whole: Path
) -> None:
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
    with pytest.raises(TccpError, match=r"has 0\.5 CPUs, preprocessing needs 1: start Ray with more"):
        pools_for({"CPU": 0.5}, None, on_gpu=False)


def test_workers_are_at_least_one(footage: Path, tmp_path: Path) -> None:
    with pytest.raises(TccpError, match="workers 0: give at least 1"):
        preprocess([footage], tmp_path / "out", TOY, "truth", workers=0)
    assert not (tmp_path / "out").exists()
