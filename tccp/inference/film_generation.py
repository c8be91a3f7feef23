"""Generates the frames of films from checked inputs, and writes films, one or several at once."""

from __future__ import annotations

import collections.abc
import dataclasses
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

from tccp.errors import TccpError
from tccp.inference.components import Components
from tccp.inference.film import FilmInputs, FilmRequest, FilmResult, OnFrame, find_head, identity_of, with_sampling
from tccp.inference.finishing import FilmFile
from tccp.inference.frames import GeneratedFrame
from tccp.inference.generation import Film, Generator, generate
from tccp.inference.scene import scene_frames, shots
from tccp.media.sandbox import Decoder
from tccp.models.variants import TWO_STAGE
from tccp.progress import ProgressHandler, Tasks, progress
from tccp.threads import arithmetic_threads


def _film(
    components: Components, inputs: FilmInputs, tasks: Tasks, opened: ExitStack, read_landmarks: bool = True
) -> Film:
    """The film of a request, ready for `generate`. Raises TccpError if no head or face is found.

    opened: closes the film and what it needs besides `inputs`. read_landmarks: fill the landmark fields of the frames.
    """
    request = inputs.request
    components = dataclasses.replace(components, settings=with_sampling(components.settings, request))
    identity = identity_of(inputs)
    track = find_head(inputs, tasks)
    generator = Generator(
        components,
        inputs.audio,
        identity,
        request.seed,
        one_stage=request.one_stage,
        landmark_points=inputs.landmarks,
        redraw=request.redraw or None,
        color_match=request.color_match,
        read_landmarks=read_landmarks,
        traced=True,
    )
    given = request.scene, inputs.scene, track, inputs.num_frames, request.extend
    again = None
    if request.batch > 1 and len(shots(*given)) > 1:
        again = scene_frames(*given, opened.enter_context(Decoder()))
    return opened.enter_context(closing(Film(generator, scene_frames(*given, inputs.decoder), again)))


def _shares(request: FilmRequest) -> int:
    """The number of stages that share the cores, also if they do not overlap, so that the film is the same."""
    return 2 if set(request.variants) >= set(TWO_STAGE) else 1


def film_frames(
    components: Components, inputs: FilmInputs, tasks: Tasks, read_landmarks: bool = True
) -> collections.abc.Generator[GeneratedFrame, None, None]:
    """Yields the frames of the film in order, as windows finish. Raises TccpError if no head or face is found.

    read_landmarks: fill the landmark fields of the frames.
    """
    request = inputs.request
    with ExitStack() as opened:
        film = _film(components, inputs, tasks, opened, read_landmarks)
        task = tasks.add_task("generating", total=inputs.num_frames)
        events = generate([film], request.batch, request.overlap)
        with arithmetic_threads(_shares(request)), closing(events):
            for _, event in events:
                if isinstance(event, TccpError):
                    raise event
                if event is not None:
                    yield event
                    tasks.advance(task)


def _film_file(inputs: FilmInputs, on_frame: OnFrame | None = None) -> FilmFile:
    request = inputs.request
    sound = inputs.sound_decoder.film_sound(request.audio)
    return FilmFile(request, inputs.scene, sound, inputs.num_frames, inputs.warnings, on_frame)


def write_film(
    request: FilmRequest,
    load: Callable[[FilmRequest], Components],
    on_frame: OnFrame | None = None,
    on_progress: ProgressHandler | None = None,
    inputs: FilmInputs | None = None,
    loaded: bool = False,
) -> FilmResult:
    """Generates a film and writes it. `request.out` appears only when the film is complete.

    load: loads the components; called after the inputs are checked. on_frame: called with every finished frame. inputs:
    those of the request, if they are open already; the caller closes them. loaded: `load` needs no weights.
    Raises TccpError or MediaError for inputs that cannot be used, before generation where possible.
    """
    started = time.monotonic()
    if request.out is None:
        raise TccpError("the request has no output file: give out (a name that ends in .mp4)")
    with ExitStack() as opened:
        if inputs is None:
            inputs = opened.enter_context(FilmInputs(request, loaded))
        tasks = opened.enter_context(progress(on_progress))
        film = _film_file(inputs, on_frame)
        with progress(on_progress) as loading:
            loading.add_task("loading the networks")
            components = load(request)
        read_landmarks = on_frame is not None or request.save_landmarks is not None
        try:
            with closing(film_frames(components, inputs, tasks, read_landmarks)) as frames:
                for frame in frames:
                    film.write(frame)
            result = film.complete()
        except BaseException as error:
            film.discard(error)
            raise
    return dataclasses.replace(result, seconds=round(time.monotonic() - started, 2))


@dataclass(frozen=True)
class FilmOutcome:
    """What became of a request: a result, or the reason why there is no film."""

    request: FilmRequest
    result: FilmResult | None = None
    error: str | None = None


def write_films(
    requests: Sequence[FilmRequest], components: Components, *, batch: int, on_progress: ProgressHandler | None = None
) -> Iterator[FilmOutcome]:
    """Generates films and writes them, up to `batch` at once; yields what became of each as it ends.

    The films share evaluations of the networks. One that cannot be made is reported, and the others go on.
    Raises ValueError if a request has no `out`, or other networks than the first one.
    """
    for request in requests:
        if request.out is None or request.variants != requests[0].variants:
            raise ValueError("films that are made together need an out each, and the same networks")
    refused: deque[FilmOutcome] = deque()
    files: dict[Film, tuple[FilmFile, ExitStack, float]] = {}

    def films(tasks: Tasks) -> Iterator[Film]:
        for request in requests:
            with ExitStack() as opening:
                try:
                    inputs = opening.enter_context(FilmInputs(request, loaded=True))
                    file = _film_file(inputs)
                    film = _film(components, inputs, tasks, opening, request.save_landmarks is not None)
                except TccpError as error:
                    refused.append(FilmOutcome(request, error=str(error)))
                    continue
                files[film] = file, opening.pop_all(), 1 / max(1, inputs.num_frames)
            yield film

    def abandon() -> None:
        for file, opened, _ in files.values():
            file.discard(KeyboardInterrupt())
            opened.close()

    with ExitStack() as working, progress(on_progress) as tasks, arithmetic_threads(_shares(requests[0])):
        working.callback(abandon)  # films that are unfinished when an error, or the caller, ends this
        task = tasks.add_task("films", total=len(requests))
        events = generate(films(tasks), batch, all(request.overlap for request in requests))
        for film, event in working.enter_context(closing(events)):
            file, opened, share = files[film]
            failed = film.failed and not isinstance(event, TccpError)
            outcome = None if failed else _taken(film, file, event)
            if event is None:  # not before: stage 1 may still read the film
                del files[film]
                opened.close()
            if isinstance(event, GeneratedFrame) and outcome is None:
                tasks.advance(task, share)
            while refused:
                tasks.advance(task)
                yield refused.popleft()
            if outcome is not None:
                tasks.advance(task, 1 - share * file.num_frames)
                yield outcome
        yield from refused


def _taken(film: Film, file: FilmFile, event: GeneratedFrame | TccpError | None) -> FilmOutcome | None:
    """Writes a frame, or ends the film: then it returns what became of it."""
    try:
        if isinstance(event, TccpError):
            raise event
        if event is None:
            return FilmOutcome(file.request, file.complete())
        file.write(event)
    except TccpError as error:
        film.failed = True
        file.discard(error)
        return FilmOutcome(file.request, error=str(error))
    except BaseException as error:
        file.discard(error)
        raise
    return None


def check_requests(requests: Iterable[FilmRequest]) -> None:
    """Raises TccpError if two requests have the same output."""
    seen: dict[Path, int] = {}
    for number, request in enumerate(requests, 1):
        for path in (request.out, request.save_landmarks):
            if path is None:
                continue
            resolved = path.resolve()
            if resolved in seen:
                raise TccpError(f"films {seen[resolved]} and {number} both write {path}: give each a name of its own")
            seen[resolved] = number
