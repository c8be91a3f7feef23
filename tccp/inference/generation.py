"""A film from a scene, sound and a picture: head boxes, the two chained stages, paste-back, in one stream.

Nothing here grows with the length of the film but the head boxes (four numbers a frame): pictures flow from the decoder
through both chains to the encoder, at most two windows at a time.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, groupby, islice, pairwise
from operator import itemgetter
from pathlib import Path
from typing import IO, Literal

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from torch import Tensor

from tccp import headbox, landmarks
from tccp.config import FPS, VariantName
from tccp.diffusion.sampling import FrameInputs, with_surround
from tccp.errors import TccpError
from tccp.files import atomic_path
from tccp.inference.head_tracks import HeadTrack
from tccp.inference.pipeline import Pipeline
from tccp.media import AudioTrack, MediaInfo, read_frames
from tccp.media.mel import mel_windows
from tccp.models.autoencoder import to_bytes, to_model
from tccp.models.variants import PictureKind
from tccp.seeds import rng_seed

Extend = Literal["no", "freeze", "pingpong"]
_REVERSED_CHUNK = 16  # frames held to play a stretch of film backwards


@dataclass(frozen=True)
class SceneFrame:
    """One frame of the film to be: the scene's picture and its head box, None where the person is away."""

    index: int
    picture: UInt8[np.ndarray, "h w 3"]
    box: Float32[np.ndarray, "4"] | None
    starts_shot: bool


@dataclass(frozen=True)
class GeneratedFrame:
    """A finished frame. Where the person is away, `picture` is the scene's own and the rest is None."""

    index: int
    picture: UInt8[np.ndarray, "h w 3"]
    box: Float32[np.ndarray, "4"] | None = None
    masked_scene: UInt8[np.ndarray, "s s 3"] | None = None
    landmark_picture: UInt8[np.ndarray, "s s 3"] | None = None
    points: Float32[np.ndarray, "68 2"] | None = None
    confidence: float | None = None
    face: UInt8[np.ndarray, "s s 3"] | None = None


def scene_indices(num_scene: int, num_frames: int, extend: Extend, name: str | Path = "scene") -> Iterator[int]:
    """Which frame of the scene each frame of the film shows.

    Raises TccpError if the scene is shorter than the sound and `extend` is "no".
    """
    if num_scene >= num_frames or extend == "freeze":
        return (min(i, num_scene - 1) for i in range(num_frames))
    if extend == "no":
        raise TccpError(
            f"{name} lasts {num_scene / FPS:.2f} s and the sound {num_frames / FPS:.2f} s: give a longer scene or "
            "shorter sound, or say how to go on with --extend freeze or --extend pingpong"
        )
    period = max(1, 2 * (num_scene - 1))
    return (min(i % period, period - i % period) for i in range(num_frames))


def _scene_pictures(path: Path, indices: Iterable[int]) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
    """The pictures of these frames, decoded forwards; a stretch that runs backwards is decoded in short chunks."""
    reader: Iterator[np.ndarray] = iter(())
    next_of_reader, shown_at = -1, -1
    shown: np.ndarray | None = None
    held: dict[int, np.ndarray] = {}
    for index in indices:
        if index == shown_at and shown is not None:
            yield shown
            continue
        if index in held:
            shown = held[index]
        elif index < shown_at:
            first = max(0, index - _REVERSED_CHUNK + 1)
            held = dict(enumerate(read_frames(path, first, index - first + 1), first))
            shown = held[index]
        else:
            if next_of_reader != index:
                reader, next_of_reader = read_frames(path, index), index
            held = {}
            shown = next(reader)
            next_of_reader += 1
        shown_at = index
        yield shown


def scene_frames(
    path: Path, info: MediaInfo, track: HeadTrack, num_frames: int, extend: Extend
) -> Iterator[SceneFrame]:
    """The frames of the film to be."""
    indices = list(scene_indices(info.num_frames, num_frames, extend, path))
    cuts = track.cuts or frozenset()
    # Played backwards, a cut lies between the same two frames.
    starts = [True, *(a != b and max(a, b) in cuts for a, b in pairwise(indices))]
    for i, picture in enumerate(_scene_pictures(path, indices)):
        yield SceneFrame(i, picture, track.box(indices[i]), starts[i])


def _runs(frames: Iterable[SceneFrame]) -> Iterator[tuple[bool, Iterator[SceneFrame]]]:
    """Uninterrupted runs of frames with a head, and of frames without one; each must be consumed before the next."""

    def numbered() -> Iterator[tuple[int, SceneFrame]]:
        number, before = 0, None
        for frame in frames:
            present = frame.box is not None
            number += frame.starts_shot or present != before
            before = present
            yield number, frame

    for _, run in groupby(numbered(), key=itemgetter(0)):
        of_run = (frame for _, frame in run)
        first = next(of_run)
        yield first.box is not None, chain([first], of_run)


def _chunks(frames: Iterable[SceneFrame], window: int) -> Iterator[list[SceneFrame]]:
    """One frame, then as many as each window adds: exactly what a chain asks for next, so nothing is read ahead."""
    source = iter(frames)
    yield list(islice(source, 1))
    while batch := list(islice(source, window - 1)):
        yield batch


@dataclass(frozen=True)
class _Waiting:
    """A frame whose head is in the making."""

    frame: SceneFrame
    masked_scene: UInt8[np.ndarray, "s s 3"]
    lips: Float32[Tensor, "3 l l"] | None
    surround: Float32[Tensor, "c h w"] | None


@dataclass(frozen=True)
class _Drawn:
    """What stage 2 is shown of a frame's landmarks."""

    picture: UInt8[np.ndarray, "s s 3"]
    points: Float32[np.ndarray, "68 2"]
    confidence: float


class Generator:
    """The whole chain for one person and one sound. Same inputs and seed, same film."""

    def __init__(
        self,
        pipeline: Pipeline,
        audio: AudioTrack,
        identity: UInt8[np.ndarray, "h w 3"],
        seed: int = 0,
        *,
        one_stage: bool = False,
        landmark_points: LandmarkTrack | None = None,
        redraw: bool | None = None,
        color_match: bool = True,
    ):
        """identity: a head crop of any size. landmark_points: given (edited) points take the place of stage 1.

        redraw: read stage 1's points back and draw them anew for stage 2; None is as the settings say.
        """
        self.pipeline = pipeline
        self.audio = audio
        self.seed = seed
        self.one_stage = one_stage
        self.landmark_points = landmark_points
        self.redraw = pipeline.settings.sampling.redraw_landmarks if redraw is None else redraw
        self.color_match = color_match
        size = pipeline.settings.picture_px
        side = np.array([0, 0, identity.shape[1], identity.shape[0]], np.float32)
        self.identity_picture = headbox.crop(identity, side, size)
        self.identity = self._tensor(self.identity_picture)

    def _tensor(self, pictures: np.ndarray) -> Tensor:
        return to_model(torch.from_numpy(np.ascontiguousarray(pictures))).to(self.pipeline.device)

    def _encode(self, pictures: UInt8[np.ndarray, "f s s 3"], kind: PictureKind) -> list[Tensor]:
        with torch.inference_mode():
            latents = self.pipeline.autoencoder.encode(self._tensor(pictures).unsqueeze(2), kind)
        return list(latents[:, :, 0].clone())

    def _encode_scene(self, pictures: UInt8[np.ndarray, "f s s 3"]) -> list[Tensor]:
        """Zeros for networks that were trained blind to the scene."""
        latents = self._encode(pictures, "scene")
        return latents if self.pipeline.settings.context == "scene" else [torch.zeros_like(one) for one in latents]

    def _decode(self, latents: Tensor, kind: PictureKind) -> UInt8[np.ndarray, "s s 3"]:
        with torch.inference_mode():
            picture = self.pipeline.autoencoder.decode(latents[None, :, None], kind)[0, :, 0]
        return to_bytes(picture).cpu().numpy()

    def frames(self, scene: Iterable[SceneFrame]) -> Iterator[GeneratedFrame]:
        """Finished frames, in order, as windows finish. A cut or an absence ends a chain; the next starts anew."""
        for present, run in _runs(scene):
            if present:
                yield from self._run(run)
            else:
                for frame in run:
                    yield GeneratedFrame(frame.index, frame.picture)

    def _run(self, frames: Iterator[SceneFrame]) -> Iterator[GeneratedFrame]:
        first = next(frames)
        seed = rng_seed(self.seed, "run", first.index)
        waiting: deque[_Waiting] = deque()  # at most two windows, as is `drawn`
        drawn: deque[_Drawn] = deque()
        scene_inputs = self._scene_inputs(chain([first], frames), waiting)

        if self.one_stage:
            faces = self.pipeline.stage("one_stage_sequence").chain(scene_inputs, self.identity, seed)
        else:
            face_inputs = self._face_inputs(scene_inputs, waiting, drawn, seed)
            faces = self.pipeline.stage("face_sequence").chain(face_inputs, self.identity, rng_seed(seed, "face"))
        for latents in faces:
            ready = waiting.popleft()
            box = ready.frame.box
            assert box is not None
            face = self._decode(latents, "face")
            picture = headbox.paste(ready.frame.picture, face, box, color_match=self.color_match)
            done = GeneratedFrame(ready.frame.index, picture, box, ready.masked_scene, face=face)
            if drawn:
                marks = drawn.popleft()
                done = replace(done, landmark_picture=marks.picture, points=marks.points, confidence=marks.confidence)
            yield done

    def _scene_inputs(self, frames: Iterator[SceneFrame], waiting: deque[_Waiting]) -> Iterator[FrameInputs]:
        """Masked scene, mel and lips of each frame; the frame itself waits in `waiting` for its head."""
        size, lips = self.pipeline.settings.picture_px, self.pipeline.lips
        for batch in _chunks(frames, self.pipeline.settings.window):
            height, width = batch[0].picture.shape[:2]
            fit = headbox.SceneFit(width, height, size)
            boxes = np.stack([frame.box for frame in batch if frame.box is not None])
            masked = headbox.mask_scene(np.stack([fit.fit(frame.picture) for frame in batch]), fit.boxes(boxes))
            start, count = batch[0].index, len(batch)
            mel = torch.from_numpy(mel_windows(self.audio, start, count)).to(self.pipeline.device)
            pictures = None
            if lips is not None:
                pictures = self._tensor(lips.lips(lips.windows(self.audio, start, count), self.identity_picture))
            around: Sequence[Tensor | None] = [None] * count
            if self.pipeline.settings.surround:
                around = self._encode_scene(headbox.surround(masked, fit.boxes(boxes)))
            for i, latents in enumerate(self._encode_scene(masked)):
                lip = None if pictures is None else pictures[i]
                waiting.append(_Waiting(batch[i], masked[i], lip, around[i]))
                yield FrameInputs(with_surround(latents, around[i] if self.one_stage else None), mel[i], lip)

    def _face_inputs(
        self, scene_inputs: Iterator[FrameInputs], waiting: deque[_Waiting], drawn: deque[_Drawn], seed: int
    ) -> Iterator[FrameInputs]:
        """Stage 1, and what stage 2 is told of it."""
        size = self.pipeline.settings.picture_px
        if self.landmark_points is not None:
            for inputs in scene_inputs:
                points, sure = self.landmark_points.read(waiting[len(drawn)].frame.index)
                picture = landmarks.draw(points[None], size)[0]
                drawn.append(_Drawn(picture, points, sure))
                latents = self._encode(picture[None], "landmark")[0]
                yield FrameInputs(with_surround(latents, waiting[len(drawn) - 1].surround), lips=inputs.lips)
            return
        stage = self.pipeline.stage("landmark_sequence")
        before = np.full((68, 2), np.nan, np.float32)
        for latents in stage.chain(scene_inputs, self.identity, rng_seed(seed, "landmark")):
            lip, around = waiting[len(drawn)].lips, waiting[len(drawn)].surround
            picture = self._decode(latents, "landmark")
            read, confidence = landmarks.read(picture[None])
            # A picture in which no face can be read keeps the points of the frame before, if there are any.
            points = before = _as_saved(read[0]) if np.isfinite(read).all() else before
            if self.redraw:
                picture = landmarks.draw(points[None], size)[0]
                latents = self._encode(picture[None], "landmark")[0]
            drawn.append(_Drawn(picture, points, float(confidence[0])))
            yield FrameInputs(with_surround(latents, around), lips=lip)


def variants_needed(one_stage: bool, from_landmarks: bool) -> tuple[VariantName, ...]:
    """The networks a generation loads."""
    if one_stage:
        return ("one_stage_first", "one_stage_sequence")
    faces: tuple[VariantName, ...] = ("face_first", "face_sequence")
    return faces if from_landmarks else ("landmark_first", "landmark_sequence", *faces)


_DIGITS = 5  # a hundred-thousandth of the head box is far below a pixel


def _as_saved(points: Float32[np.ndarray, "68 2"]) -> Float32[np.ndarray, "68 2"]:
    """Rounded as a landmark file rounds them, so that an unedited file draws the very same pictures."""
    return points.astype(np.float64).round(_DIGITS).astype(np.float32)


class LandmarkTrack:
    """Landmarks of a film as JSON lines, one frame a line, to be looked at, edited and generated from again.

    A header line, then `{"frame": i, "confidence": c, "points": [[x, y] x 68]}` with points in 0..1 of the head box, or
    null where no face could be read (drawn as an empty picture). Read in step with the film: one line is in memory at a
    time. Use as a context manager.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self._file: IO[str] = path.open(encoding="utf-8")
        except OSError as error:
            raise self._refused(error.strerror or str(error)) from None
        try:
            header = json.loads(self._file.readline())
            if not isinstance(header, dict) or header.get("tccp") != "landmarks":
                raise ValueError("its first line is no landmark header")
        except (OSError, ValueError) as error:
            self.close()
            raise self._refused(str(error)) from None

    def _refused(self, reason: str) -> TccpError:
        return TccpError(
            f"{self.path} is not a landmark file ({reason}): make one with `tccp generate --save-landmarks`"
        )

    def read(self, frame: int) -> tuple[Float32[np.ndarray, "68 2"], float]:
        """Points (NaN where the file says null) and confidence of a frame; frames must be asked for in order.

        Raises TccpError for a line that cannot be understood, and if the file has no such frame.
        """
        try:
            for line in self._file:
                record = json.loads(line)
                if record["frame"] != frame:
                    continue
                confidence = float(record.get("confidence", 1.0))
                if record["points"] is None:
                    return np.full((68, 2), np.nan, np.float32), confidence
                points = np.array(record["points"], np.float32)
                if points.shape != (68, 2) or not np.isfinite(points).all():
                    raise ValueError(f"68 finite pairs of numbers are needed, not an array of {points.shape}")
                return points, confidence
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise TccpError(
                f"{self.path}: a line at or before frame {frame} is not as `--save-landmarks` writes it "
                f"({type(error).__name__}: {error}); correct it"
            ) from None
        raise TccpError(
            f"{self.path} has no landmarks for frame {frame}: it must hold every frame with a head, in order; "
            "use the same scene, sound and head box"
        )

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> LandmarkTrack:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


@contextmanager
def landmark_writer(path: Path | None) -> Iterator[Callable[[GeneratedFrame], None]]:
    """A function that appends a frame's landmarks to `path`, which appears when the block succeeds; None writes
    nothing."""
    if path is None:
        yield lambda frame: None
        return
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        header = {"tccp": "landmarks", "fps": FPS, "coordinates": "0..1 of the head box", "order": "iBUG 68"}
        file.write(json.dumps(header) + "\n")

        def write(frame: GeneratedFrame) -> None:
            if frame.points is not None:
                points = frame.points.astype(np.float64).round(_DIGITS).tolist()
                known = bool(np.isfinite(frame.points).all())
                record = {"frame": frame.index, "confidence": frame.confidence, "points": points if known else None}
                file.write(json.dumps(record) + "\n")

        yield write
