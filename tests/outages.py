"""Trainings on Ray whose clips and storage are on S3, with outages in their midst. Used by `benchmarks/`, too."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import trainings
from object_storage import BUCKET, ObjectStorage
from trainings import command

from tccp.config import VariantName

COMPONENT: VariantName = "face_first"
"""A network that reads latents and lips."""
OVERRIDES = ["headbox.draws=2"]
PLACES = {
    "latents written": "^PUT .*/latents/",
    "lips written": r"^PUT .*/lips/.*\.npy",
    "latents": r"^GET .*/latents/.*\.safetensors",
    "lips": r"^GET .*/lips/.*\.npy",
    "checkpoint": "^PUT .*/step-",
    "record": "^PUT .*/checkpoint_manager_snapshot",
    "export": "^PUT .*/export/",
    "pipeline": f"^PUT .*/pipeline/{COMPONENT}/",
    "resume": "^GET .*/step-",
}
"""Requests at which the storage goes away."""
SMALL_CACHE = {"TCCP_CACHE_GB": "0.0001"}
"""With a cache of this size, latents and lips are read from the storage again and again."""

Trace = list[tuple[int, float, float]]


class Training:
    """A training of COMPONENT on S3, in the storage `s3://<bucket>/<name>`. here: local folder for log and cache."""

    def __init__(self, server: ObjectStorage, name: str, data: tuple[Path, Path], here: Path):
        """data: of `trainings.make_data`; the clips are copied to S3."""
        here.mkdir(parents=True, exist_ok=True)
        clips, untrained = data
        self.server, self.name, self.log = server, name, here / "log"
        if not server.direct().exists(f"{BUCKET}/clips"):
            server.direct().put(str(clips), f"{BUCKET}/clips", recursive=True)
        self.run = f"{BUCKET}/{name}/runs/run/{COMPONENT}"
        options = ["--variants", COMPONENT, "--autoencoder", str(untrained)]
        place = f"s3://{BUCKET}/{name}"
        self._command = command("stage2", f"s3://{BUCKET}/clips", place, *options)
        self._command[3:3] = OVERRIDES
        self.environment = {**server.environment, **SMALL_CACHE, "TCCP_CACHE": str(here / "cache")}

    def copy_encoded(self, storage: Path) -> None:
        """Copies latents and lips of a local storage to S3, so that the training need not encode them."""
        for name in ("latents", "lips"):
            self.server.direct().put(str(storage / name), f"{BUCKET}/{self.name}/{name}", recursive=True)

    def start(self, *options: str, **environment: str) -> subprocess.Popen[str]:
        return trainings.start([*self._command, *options], self.log, **self.environment, **environment)

    def committed(self) -> int:
        """Steps of the newest checkpoint on record."""
        try:
            record = json.loads(self._read("checkpoint_manager_snapshot.json"))
        except (OSError, ValueError):
            return 0
        return max((int(one["checkpoint_dir_name"].split("-")[1]) for one in record["checkpoint_results"]), default=0)

    def wait_for(self, steps: int, process: subprocess.Popen[str], timeout_s: float = 600) -> bool:
        """Until so many steps are on record; whether the process was still at work then."""
        deadline = time.monotonic() + timeout_s
        while self.committed() < steps and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.2)
        return process.poll() is None

    def trace(self) -> Trace:
        records = [json.loads(line) for line in self._read("metrics.jsonl").decode().splitlines()]
        return [(record["step"], record["loss"], record["grad_norm"]) for record in records]

    def result(self) -> Mapping[str, Any]:
        return dict(json.loads(self._read("result.json")))

    def checkpoints(self) -> list[str]:
        return sorted(path.rsplit("/", 1)[-1] for path in self.server.direct().glob(f"{self.run}/step-*"))

    def _read(self, name: str) -> bytes:
        return bytes(self.server.direct().cat_file(f"{self.run}/{name}"))
