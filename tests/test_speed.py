"""benchmarks/speed.py and speed_gpu.py at tiny sizes: all parts run, and docs/speed.md can show their records."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import ROOT


def benchmark(script: str, out: Path, *arguments: object) -> dict[str, Any]:
    command = [sys.executable, f"benchmarks/{script}.py", "--tiny", "--out", out, *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(out.read_text())


@pytest.mark.slow
def test_speed_of_this_tree_against_itself(tmp_path: Path) -> None:
    out = tmp_path / "speed.json"
    found = benchmark("speed", out, "--tree", ROOT, "--turns", 1, "--busy", 0, "--limit", 600)

    (film,) = found["films"]
    assert film["before"]["cpu_ms_per_frame"] > 0 and film["now"]["peak_mib"] > 100
    parts = found["stages"]["cpu_ms_per_frame"]
    assert found["stages"]["frames"] == 8
    assert all(parts[name] > 0 for name in ("stage 1", "stage 2", "encode", "decode", "paste", "write", "processes"))
    assert sum(parts.values()) == pytest.approx(found["stages"]["total_cpu_ms_per_frame"], rel=0.01)
    one = found["networks"]["evaluations"]
    assert all(0 < row["share_of_matmul"] < 1.5 for row in one.values())
    assert one["now_recorded_batch_4"]["gflop"] == pytest.approx(4 * one["now_eager_batch_1"]["gflop"], rel=0.05)
    rows = found["paper"]["rows"]
    assert rows["now"]["gflop_per_frame"] == rows["before"]["gflop_per_frame"]  # the same tree
    assert rows["latentsync_guided"]["networks_ms"] == pytest.approx(2 * rows["latentsync"]["networks_ms"], abs=0.2)
    assert rows["musetalk"]["encode_ms"] == 0 < rows["musetalk_encoding"]["encode_ms"]

    text = runpy.run_path(str(ROOT / "benchmarks" / "docs_tables.py"))["speed_tables"](found)
    assert text.count("**") == 8 and "MuseTalk, encoding each frame" in text


@pytest.mark.slow
def test_a_command_that_takes_too_long_is_stopped_and_said_so(tmp_path: Path) -> None:
    found = benchmark(
        "speed", tmp_path / "o.json", "--tree", ROOT, "--turns", 1, "--busy", 1, "--limit", 0.5, "--parts", "films"
    )
    (row,) = found["films"]
    assert row["before"] == row["now"] == {"not_finished_after_s": 0.5}


@pytest.mark.slow
def test_speed_on_a_gpu_runs_on_the_cpu(tmp_path: Path) -> None:
    """Without torch.compile, which takes minutes on a CPU."""
    names = ("fp32_eager_1", "fp32_eager_2")
    found = benchmark("speed_gpu", tmp_path / "gpu.json", "--device", "cpu", "--streams", 2, "--only", *names)
    assert found["cases"].keys() == set(names)
    assert set(found["not_measured"]) == {f"bf16_{way}_{n}" for way in ("eager", "compiled") for n in (1, 2)} | {
        "fp32_compiled_1",
        "fp32_compiled_2",
    }
    for case in found["cases"].values():
        assert case["frames_per_second"] > 0 and case["share_of_matmul"] > 0
