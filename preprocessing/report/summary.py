"""Adds up the parts of a run: entries for the index, and a report of every source."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa

from preprocessing import parts
from preprocessing.parts import ReelRecord
from preprocessing.report.record import ClipFigures, ReportBuilder, RunReport, SourceReport
from preprocessing.steps import result_record
from tccp.files import Folder
from tccp.headbox import LITTLE_VISIBLE


class Summary:
    """Reads the parts in the order of the sources, one at a time, and counts what is in them."""

    def __init__(self, folder: Folder, names: Sequence[str], entries: Sequence[dict], builder: ReportBuilder) -> None:
        self._folder, self._names, self._entries, self._builder = folder, names, entries, builder
        self._sources: dict[int, list[ReelRecord]] = {}
        self._visible: dict[int, list[float]] = {}  # of the clips of each source
        self._first: dict[str, int] = {}  # content hash to the order of the first source that has it
        self.used: set[str] = set()
        self.clip_frames: dict[str, int] = {}

    def check(self) -> None:
        """Raises RuntimeError unless there is a result for every source."""
        reported = {row["order"] for row in self._entries}
        missing = [name for order, name in enumerate(self._names) if order not in reported]
        if missing:
            raise RuntimeError(
                f"{len(missing)} sources have no result, the first is {missing[0]}: this is a bug, please report it"
            )

    def any_clip(self) -> bool:
        """Whether any reel has a part; the part may contain no clips."""
        return any(row["part"] is not None for row in self._entries)

    def parts(self) -> Iterator[tuple[str, pa.Table]]:
        """Yields the name of each part with the index columns of its clips, and counts its content."""
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
                    self.clip_frames[clip["clip_id"]] = clip["num_frames"]
                    quality = parts.quality_of(clip)
                    self._builder.add(ClipFigures(clip["num_frames"], quality))
                    if quality.visible is not None:
                        self._visible.setdefault(order, []).append(quality.visible)
                yield row["part"], table

    def report(
        self,
        settings: Mapping[str, Any],
        started: str,
        seconds: float,
        workers: int,
        storage_retries: int = 0,
        not_films: Mapping[str, int] | None = None,
    ) -> RunReport:
        if not self._sources:
            for _ in self.parts():
                pass
        for order, records in self._sources.items():
            source = _source_report(records)
            warning = _little_visible(self._visible.get(order, ()))
            self._builder.add(source if warning is None else replace(source, warnings=[*source.warnings, warning]))
        unit = 1 if sys.platform == "darwin" else 1024
        peak = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return self._builder.finish(settings, started, seconds, workers, peak, storage_retries, not_films)


def _little_visible(shares: Sequence[float]) -> str | None:
    """A warning if the head covers most of the picture in some of a source's clips."""
    few = [share for share in shares if share < LITTLE_VISIBLE]
    if not few:
        return None
    return (
        f"in {len(few)} of {len(shares)} clips the head box leaves less than {LITTLE_VISIBLE:.0%} of the picture "
        f"visible (least: {min(few):.1%}), so networks see little of the scene"
    )


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
