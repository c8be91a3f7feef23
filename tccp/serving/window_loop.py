"""A stage of the server: windows of many films share evaluations of its networks.

One thread does all arithmetic of a stage. Windows join it at any step and leave when they are done. Before every
evaluation it asks which of its jobs still hold, and drops the windows of the others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tccp.diffusion.batching import Sampler, SamplingJob
from tccp.diffusion.chains import Chain, ChainState, FrameInputs
from tccp.errors import TccpError
from tccp.inference.components import Components
from tccp.inference.conditioning import LandmarkReader
from tccp.inference.film import with_sampling_options
from tccp.inference.film_networks import FilmNetworks
from tccp.inference.film_windows import LandmarkWindow
from tccp.models.variants import VARIANTS, VariantName
from tccp.serving.work import ChainPoint, FacesDone, FilmKey, JobLost, LandmarksDone, StageKind, Task

logger = logging.getLogger(__name__)

Done = LandmarksDone | FacesDone
_MOST_FILMS = 64  # of which identity and settings are kept
_COUNTED_JOBS = 1024


@dataclass(eq=False)
class _Window:
    task: Task
    done: Future[Done]
    networks: FilmNetworks | None = None
    chain: Chain | None = None
    reader: LandmarkReader = field(default_factory=LandmarkReader)
    sampler: Sampler | None = None
    job: SamplingJob | None = None


@dataclass
class LoopCounts:
    """What a loop has done. evaluations: per job, each evaluation counted once for every job that is in it."""

    windows: int = 0
    evaluations: int = 0
    rows: int = 0
    busy_s: float = 0.0
    evaluations_of: Counter[str] = field(default_factory=Counter)
    by_size: Counter[int] = field(default_factory=Counter)


class WindowLoop:
    """The thread of a stage. `submit` may be called from any thread."""

    def __init__(
        self,
        kind: StageKind,
        load: Callable[[str], Components],
        still_held: Callable[[Mapping[str, int]], set[str]],
        limit: int = 8,
        continuous: bool = True,
        most_models: int = 2,
    ):
        """load: loads the components of a version of weights; called in the thread, once for each version.

        still_held: of jobs with their fences, those that may go on. limit: rows in one evaluation. continuous: windows
        join at any step; without it, only when no window is running. most_models: versions of weights kept in memory.
        """
        self.kind = kind
        self.limit = limit
        self.counts = LoopCounts()
        self._load, self._still_held = load, still_held
        self._continuous, self._most_models = continuous, most_models
        self._models: OrderedDict[str, Components] = OrderedDict()
        self._films: OrderedDict[tuple[str, int, str], FilmNetworks] = OrderedDict()
        self._samplers: dict[int, Sampler] = {}
        self._running: dict[SamplingJob, _Window] = {}
        self._new: deque[_Window | _Preload] = deque()
        self._wake = threading.Condition()
        self._closed = False
        self._beat: float | None = None
        """Since when the thread has been in its step; None while it waits for work."""
        self._thread = threading.Thread(target=self._run, name=f"{kind} stage", daemon=True)
        self._thread.start()

    def submit(self, task: Task) -> Future[Done]:
        """Queues a window. The future raises `JobLost` if its job does not hold any more.

        Cancelling the future drops the window: no further evaluation contains it.
        """
        window = _Window(task, Future())
        with self._wake:
            if self._closed:
                raise RuntimeError("the stage is closed")
            self._new.append(window)
            self._wake.notify()
        return window.done

    def preload(self, version: str) -> Future[None]:
        """Loads a version of weights ahead of its first window."""
        done: Future[None] = Future()
        with self._wake:
            if self._closed:
                raise RuntimeError("the stage is closed")
            self._new.append(_Preload(version, done))
            self._wake.notify()
        return done

    @property
    def stuck_s(self) -> float:
        """How long the thread has been loading weights, or in the encoding or evaluation that it is in; 0 if idle."""
        beat = self._beat
        return 0.0 if beat is None else time.monotonic() - beat

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def load(self) -> int:
        """Windows that wait or run."""
        with self._wake:
            return len(self._new) + len(self._running)

    def close(self) -> None:
        """Drops all windows and ends the thread."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        while self._wait():
            started = time.monotonic()
            self._turn()
            self.counts.busy_s += time.monotonic() - started
        with self._wake:
            windows = [*self._new, *self._running.values()]
        for window in windows:
            _fail(window.done, JobLost("the stage is closed"))

    def _wait(self) -> bool:
        """Waits for work. Returns whether there is some; otherwise the loop is closed."""
        with self._wake:
            self._beat = None
            while not self._new and not self._running and not self._closed:
                self._wake.wait()
            self._beat = time.monotonic()
            return not self._closed

    def _turn(self) -> None:
        """Begins the windows that have come, and makes one evaluation with each network that has windows."""
        for _ in range(len(self._new)):
            with self._wake:
                item = self._new.popleft()
            self._beat = time.monotonic()
            if isinstance(item, _Preload):
                self._preload(item)
            else:
                self._begin(item)
        for sampler in list(self._samplers.values()):
            self._beat = time.monotonic()
            if sampler.busy:
                self._step(sampler)
        self._samplers = {key: sampler for key, sampler in self._samplers.items() if sampler.busy}

    # One window

    def _begin(self, window: _Window) -> None:
        """Encodes the inputs of a window and queues it for its network."""
        if window.done.cancelled():
            return
        try:
            task = window.task
            if not self._still_held({task.film.job_id: task.film.fence}):
                raise JobLost(f"{task.film.job_id} is not to go on")
            networks = self._film(task.film)
            variant = self._variant(networks)
            state = None if task.point is None else _state(task.point, networks)
            chain = networks.chain(variant, task.shot, state)
            landmarks, latents = self._landmarks(task, networks)
            started = chain.window(networks.inputs(variant, task.window, landmarks, latents))
            sampler = self._samplers.get(id(started.model))
            if sampler is None:
                sampler = Sampler(started.model, started.schedule, self.limit, self._continuous)
                self._samplers[id(started.model)] = sampler
            window.networks, window.chain, window.sampler = networks, chain, sampler
            if task.point is not None and task.point.points is not None:
                window.reader = LandmarkReader(task.point.points)
            window.job = sampler.submit(started.state, task.film.job_id)
            self._running[window.job] = window
        except Exception as error:
            _fail(window.done, error)

    def _preload(self, item: _Preload) -> None:
        try:
            self._components(item.version)
        except Exception as error:
            _fail(item.done, error)
        else:
            with contextlib.suppress(InvalidStateError):
                item.done.set_result(None)

    def _landmarks(self, task: Task, networks: FilmNetworks) -> tuple[LandmarkWindow | None, Tensor | None]:
        """What stage 2 is given of stage 1, or of a landmark file."""
        if self.kind == "landmark":
            return None, None
        if task.landmarks is None:
            return task.window.landmarks, None
        latents = task.landmarks.latents
        device = networks.components.device
        return task.landmarks.landmarks, None if latents is None else torch.from_numpy(latents).to(device)

    def _variant(self, networks: FilmNetworks) -> VariantName:
        return "landmark_sequence" if self.kind == "landmark" else networks.face_variant

    def _step(self, sampler: Sampler) -> None:
        """One evaluation, without windows that are not to go on."""
        own = self._windows(sampler)
        try:
            held = self._still_held({window.task.film.job_id: window.task.film.fence for window in own})
        except Exception as error:  # the store: without its word nothing goes on
            self._fail_all(sampler, error)
            return
        for window in own:
            if window.task.film.job_id not in held:
                self._films.pop(_name(window.task.film), None)
                self._drop(window, JobLost(f"{window.task.film.job_id} is not to go on"))
            elif window.done.cancelled():
                self._drop(window, JobLost("nobody waits for the window"))
        if not sampler.busy:
            return
        try:
            finished = sampler.step()
        except torch.OutOfMemoryError as error:
            if sampler.limit > 1:
                rows = sum(job.state.num_rows for job in sampler.last)
                self.limit = max(1, min(rows, sampler.limit) // 2)
                for one in self._samplers.values():
                    one.limit = min(one.limit, self.limit)
                logger.warning("out of memory: from now on at most %d rows in one evaluation", self.limit)
                return
            self._fail_all(sampler, error)
            return
        except Exception as error:
            self._fail_all(sampler, error)
            return
        self._count(sampler)
        for job in finished:
            self._finish(self._running.pop(job))

    def _count(self, sampler: Sampler) -> None:
        counts = self.counts
        counts.evaluations += 1
        rows = sum(job.state.num_rows for job in sampler.last)
        counts.rows += rows
        counts.by_size[rows] += 1
        counts.evaluations_of.update({str(job.owner) for job in sampler.last})
        if len(counts.evaluations_of) > _COUNTED_JOBS:
            counts.evaluations_of = Counter(dict(list(counts.evaluations_of.items())[-_COUNTED_JOBS // 2 :]))

    def _fail_all(self, sampler: Sampler, error: Exception) -> None:
        for window in self._windows(sampler):
            self._drop(window, error)

    def _windows(self, sampler: Sampler) -> list[_Window]:
        return [window for window in self._running.values() if window.sampler is sampler]

    def _drop(self, window: _Window, error: Exception) -> None:
        assert window.job is not None and window.sampler is not None
        window.sampler.cancel(window.job)
        del self._running[window.job]
        _fail(window.done, error)

    def _finish(self, window: _Window) -> None:
        """Decodes a finished window."""
        assert window.job is not None and window.chain is not None and window.networks is not None
        try:
            new = window.chain.finish(window.job.state.latents).transpose(0, 1)
            assert window.chain.state is not None
            if self.kind == "landmark":
                landmarks, latents = window.networks.generated_landmarks(new, window.reader)
                point = _point(window.chain.state, window.reader)
                done: Done = LandmarksDone(point, None if latents is None else _numpy(latents), landmarks)
            else:
                faces = window.networks.encoder.decode(new, "face")
                done = FacesDone(_point(window.chain.state), faces)
            self.counts.windows += 1
        except Exception as error:
            _fail(window.done, error)
        else:
            with contextlib.suppress(InvalidStateError):  # it was cancelled
                window.done.set_result(done)

    # Models

    def _components(self, version: str) -> Components:
        if version not in self._models:
            in_use = {window.task.film.weights for window in self._running.values()}
            too_many = max(0, len(self._models) + 1 - self._most_models)
            for old in [one for one in self._models if one not in in_use][:too_many]:
                del self._models[old]
                self._films = OrderedDict((key, film) for key, film in self._films.items() if key[2] != old)
            self._models[version] = self._load(version)
        self._models.move_to_end(version)
        return self._models[version]

    def _film(self, key: FilmKey) -> FilmNetworks:
        """The networks with a film's settings. They are kept for its next windows."""
        name = _name(key)
        components = self._components(key.weights)
        if name not in self._films:
            if key.sampling:
                settings = with_sampling_options(components.settings, key.sampling)
                components = dataclasses.replace(components, settings=settings)
            self._films[name] = FilmNetworks(
                components,
                key.identity,
                key.seed,
                one_stage=key.one_stage,
                redraw=key.redraw,
                read_landmarks=key.read_landmarks,
                traced=True,
            )
            while len(self._films) > _MOST_FILMS:
                self._films.popitem(last=False)
        self._films.move_to_end(name)
        return self._films[name]


@dataclass(eq=False)
class _Preload:
    version: str
    done: Future[None]


def stage_variants(kind: StageKind) -> tuple[VariantName, ...]:
    """The networks that a stage may need: all that generate its kind of pictures, those of one stage with the faces."""
    return tuple(name for name, row in VARIANTS.items() if row.generates == kind)


def _name(key: FilmKey) -> tuple[str, int, str]:
    return key.job_id, key.fence, key.weights


def _fail(future: Future[Any], error: Exception) -> None:
    with contextlib.suppress(InvalidStateError):  # it was cancelled
        future.set_exception(error)


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().float().cpu().numpy()


def _point(state: ChainState, reader: LandmarkReader | None = None) -> ChainPoint:
    inputs = state.inputs
    return ChainPoint(
        state.position,
        _numpy(inputs.control),
        _numpy(state.latents),
        None if inputs.audio is None else _numpy(inputs.audio),
        None if inputs.lips is None else _numpy(inputs.lips),
        None if reader is None else reader.last,
    )


def _state(point: ChainPoint, networks: FilmNetworks) -> ChainState:
    device = networks.components.device

    def tensor(array: np.ndarray | None) -> Tensor | None:
        return None if array is None else torch.from_numpy(np.ascontiguousarray(array)).to(device)

    control, latents = tensor(point.control), tensor(point.latents)
    if control is None or latents is None:
        raise TccpError("a chain cannot go on without the inputs of its last frame")
    return ChainState(point.position, FrameInputs(control, tensor(point.audio), tensor(point.lips)), latents)
