"""The manifest of a pipeline folder: what the folder holds, and whether settings fit it. Without torch: see `film`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tccp.config import Settings, settings_from_json
from tccp.errors import TccpError
from tccp.files import is_url
from tccp.models.variants import TWO_STAGE, VARIANTS
from tccp.strict_json import parse_json

FORMAT = 1
MANIFEST = "manifest.json"
TOY_WEIGHTS = Path(__file__).parent.parent / "toy"
"""The packaged pipeline, trained on RoundTable by `make toy-weights`."""
COMPONENTS: tuple[str, ...] = ("autoencoder", "lips", *VARIANTS)
"""Names of components."""
SHARED_SETTINGS = (
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
"""Settings that all components of a pipeline share: they determine shapes, latents, or the prediction target."""
PER_COMPONENT_SETTINGS = {
    "autoencoder": ("decoder_folded_levels", "kl_weight", "precision", "batch_size", "max_steps", "learning_rate"),
    "lips": ("liplet_steps", "liplet_batch_size", "liplet_learning_rate"),
    "network": ("dropout", "gradient_checkpointing"),
}
"""Exceptions within SHARED_SETTINGS: components may differ in them. They affect only how a component is trained, or the
decoder, on which latents and networks do not depend."""


def weights_folder(option: Path) -> Path:
    """The folder for a value of `--weights`: `toy` is the packaged pipeline unless a folder of that name exists."""
    return TOY_WEIGHTS if option == Path("toy") and not option.exists() else option


def pipeline_files(folder: Path | str, components: Iterable[str] = COMPONENTS) -> list[Path]:
    """What a pipeline folder consists of: the manifest and the folders of these components. None for a URL."""
    if is_url(folder):
        return []
    place = weights_folder(Path(folder))
    return [place / name for name in (MANIFEST, *components)]


def default_components(settings: Settings) -> tuple[str, ...]:
    """The components of the paper's pipeline: those of two-stage generation, with lips if the settings use them."""
    return ("autoencoder", *(("lips",) if settings.lips.source != "none" else ()), *TWO_STAGE)


def check_sampling(overrides: Iterable[str]) -> None:
    """Raises TccpError for an override of another setting than those of sampling, which networks do not depend on."""
    for item in overrides:
        if not re.match(r"(variant_overrides\.\w+\.)?sampling\.", item):
            raise TccpError(
                f"--set {item}: only sampling.* can be changed, because training has fixed the other settings"
            )


def read_manifest(folder: Path) -> dict[str, Any]:
    """Reads the manifest. Raises TccpError if it is missing, unreadable, damaged or of another format."""
    path = folder / MANIFEST
    try:
        manifest = parse_json(path.read_bytes())
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
        what = "is not a pipeline's manifest" if found is None else f"is of pipeline format {found!r:.40}"
        raise TccpError(f"{path} {what}; this version reads {FORMAT}: export the weights again")
    components = manifest.get("components")
    if not isinstance(manifest.get("settings"), dict) or not _valid_components(components):
        raise TccpError(f"{path} is damaged (settings or components are malformed): copy the folder again")
    return manifest


def _valid_components(components: object) -> bool:
    return isinstance(components, dict) and all(
        isinstance(component, dict)
        and isinstance(component.get("files"), dict)
        and all(isinstance(digest, str) for digest in component["files"].values())
        for component in components.values()
    )


def read_settings(folder: Path) -> Settings:
    """Reads the settings of a pipeline. Raises TccpError, which names the manifest, if they are invalid."""
    try:
        return settings_from_json(json.dumps(read_manifest(folder)["settings"]))
    except TccpError as error:
        if str(folder) in str(error):
            raise
        raise TccpError(f"{folder / MANIFEST}: {error}; copy the folder again") from None


def _shared_settings(settings: Settings) -> dict[str, Any]:
    """The values of SHARED_SETTINGS, without PER_COMPONENT_SETTINGS; `variant_overrides` is filtered alike."""
    values = {name: json.loads(settings.model_dump_json(include={name}))[name] for name in SHARED_SETTINGS}
    for name, keys in PER_COMPONENT_SETTINGS.items():
        for key in keys:
            del values[name][key]
    values["variant_overrides"] = {
        variant: shared
        for variant, overrides in values["variant_overrides"].items()
        if (shared := {key: value for key, value in overrides.items() if _is_shared(*key.split(".", 1))})
    }
    return values


def _is_shared(name: str, key: str = "") -> bool:
    return name in SHARED_SETTINGS and key not in PER_COMPONENT_SETTINGS.get(name, ())


def check_settings(folder: Path, settings: Settings) -> None:
    """Raises TccpError if an existing pipeline has other shared settings; it names the first that differs.

    Does nothing if `folder` holds no pipeline.
    """
    if not (folder / MANIFEST).exists():
        return
    stored = _shared_settings(read_settings(folder))
    for name, value in _shared_settings(settings).items():
        if stored[name] != value:
            key, there, here = _first_difference(name, stored[name], value)
            raise TccpError(
                f"{folder} holds weights of other settings: {key} is {json.dumps(there)} there and "
                f"{json.dumps(here)} here; use that preset or another --weights folder"
            )


def _first_difference(name: str, there: Any, here: Any) -> tuple[str, Any, Any]:
    if isinstance(there, dict) and isinstance(here, dict):
        for key in [*there, *(key for key in here if key not in there)]:
            if there.get(key) != here.get(key):
                return _first_difference(f"{name}.{key}", there.get(key), here.get(key))
    return name, there, here


def has_component(folder: Path, name: str) -> bool:
    """Whether the manifest lists the component. Raises TccpError if the manifest is damaged."""
    return (folder / MANIFEST).exists() and name in read_manifest(folder)["components"]
