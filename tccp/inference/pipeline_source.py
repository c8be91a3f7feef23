"""Finds a pipeline: a local folder, the packaged weights, a URL, or a repository on the Hugging Face Hub.

Remote pipelines are copied to the local cache: first the manifest, then the files of the components that are needed.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from tccp.errors import TccpError
from tccp.files import HTTP_TRANSIENT, Folder, is_url, kept_folder, make_room, retried
from tccp.inference.manifest import MANIFEST, TOY_WEIGHTS, read_manifest, read_settings
from tccp.models.variants import VariantName

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def component_names(variants: Iterable[VariantName], own_lips: bool = True) -> list[str]:
    """The components that generation with these networks loads. own_lips: include the pipeline's lip weights."""
    return ["autoencoder", *(["lips"] if own_lips else []), *variants]


def is_remote(source: str | Path) -> bool:
    """Whether a pipeline is copied from elsewhere: a URL of another machine, or a repository on the Hub."""
    if is_url(source):
        return Folder(str(source)).local is None
    place = Path(source)
    named = isinstance(source, str) and _HUB_ID.fullmatch(source) and not place.parent.exists()
    return bool(named) and not place.exists()


def pipeline_folder(source: str | Path, components: Iterable[str], revision: str | None = None) -> Path:
    """A local folder of the pipeline that holds at least those of these components that the pipeline has.

    Raises TccpError if there is no such pipeline, StorageError if it cannot be reached.
    """
    text = str(source)
    if is_url(text):
        folder = Folder(text)
        if folder.local is not None:
            return folder.local

        def download(name: str, to: Path) -> None:
            with folder.open(name) as source_file, to.open("wb") as target:
                shutil.copyfileobj(source_file, target)

        return _copied(text, download, components)
    local = Path(source)
    if local.exists():
        return local
    if text == "toy":
        return TOY_WEIGHTS
    if is_remote(source):
        return _from_hub(text, components, revision)
    return local  # `read_manifest` reports the missing folder


def _copied(name: str, download: Callable[[str, Path], object], components: Iterable[str]) -> Path:
    """Copies missing and changed files to the cache. Downloads the manifest every time, since it lists the files."""
    place = kept_folder(f"pipeline {name}")
    partial = place / f".{MANIFEST}.part"
    try:
        download(MANIFEST, partial)
    except FileNotFoundError:
        raise TccpError(f"no pipeline at {name} ({MANIFEST} is missing): check the address") from None
    partial.replace(place / MANIFEST)
    files = dict(_files(name, read_manifest(place), components))
    for component in {PurePosixPath(file).parts[0] for file in files}:
        for path in (place / component).rglob("*"):  # of another version of the pipeline
            if path.is_file() and path.relative_to(place).as_posix() not in files:
                path.unlink(missing_ok=True)
    for file, digest in files.items():
        target = place / file
        if target.is_file() and _sha256(target) == digest:
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        part = place / f".{file.replace('/', '-')}.part"
        download(file, part)
        part.replace(target)
    make_room()
    return place


def _files(name: str, manifest: Mapping[str, Any], components: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Path in the pipeline and SHA-256 of each file. Raises TccpError for a path that leads out of the pipeline."""
    for component in components:
        for file, digest in manifest["components"].get(component, {"files": {}})["files"].items():
            path = PurePosixPath(component, file)
            if path.is_absolute() or ".." in path.parts:
                raise TccpError(f"{name}: {MANIFEST} names {path}, which lies outside the pipeline")
            yield str(path), digest


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _from_hub(repository: str, components: Iterable[str], revision: str | None) -> Path:
    """Downloads to the Hub's own cache. HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE have their usual meaning."""
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    endpoint = os.environ.get("HF_ENDPOINT") or None

    def ask(name: str) -> Path:
        """Raises ConnectionError where another attempt may succeed."""
        try:
            return Path(hf_hub_download(repository, name, revision=revision, endpoint=endpoint))
        except EntryNotFoundError as error:
            if not isinstance(error, LocalEntryNotFoundError):
                raise TccpError(
                    f"{repository} has no {name}: it is not a complete TCCP pipeline; check the id"
                ) from None
            if constants.HF_HUB_OFFLINE:
                raise TccpError(
                    f"{repository}: {name} is not in the Hub's cache, and HF_HUB_OFFLINE forbids to fetch it: unset "
                    "it, or give a local folder"
                ) from None
            raise ConnectionError("the Hub cannot be reached") from None
        except HfHubHTTPError as error:
            reason, status = str(error).splitlines()[0], error.response.status_code
            if status >= 500 or status in HTTP_TRANSIENT:
                raise ConnectionError(reason) from None
            raise TccpError(f"{repository} on the Hugging Face Hub: {reason}; check the id, or give a folder") from None

    def download(name: str) -> Path:
        return retried(f"fetch {name} of {repository} from the Hugging Face Hub", lambda: ask(name))

    folder = download(MANIFEST).parent
    manifest = read_manifest(folder)
    for file, _ in _files(repository, manifest, components):
        download(file)
    read_settings(folder)
    return folder
