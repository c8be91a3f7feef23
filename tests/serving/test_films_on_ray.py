"""`ray_jobs/generate.py`: the films of a list, made by actors."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny

from tccp.roundtable import identity_path

pytest.importorskip("ray.data")
pytest_plugins = ["tiny_fixtures"]
pytestmark = [pytest.mark.cluster, pytest.mark.slow]


def test_films_of_a_list_equal_those_of_generate_and_are_made_once(film: Path, weights: Path, tmp_path: Path) -> None:
    listed, out = tmp_path / "list.csv", tmp_path / "out"
    names = ["scene", "audio", "identity", "identity_box", "truth", "seed", "lossless"]
    rows = [[film, film, identity_path(film), "whole", "true", seed, "true"] for seed in (1, 2)]
    rows.append([tmp_path / "missing.mp4", film, identity_path(film), "whole", "true", 3, "true"])
    with listed.open("w", newline="") as file:
        csv.writer(file).writerows([names, *rows])
    command = [sys.executable, str(tiny.ROOT / "ray_jobs" / "generate.py"), str(listed), "--out", str(out)]
    command += ["--weights", str(weights), "--batch", "1", "--device", "cpu", "--workers", "2", "--json"]
    first = subprocess.run(command, capture_output=True, text=True, check=False)
    assert first.returncode == 1, first.stderr  # one film was not made
    counts = json.loads(first.stdout)
    assert (counts["listed"], counts["made"], counts["made_before"]) == (3, 2, 0)
    assert "missing.mp4" in counts["not_made"][0]
    for number, seed in enumerate((1, 2), 1):
        tiny.generated(film, weights, tmp_path / "one.mp4", seed=seed, batch=1)
        np.testing.assert_array_equal(tiny.pictures(out / f"{number:04d}.mp4"), tiny.pictures(tmp_path / "one.mp4"))
    second = subprocess.run(command, capture_output=True, text=True, check=False)
    counts = json.loads(second.stdout)
    assert (counts["made"], counts["made_before"]) == (0, 2)
