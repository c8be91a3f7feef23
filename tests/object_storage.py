"""An S3 server on this machine (moto's), behind a proxy that can be away for a while. Used by `benchmarks/`, too."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BUCKET = "tccp-tests"
_REQUEST = re.compile(rb"^([A-Z]+) (\S+) HTTP/1\.1\r\n")


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


class Proxy:
    """Forwards TCP connections to a port. While it is away, its port refuses connections; open ones are reset.

    requests: method and path of every HTTP request that came. outages: the requests that began one.
    """

    def __init__(self, target_port: int) -> None:
        self.port, self._target = free_port(), target_port
        self.requests: list[str] = []
        self.outages: list[str] = []
        self.hangs = False
        self._armed: list[tuple[re.Pattern[str], float]] = []
        self._lock = threading.RLock()
        self._sockets: set[socket.socket] = set()
        self._listener: socket.socket | None = None
        self._closed = False
        self._listen()

    def fail_at(self, pattern: str, seconds: float) -> None:
        """Goes away for some seconds at the next request that matches, which is not forwarded. May be called again."""
        with self._lock:
            self._armed.append((re.compile(pattern), seconds))

    def away(self, seconds: float) -> None:
        """Goes away now, and comes back by itself."""
        with self._lock:
            self._hang_up()
        timer = threading.Timer(seconds, self._listen)
        timer.daemon = True
        timer.start()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._hang_up()

    def _listen(self) -> None:
        with self._lock:
            if self._closed or self._listener is not None:
                return
            listener = socket.socket()
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("127.0.0.1", self.port))
            listener.listen(128)
            self._listener = listener
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def _hang_up(self) -> None:
        if self._listener is not None:
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._listener = None
        for one in self._sockets:
            with contextlib.suppress(OSError):
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset, no farewell
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        self._sockets.clear()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
                server = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                return
            with self._lock:
                if self._listener is not listener:
                    client.close()
                    server.close()
                    return
                self._sockets |= {client, server}
            for one, other, looks in ((client, server, True), (server, client, False)):
                threading.Thread(target=self._forward, args=(one, other, looks), daemon=True).start()

    def _forward(self, one: socket.socket, other: socket.socket, looks: bool) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(1 << 16):
                if looks and self._fails(data):
                    return
                while self.hangs:
                    time.sleep(0.05)
                other.sendall(data)
        for each in (one, other):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            with self._lock:
                self._sockets.discard(each)
            each.close()

    def _fails(self, data: bytes) -> bool:
        """Whether the request that begins here starts an outage."""
        if not (found := _REQUEST.match(data)):
            return False
        request = f"{found[1].decode()} {found[2].decode()}"
        with self._lock:
            self.requests.append(request)
            match = next((one for one in self._armed if one[0].search(request)), None)
            if match is None:
                return False
            self._armed.remove(match)
            self.outages.append(request)
            seconds = match[1]
        self.away(seconds)
        return True


class ObjectStorage:
    """moto's S3 server with a bucket. url: of the bucket. environment: of processes that use it."""

    def __init__(self, log: Path) -> None:
        port = free_port()
        with log.open("w") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
                stdout=file,
                stderr=file,
                env={**os.environ, "MOTO_CALL_RESET_API": "false"},
            )
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                assert self._process.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.05)
        self.proxy = Proxy(port)
        self.url = f"s3://{BUCKET}"
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.proxy.port}",
            "AWS_ACCESS_KEY_ID": "tests",
            "AWS_SECRET_ACCESS_KEY": "tests",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        self._port = port

    def direct(self) -> Any:
        """A filesystem that reaches the server without the proxy."""
        import s3fs

        return s3fs.S3FileSystem(
            key="tests", secret="tests", endpoint_url=f"http://127.0.0.1:{self._port}", use_listings_cache=False
        )

    def close(self) -> None:
        self.proxy.close()
        self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def object_storage(log: Path) -> Iterator[ObjectStorage]:
    """The server, with its environment set in this process."""
    import pytest
    import s3fs

    storage = ObjectStorage(log)
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in storage.environment.items():
                patch.setenv(name, value)
            s3fs.S3FileSystem.clear_instance_cache()
            s3fs.S3FileSystem().mkdir(BUCKET)
            yield storage
            s3fs.S3FileSystem.clear_instance_cache()
    finally:
        storage.close()
