"""Speed and memory of `tccp preprocess`: one process and Ray with one and two workers; a short film and a long one.

With --against COMMIT, also one process of that commit's program and of this one, with and without steps that overlap,
in turns. `python benchmarks/preprocess.py` prints JSON. Each run is a separate process, as for users, with an empty
output folder. Ratios compare measurements of the same call. The footage is RoundTable's. It needs the detector's
weights: --weights, or TCCP_WEIGHTS. With the default lengths, the long film takes most of the time.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from speed_workers import ROOT, worktree

from tccp import media
from tccp.config import FPS, git_commit
from tccp.roundtable.reel import plan_shots, write_reel

COMMANDS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "ray_1_worker": ("--workers", "1", "--ray"),
    "ray_2_workers": ("--workers", "2"),
}
"""The options added to `tccp preprocess SOURCE OUT` for each configuration."""
_WIDTH, _HEIGHT = 640, 480
_SHOT_S = 5.0
# Seconds between samples. Reading the memory maps of Ray's processes takes milliseconds each and slows the run down.
_SAMPLE_S, _SAMPLE_RAY_S = 0.25, 1.0


@dataclass(frozen=True)
class Peak:
    """Peak memory of all processes of a command together, in MiB.

    shared_once: shared pages count once (PSS). resident: shared pages count in each process (RSS).
    """

    shared_once: float
    resident: float


class TreeMemory:
    """Samples the memory of a process and its descendants, including orphaned ones, until the process ends."""

    def __init__(self, root: int, every_s: float) -> None:
        self._every_s = every_s
        self._known = {root: _started(root)}
        self._shared_once = self._resident = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample)

    def __enter__(self) -> TreeMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def peak(self) -> Peak:
        return Peak(round(self._shared_once / 1024, 1), round(self._resident / 1024, 1))

    def _sample(self) -> None:
        while not self._stop.wait(self._every_s):
            parents = {pid: parent for pid in _processes() if (parent := _parent(pid)) is not None}
            self._known = {pid: at for pid, at in self._known.items() if at is not None and _started(pid) == at}
            grown = True
            while grown:
                new = [pid for pid, parent in parents.items() if parent in self._known and pid not in self._known]
                self._known |= {pid: _started(pid) for pid in new}
                grown = bool(new)
            sizes = [_memory_kib(pid) for pid in self._known]
            self._shared_once = max(self._shared_once, sum(shared for shared, _ in sizes))
            self._resident = max(self._resident, sum(resident for _, resident in sizes))


def _processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat after the name, which may contain any character; empty for a process that has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _parent(pid: int) -> int | None:
    stat = _stat(pid)
    return int(stat[1]) if stat else None


def _started(pid: int) -> str | None:
    """Start time, which distinguishes a process from a later one with the same id."""
    stat = _stat(pid)
    return stat[19] if stat else None


def _memory_kib(pid: int) -> tuple[int, int]:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # the process has ended or is ending
        return 0, 0
    sizes = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines[1:])}
    return sizes["Pss"], sizes["Rss"]


def run(source: Path, out: Path, flags: tuple[str, ...], weights: Path | None, tree: Path = ROOT) -> dict[str, Any]:
    """Runs `tccp preprocess` on a film or folder. Returns wall-clock seconds, peak memory, clip seconds per second,
    steps.

    tree: folder with the program. cpu_seconds: of all processes that the command has waited for. That excludes Ray's.
    """
    command = [sys.executable, "-m", "tccp.cli", "preprocess", str(source), str(out), *flags]
    if weights is not None:
        command += ["--weights", str(weights)]
    with tempfile.TemporaryFile("w+") as errors:
        started, cpu = time.monotonic(), _cpu_of_children()
        process = subprocess.Popen(
            command,
            cwd=tree,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(tree)},
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )
        with TreeMemory(process.pid, _SAMPLE_RAY_S if "--ray" in flags else _SAMPLE_S) as memory:
            code = process.wait()
        took = time.monotonic() - started
        if code:
            errors.seek(0)
            raise SystemExit(errors.read())
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    frames = sum(item["frames"] for item in report["sources"])
    in_clips = sum(item["frames_in_clips"] for item in report["sources"])
    print(f"{source.name} {' '.join(flags)}: {frames / FPS:.0f} s of film in {took:.0f} s", file=sys.stderr)
    return {
        "seconds": round(took, 2),
        "cpu_seconds": round(_cpu_of_children() - cpu, 2),
        "film_seconds": frames / FPS,
        "clip_seconds": in_clips / FPS,
        "clip_seconds_per_s": round(in_clips / FPS / took, 3),
        "peak_mib": memory.peak.shared_once,
        "peak_rss_mib": memory.peak.resident,
        "steps": [
            {
                "name": step["name"],
                "seconds": round(step["seconds"], 2),
                "items": step["items"],
                "ms_per_frame": round(1000 * step["seconds"] / max(step["frames"], 1), 3),
            }
            for step in report["steps"]
        ],
    }


def _cpu_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def lengthened(film: Path, times: int, path: Path) -> Path:
    """Writes the film repeated `times` times: longer, and otherwise the same work for a reader."""
    info = media.probe(film)
    with media.open_audio(film) as track:
        sound = np.tile(media.fit_samples(track.samples, info.num_frames), times)
    with media.VideoWriter(path, _WIDTH, _HEIGHT, audio_from=sound) as longer:
        for _ in range(times):
            for picture in media.read_frames(film):
                longer.write(picture)
    return path


def measure_workers(folder: Path, films: int, film_s: float, weights: Path | None) -> dict[str, Any]:
    source = folder / "films"
    source.mkdir()
    for number in range(films):
        write_reel(source / f"{number}.mp4", plan_shots(number, film_s, _SHOT_S, people=2), _WIDTH, _HEIGHT)
    runs = {name: run(source, folder / name, flags, weights) for name, flags in COMMANDS.items()}
    plain = runs["plain"]
    ratios = {
        name: {
            "speed": round(plain["seconds"] / other["seconds"], 3),
            "memory": round(other["peak_mib"] / plain["peak_mib"], 3),
        }
        for name, other in runs.items()
    }
    return {"films": films, "film_s": film_s, "runs": runs, "over_plain": ratios}


def measure_trees(folder: Path, films: int, film_s: float, weights: Path | None, commit: str) -> dict[str, Any]:
    """One process of an earlier program and of this one, in three turns: medians of wall-clock and CPU time."""
    source = folder / "turns"
    source.mkdir()
    for number in range(films):
        write_reel(source / f"{number}.mp4", plan_shots(number, film_s, _SHOT_S, people=2), _WIDTH, _HEIGHT)
    found: dict[str, list[dict[str, Any]]] = {}
    with worktree(commit, folder / "before") as before:
        for turn in range(3):
            for name, flags, tree in (
                ("before", (), before),
                ("now_without_overlap", ("--no-overlap",), ROOT),
                ("now", (), ROOT),
            ):
                found.setdefault(name, []).append(run(source, folder / f"{name}-{turn}", flags, weights, tree))
    rows = {
        name: {what: round(statistics.median(one[what] for one in runs), 2) for what in ("seconds", "cpu_seconds")}
        for name, runs in found.items()
    }
    faster = {name: round(rows["before"]["seconds"] / row["seconds"], 3) for name, row in rows.items()}
    return {"commit": commit, "films": films, "film_s": film_s, "rows": rows, "times_as_fast": faster}


def measure_lengths(folder: Path, short_s: float, times: int, weights: Path | None) -> dict[str, Any]:
    """One film and the same film repeated, in one process.

    On a busy machine, use the ratios of CPU time and of resident memory: wall-clock time and shared pages depend on
    other processes.
    """
    short = folder / "short.mp4"
    write_reel(short, plan_shots(99, short_s, _SHOT_S, people=3), _WIDTH, _HEIGHT)
    long = lengthened(short, times, folder / "long.mp4")
    runs = {film.stem: run(film, folder / film.stem, COMMANDS["plain"], weights) for film in (short, long)}
    per_second = {name: each["seconds"] / each["film_seconds"] for name, each in runs.items()}
    cpu_per_second = {name: each["cpu_seconds"] / each["film_seconds"] for name, each in runs.items()}
    return {
        "times": times,
        "runs": runs,
        "peak_ratio": round(runs["long"]["peak_rss_mib"] / runs["short"]["peak_rss_mib"], 4),
        "time_per_film_second_ratio": round(per_second["long"] / per_second["short"], 4),
        "cpu_per_film_second_ratio": round(cpu_per_second["long"] / cpu_per_second["short"], 4),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--films", type=int, default=6, help="number of films for the comparison of workers")
    parser.add_argument("--film-s", type=float, default=20.0, help="length of each of these films in seconds")
    parser.add_argument("--short-s", type=float, default=60.0, help="length of the short film in seconds")
    parser.add_argument("--times", type=int, default=10, help="long film length / short film length; 0 skips it")
    parser.add_argument("--against", metavar="COMMIT", help="commit to compare with, in three turns")
    parser.add_argument("--weights", type=Path, help="folder of the detector's weights (default: TCCP_WEIGHTS)")
    parser.add_argument("--out", type=Path, help="JSON file to write as well")
    given = parser.parse_args(arguments)
    found: dict[str, Any] = {"commit": git_commit(), "cpus": os.cpu_count(), "size": f"{_WIDTH}x{_HEIGHT}"}
    with tempfile.TemporaryDirectory() as folder:
        if given.films:
            found["workers"] = measure_workers(Path(folder), given.films, given.film_s, given.weights)
        if given.against:
            trees = measure_trees(Path(folder), max(given.films, 2), given.film_s, given.weights, given.against)
            found["against"] = trees
        if given.times:
            found["lengths"] = measure_lengths(Path(folder), given.short_s, given.times, given.weights)
    text = json.dumps(found, indent=2)
    if given.out is not None:
        given.out.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
