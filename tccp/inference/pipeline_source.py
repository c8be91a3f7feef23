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

from tccp.errors import StorageError, TccpError
from tccp.files import Folder, cache_folder, is_url
from tccp.inference.pipeline_folder import MANIFEST, TOY_WEIGHTS, read_manifest, read_settings
from tccp.models.variants import VariantName

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def component_names(variants: Iterable[VariantName], own_lips: bool = True) -> list[str]:
    """The components that generation with these networks loads. own_lips: include the pipeline's lip weights."""
    return ["autoencoder", *(["lips"] if own_lips else []), *variants]


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
    if isinstance(source, str) and _HUB_ID.fullmatch(text) and not local.parent.exists():
        return _from_hub(text, components, revision)
    return local  # `read_manifest` reports the missing folder


def _copied(name: str, download: Callable[[str, Path], object], components: Iterable[str]) -> Path:
    """Copies missing and changed files to the cache. Downloads the manifest every time, since it lists the files."""
    key = hashlib.blake2b(name.encode(), digest_size=12).hexdigest()
    place = cache_folder() / "pipelines" / key
    place.mkdir(parents=True, exist_ok=True)
    partial = place / f".{MANIFEST}.part"
    try:
        download(MANIFEST, partial)
    except FileNotFoundError:
        raise TccpError(f"no pipeline at {name} ({MANIFEST} is missing): check the address") from None
    partial.replace(place / MANIFEST)
    manifest = read_manifest(place)
    for file, digest in _files(name, manifest, components):
        target = place / file
        if target.is_file() and _sha256(target) == digest:
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.part")
        download(file, part)
        part.replace(target)
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
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    endpoint = os.environ.get("HF_ENDPOINT") or None

    def download(name: str) -> Path:
        try:
            return Path(hf_hub_download(repository, name, revision=revision, endpoint=endpoint))
        except EntryNotFoundError as error:
            if isinstance(error, LocalEntryNotFoundError):
                raise StorageError(
                    f"{repository}: {name} is not in the Hub's cache and the Hub cannot be reached: check the network, "
                    "or give a local folder"
                ) from None
            raise TccpError(f"{repository} has no {name}: it is not a complete TCCP pipeline; check the id") from None
        except HfHubHTTPError as error:
            reason = str(error).splitlines()[0]
            if error.response.status_code >= 500:
                raise StorageError(f"{repository} on the Hugging Face Hub: {reason}; try again later") from None
            raise TccpError(f"{repository} on the Hugging Face Hub: {reason}; check the id, or give a folder") from None

    folder = download(MANIFEST).parent
    manifest = read_manifest(folder)
    for file, _ in _files(repository, manifest, components):
        download(file)
    read_settings(folder)
    return folder
