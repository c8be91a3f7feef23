"""The three steps of the graph: find reels, look at them, cut clips. Each is an object that a worker keeps.

A step takes a columnar batch and yields batches of one reel each, so that memory use stays small. One process chains
the steps directly; Ray Data runs them as pools of actors.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import pyarrow as pa

from preprocessing import parts
from preprocessing.analysis.detectors import Detectors
from preprocessing.analysis.look import look
from preprocessing.analysis.select import Networks, select
from preprocessing.frame_progress import ReelKey
from preprocessing.parts import ReelRecord, record_of
from preprocessing.plan import Plan, detector_of
from preprocessing.reels import Reel, reels_from_table, reels_to_table
from preprocessing.render import render_clips
from preprocessing.sources.find_reels import probe_source
from preprocessing.spans import Span, spans_from_table
from tccp.clips.clip_table import Clip, clips_to_table
from tccp.files import Folder, redacted, storage_retries
from tccp.media import MediaError
from tccp.media.remote import version_of
from tccp.media.sandbox import Decoder

logger = logging.getLogger("tccp.preprocessing")


@runtime_checkable
class FrameListener(Protocol):
    """Is told of the reels and frames that a step works on, for progress."""

    def begin(self, reel: ReelKey) -> object: ...

    def on_frame(self) -> object: ...


class NoListener:
    def begin(self, reel: ReelKey) -> None:
        pass

    def on_frame(self) -> None:
        pass


@dataclass(frozen=True)
class Work:
    """The input of every step. out: folder for results; with None, steps keep nothing between runs."""

    plan: Plan
    out: str | None


class _Step:
    def __init__(self, work: Work, listener: FrameListener | None = None) -> None:
        self.plan = work.plan
        self.folder = None if work.out is None else Folder(work.out)
        self.decoder = Decoder(work.plan.limits)
        self.listener = listener or NoListener()

    def close(self) -> None:
        self.decoder.close()


class FindReels(_Step):
    """From rows of sources (`order`, and the columns of preprocessing.sources.finding) to reels with their sound.

    Reels whose part exists come out as `done`. A film is not read again if all of its parts exist.
    """

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        for source, order in zip(spans_from_table(batch), batch.column("order").to_pylist(), strict=True):
            started, retries = time.monotonic(), storage_retries()
            for reel in self._reels(source, order):
                times_s = {"find reels": time.monotonic() - started}
                yield reels_to_table([replace(reel, times_s=times_s, storage_retries=storage_retries() - retries)])
                started, retries = time.monotonic(), storage_retries()

    def _reels(self, source: Span, order: int) -> Iterator[Reel]:
        if source.reason is not None:
            yield Reel(source, order)
            return
        folder, known, name = self.folder, [], None
        if source.person_picture is not None and self.plan.backend != "truth":
            try:
                source = replace(source, person_key=self._person_key(source.person_picture))
            except MediaError as error:
                yield Reel(source.set_aside(error.reason, f"{redacted(source.path)}: {error.problem}"), order)
                return
        if folder is not None:
            try:
                name = parts.film_name(source.path, self.plan)
                known = parts.read_film(folder, name, source, order)
            except MediaError as error:
                yield Reel(source.set_aside(error.reason, f"{redacted(source.path)}: {error.problem}"), order)
                return
            if known and all(folder.exists(self.plan.part_name(reel.span)) for reel in known):
                yield from (replace(reel, done=True) for reel in known)
                return
        found = []
        for reel in probe_source(source, order, self.plan, self.decoder):
            found.append(replace(reel, sound=None))
            if folder is not None and reel.span.reason is None and folder.exists(self.plan.part_name(reel.span)):
                yield replace(reel, sound=None, done=True)
            else:
                yield reel
        if folder is not None and name is not None and all(reel.span.reason is None for reel in found):
            parts.write_film(folder, name, found)

    def _person_key(self, picture: str) -> str:
        """The version of a row's picture of the person. Raises MediaError if the row cannot be served."""
        if "sface" not in self.plan.weights:
            text = "its row names a person, and the weights of SFace are missing: tccp weights fetch sface, or leave "
            raise MediaError(redacted(picture), "no_person_network", f"{text}person out")
        try:
            return version_of(picture)[0]
        except MediaError as error:
            raise MediaError(redacted(picture), "bad_person", f"its person picture {error}") from None


class Look(_Step):
    """From reels to reels with cuts and faces. Results of earlier runs are read from the folder."""

    def __init__(self, work: Work, listener: FrameListener | None = None, detectors: int = 1) -> None:
        """detectors: at most so many work side by side."""
        super().__init__(work, listener)
        has_one = work.plan.backend != "truth"
        self._detectors = Detectors(lambda: detector_of(work.plan), detectors) if has_one else None

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        for reel in reels_from_table(batch):
            self.listener.begin((reel.order, reel.span.start_frame))
            started, retries = time.monotonic(), storage_retries()
            looked = reel if reel.done or reel.span.reason is not None else self._looked(reel)
            times_s = {**reel.times_s, "look": time.monotonic() - started}
            retries = reel.storage_retries + storage_retries() - retries
            yield reels_to_table([replace(looked, times_s=times_s, storage_retries=retries)])

    def _looked(self, reel: Reel) -> Reel:
        keeps = self.folder is not None and self.plan.backend != "truth"
        name = self.plan.look_name(reel.span)
        if keeps and (known := parts.read_look(self.folder, name, reel)) is not None:  # type: ignore[arg-type]
            return known
        looked = look(reel, self.plan, self.decoder, self._detectors, self.listener.on_frame)
        if keeps and looked.span.reason is None:
            parts.write_look(self.folder, name, looked)  # type: ignore[arg-type]
        return looked

    def close(self) -> None:
        super().close()
        if self._detectors is not None:
            self._detectors.close()


RESULT_SCHEMA = pa.schema(
    [
        ("order", pa.int64()),
        ("start_frame", pa.int64()),
        ("frames", pa.int64()),
        ("share", pa.float64()),  # of its source
        ("part", pa.string()),  # null: the whole reel was set aside
        ("record", pa.string()),  # JSON, if there is no part
        ("times_s", pa.string()),  # JSON: by step
        ("done", pa.bool_()),  # by an earlier run
        ("storage_retries", pa.int64()),
    ]
)
"""What the driver receives for each reel."""


class CutClips(_Step):
    """From reels with faces to parts of the table, which it writes to the folder. Yields rows of RESULT_SCHEMA."""

    def __init__(self, work: Work, listener: FrameListener | None = None) -> None:
        super().__init__(work, listener)
        self._networks = Networks(work.plan)

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        for reel in reels_from_table(batch):
            self.listener.begin((reel.order, reel.span.start_frame))
            before = storage_retries()
            row = self._result(reel)
            row["storage_retries"] = reel.storage_retries + storage_retries() - before
            yield pa.Table.from_pylist([row], schema=RESULT_SCHEMA)

    def _result(self, reel: Reel) -> dict[str, object]:
        span, selection = reel.span, None
        times = dict(reel.times_s)
        if span.reason is None and not reel.done:
            started = time.monotonic()
            try:
                selection = select(reel, self.plan, self._networks)
            except MediaError as error:  # of the row's person picture: nothing is kept, so that a better one is used
                span = span.set_aside(error.reason, f"{redacted(span.path)}: {error.problem}")
            times["select"] = time.monotonic() - started
        row: dict[str, object] = {"order": reel.order, "start_frame": span.start_frame, "frames": span.num_frames}
        row["share"] = reel.share
        if span.reason is not None:
            record = record_of(span)
            record.add_left_out(span)
            return row | {"part": None, "record": record.to_json(), "times_s": json.dumps(times), "done": False}
        name = self.plan.part_name(span)
        if selection is not None:
            assert self.folder is not None
            started = time.monotonic()
            record = record_of(span)
            record.samples = selection.samples
            parts.write_part(self.folder, name, self._rows(selection.spans), record)
            times["render"] = time.monotonic() - started
        return row | {"part": name, "record": None, "times_s": json.dumps(times), "done": reel.done}

    def _rows(self, spans: list[Span]) -> Iterator[Clip | Span]:
        kept = [span for span in spans if span.reason is None]
        yield from render_clips(kept, self.plan.picture_px, self.decoder, self.plan.bounds, self.listener.on_frame)
        yield from (span for span in spans if span.reason is not None)


class ClipRows(CutClips):
    """From reels with faces to rows of the clip table, for training straight from film. A reel may give none."""

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        for reel in reels_from_table(batch):
            if reel.span.reason is not None:
                continue
            try:
                selection = select(reel, self.plan, self._networks)
            except MediaError as error:  # of the row's person picture
                logger.warning("%s: %s", redacted(reel.span.path), error.problem)
                continue
            kept = [span for span in selection.spans if span.reason is None]
            for row in render_clips(kept, self.plan.picture_px, self.decoder, self.plan.bounds, self.listener.on_frame):
                if isinstance(row, Clip):
                    yield clips_to_table([row])


def result_record(folder: Folder, row: dict[str, Any]) -> tuple[ReelRecord, pa.Table | None]:
    """The record of a row of RESULT_SCHEMA, and the index columns of its clips."""
    if row["part"] is None:
        return ReelRecord.from_json(row["record"]), None
    return parts.read_part(folder, row["part"])
