"""Starting the child and making sure of its end."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import weakref
from dataclasses import asdict
from pathlib import Path

import tccp
from tccp.media.sandbox.channel import Channel, Closed
from tccp.media.sandbox.limits import Limits

_START_S = 120.0  # on a machine whose disk is slow and whose cores are busy
_END_S = 10.0
# The child has no use for the rest, in which there may be secrets.
_ENVIRONMENT = ("LANG", "LC_", "LD_", "PATH", "PYTHON", "TZ")


class Process:
    """A child at work. It ends with `end`, with this object and with this process, also if that is killed.

    Raises RuntimeError if it cannot be started.
    """

    def __init__(self, limits: Limits, threads: int | None):
        self.owner = os.getpid()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.channel = Channel(ours)
        with theirs:
            try:
                self._popen = _popen(theirs.fileno(), self.owner)
            except OSError as error:
                self.channel.close()
                raise _not_started(str(error.strerror)) from None
        self._finalizer = weakref.finalize(self, _end, self._popen, self.channel, self.owner)
        assert self._popen.stderr is not None
        with self._popen.stderr as complaints:
            try:
                self.channel.send({"limits": asdict(limits), "threads": threads})
                self.channel.receive(_START_S)
            except (Closed, TimeoutError, ValueError):
                self.end()
                said = complaints.read().decode(errors="replace").strip().splitlines()
                raise _not_started(said[-1] if said else f"status {self._popen.returncode}") from None

    @property
    def pid(self) -> int:
        return self._popen.pid

    def end(self) -> None:
        self._finalizer()

    def cause_of_death(self) -> str:
        """After the channel was found closed."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(_END_S)
        self.end()
        code = self._popen.returncode
        if code is not None and code < 0:
            with contextlib.suppress(ValueError):
                return signal.Signals(-code).name
        return f"status {code}"


def _popen(descriptor: int, owner: int) -> subprocess.Popen[bytes]:
    signalled = "signalled" if threading.current_thread() is threading.main_thread() else "watching"
    return subprocess.Popen(
        [sys.executable, "-m", f"{__package__}.child", str(descriptor), str(owner), signalled],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        pass_fds=[descriptor],
        process_group=0,  # an interrupt from the keyboard is sent to the whole group
        cwd="/",
        env=_environment(),
    )


def _not_started(why: str) -> RuntimeError:
    return RuntimeError(f"the process that decodes media did not start: {why}")


def _end(popen: subprocess.Popen[bytes], channel: Channel, owner: int) -> None:
    channel.close()
    if os.getpid() == owner:  # in a fork of the owner, this is somebody else's child
        popen.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # it may hang in the kernel, on a disk that is gone
            popen.wait(_END_S)


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name.startswith(_ENVIRONMENT)}
    root = str(Path(tccp.__file__).resolve().parent.parent)
    places = [root, *(str(Path(place).absolute()) for place in sys.path)]
    single = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return kept | single | {"PYTHONPATH": os.pathsep.join(places), "PYTHONSAFEPATH": "1"}
