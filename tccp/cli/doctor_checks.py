"""`tccp doctor`: checks what this installation can do."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from tccp import __version__
from tccp.config import git_commit
from tccp.threads import num_threads, usable_cores, waits_passively
from tccp.weights import WEIGHTS, available

PACKAGES = ("torch", "diffusers", "av", "opencv-contrib-python", "pyarrow")
OPTIONAL = {
    "mediapipe": "face landmarks in real footage",
    "scikit-image": "the LBP face detector",
    "scenedetect": "cuts in real footage",
    "face-alignment": "FAN landmarks",
    "onnxruntime": "Silero voice activity",
    "ray": "preprocessing and training on clusters",
    "deepspeed": "ZeRO training",
    "mlflow": "experiment tracking",
}


def examine(storage: Path) -> list[dict[str, Any]]:
    """One record per check: name, ok, required (a failure makes `tccp doctor` fail), found (text)."""
    checks: list[dict[str, Any]] = []

    def add(name: str, ok: bool, found: str, required: bool = True) -> None:
        checks.append({"name": name, "ok": ok, "required": required, "found": found})

    add("python", sys.version_info[:2] == (3, 11), sys.version.split()[0])
    add("tccp", True, f"{__version__}, commit {git_commit()[:12]}")
    for package in PACKAGES:
        add(package, *_version(package))
    for package, purpose in OPTIONAL.items():
        ok, found = _version(package)
        add(package, ok, found if ok else f"{found} (needed for {purpose})", required=False)
    bad = importlib.util.find_spec("torchvision") is not None
    found = "installed; it breaks diffusers here: uninstall it" if bad else "not installed, as required"
    add("torchvision", not bad, found)

    import torch

    add("device", True, torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores")
    waiting = "sleep" if waits_passively() else "spin, which is slow beside other work, because of OMP_WAIT_POLICY,"
    add("threads", True, f"{num_threads()} for {usable_cores()} usable cores; they {waiting} while they wait")
    for weight in WEIGHTS.values():
        path = available(weight) or available(weight, storage / "weights")
        absent = f"absent (needed for {weight.purpose}): tccp weights fetch {weight.name}"
        add(f"{weight.name} weights", path is not None, absent if path is None else str(path), required=False)
    add("decoder's confinement", *_confinement(), required=False)
    add("storage", *_writable(storage))
    return checks


def _version(package: str) -> tuple[bool, str]:
    try:
        return True, importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False, "not installed"


def _confinement() -> tuple[bool, str]:
    from tccp.media.sandbox import Decoder

    always = "limits on memory and time, no core dumps, cannot write files"
    with Decoder() as decoder:
        missing = decoder.unconfined()
    if missing is None:
        return True, f"active (seccomp): no network, no new processes, no file but its input; {always}"
    return (
        False,
        f"missing: network, processes and files ({missing}). Active: {always}. Decode only trusted files",
    )


def _writable(folder: Path) -> tuple[bool, str]:
    existing = folder
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free / 2**30
    if not os.access(existing, os.W_OK):
        return False, f"{folder} is not writable: set TCCP_STORAGE or give --storage"
    return True, f"{folder}, {free:.0f} GiB free"
