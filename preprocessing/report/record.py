"""The report of a preprocessing run: counted during the run, stored as report.json.

Counts, histograms and the sample of tracks do not depend on the order in which their parts arrive, and have a bounded
size. Only the list of sources grows, by one entry per source.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import cv2
import numpy as np
import pydantic

from tccp.clips.clip_table import SCHEMA_VERSION, Quality
from tccp.config import FPS
from tccp.errors import TccpError

REPORT_VERSION = 1
"""Version of the format of report.json; `schema_version` in it is that of the clip table."""
SAMPLE_TRACKS = 200
"""Most kept tracks in the report's sample, and most rejected ones."""
THUMBNAIL_PX = 112
_THUMBNAIL_QUALITY = 80


@dataclass(frozen=True)
class SourceReport:
    """The result for one source. frames = frames_in_clips + the sum of left_out, which counts frames by reason code.

    reason, message: why the source gave no clip; None if it gave one.
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

    def __post_init__(self) -> None:
        counted = self.frames_in_clips + sum(self.left_out.values())
        assert self.frames == counted, f"{self.source}: of {self.frames} frames {counted} are accounted for"

    @property
    def reasons(self) -> list[str]:
        """Codes of all reasons for which frames were left out, most frames first."""
        codes = dict.fromkeys([self.reason] if self.reason else [], 0) | self.left_out
        return sorted(codes, key=lambda code: (-codes[code], code))


@dataclass(frozen=True)
class ClipFigures:
    """The figures of one clip in the table."""

    num_frames: int
    quality: Quality


@dataclass(frozen=True)
class TrackSample:
    """One person in one shot, with a face picture. start_s, stop_s: seconds on the source's clock.

    kept: whether the track is in clips. reason: code; None if it is in clips. jpeg: empty if there is no picture.
    figures: the figures that decided, by name.
    """

    source: str
    track: int
    start_s: float
    stop_s: float
    kept: bool
    reason: str | None
    jpeg: pydantic.Base64Bytes
    figures: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class StepTime:
    """Work of one step. seconds: busy time, summed over all processes. items: number of rows or files."""

    name: str
    seconds: float
    items: int
    frames: int


@dataclass(frozen=True)
class Histogram:
    """Number of clips by one figure: counts[i] have edges[i] <= value < edges[i + 1]; below, above: outside all edges.

    unknown: clips without that figure. lowest, highest: exact; None if no clip has it.
    """

    name: str
    unit: str
    edges: list[float]
    counts: list[int]
    below: int
    above: int
    unknown: int
    lowest: float | None
    highest: float | None

    @property
    def known(self) -> int:
        return self.below + sum(self.counts) + self.above

    def quantile(self, share: float) -> float | None:
        """The value below which `share` of the clips lie, rounded to half a bin; None if no clip has the figure."""
        if self.lowest is None or self.highest is None:
            return None
        masses = [self.below, *self.counts, self.above]
        values = [min(self.lowest, self.edges[0]), *self.edges, max(self.highest, self.edges[-1])]
        value = float(np.interp(share * self.known, np.cumsum([0, *masses]), values))
        half_a_bin = (self.edges[1] - self.edges[0]) / 2
        value = round(round(value / half_a_bin) * half_a_bin, 6)
        return min(max(value, self.lowest), self.highest)


@dataclass(frozen=True)
class Totals:
    """Sums over all sources. frames_by_reason: frames left out; sources_by_reason: sources without a clip."""

    films: int
    films_with_clips: int
    hours: float
    hours_in_clips: float
    clips: int
    frames: int
    frames_in_clips: int
    frames_by_reason: dict[str, int]
    sources_by_reason: dict[str, int]


@dataclass(frozen=True)
class RunReport:
    """The report of a run. started: ISO 8601. seconds: wall-clock time. throughput: seconds of film per second.

    storage_retries: how often an access to storage had to be repeated, in all processes. not_films: how many files in
    the given folders are no films, by ending.
    """

    report_version: int
    schema_version: int
    settings: dict[str, Any]
    started: str
    seconds: float
    workers: int
    peak_memory_bytes: int | None
    throughput: float
    totals: Totals
    sources: list[SourceReport]
    steps: list[StepTime]
    distributions: list[Histogram]
    tracks: list[TrackSample]
    storage_retries: int = 0
    not_films: dict[str, int] = field(default_factory=dict)

    @property
    def clips(self) -> int:
        return self.totals.clips

    @property
    def frames(self) -> int:
        """Frames in clips."""
        return self.totals.frames_in_clips

    @property
    def reasons(self) -> dict[str, int]:
        """Sources without a clip, by reason code."""
        return self.totals.sources_by_reason

    def to_dict(self, pictures: bool = True) -> dict[str, Any]:
        """The content of report.json: clips, frames and reasons first, then all fields; each source lists its reasons.

        pictures: whether the face pictures are included, in base64; else they are empty.
        """
        report = self if pictures else replace(self, tracks=[replace(track, jpeg=b"") for track in self.tracks])
        record = _ADAPTER.dump_python(report, mode="json")
        for source, written in zip(self.sources, record["sources"], strict=True):
            written["reasons"] = source.reasons
        return {"clips": self.clips, "frames": self.frames, "reasons": self.reasons, **record}

    def to_json(self, pictures: bool = True) -> str:
        return json.dumps(self.to_dict(pictures), indent=2, allow_nan=False) + "\n"

    @staticmethod
    def from_json(text: str | bytes) -> RunReport:
        """Inverse of `to_json`. Raises TccpError if the text is not such a report, or of another version."""
        try:
            version = json.loads(text).get("report_version")
            if version == REPORT_VERSION:
                return _ADAPTER.validate_json(text)
        except (ValueError, AttributeError, AssertionError) as error:
            why = str(error).splitlines()
            raise TccpError(
                f"not a report.json of `tccp preprocess` ({'; '.join(why[:3])}): give the one that it wrote"
            ) from None
        raise TccpError(f"report version {version}, this code reads {REPORT_VERSION}: run `tccp preprocess` again")


_ADAPTER = pydantic.TypeAdapter(RunReport)


class _Bins(NamedTuple):
    """The bins of a histogram: `num_bins` of equal width from low to high."""

    unit: str
    low: float
    high: float
    num_bins: int


_BINS = {
    "length_s": _Bins("s", 0, 30, 120),
    "face_px": _Bins("px", 0, 1000, 200),
    "yaw_deg": _Bins("°", -90, 90, 36),
    "blur": _Bins("", 0, 1, 100),
    "brightness": _Bins("", 0, 1, 100),
    "occlusion": _Bins("", 0, 1, 100),
    "jitter": _Bins("", 0, 0.1, 400),
    "bridged": _Bins("", 0, 1, 100),
    "visible": _Bins("", 0, 1, 100),
    "av_offset_ms": _Bins("ms", -620, 620, 31),  # one frame per bin, whole frames at the centres
    "sync_confidence": _Bins("", 0, 15, 300),
    "speaking_score": _Bins("", 0, 1, 100),
}


class ReportBuilder:
    """Collects the report during a run."""

    def __init__(self, sample_tracks: int = SAMPLE_TRACKS) -> None:
        self._sources: list[SourceReport] = []
        self._steps: dict[str, StepTime] = {}
        self._histograms = {name: _HistogramBuilder(name, bins) for name, bins in _BINS.items()}
        self._kept, self._rejected = _TrackSampler(sample_tracks), _TrackSampler(sample_tracks)

    def add(self, record: SourceReport | ClipFigures | TrackSample | StepTime) -> None:
        """Counts one source, clip, track, or piece of a step's work."""
        match record:
            case SourceReport():
                message = None if record.message is None else _text(record.message)
                warnings = [_text(warning) for warning in record.warnings]
                self._sources.append(replace(record, source=_text(record.source), message=message, warnings=warnings))
            case ClipFigures():
                self._add_clip(record)
            case TrackSample():
                (self._kept if record.kept else self._rejected).add(replace(record, source=_text(record.source)))
            case StepTime():
                done = self._steps.get(record.name, StepTime(record.name, 0.0, 0, 0))
                self._steps[record.name] = StepTime(
                    record.name,
                    done.seconds + record.seconds,
                    done.items + record.items,
                    done.frames + record.frames,
                )

    def _add_clip(self, clip: ClipFigures) -> None:
        values = {item.name: getattr(clip.quality, item.name) for item in fields(Quality)}
        values["length_s"] = clip.num_frames / FPS
        for name, histogram in self._histograms.items():
            histogram.add(values.get(name))

    def finish(
        self,
        settings: Mapping[str, Any],
        started: str,
        seconds: float,
        workers: int,
        peak_memory_bytes: int | None = None,
        storage_retries: int = 0,
        not_films: Mapping[str, int] | None = None,
    ) -> RunReport:
        """The report. Sources are sorted by name; steps are in the order in which they were first added."""
        sources = sorted(self._sources, key=lambda item: (item.source, item.source_hash or ""))
        totals = _totals(sources)
        return RunReport(
            report_version=REPORT_VERSION,
            schema_version=SCHEMA_VERSION,
            settings=dict(settings),
            started=started,
            seconds=seconds,
            workers=workers,
            peak_memory_bytes=peak_memory_bytes,
            throughput=totals.frames / FPS / seconds if seconds > 0 else 0.0,
            totals=totals,
            sources=sources,
            steps=list(self._steps.values()),
            distributions=[histogram.result() for histogram in self._histograms.values()],
            tracks=[*self._kept.tracks(), *self._rejected.tracks()],
            storage_retries=storage_retries,
            not_films=dict(not_films or {}),
        )


def _totals(sources: Sequence[SourceReport]) -> Totals:
    frames = sum(source.frames for source in sources)
    in_clips = sum(source.frames_in_clips for source in sources)
    left_out: Counter[str] = Counter()
    for source in sources:
        left_out.update(source.left_out)
    return Totals(
        films=len(sources),
        films_with_clips=sum(source.clips > 0 for source in sources),
        hours=frames / FPS / 3600,
        hours_in_clips=in_clips / FPS / 3600,
        clips=sum(source.clips for source in sources),
        frames=frames,
        frames_in_clips=in_clips,
        frames_by_reason={code: count for code, count in sorted(left_out.items()) if count},
        sources_by_reason=dict(sorted(Counter(source.reason for source in sources if source.reason).items())),
    )


class _HistogramBuilder:
    """Counts the values of one figure."""

    def __init__(self, name: str, bins: _Bins) -> None:
        self._name, self._unit = name, bins.unit
        self._edges = np.linspace(bins.low, bins.high, bins.num_bins + 1)
        self._counts = np.zeros(bins.num_bins + 2, np.int64)  # below, between the edges, above
        self._unknown = 0
        self._range: tuple[float, float] | None = None

    def add(self, value: float | None) -> None:
        if value is None or not np.isfinite(value):
            self._unknown += 1
            return
        index = int(np.searchsorted(self._edges, value, side="right"))
        if value == self._edges[-1]:
            index -= 1  # the last bin includes its upper edge: a share of exactly 1 is inside
        self._counts[index] += 1
        low, high = self._range or (value, value)
        self._range = (min(low, value), max(high, value))

    def result(self) -> Histogram:
        below, *counts, above = self._counts.tolist()
        lowest, highest = self._range or (None, None)
        edges = np.round(self._edges, 6).tolist()
        return Histogram(self._name, self._unit, edges, counts, below, above, self._unknown, lowest, highest)


class _TrackSampler:
    """A bounded sample of tracks that does not depend on their order: the tracks whose identities hash lowest.

    Each reason has a sample of its own, so that rare reasons are represented.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._by_reason: dict[str | None, dict[bytes, TrackSample]] = {}

    def add(self, track: TrackSample) -> None:
        chosen = self._by_reason.setdefault(track.reason, {})
        identity = (track.source, track.track, track.start_s, track.stop_s, track.kept, track.reason)
        key = hashlib.blake2b(repr(identity).encode(), digest_size=16).digest()
        if len(chosen) >= self._size and key not in chosen:
            last = max(chosen)
            if key > last:
                return
            del chosen[last]
        figures = {name: value for name, value in track.figures.items() if np.isfinite(value)}
        chosen[key] = replace(track, jpeg=_thumbnail(track.jpeg), figures=figures)

    def tracks(self) -> list[TrackSample]:
        """At most `size` tracks, divided evenly among the reasons, sorted by reason, source and time."""
        ranked = [
            (rank, key, track)
            for chosen in self._by_reason.values()
            for rank, (key, track) in enumerate(sorted(chosen.items()))
        ]
        best = sorted(ranked, key=lambda item: item[:2])[: self._size]
        tracks = [track for _, _, track in best]
        return sorted(tracks, key=lambda track: (track.reason or "", track.source, track.start_s, track.track))


def _thumbnail(jpeg: bytes) -> bytes:
    """The picture as JPEG, at most THUMBNAIL_PX wide and high; empty if it cannot be decoded."""
    picture = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR) if jpeg else None
    if picture is None:
        return b""
    height, width = picture.shape[:2]
    shrink = THUMBNAIL_PX / max(height, width)
    if shrink < 1:
        size = max(1, round(width * shrink)), max(1, round(height * shrink))
        picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    return cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, _THUMBNAIL_QUALITY])[1].tobytes()


def _text(text: str) -> str:
    """The text with bytes that are not UTF-8 written as escapes: file names may contain them, JSON and HTML may not."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
