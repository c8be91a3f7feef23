"""A PostgreSQL on this machine for tests (Debian's package `postgresql`), in a folder of its own, without a network."""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest


def why_missing() -> str | None:
    """Why there can be no server here; None if there can."""
    if _programs() is None:
        return "PostgreSQL is not installed (Debian: apt-get install postgresql)"
    if importlib.util.find_spec("psycopg") is None:
        return "psycopg is not installed: pip install -c constraints.txt -e '.[serve]'"
    if os.geteuid() == 0 and _unprivileged() is None:
        return "PostgreSQL refuses to run as root, and there is no user postgres or nobody"
    return None


def _programs() -> Path | None:
    """The folder of the server's programs; Debian puts only some of them on the PATH."""
    found = shutil.which("postgres")
    folders = [*sorted(Path("/usr/lib/postgresql").glob("*/bin")), *([Path(found).resolve().parent] if found else [])]
    needed = ("initdb", "postgres", "psql")
    return next((one for one in reversed(folders) if all((one / name).exists() for name in needed)), None)


def _unprivileged() -> str | None:
    names = {entry.pw_name for entry in pwd.getpwall()}
    return next((name for name in ("postgres", "nobody") if name in names), None)


class PostgresServer:
    """A server that listens on a Unix socket, once it is started."""

    def __init__(self) -> None:
        programs = _programs()
        assert programs is not None
        self._programs = programs
        self._user = _unprivileged() if os.geteuid() == 0 else None
        # Not a temporary folder of pytest: only its owner may enter those.
        self._folder = Path(tempfile.mkdtemp(prefix="tccp-pg-"))
        if self._user is not None:
            shutil.chown(self._folder, self._user)
        self._process: subprocess.Popen[bytes] | None = None
        self._tried("initdb", "--pgdata", self._folder / "data", "--username", "tester", "--auth", "trust", "--no-sync")

    def start(self) -> None:
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    self._programs / "postgres",
                    *("-D", self._folder / "data", "-k", self._folder, "-c", "listen_addresses="),
                    *("-c", "fsync=off", "-c", "max_connections=200", "-c", "shared_buffers=32MB"),
                ],
                stdout=log,
                stderr=log,
                user=self._user,
                cwd=self._folder,
            )
        deadline = time.monotonic() + 60
        while self._run("psql", *self._place, "-d", "postgres", "-c", "SELECT 1").returncode:
            assert self._process.poll() is None and time.monotonic() < deadline, (self._folder / "log").read_text()
            time.sleep(0.05)

    def stop(self) -> None:
        """Ends the server at once, as a crash does."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait(timeout=30)

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def database(self) -> str:
        """The URL of a database without tables. It is one database, emptied: a new one has 300 files."""
        self.sql("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
        return self.url("postgres")

    def url(self, name: str, user: str = "tester") -> str:
        return f"postgresql://{user}@/{name}?host={self._folder}"

    def sql(self, text: str) -> None:
        self._tried("psql", *self._place, "-d", "postgres", "-v", "ON_ERROR_STOP=1", "-c", text)

    @property
    def _place(self) -> tuple[object, ...]:
        return "-h", self._folder, "-U", "tester"

    def _run(self, program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        command = [str(self._programs / program), *map(str, arguments)]
        return subprocess.run(
            command, user=self._user, cwd=self._folder, capture_output=True, text=True, timeout=60, check=False
        )

    def _tried(self, program: str, *arguments: object) -> None:
        result = self._run(program, *arguments)
        assert result.returncode == 0, result.stderr


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    if reason := why_missing():
        pytest.skip(reason)
    server = PostgresServer()
    try:
        server.start()
        yield server
    finally:
        server.close()
