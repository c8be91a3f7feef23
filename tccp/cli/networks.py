"""Commands for networks: train, export, describe, evaluate."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from tccp.cli.options import (
    Device,
    Json,
    LipWeights,
    MaxSteps,
    Overrides,
    Preset,
    Resume,
    Storage,
    check_device,
    device_of,
    emit,
    flat,
    note,
    settings_of,
    unshortened,
)
from tccp.config import storage_root
from tccp.errors import TccpError
from tccp.files import check_outputs, check_writable, check_writable_folder
from tccp.progress import progress


def train(
    components: Positional[tuple[str, ...]],
    /,
    data: Path,
    weights: Path,
    preset: Preset = "toy",
    set: Overrides = (),
    max_steps: MaxSteps = None,
    resume: Resume = False,
    restart: bool = False,
    autoencoder: Path | None = None,
    lip_weights: LipWeights = None,
    control_from: Path | None = None,
    jobs: int = 1,
    device: Device = "auto",
    storage: Storage = None,
    json: Json = False,
) -> None:
    """Train components of a pipeline, or all that are missing, and add them to its folder. Runs without Ray.

    Args:
        components: autoencoder, lips, landmark_first, landmark_sequence, face_first, face_sequence, one_stage_first,
            one_stage_sequence; or all.
        data: clip table (the folder that `tccp preprocess` wrote).
        weights: pipeline folder to add the components to; created if it does not exist.
        autoencoder: folder of a pre-trained diffusers AutoencoderKL, used instead of training one. If the setting
            autoencoder.decoder_folded_levels asks for another decoder, only a decoder is trained, to its encoder.
        control_from: pipeline folder to copy the video branches from. With --set training.freeze_video_branch=true only
            the control branches are trained.
        restart: remove interrupted runs of these components, and train them from the beginning.
        jobs: number of components to train at the same time. Each has its own process and an equal share of the cores.
    """
    check_device(device)
    from tccp.inference.manifest import check_settings
    from tccp.training.request_checks import check_training, missing_components

    if not components or ("all" in components and len(components) > 1):
        raise TccpError("name components, or all, not both: tccp train --help lists them")
    if resume and restart:
        raise TccpError("--resume continues a run and --restart removes it: give one of them")
    given, settings = components, settings_of(preset, set, max_steps)
    root = storage_root(storage)
    if "all" in components:
        check_settings(weights, settings)
        components = missing_components(weights, settings)
        if not components and not resume:
            _trained(json, weights, ())
            return
    check_training(data, weights, settings, root, components, jobs, autoencoder, lip_weights, control_from)
    if text := unshortened(components, set, max_steps, settings):
        note(text)
    with progress() as bar:
        bar.add_task("loading torch")  # after the checks, because it takes seconds
        from tccp.training.recipe import Trainer

    taken = {"autoencoder": autoencoder, "lip-weights": lip_weights, "control-from": control_from}
    options = [item for name, path in taken.items() if path for item in (f"--{name}", path.resolve().name)]
    options += ["--set", *flat(set)] if set else []
    options += ["--max-steps", str(max_steps)] if max_steps is not None else []
    trainer = Trainer(
        data,
        weights,
        settings,
        root,
        resume=resume,
        restart=restart,
        device=device_of(device),
        pretrained_autoencoder=autoencoder,
        lip_weights=lip_weights,
        control_from=control_from,
        command=shlex.join(["tccp", "train", *given, "--preset", preset, *options]),
    )
    if "all" in given:
        components = trainer.missing()
    trainer.train(components, jobs)
    _trained(json, weights, components)


def _trained(json: bool, weights: Path, components: Sequence[str]) -> None:
    emit(
        json,
        {"weights": str(weights), "trained": list(components)},
        f"trained {', '.join(components) or 'nothing, no component is missing'}: {weights}",
    )


def export(
    weights: Positional[Path],
    out: Positional[Path],
    components: tuple[str, ...] | None = None,
    half: bool = False,
    set: Overrides = (),
    json: Json = False,
) -> None:
    """Copy components of a pipeline folder to another folder, for distribution.

    Only the sampling settings (sampling.*) of the copy can be changed: the other settings belong to the trained
    networks.

    Args:
        weights: pipeline folder; `toy` for the packaged one.
        out: folder to copy to. Existing components of the same name are replaced.
        components: components to copy (default: those of two-stage generation).
        half: store weights in half precision, at half the size.
    """
    from tccp.inference.manifest import check_sampling, pipeline_files, read_manifest, weights_folder

    check_sampling(flat(set))
    names = read_manifest(weights_folder(weights))["components"]
    check_outputs({"OUT": pipeline_files(out)}, {"WEIGHTS": pipeline_files(weights, names)})
    check_writable_folder("OUT", out)
    from tccp.inference.pipeline_folder import export as export_components

    copied = export_components(weights_folder(weights), out, components, half=half, sampling=flat(set))
    files = [path for path in out.rglob("*") if path.is_file()]
    size_mb = sum(path.stat().st_size for path in files) / 1e6
    emit(
        json,
        {"out": str(out), "components": sorted(read_manifest(out)["components"]), "megabytes": round(size_mb, 1)},
        f"{len(copied)} components in {out}, {size_mb:.1f} MB",
    )


def describe(preset: Preset = "paper", set: Overrides = (), json: Json = False) -> None:
    """Count the parameters of a preset's networks and their floating-point operations per window."""
    from tccp.cli.network_counts import describe as count

    rows = count(settings_of(preset, set))
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
    """Measure a pipeline on clips with known ground truth: sync, coherence, fidelity and drift, next to baselines.

    It takes about twenty minutes on two cores, and two minutes with --quick.

    Args:
        benchmark: roundtable: drawn scenes with people, rooms and voices that no training uses.
        weights: pipeline folder; `toy` for the packaged one.
        ablations: folder with the pipelines no_lip, one_stage and context_blind. Rows without a pipeline are left out.
        quick: use a tenth of the clips and shorter chains, as a smoke test. Do not quote these figures.
        clips: number of held-out clips (default: 128; 12 with --quick).
        jobs: processes of one thread each (default: one per core, at most 8; 1 on a GPU). It does not change the
            figures.
        sheet: PNG file to write, with the input, the ground truth and the result of five clips.
    """
    import dataclasses

    from tccp.inference.manifest import read_settings, weights_folder

    check_device(device)
    for option, number, least in (("--clips", clips, 2), ("--jobs", jobs, 1)):
        if number is not None and number < least:
            raise TccpError(f"{option} {number} is too small: give at least {least}")
    read_settings(weights_folder(weights))
    if sheet is not None:
        check_writable("--sheet", sheet)
    with progress() as bar:
        bar.add_task("loading torch")  # after the checks, because it takes seconds
        from tccp.evaluation.runner import FULL, QUICK, evaluate_roundtable
    from tccp.evaluation.score_table import text_table

    place = device_of(device)
    extent = QUICK if quick else FULL
    if clips is not None:
        extent = dataclasses.replace(extent, clips=clips)
    if jobs is None:
        jobs = min(8, os.cpu_count() or 1) if place == "cpu" else 1
    record = evaluate_roundtable(weights_folder(weights), ablations, extent, jobs=jobs, sheet=sheet, device=place)
    emit(json, record, "" if json else text_table(record))
