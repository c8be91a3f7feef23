"""Checks for the system libraries that cv2, mediapipe and the sandbox of decoders need (with Debian's package names).

As root (in a container or CI) it installs missing ones with apt-get, and PostgreSQL for the server's tests, which skip
it where it is missing. Otherwise it prints one line that says what to install. It runs before any package is installed,
so it uses only the standard library.
"""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

PACKAGES = {
    "libGL.so.1": "libgl1",
    "libgthread-2.0.so.0": "libglib2.0-0",
    "libxcb.so.1": "libxcb1",
    "libEGL.so.1": "libegl1",
    "libGLESv2.so.2": "libgles2",
    "libseccomp.so.2": "libseccomp2",
}


def missing_packages() -> list[str]:
    missing = []
    for library, package in PACKAGES.items():
        try:
            ctypes.CDLL(library)
        except OSError:
            missing.append(package)
    return missing


def has_postgresql() -> bool:
    return shutil.which("postgres") is not None or any(Path("/usr/lib/postgresql").glob("*/bin/postgres"))


def install(packages: list[str]) -> str | None:
    """Installs packages; returns what failed."""
    print(f"Installing system packages: {' '.join(packages)}", file=sys.stderr)
    silence = subprocess.DEVNULL
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    options = ["--quiet=2", "--option=Dpkg::Use-Pty=0"]
    for command in (["update"], ["install", "--no-install-recommends", "--yes", *packages]):
        command = ["apt-get", *options, *command]
        if subprocess.run(command, env=environment, stdin=silence, stdout=silence).returncode:
            return f"`{' '.join(command)}` failed"
    return None


def main() -> str | int:
    if sys.platform != "linux":
        return 0
    missing = missing_packages()
    names = " ".join(missing)
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        line = f"System libraries are missing: install them with `sudo apt-get install {names}`, then run make again"
        return line if missing else 0
    if missing and (failed := install(missing)):
        return f"{failed}: install {names}, then run make again"
    if not has_postgresql() and (failed := install(["postgresql"])):
        print(f"{failed}: tests of the server with PostgreSQL will be skipped", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
