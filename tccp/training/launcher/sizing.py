"""How many workers and readers a training gets on a cluster, and whether they fit."""

from __future__ import annotations

from collections.abc import Mapping

from tccp.config import DeepSpeedSettings
from tccp.errors import TccpError
from tccp.training.launcher.ingest import READER_CPUS
from tccp.training.launcher.job import Allocation

WORKER_CPUS = 0.5
"""Logical CPUs that a rank without a GPU asks for. Its number of threads decides how many it really uses."""
GPU_WORKER_CPUS = 1.0
MAX_READERS = 4


def allocate(
    resources: Mapping[str, float | int],
    *,
    workers: int | None,
    device: str,
    parallel: DeepSpeedSettings,
    readers: int | None = None,
    **limits: float | int | bool,
) -> Allocation:
    """The allocation of a training on a cluster of these resources.

    workers: by default one for each GPU; without GPUs two, or one on a single CPU. device: auto, cpu or cuda.
    limits: further fields of Allocation.
    Raises TccpError if the workers do not fit together with a reader (a quarter of a CPU) for each.
    """
    cpus, gpus = float(resources.get("CPU", 0)), int(resources.get("GPU", 0))
    if device not in ("auto", "cpu", "cuda"):
        raise TccpError(f"--device {device}: give auto, cpu or cuda")
    use_gpu = device == "cuda" or (device == "auto" and gpus > 0)
    if workers is None:
        workers = max(1, gpus) if use_gpu else (2 if cpus >= 2 else 1)
    if workers < 1:
        raise TccpError(f"--workers {workers}: give at least 1")
    per_worker = GPU_WORKER_CPUS if use_gpu else WORKER_CPUS
    if use_gpu and gpus < workers:
        raise TccpError(
            f"{workers} workers need {workers} GPUs, and the cluster has, or can grow to, {gpus}: give fewer "
            "--workers, or --device cpu"
        )
    left = cpus - workers * per_worker
    least = READER_CPUS * workers
    if left < least:
        most = int(cpus / (per_worker + READER_CPUS))
        raise TccpError(
            f"{workers} workers and their readers need {workers * (per_worker + READER_CPUS):g} CPUs, and the cluster "
            f"has, or can grow to, {cpus:g}: give --workers {most} or fewer"
            if most
            else f"training needs {per_worker + READER_CPUS:g} CPUs, and the cluster has {cpus:g}: start Ray with more"
        )
    if readers is None:
        readers = min(MAX_READERS, max(1, int(left / least / 2)))
    return Allocation(workers, use_gpu, per_worker, readers, parallel, **limits)  # type: ignore[arg-type]


def readers_now(allocation: Allocation) -> int:
    """Readers of each rank for which the cluster has CPUs now: fewer than allocated after it has lost machines."""
    import ray

    left = float(ray.cluster_resources().get("CPU", 0)) - allocation.workers * allocation.cpus_per_worker
    return max(1, min(allocation.readers, int(left / READER_CPUS / allocation.workers)))
