"""Measures whether preprocessing that is killed and started again gives the table of an uninterrupted run.

`python benchmarks/kills.py --trials 10 --out docs/soak/kills.json`: each trial kills `tccp preprocess` (every second
trial on Ray) with SIGKILL at random moments, starts it again until it is done, and compares all rows with an
uninterrupted run. After an interruption, the trials in the work file are not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tccp.clips.clip_table import INDEX, ClipTable
from tccp.files import atomic_path
from tccp.roundtable import write_clips

FILMS, SECONDS, SEED = 12, 2.0, 77
MOST_KILLS = 3


def command(footage: Path, out: Path, on_ray: bool) -> list[str]:
    options = ["--backend", "truth", "--max-clip-s", "1.4", *(["--ray", "--workers", "2"] if on_ray else [])]
    return [sys.executable, "-m", "tccp.cli", "preprocess", str(footage), str(out), *options]


def run(footage: Path, out: Path, on_ray: bool, kill_after_s: float | None = None) -> bool:
    """Runs preprocessing and kills it after `kill_after_s`. Returns whether it ended before that."""
    process = subprocess.Popen(
        command(footage, out, on_ray),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        _, errors = process.communicate(timeout=kill_after_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return False
    if process.returncode:
        raise SystemExit(errors)
    return True


def rows(out: Path) -> list[dict[str, Any]]:
    with ClipTable(out) as table:
        return table.rows(table.ids).to_pylist()


def trial(
    number: int, footage: Path, folder: Path, whole: list[dict[str, Any]], took_s: dict[bool, float]
) -> dict[str, Any]:
    rng, on_ray = random.Random(number), bool(number % 2)
    out = folder / f"trial-{number}"
    moments: list[float] = []
    while len(moments) < MOST_KILLS:
        moment = rng.uniform(0.1, 1.0) * took_s[on_ray]
        started = time.monotonic()
        if run(footage, out, on_ray, moment):
            if moments:
                break
            shutil.rmtree(out)  # it ended before the first kill, which tests nothing: start over
            continue
        moments.append(round(time.monotonic() - started, 2))
    finished = run(footage, out, on_ray)
    found = rows(out)
    shutil.rmtree(out)
    return {"trial": number, "ray": on_ray, "killed_after_s": moments, "equal": finished and found == whole}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--out", type=Path, required=True, help="JSON file; FILE.part.jsonl keeps finished trials")
    given = parser.parse_args()
    part = given.out.with_suffix(".part.jsonl")
    part.parent.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in part.read_text().splitlines()] if part.exists() else []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        footage = folder / "footage"
        write_clips(footage, FILMS, SECONDS, seed=SEED, width=128, height=96)
        took_s: dict[bool, float] = {}
        for on_ray in (False, True):
            started = time.monotonic()
            run(footage, folder / f"whole-{on_ray}", on_ray)
            took_s[on_ray] = time.monotonic() - started
        whole = rows(folder / "whole-False")
        assert (folder / "whole-True" / INDEX).exists() and rows(folder / "whole-True") == whole
        for number in range(len(done), given.trials):
            done.append(trial(number, footage, folder, whole, took_s))
            with part.open("a") as file:
                file.write(json.dumps(done[-1]) + "\n")
            print(json.dumps(done[-1]), file=sys.stderr)
    record = {
        "films": FILMS,
        "rows": len(whole),
        "trials": done,
        "kills": sum(len(row["killed_after_s"]) for row in done),
        "all_equal": all(row["equal"] for row in done),
    }
    with atomic_path(given.out) as temporary:
        temporary.write_text(json.dumps(record, indent=2) + "\n")
    part.unlink()
    print(json.dumps({key: record[key] for key in ("kills", "all_equal")}))
    if not record["all_equal"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
