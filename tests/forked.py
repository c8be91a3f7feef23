"""Python commands in processes forked from a server that has already imported the heavy packages.

A forked process runs `python -m MODULE` or `python SCRIPT` with its own environment, working directory, standard
streams, exit status and signals. It only skips the imports, which take 5 to 20 CPU seconds per command.
"""

from __future__ import annotations

import atexit
import builtins
import contextlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, NoReturn

ROOT = Path(__file__).resolve().parent.parent
_MESSAGE_BYTES = 1 << 17
_START_S = 300.0


class Process:
    """A forked process, with the part of `subprocess.Popen` that the tests use."""

    def __init__(self, server: Server, arguments: Sequence[str], pid: int):
        self.args = list(arguments)
        self.pid = pid
        self._server = server

    @property
    def returncode(self) -> int | None:
        return self._server.exit_codes.get(self.pid)

    def poll(self) -> int | None:
        self._server.read_exit_codes(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status, negative for a signal. Raises subprocess.TimeoutExpired."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.returncode) is None:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                assert timeout is not None
                raise subprocess.TimeoutExpired(self.args, timeout)
            self._server.read_exit_codes(left)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Server:
    """Starts on first use; ends with the process that made it."""

    def __init__(self, modules: Iterable[str]):
        """modules: imported once, before the first fork. `module:function` is imported and called."""
        self.modules = list(modules)
        self.exit_codes: dict[int, int] = {}
        self._channel: socket.socket | None = None
        self._popen: subprocess.Popen[bytes] | None = None
        atexit.register(self.close)

    def start(
        self,
        arguments: Sequence[object],
        *,
        cwd: Path,
        environment: Mapping[str, str],
        stdout: IO[str],
        stderr: IO[str],
        new_session: bool = False,
    ) -> Process:
        """arguments: as of `python`: `-m`, a module and its arguments, or a script and its arguments."""
        channel = self._connected()
        words = [str(one) for one in arguments]
        request = {"arguments": words, "cwd": str(cwd), "environment": dict(environment), "new_session": new_session}
        message = json.dumps(request).encode()
        socket.send_fds(channel, [message], [stdout.fileno(), stderr.fileno()])
        while (answer := self._receive(None)) is None or "started" not in answer:
            pass
        return Process(self, words, answer["started"])

    def run(
        self, arguments: Sequence[object], *, cwd: Path, environment: Mapping[str, str], timeout: float
    ) -> subprocess.CompletedProcess[str]:
        """As `subprocess.run` with captured text. Raises subprocess.TimeoutExpired."""
        with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
            process = self.start(arguments, cwd=cwd, environment=environment, stdout=stdout, stderr=stderr)
            try:
                code = process.wait(timeout)
            finally:
                process.kill()
            stdout.seek(0)
            stderr.seek(0)
            return subprocess.CompletedProcess(process.args, code, stdout.read(), stderr.read())

    def close(self) -> None:
        if self._channel is not None and self._popen is not None:
            self._channel.close()
            self._popen.wait()
            self._channel = self._popen = None

    def read_exit_codes(self, timeout: float | None) -> None:
        """Waits for at most one message of the server, at most `timeout` seconds."""
        self._receive(timeout)

    def _receive(self, timeout: float | None) -> dict[str, int] | None:
        channel = self._connected()
        if not select.select([channel], [], [], timeout)[0]:
            return None
        message = channel.recv(_MESSAGE_BYTES)
        if not message:
            raise RuntimeError("the server that forks test processes has died")
        answer: dict[str, int] = json.loads(message)
        if "ended" in answer:
            self.exit_codes[answer["ended"]] = answer["code"]
        return answer

    def _connected(self) -> socket.socket:
        if self._channel is None:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            command = [sys.executable, __file__, str(theirs.fileno()), *self.modules]
            path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))  # this tree, not another
            with theirs:
                self._popen = subprocess.Popen(
                    command,
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    env=os.environ | {"PYTHONPATH": path},
                )
            if not select.select([ours], [], [], _START_S)[0] or not ours.recv(_MESSAGE_BYTES):
                raise RuntimeError(f"the server that forks test processes did not start: {' '.join(command)}")
            self._channel = ours
        return self._channel


# In the server


def _serve(channel: socket.socket) -> None:
    wake, woken = os.pipe()
    os.set_blocking(woken, False)
    signal.set_wakeup_fd(woken)
    signal.signal(signal.SIGCHLD, lambda *_: None)  # so that the end of a child writes to the pipe
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # from the keyboard, it is for the test process
    channel.send(json.dumps({"ready": 1}).encode())
    while True:
        ready, _, _ = select.select([channel, wake], [], [])
        if wake in ready:
            os.read(wake, 4096)
            _report_ended(channel)
        if channel in ready:
            message, descriptors, _, _ = socket.recv_fds(channel, _MESSAGE_BYTES, 2)
            if not message:
                return
            started, starting = os.pipe()
            pid = os.fork()
            if pid == 0:
                for one in (wake, woken, started, channel.detach()):
                    os.close(one)
                _become(json.loads(message), *descriptors, starting)
            for one in (*descriptors, starting):
                os.close(one)
            os.read(started, 1)  # returns once the child has its own session, streams and environment, or is dead
            os.close(started)
            channel.send(json.dumps({"started": pid}).encode())


def _report_ended(channel: socket.socket) -> None:
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            code = os.waitstatus_to_exitcode(ended[1])
            channel.send(json.dumps({"ended": ended[0], "code": code}).encode())


def _become(request: dict, stdout: int, stderr: int, starting: int) -> NoReturn:
    """Turns a fork of the server into the process of a command."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for given, stream in ((stdout, 1), (stderr, 2)):
        os.dup2(given, stream)
        os.close(given)
    if request["new_session"]:
        os.setsid()
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    os.close(starting)
    os._exit(_run(request["arguments"], request["cwd"]))


def _run(arguments: list[str], cwd: str) -> int:
    """As the interpreter does it, up to the exit status."""
    code = 0
    try:
        if arguments[0] == "-m":
            sys.argv, sys.path[0] = arguments[1:], cwd
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[0] = arguments, str(Path(arguments[0]).resolve().parent)
            _run_script(arguments[0])
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    return code & 0xFF


def _run_script(path: str) -> None:
    """In a new module `__main__`, where pickles of the script's own classes find them."""
    main = types.ModuleType("__main__")
    main.__dict__.update(__file__=path, __builtins__=builtins)
    sys.modules["__main__"] = main
    exec(compile(Path(path).read_bytes(), path, "exec"), main.__dict__)


if __name__ == "__main__":
    import importlib

    place = socket.socket(fileno=int(sys.argv[1]))
    for name, _, function in (one.partition(":") for one in sys.argv[2:]):
        module = importlib.import_module(name)
        if function:
            getattr(module, function)()
    _serve(place)
