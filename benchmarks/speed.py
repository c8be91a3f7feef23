"""Speed of generation: `python benchmarks/speed.py --out FILE.json`, about twenty minutes on two quiet cores.

Compares this tree with an earlier commit (in a git worktree of its own) and with networks of peers' published shapes,
all in one run and in turns, because machines differ and their speed changes. Parts:

films: `tccp generate` with the packaged weights, as a user runs it, also beside busy processes. Films of two lengths:
    the difference is what the additional frames cost, the rest is the start. A command that takes too long is stopped.
stages: the CPU time of each part of it.
networks: evaluations and training steps of the toy preset's `face_sequence`, and their share of the core's rate of
    matrix products.
paper: a frame of the paper preset at 256 px with random weights, in 2 x 20 steps, and a frame of each peer.

All but films use one thread. docs/speed.md says what each figure includes. benchmarks/speed_gpu.py measures a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from speed_workers import ROOT, Worker, clean_environment, median_of, worktree

SHORT_S, LONG_S = 0.32, 2.32  # one window and one frame; fifty frames more
FPS = 25
_SPIN = "while True: pass"
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
"""The environment that keeps PyTorch from wider instructions."""
PARTS = ("stages", "networks", "paper", "films")
STEPS_BEFORE = 12  # of the packaged weights, until they took 2
STEPS = 20  # of each stage in `paper`, as LatentSync's default
PAPER_WINDOW = 8
GROUP = 16  # LatentSync's frames in an evaluation
TINY_CHANGES = {
    "paper": {
        "picture_px": 64,
        "autoencoder.block_channels": [32] * 5,
        "network.base_channels": 32,
        "network.attention_head_dim": 32,
    },
    "toy": {"network.base_channels": 16, "network.channel_multipliers": [1, 2], "training.batch_size": 2},
}


class Cost(NamedTuple):
    """Of one command. peak_mib: of its largest process."""

    wall_s: float
    cpu_s: float
    peak_mib: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", default="431bd84", help="commit to compare with")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--turns", type=int, default=2, help="repeats of all that takes turns")
    parser.add_argument("--busy", type=int, nargs="*", default=[0, 2, 4], help="numbers of busy processes beside films")
    parser.add_argument("--cores", type=int, default=2, help="number of cores for films")
    parser.add_argument("--limit", type=float, default=90.0, help="seconds after which a command is stopped")
    parser.add_argument("--out", type=Path, help="JSON file for the result; parts that are not measured now stay in it")
    parser.add_argument("--tree", type=Path, help="folder to compare with, in place of a commit")
    parser.add_argument("--tiny", action="store_true", help="tiny networks and films, for tests")
    given = parser.parse_args()
    result: dict[str, Any] = json.loads(given.out.read_text()) if given.out and given.out.exists() else {}
    result |= {
        "before": given.against,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "load_average_at_start": round(os.getloadavg()[0], 1),
    }
    with ExitStack() as opened:
        place = Path(opened.enter_context(tempfile.TemporaryDirectory()))
        before = given.tree or opened.enter_context(worktree(given.against, place / "before"))
        trees = {"before": before.absolute(), "now": ROOT}
        measure: dict[str, Callable[[], Any]] = {
            "stages": lambda: stages(place, given.tiny),
            "networks": lambda: networks(trees, given.turns, given.tiny),
            "paper": lambda: paper(trees, given.turns, given.tiny),
            "films": lambda: films(trees, place, given),
        }
        for part in given.parts:
            began = time.monotonic()
            result[part] = measure[part]()
            print(
                f"{part} took {time.monotonic() - began:.0f} s: {json.dumps(result[part])}", file=sys.stderr, flush=True
            )
            if given.out is not None:
                given.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


# Parts with one thread


def stages(place: Path, tiny: bool) -> dict[str, Any]:
    with Worker("speed_stages.py", ROOT) as worker:
        return worker("stages", film=str(_film(place, SHORT_S if tiny else LONG_S)), steps=1 if tiny else None)


def networks(trees: dict[str, Path], turns: int, tiny: bool) -> dict[str, Any]:
    """Of the toy preset's `face_sequence`: evaluations with one and four windows, and a training step."""
    given = {"preset": "toy", "changes": _changes("toy", tiny), "variant": "face_sequence"}
    evaluations = {"evaluations": {}, "evaluations_avx2": AVX2}
    records: dict[str, dict[str, list[dict[str, float]]]] = {name: {} for name in evaluations}
    steps: dict[str, list[float]] = {name: [] for name in trees}
    for kind, environment in evaluations.items():
        with ExitStack() as opened:
            workers = {
                name: opened.enter_context(Worker("speed_networks.py", tree, **environment))
                for name, tree in trees.items()
            }
            for _ in range(1 if tiny else 2 * turns):
                for batch in (1, 4):
                    for name, recorded in (("before", False), ("now", False), ("now", True)):
                        row = workers[name](
                            "evaluation", **given, batch=batch, recorded=recorded, repeats=2 if tiny else 15
                        )
                        label = f"{name}_{'recorded' if recorded else 'eager'}_batch_{batch}"
                        records[kind].setdefault(label, []).append(row)
            for _ in range(turns if kind == "evaluations" else 0):
                for name, worker in workers.items():
                    steps[name].append(worker("training_step", **given, repeats=1 if tiny else 3)["step_ms"])
    training: dict[str, float] = {name: round(statistics.median(times), 1) for name, times in steps.items()}
    training["times_as_fast"] = _ratio(training["before"], training["now"])
    medians = {kind: {name: median_of(rows, 4) for name, rows in found.items()} for kind, found in records.items()}
    return {**medians, "training_step_ms": training}


def paper(trees: dict[str, Path], turns: int, tiny: bool) -> dict[str, Any]:
    """CPU time of a frame of `paper` in both trees and with light decoders, and of each peer."""
    given = {"preset": "paper", "changes": _changes("paper", tiny)}
    light = _light_decoders(tiny)
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in (*trees, *light)}
    peers: list[dict[str, float]] = []
    with ExitStack() as opened:
        workers = {name: opened.enter_context(Worker("speed_networks.py", tree)) for name, tree in trees.items()}
        peer = opened.enter_context(Worker("speed_peers.py", ROOT))
        gflop = {"peers": peer("gflop", tiny=tiny)}
        latentsync: dict[str, float] = {}
        for turn in range(turns):
            for name, worker in workers.items():
                row: dict[str, float] = worker("autoencoder", **given)
                for kind in ("landmark", "face"):
                    one = worker("evaluation", **given, variant=f"{kind}_sequence", recorded=name == "now", repeats=2)
                    row |= {f"{kind}_{what}": one[what] for what in one}
                measured[name].append(row)
                _progress(turn, name, row)
            for name, changes in light.items():
                decoding = workers["now"]("autoencoder", preset="paper", changes=changes, encode=False)
                measured[name].append(measured["now"][-1] | {"decode_ms": decoding["decode_ms"]})
            row = peer("autoencoder", tiny=tiny)
            for name in ("wav2lip", "musetalk"):
                row[name] = peer("network", peer=name, tiny=tiny)["evaluation_ms"]
            latentsync = latentsync or peer("network", peer="latentsync", tiny=tiny)  # a minute: once
            row["latentsync"] = latentsync["evaluation_ms"]
            peers.append(row)
            _progress(turn, "peers", row)
        gflop["before"] = workers["before"]("autoencoder_gflop", **given)
        for name, changes in {"now": given["changes"], **light}.items():
            gflop[name] = workers["now"]("autoencoder_gflop", **given | {"changes": changes})
    rows = _peer_rows(median_of(peers), gflop["peers"])
    for name, records in measured.items():
        rows[name] = _own_row(median_of(records, 4), gflop[name], rows["wav2lip"])
    now = rows["now"]["cpu_ms_per_frame"]
    return {
        "steps": [STEPS, STEPS],
        "rows": rows,
        "latentsync_million_parameters": round(latentsync["million_parameters"], 1),
        "now_to": {name: _ratio(now, row["cpu_ms_per_frame"], 3) for name, row in rows.items() if name != "now"},
        "before_to": {
            name: _ratio(rows["before"]["cpu_ms_per_frame"], row["cpu_ms_per_frame"], 3)
            for name, row in rows.items()
            if name != "before"
        },
    }


def _own_row(one: dict[str, float], gflop: dict[str, float], wav2lip: dict[str, float]) -> dict[str, float]:
    """A frame from the median figures of a tree."""
    new = PAPER_WINDOW - 1
    evaluations = sum(one[f"{kind}_prepare_ms"] + STEPS * one[f"{kind}_evaluation_ms"] for kind in ("landmark", "face"))
    decode = one["decode_ms"] * one["decoded_pictures"]
    operations = STEPS * (one["landmark_gflop"] + one["face_gflop"]) / new + gflop["encode_gflop"]
    operations += one["decoded_pictures"] * gflop["decode_gflop"] + wav2lip["gflop_per_frame"]
    return {
        "networks_ms": round(evaluations / new, 1),
        "encode_ms": round(one["encode_ms"], 1),
        "decode_ms": round(decode, 1),
        "lips_ms": wav2lip["cpu_ms_per_frame"],
        "cpu_ms_per_frame": round(evaluations / new + one["encode_ms"] + decode + wav2lip["cpu_ms_per_frame"], 1),
        "gflop_per_frame": round(operations, 1),
        "evaluation_share_of_matmul": one["face_share_of_matmul"],
    }


def _peer_rows(one: dict[str, float], gflop: dict[str, float]) -> dict[str, dict[str, float]]:
    """A frame of each peer from median figures. Columns as for this project; Wav2Lip has no auto-encoder."""
    rows = {}
    for name, network, evaluations, encoded, decoded in (
        ("wav2lip", "wav2lip", 1.0, 0, 0),
        ("musetalk", "musetalk", 1.0, 0, 1),
        ("musetalk_encoding", "musetalk", 1.0, 2, 1),
        ("latentsync", "latentsync", STEPS / GROUP, 2, 1),
        ("latentsync_guided", "latentsync", 2 * STEPS / GROUP, 2, 1),
    ):
        parts = [evaluations * one[network], encoded * one["encode_ms"], decoded * one["decode_ms"]]
        operations = evaluations * gflop[network] + encoded * gflop["encode"] + decoded * gflop["decode"]
        rows[name] = {
            "networks_ms": round(parts[0], 1),
            "encode_ms": round(parts[1], 1),
            "decode_ms": round(parts[2], 1),
            "cpu_ms_per_frame": round(sum(parts), 1),
            "gflop_per_frame": round(operations, 1),
        }
    return rows


def _changes(preset: str, tiny: bool, **more: Any) -> str:
    return json.dumps((TINY_CHANGES[preset] if tiny else {}) | more)


def _light_decoders(tiny: bool) -> dict[str, str]:
    """Settings of `paper` with light decoders, where this tree has them."""
    from tccp.config import AutoencoderSettings

    key = "decoder_folded_levels"
    if key not in AutoencoderSettings.model_fields:
        return {}
    return {f"now_light_{n}": _changes("paper", tiny, **{f"autoencoder.{key}": n}) for n in (1, 2)}


def _progress(turn: int, name: str, row: dict[str, float]) -> None:
    figures = " ".join(f"{what}={value:.4g}" for what, value in row.items())
    print(f"turn {turn + 1}, {name}: {figures}", file=sys.stderr, flush=True)


def _ratio(over: float, under: float, digits: int = 2) -> float:
    return round(over / under, digits)


# Films


def films(trees: dict[str, Path], place: Path, given: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per number of busy processes, and one for a single core."""
    made = {seconds: _film(place, seconds) for seconds in (SHORT_S, 2 * SHORT_S if given.tiny else LONG_S)}
    rows = [(busy, given.cores) for busy in given.busy]
    if given.cores > 1 and not given.tiny:
        rows.append((0, 1))
    return [_film_row(trees, made, busy, cores, given) for busy, cores in rows]


def _film_row(
    trees: dict[str, Path], made: dict[float, Path], busy: int, cores: int, given: argparse.Namespace
) -> dict[str, Any]:
    tiny = ("--steps", "1") if given.tiny else ()
    programs: dict[str, tuple[Path, Sequence[str]]] = {
        "before": (trees["before"], tiny),
        "now_same_steps": (trees["now"], ("--steps", str(STEPS_BEFORE))),
        "now": (trees["now"], tiny),
    }
    if busy or given.tiny:
        del programs["now_same_steps"]
    costs: dict[str, list[tuple[Cost | None, Cost | None]]] = {name: [] for name in programs}
    with _busy(busy):
        for _ in range(given.turns if not busy else 1):
            for name, (tree, options) in programs.items():
                short, long = (_cost(tree, film, cores, options, given.limit) for film in made.values())
                costs[name].append((short, long))
    more_frames = round((max(made) - min(made)) * FPS)
    row: dict[str, Any] = {"busy_processes": busy, "cores": cores}
    for name, pairs in costs.items():
        both = [(short, long) for short, long in pairs if short is not None and long is not None]
        if len(both) < len(pairs):
            row[name] = {"not_finished_after_s": given.limit}
            continue
        row[name] = {
            "wall_ms_per_frame": _median(1000 * (long.wall_s - short.wall_s) / more_frames for short, long in both),
            "cpu_ms_per_frame": _median(1000 * (long.cpu_s - short.cpu_s) / more_frames for short, long in both),
            "short_film_wall_s": _median(short.wall_s for short, _ in both),
            "short_film_cpu_s": _median(short.cpu_s for short, _ in both),
            "peak_mib": _median(long.peak_mib for _, long in both),
        }
    for name in programs:
        if name != "before" and all("peak_mib" in row[one] for one in ("before", name)):
            row[f"{name}_times_as_fast"] = {
                what: _ratio(row["before"][what], row[name][what])
                for what in ("wall_ms_per_frame", "cpu_ms_per_frame", "short_film_wall_s", "short_film_cpu_s")
            }
            row[f"{name}_peak_ratio"] = _ratio(row[name]["peak_mib"], row["before"]["peak_mib"])
    print(json.dumps(row), file=sys.stderr, flush=True)
    return row


def _median(values: Iterator[float]) -> float:
    return round(statistics.median(values), 2)


def _cost(tree: Path, film: Path, cores: int, options: Sequence[str], limit_s: float) -> Cost | None:
    """The cost of generating a film into itself, with its truth file, in a process. None: stopped at the limit."""
    command: Sequence[str | Path] = (
        *(sys.executable, "-m", "tccp.cli", "generate", "--scene", film, "--audio", film, "--identity", film),
        *("--truth", "--weights", "toy", "--out", film.with_name("out.mp4"), "--device", "cpu", *options),
    )
    allowed = sorted(os.sched_getaffinity(0))[:cores]
    began = time.monotonic()
    with subprocess.Popen(
        command,
        cwd=tree,
        env=clean_environment(tree),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: os.sched_setaffinity(0, allowed),
    ) as process:
        while True:
            pid, status, used = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            if time.monotonic() - began > limit_s:
                process.kill()
                return None
            time.sleep(0.01)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"generation in {tree} failed: {process.args}")
    return Cost(time.monotonic() - began, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)


def _film(place: Path, seconds: float) -> Path:
    from tccp.roundtable import write_clips

    folder = place / f"{seconds:g}"
    folder.mkdir(exist_ok=True)
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


if __name__ == "__main__":
    main()
