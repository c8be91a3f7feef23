"""Checks for the system libraries that cv2, mediapipe and the sandbox of decoders need (with Debian's package names).

As root (in a container or CI) it installs missing ones with apt-get. Otherwise it prints one line that says what to
install. It runs before any package is installed, so it uses only the standard library.
"""

import ctypes
import os
import shutil
import subprocess
import sys

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


def main() -> str | int:
    missing = missing_packages() if sys.platform == "linux" else []
    if not missing:
        return 0
    names = " ".join(missing)
    if os.geteuid() == 0 and shutil.which("apt-get"):
        print(f"Installing system libraries: {names}", file=sys.stderr)
        silence = subprocess.DEVNULL
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        options = ["--quiet=2", "--option=Dpkg::Use-Pty=0"]
        for command in (["update"], ["install", "--no-install-recommends", "--yes", *missing]):
            command = ["apt-get", *options, *command]
            if subprocess.run(command, env=environment, stdin=silence, stdout=silence).returncode:
                return f"`{' '.join(command)}` failed: install {names}, then run make again"
        return 0
    return f"System libraries are missing: install them with `sudo apt-get install {names}`, then run make again"


if __name__ == "__main__":
    sys.exit(main())
