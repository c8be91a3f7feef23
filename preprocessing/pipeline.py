"""The steps joined, in one process: raw videos to a clip table and a report on every source."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import pyarrow as pa

from preprocessing.cut import MIN_CLIP_S, clip_frames, cut_clips
from preprocessing.faces import find_tracks
from preprocessing.headbox import fit_head_boxes
from preprocessing.probe import probe_sources
from preprocessing.rows import render_clips
from preprocessing.spans import Span, spans_from_table, spans_to_table
from preprocessing.truth import read_tracks
from tccp.clip import SCHEMA_VERSION, atomic_path, write_table
from tccp.config import Settings, TccpError
from tccp.progress import progress

Backend = Literal["mediapipe", "truth"]
VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ts", ".webm")
"""Files of a folder that count as sources; a file that is named itself is tried whatever its name."""


@dataclass(frozen=True)
class SourceReport:
    """What became of one source. frames = frames_in_clips + the sum of left_out, which counts frames by reason code.

    reason, message: why there is no clip at all; None where there is one.
    """

    source: str
    source_hash: str | None
    frames: int
    clips: int
    frames_in_clips: int
    left_out: dict[str, int]
    reason: str | None
    message: str | None
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Report:
    """What `preprocess` did, also written as report.json. Without times, so that the same run writes the same file."""

    schema_version: int
    backend: str
    picture_px: int
    max_clip_s: float
    min_clip_s: float
    sources: list[SourceReport]

    @property
    def clips(self) -> int:
        return sum(source.clips for source in self.sources)

    @property
    def frames(self) -> int:
        """Frames in clips."""
        return sum(source.frames_in_clips for source in self.sources)

    @property
    def reasons(self) -> dict[str, int]:
        """Sources without a clip, by reason code."""
        return dict(sorted(Counter(source.reason for source in self.sources if source.reason).items()))

    def to_json(self) -> str:
        totals = {"clips": self.clips, "frames": self.frames, "reasons": self.reasons}
        return json.dumps({**totals, **asdict(self)}, indent=2) + "\n"


def preprocess(
    sources: Sequence[str | Path],
    out: str | Path,
    settings: Settings,
    backend: Backend = "mediapipe",
    weights: Path | None = None,
    max_clip_s: float = 5.0,
    min_clip_s: float = MIN_CLIP_S,
) -> Report:
    """Films, or folders of films, to `out`/clips.parquet and `out`/report.json; both appear only when they are whole.

    backend: where landmarks come from: a face detector, or (`truth`) the truth files of RoundTable footage.
    weights: the detector's file, or the folder it is in; by default as in `tccp.faces`.
    max_clip_s, min_clip_s: clips are cut to at most, and at least, so many seconds.
    A source that cannot be used is set aside, with a reason, and counted; it stops nothing.
    Raises TccpError if no source gives a clip (with the first reason), if the weights are absent, or if `out` cannot be
    written. The same input and settings give the same bytes.
    """
    out = Path(out)
    clip_frames(min_clip_s, max_clip_s)  # found out now, not after the first film
    table = find_sources(sources)
    with _no_empty_folder(out), progress() as bar, atomic_path(out / "report.json") as report_file:
        task = bar.add_task("probing", total=table.num_rows)
        probed: list[pa.Table] = []
        for row in range(table.num_rows):
            probed.append(probe_sources(table.slice(row, 1)))
            bar.advance(task)
        probed = _without_duplicates(probed)
        passes = 1 if backend == "truth" else 2
        frames = sum(span.num_frames for batch in probed for span in spans_from_table(batch) if span.reason is None)
        task = bar.add_task("preprocessing", total=passes * frames)

        counts: list[SourceReport] = []
        lengths_s = max_clip_s, min_clip_s

        def rows() -> Iterator[pa.Table]:
            for batch in probed:
                tally = _Tally(spans_from_table(batch))
                for row in _rows_of(batch, settings, backend, weights, lengths_s, lambda: bar.advance(task)):
                    if tally.add(row):
                        yield row
                counts.append(tally.report())
            if not any(count.clips for count in counts):
                raise TccpError(_no_clip(counts))

        write_table(rows(), out / "clips.parquet")
        bar.update(task, completed=passes * frames)  # frames set aside early were not gone through twice
        report = Report(SCHEMA_VERSION, backend, settings.picture_px, max_clip_s, min_clip_s, counts)
        report_file.write_text(report.to_json(), encoding="utf-8")
    return report


@contextmanager
def _no_empty_folder(folder: Path) -> Iterator[None]:
    """After an error, a folder that was made for nothing goes again."""
    existed = folder.exists()
    try:
        yield
    except BaseException:
        if not existed:
            with suppress(OSError):
                folder.rmdir()  # which removes empty folders only
        raise


def _rows_of(
    batch: pa.Table,
    settings: Settings,
    backend: Backend,
    weights: Path | None,
    lengths_s: tuple[float, float],
    on_frame: Callable[[], object],
) -> Iterator[pa.Table]:
    """The steps after probing, for the spans of one source."""
    tracks = read_tracks(batch) if backend == "truth" else _joined(find_tracks(batch, backend, weights, on_frame))
    yield from render_clips(cut_clips(fit_head_boxes(tracks), *lengths_s), settings.picture_px, on_frame)


def _joined(tables: Iterator[pa.Table]) -> pa.Table:
    return pa.concat_tables(list(tables))


def find_sources(given: Sequence[str | Path]) -> pa.Table:
    """Rows of (path, source) for films and folders of films, a folder's in order of name; `source` is relative to it.

    Hidden files are left out: a writer that was killed leaves its unfinished film under such a name.
    Raises TccpError if a folder holds no film, or nothing is given.
    """
    spans = []
    for item in map(Path, given):
        files = [item]
        if item.is_dir():
            found = (p for p in item.rglob("*") if p.suffix.lower() in VIDEO_SUFFIXES and p.is_file())
            files = sorted(p for p in found if not p.name.startswith("."))
            if not files:
                raise TccpError(f"{item} holds no film ({', '.join(VIDEO_SUFFIXES)}); give one that does, or files")
        spans += [Span(str(path), path.relative_to(item).as_posix() if item.is_dir() else path.name) for path in files]
    if not spans:
        raise TccpError("no source was given: name at least one film or folder of films")
    return spans_to_table(spans)


def _without_duplicates(batches: Sequence[pa.Table]) -> list[pa.Table]:
    """Films with the same bytes would give the same clips twice: all but the first are set aside."""
    first: dict[str, str] = {}
    unique = []
    for batch in batches:
        spans = spans_from_table(batch)
        content = spans[0].source_hash
        if content is not None and content in first:
            text = f"{spans[0].path}: has the same content as {first[content]}"
            spans = [span if span.reason else span.set_aside("duplicate", text) for span in spans]
        elif content is not None:
            first[content] = spans[0].source
        unique.append(spans_to_table(spans))
    return unique


class _Tally:
    """Counts what one source's frames came to."""

    def __init__(self, probed: Sequence[Span]) -> None:
        self._probed = probed
        self._clips = 0
        self._frames = 0
        self._left_out: Counter[str] = Counter()
        self._messages: dict[str, str] = {}  # the first for each reason

    def add(self, row: pa.Table) -> bool:
        """Counts one row of ROW_SCHEMA; whether it is a clip."""
        names = ("num_frames", "reason", "message")
        num_frames, reason, message = (row.column(name)[0].as_py() for name in names)
        if reason is None:
            self._clips += 1
            self._frames += num_frames
        else:
            self._left_out[reason] += num_frames
            self._messages.setdefault(reason, message)
        return reason is None

    def report(self) -> SourceReport:
        total = sum(span.num_frames for span in self._probed)
        assert self._frames + self._left_out.total() == total, "every frame is in a clip or has a reason"
        reason = self._left_out.most_common(1)[0][0] if not self._clips and self._left_out else None
        return SourceReport(
            source=self._probed[0].source,
            source_hash=self._probed[0].source_hash,
            frames=total,
            clips=self._clips,
            frames_in_clips=self._frames,
            left_out=dict(sorted(self._left_out.items())),
            reason=reason,
            message=self._messages[reason] if reason else None,
            warnings=sorted({warning for span in self._probed for warning in span.warnings}),
        )


def _no_clip(counts: Sequence[SourceReport]) -> str:
    rest = f" ({len(counts)} sources, none gave a clip)" if len(counts) > 1 else ""
    return f"{counts[0].message}{rest}"
