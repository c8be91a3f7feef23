"""The request for one film: its inputs are opened and checked, and the head is found. Neither needs torch.

torch takes seconds to import; so what is wrong with a request is said before.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt8

from tccp import faces, headbox
from tccp.config import PRESETS, Settings, Solver, override
from tccp.errors import TccpError
from tccp.files import check_outputs, check_writable, local_path
from tccp.inference.coverage import coverage
from tccp.inference.frames import GeneratedFrame
from tccp.inference.head_tracks import (
    HeadTrack,
    Point,
    check_mask,
    find_cuts,
    track_from_boxes,
    track_from_detector,
    track_from_mask,
    track_from_truth,
)
from tccp.inference.identity_crop import identity_candidates, identity_head
from tccp.inference.landmark_file import LandmarkFile
from tccp.inference.manifest import has_component, pipeline_files, read_manifest, read_settings, weights_folder
from tccp.inference.pipeline_source import is_remote
from tccp.inference.scene import Extend, scene_indices
from tccp.media import MediaError, MediaInfo
from tccp.media.sandbox import Decoder
from tccp.models.variants import TWO_STAGE, VariantName
from tccp.progress import Tasks
from tccp.roundtable import truth_path

logger = logging.getLogger(__name__)

OnFrame = Callable[[GeneratedFrame], object]
_MAX_BATCH = 64


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

    extend: what to do if the scene is shorter than the sound. steps, solver, guidance_scale, guidance_interval,
    time_power, temperature: sampling settings; None: as in the weights. seed: for all random numbers. preset: refuse
    weights of another preset. one_stage: use the one-stage networks. landmarks, save_landmarks: landmark files to
    generate from, or to write. redraw: read landmarks from stage 1's pictures and draw them again for stage 2.
    color_match: match the head's colours to the ring around the mask. lossless: write a lossless film, which keeps
    every pixel outside the mask. exact_size: keep an odd width or height, which few players show; otherwise one row or
    column is added. lip_weights: the published Wav2Lip checkpoint. device: cpu, cuda or cuda:N. overlap: run stage 1
    ahead of stage 2, in a thread; the film is the same without. batch: the most windows of different shots that are
    generated at once; with another batch, pixels of a film of several shots may differ by rounding.
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
    guidance_interval: tuple[float, float] | None = None
    time_power: float | None = None
    temperature: float | None = None
    seed: int = 0
    preset: str | None = None
    one_stage: bool = False
    save_landmarks: Path | None = None
    landmarks: Path | None = None
    redraw: bool = False
    color_match: bool = True
    lossless: bool = False
    exact_size: bool = False
    lip_weights: Path | None = None
    device: str = "cpu"
    overlap: bool = True
    batch: int = 4

    def __post_init__(self) -> None:
        """Converts paths given as strings."""
        for name in ("scene", "audio", "identity", "out", "mask", "detector_weights", "save_landmarks", "landmarks"):
            given = getattr(self, name)
            if isinstance(given, str):
                object.__setattr__(self, name, Path(given))

    @property
    def variants(self) -> tuple[VariantName, ...]:
        """The networks that the request needs. With given landmarks, stage 1 does not run."""
        if self.one_stage:
            return ("one_stage_first", "one_stage_sequence")
        return ("face_first", "face_sequence") if self.landmarks is not None else TWO_STAGE


@dataclass(frozen=True)
class FilmResult:
    """A written film and its statistics.

    frames = generated + passed_through, where passed_through counts frames that show the scene unchanged. reasons:
    how many of these for each reason of `tccp.inference.coverage.REASONS`. seconds: wall-clock time, including loading
    and checks.
    """

    out: Path
    frames: int
    generated: int
    passed_through: int
    seconds: float
    warnings: tuple[str, ...]
    reasons: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "out": str(self.out), "warnings": list(self.warnings)}


class FilmInputs:
    """The opened and checked inputs of a request. Use as a context manager.

    decoder: reads all of them in a child process, because nobody vouches for these files. sound_decoder: reads the
    sound of the written film, while `decoder` is busy with the scene.
    Opening checks everything that can be checked without the networks; raises TccpError or MediaError.
    """

    def __init__(
        self,
        request: FilmRequest,
        loaded: bool = False,
        open_decoder: Callable[[], AbstractContextManager[Decoder]] = Decoder,
    ):
        """loaded: the networks are loaded already, so that it does not matter where their weights are."""
        self.request = request
        self.loaded = loaded
        self._open_decoder = open_decoder
        self.warnings: list[str] = []
        self._open = ExitStack()

    def __enter__(self) -> FilmInputs:
        request = self.request
        _check_options(request)
        with ExitStack() as opened:
            self.decoder = opened.enter_context(self._open_decoder())
            self._check(request, opened)
            self.sound_decoder = opened.enter_context(self._open_decoder())
            if request.out is not None:
                self.sound_decoder.start()  # while torch is imported
            self._open = opened.pop_all()
        return self

    def _check(self, request: FilmRequest, opened: ExitStack) -> None:
        self.scene = self.decoder.probe(request.scene)
        if not self.scene.has_video:
            message = "the file has no pictures; --scene needs a film with a video track"
            raise MediaError(request.scene, "no_video", message)
        _check_person(request, self.scene)
        self.candidates = identity_candidates(request.identity, self.decoder)
        for text in self.candidates.warnings:
            self.warn(f"{request.identity}: {text}")
        self.landmarks = opened.enter_context(LandmarkFile(request.landmarks) if request.landmarks else nullcontext())
        if self.landmarks is not None:
            self.landmarks.check()
        self.audio = opened.enter_context(self.decoder.sound(request.audio))
        self.num_frames = self.audio.num_frames  # of the generated film, at 25 fps
        for text in (*self.scene.notes, *_padding(self.scene, request)):
            self.warn(f"{request.scene}: {text}")
        for text in self.audio.warnings:
            self.warn(f"{request.audio}: {text}")
        # Raises TccpError if the scene is too short.
        scene_indices(self.scene.num_frames, self.num_frames, request.extend, request.scene)
        self.track = _given_track(request, self.scene, self.decoder)
        _check_detector(self)
        if not self.loaded:
            _check_weights(request)

    def __exit__(self, *exception: object) -> None:
        self._open.close()

    def warn(self, text: str) -> None:
        self.warnings.append(text)
        logger.warning("%s", text)


def _padding(scene: MediaInfo, request: FilmRequest) -> list[str]:
    """Says that the written film gets a row or column more than the scene."""
    width, height = scene.width + scene.width % 2, scene.height + scene.height % 2
    if (width, height) == (scene.width, scene.height) or request.lossless or request.exact_size:
        return []
    return [f"the film is written as {width}x{height}, because few players show odd sizes; --exact-size keeps it"]


def _given_track(request: FilmRequest, scene: MediaInfo, decoder: Decoder) -> HeadTrack | None:
    """The head track of --truth or --box; None for others, of which --mask is checked as far as its first frame."""
    if request.truth:
        return track_from_truth(scene)
    if request.box is not None:
        return track_from_boxes(scene, request.box)
    if request.mask is not None:
        check_mask(scene, request.mask, decoder)
    return None


def _check_detector(inputs: FilmInputs) -> None:
    """Raises TccpError if a detector is needed and its weights or package are missing, or the identity box is wrong."""
    request = inputs.request
    if request.identity_box is not None or request.truth:
        identity_of(inputs)
    if (request.mask is None and inputs.track is None) or (request.identity_box is None and not request.truth):
        faces.check_backend(request.detector, request.detector_weights)


def _check_weights(request: FilmRequest) -> None:
    """Raises TccpError for weights on this machine that lack a component or do not fit the request.

    The manifest says it; the files are compared with it when they are loaded.
    """
    if is_remote(request.weights):
        return  # they are copied first
    folder = weights_folder(Path(local_path(str(request.weights))))
    settings = read_settings(folder)
    if request.preset is not None and settings.preset != request.preset:
        raise TccpError(
            f"{folder} holds weights of preset {settings.preset!r}, not {request.preset!r}: "
            f"give the weights of {request.preset!r}, or --preset {settings.preset}"
        )
    for name in request.variants:
        if not has_component(folder, name):
            have = ", ".join(read_manifest(folder)["components"]) or "nothing"
            raise TccpError(
                f"{folder} has no {name} (it has {have}): train it with `tccp train {name} --weights {folder}`"
            )
    with_sampling(settings, request)


def check_batch(batch: int) -> None:
    """Raises TccpError for a number of windows that is out of range."""
    if not 1 <= batch <= _MAX_BATCH:
        raise TccpError(f"--batch {batch}: give 1 to {_MAX_BATCH} windows")


def _check_options(request: FilmRequest) -> None:
    """Refuses contradicting options, outputs that would overwrite a file in use, and those that cannot be written."""
    if sum((request.mask is not None, request.box is not None, request.truth)) > 1:
        raise TccpError("--mask, --box and --truth all give the head's position: give only one of them")
    if request.person is not None and (request.mask is not None or request.box is not None or request.truth):
        raise TccpError("--person chooses among faces that a detector finds: give it without --mask, --box and --truth")
    check_batch(request.batch)
    if request.preset is not None and request.preset not in PRESETS:
        raise TccpError(f"unknown preset {request.preset!r}: choose one of {', '.join(PRESETS)}")
    if request.one_stage and (request.landmarks or request.save_landmarks or request.redraw):
        raise TccpError("--one-stage has no landmarks: leave out --landmarks, --save-landmarks and --redraw")
    outputs = {"--out": request.out, "--save-landmarks": request.save_landmarks}
    check_outputs(outputs, request_inputs(request))
    for option, path in outputs.items():
        if path is not None:
            check_writable(option, path)


def _check_person(request: FilmRequest, scene: MediaInfo) -> None:
    """Raises TccpError for a point that is not in the picture: the nearest person would be taken without a word."""
    if request.person is not None:
        x, y = request.person
        if not (0 <= x < scene.width and 0 <= y < scene.height):  # also if they are NaN
            raise TccpError(
                f"--person {x:g} {y:g} is not in the picture: give x from 0 to {scene.width - 1} and y from 0 to "
                f"{scene.height - 1}, in pixels of {request.scene}"
            )


def request_inputs(request: FilmRequest) -> dict[str, Path | list[Path] | None]:
    """All files that the request reads, by option."""
    return {
        "--scene": request.scene,
        "--audio": request.audio,
        "--identity": request.identity,
        "--mask": request.mask,
        "--box": Path(request.box) if request.box else None,
        "--landmarks": request.landmarks,
        "--truth": [truth_path(request.scene), truth_path(request.identity)] if request.truth else None,
        "--detector-weights": request.detector_weights,
        "--lip-weights": request.lip_weights,
        "--weights": pipeline_files(request.weights),
    }


SAMPLING_OPTIONS = ("solver", "steps", "time_power", "guidance_scale", "guidance_interval", "temperature")
"""Fields of `FilmRequest` that change the pipeline's settings."""


def with_sampling(settings: Settings, request: FilmRequest) -> Settings:
    """The pipeline's settings with the sampling options of the request, which also override those of variants."""
    return with_sampling_options(settings, {name: getattr(request, name) for name in SAMPLING_OPTIONS})


def with_sampling_options(settings: Settings, given: Mapping[str, Any]) -> Settings:
    """As `with_sampling`, for options by name. None: as in the settings."""
    changes = {f"sampling.{name}": value for name, value in given.items() if value is not None}
    settings = override(settings, changes)
    for variant, own in settings.variant_overrides.items():
        again = {key: value for key, value in changes.items() if key in own}
        settings = override(settings, {f"variant_overrides.{variant}": {**own, **again}})
    most = settings.diffusion.num_train_timesteps
    if settings.sampling.steps > most:
        raise TccpError(f"--steps {settings.sampling.steps}: give at most {most}, the number of steps in training")
    return settings


def identity_of(inputs: FilmInputs) -> UInt8[np.ndarray, "h w 3"]:
    """The head of the identity file, found with a detector if need be. Raises TccpError if there is none."""
    request = inputs.request
    return identity_head(
        request.identity,
        inputs.candidates,
        box=request.identity_box,
        truth=request.truth,
        open_detector=lambda: _detector(request),
    )


def find_head(inputs: FilmInputs, tasks: Tasks) -> HeadTrack:
    """Finds the head and the cuts in the part of the scene that the film shows, and warns of frames without it.

    Raises TccpError if none of the film's frames has it.
    """
    track = _found_head(inputs, tasks)
    _check_coverage(inputs, track)
    return track


def _found_head(inputs: FilmInputs, tasks: Tasks) -> HeadTrack:
    request, scene = inputs.request, inputs.scene
    num_frames = min(inputs.num_frames, scene.num_frames)
    if inputs.track is not None and inputs.track.cuts is not None:
        return inputs.track
    task = tasks.add_task("looking for the head", total=num_frames)

    def on_frame() -> None:
        tasks.advance(task)

    if request.mask is None and request.box is None:
        with _detector(request) as backend:
            return track_from_detector(scene, backend, inputs.decoder, request.person, num_frames, on_frame)
    track = inputs.track
    if track is None:
        assert request.mask is not None
        track = track_from_mask(scene, request.mask, inputs.decoder, num_frames)
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


def _check_coverage(inputs: FilmInputs, track: HeadTrack) -> None:
    """Warns of frames that are passed through. Raises TccpError if all of them are."""
    request, scene = inputs.request, inputs.scene
    shown = coverage(track, scene_indices(scene.num_frames, inputs.num_frames, request.extend, request.scene))
    if not shown.generated:
        raise TccpError(
            f"{request.scene}: {shown.text()}, so there is nothing to generate: give the head's position in these "
            "frames, or another part of the film"
        )
    if shown.generated < shown.frames:
        inputs.warn(f"{request.scene}: {shown.text()}")
    _warn_of_little_context(inputs, track)


def _cuts(
    inputs: FilmInputs, scene: MediaInfo, num_frames: int, on_frame: Callable[[], object]
) -> frozenset[int] | None:
    """The cuts; None, with a warning, if the optional package that finds them is not installed."""
    try:
        return find_cuts(scene, inputs.decoder, num_frames, on_frame)
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
