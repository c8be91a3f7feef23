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

import numpy as np
from jaxtyping import UInt8

from tccp.diffusion.chains import Chain, FrameInputs, run_round
from tccp.errors import TccpError
from tccp.inference.ahead import ahead
from tccp.inference.components import Components
from tccp.inference.conditioning import LandmarkReader
from tccp.inference.film_networks import FilmNetworks
from tccp.inference.film_windows import LandmarkSource, LandmarkWindow, SceneWindow, scene_window
from tccp.inference.finishing import Head, finished_frame
from tccp.inference.frames import GeneratedFrame, SceneFrame
from tccp.inference.shot_reader import Shot, ShotReader
from tccp.media import AudioTrack

_READ_AHEAD_BYTES = 64 * 2**20  # of the inputs and heads of frames that are read before earlier ones are finished


class Generator(FilmNetworks):
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
        """landmark_points: given landmarks, which replace stage 1. Others: as of `FilmNetworks`.

        color_match: match the head's colours to the ring around the mask. read_landmarks: fill the landmark fields of
        the frames. overlap: run stage 1 ahead of stage 2, in a thread; the frames are the same without.
        """
        super().__init__(
            components,
            identity,
            seed,
            one_stage=one_stage,
            redraw=redraw,
            read_landmarks=read_landmarks,
            traced=traced,
        )
        self.audio = audio
        self.landmark_points = landmark_points
        self.color_match = color_match
        self.overlap = overlap

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

    def scene_window(self, frames: list[SceneFrame]) -> SceneWindow:
        """The inputs of the frames that a window adds."""
        return scene_window(frames, self.audio, self.components.settings, self.landmark_points)


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
        self._chains: dict[Shot[SceneWindow], _ShotChains] = {}
        self._again = None if again is None else iter(again)
        self._unpasted: deque[SceneFrame] = deque()
        self._heads: dict[int, Head] = {}

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
            self._heads[piece.first + i] = Head(
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
            if frame.box is not None and frame.index not in self._heads:
                return
            yield finished_frame(frame, self._heads.pop(frame.index, None), self.generator.color_match)
            self._unpasted.popleft()


@dataclass
class _Piece:
    """A window on its way. first: the first frame that it adds. inputs: of the network that generates its faces."""

    film: Film
    chains: _ShotChains
    first: int
    window: SceneWindow
    landmarks: LandmarkWindow | None = None
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
