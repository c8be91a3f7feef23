"""Runs the two stages on the frames of scenes and pastes the generated heads into them.

Work goes on in rounds. A round takes one window each of several chains: shots of a film, or of several films. Stage 1
makes round k + 1 in a thread of its own while stage 2 makes round k. Few rounds are on the way at a time, so memory use
does not grow with film length. Which windows share a round does not depend on timing.
"""

from __future__ import annotations

import collections.abc
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from tccp import headbox
from tccp.diffusion.chains import Chain, FrameInputs, run_round
from tccp.errors import TccpError
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
from tccp.inference.shot_reader import Shot, ShotReader
from tccp.media import AudioTrack
from tccp.media.mel import mel_windows
from tccp.models.variants import VARIANTS, ControlKind, VariantName
from tccp.seeds import rng_seed

_READ_AHEAD_BYTES = 64 * 2**20  # of the inputs and heads of frames that are read before earlier ones are finished


@runtime_checkable
class LandmarkSource(Protocol):
    """A source of given landmarks, such as `tccp.inference.landmark_file.LandmarkFile`."""

    def read(self, frame: int) -> tuple[Float32[np.ndarray, "68 2"], float]:
        """Points in 0..1 of the head box, and confidence. Called with frame numbers in ascending order."""


@dataclass(frozen=True)
class _SceneWindow:
    """The inputs of the frames that a window adds to its chain. landmarks: where they are given."""

    masked_scene: UInt8[np.ndarray, "f s s 3"]
    mask_box: Float32[np.ndarray, "f 4"]
    mel: Float32[np.ndarray, "f 80 16"]
    lips: UInt8[np.ndarray, "f l l 3"] | None
    landmarks: _LandmarkWindow | None


@dataclass(frozen=True)
class _LandmarkWindow:
    """The landmarks of the frames of a `_SceneWindow`: stage 2 takes their pictures."""

    pictures: UInt8[np.ndarray, "f s s 3"]
    points: Float32[np.ndarray, "f 68 2"]
    confidence: Float32[np.ndarray, " f"]


@dataclass(frozen=True)
class _Head:
    """A generated head, and what `GeneratedFrame` tells of its inputs."""

    face: UInt8[np.ndarray, "s s 3"]
    masked_scene: UInt8[np.ndarray, "s s 3"]
    landmark_picture: UInt8[np.ndarray, "s s 3"] | None
    points: Float32[np.ndarray, "68 2"] | None
    confidence: float | None


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

    def frames(
        self, scene: Iterable[SceneFrame], again: Iterable[SceneFrame] | None = None, batch: int = 1
    ) -> Iterator[GeneratedFrame]:
        """Finished frames, in order, window by window. A new shot, or the person's return, starts a new chain.

        again: the frames of `scene` once more; with these, up to `batch` shots are generated at once.
        """
        film = Film(self, scene, again)
        with closing(film), closing(generate([film], batch, self.overlap)) as events:
            for _, event in events:
                if isinstance(event, TccpError):
                    raise event
                if event is not None:
                    yield event

    def scene_window(self, frames: list[SceneFrame]) -> _SceneWindow:
        """The inputs of the frames that a window adds."""
        boxes = np.stack([frame.box for frame in frames if frame.box is not None])
        masked, mask_box = masked_scenes(np.stack([frame.picture for frame in frames]), boxes, self.size_px)
        start, source, lips = frames[0].index, self.components.lips, None
        if source is not None:
            lips = lip_pictures(source, self.audio, start, len(frames), self.identity_picture)
        given = self._given_landmarks(start, len(frames))
        return _SceneWindow(masked, mask_box, mel_windows(self.audio, start, len(frames)), lips, given)

    def chain(self, sequence: VariantName, first_frame: int) -> Chain:
        """The chain of a stage for the shot that starts at this frame."""
        seed = rng_seed(self.seed, "run", first_frame)
        if not self.one_stage:
            seed = rng_seed(seed, VARIANTS[sequence].generates)
        return Chain(self.components.stage(sequence, self.traced), self.identity, seed)

    @property
    def face_variant(self) -> VariantName:
        return "one_stage_sequence" if self.one_stage else "face_sequence"

    def _given_landmarks(self, first: int, count: int) -> _LandmarkWindow | None:
        if self.landmark_points is None:
            return None
        read = [self.landmark_points.read(number) for number in range(first, first + count)]
        points = np.stack([points for points, _ in read])
        confidence = np.array([confidence for _, confidence in read], np.float32)
        return _LandmarkWindow(landmark_pictures(points, self.size_px), points, confidence)

    def generated_landmarks(
        self, latents: Float[Tensor, "f c h w"], reader: LandmarkReader
    ) -> tuple[_LandmarkWindow | None, Float[Tensor, "f c h w"] | None]:
        """Stage 1's landmarks as pictures and points, where somebody reads them, and as latents unless redrawn."""
        if not (self.read_landmarks or self.redraw):
            return None, latents
        pictures = self.encoder.decode(latents, "landmark")
        points, confidence = reader.read(pictures)
        if self.redraw:
            pictures = landmark_pictures(points, self.size_px)
        return _LandmarkWindow(pictures, points, confidence), None if self.redraw else latents

    def inputs(
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


@dataclass
class _ShotChains:
    """The chains of a shot."""

    landmarks: Chain | None
    faces: Chain
    reader: LandmarkReader = field(default_factory=LandmarkReader)


class Film:
    """A film on its way through `generate`."""

    def __init__(self, generator: Generator, scene: Iterable[SceneFrame], again: Iterable[SceneFrame] | None = None):
        """again: the frames of `scene` once more, for pasting, so that few of their pictures are in memory at once.

        With it, several shots of the film are generated at once.
        """
        settings = generator.components.settings
        frame_bytes = 9 * settings.picture_px**2 + 3 * settings.lips.size_px**2
        self.generator = generator
        self.failed = False
        self.several_shots = again is not None
        self._reader = ShotReader(
            scene, settings.window, generator.scene_window, horizon=_READ_AHEAD_BYTES // frame_bytes
        )
        self._chains: dict[Shot[_SceneWindow], _ShotChains] = {}
        self._again = None if again is None else iter(again)
        self._unpasted: deque[SceneFrame] = deque()
        self._heads: dict[int, _Head] = {}

    @property
    def offered(self) -> bool:
        """Whether all its windows are offered."""
        return self._reader.done

    def close(self) -> None:
        """Closes the iterators of the scene. Call it when `generate` has ended."""
        self._reader.close()
        if isinstance(self._again, collections.abc.Generator):
            self._again.close()

    @property
    def complete(self) -> bool:
        """Whether all frames that were read are finished."""
        return not self._unpasted and not self._heads

    def windows(self, most: int) -> tuple[list[_Piece], list[SceneFrame]]:
        """The next windows of up to `most` shots, and the frames that were read for them and must be pasted."""
        pieces = []
        for shot, frames, window in self._reader.offer(most if self.several_shots else 1):
            chains = self._chains.get(shot) or self._start(shot.first)
            self._chains[shot] = chains
            pieces.append(_Piece(self, chains, frames[0].index, window))
        self._chains = {shot: chains for shot, chains in self._chains.items() if shot.windows or not shot.ended}
        taken = self._reader.taken()
        return pieces, [] if self.several_shots else taken

    def _start(self, first_frame: int) -> _ShotChains:
        made = self.generator
        landmarks = None
        if not made.one_stage and made.landmark_points is None:
            landmarks = made.chain("landmark_sequence", first_frame)
        return _ShotChains(landmarks, made.chain(made.face_variant, first_frame))

    def add_frames(self, frames: Sequence[SceneFrame]) -> None:
        """Frames that must be pasted, in order."""
        self._unpasted.extend(frames)

    def add_heads(self, piece: _Piece, faces: UInt8[np.ndarray, "f s s 3"]) -> None:
        for i, face in enumerate(faces):
            landmarks = piece.landmarks
            self._heads[piece.first + i] = _Head(
                face,
                piece.window.masked_scene[i],
                None if landmarks is None else landmarks.pictures[i],
                None if landmarks is None else landmarks.points[i],
                None if landmarks is None else float(landmarks.confidence[i]),
            )

    def finished(self) -> Iterator[GeneratedFrame]:
        """The next frames of the film, as far as their heads are generated."""
        while True:
            if not self._unpasted and self._again is not None:
                self._unpasted.extend(frame for frame in [next(self._again, None)] if frame is not None)
            if not self._unpasted:
                return
            frame = self._unpasted[0]
            if frame.box is None:
                yield GeneratedFrame(frame.index, frame.picture, reason=frame.reason)
            elif frame.index in self._heads:
                head = self._heads.pop(frame.index)
                match = self.generator.color_match
                picture = headbox.paste(frame.picture, head.face, frame.box, color_match=match)
                yield GeneratedFrame(index=frame.index, picture=picture, box=frame.box, **vars(head))
            else:
                return
            self._unpasted.popleft()


@dataclass
class _Piece:
    """A window on its way. first: the first frame that it adds. inputs: of the network that generates its faces."""

    film: Film
    chains: _ShotChains
    first: int
    window: _SceneWindow
    landmarks: _LandmarkWindow | None = None
    inputs: list[FrameInputs] = field(default_factory=list)


@dataclass
class _Round:
    """Windows that are generated together, the frames that were read for them, and films that are not read any more."""

    pieces: list[_Piece] = field(default_factory=list)
    frames: list[tuple[Film, list[SceneFrame]]] = field(default_factory=list)
    ended: list[tuple[Film, TccpError | None]] = field(default_factory=list)


FilmEvent = tuple[Film, GeneratedFrame | TccpError | None]
"""A film and its next frame; or why it ends early; or None, the last event of every film: it may be closed."""


def generate(
    films: Iterable[Film], batch: int = 1, overlap: bool = True
) -> collections.abc.Generator[FilmEvent, None, None]:
    """Generates films, up to `batch` windows at once: of different films, or of different shots of one film.

    films: the next one is taken when there is room, in the thread of stage 1. Set `failed` of a film to end it early;
    that leaves the others as they are. The frames of each film come in order. With a batch of 1 a film comes out the
    same whatever other films there are; otherwise it depends on them by rounding only.
    """

    def rounds(check: Callable[[], None]) -> Iterator[_Round]:
        return _rounds(iter(films), batch, check)

    with closing(ahead(rounds) if overlap else _rounds(iter(films), batch, lambda: None)) as source:
        for current in source:
            pieces = [piece for piece in current.pieces if not piece.film.failed]
            windows = [piece.chains.faces.window(piece.inputs) for piece in pieces]
            for piece, latents in zip(pieces, run_round(windows, batch), strict=True):
                new = piece.chains.faces.finish(latents)
                piece.film.add_heads(piece, piece.film.generator.encoder.decode(new.transpose(0, 1), "face"))
            for film, frames in current.frames:
                if not film.failed:
                    yield from _finished(film, frames)
            for film, error in current.ended:
                if error is not None and not film.failed:
                    yield from _failure(film, error)
                assert film.failed or film.complete
                yield film, None


def _finished(film: Film, frames: list[SceneFrame]) -> Iterator[FilmEvent]:
    film.add_frames(frames)
    try:
        for frame in film.finished():
            yield film, frame
            if film.failed:
                return
    except TccpError as error:
        yield from _failure(film, error)


def _failure(film: Film, error: TccpError) -> Iterator[FilmEvent]:
    film.failed = True
    yield film, error


def _rounds(
    films: Iterator[Film], batch: int, check: Callable[[], None]
) -> collections.abc.Generator[_Round, None, None]:
    """The rounds of some films, with the inputs of stage 2. check: called before each step; it may raise."""
    active: list[Film] = []
    while True:
        current = _Round(ended=[(film, None) for film in active if film.failed])
        active = [film for film in active if not film.failed]
        while len(active) < batch and (film := next(films, None)) is not None:
            active.append(film)
        if not active and not current.ended:
            return
        for number, film in enumerate(active):
            room = batch - len(current.pieces) - (len(active) - number - 1)  # one is kept for each of the others
            try:
                pieces, frames = film.windows(room)
            except TccpError as error:
                current.ended.append((film, error))
                continue
            current.pieces += pieces
            current.frames.append((film, frames))
            if film.offered:
                current.ended.append((film, None))
        _add_inputs(current.pieces, batch, check)
        ended = [film for film, _ in current.ended]
        active = [film for film in active if film not in ended]
        yield current


def _add_inputs(pieces: Sequence[_Piece], batch: int, check: Callable[[], None]) -> None:
    """Runs stage 1, where it is needed, and adds the inputs of stage 2."""
    chains = [(piece, piece.chains.landmarks) for piece in pieces if piece.chains.landmarks is not None]
    inputs = [piece.film.generator.inputs("landmark_sequence", piece.window) for piece, _ in chains]
    windows = [chain.window(given) for (_, chain), given in zip(chains, inputs, strict=True)]
    latents = run_round(windows, batch, check)
    new = {id(piece): chain.finish(one) for (piece, chain), one in zip(chains, latents, strict=True)}
    for piece in pieces:
        made, of_stage_one = piece.film.generator, None
        piece.landmarks = piece.window.landmarks
        if id(piece) in new:
            landmark_latents = new[id(piece)].transpose(0, 1)
            piece.landmarks, of_stage_one = made.generated_landmarks(landmark_latents, piece.chains.reader)
        piece.inputs = made.inputs(made.face_variant, piece.window, piece.landmarks, of_stage_one)
