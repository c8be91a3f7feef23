"""Measures what continuous batching gives the server: `python benchmarks/serve.py --out docs/serve.json`.

Three policies play the same traces of jobs (Poisson arrivals, mixed lengths and steps, some with guidance) through the
server's store, conductor and stage loops: continuous batching; batches whose windows begin and end together; and no
batching. They take turns. Load 1 is the capacity of continuous batching: the windows
per second that it makes while jobs wait all the time. A run takes some 8 minutes on 2 cores.

`--measure-only` measures step curves and nothing else, also on a GPU and for other weights; benchmarks/serve_scale.py
takes its output.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from serve_scale import TraceJob, percentile, poisson_trace, windows_of
from speed_workers import ROOT, Worker

POLICIES = {"continuous": True, "request level": False, "none": True}
LOADS = (0.5, 0.9, 1.2)
SLOTS = 16
"""Jobs at once: enough that batches are full where jobs wait."""


def waiting(trace: list[TraceJob]) -> list[dict[str, Any]]:
    """The same jobs, all there from the start."""
    return [asdict(job) | {"arrival_s": 0.0} for job in trace]


def summary(runs: list[dict[str, Any]]) -> dict[str, float]:
    latencies = sorted(latency for run in runs for latency in run["latencies_s"])
    return {
        "windows_s": round(statistics.median(run["windows_s"] for run in runs), 3),
        "windows_per_cpu_s": round(statistics.median(run["windows"] / run["cpu_s"] for run in runs), 3),
        "p50_s": round(percentile(latencies, 50), 2),
        "p95_s": round(percentile(latencies, 95), 2),
        "rows_per_evaluation": round(statistics.mean(run["rows_per_evaluation"] for run in runs), 2),
    }


def _say(what: str, runs: list[dict[str, Any]]) -> None:
    print(f"{what}: {summary(runs)}", file=sys.stderr, flush=True)


def measure(given: argparse.Namespace) -> dict[str, Any]:
    plain = {"weights": given.weights, "device": given.device}
    with Worker("serve_worker.py", ROOT) as worker:
        networks = worker("networks", **plain, longest_step_s=given.longest_step)
        found: dict[str, Any] = {"weights": given.weights, "cores": os.cpu_count(), "networks": networks}
        if given.measure_only:
            return found
        limit = given.limit or max(networks["landmark_limit"], networks["face_limit"])
        found |= {"limit": limit, "slots": SLOTS, "load_average_at_start": round(os.getloadavg()[0], 2)}
        limits = {name: 1 if name == "none" else limit for name in POLICIES}
        worker("record", **plain, limit=max(2, limit))

        def play(name: str, trace: list[dict[str, Any]], during_s: float | None = None) -> dict[str, Any]:
            own = {"limit": limits[name], "continuous": POLICIES[name], "slots": SLOTS}
            return worker("play", **plain, **own, trace=trace, during_s=during_s)

        # Enough jobs that the last ones, with fewer beside them, count little.
        jobs = poisson_trace(given.calibration_jobs, 1.0, seed=0)
        found["calibration_trace"] = waiting(jobs)
        play("continuous", found["calibration_trace"][:3])  # threads and caches are warm from then on
        found["calibration"] = {}
        for name in POLICIES:
            found["calibration"][name] = play(name, found["calibration_trace"])
            _say(f"all jobs waiting, {name}", [found["calibration"][name]])
        capacity = found["capacity_windows_s"] = found["calibration"]["continuous"]["windows_s"]
        found["loads"] = []
        for number, load in enumerate(given.loads):
            rate = load * capacity / statistics.mean(windows_of(job) for job in poisson_trace(10_000, 1.0, seed=1))
            trace = poisson_trace(given.jobs, rate, seed=2 + number)
            jobs_given = [asdict(job) for job in trace]
            runs: dict[str, list[dict[str, Any]]] = {name: [] for name in POLICIES}
            for turn in range(given.turns):
                names = list(POLICIES)
                for name in names[turn % 3 :] + names[: turn % 3]:
                    runs[name].append(play(name, jobs_given, trace[-1].arrival_s))
                    _say(f"load {load}, {name}", runs[name][-1:])
            found["loads"].append(
                {
                    "load": load,
                    "trace": jobs_given,
                    "policies": {name: summary(own) for name, own in runs.items()},
                    "runs": runs,
                }
            )
        return found


def table(found: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "| load | batching | windows/s | p50, s | p95, s | rows per evaluation |",
        "|--:|:--|--:|--:|--:|--:|",
    ]
    for part in found["loads"]:
        for name, row in part["policies"].items():
            figures = (f"{row[key]:.1f}" for key in ("windows_s", "p50_s", "p95_s", "rows_per_evaluation"))
            lines.append(f"| {part['load']} | {name} | {' | '.join(figures)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--weights", default="toy")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--measure-only", action="store_true", help="only the step curves")
    parser.add_argument("--longest-step", type=float, default=0.5, help="seconds that an evaluation may take")
    parser.add_argument("--limit", type=int, help="rows in one evaluation; default: from the measured step times")
    parser.add_argument("--loads", type=float, nargs="+", default=LOADS)
    parser.add_argument("--jobs", type=int, default=24, help="in each run")
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--calibration-jobs", type=int, default=16)
    given = parser.parse_args()
    found = measure(given)
    text = json.dumps(found, indent=1) + "\n"
    if given.out:
        given.out.write_text(text, encoding="utf-8")
    print(text if given.measure_only else table(found))


if __name__ == "__main__":
    main()
