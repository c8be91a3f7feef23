"""Versions of weights in the server's storage. A job keeps the version with which it arrived until it ends."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from tccp.files import Folder
from tccp.inference.manifest import COMPONENTS, MANIFEST
from tccp.inference.pipeline_source import pipeline_folder
from tccp.models.variants import TWO_STAGE

_FOLDER = "models"


def pin(source: str | Path, storage: Folder) -> str:
    """Copies a pipeline into the storage, unless it is there; returns its version, a hash of all its files.

    source: as for `Pipeline.from_pretrained`. Raises TccpError if there is no such pipeline.
    """
    folder = pipeline_folder(source, ("autoencoder", "lips", *TWO_STAGE))
    manifest = (folder / MANIFEST).read_bytes() if (folder / MANIFEST).is_file() else b""
    version = hashlib.sha256(manifest).hexdigest()[:16]
    kept = f"{_FOLDER}/{version}"
    if not storage.exists(f"{kept}/{MANIFEST}"):
        for component in COMPONENTS:
            if (folder / component).is_dir():
                storage.upload(folder / component, f"{kept}/{component}")
        for name in sorted(one.name for one in folder.iterdir() if one.is_file()):
            if name != MANIFEST:
                with storage.writing(f"{kept}/{name}") as path:
                    shutil.copyfile(folder / name, path)
        storage.write(f"{kept}/{MANIFEST}", manifest)  # last: it says that the version is complete
    return version


def place(version: str, storage: Folder) -> str:
    """Path or URL of a version, for `Pipeline.from_pretrained`."""
    return storage.path(f"{_FOLDER}/{version}")
