#!/usr/bin/env bash
# Guess: Ray Data's map_batches with a function uses a few worker processes over and over, one for each task that runs
#   at a time. So what the function's module imports is imported that often, however long the dataset is.
# Found: placeholder
# Why it matters here: placeholder
# Exit: 0 as described, 1 if the behaviour changed, 2 if it could not run.
set -u
folder=$(mktemp -d) || exit 2
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv" || exit 2
"$folder/venv/bin/python" -m pip --disable-pip-version-check install --quiet 'ray[data]==2.60.0' || exit 2
"$folder/venv/bin/python" - <<'PY'
import os
import time

import pyarrow as pa
import ray

ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
ray.data.DataContext.get_current().enable_progress_bars = False


class Slowly:
    """A step before, which takes longer than a second for each block."""

    def __call__(self, batch):
        time.sleep(1.6)
        return batch


def process(batch):
    time.sleep(0.05)
    return {"pid": [os.getpid()]}


class Process:
    def __call__(self, batch):
        return process(batch)


def processes(kind, **options):
    data = ray.data.from_blocks([pa.table({"n": [n]}) for n in range(8)])
    pool = ray.data.ActorPoolStrategy(size=1)
    data = data.map_batches(Slowly, compute=pool, num_cpus=0.5, batch_size=1)
    rows = data.map_batches(kind, num_cpus=0.25, batch_size=1, **options).take_all()
    return len({row["pid"] for row in rows}), len(rows)


tasks, blocks = processes(process)
actors, _ = processes(Process, compute=ray.data.ActorPoolStrategy(size=1))
print(f"Ray {ray.__version__}: {blocks} blocks, one every 1.6 s: a function ran in {tasks} processes, an actor in {actors}")
raise SystemExit(0 if tasks >= 4 and actors == 1 else 1)
PY
