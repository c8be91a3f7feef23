"""A worker of benchmarks/serve.py: the server's store, conductor and stage loops in one process, with prepared windows.

There is no HTTP, no Ray, no decoding and no encoding of films: what is measured is what batching changes.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import logging
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from speed_workers import serve

from tccp.config import Settings
from tccp.diffusion.batching import Sampler
from tccp.files import Folder
from tccp.inference.components import Components, load_components
from tccp.inference.conditioning import identity_picture
from tccp.inference.film_windows import SceneWindow, scene_window
from tccp.inference.frames import SceneFrame
from tccp.inference.head_tracks import HeadTrack
from tccp.inference.pipeline_source import component_names, pipeline_folder
from tccp.models import traced
from tccp.models.variants import TWO_STAGE
from tccp.roundtable import RoundTableClip, synthesise
from tccp.serving.batch_limit import device_name, growing, limit_of, step_seconds
from tccp.serving.conductor import Conductor, Rules, WorkOrder
from tccp.serving.job_folder import JobFolder, Plan, Shot
from tccp.serving.publishing import PreparedWindow
from tccp.serving.spec import VideoSpec
from tccp.serving.stage_service import StageService, WindowMade
from tccp.serving.store import JobStore, NewJob
from tccp.serving.window_loop import WindowLoop
from tccp.serving.work import ChainPoint, FilmKey, LandmarksDone, Task

KINDS = ("landmark", "face")
UNTIMED = 3
_FRAMES = 42  # of the clip in which films start their windows
traced.EAGER_CALLS = 0  # a shape is recorded when it first occurs: a benchmark is short


@functools.cache
def _components(weights: str, device: str) -> Components:
    folder = pipeline_folder(weights, component_names(TWO_STAGE))
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    return load_components(Path(folder), TWO_STAGE, device=device, dtype=dtype)


def networks(weights: str, device: str, longest_step_s: float) -> dict[str, Any]:
    """Step curves of all networks, and the limits that follow from those of the sequence networks."""
    components = _components(weights, device)
    found: dict[str, Any] = {"device": device_name(components.device), "threads": torch.get_num_threads()}
    for kind in KINDS:
        stage = components.stage(f"{kind}_sequence", traced=True)  # type: ignore[arg-type]
        for part, network in (("first", stage.first), ("sequence", stage.sequence)):
            curve = growing(functools.partial(step_seconds, network, components.device, untimed=UNTIMED))
            found[f"{kind}_{part}"] = {"rows": curve.rows, "seconds": curve.seconds}
        found[f"{kind}_limit"] = limit_of(curve, longest_step_s)
    return found


def record(weights: str, device: str, limit: int) -> int:
    """Lets the networks be recorded for all sizes up to the limit, as they are in a server that has run for a while."""
    components = _components(weights, device)
    for kind in KINDS:
        stage = components.stage(f"{kind}_sequence", traced=True)  # type: ignore[arg-type]
        for network, rows in itertools.product((stage.first, stage.sequence), range(1, limit + 1)):
            step_seconds(network, components.device, rows, untimed=UNTIMED, repeats=1)
    return limit


class _Times:
    """Wall seconds of what the loops do, by stage and part."""

    def __init__(self) -> None:
        self.steps: defaultdict[tuple[str, int], list[float]] = defaultdict(list)
        self.parts: defaultdict[str, list[float]] = defaultdict(list)

    def wrap(self, owner: Any, name: str, part: str) -> None:
        function = getattr(owner, name)

        @functools.wraps(function)
        def timed(loop: Any, *given: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(loop, *given)
            finally:
                self.parts[f"{loop.kind}_{part}"].append(time.perf_counter() - began)

        setattr(owner, name, timed)

    def watch(self) -> None:
        """Replaces methods of the loop and the sampler by timed ones, for this process."""
        self.wrap(WindowLoop, "_begin", "begin")
        self.wrap(WindowLoop, "_finish", "finish")
        step = Sampler.step

        def timed_step(sampler: Sampler) -> Any:
            began = time.perf_counter()
            finished = step(sampler)
            rows = sum(job.state.num_rows for job in sampler.last)
            part = "sequence" if sampler.last[0].state.latents.shape[1] > 1 else "first"
            kind = threading.current_thread().name.split()[0]
            self.steps[f"{kind}_{part}", rows].append(time.perf_counter() - began)
            return finished

        Sampler.step = timed_step  # type: ignore[method-assign]

    def clear(self) -> None:
        self.steps.clear()
        self.parts.clear()


_TIMES = _Times()


_WINDOWS: dict[tuple[int, int], SceneWindow] = {}


@functools.cache
def _clip() -> RoundTableClip:
    return synthesise(1, (_FRAMES + 16) / 25, width=128, height=96)


def _window(settings: Settings, first: int, num_frames: int) -> SceneWindow:
    """The inputs of some frames of the clip."""
    clip = _clip()
    numbers = range(first, first + num_frames)
    frames = [SceneFrame(number, clip.render(number), clip.head_box[number], False) for number in numbers]
    return scene_window(frames, clip.audio, settings)


class _Stages:
    """Implements `tccp.serving.conductor.Stages`: real stage loops; everything else is ready at once."""

    def __init__(self, components: Components, store: JobStore, storage: Folder, limit: int, continuous: bool):
        self._storage = storage
        self.shots: dict[str, list[int]] = {}
        self.made: list[float] = []
        self.gaps: defaultdict[str, list[float]] = defaultdict(list)
        self._times: dict[tuple[Any, ...], float] = {}
        self.loops = {
            kind: WindowLoop(kind, lambda version: components, store.still_held, limit, continuous)  # type: ignore[arg-type]
            for kind in KINDS
        }
        for kind, loop in self.loops.items():
            self._watch(kind, loop)
        self.services = {kind: StageService(loop, storage) for kind, loop in self.loops.items()}
        self._settings = components.settings
        self._clip = _clip()

    def close(self) -> None:
        for loop in self.loops.values():
            loop.close()

    async def analyse(self, order: WorkOrder) -> AsyncIterator[tuple[str, float]]:
        lengths = self.shots[order.job_id]
        starts = [0, *itertools.accumulate(lengths)]
        frames = starts.pop()
        plan = Plan(
            num_frames=frames,
            width=self._clip.width,
            height=self._clip.height,
            window=self._settings.window,
            picture_px=self._settings.picture_px,
            shots=tuple(Shot(start, length) for start, length in zip(starts, lengths, strict=True)),
            warnings=(),
            track=HeadTrack(np.tile(self._clip.head_box[:1], (frames, 1))),
            identity=identity_picture(self._clip.identity, self._settings.picture_px),
        )
        await asyncio.to_thread(JobFolder(self._storage, order.job_id).write_plan, plan)
        yield "prepared", 1.0

    async def prepared(self, order: WorkOrder, first: int, num_frames: int) -> PreparedWindow:
        place = first % _FRAMES, num_frames
        if place not in _WINDOWS:
            _WINDOWS[place] = _window(self._settings, *place)
        return PreparedWindow(replace(_WINDOWS[place], first=first))

    async def landmarks(
        self, film: FilmKey, shot: int, prepared: PreparedWindow, point: ChainPoint | None
    ) -> LandmarksDone:
        return await self.services["landmark"].landmarks(film, shot, prepared, point)

    async def faces(
        self,
        film: FilmKey,
        shot: int,
        prepared: PreparedWindow,
        landmarks: LandmarksDone | None,
        point: ChainPoint | None,
    ) -> WindowMade:
        made = await self.services["face"].faces(film, shot, prepared, landmarks, point)
        self.made.append(time.monotonic())
        return made

    def _watch(self, kind: str, loop: WindowLoop) -> None:
        """Notes how long a chain that could go on is in no loop after a window: `gaps`."""
        submit = loop.submit

        def timed(task: Task) -> Any:
            now, claim = time.perf_counter(), (task.film.job_id, task.film.fence)
            chain = (*claim, task.shot)
            left = self._times.get(("done", kind, *chain))
            # Stage 2 waits for stage 1's window, stage 1 for stage 2 where it is far ahead.
            needed = ("made", *claim, task.window.first) if kind == "face" else ("taken", *chain)
            other = self._times.get(needed, 0.0)
            if left is not None and (kind == "landmark" or other <= left):
                self.gaps[kind].append(now - max(left, other))
            if kind == "face":
                self._times["taken", *chain] = now
            future = submit(task)

            def done(_: Any) -> None:
                self._times["done", kind, *chain] = time.perf_counter()
                if kind == "landmark":
                    self._times["made", *claim, task.window.first] = time.perf_counter()

            future.add_done_callback(done)
            return future

        loop.submit = timed  # type: ignore[method-assign]

    async def preview(self, order: WorkOrder, prepared: PreparedWindow, made: WindowMade, number: int) -> None:
        pass

    async def finish(self, order: WorkOrder) -> AsyncIterator[tuple[int, int] | dict[str, Any]]:
        yield {}


def play(
    weights: str,
    device: str,
    trace: list[dict[str, Any]],
    limit: int,
    continuous: bool,
    slots: int,
    during_s: float | None = None,
) -> dict[str, Any]:
    """Plays a trace of jobs (benchmarks/serve_scale.py, `TraceJob`) and waits until all have ended.

    during_s: the windows made until then are counted too; None: until the last one is made.
    """
    components = _components(weights, device)
    _TIMES.clear()
    with tempfile.TemporaryDirectory(prefix="tccp-bench-") as place:
        store, storage = JobStore(f"sqlite:///{place}/jobs.db"), Folder(Path(place) / "storage")
        stages = _Stages(components, store, storage, limit, continuous)
        try:
            before = time.process_time()
            found = asyncio.run(_play(store, storage, stages, trace, Rules(slots=slots), during_s))
            cpu_s = time.process_time() - before
        finally:
            stages.close()
            store.close()
    counts = [loop.counts for loop in stages.loops.values()]
    costs: dict[str, Any] = {name: statistics.mean(values) for name, values in _TIMES.parts.items()}
    steps: dict[str, dict[int, list[float]]] = defaultdict(dict)
    for (network, size), taken in sorted(_TIMES.steps.items()):
        steps[network][size] = [statistics.mean(taken), len(taken)]
    return found | {
        "cpu_s": round(cpu_s, 3),
        "rows_per_evaluation": round(sum(one.rows for one in counts) / sum(one.evaluations for one in counts), 3),
        "busy": {kind: round(loop.counts.busy_s / found["took_s"], 3) for kind, loop in stages.loops.items()},
        "costs": {name: round(value, 5) for name, value in costs.items()}
        | {f"{kind}_gap": round(statistics.median(gaps), 5) for kind, gaps in stages.gaps.items()},
        "steps": {network: {str(size): pair for size, pair in sizes.items()} for network, sizes in steps.items()},
    }


async def _play(
    store: JobStore,
    storage: Folder,
    stages: _Stages,
    trace: list[dict[str, Any]],
    rules: Rules,
    during_s: float | None,
) -> dict[str, Any]:
    ids = [f"video_{number:06d}" for number in range(len(trace))]
    conductor = Conductor(store, storage, stages, rules)
    began = time.monotonic()
    task = asyncio.create_task(conductor.run())
    for job_id, job in zip(ids, trace, strict=True):
        await asyncio.sleep(max(0.0, began + job["arrival_s"] - time.monotonic()))
        guidance = 1.5 if job["guided"] else 1.0
        spec = VideoSpec(consent="nobody: noise", steps=job["steps"], guidance_scale=guidance)
        stages.shots[job_id] = job["shots"]
        new = NewJob(job_id, f"owner {job['owner']}", spec.model_dump(mode="json"), {}, "default", "v", "", 3600.0)
        await asyncio.to_thread(functools.partial(store.add, new, most_waiting=10**6, most_of_owner=10**6))
    while {"queued", "in_progress"} & (await asyncio.to_thread(store.counts)).keys():
        assert not task.done(), task.result()
        await asyncio.sleep(0.5)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    jobs = [job for job_id in ids if (job := store.get(job_id)) is not None]
    assert {job.status for job in jobs} == {"completed"}, [job.error_message for job in jobs]
    latencies = [job.completed_at - job.created_at for job in jobs if job.completed_at is not None]
    took = max(stages.made) - began
    until = took if during_s is None else during_s
    return {
        "jobs": len(jobs),
        "windows": len(stages.made),
        "took_s": round(took, 3),
        "windows_s": round(sum(made - began <= until for made in stages.made) / until, 3),
        "latencies_s": [round(latency, 3) for latency in latencies],
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.basicConfig(stream=sys.stderr, level=logging.ERROR)
    _TIMES.watch()
    serve({"networks": networks, "record": record, "play": play})
