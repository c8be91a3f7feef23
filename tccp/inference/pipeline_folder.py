"""The pipeline folder: what training exports and everything downstream reads.

    <folder>/manifest.json                 format, settings, and per component its files' SHA-256 and its provenance
    <folder>/autoencoder/                  diffusers AutoencoderKL + latent_statistics.json
    <folder>/lips/                         the lip source's network, where there is one
    <folder>/<variant>/                    config.json + safetensors

No pickles. Loading refuses a folder whose files are not those of the manifest, and says which file and why.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tccp.config import Settings, VariantName, changed, git_commit, settings_from_json
from tccp.errors import TccpError
from tccp.files import atomic_path
from tccp.models.autoencoder import PictureAutoencoder
from tccp.models.lip_sources import LipletSource
from tccp.models.liplet import Liplet
from tccp.models.mvcontrolnet import MVControlNet
from tccp.models.variants import TWO_STAGE, VARIANTS

FORMAT = 1
MANIFEST = "manifest.json"
TOY_WEIGHTS = Path(__file__).parent.parent / "toy"
"""The packaged pipeline, trained on RoundTable by `make toy-weights`."""
SHAPING = (
    "preset",
    "window",
    "picture_px",
    "context",
    "surround",
    "autoencoder",
    "network",
    "diffusion",
    "lips",
    "variant_overrides",
)
"""Settings that components of one pipeline must share: they decide shapes, latents, or what is predicted."""
HOW_TRAINED = {
    "autoencoder": ("kl_weight", "precision", "batch_size", "max_steps", "learning_rate"),
    "lips": ("liplet_steps", "liplet_batch_size", "liplet_learning_rate"),
    "network": ("dropout", "gradient_checkpointing"),
}
"""Settings inside those that do not bind: how long, and how, a component was trained."""


def weights_folder(given: Path) -> Path:
    """The folder that `--weights` means: `toy` is the packaged pipeline, unless there is a folder of that name."""
    return TOY_WEIGHTS if given == Path("toy") and not given.exists() else given


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest. Raises TccpError if there is none, or it is damaged or of another format."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise TccpError(
            f"no pipeline at {folder} ({MANIFEST} is missing): train one with `tccp train all --weights {folder}`"
        ) from None
    except OSError as error:
        raise TccpError(f"{path} cannot be read ({error.strerror}): give the folder of a pipeline") from None
    except ValueError as error:
        raise TccpError(f"{path} is damaged ({error}): copy the pipeline folder again") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else None
        raise TccpError(f"{path} is of pipeline format {found}; this version reads {FORMAT}: export the weights again")
    components = manifest.get("components")
    if not isinstance(manifest.get("settings"), dict) or not _are_components(components):
        raise TccpError(f"{path} is damaged (settings or components are not as written): copy the folder again")
    return manifest


def _are_components(components: object) -> bool:
    return isinstance(components, dict) and all(
        isinstance(component, dict)
        and isinstance(component.get("files"), dict)
        and all(isinstance(digest, str) for digest in component["files"].values())
        for component in components.values()
    )


def read_settings(folder: Path) -> Settings:
    """The settings of a pipeline. Raises TccpError that names the manifest."""
    try:
        return settings_from_json(json.dumps(read_manifest(folder)["settings"]))
    except TccpError as error:
        if str(folder) in str(error):
            raise
        raise TccpError(f"{folder / MANIFEST}: {error}; copy the folder again") from None


def _shaping(settings: Settings) -> dict[str, Any]:
    """Of variants' own settings, too, those that shape: how long one is trained does not bind the others."""
    values = {name: json.loads(settings.model_dump_json(include={name}))[name] for name in SHAPING}
    for name, keys in HOW_TRAINED.items():
        for key in keys:
            del values[name][key]
    values["variant_overrides"] = {
        variant: shaping
        for variant, overrides in values["variant_overrides"].items()
        if (shaping := {key: value for key, value in overrides.items() if _shapes(*key.split(".", 1))})
    }
    return values


def _shapes(name: str, key: str = "") -> bool:
    return name in SHAPING and key not in HOW_TRAINED.get(name, ())


def check_settings(folder: Path, settings: Settings) -> None:
    """Raises TccpError that names the first setting in which a pipeline that exists differs from `settings`."""
    if not (folder / MANIFEST).exists():
        return
    stored = _shaping(read_settings(folder))
    for name, value in _shaping(settings).items():
        if stored[name] != value:
            key, there, here = _first_difference(name, stored[name], value)
            raise TccpError(
                f"{folder} holds weights of other settings: {key} is {json.dumps(there)[:100]} there and "
                f"{json.dumps(here)[:100]} here; use that preset or another --weights folder"
            )


def _first_difference(name: str, there: Any, here: Any) -> tuple[str, Any, Any]:
    if isinstance(there, dict) and isinstance(here, dict):
        for key in [*there, *(key for key in here if key not in there)]:
            if there.get(key) != here.get(key):
                return _first_difference(f"{name}.{key}", there.get(key), here.get(key))
    return name, there, here


def _forget_origin(config: Path) -> None:
    """diffusers notes from which folder a network was loaded: a path that means nothing elsewhere."""
    values = json.loads(config.read_text())
    if values.pop("_name_or_path", None) is not None:
        config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def save_component(
    folder: Path,
    name: str,
    settings: Settings,
    write: Callable[[Path], object],
    provenance: Mapping[str, Any],
) -> None:
    """Adds or replaces one component: written aside, renamed, and then entered in the manifest.

    Raises TccpError if the folder holds weights of other settings or cannot be written.
    """
    check_settings(folder, settings)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=folder))
    except OSError as error:
        raise TccpError(f"cannot write {folder}: {error.strerror}; choose a folder that can be written") from None
    try:
        write(temporary)
        for config in temporary.rglob("config.json"):
            _forget_origin(config)
        files = {
            str(path.relative_to(temporary)): _digest(path) for path in sorted(temporary.rglob("*")) if path.is_file()
        }
        final = folder / name
        if final.exists():
            shutil.rmtree(final)
        for path in (temporary, *temporary.rglob("*")):  # safetensors keeps its files to their owner
            path.chmod(0o755 if path.is_dir() else 0o644)
        os.replace(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    with _locked(folder):
        exists = (folder / MANIFEST).exists()
        manifest: dict[str, Any] = read_manifest(folder) if exists else {"format": FORMAT, "components": {}}
        manifest["settings"] = json.loads(settings.model_dump_json())
        manifest["components"][name] = {"files": files, "provenance": {"git_commit": git_commit(), **provenance}}
        with atomic_path(folder / MANIFEST) as path:
            path.write_text(json.dumps(manifest, indent=2) + "\n")


def export(
    folder: Path,
    out: Path,
    names: Iterable[str] | None = None,
    *,
    half: bool = False,
    sampling: Sequence[str] = (),
    **provenance: Any,
) -> tuple[str, ...]:
    """Copies components of a pipeline to another folder, to be passed on, and returns their names.

    names: by default those that generate in two stages. half: weights are stored in half precision, half the size;
    loading gives single precision again. sampling: `key=value` settings of sampling that the copy is to have, for all
    networks or (`variant_overrides.NAME.sampling...`) for one. `provenance` is added to each component's.
    Raises TccpError if a component is missing or damaged, for settings that training has decided, or if `out` holds
    weights of other settings.
    """
    for item in sampling:
        if not re.match(r"(variant_overrides\.\w+\.)?sampling\.", item):
            raise TccpError(
                f"--set {item}: the networks were trained with the other settings; sampling.* can be changed"
            )
    settings = changed(read_settings(folder), sampling)
    if names is None:
        names = ("autoencoder", *(() if settings.lips.source == "none" else ("lips",)), *TWO_STAGE)
    names = tuple(names)
    components = read_manifest(folder)["components"]
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
        commit = record.pop("git_commit", None)  # of the training, not of this copy
        precision = {"precision": "fp16"} if half else {}
        save_component(out, name, settings, write, {**record, "git_commit": commit, **precision, **provenance})
    return names


def write_untrained(folder: Path, settings: Settings, variants: Iterable[VariantName] = tuple(VARIANTS)) -> None:
    """A complete pipeline folder of random networks, the same for the same seed: to test and to measure with.

    Their control branches are open, so that control is felt.
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
    """One process at a time: components of one pipeline may be trained side by side."""
    handle = os.open(folder, os.O_RDONLY)  # the folder itself is locked: no file is left in it
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def verified(folder: Path, name: str) -> Path:
    """The component's folder, every file checked against the manifest. Raises TccpError naming file and reason."""
    manifest = read_manifest(folder)
    if name not in manifest["components"]:
        have = ", ".join(manifest["components"]) or "nothing"
        raise TccpError(f"{folder} has no {name} (it has {have}): train it with `tccp train {name} --weights {folder}`")
    for relative, digest in manifest["components"][name]["files"].items():
        path = folder / name / relative
        if not path.is_file():
            raise TccpError(f"{path} is missing: the pipeline folder is incomplete, copy it again or train {name} anew")
        if _digest(path) != digest:
            raise TccpError(
                f"{path} is not the file of the manifest (its SHA-256 differs): copy it again or train {name} anew"
            )
    return folder / name


def has_component(folder: Path, name: str) -> bool:
    return (folder / MANIFEST).exists() and name in read_manifest(folder)["components"]


def load_network(
    folder: Path, name: VariantName, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> MVControlNet:
    path = verified(folder, name)
    try:
        network = MVControlNet.from_pretrained(
            path, use_safetensors=True, local_files_only=True, low_cpu_mem_usage=False, torch_dtype=dtype
        )
        return network.to(device).eval()
    except Exception as error:  # diffusers and safetensors raise many kinds for a broken folder
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise TccpError(f"{path} cannot be loaded ({reason}): copy it again or train {name} anew") from None


def same_component(a: Path, b: Path, name: str) -> bool:
    """Whether two pipelines hold the same component, in whatever precision it is stored. Raises as `verified`."""
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
    """Raises TccpError if the network is not the one that the pipeline's settings describe."""
    with torch.device("meta"):
        described = MVControlNet.from_settings(settings, name).config
    for key, value in described.items():
        found = network.config[key]
        if not key.startswith("_") and json.dumps(found) != json.dumps(value):
            raise TccpError(
                f"{folder / name / 'config.json'}: {key} is {found} there and {value} by the settings in "
                f"{folder / MANIFEST}: copy the folder again or train {name} anew"
            )
