"""Ray: connecting to a cluster or starting one, its size, blocks of Ray Data, and errors from workers."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pyarrow as pa

from tccp.errors import StorageError, TccpError
from tccp.processes import importable_in_children

API_SERVER = "RAY_API_SERVER_ADDRESS"
CLUSTER_MAX = "TCCP_CLUSTER_MAX"
"""Environment variable: the size that an autoscaler may give the cluster, as `CPU=64,GPU=8`. Ray does not know it."""
QUIET_RAY = {
    "RAY_DATA_LOG_LEVEL": "CRITICAL",  # errors are also raised
    "RAY_DATA_USAGE_DISABLED": "1",  # else Ray Data starts one more actor, pinned to one machine
}
"""Environment variables, set before Ray starts, that keep Ray Data's own log lines from users."""
_MAX_BLOCKS = 2000


@contextmanager
def ray_cluster(
    min_cpus: int = 2, *, dashboard: bool = True, worker_logs: bool = True, extra: str = "train"
) -> Iterator[None]:
    """Ray within the context: the cluster of RAY_ADDRESS or of the job, else a new one on this machine.

    min_cpus: logical CPUs of a new cluster, if this machine has fewer. dashboard: a new cluster needs one for Ray
    Train. worker_logs: whether workers' log lines are shown here. extra: of pyproject.toml, for the message.
    Raises TccpError if Ray is not installed.
    """
    try:
        import ray
    except ImportError:
        raise TccpError(f"this needs Ray: pip install -c constraints.txt -e '.[{extra}]'") from None
    if ray.is_initialized():
        yield
        return
    for name, value in QUIET_RAY.items():
        os.environ.setdefault(name, value)
    options: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": worker_logs}
    with ExitStack() as undo:
        if not os.environ.get("RAY_ADDRESS"):
            importable_in_children()
            options |= {"address": "local", "num_cpus": max(min_cpus, os.cpu_count() or 1)}
            options["include_dashboard"] = dashboard
            if dashboard:
                # An actor of Ray Train asks the dashboard whether the training's controller lives, and frees its
                # resources if not. Without an address it asks any cluster that it finds on this machine.
                options["dashboard_port"] = undo.enter_context(_own_dashboard())
        ray.init(**options)
        undo.callback(ray.shutdown)
        yield


@contextmanager
def _own_dashboard() -> Iterator[int]:
    """A free port, at which processes started in the context look for Ray's dashboard."""
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


# Size


def num_nodes() -> int:
    """Machines of the cluster now; at least two if an autoscaler may add more (see `max_resources`)."""
    import ray

    present = ray.cluster_resources()
    grows = any(most > present.get(name, 0) for name, most in max_resources().items())
    return max(sum(1 for node in ray.nodes() if node["Alive"]), 2 if grows else 1)


def max_resources() -> dict[str, float]:
    """The cluster's resources, or those that its autoscaler may bring it to. Raises TccpError."""
    import ray

    most = {name: float(value) for name, value in ray.cluster_resources().items()}
    for item in filter(None, os.environ.get(CLUSTER_MAX, "").split(",")):
        name, _, number = item.partition("=")
        try:
            most[name.strip()] = max(most.get(name.strip(), 0.0), float(number))
        except ValueError:
            raise TccpError(f"{CLUSTER_MAX}={os.environ[CLUSTER_MAX]}: write it as CPU=64,GPU=8") from None
    return most


# Ray Data


def dataset(rows: pa.Table) -> Any:
    """A Ray Dataset of a table: one row to a block, more only in tables of over 2000 rows.

    Not ray.data.from_arrow, whose tasks ask for a whole CPU each: training workers may hold all but a part of one.
    """
    import ray.data

    size = max(1, -(-rows.num_rows // _MAX_BLOCKS))
    return ray.data.from_blocks([rows.slice(start, size) for start in range(0, rows.num_rows, size)])


@contextmanager
def data_settings(*, in_order: bool, block_bytes: int | None = None) -> Iterator[None]:
    """Ray Data's settings within the context: no progress bars, and errors of workers as they were raised.

    in_order: whether rows come out in the order in which they went in. block_bytes: size of the blocks that steps make.
    """
    import ray.data

    context = ray.data.DataContext.get_current()
    options = context.execution_options
    names = ("target_max_block_size", "target_min_block_size", "enable_progress_bars", "raise_original_map_exception")
    before = {name: getattr(context, name) for name in names}
    order_before, locality_before = options.preserve_order, options.locality_with_output
    context.enable_progress_bars, context.raise_original_map_exception = False, True
    options.preserve_order, options.locality_with_output = in_order, False
    if block_bytes is not None:
        context.target_max_block_size, context.target_min_block_size = block_bytes, 1
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)
        options.preserve_order, options.locality_with_output = order_before, locality_before


@contextmanager
def worker_errors() -> Iterator[None]:
    """Raises a TccpError or StorageError that was raised in a Ray task or actor as itself, with one line.

    Ray raises an error of the same type whose text is a traceback, nested once for each task that it passed; Ray Data
    adds lines about its settings.
    """
    try:
        yield
    except (TccpError, StorageError) as error:
        original = error
        while isinstance(cause := getattr(original, "cause", None), TccpError | StorageError):
            original = cause
        if "\n" not in str(original):
            raise original from None
        kind = StorageError if isinstance(original, StorageError) else TccpError
        raise kind(str(original).partition("\n")[0]) from None
