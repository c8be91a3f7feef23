"""What a Ray cluster has, or could have, and whether a training fits."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

from tccp.config import DeepSpeedSettings, TccpError
from tccp.files import Folder
from tccp.processes import importable_in_children
from tccp.training.launcher.ingest import READER_CPUS
from tccp.training.launcher.job import QUIET_RAY, Spread

WORKER_CPUS = 0.5
"""CPUs that a rank without a GPU asks for. They are logical: what it uses is decided by its threads."""
GPU_WORKER_CPUS = 1.0
API_SERVER = "RAY_API_SERVER_ADDRESS"
MOST_READERS = 4


@contextmanager
def connected() -> Iterator[None]:
    """The cluster of RAY_ADDRESS or of the job; else one on this machine, while the context is open."""
    try:
        import ray
    except ImportError:
        raise TccpError("this needs Ray: pip install -c constraints.txt -e '.[train]'") from None
    if ray.is_initialized():
        yield
        return
    for name, value in QUIET_RAY.items():
        os.environ.setdefault(name, value)
    with ExitStack() as undo:
        if os.environ.get("RAY_ADDRESS"):
            ray.init(logging_level="ERROR")
        else:
            importable_in_children()
            cpus = max(2, os.cpu_count() or 1)
            # An actor of Ray Train asks the dashboard whether the training's controller lives, and frees its place if
            # not. Told nothing, it asks whichever cluster it finds on this machine.
            port = undo.enter_context(_own_dashboard())
            ray.init("local", num_cpus=cpus, include_dashboard=True, dashboard_port=port, logging_level="ERROR")
        undo.callback(ray.shutdown)
        yield


@contextmanager
def _own_dashboard() -> Iterator[int]:
    """A port that is free, which processes started in the context take for that of Ray's dashboard."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = int(one.getsockname()[1])
    before = os.environ.get(API_SERVER)
    os.environ[API_SERVER] = f"http://127.0.0.1:{port}"
    try:
        yield port
    finally:
        os.environ.pop(API_SERVER)
        if before is not None:
            os.environ[API_SERVER] = before


def num_nodes() -> int:
    """Machines that are there now; at least two where an autoscaler may bring more (see `could_have`)."""
    import ray

    there = ray.cluster_resources()
    grows = any(most > there.get(name, 0) for name, most in could_have().items())
    return max(sum(1 for node in ray.nodes() if node["Alive"]), 2 if grows else 1)


CLUSTER_MAX = "TCCP_CLUSTER_MAX"
"""Environment variable that says to what an autoscaler may bring the cluster, e.g. `CPU=64,GPU=8`: Ray does not."""


def could_have() -> dict[str, float]:
    """Resources that are there, or that the autoscaler may bring the cluster to. Raises TccpError."""
    import ray

    there = {name: float(value) for name, value in ray.cluster_resources().items()}
    for item in filter(None, os.environ.get(CLUSTER_MAX, "").split(",")):
        name, _, number = item.partition("=")
        try:
            there[name.strip()] = max(there.get(name.strip(), 0.0), float(number))
        except ValueError:
            raise TccpError(f"{CLUSTER_MAX}={os.environ[CLUSTER_MAX]}: write it as CPU=64,GPU=8") from None
    return there


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
