"""What a Ray cluster has, or could have, and whether a training fits."""

from __future__ import annotations

from collections.abc import Mapping

from tccp.config import DeepSpeedSettings
from tccp.errors import TccpError
from tccp.files import Folder
from tccp.training.launcher.ingest import READER_CPUS
from tccp.training.launcher.job import Spread

WORKER_CPUS = 0.5
"""CPUs that a rank without a GPU asks for. They are logical: what it uses is decided by its threads."""
GPU_WORKER_CPUS = 1.0
MOST_READERS = 4


def spread_over(
    resources: Mapping[str, float | int],
    *,
    workers: int | None,
    device: str,
    parallel: DeepSpeedSettings,
    readers: int | None = None,
    **more: float | int | bool,
) -> Spread:
    """How a training is spread over a cluster of these resources.

    workers: by default one for each GPU; without GPUs two, or one where there is one CPU. device: auto, cpu or cuda.
    Raises TccpError if that does not fit, with at least one CPU, or half of a single one, left to read data.
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
        readers = min(MOST_READERS, max(1, int(left / least / 2)))
    return Spread(workers, use_gpu, per_worker, readers, parallel, **more)  # type: ignore[arg-type]


def readers_now(spread: Spread) -> int:
    """Readers of each rank for which the cluster has CPUs now: fewer than planned after it has lost machines."""
    import ray

    left = float(ray.cluster_resources().get("CPU", 0)) - spread.workers * spread.cpus_per_worker
    return max(1, min(spread.readers, int(left / READER_CPUS / spread.workers)))


def check_storage(storage: Folder) -> None:
    """Raises TccpError if it cannot be written."""
    storage.write(".tccp", b"")


def check_shared(what: str, folder: Folder, nodes: int) -> None:
    """Raises TccpError for a folder of one machine where the cluster has several."""
    shared = folder.local is None or folder.place.startswith(("file://", "local://"))
    if nodes > 1 and not shared:
        raise TccpError(
            f"{what} {folder} is a folder of one machine, and the cluster has, or can grow to, {nodes}: give a URL "
            "(s3://..., gs://...), or file:///... for a folder that all of them share"
        )
