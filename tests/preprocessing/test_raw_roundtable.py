"""Preprocessing of RoundTable as raw footage: reduced runs of the benchmarks that measure it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


def benchmark(name: str, *arguments: object) -> dict[str, Any]:
    command = [sys.executable, f"benchmarks/{name}.py", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}  # the package need not be installed
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_preprocessing_recovers_cuts_talkers_and_landmarks_of_raw_roundtable(shared_weights: Path) -> None:
    """Faces of 42 px. The full benchmark has 12 scenes in four sizes."""
    size = ("--sizes", "256x192", "--scenes", 4, "--scene-s", 2.4)
    (found,) = benchmark("raw_roundtable", *size, "--weights", shared_weights)["sizes"]
    assert found["cut_finder"] == {"cuts": 3, "found": 3, "missed": 0, "false": 0}
    assert found["clips_across_cuts"] == 0
    assert found["kept_share"] > 0.8
    assert found["talker_share"] >= 0.95
    assert found["frames_kept"] + sum(found["left_out"].values()) == found["frames"]
    assert found["landmark_error"]["median"] < 0.09 and found["landmark_error"]["p95"] < 0.27
    assert found["landmark_error_without_offset"]["median"] < 0.06


@pytest.mark.slow
def test_memory_is_constant_and_cpu_time_linear_in_film_length(shared_weights: Path) -> None:
    """5 s against 10 s; the full benchmark takes 1 min against 10. Start-up costs weigh more on the short run."""
    options = ("--films", 0, "--short-s", 5, "--times", 2)
    lengths = benchmark("preprocess", *options, "--weights", shared_weights)["lengths"]
    short, long = lengths["runs"]["short"], lengths["runs"]["long"]
    assert (short["film_seconds"], long["film_seconds"]) == (5, 10)
    assert short["clip_seconds"] > 2.5 and long["clip_seconds"] > 5
    assert {step["name"] for step in long["steps"]} >= {"look"}
    assert lengths["peak_ratio"] < 1.2
    assert lengths["cpu_per_film_second_ratio"] < 1.4  # 2 if it grew with the square; the clock of the CPU varies
