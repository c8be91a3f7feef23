"""Ray: connecting to a cluster or starting one on this machine, and what it has or can grow to."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from tccp.errors import TccpError
from tccp.processes import importable_in_children

API_SERVER = "RAY_API_SERVER_ADDRESS"


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


QUIET_RAY = {
    "RAY_DATA_LOG_LEVEL": "CRITICAL",  # errors are raised, too
    "RAY_DATA_USAGE_DISABLED": "1",  # else an actor more, pinned to one machine
}
"""Environment of what speaks to users, set before Ray starts."""
