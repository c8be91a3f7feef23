"""Does a training go on by itself, with the same losses, when its object storage is away for 20 seconds?

`python benchmarks/storage_outages.py --out docs/soak/storage.json`: clips, latents, lips, checkpoints and results are
on an S3 server on this machine (moto's), behind a proxy that refuses connections for a while at one request: when
latents or lips are written, or read by ranks; when a checkpoint, Ray's record of it, the trained network or the
pipeline is written; when a resumed training reads its checkpoint. One outage lasts longer than the retries within a
process (TCCP_STORAGE_RETRY_S), so that workers must be started again. The losses of every step are compared with those
of an undisturbed training on Ray, bit for bit, and that one's with plain torch's, to 1e-4. Restartable: trainings that
are in the output are not repeated.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import outages
import trainings
from object_storage import BUCKET, ObjectStorage, object_storage

from tccp.files import atomic_path

AWAY_S = 20.0
LONG = "checkpoint, longer than the retries"
ONCE = ("latents written", "lips written", "export", "pipeline")
"""Requests before or after the steps of training; at the others the outage begins after AFTER_STEPS steps."""
AFTER_STEPS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/soak/storage.json"))
    parser.add_argument("--minutes", type=float, help="begin no further training after this time")
    arguments = parser.parse_args()
    record: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"trainings": {}}
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="tccp-outages-") as folder:
        root = Path(folder)
        data = trainings.make_data(root / "data")
        undisturbed: outages.Trace | None = None
        for place in [*outages.PLACES, LONG]:
            if place in record["trainings"]:
                continue
            if arguments.minutes is not None and time.monotonic() - started > 60 * arguments.minutes:
                break
            with object_storage(root / "moto.log") as server:
                if undisturbed is None:
                    undisturbed = without_outage(server, data, root)
                found = with_outage(server, place, data, root)
            found["same_losses"] = found.pop("trace") == undisturbed
            record["trainings"][place] = found
            record["summary"] = summary(record["trainings"])
            with atomic_path(arguments.out) as path:
                path.write_text(json.dumps(record, indent=1) + "\n")
            print(place, found, flush=True)
            shutil.rmtree(root / "outage")
    print(json.dumps(record.get("summary"), indent=1))


def summary(done: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {
        "trainings": len(done),
        "outages": sum(len(one["outages"]) for one in done.values()),
        "same_losses": sum(one["same_losses"] for one in done.values()),
    }


def without_outage(server: ObjectStorage, data: tuple[Path, Path], root: Path) -> outages.Trace:
    plain = trainings.plain_trace(outages.COMPONENT, *data, root / "plain", overrides=outages.OVERRIDES)
    training = outages.Training(server, "undisturbed", data, root / "undisturbed")
    if training.start().wait():
        raise SystemExit(training.log.read_text()[-4000:])
    trainings.assert_same_trace(training.trace(), plain)
    assert training.result()["storage_retries"] == 0
    return training.trace()


def with_outage(server: ObjectStorage, place: str, data: tuple[Path, Path], root: Path) -> dict[str, Any]:
    """A training whose storage goes away at the first request of its kind, or the first after AFTER_STEPS steps."""
    training = outages.Training(server, "outage", data, root / "outage")
    if "written" not in place:
        training.copy_encoded(root / "plain")
    kind = "checkpoint" if place == LONG else place
    environment = {"TCCP_STORAGE_RETRY_S": "5"} if place == LONG else {}
    started, steps = time.monotonic(), 0
    if place in ONCE:
        server.proxy.fail_at(outages.PLACES[kind], AWAY_S)
    process = training.start(**environment)
    if place not in ONCE:
        assert training.wait_for(AFTER_STEPS, process), training.log.read_text()[-4000:]
        steps = training.committed()
        if place == "resume":
            trainings.kill_driver(process)
        server.proxy.fail_at(outages.PLACES[kind], AWAY_S)
        if place == "resume":
            process = training.start("--resume", **environment)
    assert trainings.ended(process) == 0, training.log.read_text()[-4000:]
    assert len(server.proxy.outages) == 1, f"no request for {place}"
    log = training.log.read_text()
    # Each of two ranks looks for mistakes of both when it begins, and the driver once at the end.
    looks = sum(request.startswith("HEAD") and "mistake-0" in request for request in server.proxy.requests)
    return {
        "outages": [f"{AWAY_S:g} s at {request.replace(f'/{BUCKET}/', '/')}" for request in server.proxy.outages],
        "after_step": steps,
        "logged_retries": log.count("storage: cannot"),
        "worker_groups": round((looks - 1) / 2),
        "seconds": round(time.monotonic() - started, 1),
        "trace": training.trace(),
    }


if __name__ == "__main__":
    main()
