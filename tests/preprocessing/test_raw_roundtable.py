"""RoundTable through preprocessing as raw footage: small doses of the benchmarks that measure it."""

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
    environment = os.environ | {"PYTHONPATH": str(ROOT)}  # whether it is installed or not
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_preprocessing_finds_what_is_in_raw_roundtable(shared_weights: Path) -> None:
    """Faces of 42 px. The full dose has 12 scenes in four sizes."""
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
def test_memory_and_time_of_preprocessing_follow_the_length(shared_weights: Path) -> None:
    """3 s against 6 s; the full dose is one minute against ten. What starting takes makes the short one dearer."""
    doses = ("--films", 0, "--short-s", 3, "--times", 2)
    lengths = benchmark("preprocess", *doses, "--weights", shared_weights)["lengths"]
    short, long = lengths["runs"]["short"], lengths["runs"]["long"]
    assert (short["film_seconds"], long["film_seconds"]) == (3, 6)
    assert short["clip_seconds"] > 1.5 and long["clip_seconds"] > 3
    assert {step["name"] for step in long["steps"]} >= {"look"}
    assert lengths["peak_ratio"] < 1.2
    assert lengths["cpu_per_film_second_ratio"] < 1.15
