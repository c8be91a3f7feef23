"""Commands about networks: train, export, describe, evaluate."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from tccp.cli.options import Device, Json, Overrides, Preset, Storage, device_of, emit
from tccp.config import load_settings, storage_root
from tccp.errors import TccpError


def train(
    components: Positional[tuple[str, ...]],
    /,
    data: Path,
    weights: Path,
    preset: Preset = "toy",
    set: Overrides = (),
    resume: bool = False,
    autoencoder: Path | None = None,
    lip_weights: Path | None = None,
    control_from: Path | None = None,
    jobs: int = 1,
    device: Device = "auto",
    storage: Storage = None,
    json: Json = False,
) -> None:
    """Train components of a pipeline, or all that it lacks, and add them to its folder.

    Args:
        components: of autoencoder, lips, landmark_first, landmark_sequence, face_first, face_sequence, one_stage_first
            and one_stage_sequence; or all.
        data: clip table (the folder that `tccp preprocess` wrote).
        weights: the pipeline folder to add to; made if it does not exist.
        resume: go on with a run that was interrupted, from its last checkpoint.
        autoencoder: a pre-trained diffusers AutoencoderKL folder to take instead of training one.
        lip_weights: the published Wav2Lip checkpoint, for lips.source=wav2lip.
        control_from: a pipeline folder whose video branches are taken over; with training.freeze_video_branch=true only
            the control branch is trained.
        jobs: components trained side by side, each in a process with its share of the cores.
    """
    from tccp.training.recipe import Trainer

    if not components or ("all" in components and len(components) > 1):
        raise TccpError("name components, or all, not both: tccp train --help lists them")
    settings = load_settings(preset, set)
    taken = {"autoencoder": autoencoder, "lip-weights": lip_weights, "control-from": control_from}
    options = [item for name, path in taken.items() if path for item in (f"--{name}", path.resolve().name)]
    trainer = Trainer(
        data,
        weights,
        settings,
        storage_root(storage),
        resume=resume,
        device=device_of(device),
        pretrained_autoencoder=autoencoder,
        lip_weights=lip_weights,
        control_from=control_from,
        command=shlex.join(
            ["tccp", "train", *components, "--preset", preset, *options, *(["--set", *set] if set else [])]
        ),
    )
    if "all" in components:
        components = trainer.train_missing(jobs)
    else:
        trainer.train(components, jobs)
    emit(
        json,
        {"weights": str(weights), "trained": list(components)},
        f"trained {', '.join(components) or 'nothing: all is there'}: {weights}",
    )


def export(
    weights: Positional[Path],
    out: Positional[Path],
    components: tuple[str, ...] | None = None,
    half: bool = False,
    set: Overrides = (),
    json: Json = False,
) -> None:
    """Copy components of a pipeline folder to another folder, to be passed on.

    Args:
        weights: pipeline folder.
        out: folder to copy to; components that are there are replaced.
        components: which; by default those that generate in two stages.
        half: store weights in half precision, at half the size.
        set: settings of sampling that the copy is to have, e.g. sampling.steps=20; training has decided the others.
    """
    from tccp.inference.pipeline_folder import export as export_components
    from tccp.inference.pipeline_folder import read_manifest

    copied = export_components(weights, out, components, half=half, sampling=set)
    files = [path for path in out.rglob("*") if path.is_file()]
    size_mb = sum(path.stat().st_size for path in files) / 1e6
    emit(
        json,
        {"out": str(out), "components": sorted(read_manifest(out)["components"]), "megabytes": round(size_mb, 1)},
        f"{len(copied)} components in {out}, {size_mb:.1f} MB",
    )


def describe(preset: Preset = "paper", set: Overrides = (), json: Json = False) -> None:
    """Build the networks of a preset and count their parameters and their work per window."""
    from tccp.cli.describe import describe as count

    rows = count(load_settings(preset, set))
    header = f"{'variant':20} {'params':>12} {'control':>12} {'GFLOP/window':>13}"
    lines = [
        f"{row['variant']:20} {row['params']:12,} {row['control_params']:12,} {row['gflop_per_window']:13.2f}"
        for row in rows
    ]
    emit(json, {"preset": preset, "variants": rows}, "\n".join([header, *lines]))


def evaluate(
    benchmark: Positional[Literal["roundtable"]],
    /,
    weights: Path,
    ablations: Path | None = None,
    quick: bool = False,
    clips: int | None = None,
    jobs: int | None = None,
    sheet: Path | None = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Measure a pipeline on clips of which everything is known: sync, coherence, fidelity, drift, against baselines.

    On two cores some twenty minutes; with --quick two.

    Args:
        benchmark: roundtable: procedural scenes with new people, rooms and voices.
        weights: pipeline folder; `toy` for the packaged one.
        ablations: folder with the pipelines no_lip, one_stage and context_blind; rows without them are left out.
        quick: a tenth of the clips and shorter chains, to see that all is well; not to be quoted.
        clips: number of held-out clips (default: 128; 12 with --quick).
        jobs: processes of one thread each (default: one per core, at most 8; 1 on a GPU). Figures do not depend on it.
        sheet: a PNG to write, of five clips: what was given, the truth, what was generated.
    """
    import dataclasses

    from tccp.evaluation.runner import FULL, QUICK, evaluate_roundtable
    from tccp.evaluation.score_table import text_table
    from tccp.inference.pipeline_folder import weights_folder

    place = device_of(device)
    extent = QUICK if quick else FULL
    if clips is not None:
        extent = dataclasses.replace(extent, clips=clips)
    if jobs is None:
        jobs = min(8, os.cpu_count() or 1) if place == "cpu" else 1
    record = evaluate_roundtable(weights_folder(weights), ablations, extent, jobs=jobs, sheet=sheet, device=place)
    emit(json, record, "" if json else text_table(record))
