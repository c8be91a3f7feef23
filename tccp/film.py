"""`tccp generate` as a function: check every input, find the head, then stream the film."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from jaxtyping import UInt8

from tccp import faces, headbox
from tccp.audio import check_audio
from tccp.config import SamplingSettings, Solver, TccpError
from tccp.generation import (
    Extend,
    GeneratedFrame,
    Generator,
    LandmarkTrack,
    landmark_writer,
    scene_frames,
    scene_indices,
    variants_needed,
)
from tccp.media import MediaError, MediaInfo, VideoWriter, mark_generated, open_audio, probe, read_frames
from tccp.pipeline import Pipeline
from tccp.progress import progress
from tccp.tracks import (
    HeadTrack,
    Point,
    square_box,
    track_from_boxes,
    track_from_detector,
    track_from_mask,
    track_from_truth,
)

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
_IDENTITY_CANDIDATES = 16  # frames of an identity film that are looked at


@dataclass(frozen=True)
class FilmRequest:
    """What `tccp generate` is asked for; see its --help. Boxes are x0,y0,x1,y1 in pixels."""

    scene: Path
    audio: Path
    identity: Path
    weights: Path
    out: Path
    mask: Path | None = None
    box: str | None = None
    truth: bool = False
    detector: Literal["mediapipe", "lbp"] = "mediapipe"
    detector_weights: Path | None = None
    person: Point | None = None
    identity_box: str | None = None
    extend: Extend = "no"
    steps: int | None = None
    solver: Solver | None = None
    guidance_scale: float | None = None
    seed: int = 0
    preset: str | None = None
    one_stage: bool = False
    save_landmarks: Path | None = None
    landmarks: Path | None = None
    redraw: bool = False
    color_match: bool = True
    lossless: bool = False
    lip_weights: Path | None = None
    device: str = "cpu"


@dataclass(frozen=True)
class FilmResult:
    """frames = generated + passed_through (frames without the person). seconds: wall clock, set-up included."""

    out: Path
    frames: int
    generated: int
    passed_through: int
    seconds: float
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "out": str(self.out), "warnings": list(self.warnings)}


def generate_film(
    request: FilmRequest,
    warn: Callable[[str], object] = lambda text: None,
    on_frame: Callable[[GeneratedFrame], object] = lambda frame: None,
) -> FilmResult:
    """Generates the film. Nothing stands under `request.out` unless it is whole.

    on_frame: is shown every finished frame.
    Raises TccpError for whatever is wrong with the inputs, before any work is done wherever that can be known.
    """
    started = time.monotonic()
    if sum((request.mask is not None, request.box is not None, request.truth)) > 1:
        raise TccpError("--mask, --box and --truth say the same thing in three ways: give one of them")
    scene = probe(request.scene)
    if not scene.has_video:
        raise TccpError(f"{request.scene} has no video: --scene needs a film with pictures")
    _check_out(request.out)
    needed = variants_needed(request.one_stage, request.landmarks is not None)
    pipeline = Pipeline.load(
        request.weights, needed, preset=request.preset, device=request.device, lip_weights=request.lip_weights
    )
    pipeline = _with_sampling(pipeline, request)
    warnings: list[str] = []
    with open_audio(request.audio) as audio, progress() as bar:
        for text in check_audio(audio):
            warnings.append(f"{request.audio}: {text}")
            warn(warnings[-1])
        num_frames = audio.num_frames
        scene_indices(scene.num_frames, num_frames, request.extend, request.scene)  # refuses a scene that is too short
        track = _find_head(request, scene, bar)
        identity = read_identity(request, warn)
        points = LandmarkTrack(request.landmarks) if request.landmarks else None
        generator = Generator(
            pipeline,
            audio,
            identity,
            request.seed,
            one_stage=request.one_stage,
            landmark_points=points,
            redraw=request.redraw or None,
            color_match=request.color_match,
        )
        generated = 0
        task = bar.add_task("generating", total=num_frames)
        marks = mark_generated(seed=str(request.seed), weights=request.weights.name)
        with (
            VideoWriter(
                request.out, scene.width, scene.height, audio, lossless=request.lossless, metadata=marks
            ) as writer,
            landmark_writer(request.save_landmarks) as save,
        ):
            for frame in generator.frames(scene_frames(request.scene, scene, track, num_frames, request.extend)):
                writer.write(frame.picture)
                save(frame)
                on_frame(frame)
                generated += frame.face is not None
                bar.advance(task)
        if points:
            points.close()
    seconds = round(time.monotonic() - started, 2)
    return FilmResult(request.out, num_frames, generated, num_frames - generated, seconds, tuple(warnings))


def _check_out(out: Path) -> None:
    """Refuses early what the writer would refuse late: folders that cannot be made or written to."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        probe_file = out.with_name(f".{out.name}.writable")
        probe_file.touch()
        probe_file.unlink()
    except OSError as error:
        raise TccpError(f"cannot write {out}: {error.strerror}; give --out in a folder that can be written") from None


def _with_sampling(pipeline: Pipeline, request: FilmRequest) -> Pipeline:
    import dataclasses

    given = {"solver": request.solver, "steps": request.steps, "guidance_scale": request.guidance_scale}
    changes = {name: value for name, value in given.items() if value is not None}
    if not changes:
        return pipeline
    try:
        sampling = SamplingSettings.model_validate(pipeline.settings.sampling.model_dump() | changes)
    except ValueError as error:
        raise TccpError(f"sampling settings {changes}: {str(error).splitlines()[2].strip()}") from None
    if sampling.steps > pipeline.settings.diffusion.num_train_timesteps:
        raise TccpError(f"--steps {sampling.steps}: at most {pipeline.settings.diffusion.num_train_timesteps}")
    return dataclasses.replace(pipeline, settings=pipeline.settings.model_copy(update={"sampling": sampling}))


def _find_head(request: FilmRequest, scene: MediaInfo, bar) -> HeadTrack:
    if request.truth:
        return track_from_truth(scene)
    if request.box is not None:
        return track_from_boxes(scene, request.box)
    task = bar.add_task("looking for the head", total=scene.num_frames)
    if request.mask is not None:
        return track_from_mask(scene, request.mask, lambda: bar.advance(task))
    backend = faces.open_backend(request.detector, request.detector_weights)
    try:
        return track_from_detector(scene, backend, request.person, lambda: bar.advance(task))
    finally:
        backend.close()


def read_identity(request: FilmRequest, warn: Callable[[str], object]) -> UInt8[np.ndarray, "h w 3"]:
    """The head crop of the identity picture, or of the film's frame that shows the face best.

    Raises TccpError if the file shows no picture, or no face where one is looked for.
    """
    pictures = _identity_pictures(request.identity)
    given = request.identity_box
    if given == "whole":
        return pictures[len(pictures) // 2]
    if given is not None:
        try:
            box = np.array([float(part) for part in given.split(",")]).reshape(4)
        except ValueError:
            raise TccpError(f"--identity-box {given}: give x0,y0,x1,y1 in pixels, or whole") from None
        return _crop_native(pictures[len(pictures) // 2], square_box(box, f"--identity-box {given}"))
    if request.truth:
        return pictures[len(pictures) // 2]  # `tccp synth` writes head crops
    backend = faces.open_backend(request.detector, request.detector_weights)
    try:
        found = [(face, picture) for picture in pictures for face in backend.detect(picture)]
    finally:
        backend.close()
    if not found:
        raise TccpError(
            f"no face found in {request.identity} with {request.detector}: give --identity-box x0,y0,x1,y1, or "
            "--identity-box whole if the picture shows the head alone"
        )
    face, picture = max(found, key=lambda pair: float(pair[0].box[2] - pair[0].box[0]))
    if face.landmarks_px is not None:
        return _crop_native(picture, headbox.head_boxes(face.landmarks_px[None])[0])
    return _crop_native(picture, faces.head_boxes_from_faces([face])[0])


def _crop_native(picture: UInt8[np.ndarray, "h w 3"], box: np.ndarray) -> UInt8[np.ndarray, "s s 3"]:
    return headbox.crop(picture, box, int(box[2] - box[0]))


def _identity_pictures(path: Path) -> list[UInt8[np.ndarray, "h w 3"]]:
    if path.suffix.lower() in PICTURE_SUFFIXES:
        try:
            data = np.frombuffer(path.read_bytes(), np.uint8)
        except OSError as error:
            raise TccpError(f"{path}: {error.strerror}; give a picture or a film of the person") from None
        picture = cv2.imdecode(data, cv2.IMREAD_COLOR) if len(data) else None
        if picture is None:
            raise TccpError(f"{path} is not a picture that can be read: give PNG, JPEG, BMP or WebP, or a film")
        return [np.asarray(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB), np.uint8)]
    info = probe(path)
    if not info.has_video:
        raise MediaError(path, "no_video", "it has sound only; give a picture or a film of the person")
    step = max(1, info.num_frames // _IDENTITY_CANDIDATES)
    return [frame for i, frame in enumerate(read_frames(path)) if i % step == step // 2][:_IDENTITY_CANDIDATES]


