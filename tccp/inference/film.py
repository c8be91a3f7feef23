"""`tccp generate` as a function: check every input, find the head, then stream the film."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from jaxtyping import Float, UInt8
from rich.progress import Progress

from tccp import faces, headbox
from tccp.config import Solver, override
from tccp.errors import TccpError
from tccp.inference.generation import (
    Extend,
    GeneratedFrame,
    Generator,
    LandmarkTrack,
    landmark_writer,
    scene_frames,
    scene_indices,
    variants_needed,
)
from tccp.inference.head_tracks import (
    HeadTrack,
    Point,
    find_cuts,
    square_box,
    track_from_boxes,
    track_from_detector,
    track_from_mask,
    track_from_truth,
)
from tccp.inference.pipeline import Pipeline
from tccp.media import MediaError, MediaInfo, VideoWriter, mark_generated, open_audio, probe, read_frames
from tccp.media.mel import check_audio
from tccp.progress import progress
from tccp.roundtable import read_truth

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
    detector: Literal["mediapipe", "fan", "lbp"] = "mediapipe"
    detector_weights: Path | None = None
    person: Point | None = None
    identity_box: str | None = None
    extend: Extend = "no"
    steps: int | None = None
    solver: Solver | None = None
    guidance_scale: float | None = None
    temperature: float | None = None
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
        return {**dataclasses.asdict(self), "out": str(self.out), "warnings": list(self.warnings)}


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
    warnings: list[str] = []

    def note(text: str) -> None:
        warnings.append(text)
        warn(text)

    _check_options(request)
    scene = probe(request.scene)
    if not scene.has_video:
        raise MediaError(request.scene, "no_video", "the file has no pictures; --scene needs a film with a video track")
    candidates = _identity_pictures(request.identity)
    with (
        LandmarkTrack(request.landmarks) if request.landmarks else nullcontext() as points,
        open_audio(request.audio) as audio,
    ):
        for text in check_audio(audio):
            note(f"{request.audio}: {text}")
        num_frames = audio.num_frames
        scene_indices(scene.num_frames, num_frames, request.extend, request.scene)  # refuses a scene that is too short
        marks = mark_generated(seed=str(request.seed), weights=request.weights.resolve().name)
        film = VideoWriter(request.out, scene.width, scene.height, audio, lossless=request.lossless, metadata=marks)
        needed = variants_needed(request.one_stage, from_landmarks=points is not None)
        pipeline = Pipeline.load(
            request.weights, needed, preset=request.preset, device=request.device, lip_weights=request.lip_weights
        )
        pipeline = _with_sampling(pipeline, request)
        identity = read_identity(request, candidates)
        generated = 0
        with progress() as bar:
            track = _find_head(request, scene, min(num_frames, scene.num_frames), bar, note)
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
            task = bar.add_task("generating", total=num_frames)
            request.out.parent.mkdir(parents=True, exist_ok=True)
            with film, landmark_writer(request.save_landmarks) as save:
                for frame in generator.frames(scene_frames(request.scene, scene, track, num_frames, request.extend)):
                    film.write(frame.picture)
                    save(frame)
                    on_frame(frame)
                    generated += frame.face is not None
                    bar.advance(task)
    seconds = round(time.monotonic() - started, 2)
    return FilmResult(request.out, num_frames, generated, num_frames - generated, seconds, tuple(warnings))


def _check_options(request: FilmRequest) -> None:
    """Refuses what contradicts itself or could not be written in the end."""
    if sum((request.mask is not None, request.box is not None, request.truth)) > 1:
        raise TccpError("--mask, --box and --truth say the same thing in three ways: give one of them")
    if request.one_stage and (request.landmarks or request.save_landmarks or request.redraw):
        raise TccpError("--one-stage has no landmarks: leave out --landmarks, --save-landmarks and --redraw")
    _check_writable(request.out, "--out")
    if request.save_landmarks is not None:
        _check_writable(request.save_landmarks, "--save-landmarks")
    inputs = (request.scene, request.audio, request.identity, request.mask)
    if request.out.exists() and any(path and path.exists() and path.samefile(request.out) for path in inputs):
        raise TccpError(f"--out {request.out} is one of the inputs, which it would overwrite: give another name")


def _check_writable(path: Path, option: str) -> None:
    """Tries what will be done in the end, and leaves nothing behind."""
    if path.is_dir():
        raise TccpError(f"{option} {path} is a folder: give the name of a file")
    try:
        folder = next(folder for folder in path.absolute().parents if folder.exists())
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise TccpError(
            f"cannot write {option} {path}: {error.strerror} ({folder}); choose a folder that can be written"
        ) from None


def _with_sampling(pipeline: Pipeline, request: FilmRequest) -> Pipeline:
    """The pipeline with what the command line says about sampling, also where a variant has settings of its own."""
    names = ("solver", "steps", "guidance_scale", "temperature")
    given = {name: getattr(request, name) for name in names}
    changes = {f"sampling.{name}": value for name, value in given.items() if value is not None}
    settings = override(pipeline.settings, changes)
    for variant, own in settings.variant_overrides.items():
        again = {key: value for key, value in changes.items() if key in own}
        settings = override(settings, {f"variant_overrides.{variant}": {**own, **again}})
    most = settings.diffusion.num_train_timesteps
    if settings.sampling.steps > most:
        raise TccpError(f"--steps {settings.sampling.steps}: at most {most}, as many as the networks were trained with")
    return dataclasses.replace(pipeline, settings=settings)


def _find_head(
    request: FilmRequest, scene: MediaInfo, num_frames: int, bar: Progress, note: Callable[[str], object]
) -> HeadTrack:
    """The head in the first `num_frames` of the scene, and the cuts there."""
    if request.truth:
        return track_from_truth(scene)
    task = bar.add_task("looking for the head", total=num_frames)

    def on_frame() -> None:
        bar.advance(task)

    if request.mask is None and request.box is None:
        with _detector(request) as backend:
            return track_from_detector(scene, backend, request.person, num_frames, on_frame)
    if request.mask is not None:
        track = track_from_mask(scene, request.mask, num_frames)
    else:
        assert request.box is not None
        track = track_from_boxes(scene, request.box)
    if track.cuts is not None:
        return track
    try:
        return dataclasses.replace(track, cuts=find_cuts(scene, num_frames, on_frame))
    except MediaError:
        raise
    except TccpError as error:  # a plain installation, without a detector of cuts, generates too
        note(f"{scene.path} is taken for one shot: {error}")
        return track


@contextmanager
def _detector(request: FilmRequest) -> Iterator[faces.FaceBackend]:
    backend = faces.open_backend(request.detector, request.detector_weights)
    try:
        yield backend
    finally:
        backend.close()


def read_identity(request: FilmRequest, pictures: dict[int, UInt8[np.ndarray, "_ _ 3"]]) -> UInt8[np.ndarray, "h w 3"]:
    """The head crop of the identity picture, or of that of a film's `pictures` that shows the face largest.

    pictures: by the number of their frame. A box that is given, or known, is that of the one in the middle.
    Raises TccpError if there is no face where one is looked for.
    """
    given = request.identity_box
    frame, middle = list(pictures.items())[len(pictures) // 2]
    if given == "whole":
        return middle
    if given is not None:
        try:
            box = np.array([float(part) for part in given.split(",")]).reshape(4)
        except ValueError:
            raise TccpError(f"--identity-box {given}: give x0,y0,x1,y1 in pixels, or whole") from None
        height, width = middle.shape[:2]
        return _crop_native(middle, square_box(box, width, height, f"--identity-box {given} of {request.identity}"))
    if request.truth:
        if _is_picture(request.identity):
            return middle  # `tccp synth` writes head crops
        return _crop_native(middle, read_truth(request.identity).head_box[frame])
    with _detector(request) as backend:
        found = [(face, picture) for picture in pictures.values() for face in backend.detect(picture)]
    if not found:
        raise TccpError(
            f"no face found in {request.identity} with {request.detector}: give --identity-box x0,y0,x1,y1, or "
            "--identity-box whole if the picture shows the head alone"
        )
    face, picture = max(found, key=lambda pair: pair[0].side)
    if face.landmarks_px is not None:
        return _crop_native(picture, headbox.head_boxes(face.landmarks_px[None])[0])
    return _crop_native(picture, faces.head_boxes_from_faces([face])[0])


def _crop_native(picture: UInt8[np.ndarray, "h w 3"], box: Float[np.ndarray, "4"]) -> UInt8[np.ndarray, "s s 3"]:
    return headbox.crop(picture, box, int(box[2] - box[0]))


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in PICTURE_SUFFIXES


def _identity_pictures(path: Path) -> dict[int, UInt8[np.ndarray, "_ _ 3"]]:
    """The picture, or up to _IDENTITY_CANDIDATES frames spread over the film, by their number.

    Raises TccpError if there is nothing to be seen.
    """
    if _is_picture(path):
        try:
            data = np.frombuffer(path.read_bytes(), np.uint8)
        except OSError as error:
            raise TccpError(f"{path}: {error.strerror}; give a picture or a film of the person") from None
        picture = cv2.imdecode(data, cv2.IMREAD_COLOR) if len(data) else None
        if picture is None:
            raise TccpError(f"{path} is not a picture that can be read: give PNG, JPEG, BMP or WebP, or a film")
        return {0: np.asarray(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB), np.uint8)}
    info = probe(path)
    if not info.has_video:
        raise MediaError(path, "no_video", "it has sound only; give a picture or a film of the person")
    count = min(_IDENTITY_CANDIDATES, info.num_frames)
    wanted = [(2 * k + 1) * info.num_frames // (2 * count) for k in range(count)]
    return {i: frame for i, frame in enumerate(read_frames(path, num_frames=wanted[-1] + 1)) if i in wanted}
