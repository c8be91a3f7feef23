"""Sends malformed messages to the sandbox's parent: `python benchmarks/hostile_child.py --out FILE.json`.

A hostile child (`tests/hostile_child.py`, which does no harm) takes the place of the real one. Each message must end in
one MediaError, in time, and leave nothing behind. The run can be stopped and started at any point; the work file keeps
the counts of finished messages. Exit status 1: a message was accepted, took too long, or left something behind.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from hostility import Outcome, face, hostile_children  # noqa: E402 - shared with the tests

from tccp.roundtable import write_clips  # noqa: E402

_SAVE_EVERY = 100
_LONGEST_S = 30.0
_MOST_GROWTH = 32 << 20  # bytes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--count", type=int, default=10_000, help="number of messages")
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the summary")
    parser.add_argument("--work", type=Path, default=Path("out/hostile_child.json"), help="counts so far")
    given = parser.parse_args()
    for path in (given.work, given.out):
        path.parent.mkdir(parents=True, exist_ok=True)
    done = _read(given.work)
    with tempfile.TemporaryDirectory() as folder:
        (film,) = write_clips(Path(folder), 1, 0.8, seed=9, width=128, height=96)
        with hostile_children(Path(folder), film) as choose:
            descriptors, memory = len(os.listdir("/proc/self/fd")), None
            while done["messages"] < given.count:
                outcome = Outcome()
                for number in range(done["messages"], min(done["messages"] + _SAVE_EVERY, given.count)):
                    choose(number)
                    face(number, film, outcome)
                    done["messages"] = number + 1
                _add(done, outcome, len(os.listdir("/proc/self/fd")) - descriptors)
                memory = memory or _memory()  # after the first round, when everything is loaded
                done["memory_growth_bytes"] = max(done["memory_growth_bytes"], _memory() - memory)
                partial = given.work.with_suffix(".partial")
                partial.write_text(json.dumps(done))
                partial.replace(given.work)
    given.out.write_text(json.dumps(done, indent=2) + "\n")
    print(json.dumps(done))
    good = not done["accepted"] and not done["descriptors_left"] and not done["processes_left"]
    return int(not good or done["longest_s"] > _LONGEST_S or done["memory_growth_bytes"] > _MOST_GROWTH)


def _read(work: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(work.read_text()))
    except (OSError, ValueError):
        return {
            "messages": 0,
            "reasons": {},
            "accepted": [],
            "longest_s": 0.0,
            "descriptors_left": 0,
            "processes_left": 0,
            "memory_growth_bytes": 0,
        }


def _add(done: dict[str, Any], outcome: Outcome, descriptors_left: int) -> None:
    done["reasons"] = dict(sorted((Counter(done["reasons"]) + outcome.reasons).items()))
    done["accepted"] += outcome.accepted
    done["longest_s"] = round(max(done["longest_s"], outcome.longest_s), 2)
    done["descriptors_left"] = max(done["descriptors_left"], descriptors_left)
    done["processes_left"] = max(done["processes_left"], _children())


def _children() -> int:
    tasks = Path("/proc/self/task")
    return sum(len((task / "children").read_text().split()) for task in tasks.iterdir())


def _memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    sys.exit(main())
