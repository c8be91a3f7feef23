"""Continuous batching: windows of one network that share its evaluations, at whatever step each of them is."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from jaxtyping import Float
from torch import Tensor

from tccp.diffusion.sampling import Denoiser, Network, WindowState, advance
from tccp.diffusion.schedule import NoiseSchedule


class SamplingJob:
    """A window in a `Sampler`. state: as far as it is sampled."""

    def __init__(self, state: WindowState):
        self.state = state
        self.cancelled = False


class Sampler:
    """Samples windows with one network. Each `step` advances all running windows with one evaluation.

    Windows wait in the order of `submit`, join when there is room, and leave when they are finished or cancelled. The
    result of a window depends on the others only by rounding. `submit` and `cancel` may be called from any thread,
    `step` from one thread at a time.
    """

    def __init__(self, model: Network | Denoiser, schedule: NoiseSchedule, limit: int):
        """limit: of rows in an evaluation. A window with guidance takes two; it may run alone where these are more.

        Raises ValueError for a limit below 1.
        """
        if limit < 1:
            raise ValueError(f"a limit of {limit} rows leaves no room for a window: give at least 1")
        self.model = model
        self.schedule = schedule
        self.limit = limit
        self._waiting: deque[SamplingJob] = deque()
        self._running: list[SamplingJob] = []
        self._lock = threading.Lock()

    def submit(self, state: WindowState) -> SamplingJob:
        """Queues a window that is not finished."""
        job = SamplingJob(state)
        with self._lock:
            self._waiting.append(job)
        return job

    def cancel(self, job: SamplingJob) -> bool:
        """Drops a window: no further evaluation contains it. Returns False if it has finished before."""
        with self._lock:
            job.cancelled = job.cancelled or not job.state.finished
            return job.cancelled

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
            running = list(self._running)
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
        room = self.limit - sum(job.state.num_rows for job in self._running)
        while self._waiting and (self._waiting[0].state.num_rows <= room or not self._running):
            job = self._waiting.popleft()
            self._running.append(job)
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
