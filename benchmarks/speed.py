"""Speed of generation against an earlier commit: `python benchmarks/speed.py --against COMMIT --out FILE.json`.

Runs `tccp generate` of this tree and of the commit (in a git worktree of its own) in turns, in new processes with
default settings, on RoundTable films of two lengths. The difference of the two is what the additional frames cost; the
rest is the start. Repeats it beside other busy processes. Compares ratios of one run only, because machines differ.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SHORT_S, LONG_S = 0.32, 4.32  # one window and one frame; a hundred frames more
MORE_FRAMES = round((LONG_S - SHORT_S) * 25)
_SPIN = "while True: pass"


class Cost(NamedTuple):
    """Of one command. peak_mib: of its largest process."""

    wall_s: float
    cpu_s: float
    peak_mib: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--against", default="431bd84", help="commit to compare with")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--busy", type=int, nargs="*", default=[0, 2, 4], help="numbers of busy processes beside it")
    parser.add_argument("--cores", type=int, nargs="*", default=[2, 1], help="numbers of cores to run on, when quiet")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place, _worktree(given.against, Path(place) / "before") as before:
        films = {seconds: _film(Path(place), seconds) for seconds in (SHORT_S, LONG_S)}
        trees = {"before": before, "now": ROOT}
        rows = [_measured(trees, films, given.turns, 0, cores) for cores in given.cores]
        rows += [_measured(trees, films, 1, busy, max(given.cores)) for busy in given.busy if busy]
    result: dict[str, Any] = {
        "before": given.against,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "steps": "as in the packaged weights",
        "rows": rows,
    }
    print(json.dumps(result, indent=2))
    if given.out is not None:
        given.out.write_text(json.dumps(result, indent=2) + "\n")


def _measured(trees: dict[str, Path], films: dict[float, Path], turns: int, busy: int, cores: int) -> dict[str, Any]:
    costs: dict[str, list[tuple[Cost, Cost]]] = {name: [] for name in trees}
    with _busy(busy):
        for _ in range(turns):
            for name, tree in trees.items():
                short, long = (_cost(tree, film, cores) for film in films.values())
                costs[name].append((short, long))
    row: dict[str, Any] = {"busy_processes": busy, "cores": cores}
    for name, pairs in costs.items():
        row[name] = {
            "wall_ms_per_frame": _median(1000 * (long.wall_s - short.wall_s) / MORE_FRAMES for short, long in pairs),
            "cpu_ms_per_frame": _median(1000 * (long.cpu_s - short.cpu_s) / MORE_FRAMES for short, long in pairs),
            "short_film_wall_s": _median(short.wall_s for short, _ in pairs),
            "short_film_cpu_s": _median(short.cpu_s for short, _ in pairs),
            "peak_mib": _median(long.peak_mib for _, long in pairs),
        }
    row["times_as_fast"] = {
        what: round(row["before"][what] / row["now"][what], 2)
        for what in ("wall_ms_per_frame", "cpu_ms_per_frame", "short_film_wall_s", "short_film_cpu_s")
    }
    row["peak_ratio"] = round(row["now"]["peak_mib"] / row["before"]["peak_mib"], 2)
    print(json.dumps(row), file=sys.stderr, flush=True)
    return row


def _median(values: Iterator[float]) -> float:
    return round(statistics.median(values), 2)


def _cost(tree: Path, film: Path, cores: int) -> Cost:
    """The cost of generating a film into itself, with its truth file, in a process that may use so many cores."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "TCCP_", "PYTHON"))
    }
    command: Sequence[str | Path] = (
        *(sys.executable, "-m", "tccp.cli", "generate", "--scene", film, "--audio", film, "--identity", film),
        *("--truth", "--weights", "toy", "--out", film.with_name("out.mp4"), "--device", "cpu"),
    )
    allowed = sorted(os.sched_getaffinity(0))[:cores]
    began = time.monotonic()
    with subprocess.Popen(
        command,
        cwd=tree,
        env=environment | {"PYTHONPATH": str(tree)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: os.sched_setaffinity(0, allowed),
    ) as process:
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, f"generation in {tree} failed"
    return Cost(time.monotonic() - began, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)


def _film(place: Path, seconds: float) -> Path:
    from tccp.roundtable import write_clips

    folder = place / f"{seconds:g}"
    folder.mkdir()
    (film,) = write_clips(folder, 1, seconds, seed=5)
    return film


@contextmanager
def _busy(count: int) -> Iterator[None]:
    processes = [subprocess.Popen([sys.executable, "-c", _SPIN]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


@contextmanager
def _worktree(commit: str, place: Path) -> Iterator[Path]:
    subprocess.run(["git", "worktree", "add", "-q", "--detach", place, commit], cwd=ROOT, check=True)
    try:
        yield place
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", place], cwd=ROOT, check=True)


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    main()
