"""The graph of preprocessing steps, from films to parts of a clip table or to clip rows, in one process or on Ray Data.

    sources -> FindReels -> Look -> CutClips -> parts in the output folder (`preprocessing.run` makes the table of them)
                                 -> ClipRows -> rows, for training straight from film

`preprocessing.steps` has the steps, `preprocessing.parts` the files that runs keep.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from preprocessing.analysis.detectors import MOST_DETECTORS
from preprocessing.frame_progress import FrameProgress, ReelKey
from preprocessing.lip_step import AddLips, LipWork, RenderLips
from preprocessing.plan import Plan
from preprocessing.steps import ClipRows, CutClips, FindReels, FrameListener, Look, Work
from preprocessing.worker_frames import frames_of_workers
from tccp.clips.clip_table import ClipTable
from tccp.clips.windows import windows
from tccp.cluster import data_settings, dataset, max_resources, num_nodes
from tccp.config import Settings
from tccp.errors import TccpError
from tccp.files import Folder, check_shared
from tccp.threads import usable_cores

# In this process


def in_this_process(
    listing: pa.Table, work: Work, frames: FrameProgress | None = None, overlap: bool = True
) -> Iterator[dict[str, Any]]:
    """Rows of RESULT_SCHEMA in the order of the listing, without Ray. frames: is told of every reel and frame.

    overlap: look at the next reel, in a thread, while the clips of this one are cut, and at several frames at once if
    the detector can. The rows are the same without.
    """
    yield from _chained(listing, work, CutClips, lambda table: table.to_pylist(), frames, overlap)


def clip_rows(listing: pa.Table, plan: Plan) -> Iterator[pa.Table]:
    """Rows of the clip table straight from film, in the table's order; nothing is stored."""
    yield from _chained(listing, Work(plan, None), ClipRows, lambda table: [table])


class _Stopped(Exception):
    """Ends the thread that looks ahead, at its next frame."""


class _OwnFrames:
    """Counts the frames of one step of this process. Each step has its own one, because steps overlap."""

    def __init__(self, frames: FrameProgress | None) -> None:
        self._frames = frames
        self._reel: ReelKey = (-1, -1)
        self.stopped = False

    def begin(self, reel: ReelKey) -> None:
        self._reel = reel

    def on_frame(self) -> None:
        if self.stopped:
            raise _Stopped
        if self._frames is not None:
            self._frames.on_frame(self._reel)


def _chained(
    listing: pa.Table,
    work: Work,
    last: type[CutClips],
    out: Callable[[pa.Table], list],
    frames: FrameProgress | None = None,
    overlap: bool = True,
) -> Iterator[Any]:
    looking, cutting = _OwnFrames(frames), _OwnFrames(frames)
    detectors = min(usable_cores(), MOST_DETECTORS) if overlap else 1
    find, look, cut = FindReels(work), Look(work, looking, detectors), last(work, cutting)
    try:
        reels = (reel for row in range(listing.num_rows) for reel in find(listing.slice(row, 1)))
        begun = (_begin(frames, reel) for reel in reels)
        plain = (_only(look(reel)) for reel in begun)
        with closing(_looked_ahead(begun, look, looking) if overlap else plain) as all_looked:
            for looked in all_looked:
                for done in cut(looked):
                    yield from out(done)
    finally:
        for step in (find, look, cut):
            step.close()


def _begin(frames: FrameProgress | None, reel: pa.Table) -> pa.Table:
    if frames is not None:
        names = "order", "start_frame", "num_frames", "share"
        order, start_frame, num_frames, share = (reel.column(name)[0].as_py() for name in names)
        frames.begin((order, start_frame), num_frames, share)
    return reel


def _only(batches: Iterator[pa.Table]) -> pa.Table:
    (batch,) = batches
    return batch


def _looked_ahead(
    reels: Iterator[pa.Table], look: Callable[[pa.Table], Iterator[pa.Table]], listener: _OwnFrames
) -> Generator[pa.Table, None, None]:
    """The reels after `look`, which runs in a thread, one reel ahead of the caller.

    An error comes where it would come without the thread: after the caller is done with the reels before.
    """
    with ThreadPoolExecutor(1, "tccp-look") as thread:

        def begin_next() -> Future[pa.Table] | None:
            try:
                reel = next(reels, None)
                return None if reel is None else thread.submit(lambda: _only(look(reel)))
            except Exception as error:
                failed: Future[pa.Table] = Future()
                failed.set_exception(error)
                return failed

        try:
            coming = begin_next()
            while coming is not None:
                looked = coming.result()
                coming = begin_next()
                yield looked
        finally:
            listener.stopped = True


# On Ray


@dataclass(frozen=True)
class Pools:
    """Number of actors of each step, and the resources of each. CPUs are logical: an idle step uses none."""

    find: int
    look: int
    cut: int
    look_gpus: float = 0.0
    scale: float = 1.0  # factor on the CPUs of each actor

    FIND_CPUS = 0.25
    LOOK_CPUS = 0.5
    CUT_CPUS = 0.25
    LIPS_CPUS = 0.5
    WINDOWS_CPUS = 0.25


def pools_for(
    resources: Mapping[str, float], workers: int | None, on_gpu: bool, held: float = 0.0, later: float = 0.0
) -> Pools:
    """Pools that fit a cluster of these resources; two CPUs are enough.

    workers: number of actors that look at films. on_gpu: each of them takes a GPU, if the cluster has any. held: CPUs
    that a training's ranks have taken; actors then ask for less, so that all fit into the rest. later: CPUs that
    further steps ask for.
    Raises TccpError if the cluster has too few CPUs.
    """
    cpus, gpus = float(resources.get("CPU", 0)) - held, int(resources.get("GPU", 0))
    least = Pools.FIND_CPUS + Pools.LOOK_CPUS + Pools.CUT_CPUS
    scale = min(1.0, max(cpus, 0.1) / (least + later)) if held else 1.0
    if cpus < least * scale:
        raise TccpError(f"the Ray cluster has {cpus:g} CPUs, preprocessing needs {least:g}: start Ray with more")
    look = max(1, int(cpus)) if workers is None else workers
    if on_gpu and gpus:
        look = min(look, gpus)
    while look > 1 and (_cpus(look) + later) * scale > cpus:
        look -= 1
    return Pools(max(1, look // 4), look, max(1, look // 2), 1.0 if on_gpu and gpus else 0.0, scale)


def _cpus(look: int) -> float:
    return max(1, look // 4) * Pools.FIND_CPUS + look * Pools.LOOK_CPUS + max(1, look // 2) * Pools.CUT_CPUS


_BLOCK_BYTES = 1 << 20  # about a reel: larger blocks would send all reels of a film to one worker


def on_ray_data(
    listing: pa.Table, work: Work, workers: int | None, frames: FrameProgress | None = None
) -> Iterator[dict[str, Any]]:
    """Rows of RESULT_SCHEMA as reels are done. Ray must be running. frames: is told of the workers' frames.

    Raises TccpError if the output is a folder of one machine, and the cluster has, or can grow to, several.
    """
    if work.out is not None:
        check_shared("output", Folder(work.out), num_nodes())
    with data_settings(in_order=False, block_bytes=_BLOCK_BYTES):
        pools = pools_for(max_resources(), workers, _uses_gpus(work))
        with nullcontext() if frames is None else frames_of_workers(frames) as listener:
            yield from _graph(listing, work, pools, CutClips, listener).iter_rows()


def clip_dataset(listing: pa.Table, plan: Plan, workers: int | None = None) -> Any:
    """A Ray Dataset of clip rows straight from film, within `in_order` in the table's order.

    Ray must be running. Nothing is stored except Ray's blocks in flight.
    """
    work = Work(plan, None)
    return _graph(listing, work, pools_for(max_resources(), workers, _uses_gpus(work)), ClipRows)


def table_dataset(table: str | Path) -> Any:
    """A Ray Dataset of the clip rows of a table, in its order."""
    with ClipTable(str(table)) as opened:
        ids = opened.ids
    return _map_actors(dataset(pa.table({"clip_id": ids})), ReadRows, (str(table),), 1, Pools.CUT_CPUS)


class ReadRows:
    """A Ray Data actor: takes ids of clips, and returns their rows in a clip table."""

    def __init__(self, table: str) -> None:
        self.table = ClipTable(table)

    def __call__(self, batch: pa.Table) -> pa.Table:
        return self.table.rows(batch.column("clip_id").to_pylist())


def with_lips(
    clips: Any, work: LipWork, table: str | Path | None = None, workers: int = 1, cpus: float = Pools.LIPS_CPUS
) -> Any:
    """A Dataset of clip rows with their lips (`AddLips`). table: a clip table beside which lips may exist already."""
    return _map_actors(clips, AddLips, (work, None if table is None else str(table)), workers, cpus)


def render_lips(
    table: str, clip_ids: Sequence[str], work: LipWork, workers: int | None = None, on_ray: bool = False
) -> Iterator[dict[str, Any]]:
    """Renders lips beside a table; returns rows of RENDERED_SCHEMA as clips are done. on_ray: Ray must be running."""
    if not clip_ids:
        return
    if on_ray:
        size = pools_for(max_resources(), workers, on_gpu=False).look
        with data_settings(in_order=False, block_bytes=_BLOCK_BYTES):
            ids = dataset(pa.table({"clip_id": list(clip_ids)}))
            yield from _map_actors(ids, RenderLips, (work, table), size, Pools.LIPS_CPUS).iter_rows()
        return
    step = RenderLips(work, table)
    try:
        for clip_id in clip_ids:
            yield from step(pa.table({"clip_id": [clip_id]})).to_pylist()
    finally:
        step.close()


@contextmanager
def in_order() -> Iterator[None]:
    """Datasets of this module that are made and read within it keep the order of their sources."""
    with data_settings(in_order=True, block_bytes=_BLOCK_BYTES):
        yield


def window_dataset(
    clips: Any,
    settings: Settings,
    window: int,
    stride: int,
    jitters: Sequence[int | None] = (0,),
    workers: int = 1,
    cpus: float = Pools.WINDOWS_CPUS,
) -> Any:
    """Training windows of a Dataset of clip rows (`tccp.clips.windows.windows`), from film or table, in its order.

    workers: most actors that cut windows; one is enough to begin.
    """
    arguments = {"settings": settings, "window": window, "stride": stride, "seed": settings.seed, "jitters": jitters}
    return _map_actors(clips, CutWindows, (arguments,), workers, cpus, at_least=1)


class CutWindows:
    """A Ray Data actor: takes clip rows, and returns their windows.

    Not a Ray task: as many tasks as fit run at a time, and each of their processes imports everything for itself.
    """

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        self.arguments = arguments

    def __call__(self, batch: pa.Table) -> dict[str, np.ndarray]:
        return windows(batch, **self.arguments)


def film_windows(
    epoch: int,
    listing: pa.Table,
    plan: Plan,
    settings: Settings,
    window: int,
    lips: LipWork | None,
    held: float,
) -> Iterator[dict[str, Any]]:
    """The training windows of an epoch straight from film, one at a time, in the order of the films.

    Each epoch uses the next of the jittered views. held: CPUs of the cluster that the training's ranks have taken. Ray
    must be running. Nothing is stored.
    """
    work = Work(plan, None)
    later = Pools.WINDOWS_CPUS + (Pools.LIPS_CPUS if lips is not None else 0.0)
    pools = pools_for(max_resources(), None, _uses_gpus(work), held, later)
    with in_order():
        clips = _graph(listing, work, pools, ClipRows)
        if lips is not None:
            clips = with_lips(clips, lips, cpus=Pools.LIPS_CPUS * pools.scale)
        jitters = (epoch % settings.headbox.draws,)
        cpus = Pools.WINDOWS_CPUS * pools.scale
        cut = window_dataset(clips, settings, window, stride=1, jitters=jitters, workers=pools.cut, cpus=cpus)
        yield from cut.iter_rows()


def _uses_gpus(work: Work) -> bool:
    return work.plan.backend == "fan"


def _graph(
    listing: pa.Table, work: Work, pools: Pools, last: type[CutClips], listener: FrameListener | None = None
) -> Any:
    data = dataset(listing)
    for kind, size, cpus, gpus in (
        (FindReels, pools.find, Pools.FIND_CPUS, 0.0),
        (Look, pools.look, Pools.LOOK_CPUS, pools.look_gpus),
        (last, pools.cut, Pools.CUT_CPUS, 0.0),
    ):
        data = _map_actors(data, kind, (work, listener), size, cpus * pools.scale, gpus)
    return data


def _map_actors(
    data: Any, kind: type, arguments: tuple, size: int, cpus: float, gpus: float = 0.0, at_least: int | None = None
) -> Any:
    """size: number of actors; with `at_least`, the most that Ray starts if the cluster has room for them."""
    import ray

    return data.map_batches(
        kind,
        fn_constructor_args=arguments,
        compute=ray.data.ActorPoolStrategy(
            min_size=size if at_least is None else at_least, max_size=size, max_tasks_in_flight_per_actor=2
        ),
        num_cpus=cpus,
        num_gpus=gpus,
        batch_size=1,
        batch_format="pyarrow",
        zero_copy_batch=True,
    )
