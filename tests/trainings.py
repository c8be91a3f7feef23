"""Trainings on Ray that are small enough for tests, and ways to kill parts of them. Used by `benchmarks/`, too."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import psutil

from tccp.config import VariantName

ROOT = Path(__file__).resolve().parent.parent
STEPS, EVERY = 24, 4
"""Steps of a training, and between its checkpoints."""
OVERRIDES = [
    "picture_px=32",
    "window=4",
    "autoencoder.latent_channels=4",
    "autoencoder.block_channels=[8,8]",
    "autoencoder.norm_groups=4",
    "autoencoder.batch_size=8",
    "network.base_channels=16",
    "network.channel_multipliers=[1,2]",
    "network.blocks_per_scale=1",
    "network.condition_dim=16",
    "network.time_embedding_dim=16",
    "network.attention_head_dim=16",
    "lips.size_px=16",
    "lips.liplet_channels=4",
    "lips.liplet_steps=3",
    "sampling.steps=2",
    "training.batch_size=8",
    "training.initial_frames=truth",
    "training.start_from_first=false",
    "training.warmup_steps=4",
    "training.precision=fp32",
    "training.log_every=1",
]
Kill = Literal["rank", "raylet", "driver", "notice"]
"""notice: nothing is killed yet; a machine is said to be taken away soon."""


def make_data(folder: Path) -> tuple[Path, Path]:
    """A clip table of four drawn films, and a pipeline of untrained networks, both for OVERRIDES."""
    from preprocessing.plan import make_plan
    from preprocessing.run import preprocess
    from tccp.config import load_settings
    from tccp.roundtable import write_clips

    settings = load_settings("toy", OVERRIDES)
    write_clips(folder / "films", 4, 1.0, seed=3)
    preprocess([folder / "films"], folder / "clips", make_plan(settings.picture_px, "truth"))
    return folder / "clips", write_untrained_pipeline(folder / "untrained")


def write_untrained_pipeline(folder: Path) -> Path:
    """Auto-encoder and lips for OVERRIDES."""
    from tccp.config import load_settings
    from tccp.inference.pipeline_folder import write_untrained

    write_untrained(folder, load_settings("toy", OVERRIDES), ())
    return folder


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def command(
    job: str, data: Path | str, storage: Path | str, *options: str, steps: int = STEPS, every: int = EVERY
) -> list[str]:
    """A job's command line, on two workers, without MLflow."""
    overrides = [*OVERRIDES, f"training.checkpoint_every={every}"]
    return [
        *(sys.executable, str(ROOT / "ray_jobs" / f"train_{job}.py"), "--set", *overrides, "--data", str(data)),
        *("--storage", str(storage), "--name", "run", "--workers", "2", "--max-steps", str(steps), "--mlflow", "none"),
        *("--validate-every", "0"),
        *options,
    ]


def run_folder(storage: Path, component: str) -> Path:
    return storage / "runs" / "run" / component


def committed(run: Path) -> int:
    """Steps of the newest checkpoint that Ray Train has on record."""
    try:
        record = json.loads((run / "checkpoint_manager_snapshot.json").read_text())
    except (OSError, ValueError):
        return 0
    return max((int(one["checkpoint_dir_name"].split("-")[1]) for one in record["checkpoint_results"]), default=0)


def trace(run: Path) -> list[tuple[int, float, float]]:
    """(step, loss, gradient norm) of every step of a training that came to its end."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(record["step"], record["loss"], record["grad_norm"]) for record in records]


def wait_for(run: Path, steps: int, process: subprocess.Popen[str], timeout_s: float = 600) -> bool:
    """Until so many steps are on record; whether the process was still at work then."""
    deadline = time.monotonic() + timeout_s
    while committed(run) < steps and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    return process.poll() is None


def ended(process: subprocess.Popen[str], timeout_s: float = 900) -> int | None:
    """Its exit status, or None if it did not end in time and was killed."""
    try:
        return process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return None


def ranks_below(pid: int) -> list[psutil.Process]:
    """Training workers among the processes that one has started, and those have."""
    found = []
    for one in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if any("RayTrainWorker" in part for part in one.cmdline()):
                found.append(one)
    return found


def start(arguments: list[str], log: Path, **environment: str) -> subprocess.Popen[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    with log.open("a") as file:
        return subprocess.Popen(
            arguments, cwd=ROOT, env=env, stdout=file, stderr=file, text=True, start_new_session=True
        )


def kill_rank(pid: int, rng: random.Random) -> None:
    """One of the training workers below a process."""
    rng.choice(ranks_below(pid)).send_signal(signal.SIGKILL)


def kill_raylet(cluster: Any) -> None:
    """Of a node of a `ray.cluster_utils.Cluster`, other than the head, that has training workers; the node is gone."""
    for node in cluster.worker_nodes:
        if ranks_below(node.all_processes["raylet"][0].process.pid):
            node.kill_raylet()
            cluster.remove_node(node, allow_graceful=False)
            return
    raise AssertionError("no node but the head has training workers")


def give_notice(cluster: Any, seconds: int = 60) -> None:
    """That a node with training workers will be taken away, as clouds do with spot machines."""
    for node in cluster.worker_nodes:
        if ranks_below(node.all_processes["raylet"][0].process.pid):
            command = [str(Path(sys.executable).parent / "ray"), "drain-node", "--address", cluster.address]
            command += ["--node-id", node.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
            command += ["--reason-message", "a trial", "--deadline-remaining-seconds", str(seconds)]
            subprocess.run(command, check=True, capture_output=True)
            return
    raise AssertionError("no node but the head has training workers")


def plain_trace(
    component: VariantName,
    data: Path,
    untrained: Path,
    storage: Path,
    steps: int = STEPS,
    overrides: Sequence[str] = (),
) -> list[tuple[int, float, float]]:
    """The same training of a component in this process, by plain torch, uninterrupted."""
    from tccp.clips.clip_table import ClipTable
    from tccp.config import load_settings
    from tccp.files import Folder
    from tccp.inference.conditioning import training_conditions
    from tccp.models.autoencoder import PictureAutoencoder
    from tccp.models.variants import VARIANTS
    from tccp.training.fit_variant import train_variant
    from tccp.training.latent_cache import LatentCache
    from tccp.training.lip_folds import LipPlace
    from tccp.training.run_folder import RunFolder

    lengths = [f"training.max_steps={steps}", f"autoencoder.max_steps={steps}"]
    settings = load_settings("toy", [*OVERRIDES, *overrides, *lengths])
    needs_lips = "lips" in training_conditions(VARIANTS[component], settings)
    lips = LipPlace(settings.lips, Folder(untrained / "lips")).open() if needs_lips else None
    autoencoder = PictureAutoencoder.load(untrained / "autoencoder").eval()
    cache = LatentCache(storage, ClipTable(data), settings, autoencoder, lips, [component])
    cache.build()
    run = RunFolder.open(storage / "plain", settings, component, resume=False)
    train_variant(component, settings, cache, run)
    return trace(run.path)


def assert_same_trace(trace: Sequence[tuple[int, float, float]], expected: Sequence[tuple[int, float, float]]) -> None:
    """Every step once and in order, losses within 1e-4 and gradient norms within 1e-3, relative."""
    assert [step for step, _, _ in trace] == [step for step, _, _ in expected]
    for (step, loss, norm), (_, expected_loss, expected_norm) in zip(trace, expected, strict=True):
        assert abs(loss - expected_loss) <= 1e-4 * expected_loss, (step, loss, expected_loss)
        assert abs(norm - expected_norm) <= 1e-3 * expected_norm, (step, norm, expected_norm)


def kill_driver(process: subprocess.Popen[str]) -> None:
    """And with it the Ray that it started: as when the machine goes."""
    below = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    end(below)


def ray_below(pid: int) -> list[psutil.Process]:
    """Ray's processes among those that one has started, and those have."""
    found = []
    for one in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "ray" in " ".join(one.cmdline()):
                found.append(one)
    return found


def end(processes: list[psutil.Process]) -> None:
    for one in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
