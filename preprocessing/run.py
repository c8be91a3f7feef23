"""A run of preprocessing: from sources to a clip table with a report, or to an estimate of its time and space."""

from __future__ import annotations

import datetime
import json
import os
import posixpath
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pyarrow as pa

from preprocessing import parts
from preprocessing.frame_progress import FrameProgress
from preprocessing.graph import in_this_process, on_ray_data, render_lips
from preprocessing.lip_step import LipWork, remove_stale_lips
from preprocessing.plan import Plan
from preprocessing.reasons import FRAME_REASONS
from preprocessing.report.estimate import Estimate, SampleResult, SourceSize, choose_sample, estimate
from preprocessing.report.page import write_page
from preprocessing.report.record import ReportBuilder, RunReport, SourceReport, StepTime
from preprocessing.report.summary import Summary
from preprocessing.sources.finding import MANIFEST_SUFFIXES, files_left_out
from preprocessing.sources.listing import list_sources
from preprocessing.steps import Work, result_record
from tccp.clips.clip_table import INDEX
from tccp.clips.lip_table import LIPS
from tccp.cluster import ray_cluster, worker_errors
from tccp.config import FPS
from tccp.errors import TccpError
from tccp.files import Folder, bare, check_outputs, check_writable_folder, is_url, storage_retries
from tccp.progress import progress
from tccp.roundtable.film_files import TRUTH_SUFFIX

_WITH_FACES = {*FRAME_REASONS} - {"before_video", "after_audio", "no_face"}
"""Reasons for leaving out frames in which there is a face."""
REPORT, PAGE = "report.json", "report.html"
_OUTPUTS = (INDEX, REPORT, PAGE, "clips", "work", LIPS)
"""Everything that a run writes or removes in its output folder."""


class NoClipError(TccpError):
    """None of the sources gave a clip.

    found_faces: whether pass 1 found faces, so that a run with other settings may give clips and uses its results.
    """

    def __init__(self, message: str, found_faces: bool = False):
        super().__init__(message)
        self.found_faces = found_faces


def preprocess(
    sources: Sequence[str | Path],
    out: str | Path,
    plan: Plan,
    workers: int | None = None,
    on_ray: bool = False,
    lips: LipWork | None = None,
    overlap: bool = True,
) -> RunReport:
    """From films, folders, patterns, manifests or URLs to a clip table in `out`, with report.json and report.html.

    workers: processes that look at films (default: this process alone); more than one needs Ray. on_ray: use Ray in any
    case, by default with as many workers as the cluster has CPUs for. lips: also render the lip references of the
    clips, into `out/lips`. overlap: without Ray, look at the next reel while the clips of this one are cut, with
    several detectors.

    Work of an earlier run with the same plan and versions is not repeated; an existing table stays until the new one is
    complete. A source that cannot be used, or still not be fetched at the last attempt, is set aside with a reason and
    counted. The same films and plan give the same table.
    Raises TccpError if no source gives a clip (with the first reason) or if `out` cannot be written, and StorageError
    if `out` fails for longer than `tccp.files.retry` tries; the same call then continues.
    """
    if workers is not None and workers < 1:
        raise TccpError(f"workers {workers}: give at least 1")
    listing = list_sources(sources)
    folder = Folder(out if is_url(out) else Path(out).absolute())
    _check_outputs(folder, sources, listing, plan, lips)
    with _no_empty_folder(folder):
        on_ray = on_ray or (workers or 1) > 1
        with _ray(workers) if on_ray else nullcontext():
            return _run(listing, folder, plan, workers, on_ray, lips, overlap)


def _check_outputs(
    folder: Folder, sources: Sequence[str | Path], listing: pa.Table, plan: Plan, lips: LipWork | None
) -> None:
    """Raises TccpError if the run would overwrite or remove a file that it reads, or cannot write to the folder."""
    films: list[str] = listing.column("path").to_pylist()
    truths = [posixpath.splitext(film)[0] + TRUTH_SUFFIX for film in films] if plan.backend == "truth" else []
    check_outputs(
        {"OUT": [folder.path(name) for name in _OUTPUTS]},
        {
            "SOURCE": [source for source in sources if bare(str(source)).lower().endswith(MANIFEST_SUFFIXES)],
            "the film": films,
            "the truth file": truths,
            "--person": [*plan.person_pictures, *filter(None, listing.column("person_picture").to_pylist())],
            "--weights": plan.weights.values(),
            "--lips": None if lips is None else lips.weights,
        },
    )
    if folder.local is not None:
        check_writable_folder("OUT", folder.local)


def _ray(workers: int | None) -> AbstractContextManager[None]:
    return ray_cluster(workers or 1, dashboard=False, worker_logs=False, extra="preprocess")


def dry_run(
    sources: Sequence[str | Path],
    plan: Plan,
    workers: int = 1,
    sample: int = 5,
    price_per_cpu_hour: float | None = None,
) -> Estimate:
    """Estimates time, space and yield of `preprocess` by running it on a sample of the sources. Keeps nothing.

    Raises TccpError as `preprocess`, but not for films without clips.
    """
    listing = list_sources(sources)
    rows = {row["source"]: (number, row) for number, row in enumerate(listing.to_pylist()) if row["reason"] is None}
    films = [SourceSize(name, row["bytes"] or None) for name, (_, row) in rows.items()]
    measured = []
    chosen = choose_sample(films, sample)
    with progress() as bar, tempfile.TemporaryDirectory(prefix="tccp-dry-run-") as folder:
        sizes = {rows[film.source][0]: film.file_bytes or 0 for film in chosen}
        frames = FrameProgress(bar, "measuring frames", sizes)
        for film in chosen:
            number, row = rows[film.source]
            out = Path(folder) / str(number)
            work = Work(plan, str(out))
            measured.append(_measured(film.source, row["bytes"], listing.slice(number, 1), work, frames))
            shutil.rmtree(out, ignore_errors=True)
    return estimate(measured, films, workers, price_per_cpu_hour)


def _measured(source: str, file_bytes: int, row: pa.Table, work: Work, reported: FrameProgress) -> SampleResult:
    wall, before = time.monotonic(), os.times()
    cpu_s: dict[str, float] = {}
    frames = frames_in_clips = 0
    for result in in_this_process(row, work, reported, overlap=False):  # steps that overlap slow each other down
        reported.end(result)
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


def _run(
    listing: pa.Table,
    folder: Folder,
    plan: Plan,
    workers: int | None,
    on_ray: bool,
    lips: LipWork | None,
    overlap: bool,
) -> RunReport:
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    clock, retries = time.monotonic(), storage_retries()
    work = Work(plan, str(folder))
    builder, entries = ReportBuilder(), []
    with progress() as bar, worker_errors():
        frames = FrameProgress(bar, "preprocessing frames", dict(enumerate(listing.column("bytes").to_pylist())))
        if on_ray:
            results = on_ray_data(listing, work, workers, frames)
        else:
            results = in_this_process(listing, work, frames, overlap)
        for row in results:
            entries.append(row)
            for name, seconds in json.loads(row["times_s"]).items():
                builder.add(StepTime(name, seconds, 1, row["frames"]))
            frames.end(row)
    entries.sort(key=lambda row: (row["order"], row["start_frame"]))
    table = Summary(folder, listing.column("source").to_pylist(), entries, builder)
    table.check()
    clips = parts.write_index(folder, table.parts()) if table.any_clip() else 0
    if clips:  # before the lips, whose workers read the table
        parts.remove_stale(folder, plan, table.used)
    settings = plan.record()
    if lips is not None and clips:
        settings["lips"] = {"source": lips.settings.source, "hash": lips.hash}
        entries += _render_lips(folder, lips, workers, on_ray, builder, table.clip_frames)
    retries = storage_retries() - retries
    if on_ray:  # of the workers; in one process they are counted already
        retries += sum(row["storage_retries"] for row in entries)
    used = workers or (os.cpu_count() if on_ray else 1) or 1
    report = table.report(settings, started, time.monotonic() - clock, used, retries, files_left_out(listing))
    if clips or listing.num_rows > 1:  # for a single film the error below is enough
        folder.write(REPORT, report.to_json(pictures=False).encode())
        with folder.writing(PAGE) as path:
            write_page(report, path)
    if not clips:
        reasons = {reason for source in report.sources for reason in source.left_out}
        raise NoClipError(_no_clip(report.sources), bool(reasons & _WITH_FACES))
    return report


def _render_lips(
    folder: Folder, lips: LipWork, workers: int | None, on_ray: bool, builder: ReportBuilder, frames: Mapping[str, int]
) -> list[dict[str, Any]]:
    """Rows of RENDERED_SCHEMA of the clips whose lips were missing."""
    missing = remove_stale_lips(str(folder), lips, frames)
    rows = []
    with progress() as bar, worker_errors():
        task = bar.add_task("rendering lip references", total=len(missing))
        for row in render_lips(str(folder), missing, lips, workers, on_ray):
            rows.append(row)
            builder.add(StepTime("lips", row["seconds"], 1, frames[row["clip_id"]]))
            bar.advance(task)
    return rows


def _no_clip(sources: Sequence[SourceReport]) -> str:
    rest = f" ({len(sources)} sources, none gave a clip)" if len(sources) > 1 else ""
    return f"{sources[0].message}{rest}"


@contextmanager
def _no_empty_folder(folder: Folder) -> Iterator[None]:
    """Removes a folder that this run made, after an error, unless there is work in it that the next run can use.

    That is, results of pass 1, which takes most of the time, or clips.
    """
    existed = folder.exists()
    try:
        yield
    except BaseException as error:
        if isinstance(error, NoClipError):
            useful = error.found_faces and parts.has_looks(folder)
        else:
            useful = parts.has_looks(folder) or bool(folder.subfolders("clips"))
        if not useful and not existed and not folder.exists(REPORT):
            folder.remove("")
        raise
