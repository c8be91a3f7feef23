"""Runs the two stages on a stream of scene frames and pastes the generated heads into them.

Stage 1 makes window k + 1 in a thread of its own while stage 2 makes window k. Few windows are on the way at a time, so
memory use does not grow with film length.
"""

from __future__ import annotations

import collections.abc
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, groupby, islice
from operator import itemgetter
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from tccp import headbox
from tccp.diffusion.sampling import FrameInputs
from tccp.inference.ahead import ahead
from tccp.inference.components import Components
from tccp.inference.conditioning import (
    LandmarkReader,
    identity_picture,
    landmark_pictures,
    lip_pictures,
    masked_scenes,
)
from tccp.inference.frames import GeneratedFrame, SceneFrame
from tccp.media import AudioTrack
from tccp.media.mel import mel_windows
from tccp.models.variants import VARIANTS, ControlKind, VariantName
from tccp.seeds import rng_seed

T = TypeVar("T")


@runtime_checkable
class LandmarkSource(Protocol):
    """A source of given landmarks, such as `tccp.inference.landmark_file.LandmarkFile`."""

    def read(self, frame: int) -> tuple[Float32[np.ndarray, "68 2"], float]:
        """Points in 0..1 of the head box, and confidence. Called with frame numbers in ascending order."""


@dataclass(frozen=True)
class _SceneWindow:
    """The frames that a window adds to its chain, and their inputs."""

    frames: list[SceneFrame]
    masked_scene: UInt8[np.ndarray, "f s s 3"]
    mask_box: Float32[np.ndarray, "f 4"]
    mel: Float32[np.ndarray, "f 80 16"]
    lips: UInt8[np.ndarray, "f l l 3"] | None


@dataclass(frozen=True)
class _LandmarkWindow:
    """The landmarks of the frames of a `_SceneWindow`: stage 2 takes their pictures."""

    pictures: UInt8[np.ndarray, "f s s 3"]
    points: Float32[np.ndarray, "f 68 2"]
    confidence: Float32[np.ndarray, " f"]


@dataclass(frozen=True)
class _ReadyWindow:
    """A window with the inputs of the network that generates its faces."""

    scene: _SceneWindow
    landmarks: _LandmarkWindow | None
    inputs: list[FrameInputs]


WindowStream = collections.abc.Generator[_ReadyWindow, None, None]


class Generator:
    """Generates one person's head for one sound. The same inputs and seed give the same frames."""

    def __init__(
        self,
        components: Components,
        audio: AudioTrack,
        identity: UInt8[np.ndarray, "h w 3"],
        seed: int = 0,
        *,
        one_stage: bool = False,
        landmark_points: LandmarkSource | None = None,
        redraw: bool | None = None,
        color_match: bool = True,
        read_landmarks: bool = True,
        overlap: bool = True,
        traced: bool = False,
    ):
        """identity: a head crop of any size. landmark_points: given landmarks, which replace stage 1.

        redraw: read landmarks from stage 1's pictures and draw them again for stage 2; None: as in the settings.
        color_match: match the head's colours to the ring around the mask. read_landmarks: decode the landmark pictures
        and read them, for the landmark fields of the frames. overlap: run stage 1 ahead of stage 2, in a thread; the
        frames are the same without. traced: record networks that are evaluated often (`Components.stage`).
        """
        self.components = components
        self.encoder = components.encoder
        self.audio = audio
        self.seed = seed
        self.one_stage = one_stage
        self.landmark_points = landmark_points
        self.redraw = components.settings.sampling.redraw_landmarks if redraw is None else redraw
        self.color_match = color_match
        self.read_landmarks = read_landmarks
        self.overlap = overlap
        self.traced = traced
        self.size_px = components.settings.picture_px
        self.identity_picture = identity_picture(identity, self.size_px)
        self.identity = self.encoder.tensor(self.identity_picture)

    def frames(self, scene: Iterable[SceneFrame]) -> Iterator[GeneratedFrame]:
        """Finished frames, in order, window by window. A new shot, or the person's return, starts a new chain."""
        for present, frames in _split_at_interruptions(scene):
            if present:
                yield from self._chain(frames)
            else:
                for frame in frames:
                    yield GeneratedFrame(frame.index, frame.picture, reason=frame.reason)

    def _chain(self, frames: Iterator[SceneFrame]) -> Iterator[GeneratedFrame]:
        first = next(frames)
        seed = rng_seed(self.seed, "run", first.index)
        scene = self._scene_windows(chain([first], frames))

        def ready(check: Callable[[], None]) -> WindowStream:
            if self.one_stage:
                return (_ReadyWindow(one, None, self._inputs("one_stage_sequence", one)) for one in scene)
            if self.landmark_points is not None:
                return self._with_given_landmarks(scene, self.landmark_points)
            return self._with_landmarks(scene, rng_seed(seed, "landmark"), check)

        waiting: deque[_ReadyWindow] = deque()
        name: VariantName = "one_stage_sequence" if self.one_stage else "face_sequence"
        stage, face_seed = self.components.stage(name, self.traced), seed if self.one_stage else rng_seed(seed, "face")
        with closing(ahead(ready) if self.overlap else ready(lambda: None)) as windows:
            inputs = chain.from_iterable(window.inputs for window in _noting(windows, waiting))
            for latents in stage.chain(inputs, self.identity, face_seed):
                heads = self.encoder.decode(latents.transpose(0, 1), "face")
                window = waiting.popleft()
                yield from self._finished(window.scene, heads, window.landmarks)

    def _finished(
        self, window: _SceneWindow, heads: UInt8[np.ndarray, "f s s 3"], landmarks: _LandmarkWindow | None
    ) -> Iterator[GeneratedFrame]:
        for i, frame in enumerate(window.frames):
            assert frame.box is not None
            yield GeneratedFrame(
                index=frame.index,
                picture=headbox.paste(frame.picture, heads[i], frame.box, color_match=self.color_match),
                box=frame.box,
                masked_scene=window.masked_scene[i],
                landmark_picture=None if landmarks is None else landmarks.pictures[i],
                points=None if landmarks is None else landmarks.points[i],
                confidence=None if landmarks is None else float(landmarks.confidence[i]),
                face=heads[i],
            )

    def _scene_windows(self, frames: Iterator[SceneFrame]) -> Iterator[_SceneWindow]:
        """Prepares the frames that each window adds."""
        for batch in _window_frames(frames, self.components.settings.window):
            boxes = np.stack([frame.box for frame in batch if frame.box is not None])
            masked, mask_box = masked_scenes(np.stack([frame.picture for frame in batch]), boxes, self.size_px)
            start, source = batch[0].index, self.components.lips
            lips = None
            if source is not None:
                lips = lip_pictures(source, self.audio, start, len(batch), self.identity_picture)
            yield _SceneWindow(batch, masked, mask_box, mel_windows(self.audio, start, len(batch)), lips)

    def _with_given_landmarks(self, scene: Iterator[_SceneWindow], given: LandmarkSource) -> WindowStream:
        for window in scene:
            read = [given.read(frame.index) for frame in window.frames]
            points = np.stack([points for points, _ in read])
            confidence = np.array([confidence for _, confidence in read], np.float32)
            landmarks = _LandmarkWindow(landmark_pictures(points, self.size_px), points, confidence)
            yield _ReadyWindow(window, landmarks, self._inputs("face_sequence", window, landmarks))

    def _with_landmarks(self, scene: Iterator[_SceneWindow], seed: int, check: Callable[[], None]) -> WindowStream:
        """Runs stage 1. check: called before each step; it may raise."""
        waiting: deque[_SceneWindow] = deque()
        reader = LandmarkReader()
        inputs = chain.from_iterable(self._inputs("landmark_sequence", window) for window in _noting(scene, waiting))
        stage = self.components.stage("landmark_sequence", self.traced)
        for latents in stage.chain(inputs, self.identity, seed, check):
            window = waiting.popleft()
            landmarks, generated = None, latents.transpose(0, 1)
            if self.read_landmarks or self.redraw:
                pictures = self.encoder.decode(generated, "landmark")
                points, confidence = reader.read(pictures)
                if self.redraw:
                    pictures = landmark_pictures(points, self.size_px)
                landmarks = _LandmarkWindow(pictures, points, confidence)
            own = None if self.redraw else generated
            yield _ReadyWindow(window, landmarks, self._inputs("face_sequence", window, landmarks, own))

    def _inputs(
        self,
        variant: VariantName,
        window: _SceneWindow,
        landmarks: _LandmarkWindow | None = None,
        landmark_latents: Float[Tensor, "f c h w"] | None = None,
    ) -> list[FrameInputs]:
        """The inputs of a network, frame by frame. landmark_latents: those generated, instead of encoded pictures."""
        fields = {"masked_scene": window.masked_scene, "mask_box": window.mask_box}
        if landmarks is not None:
            fields["landmark_pictures"] = landmarks.pictures
        known: dict[ControlKind, Tensor] = {} if landmark_latents is None else {"landmark": landmark_latents}
        return self.encoder.inputs(VARIANTS[variant], fields, window.mel, window.lips, known)


def _noting(items: Iterable[T], waiting: deque[T]) -> Iterator[T]:
    """The items, each of which is also appended to `waiting`."""
    for item in items:
        waiting.append(item)
        yield item


def _split_at_interruptions(frames: Iterable[SceneFrame]) -> Iterator[tuple[bool, Iterator[SceneFrame]]]:
    """Splits frames at cuts and where the head appears or disappears; yields (head present, frames) for each part.

    Consume each part before asking for the next.
    """

    def numbered() -> Iterator[tuple[int, SceneFrame]]:
        number, before = 0, None
        for frame in frames:
            present = frame.box is not None
            number += frame.starts_shot or present != before
            before = present
            yield number, frame

    for _, group in groupby(numbered(), key=itemgetter(0)):
        part = (frame for _, frame in group)
        first = next(part)
        yield first.box is not None, chain([first], part)


def _window_frames(frames: Iterable[SceneFrame], window: int) -> Iterator[list[SceneFrame]]:
    """The frames that each window of a chain adds: one, then `window - 1` at a time. Reads no frame in advance."""
    source = iter(frames)
    yield list(islice(source, 1))
    while batch := list(islice(source, window - 1)):
        yield batch
