"""Measures whether a training on Ray that is killed repeatedly gives the result of an uninterrupted one.

`python benchmarks/training_kills.py --kills 10 --out docs/soak/training_kills.json` makes at least this many kills of
each kind, several per training, each with SIGKILL at a random moment after a checkpoint. The kinds are: a training
worker; a machine with workers (the cluster is a head and two machines, all processes of this machine; a new machine
replaces it); the driver with the Ray that it started. In addition, trainings on such a cluster get notice that their
machine will be taken away (longer trainings, because Ray checks for it every five seconds): they must save once, at
once. Losses of every step are compared with an uninterrupted training on Ray, bit for bit, and that one with plain
torch, to 1e-4. After an interruption, trainings in the output are not repeated.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import trainings
from trainings import Kill, assert_same_trace, command, run_folder, trace

from tccp.config import VariantName
from tccp.files import atomic_path

Trace = list[tuple[int, float, float]]
COMPONENT: VariantName = "landmark_first"
NOTICE = {"steps": 80, "every": 40}
"""Lengths for trainings that get notice: they save on notice, between two of these regular checkpoints."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--notices", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("docs/soak/training_kills.json"))
    parser.add_argument("--minutes", type=float, help="start no training after this; call again to continue")
    arguments = parser.parse_args()
    record: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"trainings": {}}
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="tccp-kills-") as place:
        root = Path(place)
        data, untrained = trainings.make_data(root)
        options = ["--variants", COMPONENT, "--autoencoder", str(untrained)]
        wholes: dict[int, Trace] = {}
        while kind := wanting(record["trainings"], arguments.kills, arguments.notices):
            if arguments.minutes is not None and time.monotonic() - started > 60 * arguments.minutes:
                break
            length = NOTICE if kind == "notice" else {}
            steps = length.get("steps", trainings.STEPS)
            if steps not in wholes:
                wholes[steps] = uninterrupted(data, untrained, options, root, length)
            name = f"{kind}-{sum(one.startswith(kind) for one in record['trainings'])}"
            found = training(kind, name, data, options, root, length)
            found["same_as_uninterrupted"] = found.pop("trace") == wholes[steps]
            record["trainings"][name] = found
            record["summary"] = summary(record["trainings"])
            with atomic_path(arguments.out) as path:
                path.write_text(json.dumps(record, indent=1) + "\n")
            print(name, found, flush=True)
            shutil.rmtree(root / "storage")
    print(json.dumps(record.get("summary"), indent=1))


def wanting(done: dict[str, dict[str, Any]], kills: int, notices: int) -> Kill | None:
    """The kind of kill with the most missing, or None if none is missing."""
    missing = {kind: (notices if kind == "notice" else kills) - found["kills"] for kind, found in summary(done).items()}
    most = max(missing, key=lambda kind: missing[kind])
    return most if missing[most] > 0 else None


def summary(done: dict[str, dict[str, Any]]) -> dict[Kill, dict[str, int]]:
    kinds = {kind: [found for name, found in done.items() if name.startswith(kind)] for kind in get_args(Kill)}
    return {
        kind: {
            "trainings": len(found),
            "kills": sum(len(one["killed_after_step"]) for one in found),
            "same_as_uninterrupted": sum(one["same_as_uninterrupted"] for one in found),
        }
        for kind, found in kinds.items()
    }


def uninterrupted(data: Path, untrained: Path, options: list[str], root: Path, length: dict[str, int]) -> Trace:
    steps = length.get("steps", trainings.STEPS)
    place = root / f"whole-{steps}"
    process = trainings.start(command("stage1", data, place, *options, **length), root / "whole.log")
    if process.wait():
        raise SystemExit((root / "whole.log").read_text()[-4000:])
    whole = trace(run_folder(place, COMPONENT))
    assert_same_trace(whole, trainings.plain_trace(COMPONENT, data, untrained, root / f"plain-{steps}", steps))
    return whole


def training(
    kind: Kill, name: str, data: Path, options: list[str], root: Path, length: dict[str, int]
) -> dict[str, Any]:
    """One training with a kill after each checkpoint except the last."""
    rng = random.Random(name)
    steps, every = length.get("steps", trainings.STEPS), length.get("every", trainings.EVERY)
    run, log = run_folder(root / "storage", COMPONENT), root / f"{name}.log"
    killed: list[int] = []
    started = time.monotonic()
    with cluster_for(kind) as cluster:
        places = (data, root / "storage") if cluster is None else (f"file://{data}", f"file://{root}/storage")
        environment = {} if cluster is None else {"RAY_ADDRESS": cluster.address}
        arguments = command("stage1", *places, *options, "--keep", str(steps // every + 2), **length)
        process = trainings.start(arguments, log, **environment)
        while (after := max([0, *killed]) // every * every + every) < steps and not (kind == "notice" and killed):
            assert trainings.wait_for(run, after, process), log.read_text()[-4000:]
            time.sleep(2 * rng.random())
            killed.append(trainings.committed(run))
            if kind == "rank":
                trainings.kill_rank(process.pid, rng)
            elif kind == "raylet":
                trainings.kill_raylet(cluster)
                cluster.add_node(num_cpus=2)
            elif kind == "notice":
                trainings.give_notice(cluster)
            else:
                trainings.kill_driver(process)
                process = trainings.start([*arguments, "--resume"], log)
        assert process.wait(900) == 0, log.read_text()[-4000:]
    between = [step for step in saved(run) if step % every]
    if len(between) != (1 if kind == "notice" else 0):
        raise SystemExit(f"{name}: checkpoints at steps {saved(run)}: {log.read_text()[-4000:]}")
    found = {"killed_after_step": killed, "seconds": round(time.monotonic() - started, 1), "trace": trace(run)}
    return {**found, "saved_at_step": between} if between else found


def saved(run: Path) -> list[int]:
    """The steps of all existing checkpoints."""
    return sorted(int(place.name.split("-")[1]) for place in run.glob("step-*"))


@contextlib.contextmanager
def cluster_for(kind: Kill) -> Iterator[Any]:
    """A cluster of a head without CPUs and two machines, for kinds that need one; else None: a training starts Ray."""
    if kind in ("rank", "driver"):
        yield None
        return
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": True})
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=2)
        yield cluster
    finally:
        below = trainings.ray_below(os.getpid())
        cluster.shutdown()
        trainings.end(below)


if __name__ == "__main__":
    main()
