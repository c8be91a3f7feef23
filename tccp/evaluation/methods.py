"""The rows of the table: what each way of making a talking head shows of the same clips.

Rows use what `tccp generate` uses, in the same order and with the same seeds, so a row's faces and scenes are those of
the film that `tccp generate --seed <the clip's seed>` makes. Clips of one length go through the networks in lockstep.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from tccp import headbox, landmarks
from tccp.config import VariantName
from tccp.diffusion.sampling import FrameInputs
from tccp.errors import TccpError
from tccp.evaluation.benchmark_clips import EvaluationClip
from tccp.evaluation.face_probe import FaceProbe, load_probe, read_faces
from tccp.evaluation.figures import Shown
from tccp.inference.components import Components, load_components
from tccp.inference.conditioning import LandmarkReader, control_kinds, landmark_pictures, lip_pictures, picture_of
from tccp.inference.pipeline_folder import (
    MANIFEST,
    check_network,
    has_component,
    load_network,
    read_settings,
    same_component,
)
from tccp.models.variants import FIRST_OF, TWO_STAGE, VARIANTS, ControlKind, PictureKind
from tccp.seeds import rng_seed

Ablation = Literal["no_lip", "one_stage", "context_blind"]
ABLATIONS: dict[Ablation, VariantName] = {
    "no_lip": "face_sequence",
    "one_stage": "one_stage_sequence",
    "context_blind": "landmark_sequence",
}
"""Rows with networks trained anew: the sequence variant that differs, together with its first-frame variant."""
_SHARED = ("window", "picture_px", "surround", "autoencoder")


@dataclass(frozen=True)
class Models:
    """Everything that is judged, and the probe that judges.

    ablations: pipelines that hold only the networks that differ. missing: rows that cannot be made, and why.
    """

    pipeline: Components
    ablations: Mapping[Ablation, Components]
    missing: Mapping[str, str]
    probe: FaceProbe

    @classmethod
    def load(cls, weights: Path, ablations: Path | None, device: torch.device | str = "cpu") -> Models:
        """Raises TccpError for a folder that is missing, incomplete or damaged, or ablations that do not fit."""
        pipeline = load_components(weights, TWO_STAGE, device=device)
        if ablations is not None and not ablations.is_dir():
            raise TccpError(f"--ablations {ablations} is not a folder: give one with {', '.join(ABLATIONS)} in it")
        found: dict[Ablation, Components] = {}
        missing: dict[str, str] = {}
        for name in ABLATIONS:
            if ablations is None:
                missing[name] = "its networks are trained anew: give their folder with --ablations"
            elif not (ablations / name / MANIFEST).is_file():
                missing[name] = f"the folder given with --ablations has no pipeline {name}/"
            else:
                found[name] = _load_ablation(name, ablations / name, weights, pipeline)
        for loaded in (pipeline, *found.values()):
            for network in loaded.networks.values():
                network.to(memory_format=torch.channels_last)  # a fifth faster on a CPU
        return cls(pipeline, found, missing, load_probe())


def _load_ablation(name: Ablation, folder: Path, weights: Path, main: Components) -> Components:
    """The networks that differ, on the auto-encoder and the lip source of `main`."""
    settings = read_settings(folder)
    for key in _SHARED:
        if getattr(settings, key) != getattr(main.settings, key):
            raise TccpError(f"{folder} differs from {weights} in {key}: train the ablation with the same settings")
    for shared in ("autoencoder", "lips"):
        if has_component(folder, shared) and not same_component(folder, weights, shared):
            raise TccpError(f"{folder} has another {shared} than {weights}: train the ablation on the same")
    if name == "no_lip" and settings.lips.source != "none":
        raise TccpError(f"{folder} was trained with lips: train it with lips.source=none")
    if name != "no_lip" and settings.lips != main.settings.lips:
        raise TccpError(f"{folder} differs from {weights} in lips: train the ablation with the same settings")
    if name == "context_blind" and settings.context != "none":
        raise TccpError(f"{folder} was trained with the scene: train it with context=none")
    sequence = ABLATIONS[name]
    networks = {variant: load_network(folder, variant, main.device) for variant in (FIRST_OF[sequence], sequence)}
    for variant, network in networks.items():
        check_network(folder, settings, variant, network)
    lips = None if settings.lips.source == "none" else main.lips
    return Components(settings, main.autoencoder, networks, lips, main.device)


class Shard:
    """Clips of one length on their way through the networks. What several rows need is made once."""

    def __init__(self, models: Models, clips: Sequence[EvaluationClip], tick: Callable[[int], object] | None = None):
        """tick: called with the number of frames that a stage has made since."""
        self.models = models
        self.clips = clips
        self.tick = tick
        self.pipeline = models.pipeline

    @cached_property
    def identities(self) -> list[Float[Tensor, "3 s s"]]:
        return [self.pipeline.encoder.tensor(clip.identity) for clip in self.clips]

    @cached_property
    def scene_latents(self) -> list[Float[Tensor, "f c h w"]]:
        return [self.pipeline.encoder.encode(picture_of("scene", _seen(clip)), "scene") for clip in self.clips]

    @cached_property
    def surround_latents(self) -> list[Float[Tensor, "f c h w"]]:
        return [self.pipeline.encoder.encode(picture_of("surround", _seen(clip)), "surround") for clip in self.clips]

    @cached_property
    def true_landmark_latents(self) -> list[Float[Tensor, "c f h w"]]:
        """Latents of the true landmarks' pictures."""
        return [self.encode_landmarks(clip.points) for clip in self.clips]

    @cached_property
    def landmark_latents(self) -> list[Float[Tensor, "c f h w"]]:
        """Stage 1's latents, as two_stage_generated passes them to stage 2."""
        return self.stage_one(self.pipeline, self.clips)

    def encode_landmarks(self, points: Float[np.ndarray, "f 68 2"]) -> Float[Tensor, "c f h w"]:
        pictures = landmark_pictures(points, self.pipeline.settings.picture_px)
        return self.pipeline.encoder.encode(pictures, "landmark").transpose(0, 1)

    def decode(self, latents: Float[Tensor, "c f h w"], kind: PictureKind) -> UInt8[np.ndarray, "f s s 3"]:
        return self.pipeline.encoder.decode(latents.transpose(0, 1), kind)

    def read_points(
        self, latents: Float[Tensor, "c f h w"], frames: Sequence[int] | None = None
    ) -> Float32[np.ndarray, "f 68 2"]:
        """Points read back from landmarks; NaN where none can be read, and outside `frames` (default: all)."""
        at = list(range(latents.shape[1])) if frames is None else list(frames)
        points = np.full((latents.shape[1], landmarks.NUM_POINTS, 2), np.nan, np.float32)
        points[at] = landmarks.read(self.decode(latents[:, at], "landmark"))[0]
        return points

    def seeds(self, stage: Literal["landmark", "face"] | None = None) -> list[int]:
        """The seeds of the clips' chains, as `tccp generate` draws them; None for the one stage of one_stage."""
        runs = [rng_seed(clip.truth.seed, "run", 0) for clip in self.clips]
        return [rng_seed(run, stage) if stage else run for run in runs]

    def inputs(
        self,
        pipeline: Components,
        variant: VariantName,
        sounds: Sequence[EvaluationClip],
        marks: Sequence[Float[Tensor, "c f h w"]] | None = None,
    ) -> list[list[FrameInputs]]:
        """What a variant's network of `pipeline` is shown of every clip.

        sounds: the clips whose sound is heard. marks: latents of landmarks, for networks that are shown landmarks.
        """
        row = VARIANTS[variant]
        kinds = control_kinds(row, pipeline.settings)
        conditions = row.conditions_with(pipeline.settings.lips.source)
        inputs = []
        for i, (clip, sound) in enumerate(zip(self.clips, sounds, strict=True)):
            known: dict[ControlKind, Tensor] = {}
            for kind in kinds:
                if kind == "landmark":
                    assert marks is not None
                    known[kind] = marks[i].transpose(0, 1)
                else:
                    known[kind] = (self.scene_latents if kind == "scene" else self.surround_latents)[i]
            lips = None
            if "lips" in conditions:
                assert pipeline.lips is not None
                lips = lip_pictures(pipeline.lips, sound.audio, 0, clip.num_frames, clip.identity)
            inputs.append(pipeline.encoder.inputs(row, _seen(clip), sound.mel, lips, known))
        return inputs

    def chains(
        self,
        pipeline: Components,
        sequence: VariantName,
        sounds: Sequence[EvaluationClip],
        seeds: Sequence[int],
        marks: Sequence[Float[Tensor, "c f h w"]] | None = None,
    ) -> list[Float[Tensor, "c f h w"]]:
        """Latents that a stage generates for every clip, all clips in lockstep."""
        inputs = self.inputs(pipeline, sequence, sounds, marks)
        return pipeline.stage(sequence).chain_batch(inputs, self.identities, seeds, on_frames=self.tick)

    def stage_one(self, pipeline: Components, sounds: Sequence[EvaluationClip]) -> list[Float[Tensor, "c f h w"]]:
        """Latents of generated landmarks, redrawn if the settings say so."""
        latents = self.chains(pipeline, "landmark_sequence", sounds, self.seeds("landmark"))
        return [self.redrawn(one) for one in latents] if pipeline.settings.sampling.redraw_landmarks else latents

    def redrawn(self, latents: Float[Tensor, "c f h w"]) -> Float[Tensor, "c f h w"]:
        """Latents of the points read back and drawn anew, as generation does with `redraw`."""
        return self.encode_landmarks(LandmarkReader().read(self.decode(latents, "landmark"))[0])

    def stage_two(
        self, pipeline: Components, marks: Sequence[Float[Tensor, "c f h w"]], sounds: Sequence[EvaluationClip]
    ) -> list[Float[Tensor, "c f h w"]]:
        """Latents of generated faces."""
        return self.chains(pipeline, "face_sequence", sounds, self.seeds("face"), marks)

    def truth(self) -> list[Shown]:
        """The pictures themselves: the ceiling of every instrument."""
        size = self.pipeline.settings.picture_px
        return [
            Shown(
                landmarks.read(landmarks.draw(clip.points, size))[0],
                clip.faces,
                read_faces(self.models.probe, clip.faces),
                clip.scenes,
            )
            for clip in self.clips
        ]

    def shown(self, made: Made) -> list[Shown]:
        """The row's pictures: points as they are read back, faces as the probe reads them, and faces in the scene."""
        marks = [None] * len(self.clips) if made.marks is None else [self.read_points(one) for one in made.marks]
        pairs = zip(self.clips, made.faces, marks, strict=True)
        return [composed(self.models.probe, clip, self.decode(faces, "face"), points) for clip, faces, points in pairs]


def _seen(clip: EvaluationClip) -> dict[str, np.ndarray]:
    """The clip's scene as `tccp.inference.conditioning.picture_of` takes it."""
    return {"masked_scene": clip.masked_scenes, "mask_box": clip.fitted_boxes}


def composed(
    probe: FaceProbe,
    clip: EvaluationClip,
    faces: UInt8[np.ndarray, "f s s 3"],
    points: Float32[np.ndarray, "f 68 2"] | None,
) -> Shown:
    pasted = [headbox.paste(*frame) for frame in zip(clip.scenes, faces, clip.truth.head_box, strict=True)]
    return Shown(points, faces, read_faces(probe, faces), np.stack(pasted))


@dataclass(frozen=True)
class Made:
    """A row's latents, one window of all frames per clip. marks: landmarks, where they are the row's own doing."""

    faces: list[Float[Tensor, "c f h w"]]
    marks: list[Float[Tensor, "c f h w"]] | None = None


def reconstruction(shard: Shard) -> Made:
    """True pictures through the auto-encoder: the ceiling of what generates latents."""
    faces = [shard.pipeline.encoder.encode(clip.faces, "face").transpose(0, 1) for clip in shard.clips]
    return Made(faces, shard.true_landmark_latents)


def two_stage_truth(shard: Shard) -> Made:
    """Stage 2 from the true landmarks."""
    return Made(shard.stage_two(shard.pipeline, shard.true_landmark_latents, shard.clips))


def two_stage_generated(shard: Shard) -> Made:
    """The paper's pipeline: what `tccp generate` makes."""
    faces = shard.stage_two(shard.pipeline, shard.landmark_latents, shard.clips)
    return Made(faces, shard.landmark_latents)


def no_lip(shard: Shard) -> Made:
    """Stage 2 trained without the lip reference, from the same generated landmarks."""
    return Made(shard.stage_two(shard.models.ablations["no_lip"], shard.landmark_latents, shard.clips))


def one_stage(shard: Shard) -> Made:
    """Faces straight from scene, sound, lips and identity."""
    pipeline = shard.models.ablations["one_stage"]
    return Made(shard.chains(pipeline, "one_stage_sequence", shard.clips, shard.seeds()))


def per_frame(shard: Shard) -> Made:
    """Every face by the first-frame network, from the same generated landmarks."""
    stage = shard.pipeline.stage("face_sequence")
    inputs = shard.inputs(shard.pipeline, "face_sequence", shard.clips, shard.landmark_latents)
    told = zip(inputs, shard.identities, shard.seeds("face"), strict=True)
    faces = []
    for clip in told:
        faces.append(stage.each_frame(*clip))
        if shard.tick is not None:
            shard.tick(faces[-1].shape[1])
    return Made(faces)


def context_blind(shard: Shard) -> Made:
    """Stage 1 trained without seeing the scene; stage 2 as it is."""
    marks = shard.stage_one(shard.models.ablations["context_blind"], shard.clips)
    return Made(shard.stage_two(shard.pipeline, marks, shard.clips), marks)


def audio_shuffled(shard: Shard) -> Made:
    """The paper's pipeline to the sound of another clip, judged against the clip's own truth."""
    sounds = [shard.clips[other_index(index, len(shard.clips))] for index in range(len(shard.clips))]
    marks = shard.stage_one(shard.pipeline, sounds)
    return Made(shard.stage_two(shard.pipeline, marks, sounds), marks)


def other_index(index: int, count: int) -> int:
    """Which clip of its shard a clip is confronted with: the next one."""
    return (index + 1) % count


@dataclass(frozen=True)
class Row:
    """make: what the row makes of a shard. chains: how often that takes all frames through a stage, for the ETA."""

    make: Callable[[Shard], Made]
    chains: int


ROWS: dict[str, Row] = {
    "reconstruction": Row(reconstruction, 0),
    "two_stage_truth": Row(two_stage_truth, 1),
    "two_stage_generated": Row(two_stage_generated, 2),
    "no_lip": Row(no_lip, 1),
    "one_stage": Row(one_stage, 1),
    "per_frame": Row(per_frame, 1),
    "context_blind": Row(context_blind, 2),
    "audio_shuffled": Row(audio_shuffled, 2),
}
"""Rows that come out of networks, in the order of the table."""
