"""Takes jobs from the store and leads each through the stages.

Nothing of a job is in this process only: its state is in the store, its finished windows are in the storage. So another
conductor can go on with it at any moment, after the last finished windows of its shots.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

from tccp.errors import StorageError, TccpError
from tccp.files import Folder
from tccp.serving.errors_for_clients import code_of, message_for_client
from tccp.serving.job_folder import JobFolder, Plan, Shot
from tccp.serving.spec import ROLES, Role, VideoSpec
from tccp.serving.stage_service import WindowMade
from tccp.serving.store import Claim, JobStore
from tccp.serving.work import ChainPoint, FilmKey, JobLost, LandmarksDone

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")
_AHEAD = 2  # windows that stage 1 may be ahead of stage 2
_PREVIEW_EVERY_S = 0.5


@dataclass(frozen=True)
class WorkOrder:
    """A claimed job, as the stages are told of it."""

    job_id: str
    fence: int
    weights: str
    model: str
    spec: VideoSpec
    roles: tuple[Role, ...]


@runtime_checkable
class Stages(Protocol):
    """The parts of the server that a job goes through.

    Calls raise TccpError for what no other call changes, `JobLost`, StorageError, and others where the part itself has
    failed and another call may succeed.
    """

    def analyse(self, order: WorkOrder) -> AsyncIterator[tuple[str, float]]:
        """Prepares the job; yields what is done and the share that is done. The plan is in the storage then."""

    async def prepared(self, order: WorkOrder, first: int, num_frames: int) -> Any:
        """A `tccp.serving.publishing.PreparedWindow`, or a reference that the stages take in its place."""

    async def landmarks(self, film: FilmKey, shot: int, prepared: Any, point: ChainPoint | None) -> LandmarksDone: ...

    async def faces(
        self, film: FilmKey, shot: int, prepared: Any, landmarks: LandmarksDone | None, point: ChainPoint | None
    ) -> WindowMade: ...

    async def preview(self, order: WorkOrder, prepared: Any, made: WindowMade, number: int) -> None:
        """Makes preview `number` of a finished window."""

    def finish(self, order: WorkOrder) -> AsyncIterator[tuple[int, int] | dict[str, Any]]:
        """Publishes the film; yields frames done and all, and at last what the job's result says."""


@dataclass(frozen=True)
class Rules:
    """lease_s: after so long without a sign of its holder, a job is taken by another one. slots: jobs at once.

    chains: shots of one job that are generated at once. most_failures: attempts in a row that may fail.
    """

    slots: int = 8
    chains: int = 2
    lease_s: float = 15.0
    most_failures: int = 5
    poll_s: float = 0.25
    call_retries: int = 3


class Conductor:
    """One process may have one. `run` works until it is cancelled."""

    def __init__(
        self,
        store: JobStore,
        storage: Folder,
        stages: Stages,
        rules: Rules = Rules(),
        on_ended: Callable[[str, str], object] = lambda job_id, status: None,
    ):
        """on_ended: called with a job's id and how it ended here: completed, failed, released, lost, retried."""
        self.holder = f"conductor-{uuid.uuid4().hex[:12]}"
        self._store, self._storage, self._stages, self._rules = store, storage, stages, rules
        self._on_ended = on_ended
        self._tasks: dict[str, tuple[asyncio.Task[None], int]] = {}
        self._draining = False
        self.beat = time.monotonic()
        """When the loop has last turned: it does so every second or so, also where there is no work."""

    @property
    def working_on(self) -> list[str]:
        return sorted(self._tasks)

    async def run(self) -> None:
        """Claims jobs and works on them until it is cancelled. Then it gives back those that are not finished."""
        extended = 0.0
        try:
            while True:
                self.beat = time.monotonic()
                try:
                    if time.monotonic() - extended > self._rules.lease_s / 4:
                        extended = time.monotonic()
                        await self._extend()
                    claimed = await self._claim()
                except StorageError as error:
                    logger.warning("%s", error)
                    claimed = False
                if not claimed:
                    await asyncio.sleep(self._rules.poll_s)
        finally:
            await self._let_go()

    def drain(self) -> None:
        """Claims no further job."""
        self._draining = True

    async def _claim(self) -> bool:
        if self._draining or len(self._tasks) >= self._rules.slots:
            return False
        rules = self._rules
        claim = await asyncio.to_thread(self._store.claim, self.holder, rules.lease_s, rules.most_failures)
        if claim is None:
            return False
        task = asyncio.create_task(self._work(claim), name=claim.id)
        self._tasks[claim.id] = task, claim.fence
        task.add_done_callback(lambda done: self._ended(claim.id, done))
        return True

    def _ended(self, job_id: str, task: asyncio.Task[None]) -> None:
        if self._tasks.get(job_id, (None, 0))[0] is task:
            del self._tasks[job_id]

    async def _extend(self) -> None:
        """Extends the leases, and stops work on jobs that are lost."""
        tasks = dict(self._tasks)
        fences = {job_id: fence for job_id, (_, fence) in tasks.items()}
        held = await asyncio.to_thread(self._store.extend, fences, self._rules.lease_s)
        for job_id, (task, _) in tasks.items():
            if job_id not in held:
                task.cancel()

    async def _let_go(self) -> None:
        tasks = [task for task, _ in self._tasks.values()]
        for task in tasks:
            task.cancel()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(5):
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _work(self, claim: Claim) -> None:
        """One attempt of a job."""
        logger.info("attempt %d of %s begins", claim.fence, claim.id, extra={"job": claim.id})
        try:
            how = await _Attempt(claim, self._store, self._storage, self._stages, self._rules).run()
        except asyncio.CancelledError:
            with contextlib.suppress(StorageError):  # if it is still held; not if it was cancelled or lost
                await asyncio.shield(asyncio.to_thread(self._store.release, claim))
            self._on_ended(claim.id, "released")
            raise
        except JobLost:
            how = "lost"
        except TccpError as error:
            text = message_for_client(error, self._storage)
            held = await asyncio.to_thread(self._store.refuse, claim, code_of(error), text)
            how = "failed" if held else "lost"
        except Exception as error:
            known = isinstance(error, StorageError)
            logger.warning("an attempt of %s failed: %s", claim.id, error, exc_info=not known, extra={"job": claim.id})
            text = message_for_client(error, self._storage) if isinstance(error, StorageError) else type(error).__name__
            try:
                most = self._rules.most_failures
                await asyncio.to_thread(self._store.attempt_failed, claim, "attempt_failed", text, most)
            except StorageError:
                logger.warning("%s: its lease will run out", claim.id)
            how = "retried"
        logger.info("attempt %d of %s: %s", claim.fence, claim.id, how, extra={"job": claim.id})
        self._on_ended(claim.id, how)


class _Attempt:
    """From a claim to the end of the job, or until others have their turn."""

    def __init__(self, claim: Claim, store: JobStore, storage: Folder, stages: Stages, rules: Rules):
        job = claim.job
        self._claim, self._store, self._stages, self._rules = claim, store, stages, rules
        self._folder = JobFolder(storage, job.id)
        spec = VideoSpec.model_validate(job.spec)
        self._order = WorkOrder(
            job.id, claim.fence, job.weights, job.model, spec, tuple(role for role in ROLES if role in job.inputs)
        )
        self._windows_now = 0
        self._giving_way = False
        self._previews = job.previews
        self._last_preview = 0.0

    async def run(self) -> str:
        plan = await self._prepared()
        kept = await asyncio.to_thread(self._folder.kept_windows)
        await self._note(stage="generating", windows_done=len(kept))
        key = self._key(plan)
        left = [shot for shot in plan.shots if not {first for first, _ in shot.windows(plan.window)} <= kept]
        chains = asyncio.Semaphore(self._rules.chains)

        async def guarded(shot: Shot) -> None:
            async with chains:
                if not self._giving_way:
                    await self._shot(key, plan, shot, kept)

        async with _group() as group:
            for shot in left:
                group.create_task(guarded(shot))
        if self._giving_way:
            await asyncio.to_thread(self._store.release, self._claim)
            return "released"
        await self._note(stage="finishing")
        result = await self._film()
        if not await asyncio.to_thread(self._store.complete, self._claim, result):
            await asyncio.to_thread(self._folder.storage.remove, self._folder.film_folder(self._claim.fence))
            raise JobLost
        await asyncio.to_thread(self._folder.remove_work)
        return "completed"

    async def _note(self, **values: Any) -> None:
        if not await asyncio.to_thread(self._store.update, self._claim, **values):
            raise JobLost

    async def _prepared(self) -> Plan:
        plan = await asyncio.to_thread(self._folder.read_plan)
        if plan is None:
            await self._note(stage="preparing")
            async for _ in self._stages.analyse(self._order):
                pass
            plan = await asyncio.to_thread(self._folder.read_plan)
            if plan is None:
                raise RuntimeError("preparation ended without a plan")
        warnings = list(plan.warnings)
        await self._note(frames=plan.num_frames, windows=plan.num_windows, warnings=warnings)
        return plan

    def _key(self, plan: Plan) -> FilmKey:
        spec = self._order.spec
        return FilmKey(
            self._order.job_id,
            self._order.fence,
            self._order.weights,
            plan.identity,
            spec.seed,
            spec.one_stage,
            spec.redraw or None,
            spec.save_landmarks and not spec.one_stage,
            spec.sampling,
        )

    async def _shot(self, key: FilmKey, plan: Plan, shot: Shot, kept: set[int]) -> None:
        """The windows of a shot that are not kept yet; stage 1 is up to `_AHEAD` windows ahead of stage 2."""
        windows = shot.windows(plan.window)
        done = next((i for i, (first, _) in enumerate(windows) if first not in kept), len(windows))
        landmark_point = face_point = None
        if done:
            last = await asyncio.to_thread(self._folder.read_window, windows[done - 1][0], False)
            landmark_point, face_point = last.landmark_point, last.face_point
        two_stages = not key.one_stage and plan.points is None
        ready: asyncio.Queue[tuple[Any, LandmarksDone | None] | None] = asyncio.Queue(_AHEAD)

        async def stage_one() -> None:
            nonlocal landmark_point
            for first, count in windows[done:]:
                if self._giving_way:
                    break
                prepared = await self._tried(self._stages.prepared, self._order, first, count)
                landmarks = None
                if two_stages:
                    landmarks = await self._tried(self._stages.landmarks, key, shot.first, prepared, landmark_point)
                    landmark_point = landmarks.point
                await ready.put((prepared, landmarks))
            await ready.put(None)

        async def stage_two() -> None:
            nonlocal face_point
            while (item := await ready.get()) is not None:
                prepared, landmarks = item
                made = await self._tried(self._stages.faces, key, shot.first, prepared, landmarks, face_point)
                face_point = made.point
                await self._made(prepared, made)

        async with _group() as group:
            group.create_task(stage_one())
            group.create_task(stage_two())

    async def _made(self, prepared: Any, made: WindowMade) -> None:
        """Counts a finished window, shows it, and sees whether others have their turn."""
        previews = 0
        if time.monotonic() - self._last_preview > _PREVIEW_EVERY_S:
            self._last_preview = time.monotonic()
            self._previews += 1
            await self._stages.preview(self._order, prepared, made, self._previews - 1)
            previews = 1
        if not await asyncio.to_thread(self._store.add_windows, self._claim, 1, previews):
            raise JobLost
        self._windows_now += 1
        if not self._giving_way:
            self._giving_way = await asyncio.to_thread(self._store.gives_way, self._claim, self._windows_now)

    async def _film(self) -> dict[str, Any]:
        result: dict[str, Any] | None = None
        async for event in self._stages.finish(self._order):
            if isinstance(event, dict):
                result = event
        if result is None:
            raise RuntimeError("publishing ended without a result")
        return result

    async def _tried(self, call: Callable[..., Awaitable[_Result]], *given: Any) -> _Result:
        """A call of a stage, repeated if the stage itself has failed."""
        for attempt in range(self._rules.call_retries + 1):
            try:
                return await call(*given)
            except (TccpError, JobLost, StorageError):
                raise
            except Exception as error:
                if attempt == self._rules.call_retries:
                    raise
                logger.info("%s: a stage failed (%s) and is called again", self._order.job_id, type(error).__name__)
                await asyncio.sleep(0.2 * 2**attempt)
        raise AssertionError


@contextlib.asynccontextmanager
async def _group() -> AsyncIterator[asyncio.TaskGroup]:
    """A group of tasks whose first error is raised as itself."""
    try:
        async with asyncio.TaskGroup() as group:
            yield group
    except BaseExceptionGroup as errors:  # what is raised in `except*` comes in a group again
        error: BaseException = errors
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from None
