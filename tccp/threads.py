"""How many threads arithmetic uses. Decided here for commands, the library, workers and ranks.

By default PyTorch uses a thread for each core, and threads that wait for each other do so by spinning. On a machine
with other work that takes up to fifty times as long. Here threads sleep while they wait (`wait_passively`), and parts
of a program that compute at the same time share the cores (`arithmetic_threads`).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tccp.errors import TccpError

VARIABLE = "TCCP_THREADS"
_PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}  # of GNU's and of Intel's OpenMP
_CGROUP = Path("/sys/fs/cgroup/cpu.max")


def wait_passively() -> None:
    """Lets OpenMP threads sleep while they wait, here and in child processes. It must run before torch is imported."""
    if "torch" not in sys.modules:
        for name, value in _PASSIVE.items():
            os.environ.setdefault(name, value)


def waits_passively() -> bool:
    return os.environ.get("OMP_WAIT_POLICY", "").upper() == "PASSIVE"


def usable_cores() -> int:
    """The cores that this process may use: its affinity, and a container's quota, rounded down."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = _CGROUP.read_text().split()
        cores = min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):  # no such file, or no quota ("max")
        pass
    return cores


def num_threads(shares: int = 1) -> int:
    """Threads for one of `shares` parts that compute at the same time; OMP_NUM_THREADS is the most, if it is set.

    TCCP_THREADS overrides both. Raises TccpError if TCCP_THREADS is not a whole number of at least 1.
    """
    given = os.environ.get(VARIABLE)
    if given is None:
        most = os.environ.get("OMP_NUM_THREADS", "")
        threads = max(1, usable_cores() // shares)
        return min(threads, int(most)) if most.isdecimal() and int(most) else threads
    if not given.isdecimal() or int(given) < 1:
        raise TccpError(f"{VARIABLE}={given}: give a whole number of threads, at least 1")
    return int(given)


@contextmanager
def arithmetic_threads(shares: int = 1) -> Iterator[int]:
    """Within the block, PyTorch uses `num_threads(shares)` threads, in all threads of Python."""
    import torch

    before, now = torch.get_num_threads(), num_threads(shares)
    torch.set_num_threads(now)
    try:
        yield now
    finally:
        torch.set_num_threads(before)
