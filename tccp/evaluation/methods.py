"""The methods under evaluation: ways of making a talking head, applied to the same clips.

A method calls the same components as `tccp generate`, in the same order and with the same seeds. Its faces and scenes
therefore equal those of the film that `tccp generate --seed <the clip's seed>` makes. The networks process clips of
equal length in lockstep.
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
from tccp.diffusion.chains import FrameInputs
from tccp.errors import TccpError
from tccp.evaluation.benchmark_clips import EvaluationClip
from tccp.evaluation.face_probe import FaceProbe, load_probe, read_faces
from tccp.evaluation.figures import ClipOutput
from tccp.inference.components import Components, load_components
from tccp.inference.conditioning import LandmarkReader, control_kinds, landmark_pictures, lip_pictures, picture_of
from tccp.inference.manifest import MANIFEST, has_component, read_settings
from tccp.inference.pipeline_folder import check_network, load_network, same_component
from tccp.models.variants import FIRST_OF, TWO_STAGE, VARIANTS, ControlKind, PictureKind
from tccp.seeds import rng_seed

Ablation = Literal["no_lip", "one_stage", "context_blind"]
ABLATIONS: dict[Ablation, VariantName] = {
    "no_lip": "face_sequence",
    "one_stage": "one_stage_sequence",
    "context_blind": "landmark_sequence",
}
"""Methods with separately trained networks: the sequence variant that differs, along with its first-frame variant."""
_SHARED_SETTINGS = ("window", "picture_px", "surround", "autoencoder")


@dataclass(frozen=True)
class Models:
    """The pipelines under evaluation, and the probe that reads their faces.

    ablations: pipelines that hold only the networks that differ. missing: methods without networks -> the reason.
    """

    pipeline: Components
    ablations: Mapping[Ablation, Components]
    missing: Mapping[str, str]
    probe: FaceProbe

    @classmethod
    def load(cls, weights: Path, ablations: Path | None, device: torch.device | str = "cpu") -> Models:
        """Loads the pipeline in `weights` and every pipeline found in `ablations`.

        Raises TccpError if a folder is missing, incomplete or damaged, or if an ablation's settings, auto-encoder or
        lip source differ from those of `weights`.
        """
        pipeline = load_components(weights, TWO_STAGE, device=device)
        if ablations is not None and not ablations.is_dir():
            raise TccpError(f"--ablations {ablations} is not a folder: give one that holds {', '.join(ABLATIONS)}")
        loaded: dict[Ablation, Components] = {}
        missing: dict[str, str] = {}
        for name in ABLATIONS:
            if ablations is None:
                missing[name] = "it needs separately trained networks: give their folder with --ablations"
            elif not (ablations / name / MANIFEST).is_file():
                missing[name] = f"the --ablations folder has no pipeline {name}/: train it there"
            else:
                loaded[name] = _load_ablation(name, ablations / name, weights, pipeline)
        return cls(pipeline, loaded, missing, load_probe())


def _load_ablation(name: Ablation, folder: Path, weights: Path, main: Components) -> Components:
    """Loads the networks that differ, and combines them with the auto-encoder and lip source of `main`."""
    settings = read_settings(folder)
    for key in _SHARED_SETTINGS:
        if getattr(settings, key) != getattr(main.settings, key):
            raise TccpError(f"{folder} differs from {weights} in {key}: train the ablation with the same settings")
    for shared in ("autoencoder", "lips"):
        if has_component(folder, shared) and not same_component(folder, weights, shared):
            raise TccpError(f"{folder} has another {shared} than {weights}: train the ablation with that {shared}")
    if name == "no_lip" and settings.lips.source != "none":
        raise TccpError(f"{folder} was trained with a lip reference: train it with lips.source=none")
    if name != "no_lip" and settings.lips != main.settings.lips:
        raise TccpError(f"{folder} differs from {weights} in lips: train the ablation with the same settings")
    if name == "context_blind" and settings.context != "none":
        raise TccpError(f"{folder} was trained with the scene as input: train it with context=none")
    sequence = ABLATIONS[name]
    networks = {variant: load_network(folder, variant, main.device) for variant in (FIRST_OF[sequence], sequence)}
    for variant, network in networks.items():
        check_network(folder, settings, variant, network)
    lips = None if settings.lips.source == "none" else main.lips
    return Components(settings, main.autoencoder, networks, lips, main.device)


class Shard:
    """Clips of equal length that the networks process together. Caches latents that several methods use."""

    def __init__(
        self, models: Models, clips: Sequence[EvaluationClip], on_frames: Callable[[int], object] | None = None
    ):
        """on_frames: receives the number of frames that a stage has generated since the last call."""
        self.models = models
        self.clips = clips
        self.on_frames = on_frames
        self.pipeline = models.pipeline

    @cached_property
    def identities(self) -> list[Float[Tensor, "3 s s"]]:
        return [self.pipeline.encoder.tensor(clip.identity) for clip in self.clips]

    @cached_property
    def scene_latents(self) -> list[Float[Tensor, "f c h w"]]:
        return [self.pipeline.encoder.encode(picture_of("scene", _scene_arrays(clip)), "scene") for clip in self.clips]

    @cached_property
    def surround_latents(self) -> list[Float[Tensor, "f c h w"]]:
        return [
            self.pipeline.encoder.encode(picture_of("surround", _scene_arrays(clip)), "surround") for clip in self.clips
        ]

    @cached_property
    def true_landmark_latents(self) -> list[Float[Tensor, "c f h w"]]:
        """Latents of pictures of the true landmarks."""
        return [self.encode_landmarks(clip.points) for clip in self.clips]

    @cached_property
    def landmark_latents(self) -> list[Float[Tensor, "c f h w"]]:
        """Latents of the landmarks that stage 1 generates, the input of stage 2 in two_stage_generated."""
        return self.stage_one(self.pipeline, self.clips)

    def encode_landmarks(self, points: Float[np.ndarray, "f 68 2"]) -> Float[Tensor, "c f h w"]:
        pictures = landmark_pictures(points, self.pipeline.settings.picture_px)
        return self.pipeline.encoder.encode(pictures, "landmark").transpose(0, 1)

    def decode(self, latents: Float[Tensor, "c f h w"], kind: PictureKind) -> UInt8[np.ndarray, "f s s 3"]:
        return self.pipeline.encoder.decode(latents.transpose(0, 1), kind)

    def read_points(
        self, latents: Float[Tensor, "c f h w"], frames: Sequence[int] | None = None
    ) -> Float32[np.ndarray, "f 68 2"]:
        """Landmark points in 0..1 of the head box, read from the decoded landmark pictures.

        frames: the frames to read, by default all. Frames that are unreadable or not in `frames` are NaN.
        """
        indices = list(range(latents.shape[1])) if frames is None else list(frames)
        points = np.full((latents.shape[1], landmarks.NUM_POINTS, 2), np.nan, np.float32)
        points[indices] = landmarks.read(self.decode(latents[:, indices], "landmark"))[0]
        return points

    def seeds(self, stage: Literal["landmark", "face"] | None = None) -> list[int]:
        """The seed of each clip's chain, equal to the one in `tccp generate`. stage: None for one_stage."""
        chain_seeds = [rng_seed(clip.truth.seed, "run", 0) for clip in self.clips]
        return [rng_seed(seed, stage) if stage else seed for seed in chain_seeds]

    def inputs(
        self,
        pipeline: Components,
        variant: VariantName,
        audio_clips: Sequence[EvaluationClip],
        landmark_latents: Sequence[Float[Tensor, "c f h w"]] | None = None,
    ) -> list[list[FrameInputs]]:
        """The inputs of a variant's network in `pipeline`: a list of frames for each clip.

        audio_clips: for each clip, the clip whose audio conditions the network.
        landmark_latents: needed by variants with landmarks as control.
        """
        spec = VARIANTS[variant]
        kinds = control_kinds(spec, pipeline.settings)
        conditions = spec.conditions_with(pipeline.settings.lips.source)
        inputs = []
        for i, (clip, audio_clip) in enumerate(zip(self.clips, audio_clips, strict=True)):
            known: dict[ControlKind, Tensor] = {}
            for kind in kinds:
                if kind == "landmark":
                    assert landmark_latents is not None
                    known[kind] = landmark_latents[i].transpose(0, 1)
                else:
                    known[kind] = (self.scene_latents if kind == "scene" else self.surround_latents)[i]
            lips = None
            if "lips" in conditions:
                assert pipeline.lips is not None
                lips = lip_pictures(pipeline.lips, audio_clip.audio, 0, clip.num_frames, clip.identity)
            inputs.append(pipeline.encoder.inputs(spec, _scene_arrays(clip), audio_clip.mel, lips, known))
        return inputs

    def chains(
        self,
        pipeline: Components,
        sequence: VariantName,
        audio_clips: Sequence[EvaluationClip],
        seeds: Sequence[int],
        landmark_latents: Sequence[Float[Tensor, "c f h w"]] | None = None,
    ) -> list[Float[Tensor, "c f h w"]]:
        """Latents that one stage generates for every clip, all clips in lockstep. Arguments as for `inputs`."""
        inputs = self.inputs(pipeline, sequence, audio_clips, landmark_latents)
        return pipeline.stage(sequence).chain_batch(inputs, self.identities, seeds, on_frames=self.on_frames)

    def stage_one(self, pipeline: Components, audio_clips: Sequence[EvaluationClip]) -> list[Float[Tensor, "c f h w"]]:
        """Latents of generated landmarks, redrawn if `sampling.redraw_landmarks` is set."""
        latents = self.chains(pipeline, "landmark_sequence", audio_clips, self.seeds("landmark"))
        return [self.redrawn(clip) for clip in latents] if pipeline.settings.sampling.redraw_landmarks else latents

    def redrawn(self, latents: Float[Tensor, "c f h w"]) -> Float[Tensor, "c f h w"]:
        """Reads the points from decoded landmarks and encodes clean pictures of them, as generation does."""
        return self.encode_landmarks(LandmarkReader().read(self.decode(latents, "landmark"))[0])

    def stage_two(
        self,
        pipeline: Components,
        landmark_latents: Sequence[Float[Tensor, "c f h w"]],
        audio_clips: Sequence[EvaluationClip],
    ) -> list[Float[Tensor, "c f h w"]]:
        """Latents of generated faces."""
        return self.chains(pipeline, "face_sequence", audio_clips, self.seeds("face"), landmark_latents)

    def true_outputs(self) -> list[ClipOutput]:
        """The true pictures of every clip, as an output: their figures are the best that can be expected."""
        size = self.pipeline.settings.picture_px
        return [
            ClipOutput(
                landmarks.read(landmarks.draw(clip.points, size))[0],
                clip.faces,
                read_faces(self.models.probe, clip.faces),
                clip.scenes,
            )
            for clip in self.clips
        ]

    def outputs(self, result: MethodResult) -> list[ClipOutput]:
        """Decodes a method's latents: per clip, points read back, faces, the probe's reading, and composed scenes."""
        points: list[Float32[np.ndarray, "f 68 2"] | None] = [None] * len(self.clips)
        if result.landmark_latents is not None:
            points = [self.read_points(latents) for latents in result.landmark_latents]
        return [
            compose_output(self.models.probe, clip, self.decode(latents, "face"), clip_points)
            for clip, latents, clip_points in zip(self.clips, result.face_latents, points, strict=True)
        ]


def _scene_arrays(clip: EvaluationClip) -> dict[str, np.ndarray]:
    """The clip's scene as `tccp.inference.conditioning.picture_of` takes it."""
    return {"masked_scene": clip.masked_scenes, "mask_box": clip.fitted_boxes}


def compose_output(
    probe: FaceProbe,
    clip: EvaluationClip,
    faces: UInt8[np.ndarray, "f s s 3"],
    points: Float32[np.ndarray, "f 68 2"] | None,
) -> ClipOutput:
    """Pastes the faces into the clip's scenes and reads them with the probe."""
    pasted = [headbox.paste(*frame) for frame in zip(clip.scenes, faces, clip.truth.head_box, strict=True)]
    return ClipOutput(points, faces, read_faces(probe, faces), np.stack(pasted))


@dataclass(frozen=True)
class MethodResult:
    """The latents that a method produces, one tensor of all frames per clip.

    landmark_latents: None if the method generates no landmarks of its own.
    """

    face_latents: list[Float[Tensor, "c f h w"]]
    landmark_latents: list[Float[Tensor, "c f h w"]] | None = None


def reconstruction(shard: Shard) -> MethodResult:
    """True pictures encoded and decoded: the upper bound of methods that generate latents."""
    faces = [shard.pipeline.encoder.encode(clip.faces, "face").transpose(0, 1) for clip in shard.clips]
    return MethodResult(faces, shard.true_landmark_latents)


def two_stage_truth(shard: Shard) -> MethodResult:
    """Stage 2 with the true landmarks as input."""
    return MethodResult(shard.stage_two(shard.pipeline, shard.true_landmark_latents, shard.clips))


def two_stage_generated(shard: Shard) -> MethodResult:
    """The paper's pipeline, stage 1 and stage 2, as in `tccp generate`."""
    faces = shard.stage_two(shard.pipeline, shard.landmark_latents, shard.clips)
    return MethodResult(faces, shard.landmark_latents)


def no_lip(shard: Shard) -> MethodResult:
    """Stage 2 trained without the lip reference, with the landmarks of two_stage_generated as input."""
    return MethodResult(shard.stage_two(shard.models.ablations["no_lip"], shard.landmark_latents, shard.clips))


def one_stage(shard: Shard) -> MethodResult:
    """Faces generated directly from scene, audio, lip reference and identity, without landmarks."""
    pipeline = shard.models.ablations["one_stage"]
    return MethodResult(shard.chains(pipeline, "one_stage_sequence", shard.clips, shard.seeds()))


def per_frame(shard: Shard) -> MethodResult:
    """Every face by the first-frame network, with the landmarks of two_stage_generated as input."""
    stage = shard.pipeline.stage("face_sequence")
    inputs = shard.inputs(shard.pipeline, "face_sequence", shard.clips, shard.landmark_latents)
    faces = []
    for clip_inputs, identity, seed in zip(inputs, shard.identities, shard.seeds("face"), strict=True):
        faces.append(stage.each_frame(clip_inputs, identity, seed))
        if shard.on_frames is not None:
            shard.on_frames(faces[-1].shape[1])
    return MethodResult(faces)


def context_blind(shard: Shard) -> MethodResult:
    """Stage 1 trained without the scene as input, then the pipeline's stage 2."""
    landmark_latents = shard.stage_one(shard.models.ablations["context_blind"], shard.clips)
    return MethodResult(shard.stage_two(shard.pipeline, landmark_latents, shard.clips), landmark_latents)


def audio_shuffled(shard: Shard) -> MethodResult:
    """The paper's pipeline with another clip's audio as input; figures compare it with the clip's own truth."""
    audio_clips = [shard.clips[other_index(index, len(shard.clips))] for index in range(len(shard.clips))]
    landmark_latents = shard.stage_one(shard.pipeline, audio_clips)
    return MethodResult(shard.stage_two(shard.pipeline, landmark_latents, audio_clips), landmark_latents)


def other_index(index: int, count: int) -> int:
    """Index of the clip that serves as the wrong clip for clip `index` of a shard: the next one, cyclically."""
    return (index + 1) % count


@dataclass(frozen=True)
class Method:
    """A way of making a talking head.

    make: applies the method to a shard. num_chains: stages that generate all frames, for the progress estimate;
    stage 1 of two_stage_generated counts once, because other methods use its landmarks.
    """

    make: Callable[[Shard], MethodResult]
    num_chains: int


METHODS: dict[str, Method] = {
    "reconstruction": Method(reconstruction, 0),
    "two_stage_truth": Method(two_stage_truth, 1),
    "two_stage_generated": Method(two_stage_generated, 2),
    "no_lip": Method(no_lip, 1),
    "one_stage": Method(one_stage, 1),
    "per_frame": Method(per_frame, 1),
    "context_blind": Method(context_blind, 2),
    "audio_shuffled": Method(audio_shuffled, 2),
}
"""Methods that use networks, in the order of their rows in the table."""
