"""Validation of a single network during training: figures on held-out RoundTable clips, and a sample film.

The network receives true pictures as input in place of pictures that earlier networks would generate.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8

from tccp import landmarks
from tccp.config import Settings, VariantName
from tccp.diffusion.chains import Stage
from tccp.diffusion.schedule import NoiseSchedule
from tccp.evaluation.benchmark_clips import HELD_OUT_FRAMES, EvaluationClip, clip_seeds, make_clip
from tccp.evaluation.face_probe import load_probe, read_faces
from tccp.evaluation.figures import correlation, psnr
from tccp.evaluation.methods import Models, Shard
from tccp.inference.components import Components, load_components
from tccp.media import VideoWriter
from tccp.models.mvcontrolnet import MVControlNet
from tccp.models.variants import FIRST_OF

FRAMES = HELD_OUT_FRAMES
LAST_WINDOW = 5
"""Of the windows of a chain whose PSNR is measured; the first one is the other."""
FRAME_STEP = 9
"""First-frame networks generate every ninth frame of a clip."""
SAMPLE_FILM = "sample.mp4"

Figures = dict[str, float]


def validation_clips(settings: Settings, count: int) -> list[EvaluationClip]:
    """The first of the benchmark's held-out clips, longer if LAST_WINDOW windows need it."""
    frames = max(FRAMES, new_frames(LAST_WINDOW, settings.window).stop)
    return [make_clip(seed, frames, settings) for seed in clip_seeds("held_out", count)]


def validate_network(
    pipeline: Components, variant: VariantName, clips: list[EvaluationClip], folder: Path | None = None
) -> Figures:
    """Figures of one network of a pipeline; deterministic. Empty for variants of the one-stage ablation.

    `score` is higher for a better network: correlation of the mouth opening for landmarks, PSNR in dB for faces.
    folder: where to write `SAMPLE_FILM`, which shows the true and the generated pictures of the first clip.
    """
    measure: dict[VariantName, Callable[[Components, list[EvaluationClip]], tuple[Figures, np.ndarray]]] = {
        "landmark_first": _landmark_first,
        "landmark_sequence": _landmark_sequence,
        "face_first": _face_first,
        "face_sequence": _face_sequence,
    }
    if variant not in measure:
        return {}
    with torch.inference_mode():
        figures, generated = measure[variant](pipeline, clips)
    if folder is not None:
        step = FRAME_STEP if variant not in FIRST_OF else 1
        clip = clips[0]
        true = landmarks.draw(clip.points, clip.faces.shape[1]) if variant.startswith("landmark") else clip.faces
        _write_film(folder / SAMPLE_FILM, true[::step], generated)
    return {name: round(float(value), 4) for name, value in figures.items()}


def _write_film(path: Path, true: UInt8[np.ndarray, "f s s 3"], generated: UInt8[np.ndarray, "f s s 3"]) -> None:
    """Writes true (left) and generated (right) pictures side by side, one frame per picture."""
    with VideoWriter(path, 2 * true.shape[2], true.shape[1], None) as film:
        for pair in zip(true, generated, strict=True):
            film.write(np.concatenate(pair, axis=1))


def _landmark_figures(points: np.ndarray, truth: np.ndarray) -> Figures:
    yaw, true_yaw = np.nan_to_num(landmarks.yaw_deg(points)), landmarks.yaw_deg(truth)
    turned = np.abs(true_yaw) > 10
    mouth = correlation(landmarks.mouth_opening(points), landmarks.mouth_opening(truth))
    sides = (np.sign(yaw) == np.sign(true_yaw))[turned]
    return {
        "mouth_corr": mouth,
        "yaw_mae_deg": np.abs(yaw - true_yaw).mean(),
        "side_accuracy": sides.mean() if len(sides) else 0.0,
        "unread": np.isnan(points).any(axis=(1, 2)).mean(),
        "score": mouth,
    }


def _landmark_first(pipeline: Components, clips: list[EvaluationClip]) -> tuple[Figures, np.ndarray]:
    stage, shard = _first_frame_stage(pipeline, "landmark_first"), Shard(_models(pipeline), clips)
    arguments = zip(clips, shard.inputs(pipeline, "landmark_first", clips), shard.identities, strict=True)
    pictures = [
        shard.decode(stage.each_frame(inputs[::FRAME_STEP], identity, clip.truth.seed), "landmark")
        for clip, inputs, identity in arguments
    ]
    points = np.concatenate([landmarks.read(clip_pictures)[0] for clip_pictures in pictures])
    return _landmark_figures(points, np.concatenate([clip.points[::FRAME_STEP] for clip in clips])), pictures[0]


def _landmark_sequence(pipeline: Components, clips: list[EvaluationClip]) -> tuple[Figures, np.ndarray]:
    shard = Shard(_models(pipeline), clips)
    latents = shard.stage_one(pipeline, clips)
    points = np.concatenate([shard.read_points(clip_latents) for clip_latents in latents])
    figures = _landmark_figures(points, np.concatenate([clip.points for clip in clips]))
    return figures, shard.decode(latents[0], "landmark")


def _face_first(pipeline: Components, clips: list[EvaluationClip]) -> tuple[Figures, np.ndarray]:
    stage, probe = _first_frame_stage(pipeline, "face_first"), load_probe()
    shard = Shard(_models(pipeline), clips)
    inputs_of_clips = shard.inputs(pipeline, "face_first", clips, shard.true_landmark_latents)
    arguments = zip(inputs_of_clips, shard.identities, clips, strict=True)
    latents = [
        stage.each_frame(inputs[::FRAME_STEP], identity, clip.truth.seed) for inputs, identity, clip in arguments
    ]
    pictures = [shard.decode(clip_latents, "face") for clip_latents in latents]
    faces, true = np.concatenate(pictures), np.concatenate([clip.faces[::FRAME_STEP] for clip in clips])
    opening = np.concatenate([clip.truth.mouth_opening[::FRAME_STEP] for clip in clips])
    fidelity = float(np.mean([psnr(a[None], b[None]) for a, b in zip(faces, true, strict=True)]))
    colour_error = np.abs(faces.mean(axis=(1, 2)) - true.mean(axis=(1, 2))).mean() / 255
    figures = {
        "mouth_corr_face": correlation(read_faces(probe, faces).opening, opening),
        "psnr": fidelity,
        "colour_off_percent": 100 * float(colour_error),
        "score": fidelity,
    }
    return figures, pictures[0]


def _face_sequence(pipeline: Components, clips: list[EvaluationClip]) -> tuple[Figures, np.ndarray]:
    probe, shard = load_probe(), Shard(_models(pipeline), clips)
    latents = shard.stage_two(pipeline, shard.true_landmark_latents, clips)
    faces = [shard.decode(clip_latents, "face") for clip_latents in latents]
    pairs = list(zip(faces, clips, strict=True))
    windows = {
        f"psnr_window_{number}": float(np.mean([psnr(generated[part], clip.faces[part]) for generated, clip in pairs]))
        for number in (1, LAST_WINDOW)
        for part in [new_frames(number, pipeline.settings.window)]
    }
    corr = [correlation(read_faces(probe, generated).opening, clip.truth.mouth_opening) for generated, clip in pairs]
    return {"mouth_corr_face": float(np.mean(corr)), **windows, "score": windows[f"psnr_window_{LAST_WINDOW}"]}, faces[
        0
    ]


def new_frames(number: int, window: int) -> slice:
    """The frames of a clip that are new in window `number` = 1, 2, ... of `window` frames.

    The first frame of a window is the last one of the window before; that of window 1 is of the first-frame network.
    """
    new = max(window - 1, 1)
    return slice(1 + (number - 1) * new, 1 + number * new)


def _models(pipeline: Components) -> Models:
    return Models(pipeline, {}, {}, load_probe())


def _first_frame_stage(pipeline: Components, variant: VariantName) -> Stage:
    """A stage for `each_frame`, which uses only the first-frame network; it fills the sequence network's place too."""
    network = pipeline.networks[variant]
    settings = pipeline.settings.for_variant(variant)
    return Stage(network, network, NoiseSchedule.from_settings(settings.diffusion), *[settings.sampling] * 2)


def with_network(folder: Path, variant: VariantName, network: MVControlNet, device: str = "cpu") -> Components:
    """The pipeline in `folder` with `network` as its network of this variant.

    The auto-encoder, the lip source and, for a sequence variant, the first-frame network come from `folder`.
    Raises TccpError as `load_components`.
    """
    first = (FIRST_OF[variant],) if variant in FIRST_OF else ()
    loaded = load_components(folder, first, device=device)
    networks = {**loaded.networks, variant: network.to(device)}
    return Components(loaded.settings, loaded.autoencoder, networks, loaded.lips, loaded.device)
