"""Which components of another pipeline a pipeline can copy instead of training them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tccp.clips.lip_table import LIPS
from tccp.config import Settings
from tccp.errors import TccpError
from tccp.inference.manifest import COMPONENTS, MANIFEST, check_settings, has_component, read_manifest
from tccp.inference.pipeline_folder import same_component
from tccp.models.variants import VARIANTS
from tccp.training.launcher.job import AUTOENCODER


def has_matching_settings(place: Path, settings: Settings) -> bool:
    """Whether a folder holds a pipeline whose settings allow these settings' pipelines to copy its components."""
    try:
        check_settings(place, settings)
    except TccpError:
        return False
    return (place / MANIFEST).exists()


def reusable_components(place: Path, pipeline: Path, settings: Settings, to_train: Sequence[str]) -> list[str]:
    """Components of the pipeline at `place` that `pipeline` lacks and that are not to be trained.

    A network is reused only together with the auto-encoder, and the lips, that it was trained with.
    """
    available = read_manifest(place)["components"]
    names = [
        name for name in COMPONENTS if name in available and name not in to_train and not has_component(pipeline, name)
    ]
    need_lips = {name for name, row in VARIANTS.items() if "lips" in row.conditions_with(settings.lips.source)}
    for shared, networks in ((AUTOENCODER, set(VARIANTS)), (LIPS, need_lips)):
        both_have = shared in available and has_component(pipeline, shared)
        if shared not in names and not (both_have and same_component(place, pipeline, shared)):
            names = [name for name in names if name not in networks]
    return names
