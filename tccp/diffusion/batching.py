"""Continuous batching: windows of one network that share its evaluations, at whatever step each of them is."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence

from jaxtyping import Float
from torch import Tensor

from tccp.diffusion.sampling import Denoiser, Network, WindowState, advance
from tccp.diffusion.schedule import NoiseSchedule


class SamplingJob:
    """A window in a `Sampler`. state: as far as it is sampled. owner: whose it is, for turns that are fair."""

    def __init__(self, state: WindowState, owner: object = None):
        self.state = state
        self.owner = owner
        self.cancelled = False


class Sampler:
    """Samples windows with one network. Each `step` advances all running windows with one evaluation.

    Windows join when there is room: next comes one of the owner that has fewest rows running, of these the one that
    waits longest. They leave when they are finished or cancelled. The result of a window depends on the others only by
    rounding. `submit` and `cancel` may be called from any thread, `step` from one thread at a time.
    """

    def __init__(self, model: Network | Denoiser, schedule: NoiseSchedule, limit: int, continuous: bool = True):
        """limit: of rows in an evaluation; it may be changed. A window with guidance takes two, and may run alone where
        these are more.

        continuous: without it, windows join only when none is running, so that they begin and finish together.
        Raises ValueError for a limit below 1.
        """
        if limit < 1:
            raise ValueError(f"a limit of {limit} rows leaves no room for a window: give at least 1")
        self.model = model
        self.schedule = schedule
        self.limit = limit
        self.continuous = continuous
        self._waiting: deque[SamplingJob] = deque()
        self._running: list[SamplingJob] = []
        self.last: list[SamplingJob] = []
        """The windows of the last evaluation."""
        self._lock = threading.Lock()

    def submit(self, state: WindowState, owner: object = None) -> SamplingJob:
        """Queues a window that is not finished. owner: whose it is, such as a film."""
        job = SamplingJob(state, owner)
        with self._lock:
            self._waiting.append(job)
        return job

    def cancel(self, job: SamplingJob) -> bool:
        """Drops a window: no further evaluation contains it. Returns False if it has finished before."""
        with self._lock:
            job.cancelled = job.cancelled or not job.state.finished
            return job.cancelled

    def cancel_all(self, owner: object) -> list[SamplingJob]:
        """Drops all windows of an owner; returns them."""
        with self._lock:
            own = [job for job in (*self._running, *self._waiting) if job.owner == owner and not job.state.finished]
            for job in own:
                job.cancelled = True
            return own

    @property
    def busy(self) -> bool:
        """Whether a window waits or runs."""
        with self._lock:
            self._drop_cancelled()
            return bool(self._waiting or self._running)

    def step(self) -> list[SamplingJob]:
        """Advances the running windows by one step, with one evaluation; returns those that finished with it.

        If the evaluation raises, the windows stay where they are.
        """
        with self._lock:
            self._drop_cancelled()
            self._join()
            running = self.last = list(self._running)
        states = advance(self.model, self.schedule, [job.state for job in running])
        with self._lock:
            for job, state in zip(running, states, strict=True):
                if not job.cancelled:
                    job.state = state
            finished = [job for job in running if job.state.finished]
            self._running = [job for job in running if not job.state.finished]
        return finished

    def _drop_cancelled(self) -> None:
        self._running = [job for job in self._running if not job.cancelled]
        self._waiting = deque(job for job in self._waiting if not job.cancelled)

    def _join(self) -> None:
        rows: Counter[object] = Counter()
        for job in self._running:
            rows[job.owner] += job.state.num_rows
        while rows.total() > self.limit and len(self._running) > 1:  # the limit was lowered
            job = self._running.pop()
            rows[job.owner] -= job.state.num_rows
            self._waiting.appendleft(job)
        if self._running and not self.continuous:
            return
        room = self.limit - rows.total()
        while self._waiting:
            # Owners are few, and so are waiting windows: a search through them costs nothing beside an evaluation.
            position = min(range(len(self._waiting)), key=lambda i: (rows[self._waiting[i].owner], i))
            job = self._waiting[position]
            if job.state.num_rows > room and self._running:
                return
            del self._waiting[position]
            self._running.append(job)
            rows[job.owner] += job.state.num_rows
            room -= job.state.num_rows


def run_windows(
    model: Network | Denoiser,
    schedule: NoiseSchedule,
    states: Iterable[WindowState],
    limit: int = 16,
    check: Callable[[], object] = lambda: None,
) -> list[Float[Tensor, "c f h w"]]:
    """Runs all steps of some windows, up to `limit` rows in one evaluation. check: called before each; it may raise."""
    sampler = Sampler(model, schedule, limit)
    jobs: Sequence[SamplingJob] = [sampler.submit(state) for state in states]
    while sampler.busy:
        check()
        sampler.step()
    return [job.state.latents for job in jobs]
