"""What a single network can do, on RoundTable clips that nothing is trained on: figures, and a film to look at.

For networks in the midst of training: each is given the truth in place of what the networks before it would generate.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8

from tccp import landmarks
from tccp.config import Settings, VariantName
from tccp.diffusion.sampling import Stage
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
EVERY = 9
"""Frames of a clip that networks of single frames are shown: every ninth."""
FILM = "sample.mp4"

Figures = dict[str, float]


def validation_clips(settings: Settings, count: int) -> list[EvaluationClip]:
    """The first of the benchmark's held-out clips."""
    return [make_clip(seed, FRAMES, settings) for seed in clip_seeds("held_out", count)]


def validate_network(
    pipeline: Components, variant: VariantName, clips: list[EvaluationClip], folder: Path | None = None
) -> Figures:
    """Figures of one network of a pipeline, the same for the same network; and a film of the first clip in `folder`.

    `score` among them is what a better network has more of: correlation of the mouth for landmarks, PSNR for faces.
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
        figures, shown = measure[variant](pipeline, clips)
    if folder is not None:
        every = EVERY if variant not in FIRST_OF else 1
        clip = clips[0]
        true = landmarks.draw(clip.points, clip.faces.shape[1]) if variant.startswith("landmark") else clip.faces
        _write_film(folder / FILM, true[::every], shown)
    return {name: round(float(value), 4) for name, value in figures.items()}


def _write_film(path: Path, true: UInt8[np.ndarray, "f s s 3"], made: UInt8[np.ndarray, "f s s 3"]) -> None:
    """Truth and what was made, side by side; networks of single frames are shown as the stills they are."""
    with VideoWriter(path, 2 * true.shape[2], true.shape[1], None) as film:
        for pair in zip(true, made, strict=True):
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
    stage, shard = single(pipeline, "landmark_first"), Shard(_models(pipeline), clips)
    given = zip(clips, shard.inputs(pipeline, "landmark_first", clips), shard.identities, strict=True)
    pictures = [
        shard.decode(stage.each_frame(inputs[::EVERY], identity, clip.truth.seed), "landmark")
        for clip, inputs, identity in given
    ]
    read = np.concatenate([landmarks.read(one)[0] for one in pictures])
    return _landmark_figures(read, np.concatenate([clip.points[::EVERY] for clip in clips])), pictures[0]


def _landmark_sequence(pipeline: Components, clips: list[EvaluationClip]) -> tuple[Figures, np.ndarray]:
    shard = Shard(_models(pipeline), clips)
    made = shard.stage_one(pipeline, clips)
    read = np.concatenate([shard.read_points(latents) for latents in made])
    figures = _landmark_figures(read, np.concatenate([clip.points for clip in clips]))
    return figures, shard.decode(made[0], "landmark")


def _face_first(pipeline: Components, clips: list[EvaluationClip]) -> tuple[Figures, np.ndarray]:
    stage, probe = single(pipeline, "face_first"), load_probe()
    shard = Shard(_models(pipeline), clips)
    inputs_of_clips = shard.inputs(pipeline, "face_first", clips, shard.true_landmark_latents)
    given = zip(inputs_of_clips, shard.identities, clips, strict=True)
    made = [stage.each_frame(inputs[::EVERY], identity, clip.truth.seed) for inputs, identity, clip in given]
    shown = [shard.decode(latents, "face") for latents in made]
    faces, true = np.concatenate(shown), np.concatenate([clip.faces[::EVERY] for clip in clips])
    opening = np.concatenate([clip.truth.mouth_opening[::EVERY] for clip in clips])
    fidelity = float(np.mean([psnr(a[None], b[None]) for a, b in zip(faces, true, strict=True)]))
    off = np.abs(faces.mean(axis=(1, 2)) - true.mean(axis=(1, 2))).mean() / 255
    figures = {
        "mouth_corr_face": correlation(read_faces(probe, faces).opening, opening),
        "psnr": fidelity,
        "colour_off_percent": 100 * float(off),
        "score": fidelity,
    }
    return figures, shown[0]


def _face_sequence(pipeline: Components, clips: list[EvaluationClip]) -> tuple[Figures, np.ndarray]:
    probe, shard = load_probe(), Shard(_models(pipeline), clips)
    made = shard.stage_two(pipeline, shard.true_landmark_latents, clips)
    faces = [shard.decode(latents, "face") for latents in made]
    pairs = list(zip(faces, clips, strict=True))
    windows = {
        name: float(np.mean([psnr(shown[part], clip.faces[part]) for shown, clip in pairs]))
        for name, part in (("psnr_window_1", slice(1, 8)), ("psnr_window_5", slice(-7, None)))
    }
    corr = [correlation(read_faces(probe, shown).opening, clip.truth.mouth_opening) for shown, clip in pairs]
    return {"mouth_corr_face": float(np.mean(corr)), **windows, "score": windows["psnr_window_5"]}, faces[0]


def _models(pipeline: Components) -> Models:
    return Models(pipeline, {}, {}, load_probe())


def single(pipeline: Components, variant: VariantName) -> Stage:
    """A stage of which only the first-frame network is used."""
    network = pipeline.networks[variant]
    settings = pipeline.settings.for_variant(variant)
    return Stage(network, network, NoiseSchedule.from_settings(settings.diffusion), *[settings.sampling] * 2)


def with_network(folder: Path, variant: VariantName, network: MVControlNet, device: str = "cpu") -> Components:
    """The pipeline in a folder, with this network in place of its own, and with its first-frame network."""
    companions = (FIRST_OF[variant],) if variant in FIRST_OF else ()
    whole = load_components(folder, companions, device=device)
    return Components(
        whole.settings, whole.autoencoder, {**whole.networks, variant: network.to(device)}, whole.lips, whole.device
    )
