"""Does a training on Ray that is killed come to what one that is not comes to?

`python benchmarks/training_kills.py --trials 10 --out docs/soak/training_kills.json`: so many trials of each kind: a
training worker is killed; the raylet of the machine that the workers are on (a Ray cluster of a head and two, all on
this machine); the driver, and the Ray it started: with SIGKILL, at a random step; and notice is given, on such a
cluster, that the workers' machine will be taken away (a longer training, for Ray looks for that every five seconds).
Losses of every step are compared with those of an uninterrupted training on Ray, bit for bit, and by plain torch, to
1e-4. Restartable: trials that are in the output are not done again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import trainings
from trainings import Kill, assert_same_trace, command, run_folder, trace

from tccp.config import VariantName
from tccp.files import atomic_path

Trace = list[tuple[int, float, float]]
COMPONENT: VariantName = "landmark_first"
LATEST = trainings.STEPS - trainings.EVERY
NOTICE = {"steps": 240, "every": 80}
"""Of trainings that are given notice: they save when they hear of it, between two of these checkpoints."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("docs/soak/training_kills.json"))
    parser.add_argument("--minutes", type=float, help="begin no further trial after so long; go on another time")
    arguments = parser.parse_args()
    record: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"trials": {}}
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="tccp-kills-") as place:
        root = Path(place)
        data, untrained = trainings.make_data(root)
        options = ["--variants", COMPONENT, "--autoencoder", str(untrained)]
        wholes: dict[int, Trace] = {}
        for number in range(arguments.trials):
            for kind in get_args(Kill):
                name = f"{kind}-{number}"
                late = arguments.minutes is not None and time.monotonic() - started > 60 * arguments.minutes
                if name in record["trials"] or late:
                    continue
                length = NOTICE if kind == "notice" else {}
                steps = length.get("steps", trainings.STEPS)
                if steps not in wholes:
                    wholes[steps] = uninterrupted(data, untrained, options, root, length)
                found = trial(kind, number, data, options, root)
                found["same_as_uninterrupted"] = found.pop("trace") == wholes[steps]
                record["trials"][name] = found
                record["summary"] = summary(record["trials"])
                with atomic_path(arguments.out) as path:
                    path.write_text(json.dumps(record, indent=1) + "\n")
                print(name, found, flush=True)
                shutil.rmtree(root / "storage")
    print(json.dumps(record.get("summary"), indent=1))


def uninterrupted(data: Path, untrained: Path, options: list[str], root: Path, length: dict[str, int]) -> Trace:
    steps = length.get("steps", trainings.STEPS)
    place = root / f"whole-{steps}"
    process = trainings.start(command("stage1", data, place, *options, **length), root / "whole.log")
    if process.wait():
        raise SystemExit((root / "whole.log").read_text()[-4000:])
    whole = trace(run_folder(place, COMPONENT))
    assert_same_trace(whole, trainings.plain_trace(COMPONENT, data, untrained, root / f"plain-{steps}", steps))
    return whole


def summary(trials: dict[str, dict[str, Any]]) -> dict[str, Any]:
    kinds = {kind: [found for name, found in trials.items() if name.startswith(kind)] for kind in get_args(Kill)}
    return {
        kind: {"trials": len(found), "same_as_uninterrupted": sum(one["same_as_uninterrupted"] for one in found)}
        for kind, found in kinds.items()
    }


def trial(kind: Kill, number: int, data: Path, options: list[str], root: Path) -> dict[str, Any]:
    rng = random.Random(f"{kind} {number}")
    after = rng.randrange(1, LATEST // trainings.EVERY) * trainings.EVERY
    run, log = run_folder(root / "storage", COMPONENT), root / f"{kind}-{number}.log"
    started = time.monotonic()
    if kind == "raylet":
        committed = on_a_cluster(trainings.kill_raylet, data, options, root, log, after, rng)
    elif kind == "notice":
        committed = on_a_cluster(trainings.give_notice, data, options, root, log, NOTICE["every"], rng, **NOTICE)
    else:
        arguments = command("stage1", data, root / "storage", *options)
        process = trainings.start(arguments, log)
        at_work = trainings.wait_for(run, after, process)
        time.sleep(rng.random())
        committed = trainings.committed(run)
        assert at_work, log.read_text()[-4000:]
        if kind == "rank":
            trainings.kill_rank(process.pid, rng)
        else:
            trainings.kill_driver(process)
            process = trainings.start([*arguments, "--resume"], log)
        assert process.wait(600) == 0, log.read_text()[-4000:]
    return {"killed_after_step": committed, "seconds": round(time.monotonic() - started, 1), "trace": trace(run)}


def on_a_cluster(
    strike: Callable[[Any], None],
    data: Path,
    options: list[str],
    root: Path,
    log: Path,
    after: int,
    rng: random.Random,
    **length: int,
) -> int:
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": True})
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=2)
        arguments = command("stage1", f"file://{data}", f"file://{root}/storage", *options, **length)
        process = trainings.start(arguments, log, RAY_ADDRESS=cluster.address)
        run = run_folder(root / "storage", COMPONENT)
        assert trainings.wait_for(run, after, process), log.read_text()[-4000:]
        time.sleep(rng.random())
        committed = trainings.committed(run)
        strike(cluster)
        assert process.wait(600) == 0, log.read_text()[-4000:]
        return committed
    finally:
        below = trainings.ray_below(os.getpid())
        cluster.shutdown()
        trainings.end(below)


if __name__ == "__main__":
    main()
