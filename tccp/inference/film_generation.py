"""Generates the frames of a film from checked inputs, and writes the film."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

from tccp.errors import TccpError
from tccp.inference.components import Components
from tccp.inference.film import FilmInputs, FilmRequest, FilmResult, OnFrame, find_head, identity_of, with_sampling
from tccp.inference.frames import GeneratedFrame
from tccp.inference.generation import Generator
from tccp.inference.landmark_file import landmark_writer
from tccp.inference.scene import scene_frames
from tccp.media import VideoWriter, mark_generated
from tccp.models.variants import TWO_STAGE
from tccp.progress import ProgressHandler, Tasks, progress
from tccp.threads import arithmetic_threads


def film_frames(
    components: Components, inputs: FilmInputs, tasks: Tasks, read_landmarks: bool = True
) -> Iterator[GeneratedFrame]:
    """Yields the frames of the film in order, as windows finish. Raises TccpError if no head or face is found.

    read_landmarks: fill the landmark fields of the frames.
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
        overlap=request.overlap,
        traced=True,
    )
    task = tasks.add_task("generating", total=inputs.num_frames)
    scene = scene_frames(request.scene, inputs.scene, track, inputs.num_frames, request.extend, inputs.decoder)
    # The two stages share the cores, also if they do not overlap, so that the film is the same.
    with arithmetic_threads(shares=2 if set(request.variants) >= set(TWO_STAGE) else 1):
        for frame in generator.frames(scene):
            yield frame
            tasks.advance(task)


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
        film = VideoWriter(
            request.out,
            inputs.scene.width,
            inputs.scene.height,
            inputs.sound_decoder.film_sound(request.audio),
            lossless=request.lossless,
            exact_size=request.exact_size,
            metadata=mark_generated(seed=str(request.seed), weights=Path(request.weights).absolute().name),
        )
        with progress(on_progress) as loading:
            loading.add_task("loading the networks")
            components = load(request)
        frames = film_frames(components, inputs, tasks, on_frame is not None or request.save_landmarks is not None)
        first = next(frames)  # by now, every input is checked; create the folder only then
        request.out.parent.mkdir(parents=True, exist_ok=True)
        generated, reasons = 0, Counter[str]()
        with film, landmark_writer(request.save_landmarks) as save:
            frame: GeneratedFrame | None = first
            while frame is not None:
                film.write(frame.picture)
                save(frame)
                if on_frame is not None:
                    on_frame(frame)
                generated += frame.face is not None
                reasons.update([frame.reason] if frame.reason else [])
                frame = next(frames, None)
    seconds = round(time.monotonic() - started, 2)
    passed_through = inputs.num_frames - generated
    warnings = tuple(inputs.warnings)
    return FilmResult(request.out, inputs.num_frames, generated, passed_through, seconds, warnings, dict(reasons))
