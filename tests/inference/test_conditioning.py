"""Every network gets the same inputs in training, evaluation and generation, under all settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor

from preprocessing.plan import make_plan
from preprocessing.run import preprocess
from tccp import headbox
from tccp.clips.clip_table import Clip, ClipTable, decode_still
from tccp.clips.order import PlannedWindow, WindowId
from tccp.config import Settings, VariantName, override
from tccp.evaluation.benchmark_clips import EvaluationClip, true_points
from tccp.evaluation.face_probe import FaceProbe
from tccp.evaluation.methods import Models, Shard
from tccp.evaluation.validation import validate_network
from tccp.files import Folder
from tccp.inference.components import Components, load_components
from tccp.inference.conditioning import LandmarkReader, rounded, training_conditions
from tccp.inference.frames import SceneFrame
from tccp.inference.generation import Generator
from tccp.inference.manifest import TOY_WEIGHTS
from tccp.inference.pipeline_folder import write_untrained
from tccp.media import open_audio, read_frames, write_audio_wav
from tccp.media.mel import mel_windows
from tccp.models.variants import VARIANTS
from tccp.roundtable import read_truth
from tccp.training.latent_cache import LatentCache, TrainingBatch, encode_columns, to_batch
from tccp.training.lip_folds import LipSources
from tccp.training.window_files import PictureFiles

pytest_plugins = ["tiny_fixtures"]

FRAMES = 8
SEQUENCES: tuple[VariantName, ...] = ("landmark_sequence", "face_sequence", "one_stage_sequence")
CHANGES: dict[str, dict[str, Any]] = {
    "as toy": {},
    "context": {"context": "none"},
    "surround": {"surround": False},
    "neither": {"context": "none", "surround": False},
    "lips": {"lips.source": "none"},
}
STILL = {"headbox.draws": 1, "headbox.jitter_center": 0.0, "headbox.jitter_size": 0.0, "headbox.mirror": False}


@dataclasses.dataclass(frozen=True)
class Shown:
    """The inputs of a network for the frames of one window."""

    control: Tensor
    audio: Tensor | None
    lips: Tensor | None
    identity: Tensor | None


@contextmanager
def watched(components: Components) -> Iterator[dict[VariantName, Shown]]:
    """Records the inputs of each network at its first evaluation while the context is open."""
    seen: dict[VariantName, Shown] = {}
    latest: dict[VariantName, tuple[Any, ...]] = {}  # the arguments of the condition encoders

    def record(name: VariantName, arguments: tuple[Any, ...]) -> None:
        conditions, num_frames = latest[name]
        control = arguments[0][:num_frames].transpose(0, 1)
        parts = (conditions.audio, conditions.lips, conditions.identity)
        seen.setdefault(name, Shown(control.clone(), *(None if one is None else one[0].clone() for one in parts)))

    handles = []
    for name, network in components.networks.items():
        handles += [
            network.conditions.register_forward_pre_hook(lambda _, given, name=name: latest.update({name: given})),
            network.control.embed.register_forward_pre_hook(lambda _, given, name=name: record(name, given)),
        ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@pytest.fixture(scope="module")
def table(film: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The film as a clip table."""
    folder = tmp_path_factory.mktemp("table")
    preprocess([film], folder, make_plan(tiny.SETTINGS.picture_px, "truth"))
    return folder


class Points:
    """True landmarks, in the interface of a landmark file."""

    def __init__(self, points: np.ndarray):
        self.points = rounded(points)

    def read(self, frame: int) -> tuple[np.ndarray, float]:
        return self.points[frame], 1.0


@dataclasses.dataclass(frozen=True)
class Case:
    """A pipeline with given settings, and one clip in the forms that training, evaluation and generation use."""

    components: Components
    cache: LatentCache
    clip: Clip
    identity: np.ndarray
    evaluated: EvaluationClip
    frames: list[SceneFrame]
    film: Path

    @property
    def settings(self) -> Settings:
        return self.components.settings


@pytest.fixture(params=CHANGES, scope="module")
def case(request: pytest.FixtureRequest, film: Path, table: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    settings = override(tiny.SETTINGS, STILL | {"sampling.steps": 1} | CHANGES[request.param])
    folder = tmp_path_factory.mktemp("case")
    write_untrained(folder / "weights", settings)
    components = load_components(folder / "weights", VARIANTS)
    lips = None if components.lips is None else LipSources((components.lips,))
    clips = ClipTable(table)
    cache = LatentCache(Folder(folder), clips, settings, components.autoencoder, lips)
    cache.build()
    clip = clips[clips.ids[0]]
    assert clip.start_s == 0
    assert clip.num_frames >= FRAMES
    window = PlannedWindow(0, WindowId(clip.clip_id, 0))
    row = VARIANTS["one_stage_first"]
    batch = cache.batch([window], row, 1)
    assert batch.conditions.identity is not None
    stills = [decode_still(still) for still in clip.identity]
    shown = batch.conditions.identity[0]
    (identity,) = [one for one in stills if torch.equal(components.encoder.tensor(one), shown)][:1]

    truth = read_truth(film)
    scenes = np.stack(list(read_frames(film, num_frames=FRAMES)))
    fit = headbox.SceneFit(scenes.shape[2], scenes.shape[1], settings.picture_px)
    boxes = truth.head_box[:FRAMES]
    with open_audio(film) as sound:
        samples, mel = sound.samples[:], mel_windows(sound, 0, FRAMES)
    evaluated = EvaluationClip(
        truth=truth.between(0, FRAMES),
        scenes=scenes,
        faces=np.stack([headbox.crop(*frame, settings.picture_px) for frame in zip(scenes, boxes, strict=True)]),
        points=true_points(truth)[:FRAMES],
        masked_scenes=headbox.mask_scene(np.stack([fit.fit(scene) for scene in scenes]), fit.boxes(boxes)),
        mel=mel,
        audio=samples,
        identity=identity,
        fitted_boxes=fit.boxes(boxes),
    )
    frames = [SceneFrame(i, scenes[i], boxes[i], i == 0) for i in range(FRAMES)]
    return Case(components, cache, clip, identity, evaluated, frames, film)


def in_generation(case: Case) -> dict[VariantName, Shown]:
    seen: dict[VariantName, Shown] = {}
    points = Points(true_points(read_truth(case.film)))
    for options in ({"one_stage": True}, {"landmark_points": points}, {}):
        with watched(case.components) as now, open_audio(case.film) as audio:
            list(Generator(case.components, audio, case.identity, **options).frames(case.frames))  # type: ignore[arg-type]
        # The first record of a network counts: true landmarks come before generated ones.
        seen |= {name: shown for name, shown in now.items() if name not in seen}
    return seen


def in_evaluation(case: Case) -> dict[VariantName, Shown]:
    models = Models(case.components, {"one_stage": case.components}, {}, FaceProbe().eval())
    shard = Shard(models, [case.evaluated])
    with watched(case.components) as seen:
        shard.stage_one(case.components, shard.clips)
        shard.stage_two(case.components, shard.true_landmark_latents, shard.clips)
        shard.chains(case.components, "one_stage_sequence", shard.clips, shard.seeds())
    return seen


def of_batch(batch: TrainingBatch, variant: VariantName, settings: Settings) -> Shown:
    conditions = batch.only(VARIANTS[variant].conditions_with(settings.lips.source)).conditions
    parts = [None if one is None else one[0] for one in (conditions.audio, conditions.lips, conditions.identity)]
    return Shown(batch.control[0], *parts)


def in_training(case: Case, variant: VariantName) -> tuple[Shown, Shown]:
    """The inputs from cached latents, and from pictures encoded in the training step."""
    row = VARIANTS[variant]
    frames = row.num_frames(case.settings.window)
    planned = [PlannedWindow(0, WindowId(case.clip.clip_id, 0))]
    kinds = training_conditions(row, case.settings)
    cached = case.cache.batch(planned, row, frames)
    lips = case.cache.lips.pictures if case.cache.lips else None
    pictures = PictureFiles(case.settings, str(case.cache.table.folder), lips).columns(planned, row, frames, kinds)
    in_step = to_batch(encode_columns(pictures, case.components.autoencoder, row, case.settings))
    return of_batch(cached, variant, case.settings), of_batch(in_step, variant, case.settings)


def assert_alike(one: Shown, other: Shown, name: str) -> None:
    """Tolerances: clip tables hold 16-bit sound, half-precision latents and unrounded landmarks."""
    torch.testing.assert_close(one.control, other.control, rtol=0, atol=2e-2, msg=lambda text: f"{name}: {text}")
    for kind, atol in (("audio", 0.1), ("lips", 0.05), ("identity", 0.0)):
        a, b = getattr(one, kind), getattr(other, kind)
        assert (a is None) == (b is None), f"{name}: {kind}"
        if a is not None:
            torch.testing.assert_close(a, b, rtol=0, atol=atol, msg=lambda text, kind=kind: f"{name} {kind}: {text}")


def test_training_evaluation_and_generation_give_a_network_the_same_inputs(case: Case) -> None:
    generation, evaluation = in_generation(case), in_evaluation(case)
    assert set(generation) == set(evaluation) == set(VARIANTS)
    for variant in VARIANTS:
        cached, in_step = in_training(case, variant)
        assert_alike(generation[variant], evaluation[variant], f"{variant}, generation and evaluation")
        assert_alike(generation[variant], cached, f"{variant}, generation and training")
        # Both are encoded in different batches, so they are rounded differently.
        torch.testing.assert_close(cached.control, in_step.control, rtol=2e-3, atol=2e-3)


def test_exactly_the_inputs_hidden_by_the_settings_are_zero(case: Case) -> None:
    generation, channels = in_generation(case), case.settings.autoencoder.latent_channels
    for variant, shown in generation.items():
        hidden = case.settings.context == "none"
        first, second = shown.control[:channels], shown.control[channels:]
        assert len(second) == (channels if case.settings.surround and VARIANTS[variant].generates == "face" else 0)
        assert first.any() == (VARIANTS[variant].control == "landmark" or not hidden)
        assert second.any() == (len(second) > 0 and not hidden)
        kinds = VARIANTS[variant].conditions_with(case.settings.lips.source)
        assert (shown.lips is not None) == ("lips" in kinds)


def test_validation_during_training_hides_the_scene_like_evaluation(case: Case) -> None:
    """Regression test: validation once showed the scene to networks trained with `context=none`."""
    for variant in ("landmark_first", "face_first"):
        channels = case.settings.autoencoder.latent_channels
        with watched(case.components) as seen:
            clip = dataclasses.replace(case.evaluated, **_lengthened(case.evaluated))
            validate_network(case.components, variant, [clip])
        scene_seen = (
            seen[variant].control[:channels] if variant == "landmark_first" else seen[variant].control[channels:]
        )
        assert scene_seen.any() == (len(scene_seen) > 0 and case.settings.context == "scene")


def _lengthened(clip: EvaluationClip) -> dict[str, Any]:
    """The clip extended to the frames that validation needs, by playing it back and forth."""
    index = np.resize(np.concatenate([np.arange(FRAMES), np.arange(FRAMES)[::-1]]), 36)
    names = ("scenes", "faces", "points", "masked_scenes", "mel", "fitted_boxes")
    frames = {name: getattr(clip, name)[index] for name in names}
    truth = dataclasses.replace(
        clip.truth,
        **{
            field.name: value[index]
            for field in dataclasses.fields(clip.truth)
            if isinstance(value := getattr(clip.truth, field.name), np.ndarray) and len(value) == FRAMES
        },
    )
    return {**frames, "truth": truth, "audio": np.resize(clip.audio, 41 * 640)}


@pytest.mark.slow
def test_redrawn_landmarks_are_the_same_in_evaluation_and_generation(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Uses trained networks, whose landmarks can be read. Both round points as in a landmark file."""
    from tccp.evaluation.benchmark_clips import make_clip

    components = load_components(TOY_WEIGHTS)
    settings = override(components.settings, {"sampling.redraw_landmarks": True, "sampling.steps": 4})
    components = dataclasses.replace(components, settings=settings)
    clip = make_clip(7, FRAMES, settings)
    path = tmp_path_factory.mktemp("sound") / "sound.wav"
    write_audio_wav(path, clip.audio)
    frames = [SceneFrame(i, clip.scenes[i], clip.truth.head_box[i], i == 0) for i in range(FRAMES)]
    with watched(components) as generation, open_audio(path) as sound:
        clip = dataclasses.replace(clip, audio=sound.samples[:], mel=mel_windows(sound, 0, FRAMES))
        made = list(Generator(components, sound, clip.identity, clip.truth.seed).frames(frames))
    assert all(frame.points is not None and np.isfinite(frame.points).all() for frame in made)
    shard = Shard(Models(components, {}, {}, FaceProbe().eval()), [clip])
    with watched(components) as evaluation:
        shard.stage_two(components, shard.landmark_latents, [clip])
    for name in ("face_first", "face_sequence"):
        torch.testing.assert_close(generation[name].control, evaluation[name].control, rtol=0, atol=2e-2)
        assert generation[name].control.any()


def test_a_picture_without_a_face_gets_the_points_of_the_frame_before() -> None:
    from tccp.landmarks import MEAN_FACE
    from tccp.landmarks import draw as drawn

    face = (MEAN_FACE[None, :, :2] * 0.25 + 0.5).astype(np.float32)
    picture, dark = drawn(face, 64)[0], np.zeros((64, 64, 3), np.uint8)
    points, confidence = LandmarkReader().read(np.stack([dark, picture, dark]))
    assert np.isnan(points[0]).all()
    assert np.array_equal(points[1], points[2])
    assert np.array_equal(points[1], rounded(points[1]))
    assert confidence[1] > 0.5 > confidence[2]
