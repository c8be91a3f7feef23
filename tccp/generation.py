"""A film from a scene, sound and a picture: head boxes, the two chained stages, paste-back, in one stream.

Nothing here grows with the length of the film but the head boxes (four numbers a frame): pictures flow from the decoder
through both chains to the encoder, at most two windows at a time.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import IO, Literal

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from torch import Tensor

from tccp import headbox, landmarks
from tccp.audio import mel_windows
from tccp.clip import atomic_path
from tccp.config import FPS, TccpError, VariantName
from tccp.data import rng_seed
from tccp.media import AudioTrack, MediaInfo, read_frames
from tccp.models.autoencoder import to_bytes, to_model
from tccp.pipeline import Pipeline
from tccp.sampling import FrameInputs
from tccp.tracks import HeadTrack
from tccp.variants import PictureKind

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
            f"{name} lasts {num_scene / FPS:.2f} s and the sound {num_frames / FPS:.2f} s: give a longer scene or shorter "
            "sound, or say how to go on with --extend freeze or --extend pingpong"
        )
    period = max(1, 2 * (num_scene - 1))
    return (min(i % period, period - i % period) for i in range(num_frames))


def _scene_pictures(path: Path, indices: Iterable[int]) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
    """The pictures of these frames, decoded forwards; a stretch that runs backwards is decoded in short chunks."""
    pending = deque[int]()
    source = iter(indices)
    reader: Iterator[np.ndarray] | None = None
    reader_at, shown_at = -1, -1
    shown: np.ndarray | None = None
    held: dict[int, np.ndarray] = {}
    for index in chain.from_iterable([pending, source]):
        if index == shown_at and shown is not None:
            yield shown
            continue
        if index in held:
            picture = held[index]
        elif shown_at > index:
            first = max(0, index - _REVERSED_CHUNK + 1)
            held = dict(enumerate(read_frames(path, first, index - first + 1), first))
            reader = None
            picture = held[index]
        else:
            if reader is None or reader_at != index:
                reader, reader_at = read_frames(path, index), index
                held = {}
            picture = next(reader)
            reader_at += 1
        shown, shown_at = picture, index
        yield picture


def scene_frames(
    path: Path, info: MediaInfo, track: HeadTrack, num_frames: int, extend: Extend
) -> Iterator[SceneFrame]:
    """The frames of the film to be. A place where time jumps in the scene starts a shot, like a cut."""
    indices = list(scene_indices(info.num_frames, num_frames, extend, path))
    for i, (at, picture) in enumerate(zip(indices, _scene_pictures(path, indices), strict=True)):
        # Played backwards, a cut lies between the same two frames.
        before = indices[i - 1] if i else None
        cut = before is None or (before != at and max(before, at) in track.cuts)
        yield SceneFrame(i, picture, track.box(at), cut)


def _runs(frames: Iterable[SceneFrame]) -> Iterator[tuple[bool, Iterator[SceneFrame]]]:
    """Uninterrupted runs of frames with a head, and of frames without one; each must be consumed before the next."""
    source = iter(frames)
    upcoming = next(source, None)
    while upcoming is not None:
        first, present = upcoming, upcoming.box is not None
        upcoming = None

        def run() -> Iterator[SceneFrame]:
            nonlocal upcoming
            yield first
            for frame in source:
                if frame.starts_shot or (frame.box is not None) != present:
                    upcoming = frame
                    return
                yield frame

        yield present, run()


def _chunks(frames: Iterable[SceneFrame], window: int) -> Iterator[list[SceneFrame]]:
    """One frame, then as many as each window adds: exactly what a chain asks for next, so nothing is read ahead."""
    source = iter(frames)
    yield list(islice(source, 1))
    while batch := list(islice(source, window - 1)):
        yield batch


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

    def _decode(self, latents: Tensor, kind: PictureKind) -> UInt8[np.ndarray, "s s 3"]:
        with torch.inference_mode():
            picture = self.pipeline.autoencoder.decode(latents[None, :, None], kind)[0, :, 0]
        return to_bytes(picture).cpu().numpy()

    def frames(self, scene: Iterable[SceneFrame]) -> Iterator[GeneratedFrame]:
        """Finished frames, in order, as windows finish. A cut or an absence ends a chain; the next starts from noise."""
        for present, run in _runs(scene):
            if present:
                yield from self._run(run)
            else:
                for frame in run:
                    yield GeneratedFrame(frame.index, frame.picture)

    def _run(self, frames: Iterator[SceneFrame]) -> Iterator[GeneratedFrame]:
        first = next(frames)
        seed = rng_seed(self.seed, "run", first.index)
        waiting: deque[tuple[SceneFrame, np.ndarray, Tensor | None]] = deque()
        drawn: deque[tuple[np.ndarray, np.ndarray, float]] = deque()
        scene_inputs = self._scene_inputs(chain([first], frames), waiting)

        if self.one_stage:
            faces = self.pipeline.stage("one_stage_sequence").chain(scene_inputs, self.identity, seed)
        else:
            face_inputs = self._face_inputs(scene_inputs, waiting, drawn, seed)
            faces = self.pipeline.stage("face_sequence").chain(face_inputs, self.identity, rng_seed(seed, "face"))
        for latents in faces:
            frame, masked, _ = waiting.popleft()
            face = self._decode(latents, "face")
            assert frame.box is not None
            picture = headbox.paste(frame.picture, face, frame.box, color_match=self.color_match)
            points, confidence, landmark_picture = None, None, None
            if drawn:
                landmark_picture, points, confidence = drawn.popleft()
            yield GeneratedFrame(frame.index, picture, frame.box, masked, landmark_picture, points, confidence, face)

    def _scene_inputs(self, frames: Iterator[SceneFrame], waiting: deque) -> Iterator[FrameInputs]:
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
            for i, latents in enumerate(self._encode(masked, "scene")):
                lip = None if pictures is None else pictures[i]
                waiting.append((batch[i], masked[i], lip))
                yield FrameInputs(latents, mel[i], lip)

    def _face_inputs(
        self, scene_inputs: Iterator[FrameInputs], waiting: deque, drawn: deque, seed: int
    ) -> Iterator[FrameInputs]:
        """Stage 1, and what stage 2 is told of it."""
        size = self.pipeline.settings.picture_px
        if self.landmark_points is not None:
            for inputs in scene_inputs:
                points, confidence = self.landmark_points.read(waiting[len(drawn)][0].index)
                picture = landmarks.draw(points[None], size)
                drawn.append((picture[0], points, confidence))
                yield FrameInputs(self._encode(picture, "landmark")[0], lips=inputs.lips)
            return
        stage = self.pipeline.stage("landmark_sequence")
        for latents in stage.chain(scene_inputs, self.identity, rng_seed(seed, "landmark")):
            lip = waiting[len(drawn)][2]
            picture = self._decode(latents, "landmark")
            points, confidence = landmarks.read(picture[None])
            if self.redraw:
                picture = landmarks.draw(points, size)[0]
                latents = self._encode(picture[None], "landmark")[0]
            drawn.append((picture, points[0], float(confidence[0])))
            yield FrameInputs(latents, lips=lip)


def variants_needed(one_stage: bool, from_landmarks: bool) -> tuple[VariantName, ...]:
    """The networks a generation loads."""
    if one_stage:
        return ("one_stage_first", "one_stage_sequence")
    faces: tuple[VariantName, ...] = ("face_first", "face_sequence")
    return faces if from_landmarks else ("landmark_first", "landmark_sequence", *faces)


class LandmarkTrack:
    """Landmarks of a film as JSON lines, one frame a line, to be looked at, edited and generated from again.

    A header line, then `{"frame": i, "confidence": c, "points": [[x, y] x 68]}` with points in 0..1 of the head box. Read
    in step with the film: one line is in memory at a time.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self._file: IO[str] = path.open()
            header = json.loads(self._file.readline())
            if header.get("tccp") != "landmarks":
                raise ValueError("its first line is not a landmark header")
        except (OSError, ValueError, AttributeError) as error:
            raise TccpError(
                f"{path} is not a landmark file ({error}): make one with `tccp generate --save-landmarks`"
            ) from None

    def read(self, frame: int) -> tuple[Float32[np.ndarray, "68 2"], float]:
        """Points and confidence of a frame; frames must be asked for in order."""
        for line in self._file:
            try:
                record = json.loads(line)
                points = np.array(record["points"], np.float32)
                if points.shape != (68, 2) or not np.isfinite(points).all():
                    raise ValueError(f"points have shape {points.shape} or are not finite, not 68 pairs of numbers")
                if record["frame"] == frame:
                    return points, float(record.get("confidence", 1.0))
            except (ValueError, KeyError, TypeError) as error:
                raise TccpError(f"{self.path}: a bad line before frame {frame}: {error}") from None
        raise TccpError(
            f"{self.path} has no landmarks for frame {frame}: it must hold every frame with a head, in order"
        )

    def close(self) -> None:
        self._file.close()


@contextmanager
def landmark_writer(path: Path | None):
    """A function that appends a frame's landmarks to `path`, which appears when the block succeeds; None writes nothing."""
    if path is None:
        yield lambda frame: None
        return
    with atomic_path(path) as temporary, temporary.open("w") as file:
        file.write(
            json.dumps({"tccp": "landmarks", "fps": FPS, "coordinates": "0..1 of the head box", "order": "iBUG 68"})
            + "\n"
        )

        def write(frame: GeneratedFrame) -> None:
            if frame.points is not None:
                record = {
                    "frame": frame.index,
                    "confidence": frame.confidence,
                    "points": frame.points.round(5).astype(float).tolist(),
                }
                file.write(json.dumps(record) + "\n")

        yield write
