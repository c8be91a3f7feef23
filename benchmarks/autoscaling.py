"""Measures whether a cluster grows for preprocessing and training, and shrinks afterwards.

`python benchmarks/autoscaling.py --out docs/autoscaling.json` runs `cluster.yaml` under Ray's own autoscaler. Ray's
fake machines, which are processes of this machine without GPUs, replace the cloud's. Jobs are submitted to the head as
users submit them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import ray.util
import yaml
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import trainings
from trainings import ROOT

from tccp.roundtable import write_clips

IDLE_MINUTES = 0.25
HEAD = "ray.head.default"
"""The name that Ray's fake machines require for the head's node type."""
SIZES = {"head": 0, "data": 2, "train": 2}


def fake_cluster(port: int) -> dict[str, Any]:
    """`cluster.yaml` with machines of SIZES that are processes of this machine."""
    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    kinds = {
        name: {"resources": {"CPU": SIZES[name]}, "node_config": {}, "min_workers": 0, "max_workers": 1}
        for name in config["available_node_types"]
    }
    kinds[HEAD] = {**kinds.pop("head"), "max_workers": 0}
    kept = {key: config[key] for key in ("cluster_name", "upscaling_speed")}
    return {
        **kept,
        "max_workers": 2,
        "idle_timeout_minutes": IDLE_MINUTES,
        "provider": {
            "type": "fake_multinode",
            "gcs_address": f"{ray.util.get_node_ip_address()}:{port}",
            "use_node_id_as_ip": True,  # all of them have the same IP address
            "disable_node_updaters": True,  # there is no SSH to them
        },
        "available_node_types": kinds,
        "head_node_type": HEAD,
        # Nothing is copied or run on these machines, but Ray's autoscaler requires these keys.
        "auth": {},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        "cluster_synced_files": [],
        **{f"{where}_setup_commands": [] for where in ("head", "worker")},
        **{f"{where}_start_ray_commands": [] for where in ("head", "worker")},
        "initialization_commands": [],
        "setup_commands": [],
        "docker": {},
    }


class Watch(threading.Thread):
    """Records the number of machines whenever it changes."""

    def __init__(self, address: str, environment: dict[str, str]):
        super().__init__(daemon=True)
        self.address, self.environment = address, environment
        self.seen: list[tuple[float, int]] = []
        self.started = time.monotonic()

    def run(self) -> None:
        code = (
            "import ray,sys,time\nray.init(address=sys.argv[1],logging_level='ERROR')\nwhile True:\n"
            " print(sum(n['Alive'] for n in ray.nodes()),flush=True); time.sleep(1)"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", code, self.address], env=self.environment, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip().isdigit() and (not self.seen or self.seen[-1][1] != int(line)):
                self.seen.append((round(time.monotonic() - self.started, 1), int(line)))

    def now(self) -> int:
        return self.seen[-1][1] if self.seen else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/autoscaling.json"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tccp-autoscaling-") as place:
        record = measure(Path(place))
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


def measure(place: Path) -> dict[str, Any]:
    port, dashboard = trainings.free_port(), trainings.free_port()
    config = place / "cluster.yaml"
    config.write_text(yaml.safe_dump(fake_cluster(port)))
    write_clips(place / "films", 4, 1.0, seed=3)
    environment = {
        **os.environ,
        "HOME": str(place),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,  # the id by which the autoscaler recognises the head
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_AUTH_MODE": "disabled",
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
        "TCCP_CLUSTER_MAX": f"CPU={sum(SIZES.values())},GPU=0",
        "OMP_NUM_THREADS": "1",
    }
    program = str(Path(sys.executable).parent / "ray")
    options = ["--num-cpus=0", f"--port={port}", f"--dashboard-port={dashboard}", f"--autoscaling-config={config}"]
    with (place / "ray.log").open("w") as log:
        head = subprocess.Popen(
            [program, "start", "--head", "--block", "--disable-usage-stats", *options],
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        while "Ray runtime started" not in (place / "ray.log").read_text():
            if head.poll() is not None:
                raise SystemExit((place / "ray.log").read_text())
            time.sleep(0.2)
        watch = Watch(f"127.0.0.1:{port}", environment)
        watch.start()
        storage = f"file://{place}/storage"
        data, untrained = f"file://{place}/clips", place / "untrained"
        trainings.write_untrained_pipeline(untrained)
        size = [item for item in trainings.OVERRIDES if item.startswith("picture_px")]
        preprocess = ["ray_jobs/preprocess.py", str(place / "films"), data, "--backend", "truth", "--set", *size]
        train = trainings.command("stage1", data, storage, "--autoencoder", str(untrained))[1:]
        phases = {}
        phases["before"] = settled(watch, 1)
        for name, job in (("preprocessing", preprocess), ("training", train)):
            began = len(watch.seen)
            # No `--working-dir`: all machines share one copy of it, and the first machine that is removed deletes it.
            submit = [program, "job", "submit", "--", "python", str(ROOT / job[0]), *job[1:]]
            done = subprocess.run(submit, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(done.stdout[-5000:] + done.stderr[-2000:])
            phases[name] = {"most_machines": max(count for _, count in watch.seen[began - 1 :])}
            phases[f"after {name}"] = settled(watch, 1)
        return {"idle_minutes": IDLE_MINUTES, "phases": phases, "machines_over_time_s": watch.seen}
    finally:
        below = psutil.Process(head.pid).children(recursive=True)
        trainings.end([psutil.Process(head.pid), *below])


def settled(watch: Watch, machines: int, timeout_s: float = 180) -> dict[str, Any]:
    """Waits until there are this many machines, including the head, or the time is over."""
    began = time.monotonic()
    while watch.now() != machines and time.monotonic() - began < timeout_s:
        time.sleep(0.5)
    return {"machines": watch.now(), "after_s": round(time.monotonic() - began, 1)}


if __name__ == "__main__":
    main()
