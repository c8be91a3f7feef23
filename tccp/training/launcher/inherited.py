"""What a pipeline that is to be trained takes over from others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tccp.clips.lip_table import LIPS
from tccp.config import Settings
from tccp.errors import TccpError
from tccp.inference.pipeline_folder import MANIFEST, check_settings, has_component, read_manifest, same_component
from tccp.models.variants import VARIANTS
from tccp.training.launcher.job import AUTOENCODER
from tccp.training.recipe import COMPONENTS


def fits(place: Path, settings: Settings) -> bool:
    """Whether there is a pipeline, of such settings that its components could be taken over."""
    try:
        check_settings(place, settings)
    except TccpError:
        return False
    return (place / MANIFEST).exists()


def lendable(place: Path, pipeline: Path, settings: Settings, asked: Sequence[str]) -> list[str]:
    """What the pipeline at `place` has that `pipeline` lacks and is not to train itself (`asked`).

    Networks are lent only along with the auto-encoder, and the lips, that they were trained on.
    """
    has = read_manifest(place)["components"]
    names = [name for name in COMPONENTS if name in has and name not in asked and not has_component(pipeline, name)]
    shown_lips = {name for name, row in VARIANTS.items() if "lips" in row.conditions_with(settings.lips.source)}
    for shared, networks in ((AUTOENCODER, set(VARIANTS)), (LIPS, shown_lips)):
        both = shared in has and has_component(pipeline, shared)
        if shared not in names and not (both and same_component(place, pipeline, shared)):
            names = [name for name in names if name not in networks]
    return names
