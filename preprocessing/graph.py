"""The graph: films to parts of a clip table, or straight to clip rows; in this process, or on Ray Data, same steps.

    sources -> FindReels -> Look -> CutClips -> parts in the output folder (`preprocessing.run` makes the table of them)
                                 -> ClipRows -> rows, for training straight from film

Steps are in `preprocessing.steps`; what is kept between runs in `preprocessing.parts`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from preprocessing.lip_step import AddLips, DrawLips, LipWork
from preprocessing.plan import Plan
from preprocessing.steps import ClipRows, CutClips, FindReels, Look, OnFrame, Work
from tccp.clips.clip_table import ClipTable
from tccp.clips.windows import windows
from tccp.cluster import could_have
from tccp.config import Settings
from tccp.errors import TccpError
from tccp.files import is_url
from tccp.processes import importable_in_children

# In this process


def in_this_process(listing: pa.Table, work: Work, on_frame: OnFrame = lambda: None) -> Iterator[dict[str, Any]]:
    """Rows of RESULT_SCHEMA, one reel after the other."""
    yield from _chained(listing, work, CutClips, on_frame, lambda table: table.to_pylist())


def clip_rows(listing: pa.Table, plan: Plan) -> Iterator[pa.Table]:
    """Rows of the clip table straight from film, in the table's order; nothing is stored."""
    yield from _chained(listing, Work(plan, None), ClipRows, lambda: None, lambda table: [table])


def _chained(
    listing: pa.Table, work: Work, last: type[CutClips], on_frame: OnFrame, out: Callable[[pa.Table], list]
) -> Iterator[Any]:
    find, look, cut = FindReels(work), Look(work, on_frame), last(work, on_frame)
    try:
        for row in range(listing.num_rows):
            for reel in find(listing.slice(row, 1)):
                for looked in look(reel):
                    for done in cut(looked):
                        yield from out(done)
    finally:
        for step in (find, look, cut):
            step.close()


# On Ray


@dataclass(frozen=True)
class Pools:
    """How many actors each step has, and what each asks for; CPUs are logical, and a step that waits takes none."""

    find: int
    look: int
    cut: int
    look_gpus: float = 0.0
    scale: float = 1.0  # of what each actor asks for

    FIND_CPUS = 0.25
    LOOK_CPUS = 0.5
    CUT_CPUS = 0.25
    LIPS_CPUS = 0.5
    WINDOWS_CPUS = 0.25


def pools_for(
    resources: Mapping[str, float], workers: int | None, on_gpu: bool, held: float = 0.0, later: float = 0.0
) -> Pools:
    """Pools that fit a cluster of these resources, two CPUs included. workers: how many look at films at once.

    on_gpu: the detector runs on GPUs where there are any, one each. held: CPUs that a training's ranks have taken; in
    what they leave, everything fits, as actors then ask for less. later: CPUs that further steps ask for.
    Raises TccpError if the cluster has no CPU for it.
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


_BLOCK_BYTES = 1 << 20  # about a reel: larger blocks would send a film's reels to one worker
_MOST_BLOCKS = 2000


@contextmanager
def ray_running(workers: int | None) -> Iterator[None]:
    """The Ray cluster of RAY_ADDRESS or of this process; else one on this machine, while the context is open."""
    try:
        import ray
    except ImportError:
        raise TccpError("more than one worker needs Ray: pip install -c constraints.txt -e '.[preprocess]'") from None
    if ray.is_initialized():
        yield
        return
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False)
    else:
        importable_in_children()
        cpus = max(os.cpu_count() or 1, workers or 1)
        os.environ.setdefault("RAY_DATA_LOG_LEVEL", "ERROR")  # our progress and report say it all
        ray.init("local", num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _data_context(in_order: bool) -> Iterator[None]:
    import ray.data

    context = ray.data.DataContext.get_current()
    names = ("target_max_block_size", "target_min_block_size", "enable_progress_bars")
    before = {name: getattr(context, name) for name in names}
    kept_order = context.execution_options.preserve_order
    context.target_max_block_size, context.target_min_block_size = _BLOCK_BYTES, 1
    context.enable_progress_bars = False
    context.execution_options.preserve_order = in_order
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)
        context.execution_options.preserve_order = kept_order


def on_ray_data(listing: pa.Table, work: Work, workers: int | None) -> Iterator[dict[str, Any]]:
    """Rows of RESULT_SCHEMA, as they are done."""
    with ray_running(workers):
        _check_nodes(work)
        with _data_context(in_order=False):
            pools = pools_for(could_have(), workers, _uses_gpus(work))
            yield from _graph(listing, work, pools, CutClips).iter_rows()


def clip_dataset(listing: pa.Table, plan: Plan, workers: int | None = None) -> Any:
    """A Ray Dataset of clip rows straight from film; within `in_order`, in the table's order.

    Ray must be running. Nothing is stored but what Ray has in flight.
    """
    work = Work(plan, None)
    return _graph(listing, work, pools_for(could_have(), workers, _uses_gpus(work)), ClipRows)


def table_dataset(table: str | Path) -> Any:
    """A Ray Dataset of the clip rows of a table, in its order."""
    with ClipTable(str(table)) as opened:
        ids = opened.ids
    return _batches(ids).map_batches(_rows_of, fn_kwargs={"table": str(table)}, batch_size=1, batch_format="pyarrow")


def _batches(clip_ids: Sequence[str]) -> Any:
    import ray

    step = -(-len(clip_ids) // _MOST_BLOCKS)
    blocks = [pa.table({"clip_id": clip_ids[row : row + step]}) for row in range(0, len(clip_ids), step)]
    return ray.data.from_blocks(blocks)


def _rows_of(batch: pa.Table, table: str) -> pa.Table:
    with ClipTable(table) as opened:
        return opened.rows(batch.column("clip_id").to_pylist())


def with_lips(
    clips: Any, work: LipWork, table: str | Path | None = None, workers: int = 1, cpus: float = Pools.LIPS_CPUS
) -> Any:
    """A Dataset of clip rows with their lips (`AddLips`), by as many workers. table: where lips may be already."""
    return _map_actors(clips, AddLips, (work, None if table is None else str(table)), workers, cpus)


def draw_lips(
    table: str, clip_ids: Sequence[str], work: LipWork, workers: int | None = None, on_ray: bool = False
) -> Iterator[dict[str, Any]]:
    """Draws lips beside a table; rows of DRAWN_SCHEMA as they are done. On Ray, `ray_running` must be open."""
    if not clip_ids:
        return
    if on_ray:
        size = pools_for(could_have(), workers, on_gpu=False).look
        with _data_context(in_order=False):
            yield from _map_actors(_batches(clip_ids), DrawLips, (work, table), size, Pools.LIPS_CPUS).iter_rows()
        return
    draw = DrawLips(work, table)
    try:
        for clip_id in clip_ids:
            yield from draw(pa.table({"clip_id": [clip_id]})).to_pylist()
    finally:
        draw.close()


@contextmanager
def in_order() -> Iterator[None]:
    """Within it, Datasets of this module come out in the order of their sources, however many workers there are."""
    with _data_context(in_order=True):
        yield


def window_dataset(
    clips: Any,
    settings: Settings,
    window: int,
    stride: int,
    draws: Sequence[int | None] = (0,),
    cpus: float = Pools.WINDOWS_CPUS,
) -> Any:
    """Training windows of a Dataset of clip rows (`tccp.clips.windows.windows`), from film or table, in its order."""
    arguments = {"settings": settings, "window": window, "stride": stride, "seed": settings.seed, "jitters": draws}
    return clips.map_batches(windows, fn_kwargs=arguments, batch_size=1, batch_format="pyarrow", num_cpus=cpus)


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

    Each epoch shows the next of the jitter draws. held: CPUs of the cluster that the training itself has taken. Ray
    must be running. Nothing is stored.
    """
    work = Work(plan, None)
    later = Pools.WINDOWS_CPUS + (Pools.LIPS_CPUS if lips is not None else 0.0)
    pools = pools_for(could_have(), None, _uses_gpus(work), held, later)
    with in_order():
        clips = _graph(listing, work, pools, ClipRows)
        if lips is not None:
            clips = with_lips(clips, lips, cpus=Pools.LIPS_CPUS * pools.scale)
        draws = (epoch % settings.headbox.draws,)
        cpus = Pools.WINDOWS_CPUS * pools.scale
        yield from window_dataset(clips, settings, window, stride=1, draws=draws, cpus=cpus).iter_rows()


def _uses_gpus(work: Work) -> bool:
    return work.plan.backend == "fan"


def _graph(listing: pa.Table, work: Work, pools: Pools, last: type[CutClips]) -> Any:
    import ray

    step = -(-listing.num_rows // _MOST_BLOCKS)
    blocks = [listing.slice(row, step) for row in range(0, listing.num_rows, step)]
    data = ray.data.from_blocks(blocks)
    for kind, size, cpus, gpus in (
        (FindReels, pools.find, Pools.FIND_CPUS, 0.0),
        (Look, pools.look, Pools.LOOK_CPUS, pools.look_gpus),
        (last, pools.cut, Pools.CUT_CPUS, 0.0),
    ):
        data = _map_actors(data, kind, (work,), size, cpus * pools.scale, gpus)
    return data


def _map_actors(data: Any, kind: type, arguments: tuple, size: int, cpus: float, gpus: float = 0.0) -> Any:
    import ray

    return data.map_batches(
        kind,
        fn_constructor_args=arguments,
        compute=ray.data.ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=2),
        num_cpus=cpus,
        num_gpus=gpus,
        batch_size=1,
        batch_format="pyarrow",
        zero_copy_batch=True,
    )


def _check_nodes(work: Work) -> None:
    import ray

    alive = [node for node in ray.nodes() if node["Alive"]]
    if len(alive) > 1 and work.out is not None and not is_url(work.out):
        raise TccpError(
            f"{work.out} is a folder of one machine, and the cluster has {len(alive)}: give a URL (s3://..., "
            "gs://...), or file:///... for a folder that all of them share"
        )
