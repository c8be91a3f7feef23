"""benchmarks/serve.py at tiny sizes: all policies make all windows, and the simulation can play its record."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from benchmarks.serve_scale import TraceJob, check, check_table, windows_of
from tccp.config import override
from tccp.inference.pipeline_folder import write_untrained


@pytest.mark.slow
def test_batching_is_measured_and_simulated(tmp_path: Path) -> None:
    weights, out = tmp_path / "weights", tmp_path / "serve.json"
    write_untrained(weights, override(tiny.SETTINGS, {"window": 8}))
    options = {"weights": weights, "limit": 3, "loads": 0.9, "jobs": 4, "calibration-jobs": 3, "out": out}
    command = [sys.executable, "benchmarks/serve.py", *(f"--{name}={value}" for name, value in options.items())]
    environment = os.environ | {"PYTHONPATH": str(tiny.ROOT)}
    done = subprocess.run(
        command, cwd=tiny.ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    record = json.loads(out.read_text())
    (part,) = record["loads"]
    windows = sum(windows_of(TraceJob(**job)) for job in part["trace"])
    for runs in part["runs"].values():
        assert [run["windows"] for run in runs] == [windows]
        assert len(runs[0]["latencies_s"]) == len(part["trace"])
    steps = record["calibration"]["none"]["steps"]
    assert {size for sizes in steps.values() for size in sizes} <= {"1", "2"}, "two rows: a window with guidance"
    assert done.stdout.count("\n| ") == 3
    compared = check(record)
    assert [row["policy"] for row in compared] == list(part["policies"])
    assert all(row["windows_s"]["simulated"] > 0 < row["p50_s"]["simulated"] for row in compared)
    assert check_table(compared).count("\n") == 4
