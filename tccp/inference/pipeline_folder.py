"""The pipeline folder: training writes it; generation, evaluation and export read it.

    <folder>/manifest.json                 format, settings; per component, the SHA-256 of its files and its provenance
    <folder>/autoencoder/                  diffusers AutoencoderKL + latent_statistics.json
    <folder>/lips/                         the lip source's network, if it has one
    <folder>/<variant>/                    config.json + safetensors

No file is a pickle. Loading compares every file of a component with the manifest: a file that differs, is missing or is
not in it is an error.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tccp.config import Settings, VariantName, changed, git_commit
from tccp.errors import TccpError
from tccp.files import atomic_path, check_outputs, check_writable_folder, sync, sync_tree, translated_errors
from tccp.inference.manifest import (
    FORMAT,
    MANIFEST,
    check_sampling,
    check_settings,
    default_components,
    pipeline_files,
    read_manifest,
    read_settings,
)
from tccp.models.autoencoder import PictureAutoencoder
from tccp.models.layers import join_weights
from tccp.models.lip_sources import LipletSource
from tccp.models.liplet import Liplet
from tccp.models.mvcontrolnet import MVControlNet
from tccp.models.variants import VARIANTS

logger = logging.getLogger("tccp.inference")

_SUFFIXES = (".json", ".safetensors")
_UNFINISHED, _REPLACED = ".new-", ".replaced"
"""In the names of hidden folders: components that are being written; former ones, until the manifest changes."""


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_component(
    folder: Path,
    name: str,
    settings: Settings,
    write: Callable[[Path], object],
    provenance: Mapping[str, Any],
) -> None:
    """Adds or replaces one component. Writes it to a temporary folder, renames that, then updates the manifest.

    Until the manifest names the new files, the former ones stay in a hidden folder: `restore_replaced` brings them back
    after an interruption. write: writes the component's files into the folder it is given.
    Raises TccpError if the pipeline has other shared settings or the folder cannot be written.
    """
    check_settings(folder, settings)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_unfinished(folder, name)
        temporary = Path(tempfile.mkdtemp(prefix=f".{name}{_UNFINISHED}", dir=folder))
    except OSError as error:
        raise TccpError(f"cannot write {folder}: {error.strerror}; choose a folder that can be written") from None
    with _removed_at_exit(temporary), translated_errors(f"write {folder / name}"):
        write(temporary)
        files = {
            str(path.relative_to(temporary)): _sha256(path) for path in sorted(temporary.rglob("*")) if path.is_file()
        }
        for path in (temporary, *temporary.rglob("*")):  # safetensors makes its files readable only by the owner
            path.chmod(0o755 if path.is_dir() else 0o644)
        sync_tree(temporary)
        with _locked(folder):
            _restore(folder, name)
            former = folder / f".{name}{_REPLACED}"
            if (folder / name).exists():
                os.rename(folder / name, former)
            os.rename(temporary, folder / name)
            sync(folder)
            _enter(folder, name, settings, files, provenance)
            shutil.rmtree(former, ignore_errors=True)


def _enter(
    folder: Path, name: str, settings: Settings, files: Mapping[str, str], provenance: Mapping[str, Any]
) -> None:
    """Writes a component into the manifest."""
    exists = (folder / MANIFEST).exists()
    manifest: dict[str, Any] = read_manifest(folder) if exists else {"format": FORMAT, "components": {}}
    manifest["settings"] = json.loads(settings.model_dump_json())
    manifest["components"][name] = {"files": files, "provenance": {"git_commit": git_commit(), **provenance}}
    with atomic_path(folder / MANIFEST) as path:
        path.write_text(json.dumps(manifest, indent=2) + "\n")


def restore_replaced(folder: Path) -> None:
    """Brings back components whose replacement was interrupted before the manifest named the new files."""
    for former in folder.glob(f".*{_REPLACED}"):
        with _locked(folder):
            _restore(folder, former.name[1:].removesuffix(_REPLACED))


def _restore(folder: Path, name: str) -> None:
    former = folder / f".{name}{_REPLACED}"
    if not former.exists():
        return
    try:
        verified(folder, name)
    except TccpError:
        shutil.rmtree(folder / name, ignore_errors=True)
        os.rename(former, folder / name)
        logger.warning("%s: the replacement of %s was interrupted; the former one is in its place again", folder, name)
        return
    shutil.rmtree(former)


@contextmanager
def _removed_at_exit(temporary: Path) -> Iterator[None]:
    """Removes the folder of an unfinished component in the end, and holds a lock that says that it is in use."""
    handle = os.open(temporary, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH)
        yield
    finally:
        os.close(handle)
        shutil.rmtree(temporary, ignore_errors=True)


def _remove_unfinished(folder: Path, name: str) -> None:
    """Removes what killed processes have left of this component: folders that no process has locked."""
    for left in folder.glob(f".{name}{_UNFINISHED}*"):
        with suppress(OSError):
            handle = os.open(left, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)
            finally:
                os.close(handle)


def export(
    folder: Path,
    out: Path,
    names: Iterable[str] | None = None,
    *,
    half: bool = False,
    sampling: Sequence[str] = (),
    **provenance: Any,
) -> tuple[str, ...]:
    """Copies components of a pipeline to another folder for distribution, and returns their names.

    names: by default all components of two-stage generation. half: store weights in half precision, which halves the
    size; loading converts them to single precision. sampling: `key=value` sampling settings for the copy, for all
    networks (`sampling...`) or one (`variant_overrides.NAME.sampling...`). provenance: added to that of each component.
    Raises TccpError if a component is missing or damaged, if `sampling` changes any other setting, or if `out` has
    other shared settings.
    """
    check_sampling(sampling)
    settings = changed(read_settings(folder), sampling)
    if names is None:
        names = default_components(settings)
    names = tuple(names)
    components = read_manifest(folder)["components"]
    check_outputs({"OUT": pipeline_files(out, names)}, {"WEIGHTS": pipeline_files(folder, components)})
    check_writable_folder("OUT", out)
    for name in names:
        source = verified(folder, name)

        def write(target: Path, source: Path = source) -> None:
            shutil.copytree(source, target, dirs_exist_ok=True)
            for path in target.rglob("*.safetensors") if half else ():
                tensors = {
                    key: value.half() if value.is_floating_point() else value for key, value in load_file(path).items()
                }
                save_file(tensors, path, metadata={"format": "pt"})

        record = dict(components[name]["provenance"])
        commit = record.pop("git_commit", None)  # the commit that trained the component, not the one that copies it
        precision = {"precision": "fp16"} if half else {}
        save_component(out, name, settings, write, {**record, "git_commit": commit, **precision, **provenance})
    return names


def write_untrained(folder: Path, settings: Settings, variants: Iterable[VariantName] = tuple(VARIANTS)) -> None:
    """Writes a complete pipeline folder of random networks, for tests and benchmarks. Deterministic for a seed.

    The control branches' zero convolutions get random weights, so that the control input has an effect.
    """
    torch.manual_seed(settings.seed)
    autoencoder = PictureAutoencoder.from_settings(settings.autoencoder)
    save_component(folder, "autoencoder", settings, autoencoder.save, {"steps": 0})
    if settings.lips.source == "liplet":
        lips = LipletSource(Liplet(settings.lips.size_px, settings.lips.liplet_channels))
        save_component(folder, "lips", settings, lips.save, {"steps": 0})
    for name in variants:
        network = MVControlNet.from_settings(settings, name)
        for zero in (network.control.zero_in, *network.control.zero_out):
            torch.nn.init.normal_(zero.weight, std=0.1)
        save_component(folder, name, settings, network.save_pretrained, {"steps": 0})


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lets one process at a time update the manifest, because components may be trained in parallel."""
    handle = os.open(folder, os.O_RDONLY)  # locks the folder itself, which leaves no lock file behind
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def verified(folder: Path, name: str) -> Path:
    """Checks every file of a component against the manifest, and returns the component's folder.

    Raises TccpError, which names the file and the reason, if a file is missing, differs or is not in the manifest.
    """
    manifest = read_manifest(folder)
    if name not in manifest["components"]:
        have = ", ".join(manifest["components"]) or "nothing"
        raise TccpError(f"{folder} has no {name} (it has {have}): train it with `tccp train {name} --weights {folder}`")
    files = manifest["components"][name]["files"]
    for relative in files:
        named = PurePosixPath(relative)
        if named.suffix not in _SUFFIXES or named.is_absolute() or ".." in named.parts:
            raise TccpError(
                f"{folder / MANIFEST} names {relative!r} among the files of {name}: a component has only "
                f"{' and '.join(_SUFFIXES)} files below its own folder; do not use this pipeline"
            )
    for path in sorted((folder / name).rglob("*")):
        if (path.is_symlink() or not path.is_dir()) and str(path.relative_to(folder / name)) not in files:
            raise TccpError(
                f"{path} is not in {MANIFEST}: remove it, because a loader might read it in place of a file that is"
            )
    for relative, digest in files.items():
        path = folder / name / relative
        if not path.is_file():
            raise TccpError(f"{path} is missing: the pipeline folder is incomplete, {_remedy(folder, name)}")
        if _sha256(path) != digest:
            raise TccpError(f"{path} is not the file of the manifest (its SHA-256 differs): {_remedy(folder, name)}")
    return folder / name


def _remedy(folder: Path, name: str) -> str:
    if (folder / f".{name}{_REPLACED}").exists():
        return f"its replacement was interrupted; give the command that trained {name} again, with --resume"
    return f"copy it again or retrain {name}"


def load_autoencoder(
    folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> PictureAutoencoder:
    """Loads the auto-encoder in evaluation mode, to be used and not trained. Raises TccpError as `load_network`."""
    autoencoder = PictureAutoencoder.load(verified(folder, "autoencoder"), dtype).to(device).eval()
    autoencoder.vae.to_channels_last()  # a fifth less time for `paper` on a CPU
    join_weights(autoencoder.vae)
    return autoencoder


def load_network(
    folder: Path, name: VariantName, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> MVControlNet:
    """Loads a network in evaluation mode. Raises TccpError if its files are missing, differ or cannot be loaded."""
    path = verified(folder, name)
    try:
        network = MVControlNet.from_pretrained(path, dtype)
        return network.to(device).to_channels_last()
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise TccpError(f"{path} cannot be loaded ({reason}): copy it again or retrain {name}") from None


def same_component(a: Path, b: Path, name: str) -> bool:
    """Whether two pipelines hold equal components, compared in half precision. Raises TccpError as `verified`."""
    folders = [verified(folder, name) for folder in (a, b)]
    files = [{path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()} for folder in folders]
    return files[0].keys() == files[1].keys() and all(_same_file(files[0][key], files[1][key]) for key in files[0])


def _same_file(a: Path, b: Path) -> bool:
    if a.suffix != ".safetensors":
        return a.read_bytes() == b.read_bytes()
    tensors = [{name: value.half() for name, value in load_file(path).items()} for path in (a, b)]
    return tensors[0].keys() == tensors[1].keys() and all(
        torch.equal(tensors[0][key], tensors[1][key]) for key in tensors[0]
    )


def check_network(folder: Path, settings: Settings, name: VariantName, network: MVControlNet) -> None:
    """Raises TccpError if the network's configuration differs from the one that the pipeline's settings give."""
    for key, value in MVControlNet.arguments_of(settings, name).items():
        found = network.config[key]
        if json.dumps(found) != json.dumps(value):
            raise TccpError(
                f"{folder / name / 'config.json'}: {key} is {found}, but the settings in "
                f"{folder / MANIFEST} give {value}: copy the folder again or retrain {name}"
            )
