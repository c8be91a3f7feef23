"""Generates one film: checks the inputs, finds the head, generates the frames and writes the film."""

from __future__ import annotations

import dataclasses
import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tccp import faces, headbox
from tccp.config import Settings, Solver, override
from tccp.errors import TccpError
from tccp.inference.components import Components
from tccp.inference.frames import GeneratedFrame
from tccp.inference.generation import Generator, variants_needed
from tccp.inference.head_tracks import (
    HeadTrack,
    Point,
    find_cuts,
    track_from_boxes,
    track_from_detector,
    track_from_mask,
    track_from_truth,
)
from tccp.inference.identity_crop import identity_candidates, identity_head
from tccp.inference.landmark_file import LandmarkFile, landmark_writer
from tccp.inference.scene import Extend, scene_frames, scene_indices
from tccp.media import AudioTrack, MediaError, MediaInfo, VideoWriter, mark_generated, open_audio, probe
from tccp.media.mel import check_audio
from tccp.models.variants import VariantName
from tccp.progress import ProgressHandler, Tasks, progress

logger = logging.getLogger(__name__)

OnFrame = Callable[[GeneratedFrame], object]


@dataclass(frozen=True)
class FilmRequest:
    """Inputs and options of one film.

    scene: the film to generate into. audio: any media file with sound; it sets the length of the film. identity: a
    picture or a film of the person to generate. out: the film to write (.mp4); None if only frames are wanted.
    weights: a local pipeline folder, a URL, a Hub id, or `toy`; ignored if a loaded pipeline is given.

    At most one of three fields gives the head's position: mask (a film of the scene's size, bright at the head),
    box (`x0,y0,x1,y1` in scene pixels, or a JSON track file), or truth (use the truth file beside a film of
    `tccp synth`). Without them, a face detector finds the head: detector, detector_weights, person (x, y in pixels of
    the person to replace). identity_box: `x0,y0,x1,y1` of the head in the identity picture, or `whole`.

    extend: what to do if the scene is shorter than the sound. steps, solver, guidance_scale, temperature: sampling
    settings; None: as in the weights. seed: for all random numbers. preset: refuse weights of another preset.
    one_stage: use the one-stage networks. landmarks, save_landmarks: landmark files to generate from, or to write.
    redraw: read landmarks from stage 1's pictures and draw them again for stage 2. color_match: match the head's
    colours to the ring around the mask. lossless: write a lossless film, which keeps every pixel outside the mask.
    lip_weights: the published Wav2Lip checkpoint. device: cpu, cuda or cuda:N.
    """

    scene: Path
    audio: Path
    identity: Path
    weights: Path | str = "toy"
    out: Path | None = None
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

    def __post_init__(self) -> None:
        """Converts paths given as strings."""
        for name in ("scene", "audio", "identity", "out", "mask", "detector_weights", "save_landmarks", "landmarks"):
            given = getattr(self, name)
            if isinstance(given, str):
                object.__setattr__(self, name, Path(given))

    @property
    def variants(self) -> tuple[VariantName, ...]:
        """The networks that the request needs."""
        return variants_needed(self.one_stage, from_landmarks=self.landmarks is not None)


@dataclass(frozen=True)
class FilmResult:
    """A written film and its statistics.

    frames = generated + passed_through, where passed_through counts frames without the person. seconds: wall-clock
    time, including loading and checks.
    """

    out: Path
    frames: int
    generated: int
    passed_through: int
    seconds: float
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "out": str(self.out), "warnings": list(self.warnings)}


class FilmInputs:
    """The opened and checked inputs of a request. Use as a context manager.

    Opening checks everything that can be checked without the networks; raises TccpError or MediaError.
    """

    def __init__(self, request: FilmRequest):
        self.request = request
        self.warnings: list[str] = []
        self._open = ExitStack()

    def __enter__(self) -> FilmInputs:
        request = self.request
        _check_options(request)
        self.scene = probe(request.scene)
        if not self.scene.has_video:
            message = "the file has no pictures; --scene needs a film with a video track"
            raise MediaError(request.scene, "no_video", message)
        self.candidates = identity_candidates(request.identity)
        with ExitStack() as opened:
            self.landmarks = opened.enter_context(
                LandmarkFile(request.landmarks) if request.landmarks else nullcontext()
            )
            self.audio: AudioTrack = opened.enter_context(open_audio(request.audio))
            self.num_frames = self.audio.num_frames  # of the generated film, at 25 fps
            for text in self.scene.notes:
                self.warn(f"{request.scene}: {text}")
            for text in (*self.audio.notes, *check_audio(self.audio)):
                self.warn(f"{request.audio}: {text}")
            # Raises TccpError if the scene is too short.
            scene_indices(self.scene.num_frames, self.num_frames, request.extend, request.scene)
            self._open = opened.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()

    def warn(self, text: str) -> None:
        self.warnings.append(text)
        logger.warning("%s", text)


def film_frames(components: Components, inputs: FilmInputs, tasks: Tasks) -> Iterator[GeneratedFrame]:
    """Yields the frames of the film in order, as windows finish. Raises TccpError if no head or face is found."""
    request = inputs.request
    components = dataclasses.replace(components, settings=_with_sampling(components.settings, request))
    identity = identity_head(
        request.identity,
        inputs.candidates,
        box=request.identity_box,
        truth=request.truth,
        open_detector=lambda: _detector(request),
    )
    track = _find_head(inputs, tasks)
    _warn_of_little_context(inputs, track)
    generator = Generator(
        components,
        inputs.audio,
        identity,
        request.seed,
        one_stage=request.one_stage,
        landmark_points=inputs.landmarks,
        redraw=request.redraw or None,
        color_match=request.color_match,
    )
    task = tasks.add_task("generating", total=inputs.num_frames)
    scene = scene_frames(request.scene, inputs.scene, track, inputs.num_frames, request.extend)
    for frame in generator.frames(scene):
        yield frame
        tasks.advance(task)


def write_film(
    request: FilmRequest,
    load: Callable[[FilmRequest], Components],
    on_frame: OnFrame = lambda frame: None,
    on_progress: ProgressHandler | None = None,
) -> FilmResult:
    """Generates a film and writes it. `request.out` appears only when the film is complete.

    load: loads the components; called after the inputs are checked. on_frame: called with every finished frame.
    Raises TccpError or MediaError for inputs that cannot be used, before generation where possible.
    """
    started = time.monotonic()
    if request.out is None:
        raise TccpError("the request has no output file: give out (a name that ends in .mp4)")
    with FilmInputs(request) as inputs, progress(on_progress) as tasks:
        film = VideoWriter(
            request.out,
            inputs.scene.width,
            inputs.scene.height,
            inputs.audio,
            lossless=request.lossless,
            metadata=mark_generated(seed=str(request.seed), weights=Path(request.weights).absolute().name),
        )
        frames = film_frames(load(request), inputs, tasks)
        first = next(frames)  # by now, every input is checked; create the folder only then
        request.out.parent.mkdir(parents=True, exist_ok=True)
        generated = 0
        with film, landmark_writer(request.save_landmarks) as save:
            frame: GeneratedFrame | None = first
            while frame is not None:
                film.write(frame.picture)
                save(frame)
                on_frame(frame)
                generated += frame.face is not None
                frame = next(frames, None)
    seconds = round(time.monotonic() - started, 2)
    passed_through = inputs.num_frames - generated
    return FilmResult(request.out, inputs.num_frames, generated, passed_through, seconds, tuple(inputs.warnings))


def _check_options(request: FilmRequest) -> None:
    """Refuses contradicting options, and outputs that cannot be written."""
    if sum((request.mask is not None, request.box is not None, request.truth)) > 1:
        raise TccpError("--mask, --box and --truth all give the head's position: give only one of them")
    if request.one_stage and (request.landmarks or request.save_landmarks or request.redraw):
        raise TccpError("--one-stage has no landmarks: leave out --landmarks, --save-landmarks and --redraw")
    track_file = Path(request.box) if request.box else None
    inputs = [request.scene, request.audio, request.identity, request.mask, request.landmarks, track_file]
    outputs = {"--out": request.out, "--save-landmarks": request.save_landmarks}
    for option, path in outputs.items():
        if path is None:
            continue
        _check_writable(path, option)
        if path.exists() and any(one and one.exists() and one.samefile(path) for one in inputs):
            raise TccpError(f"{option} {path} is one of the inputs, which it would overwrite: give another name")
    if request.out and request.save_landmarks and request.out.absolute() == request.save_landmarks.absolute():
        raise TccpError(f"--out and --save-landmarks are both {request.out}: give two names")


def _check_writable(path: Path, option: str) -> None:
    """Raises TccpError if a file cannot be created at `path`. Leaves nothing behind."""
    if path.is_dir():
        raise TccpError(f"{option} {path} is a folder: give the name of a file")
    try:
        folder = next(folder for folder in path.absolute().parents if folder.exists())
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise TccpError(
            f"cannot write {option} {path}: {error.strerror} ({folder}); give a folder that can be written"
        ) from None


def _with_sampling(settings: Settings, request: FilmRequest) -> Settings:
    """The pipeline's settings with the sampling options of the request, which also override those of variants."""
    names = ("solver", "steps", "guidance_scale", "temperature")
    given = {name: getattr(request, name) for name in names}
    changes = {f"sampling.{name}": value for name, value in given.items() if value is not None}
    settings = override(settings, changes)
    for variant, own in settings.variant_overrides.items():
        again = {key: value for key, value in changes.items() if key in own}
        settings = override(settings, {f"variant_overrides.{variant}": {**own, **again}})
    most = settings.diffusion.num_train_timesteps
    if settings.sampling.steps > most:
        raise TccpError(f"--steps {settings.sampling.steps}: give at most {most}, the number of steps in training")
    return settings


def _find_head(inputs: FilmInputs, tasks: Tasks) -> HeadTrack:
    """Finds the head and the cuts in the part of the scene that the film shows."""
    request, scene = inputs.request, inputs.scene
    num_frames = min(inputs.num_frames, scene.num_frames)
    if request.truth:
        return track_from_truth(scene)
    task = tasks.add_task("looking for the head", total=num_frames)

    def on_frame() -> None:
        tasks.advance(task)

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
    return dataclasses.replace(track, cuts=_cuts(inputs, scene, num_frames, on_frame))


def _warn_of_little_context(inputs: FilmInputs, track: HeadTrack) -> None:
    """Warns if the head boxes cover nearly the whole picture: the networks then see nothing of the scene."""
    boxes = track.boxes[: inputs.num_frames]
    boxes = boxes[np.isfinite(boxes).all(1)]
    if not len(boxes):
        return
    visible = float(headbox.visible_share(boxes, inputs.scene.width, inputs.scene.height).mean())
    if visible < headbox.LITTLE_VISIBLE:
        inputs.warn(
            f"{inputs.scene.path}: the head box leaves {visible:.1%} of the picture visible, so the networks see "
            "little of the scene; use a film that shows more of it"
        )


def _cuts(
    inputs: FilmInputs, scene: MediaInfo, num_frames: int, on_frame: Callable[[], object]
) -> frozenset[int] | None:
    """The cuts; None, with a warning, if the optional package that finds them is not installed."""
    try:
        return find_cuts(scene, num_frames, on_frame)
    except MediaError:
        raise
    except TccpError as error:
        inputs.warn(f"{scene.path} is treated as one shot: {error}")
        return None


@contextmanager
def _detector(request: FilmRequest) -> Iterator[faces.FaceBackend]:
    backend = faces.open_backend(request.detector, request.detector_weights)
    try:
        yield backend
    finally:
        backend.close()
