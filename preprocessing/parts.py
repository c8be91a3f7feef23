"""The files that a run keeps: a part for each reel, records of films and faces, and at the end the table of clips.

A part holds the rows of one reel's clips and, in its metadata, the reasons for the frames in no clip. Its name hashes
everything that it depends on, so an existing part is valid, and a missing one is still to be made. Runs share no other
state. The index, written last, names the parts that make up the table.
"""

from __future__ import annotations

import base64
import io
import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from preprocessing.plan import LOOK_VERSION, Plan
from preprocessing.reels import LOOKED_SCHEMA, Reel, looked_to_table, with_looked
from preprocessing.report.record import TrackSample
from preprocessing.spans import Span
from tccp.clips.clip_table import INDEX, INDEX_SCHEMA, Clip, Quality, write_parquet
from tccp.errors import DamagedData
from tccp.files import Folder, without_readers
from tccp.media.remote import version_of

logger = logging.getLogger("tccp.preprocessing")

_RECORD_KEY = "tccp.reel"
_KEPT_FROM_SPAN = ("source_hash", "width", "height", "warnings")


@dataclass
class ReelRecord:
    """The result of one reel. frames = frames_in_clips + the sum of left_out. messages: the first for each reason."""

    source: str
    source_hash: str | None
    start_frame: int
    frames: int
    clips: int = 0
    frames_in_clips: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    samples: list[TrackSample] = field(default_factory=list)

    def add_left_out(self, span: Span) -> None:
        assert span.reason is not None
        self.left_out[span.reason] = self.left_out.get(span.reason, 0) + span.num_frames
        self.messages.setdefault(span.reason, span.message or span.reason)

    def to_json(self) -> str:
        values = asdict(self)
        for sample in values["samples"]:
            sample["jpeg"] = base64.b64encode(sample["jpeg"]).decode()
        return json.dumps(values, sort_keys=True)

    @staticmethod
    def from_json(text: str | bytes) -> ReelRecord:
        values = json.loads(text)
        samples = [
            TrackSample(**{**sample, "jpeg": base64.b64decode(sample["jpeg"])}) for sample in values.pop("samples")
        ]
        return ReelRecord(**values, samples=samples)


def record_of(span: Span) -> ReelRecord:
    return ReelRecord(
        span.source, span.source_hash, span.start_frame, span.num_frames, warnings=sorted(set(span.warnings))
    )


def write_part(folder: Folder, name: str, rows: Iterable[Clip | Span], record: ReelRecord) -> ReelRecord:
    """Writes the clips among `rows` to the part `name`, one at a time, and counts the others in `record`."""

    def clips() -> Iterator[Clip]:
        for row in rows:
            if isinstance(row, Span):
                record.add_left_out(row)
            else:
                record.clips += 1
                record.frames_in_clips += row.num_frames
                yield row

    def metadata() -> dict[str, str]:
        counted = record.frames_in_clips + sum(record.left_out.values())
        assert counted == record.frames, f"{record.source}: of {record.frames} frames {counted} are accounted for"
        return {_RECORD_KEY: record.to_json()}

    with folder.writing(name) as path:
        write_parquet(clips(), path, metadata)
    return record


def read_part(folder: Folder, name: str) -> tuple[ReelRecord, pa.Table]:
    """A part's record, and the columns of its clips that hold single values. Raises DamagedData."""
    try:
        with folder.open(name) as file, pq.ParquetFile(file) as part:
            record = ReelRecord.from_json(part.metadata.metadata[_RECORD_KEY.encode()])
            columns = [column for column in INDEX_SCHEMA.names if column not in ("part", "row")]
            table = part.read(columns=columns)
    except (pa.ArrowInvalid, KeyError, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DamagedData(
            f"{folder.path(name)} is damaged ({reason}): remove it, and give the same command again"
        ) from None
    return record, table


def quality_of(row: dict[str, Any]) -> Quality:
    return Quality(**{item.name: row[item.name] for item in fields(Quality)})


def write_index(folder: Folder, parts: Iterable[tuple[str, pa.Table]]) -> int:
    """Writes the index of the table that these parts make up, in this order; returns the number of clips."""
    count = 0
    with folder.writing(INDEX) as path, pq.ParquetWriter(path, INDEX_SCHEMA) as writer:
        for name, table in parts:
            if table.num_rows == 0:
                continue
            places = {"part": pa.array([name] * table.num_rows), "row": pa.array(range(table.num_rows), pa.int32())}
            columns = [places[f.name] if f.name in places else table.column(f.name) for f in INDEX_SCHEMA]
            writer.write_table(pa.table(columns, names=INDEX_SCHEMA.names).cast(INDEX_SCHEMA))
            count += table.num_rows
    return count


# Records of films, so that a film that has not changed is not read again


def film_name(path: str, plan: Plan) -> str:
    """Name of a film's record. Raises MediaError if the film does not exist."""
    return f"work/films/{version_of(path)[0]}-{plan.reel_s:g}-{LOOK_VERSION}.json"


def write_film(folder: Folder, name: str, reels: list[Reel]) -> None:
    first = reels[0].span
    record = {key: getattr(first, key) for key in _KEPT_FROM_SPAN}
    record |= {"usable": reels[0].usable, "reels": [(r.span.start_frame, r.span.num_frames) for r in reels]}
    folder.write(name, json.dumps(record).encode())


def read_film(folder: Folder, name: str, source: Span, order: int) -> list[Reel]:
    """The reels of a film from its record, without sound; none if there is no record."""
    if not folder.exists(name):
        return []
    try:
        record = json.loads(folder.read(name))
    except ValueError:  # the machine stopped while it was written
        return []
    known = {key: record[key] for key in _KEPT_FROM_SPAN} | {"warnings": tuple(record["warnings"])}
    source = replace(source, **known)
    first, stop = record["usable"]
    total = max(sum(count for _, count in record["reels"]), 1)
    return [
        Reel(replace(source, start_frame=start, num_frames=count), order, (first, stop), share=count / total)
        for start, count in record["reels"]
    ]


# Results of pass 1


def write_look(folder: Folder, name: str, reel: Reel) -> None:
    buffer = io.BytesIO()
    pq.write_table(looked_to_table(reel), buffer, compression="zstd")
    folder.write(name, buffer.getvalue())


def read_look(folder: Folder, name: str, reel: Reel) -> Reel | None:
    if not folder.exists(name):
        return None
    try:
        return with_looked(reel, pq.read_table(io.BytesIO(folder.read(name)), schema=LOOKED_SCHEMA))
    except pa.ArrowInvalid:  # the machine stopped while it was written
        return None


def has_looks(folder: Folder) -> bool:
    """Whether the folder holds results of pass 1."""
    return bool(folder.subfolders("work/looks"))


def remove_stale(folder: Folder, plan: Plan, used: set[str]) -> None:
    """Removes parts of other settings, and parts of this plan that the table does not use: of removed films.

    If a process reads the folder, or it is at a URL, where that cannot be known, they stay. The log names them.
    """
    keys = filter(re.compile("[0-9a-f]{16}").fullmatch, folder.subfolders("clips"))  # others are the user's
    stale = [f"clips/{key}" for key in keys if key != plan.part_key]
    own = (f"clips/{plan.part_key}/{name}" for name in folder.names(f"clips/{plan.part_key}"))
    remove_unread(folder, [*stale, *(name for name in own if name not in used)])


def remove_unread(folder: Folder, names: Sequence[str]) -> None:
    """Removes files and folders that the table no longer names, unless a process may read them."""
    if not names:
        return
    with without_readers(folder) as unread:
        if unread:
            for name in names:
                folder.remove(name)
            return
    why = "a process reads the table" if folder.local is not None else "other machines may read them"
    shown = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    logger.info(
        "%s: files of an earlier run stay, because %s: %s; a later run removes them, or remove them yourself",
        folder, why, shown,
    )  # fmt: skip


def main_reason(left_out: dict[str, int]) -> str | None:
    """The reason of most frames; among equals the alphabetically first."""
    counts = Counter(left_out)
    return min(counts, key=lambda reason: (-counts[reason], reason)) if counts else None
