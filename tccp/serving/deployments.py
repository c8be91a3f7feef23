"""The server as a Ray Serve application: ingress, conductor, preparation, two stages of networks, and publishing.

`app` builds it from a `ServerSettings`; `tccp serve`, ray_jobs/serve.py and deploy/rayservice.yaml all use it. On two
cores all of it runs, because deployments ask for fractions of a core.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from tccp.files import Folder
from tccp.serving.conductor import Conductor, Rules, WorkOrder
from tccp.serving.errors_for_clients import refused, without_ray
from tccp.serving.job_folder import JobFolder
from tccp.serving.preparation import Preparation, Stopped
from tccp.serving.publishing import PreparedWindow, Publishing, preview
from tccp.serving.server_settings import ServerSettings
from tccp.serving.stage_service import StageService, WindowMade
from tccp.serving.store import JobStore
from tccp.serving.webhooks import deliver_forever
from tccp.serving.weight_versions import place
from tccp.serving.work import ChainPoint, FilmKey, JobLost, LandmarksDone, StageKind

logger = logging.getLogger("ray.serve")

_Method = TypeVar("_Method", bound=Callable[..., Any])
_HEALTH_S = 5.0
_DRAIN_S = 30.0
_REPORT_S = 2.0
_UNMEASURED_BATCH = 8


def _explained(method: _Method) -> _Method:
    """Raises TccpErrors of a method in a form that Ray hands to the caller as it is."""

    @functools.wraps(method)
    async def call(self: Any, *given: Any) -> Any:
        with refused(self.storage):
            return await method(self, *given)

    return call  # type: ignore[return-value]


def _log_as_serve() -> None:
    """Writes log lines of this package where those of Ray Serve go, as it writes them."""
    own = logging.getLogger("tccp")
    own.handlers = logger.handlers
    own.setLevel(logging.INFO)
    own.propagate = False


class _Part:
    """What all deployments have: the storage, and the store of jobs."""

    def __init__(self, settings: ServerSettings):
        from tccp.threads import wait_passively

        wait_passively()
        _log_as_serve()
        self.settings = settings
        self.storage = Folder(settings.storage)

    @functools.cached_property
    def store(self) -> JobStore:
        return JobStore(self.settings.store_url)

    def held(self, order: WorkOrder) -> bool:
        return order.job_id in self.store.still_held({order.job_id: order.fence})


class PreparationReplica(_Part):
    """Checks inputs, finds heads, and makes the inputs of windows."""

    def __init__(self, settings: ServerSettings):
        super().__init__(settings)
        self._preparation = Preparation(self.storage, settings.decoding_limits, settings.detector_weights_path)

    def __del__(self) -> None:
        self._preparation.close()

    async def analyse(self, order: WorkOrder) -> AsyncIterator[tuple[str, float]]:
        """Yields what is done and the share that is done, about once a second."""
        given = (order.job_id, order.spec, list(order.roles), order.weights, self.settings.limits.max_film_s)
        latest: dict[str, Any] = {"text": "checking the inputs", "share": 0.0, "held_at": time.monotonic()}
        stop = threading.Event()

        def on_progress(text: str, share: float) -> None:
            latest.update(text=text, share=share)

        def stopped() -> bool:
            if time.monotonic() - latest["held_at"] > 1:
                latest["held_at"] = time.monotonic()
                if not self.held(order):
                    stop.set()
            return stop.is_set()

        with refused(self.storage):
            work = asyncio.create_task(
                asyncio.to_thread(self._preparation.analyse, *given, on_progress=on_progress, stopped=stopped)
            )
            try:
                while not (await asyncio.wait([work], timeout=1.0))[0]:
                    yield latest["text"], latest["share"]
                await work
            except Stopped:
                raise JobLost(order.job_id) from None
            finally:
                stop.set()

    @_explained
    async def prepared(self, order: WorkOrder, first: int, num_frames: int) -> PreparedWindow:
        given = (order.job_id, order.spec, list(order.roles), order.weights, first, num_frames)
        return await asyncio.to_thread(self._preparation.prepared, *given)

    @_explained
    async def heads(self, name: str) -> tuple[int, int, bytes, list[list[float]]]:
        """Width, height, JPEG and head boxes of a frame of a film in the storage."""
        return await asyncio.to_thread(self._preparation.heads, name)

    async def forget(self, job_id: str) -> None:
        await asyncio.to_thread(self._preparation.forget, job_id)


class _StagePart(_Part):
    """A stage of networks."""

    kind: StageKind

    def __init__(self, settings: ServerSettings):
        super().__init__(settings)
        from tccp.inference.components import Components, load_components
        from tccp.inference.manifest import has_component
        from tccp.inference.pipeline_source import component_names, pipeline_folder
        from tccp.serving.batch_limit import kept_steps, limit_of
        from tccp.serving.window_loop import WindowLoop, stage_variants
        from tccp.threads import num_threads

        device = settings.device
        if device == "auto":
            import torch

            device = "cuda" if torch.cuda.is_available() else "cpu"
        import torch

        torch.set_num_threads(num_threads(2 if device == "cpu" else 1))

        def load(version: str) -> Components:
            variants = stage_variants(self.kind)
            folder = pipeline_folder(place(version, self.storage), component_names(variants))
            variants = tuple(name for name in variants if has_component(folder, name))
            components = load_components(folder, variants, device=device, dtype=getattr(torch, settings.dtype))
            if settings.batch is None:
                curve = kept_steps(components, self.kind, version, self.storage)
                self.loop.limit = limit_of(curve, settings.longest_step_s)
                logger.info("the %s stage takes up to %d rows in one evaluation", self.kind, self.loop.limit)
            return components

        first = settings.batch or _UNMEASURED_BATCH
        self.loop = WindowLoop(self.kind, load, self.store.still_held, first, settings.continuous)
        self.service = StageService(self.loop, self.storage)
        for version in dict.fromkeys(settings.versions.values()):
            self.loop.preload(version).result()
        self._reports = asyncio.get_running_loop().create_task(self._report())

    def __del__(self) -> None:
        self._reports.cancel()
        self.loop.close()

    async def _report(self) -> None:
        """Hands the counts of the loop to Ray's metrics, which Prometheus reads on every machine.

        Counters only: Ray estimates the sum of a histogram from the middles of its buckets.
        """
        from ray.util.metrics import Counter, Gauge

        tags = {"stage": self.kind}
        names = {
            "windows": "Windows that a stage has finished.",
            "evaluations": "Evaluations of the networks of a stage.",
            "rows": "Rows in these evaluations.",
            "busy_s": "Seconds in which a stage computed.",
        }
        counters = {
            name: Counter(f"tccp_stage_{name}", description=text, tag_keys=("stage",)) for name, text in names.items()
        }
        load = Gauge("tccp_stage_load", description="Windows that wait or run in a stage.", tag_keys=("stage",))
        before = dict.fromkeys(names, 0.0)
        while True:
            for name, counter in counters.items():
                value = float(getattr(self.loop.counts, name))
                if value > before[name]:
                    counter.inc(value - before[name], tags=tags)
                before[name] = value
            load.set(self.loop.load, tags=tags)
            await asyncio.sleep(_REPORT_S)

    def check_health(self) -> None:
        """Serve starts the replica again if this raises."""
        if not self.loop.alive:
            raise RuntimeError(f"the thread of the {self.kind} stage has ended")
        if self.loop.stuck_s > self.settings.stuck_s:
            raise RuntimeError(f"the {self.kind} stage has been in one step for {self.loop.stuck_s:.0f} s")

    async def counts(self) -> dict[str, Any]:
        counts = self.loop.counts
        return {
            "windows": counts.windows,
            "evaluations": counts.evaluations,
            "rows": counts.rows,
            "busy_s": counts.busy_s,
            "by_size": dict(counts.by_size),
            "evaluations_of": dict(counts.evaluations_of),
            "load": self.loop.load,
            "limit": self.loop.limit,
        }


class LandmarkReplica(_StagePart):
    """Stage 1: landmarks."""

    kind: StageKind = "landmark"

    @_explained
    async def landmarks(
        self, film: FilmKey, shot: int, prepared: PreparedWindow, point: ChainPoint | None
    ) -> LandmarksDone:
        return await self.service.landmarks(film, shot, prepared, point)


class FaceReplica(_StagePart):
    """Stage 2: heads."""

    kind: StageKind = "face"

    @_explained
    async def faces(
        self,
        film: FilmKey,
        shot: int,
        prepared: PreparedWindow,
        landmarks: LandmarksDone | None,
        point: ChainPoint | None,
    ) -> WindowMade:
        return await self.service.faces(film, shot, prepared, landmarks, point)


class PublishingReplica(_Part):
    """Previews and films."""

    def __init__(self, settings: ServerSettings):
        super().__init__(settings)
        self._publishing = Publishing(self.storage, settings.decoding_limits)

    def __del__(self) -> None:
        self._publishing.close()

    @_explained
    async def preview(self, order: WorkOrder, prepared: PreparedWindow, made: WindowMade, number: int) -> None:
        def make() -> None:
            assert prepared.preview is not None
            jpeg = preview(prepared.preview, made.face, order.spec.color_match)
            JobFolder(self.storage, order.job_id).write_preview(number, jpeg)

        await asyncio.to_thread(make)

    async def finish(self, order: WorkOrder) -> AsyncIterator[tuple[int, int] | dict[str, Any]]:
        """Yields frames done and all about once a second, and at last what the job's result says."""
        latest: dict[str, Any] = {"done": 0, "total": 1, "held_at": time.monotonic()}
        stop = threading.Event()

        def on_progress(done: int, total: int) -> None:
            latest.update(done=done, total=total)
            if time.monotonic() - latest["held_at"] > 0.5:
                latest["held_at"] = time.monotonic()
                if not self.held(order):
                    stop.set()
            if stop.is_set():
                raise JobLost(order.job_id)

        given = (order.job_id, order.fence, order.spec, list(order.roles), order.model, on_progress)
        with refused(self.storage):
            work = asyncio.create_task(asyncio.to_thread(self._publishing.finish, *given))
            try:
                while not (await asyncio.wait([work], timeout=1.0))[0]:
                    yield latest["done"], latest["total"]
                yield await work
            finally:
                stop.set()


class ServeStages:
    """The stages as handles of deployments. Implements `tccp.serving.conductor.Stages`."""

    def __init__(self, handles: Mapping[str, DeploymentHandle]):
        self._handles = handles

    async def analyse(self, order: WorkOrder) -> AsyncIterator[tuple[str, float]]:
        with without_ray():
            async for event in self._handles["preparation"].options(stream=True).analyse.remote(order):
                yield event

    async def prepared(self, order: WorkOrder, first: int, num_frames: int) -> PreparedWindow:
        return await self._called("preparation", "prepared", order, first, num_frames)

    async def landmarks(
        self, film: FilmKey, shot: int, prepared: PreparedWindow, point: ChainPoint | None
    ) -> LandmarksDone:
        return await self._called("landmarks", "landmarks", film, shot, prepared, point)

    async def faces(
        self,
        film: FilmKey,
        shot: int,
        prepared: PreparedWindow,
        landmarks: LandmarksDone | None,
        point: ChainPoint | None,
    ) -> WindowMade:
        return await self._called("faces", "faces", film, shot, prepared, landmarks, point)

    async def preview(self, order: WorkOrder, prepared: PreparedWindow, made: WindowMade, number: int) -> None:
        await self._called("publishing", "preview", order, prepared, made, number)

    async def finish(self, order: WorkOrder) -> AsyncIterator[tuple[int, int] | dict[str, Any]]:
        with without_ray():
            async for event in self._handles["publishing"].options(stream=True).finish.remote(order):
                yield event

    async def _called(self, part: str, method: str, *given: Any) -> Any:
        with without_ray():
            return await getattr(self._handles[part], method).remote(*given)


class ConductorReplica(_Part):
    """Leads jobs through the stages, and removes what nobody needs any more."""

    def __init__(self, settings: ServerSettings, handles: dict[str, DeploymentHandle]):
        super().__init__(settings)
        rules = Rules(settings.slots, settings.chains, settings.lease_s, settings.most_failures)
        from ray.util.metrics import Counter

        attempts = Counter("tccp_attempts", description="Attempts of jobs, by how they ended.", tag_keys=("how",))
        self._conductor = Conductor(
            self.store,
            self.storage,
            ServeStages(handles),
            rules,
            on_ended=lambda job_id, how: attempts.inc(1, tags={"how": how}),
        )
        loop = asyncio.get_running_loop()  # Serve makes replicas in the loop in which their methods run
        self._tasks = [loop.create_task(self._conductor.run()), loop.create_task(self._clean())]
        if settings.webhooks and settings.webhook_secret is not None:
            self._tasks.append(loop.create_task(deliver_forever(self.store, settings.webhook_secret)))

    async def __del__(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def check_health(self) -> None:
        """Serve starts the replica again if this raises."""
        if self._tasks[0].done():
            raise RuntimeError("the conductor has ended")
        if time.monotonic() - self._conductor.beat > self.settings.stuck_s:
            raise RuntimeError("the conductor hangs")

    async def working_on(self) -> list[str]:
        return self._conductor.working_on

    async def _clean(self) -> None:
        """Removes files of jobs that have failed, were cancelled or have expired."""
        while True:
            try:
                await asyncio.to_thread(self._clean_once)
            except Exception as error:
                logger.warning("cleaning failed: %s", error)
            await asyncio.sleep(self.settings.clean_every_s)

    def _clean_once(self) -> None:
        self.store.expire()
        for job in self.store.removable():
            JobFolder(self.storage, job.id).remove()
            self.store.removed(job.id)
        for file_id in self.store.drop_expired_files():
            self.storage.remove(f"files/{file_id}")


def ingress_app(settings: ServerSettings, handles: dict[str, DeploymentHandle]) -> Any:
    """The HTTP application of the ingress."""
    from tccp.serving.api import create_app
    from tccp.serving.api.server import Server

    storage, store = Folder(settings.storage), JobStore(settings.store_url)

    async def find_heads(path: Path) -> tuple[int, int, bytes, list[list[float]]]:
        name = f"uploads/{path.name}"
        await asyncio.to_thread(_copy_in, storage, path, name)
        try:
            with without_ray():
                return await handles["preparation"].heads.remote(name)
        finally:
            await asyncio.to_thread(storage.remove, name)

    async def problems() -> list[str]:
        found = []
        statuses = await asyncio.to_thread(lambda: serve.status().applications)
        for application in statuses.values():
            for name, one in application.deployments.items():
                if str(one.status) not in ("HEALTHY", "DeploymentStatus.HEALTHY"):
                    found.append(f"{name} is {one.status}")
        return found

    server = Server(
        store,
        storage,
        settings.versions,
        find_heads,
        problems,
        settings.limits,
        settings.owners,
        settings.webhook_secret if settings.webhooks else None,
    )
    return create_app(server)


class IngressReplica:
    """The HTTP application, made in the replica."""

    def __init__(self, settings: ServerSettings, handles: dict[str, DeploymentHandle], conductor: DeploymentHandle):
        self._settings, self._handles = settings, handles
        self._conductor = conductor  # so that it is part of the application

    def __serve_build_asgi_app__(self) -> Any:
        return ingress_app(self._settings, self._handles)


def _copy_in(storage: Folder, path: Path, name: str) -> None:
    import shutil

    with storage.writing(name) as target:
        shutil.copyfile(path, target)


def _deployment(replica: type, name: str, ongoing: int, cpus: float) -> Any:
    # Not as a decorator: Ray would then copy the class into its replicas, instead of importing it there.
    return serve.deployment(
        name=name,
        max_ongoing_requests=ongoing,
        ray_actor_options={"num_cpus": cpus},
        health_check_period_s=_HEALTH_S,
        graceful_shutdown_timeout_s=_DRAIN_S,
    )(replica)


def parts(settings: ServerSettings) -> tuple[dict[str, Any], Any]:
    """The application without its ingress: the stages by name, and the conductor. settings: `pinned`."""
    gpu = {"num_gpus": settings.gpus_per_stage} if settings.gpus_per_stage else {}
    stage_options: dict[str, Any] = {"ray_actor_options": {"num_cpus": settings.stage_cpus, **gpu}}
    if settings.max_replicas > 1:
        stage_options["num_replicas"] = None
        stage_options["autoscaling_config"] = {
            "min_replicas": settings.min_replicas,
            "max_replicas": settings.max_replicas,
            "target_ongoing_requests": 1.5 * (settings.batch or _UNMEASURED_BATCH),
            "upscale_delay_s": 10.0,
            "downscale_delay_s": 120.0,
        }
    several = {"num_replicas": settings.cpu_replicas}
    handles = {
        "preparation": _deployment(PreparationReplica, "Preparation", 32, 0.2).options(**several).bind(settings),
        "landmarks": _deployment(LandmarkReplica, "LandmarkStage", 64, 0.5).options(**stage_options).bind(settings),
        "faces": _deployment(FaceReplica, "FaceStage", 64, 0.5).options(**stage_options).bind(settings),
        "publishing": _deployment(PublishingReplica, "Publishing", 16, 0.2).options(**several).bind(settings),
    }
    conductor = _deployment(ConductorReplica, "Conductor", 100, 0.1)
    return handles, conductor.options(num_replicas=settings.conductors).bind(settings, handles)


def app(settings: ServerSettings | dict[str, Any]) -> Application:
    """Builds the application. Config files of Serve name it as `tccp.serving.deployments:app`.

    settings: Serve hands over the arguments of a config file as a dict. Raises TccpError for settings that are wrong.
    """
    settings = (settings if isinstance(settings, ServerSettings) else ServerSettings.given(settings)).pinned()
    handles, conductor = parts(settings)
    ingress = _deployment(serve.ingress()(IngressReplica), "Ingress", 200, 0.2)
    built: Application = ingress.bind(settings, handles, conductor)
    return built
