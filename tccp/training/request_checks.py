"""What can be wrong with a training, as far as it can be seen without torch, whose import takes seconds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tccp.clips.clip_table import ClipTable
from tccp.clips.lip_table import LIPS
from tccp.config import Settings
from tccp.errors import TccpError
from tccp.files import check_outputs, check_writable_folder
from tccp.inference.manifest import COMPONENTS, check_settings, default_components, has_component, pipeline_files

STORAGE_FOLDERS = ("runs", "latents", LIPS)
"""What a training writes to its storage."""


def missing_components(weights: Path, settings: Settings) -> tuple[str, ...]:
    """The components of the paper's pipeline that the pipeline folder lacks."""
    return tuple(name for name in default_components(settings) if not has_component(weights, name))


def check_training(
    data: Path,
    weights: Path,
    settings: Settings,
    storage: Path,
    names: Sequence[str],
    jobs: int = 1,
    autoencoder: Path | None = None,
    lip_weights: Path | None = None,
    control_from: Path | None = None,
) -> None:
    """Raises TccpError for inputs that cannot be used, and for outputs that cannot be written or overwrite inputs."""
    if jobs < 1:
        raise TccpError(f"jobs is {jobs}: give at least 1")
    for name in names:
        if name not in COMPONENTS:
            raise TccpError(f"unknown component {name!r}: give one of {', '.join(COMPONENTS)}, or all")
    check_settings(weights, settings)
    with ClipTable(data) as table:
        places = table.places
    check_outputs(
        {"--weights": pipeline_files(weights, names), "--storage": [storage / name for name in STORAGE_FOLDERS]},
        {
            "--data": places,
            "--autoencoder": autoencoder,
            "--lip-weights": lip_weights,
            "--control-from": pipeline_files(control_from) if control_from else None,
        },
    )
    check_writable_folder("--weights", weights)
    check_writable_folder("--storage", storage)
