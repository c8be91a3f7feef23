"""The graph: films to a clip table, or straight to clip rows; in this process, or on Ray Data with the same steps.

    sources -> FindReels -> Look -> CutClips -> parts in the output folder -> index and report
                                 -> ClipRows -> rows, for training straight from film

Steps are in `preprocessing.steps`; what is kept between runs in `preprocessing.parts`.
"""

from __future__ import annotations

import datetime
import json
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from preprocessing import parts
from preprocessing.cut import MIN_CLIP_S
from preprocessing.estimate import Estimate, SampleResult, SourceSize, choose_sample, estimate
from preprocessing.page import write_page
from preprocessing.parts import ReelRecord
from preprocessing.plan import Backend, Plan, Speakers, make_plan
from preprocessing.remote import content_hash, version_of
from preprocessing.report import ClipFigures, ReportBuilder, RunReport, SourceReport, StepTime
from preprocessing.sources import find_sources
from preprocessing.steps import ClipRows, CutClips, FindReels, Look, OnFrame, Work, result_record
from tccp.clip import ClipTable
from tccp.config import FPS, Settings, TccpError
from tccp.data import windows
from tccp.files import Folder, is_url
from tccp.media import MediaError
from tccp.progress import progress

REPORT, PAGE = "report.json", "report.html"


class NoClipError(TccpError):
    """None of the sources gave a clip."""


def preprocess(
    sources: Sequence[str | Path],
    out: str | Path,
    settings: Settings,
    backend: Backend = "mediapipe",
    weights: Path | None = None,
    max_clip_s: float = 5.0,
    min_clip_s: float = MIN_CLIP_S,
    speakers: Speakers = "active",
    person: Sequence[str | Path] = (),
    workers: int | None = None,
    on_ray: bool = False,
) -> RunReport:
    """Films, folders, patterns, manifests or URLs of them to a clip table in `out`, with report.json and report.html.

    backend: where landmarks come from: a face detector, or (`truth`) the truth files of RoundTable footage.
    weights: a folder of weights, or the detector's file; by default as in `tccp.weights`.
    max_clip_s, min_clip_s: clips are cut to at most, and at least, so many seconds.
    speakers: `active`, whoever is seen to speak; `main`, who is there most. person: pictures of the one who is wanted.
    workers: processes that look at films: one, in this process, unless more are asked for; they need Ray. on_ray: use
    Ray in any case, with as many as the cluster has CPUs for unless `workers` says.

    What a run before this one has done, with the same settings and versions, is not done again; the table that is there
    stays until the new one is whole. A source that cannot be used is set aside, with a reason, and counted; it stops
    nothing. The same films and settings give the same table.
    Raises TccpError if no source gives a clip (with the first reason), if weights are absent, or if `out` cannot be
    written.
    """
    if workers is not None and workers < 1:
        raise TccpError(f"workers {workers}: give at least 1")
    plan = make_plan(
        settings.picture_px, backend, weights, max_clip_s, min_clip_s, speakers, tuple(str(path) for path in person)
    )
    listing = list_sources(sources)
    folder = Folder(out if is_url(out) else Path(out).absolute())
    with _no_empty_folder(folder):
        return _run(listing, folder, plan, workers, on_ray or (workers or 1) > 1)


def dry_run(
    sources: Sequence[str | Path],
    settings: Settings,
    backend: Backend = "mediapipe",
    weights: Path | None = None,
    max_clip_s: float = 5.0,
    min_clip_s: float = MIN_CLIP_S,
    speakers: Speakers = "active",
    person: Sequence[str | Path] = (),
    workers: int = 1,
    sample: int = 5,
    price_per_cpu_hour: float | None = None,
) -> Estimate:
    """What `preprocess` of these sources would take and give, from running it on a sample of them. Nothing is kept.

    Raises TccpError as `preprocess`, but not for films without clips.
    """
    pictures = tuple(str(path) for path in person)
    plan = make_plan(settings.picture_px, backend, weights, max_clip_s, min_clip_s, speakers, pictures)
    listing = list_sources(sources)
    rows = {row["source"]: (number, row) for number, row in enumerate(listing.to_pylist()) if row["reason"] is None}
    films = [SourceSize(name, row["bytes"] or None) for name, (_, row) in rows.items()]
    measured = []
    chosen = choose_sample(films, sample)
    with progress() as bar, tempfile.TemporaryDirectory(prefix="tccp-dry-run-") as folder:
        task = bar.add_task("measuring films", total=len(chosen))
        for film in chosen:
            number, row = rows[film.source]
            out = Path(folder) / str(number)
            measured.append(_measured(film.source, row["bytes"], listing.slice(number, 1), Work(plan, str(out))))
            shutil.rmtree(out, ignore_errors=True)
            bar.advance(task)
    return estimate(measured, films, workers, price_per_cpu_hour)


def _measured(source: str, file_bytes: int, row: pa.Table, work: Work) -> SampleResult:
    wall, before = time.monotonic(), os.times()
    cpu_s: dict[str, float] = {}
    frames = frames_in_clips = 0
    for result in in_this_process(row, work):
        for name, seconds in json.loads(result["times_s"]).items():
            cpu_s[name] = cpu_s.get(name, 0.0) + seconds
        record, _ = result_record(Folder(work.out or ""), result)
        frames += record.frames if record.clips or result["part"] else 0
        frames_in_clips += record.frames_in_clips
    after = os.times()
    children = after.children_user + after.children_system - before.children_user - before.children_system
    stored = [path.stat().st_size for path in Path(work.out or "").rglob("*") if path.is_file()]
    return SampleResult(
        source,
        file_bytes,
        frames / FPS,
        frames_in_clips / FPS,
        sum(stored),
        cpu_s | {"decode": children},
        time.monotonic() - wall,
    )


def list_sources(given: Sequence[str | Path]) -> pa.Table:
    """Sources with their `order`, and `bytes`; films whose content was listed before are set aside as `duplicate`."""
    table = find_sources(given)
    sizes: list[int] = []
    seen: dict[object, int] = {}
    reasons: list[str | None] = []
    messages: list[str | None] = []
    by_size: dict[int, list[int]] = {}
    paths, names = table.column("path").to_pylist(), table.column("source").to_pylist()
    for number, path in enumerate(paths):
        sizes.append(_size(path))
        by_size.setdefault(sizes[-1], []).append(number)
    for number, path in enumerate(paths):
        reason = message = None
        if sizes[number] and not is_url(path) and len(by_size[sizes[number]]) > 1:
            first = seen.setdefault(_content(path, number), number)
            if first != number:
                reason, message = "duplicate", f"{path}: has the same content as {names[first]}"
        reasons.append(reason)
        messages.append(message)
    for name, column in (
        ("reason", pa.array(reasons, pa.string())),
        ("message", pa.array(messages, pa.string())),
        ("order", pa.array(range(len(paths)), pa.int64())),
        ("bytes", pa.array(sizes, pa.int64())),
    ):
        table = table.append_column(name, column)
    return table


def _size(path: str) -> int:
    try:
        return 0 if is_url(path) else version_of(path)[1]
    except MediaError:
        return 0


def _content(path: str, number: int) -> object:
    try:
        return content_hash(Path(path))
    except OSError:
        return number  # it will be found out, and said, when it is its turn


def _run(listing: pa.Table, folder: Folder, plan: Plan, workers: int | None, on_ray: bool) -> RunReport:
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    clock = time.monotonic()
    work = Work(plan, str(folder))
    builder, entries = ReportBuilder(), []
    sizes = [max(size, 1) / 1e6 for size in listing.column("bytes").to_pylist()]
    with progress() as bar:
        task = bar.add_task("preprocessing, MB of film", total=round(sum(sizes), 3))
        results = on_ray_data(listing, work, workers) if on_ray else in_this_process(listing, work)
        for row in results:
            entries.append(row)
            for name, seconds in json.loads(row["times_s"]).items():
                builder.add(StepTime(name, seconds, 1, row["frames"]))
            bar.update(task, advance=sizes[row["order"]] * row["share"])
        bar.update(task, completed=round(sum(sizes), 3))
    entries.sort(key=lambda row: (row["order"], row["start_frame"]))
    table = _Table(folder, listing.column("source").to_pylist(), entries, builder)
    table.check()
    clips = parts.write_index(folder, table.parts()) if table.any_clip() else 0
    report = table.report(
        plan.record(), started, time.monotonic() - clock, workers or (os.cpu_count() if on_ray else 1) or 1
    )
    if clips or listing.num_rows > 1:  # of one film, the error below says it all
        folder.write(REPORT, report.to_json(pictures=False).encode())
        with folder.writing(PAGE) as path:
            write_page(report, path)
    if not clips:
        raise NoClipError(_no_clip(report.sources))
    parts.remove_stale(folder, plan, table.used)
    return report


class _Table:
    """What the parts add up to, gone through in the order of the sources, one part in memory at a time."""

    def __init__(self, folder: Folder, names: Sequence[str], entries: Sequence[dict], builder: ReportBuilder) -> None:
        self._folder, self._names, self._entries, self._builder = folder, names, entries, builder
        self._sources: dict[int, list[ReelRecord]] = {}
        self._first: dict[str, int] = {}  # content -> order of the source that has it
        self.used: set[str] = set()

    def check(self) -> None:
        heard = {row["order"] for row in self._entries}
        lost = [name for order, name in enumerate(self._names) if order not in heard]
        if lost:
            raise RuntimeError(
                f"nothing was heard of {len(lost)} sources, the first of them {lost[0]}: a bug, please report it"
            )

    def any_clip(self) -> bool:
        return any(row["part"] is not None for row in self._entries)

    def parts(self) -> Iterator[tuple[str, pa.Table]]:
        """Names of the parts with the index columns of their clips; counts everything on the way."""
        for row in self._entries:
            record, table = result_record(self._folder, row)
            order, content = row["order"], record.source_hash
            first = order if content is None else self._first.setdefault(content, order)
            if first != order:
                record = _as_duplicate(record, self._names[first])
            self._sources.setdefault(order, []).append(record)
            if first == order and table is not None:
                self.used.add(row["part"])
                for sample in record.samples:
                    self._builder.add(sample)
                for clip in table.to_pylist():
                    self._builder.add(ClipFigures(clip["num_frames"], parts.quality_of(clip)))
                yield row["part"], table

    def report(self, settings: Mapping[str, Any], started: str, seconds: float, workers: int) -> RunReport:
        if not self._sources:
            for _ in self.parts():
                pass
        for records in self._sources.values():
            self._builder.add(_source_report(records))
        unit = 1 if sys.platform == "darwin" else 1024
        peak = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return self._builder.finish(settings, started, seconds, workers, peak)


def _as_duplicate(record: ReelRecord, first: str) -> ReelRecord:
    text = f"{record.source}: has the same content as {first}"
    return ReelRecord(
        record.source,
        record.source_hash,
        record.start_frame,
        record.frames,
        left_out={"duplicate": record.frames},
        messages={"duplicate": text},
    )


def _source_report(records: Sequence[ReelRecord]) -> SourceReport:
    left_out: dict[str, int] = {}
    messages: dict[str, str] = {}
    for record in records:
        for code, frames in record.left_out.items():
            left_out[code] = left_out.get(code, 0) + frames
        messages = record.messages | messages
    clips = sum(record.clips for record in records)
    reason = None if clips else parts.main_reason(left_out)
    return SourceReport(
        source=records[0].source,
        source_hash=records[0].source_hash,
        frames=sum(record.frames for record in records),
        clips=clips,
        frames_in_clips=sum(record.frames_in_clips for record in records),
        left_out=dict(sorted(left_out.items())),
        reason=reason,
        message=messages[reason] if reason else None,
        warnings=sorted({warning for record in records for warning in record.warnings}),
    )


def _no_clip(sources: Sequence[SourceReport]) -> str:
    rest = f" ({len(sources)} sources, none gave a clip)" if len(sources) > 1 else ""
    return f"{sources[0].message}{rest}"


@contextmanager
def _no_empty_folder(folder: Folder) -> Iterator[None]:
    """After an error, a folder that was made and came to nothing goes again; one with work in it stays, to go on."""
    existed = folder.exists()
    try:
        yield
    except BaseException as error:
        idle = isinstance(error, NoClipError) or not folder.subfolders("clips")
        if idle and not existed and not folder.exists(REPORT):
            folder.remove("")
        raise


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

    FIND_CPUS = 0.25
    LOOK_CPUS = 0.5
    CUT_CPUS = 0.25


def pools_for(resources: Mapping[str, float], workers: int | None, on_gpu: bool) -> Pools:
    """Pools that fit a cluster of these resources, two CPUs included. workers: how many look at films at once.

    on_gpu: the detector runs on GPUs where there are any, one each. Raises TccpError if the cluster has no CPU for it.
    """
    cpus, gpus = float(resources.get("CPU", 0)), int(resources.get("GPU", 0))
    least = Pools.FIND_CPUS + Pools.LOOK_CPUS + Pools.CUT_CPUS
    if cpus < least:
        raise TccpError(f"the Ray cluster has {cpus:g} CPUs, preprocessing needs {least:g}: start Ray with more")
    look = max(1, int(cpus)) if workers is None else workers
    if on_gpu and gpus:
        look = min(look, gpus)
    while look > 1 and _cpus(look) > cpus:
        look -= 1
    return Pools(max(1, look // 4), look, max(1, look // 2), 1.0 if on_gpu and gpus else 0.0)


def _cpus(look: int) -> float:
    return max(1, look // 4) * Pools.FIND_CPUS + look * Pools.LOOK_CPUS + max(1, look // 2) * Pools.CUT_CPUS


_BLOCK_BYTES = 1 << 20  # about a reel: larger blocks would send a film's reels to one worker
_MOST_BLOCKS = 2000


@contextmanager
def _ray_running(workers: int | None) -> Iterator[None]:
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
        cpus = max(os.cpu_count() or 1, workers or 1)
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
    with _ray_running(workers):
        _check_nodes(work)
        with _data_context(in_order=False):
            yield from _graph(listing, work, workers, CutClips).iter_rows()


def clip_dataset(listing: pa.Table, plan: Plan, workers: int | None = None) -> Any:
    """A Ray Dataset of clip rows straight from film; within `in_order`, in the table's order.

    Ray must be running. Nothing is stored but what Ray has in flight.
    """
    return _graph(listing, Work(plan, None), workers, ClipRows)


def table_dataset(table: str | Path) -> Any:
    """A Ray Dataset of the clip rows of a table, in its order."""
    import ray

    with ClipTable(str(table)) as opened:
        ids = [pa.table({"clip_id": [clip_id]}) for clip_id in opened.ids]
    return ray.data.from_arrow(ids).map_batches(
        _rows_of, fn_kwargs={"table": str(table)}, batch_size=1, batch_format="pyarrow"
    )


def _rows_of(batch: pa.Table, table: str) -> pa.Table:
    with ClipTable(table) as opened:
        return opened.rows(batch.column("clip_id").to_pylist())


@contextmanager
def in_order() -> Iterator[None]:
    """Within it, Datasets of this module come out in the order of their sources, however many workers there are."""
    with _data_context(in_order=True):
        yield


def window_dataset(clips: Any, settings: Settings, window: int, stride: int, draws: Sequence[int | None] = (0,)) -> Any:
    """Training windows (`tccp.data.windows`) of a Dataset of clip rows, from film or from a table, in its order."""
    arguments = {"settings": settings, "window": window, "stride": stride, "seed": settings.seed, "draws": draws}
    return clips.map_batches(windows, fn_kwargs=arguments, batch_size=1, batch_format="pyarrow")


def _graph(listing: pa.Table, work: Work, workers: int | None, last: type[CutClips]) -> Any:
    import ray

    pools = pools_for(ray.cluster_resources(), workers, work.plan.backend == "fan")
    step = -(-listing.num_rows // _MOST_BLOCKS)
    blocks = [listing.slice(row, step) for row in range(0, listing.num_rows, step)]
    data = ray.data.from_arrow(blocks)
    for kind, size, cpus, gpus in (
        (FindReels, pools.find, Pools.FIND_CPUS, 0.0),
        (Look, pools.look, Pools.LOOK_CPUS, pools.look_gpus),
        (last, pools.cut, Pools.CUT_CPUS, 0.0),
    ):
        data = data.map_batches(
            kind,
            fn_constructor_args=(work,),
            compute=ray.data.ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=2),
            num_cpus=cpus,
            num_gpus=gpus,
            batch_size=1,
            batch_format="pyarrow",
            zero_copy_batch=True,
        )
    return data


def _check_nodes(work: Work) -> None:
    import ray

    alive = [node for node in ray.nodes() if node["Alive"]]
    if len(alive) > 1 and work.out is not None and not is_url(work.out):
        raise TccpError(
            f"{work.out} is a folder of one machine, and the cluster has {len(alive)}: give a URL (s3://..., "
            "gs://...), or file:///... for a folder that all of them share"
        )
