"""What Ray and DeepSpeed cost, and what they save: step times, waiting for data, memory.

`python benchmarks/training.py --out docs/training.json`: one variant of the preset toy on RoundTable, latents encoded
before, one thread to a worker; medians over steps, all in one run on one machine. On a GPU: `--device cuda --preset
paper`, which also measures torch.compile and the share of the GPU's arithmetic that is put to use (`--peak-tflops`).
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
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SKIPPED = 0.4
"""Share of the steps, at the start, that is not counted: caches are cold, and Ray is still starting processes."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/training.json"))
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--only", nargs="*", help="of the runs with Ray, these alone")
    parser.add_argument("--storage", type=Path, help="keep clips and latents here, for another time")
    parser.add_argument("--preset", default="toy")
    parser.add_argument("--variant", default="landmark_first")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument(
        "--peak-tflops", type=float, help="of the GPU, in the precision trained in, for its utilisation"
    )
    parser.add_argument("--plain", type=Path, help=argparse.SUPPRESS)  # a run of plain torch, in a process of its own
    arguments = parser.parse_args()
    if arguments.plain is not None:
        plain(arguments)
        return
    with tempfile.TemporaryDirectory(prefix="tccp-bench-") as place:
        record = measure(arguments, arguments.storage or Path(place))
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


def overrides(arguments: argparse.Namespace) -> list[str]:
    return [
        f"training.batch_size={arguments.batch_size}",
        f"training.max_steps={arguments.steps}",
        "training.log_every=1",
        "training.checkpoint_every=1000000",
        "training.initial_frames=truth",
        "training.start_from_first=false",
        *(["training.precision=fp32"] if arguments.device == "cpu" else ["training.precision=bf16"]),
    ]


def measure(arguments: argparse.Namespace, place: Path) -> dict[str, Any]:
    runs: dict[str, dict[str, float]] = {}

    def ray(name: str, workers: int, *options: str, settings: tuple[str, ...] = ()) -> None:
        if arguments.only and name not in arguments.only:
            return
        command = [sys.executable, str(ROOT / "ray_jobs" / "train_stage1.py"), *overrides(arguments), *settings]
        command += ["--variants", arguments.variant, "--workers", str(workers), "--device", arguments.device]
        command += ["--storage", str(place), "--name", name, "--mlflow", "none", "--preset", arguments.preset]
        command += ["--validate-every", "0"]
        run([*command, *options])
        runs[name] = figures(place / "runs" / name / arguments.variant / "metrics.jsonl")
        print(name, runs[name], file=sys.stderr, flush=True)

    stages = ["0", "1", "2", "3"]
    ray("ray_1_worker", 1, "--zero-stage", "1")  # makes the data and encodes it, too
    run([sys.executable, __file__, *given(arguments), "--plain", str(place)])
    runs["plain_torch"] = figures(place / "plain" / "metrics.jsonl")
    print("plain_torch", runs["plain_torch"], file=sys.stderr, flush=True)
    ray("ray_1_worker_checkpointing", 1, "--zero-stage", "1", settings=("network.gradient_checkpointing=true",))
    if arguments.device == "cuda":
        ray("ray_1_worker_compiled", 1, "--zero-stage", "1", "--compile")
    else:
        for stage in stages:
            ray(f"ray_2_workers_zero_{stage}", 2, "--zero-stage", stage)
    record: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread to a worker",
        "preset": arguments.preset,
        "variant": arguments.variant,
        "batch_size": arguments.batch_size,
        "steps": round(arguments.steps * (1 - SKIPPED)),
        "runs": runs,
        "ray_and_deepspeed_to_plain_torch": runs["ray_1_worker"]["step_s"] / runs["plain_torch"]["step_s"],
    }
    if "ray_2_workers_zero_1" in runs:
        record["two_workers_to_one"] = runs["ray_1_worker"]["step_s"] / runs["ray_2_workers_zero_1"]["step_s"]
    if arguments.peak_tflops:
        record["utilisation"] = utilisation(arguments, runs)
    return record


def given(arguments: argparse.Namespace) -> list[str]:
    names = ("steps", "preset", "variant", "device", "batch_size")
    return [item for name in names for item in (f"--{name.replace('_', '-')}", str(getattr(arguments, name)))]


def run(command: list[str]) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-4000:])


def figures(metrics: Path) -> dict[str, float]:
    """step_s: median; data_wait: share of the time; memory_mib: peak of rank 0 (of its GPU, where it has one)."""
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    skipped = max(1, round(len(records) * SKIPPED))
    counted = records[skipped:]
    times = [b["seconds"] - a["seconds"] for a, b in zip(records[skipped - 1 :], counted, strict=False)]
    waited = sum(record["data_wait"] * time for record, time in zip(counted, times, strict=True))
    memory = max(record.get("gpu_memory_mib", record["memory_mib"]) for record in records)
    return {
        "step_s": round(statistics.median(times), 4),
        "data_wait": round(waited / sum(times), 4),
        "memory_mib": round(memory),
    }


def utilisation(arguments: argparse.Namespace, runs: dict[str, dict[str, float]]) -> dict[str, float]:
    """Share of the GPU's peak: a training step computes forward once and backward twice as much."""
    from tccp.config import load_settings
    from tccp.describe import describe

    rows = {row["variant"]: row for row in describe(load_settings(arguments.preset))}
    work = 3 * rows[arguments.variant]["gflop_per_window"] * 1e9 * arguments.batch_size
    peak = arguments.peak_tflops * 1e12
    return {name: round(work / values["step_s"] / peak, 4) for name, values in runs.items()}


def plain(arguments: argparse.Namespace) -> None:
    """The same training by the same loop, without Ray and DeepSpeed, on the latents that are there."""
    import torch

    from tccp.clip import ClipTable
    from tccp.config import load_settings
    from tccp.models.autoencoder import PictureAutoencoder
    from tccp.training.latents import LatentCache
    from tccp.training.run import RunFolder
    from tccp.training.variant import train_variant

    torch.set_num_threads(1)
    place = arguments.plain
    settings = load_settings(arguments.preset, overrides(arguments))
    table = ClipTable(place / "roundtable" / f"clips-{settings.picture_px}")
    pipeline = place / "runs" / "ray_1_worker" / "pipeline"
    autoencoder = PictureAutoencoder.load(pipeline / "autoencoder").eval()
    cache = LatentCache(place, table, settings, autoencoder, None, [arguments.variant])
    cache.build()
    folder = RunFolder.open(place / "plain", settings, arguments.variant, resume=False)
    train_variant(arguments.variant, settings, cache, folder, device=arguments.device)


if __name__ == "__main__":
    main()
