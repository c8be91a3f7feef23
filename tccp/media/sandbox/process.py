"""Starts the child process and makes sure that it ends."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import socket
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import tccp
from tccp.media.sandbox.channel import Channel, Closed
from tccp.media.sandbox.limits import Limits
from tccp.media.sandbox.messages import Ready, Start, parse_ready

_START_S = 120.0  # enough for a machine with a slow disk and busy cores
_END_S = 10.0
# glibc keeps the memory of a picture for the next one. By default it returns each to the kernel, which clears it anew.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(256 << 20)}
# The child does not need the other variables, which may hold secrets.
_ENVIRONMENT = ("LANG", "LC_", "LD_", "PATH", "PYTHON", "TZ")


class Process:
    """A child that starts. It ends with `end`, with this object, and with this process even if that is killed.

    Raises RuntimeError if the child cannot be started.
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
        with contextlib.suppress(Closed):  # `ready` says why
            self.channel.send(Start(limits=limits, threads=threads))

    @functools.cached_property
    def ready(self) -> Ready:
        """What the child says once it can decode; waits for that. Raises RuntimeError if it fails, and ends it."""
        assert self._popen.stderr is not None
        with self._popen.stderr as stderr:
            try:
                return self.channel.receive(parse_ready, _START_S)
            except (Closed, TimeoutError, ValueError):
                self._popen.kill()
                lines = stderr.read().decode(errors="replace").strip().splitlines()
                self.end()
                raise _not_started(lines[-1] if lines else f"status {self._popen.returncode}") from None

    @property
    def pid(self) -> int:
        return self._popen.pid

    def end(self) -> None:
        self._finalizer()

    def cause_of_death(self) -> str:
        """Call it when the channel is closed. Returns the name of the signal or the exit status."""
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
        process_group=0,  # a keyboard interrupt goes to the whole group of the parent
        cwd="/",
        env=_environment(),
    )


def _not_started(why: str) -> RuntimeError:
    return RuntimeError(f"the process that decodes media did not start: {why}")


def _end(popen: subprocess.Popen[bytes], channel: Channel, owner: int) -> None:
    channel.close()
    if popen.stderr is not None:
        popen.stderr.close()
    if os.getpid() == owner:  # a fork of the owner must not kill the owner's child
        popen.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # the child may hang in the kernel, on a missing disk
            popen.wait(_END_S)


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name.startswith(_ENVIRONMENT)}
    root = str(Path(tccp.__file__).resolve().parent.parent)
    folders = [root, *(str(Path(folder).absolute()) for folder in sys.path)]
    single = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return kept | single | _MALLOC | {"PYTHONPATH": os.pathsep.join(folders), "PYTHONSAFEPATH": "1"}
