"""Costs and savings of Ray and DeepSpeed: step times, waiting for data, memory.

`python benchmarks/training.py --out docs/training.json` trains one variant of the preset toy on RoundTable, with
latents encoded before and one thread per worker. All runs take place one after the other, `--rounds` times. The result
of each is the lower quartile of its step times over all rounds, because other work on a shared machine only adds time.
Networks start untrained, which costs the same.

`python benchmarks/training.py --turns --steps 110` measures only the ratio of Ray with DeepSpeed to plain torch. Two
trainings take turns of ten seconds: one is stopped while the other runs, so changes of the machine's speed affect both.
The result goes into the same file.

`python benchmarks/training.py --device cuda --preset paper --out docs/training_gpu.json --peak-tflops 989` trains every
network of the preset on one GPU, also compiled, and measures the utilisation of the GPU's arithmetic. It trains the
network that `--variant` names also under Ray and DeepSpeed: checkpointed, offloaded, and with latents encoded in step.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
PAIR = ("ray_1_worker", "plain_torch")
RATIOS = {
    "ray_and_deepspeed_to_plain_torch": PAIR,
    "compiled_to_plain_torch": ("plain_torch_compiled", "plain_torch"),
    "two_workers_to_one": ("ray_1_worker", "ray_2_workers_zero_1"),
}
"""Ratios of step times. Both must come from one call, because the speed of shared machines changes."""
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
SKIPPED = 0.4
"""Share of the first steps that do not count: caches are cold, and Ray is still starting processes."""
FILMS, SECONDS = 16, 3.0
TURN_S, BY_TURNS = 10.0, "by_turns"
Records = list[dict[str, float]]
VARIANTS = ["landmark_first", "landmark_sequence", "face_first", "face_sequence"]


@dataclass(frozen=True)
class Case:
    """One configuration. workers: 0 means plain torch in one process, without Ray and DeepSpeed."""

    name: str
    variant: str
    workers: int = 0
    zero_stage: int = 0
    checkpointing: bool = False
    compiled: bool = False
    in_step: bool = False
    offload: str = "none"


def cases(device: str, variant: str) -> Iterator[Case]:
    if device == "cpu":
        yield Case("plain_torch", variant)
        yield Case("plain_torch_compiled", variant, compiled=True)
        yield Case("ray_1_worker", variant, 1, 0)
        yield Case("ray_1_worker_zero_1", variant, 1, 1)
        yield Case("ray_1_worker_checkpointing", variant, 1, 0, checkpointing=True)
        for stage in range(4):
            yield Case(f"ray_2_workers_zero_{stage}", variant, 2, stage)
        return
    for each in [variant, *(other for other in VARIANTS if other != variant)]:
        name = "plain_torch" if each == variant else f"plain_torch_{each}"
        yield Case(name, each)
        yield Case(f"{name}_compiled", each, compiled=True)
        if each == variant:
            yield Case("ray_1_worker", variant, 1, 0)
            yield Case("ray_1_worker_compiled", variant, 1, 0, compiled=True)
            yield Case("ray_1_worker_zero_1", variant, 1, 1)
            yield Case("ray_1_worker_checkpointing", variant, 1, 0, checkpointing=True)
            yield Case("ray_1_worker_in_step", variant, 1, 0, in_step=True)
            yield Case("ray_1_worker_offload_optimizer", variant, 1, 1, offload="optimizer")
            yield Case("ray_1_worker_offload_parameters", variant, 1, 3, offload="parameters")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/training.json"))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", nargs="*", help="names of runs to measure; other results in --out stay")
    parser.add_argument("--turns", action="store_true", help="measure only the ratio of Ray to plain torch, in turns")
    parser.add_argument("--storage", type=Path, help="folder to keep clips and latents in, for later calls")
    parser.add_argument("--preset", default="toy")
    parser.add_argument("--variant", default="landmark_first")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--batch-size", type=int, help="default: the preset's batch size")
    parser.add_argument("--set", nargs="*", action="extend", default=[], metavar="KEY=VALUE", help="settings to change")
    parser.add_argument(
        "--peak-tflops", type=float, help="peak TFLOPS of the GPU in the training precision, for its utilisation"
    )
    parser.add_argument("--case", help=argparse.SUPPRESS)  # internal: one plain torch run in a separate process
    arguments = parser.parse_args()
    if arguments.case is not None:
        plain(arguments, Case(**json.loads(arguments.case)))
        return
    with tempfile.TemporaryDirectory(prefix="tccp-bench-") as place:
        (take_turns if arguments.turns else measure)(arguments, (arguments.storage or Path(place)).absolute())
    print(arguments.out.read_text())


def overrides(arguments: argparse.Namespace, case: Case | None = None) -> list[str]:
    return [
        f"training.max_steps={arguments.steps}",
        "training.log_every=1",
        "training.checkpoint_every=1000000",
        "training.initial_frames=truth",
        "training.start_from_first=false",
        f"training.precision={'fp32' if arguments.device == 'cpu' else 'bf16'}",
        *([f"training.batch_size={arguments.batch_size}"] if arguments.batch_size else []),
        *(["network.gradient_checkpointing=true"] if case and case.checkpointing else []),
        *arguments.set,
    ]


def measure(arguments: argparse.Namespace, place: Path) -> None:
    prepare(arguments, place)
    record: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.only and arguments.out.exists() else {}
    every = list(cases(arguments.device, arguments.variant))
    chosen = [one for one in every if one.name in (arguments.only or [case.name for case in every])]
    runs = dict(record.get("runs", {}))
    for case in chosen:
        runs.pop(case.name, None)
    failed: set[str] = set()
    records: dict[str, list[Records]] = {}
    before = {name: record[name] for name in (*RATIOS, BY_TURNS) if name in record}
    for _ in range(arguments.rounds):
        for case in chosen:
            metrics = train(arguments, case, place)
            if metrics is None:
                failed.add(case.name)
                continue
            records.setdefault(case.name, []).append([json.loads(line) for line in metrics.read_text().splitlines()])
            runs[case.name] = figures(records[case.name], arguments, case)
            print(case.name, runs[case.name], file=sys.stderr, flush=True)
            arguments.out.write_text(json.dumps(summary(arguments, runs, set(records), before), indent=1) + "\n")
    if failed:
        raise SystemExit(f"failed: {', '.join(sorted(failed))}; the others are in {arguments.out}")


def summary(
    arguments: argparse.Namespace, runs: dict[str, dict[str, float]], measured: set[str], before: dict[str, Any]
) -> dict[str, Any]:
    """The record. measured: runs of this call. before: ratios of earlier calls, kept unless this call has its own."""
    record: dict[str, Any] = {
        "machine": machine(arguments.device),
        "preset": arguments.preset,
        "variant": arguments.variant,
        "runs": runs,
        **before,
    }
    for name, (over, under) in RATIOS.items():
        if {over, under} <= measured:
            record[name] = round(runs[over]["step_s"] / runs[under]["step_s"], 3)
    return record


def machine(device: str) -> str:
    if device == "cpu":
        return f"{platform.machine()}, {os.cpu_count()} cores, one thread to a worker"
    import torch

    return f"{torch.cuda.get_device_name()}, {os.cpu_count()} CPU cores, torch {torch.__version__}, bf16"


def prepare(arguments: argparse.Namespace, place: Path) -> None:
    """Makes clips and an untrained pipeline unless they exist."""
    from preprocessing.plan import make_plan
    from preprocessing.run import preprocess
    from tccp.clips.clip_table import INDEX
    from tccp.config import load_settings
    from tccp.inference.manifest import MANIFEST
    from tccp.inference.pipeline_folder import write_untrained
    from tccp.roundtable import write_clips

    settings = load_settings(arguments.preset, overrides(arguments))
    if not (place / "clips" / INDEX).exists():
        write_clips(place / "films", FILMS, SECONDS, seed=1)
        preprocess([place / "films"], place / "clips", make_plan(settings.picture_px, "truth"))
    if not (place / "untrained" / MANIFEST).exists():
        write_untrained(place / "untrained", settings, ())


def train(arguments: argparse.Namespace, case: Case, place: Path) -> Path | None:
    """Runs a case in a separate process. Returns the path of its metrics, or None if it failed."""
    name = f"{case.name}-{time.time_ns()}"
    command, metrics = command_of(arguments, case, place, name)
    done = subprocess.run(command, env=ONE_THREAD, capture_output=True, text=True, check=False)
    if done.returncode:
        print(case.name, "failed:", done.stdout[-1000:], done.stderr[-4000:], file=sys.stderr, flush=True)
        return None
    kept = place / f"{name}.jsonl"
    shutil.copyfile(metrics, kept)
    shutil.rmtree(place / "runs" / name if case.workers else place / name)
    return kept


def command_of(arguments: argparse.Namespace, case: Case, place: Path, name: str) -> tuple[list[str], Path]:
    """The command of a case, and the path of its metrics."""
    if case.workers:
        command = [sys.executable, str(ROOT / "ray_jobs" / "train_stage1.py"), "--set", *overrides(arguments, case)]
        command += ["--variants", case.variant, "--workers", str(case.workers), "--zero-stage", str(case.zero_stage)]
        command += ["--device", arguments.device, "--preset", arguments.preset, "--data", str(place / "clips")]
        command += ["--storage", str(place), "--name", name, "--autoencoder", str(place / "untrained")]
        command += ["--mlflow", "none", "--validate-every", "0", *(["--compile"] if case.compiled else [])]
        command += ["--latents", "in-step"] if case.in_step else []
        command += ["--offload", case.offload]
        metrics = place / "runs" / name / case.variant / "metrics.jsonl"
    else:
        given = [f"--{key.replace('_', '-')}={getattr(arguments, key)}" for key in ("steps", "preset", "device")]
        given += [f"--batch-size={arguments.batch_size}"] if arguments.batch_size else []
        given += ["--set", *arguments.set] if arguments.set else []
        given += ["--storage", str(place), "--out", name, "--case", json.dumps(vars(case))]
        command = [sys.executable, __file__, *given]
        metrics = place / name / "metrics.jsonl"
    return command, metrics


def take_turns(arguments: argparse.Namespace, place: Path) -> None:
    """Runs the two trainings of PAIR in turns: one is stopped while the other runs."""
    prepare(arguments, place)
    found = {case.name: case for case in cases(arguments.device, arguments.variant)}
    now = time.time_ns()
    jobs = [command_of(arguments, found[name], place, f"{name}-{now}") for name in PAIR]
    log = place / "turns.log"
    with log.open("w") as file:
        ray, plain = (
            subprocess.Popen(command, env=ONE_THREAD, stdout=file, stderr=file, text=True) for command, _ in jobs
        )
        try:
            wait_by_turns(ray, plain, log)
        finally:
            ray.kill()  # has no effect on a process that has ended
            plain.kill()
    if ray.returncode or plain.returncode:
        raise SystemExit(log.read_text()[-4000:])
    runs = {}
    for name, (_, metrics) in zip(PAIR, jobs, strict=True):
        records = [json.loads(line) for line in metrics.read_text().splitlines()]
        runs[name] = figures([records], arguments, found[name], longest_s=TURN_S)
        shutil.rmtree(metrics.parent.parent if found[name].workers else metrics.parent)
    over, under = (runs[name] for name in PAIR)
    record = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    ratio = round(over["median_s"] / under["median_s"], 3)
    record[BY_TURNS] = {"ray_and_deepspeed_to_plain_torch": ratio, "runs": runs}
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")


def wait_by_turns(ray: subprocess.Popen[str], plain: subprocess.Popen[str], log: Path) -> None:
    """Waits until both have ended. The Ray job gets the first turn, once it trains: before, it cannot be stopped."""
    plain.send_signal(signal.SIGSTOP)
    while ray.poll() is None and "loss" not in log.read_text():
        time.sleep(0.5)
    rays_turn = True
    while ray.poll() is None and plain.poll() is None:
        send_to(ranks_and_readers(ray.pid), signal.SIGCONT if rays_turn else signal.SIGSTOP)
        send_to([psutil.Process(plain.pid)], signal.SIGSTOP if rays_turn else signal.SIGCONT)
        deadline = time.monotonic() + TURN_S
        while time.monotonic() < deadline and ray.poll() is None and plain.poll() is None:
            time.sleep(0.1)
        rays_turn = not rays_turn
    if ray.poll() is None:
        send_to(ranks_and_readers(ray.pid), signal.SIGCONT)
    if ray.wait():
        return
    plain.send_signal(signal.SIGCONT)
    plain.wait()


def ranks_and_readers(pid: int) -> list[psutil.Process]:
    found = []
    for one in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if any(name in " ".join(one.cmdline()) for name in ("RayTrainWorker", "MapWorker")):
                found.append(one)
    return found


def send_to(processes: Sequence[psutil.Process], sent: signal.Signals) -> None:
    for one in processes:
        with contextlib.suppress(psutil.Error):
            one.send_signal(sent)


def figures(
    rounds: list[Records], arguments: argparse.Namespace, case: Case, longest_s: float = math.inf
) -> dict[str, float]:
    """Results of a case.

    step_s: lower quartile of step times. clips_s: windows per second at step_s. data_wait: share of the time.
    memory_mib: peak of rank 0 (of its GPU, if it has one). utilisation: share of the GPU's peak; a step counts as three
    forward passes, recomputation by checkpointing does not count.
    longest_s: longer steps were stopped in between and do not count.
    """
    from tccp.cli.network_counts import describe
    from tccp.config import load_settings

    times, waited = [], 0.0
    for records in rounds:
        skipped = max(1, round(len(records) * SKIPPED))
        for before, record in zip(records[skipped - 1 :], records[skipped:], strict=False):
            seconds = record["seconds"] - before["seconds"]
            if seconds < longest_s:
                times.append(seconds)
                waited += record["data_wait"] * seconds
    memory = max(record.get("gpu_memory_mib", record["memory_mib"]) for records in rounds for record in records)
    step_s = statistics.quantiles(times, n=4)[0]
    settings = load_settings(arguments.preset, overrides(arguments, case))
    batch = settings.for_variant(case.variant).training.batch_size  # type: ignore[arg-type]
    found = {
        "step_s": round(step_s, 4),
        "median_s": round(statistics.median(times), 4),
        "steps": len(times),
        "batch_size": batch,
        "clips_s": round(batch / step_s, 2),
        "data_wait": round(waited / sum(times), 4),
        "memory_mib": round(memory),
    }
    if arguments.peak_tflops:
        rows = {row["variant"]: row for row in describe(settings)}
        work = 3 * rows[case.variant]["gflop_per_window"] * 1e9 * batch
        found["utilisation"] = round(work / step_s / arguments.peak_tflops / 1e12, 4)
    return found


def plain(arguments: argparse.Namespace, case: Case) -> None:
    """The same training with the same loop, without Ray and DeepSpeed, on the existing latents."""
    import torch

    from tccp.clips.clip_table import ClipTable
    from tccp.config import load_settings
    from tccp.models.autoencoder import PictureAutoencoder
    from tccp.training.fit_variant import train_variant
    from tccp.training.latent_cache import LatentCache
    from tccp.training.run_folder import RunFolder

    torch.set_num_threads(1)
    place = arguments.storage
    settings = load_settings(arguments.preset, overrides(arguments, case))
    autoencoder = PictureAutoencoder.load(place / "untrained" / "autoencoder").to(arguments.device).eval()
    cache = LatentCache(place, ClipTable(place / "clips"), settings, autoencoder, None, [case.variant])
    cache.build()
    folder = RunFolder.open(place / arguments.out, settings, case.variant, resume=False)
    train_variant(case.variant, settings, cache, folder, device=arguments.device, compiled=case.compiled)


if __name__ == "__main__":
    main()
