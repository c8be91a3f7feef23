"""Spans of footage, which flow between the preprocessing steps as columnar batches, one row each.

A span is a range of frames of one source. A step cuts spans, adds columns to them, or sets them aside with a `reason`;
later steps do not change rows with a reason. So the spans of a source cover each of its frames exactly once, and
every frame that is not used is counted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float32

SPAN_SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("source", pa.string()),
        ("source_hash", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("start_frame", pa.int64()),
        ("num_frames", pa.int64()),
        ("warnings", pa.list_(pa.string())),
        ("speaker_x", pa.float32()),  # a point on the speaker, if the manifest gives one; source pixels
        ("speaker_y", pa.float32()),
        ("person_picture", pa.string()),  # path or URL of a picture of the requested person
        ("person_key", pa.string()),  # changes with that picture
        ("reason", pa.string()),  # null: not set aside
        ("message", pa.string()),
        ("track", pa.int32()),  # one person in one shot; number within the reel
        ("person", pa.int32()),  # number within the reel
        ("landmarks_px", pa.list_(pa.float32())),  # f x 68 x 2, source pixels
        ("confidence", pa.list_(pa.float32())),  # f; 0 where a gap was bridged
        ("head_box", pa.list_(pa.float32())),  # f x 4, source pixels
        ("identity_path", pa.string()),  # an identity picture that belongs to the footage
        ("identity_frames", pa.list_(pa.int64())),  # else k frames of the source ...
        ("identity_box", pa.list_(pa.float32())),  # ... and the head's box in each, k x 4
        ("audio_before", pa.binary()),  # 16 kHz PCM, int16: from audio_context_start to the clip
        ("audio", pa.binary()),  # the clip's own, num_frames * 640 samples
        ("audio_after", pa.binary()),
        ("av_offset_frames", pa.int32()),  # by which the source's sound is late
        ("av_corrected", pa.bool_()),  # whether `audio` is moved back by that
        ("sync_confidence", pa.float32()),
        ("speaking_score", pa.float32()),
        ("occlusion", pa.float32()),
        ("jitter", pa.float32()),
        ("provenance", pa.string()),  # hash of what landmarks and boxes depend on except the film
    ]
)
_FLOAT_SHAPES = {"landmarks_px": (68, 2), "confidence": (), "head_box": (4,), "identity_box": (4,)}


@dataclass(frozen=True, eq=False)
class Span:
    """One row of SPAN_SCHEMA; columns that later steps add are None or empty."""

    path: str
    source: str
    source_hash: str | None = None
    width: int | None = None
    height: int | None = None
    start_frame: int = 0
    num_frames: int = 0
    warnings: tuple[str, ...] = ()
    speaker_x: float | None = None
    speaker_y: float | None = None
    person_picture: str | None = None
    person_key: str | None = None
    reason: str | None = None
    message: str | None = None
    track: int | None = None
    person: int | None = None
    landmarks_px: Float32[np.ndarray, "f 68 2"] | None = None
    confidence: Float32[np.ndarray, "f"] | None = None
    head_box: Float32[np.ndarray, "f 4"] | None = None
    identity_path: str | None = None
    identity_frames: tuple[int, ...] = ()
    identity_box: Float32[np.ndarray, "k 4"] | None = None
    audio_before: bytes | None = None
    audio: bytes | None = None
    audio_after: bytes | None = None
    av_offset_frames: int | None = None
    av_corrected: bool | None = None
    sync_confidence: float | None = None
    speaking_score: float | None = None
    occlusion: float | None = None
    jitter: float | None = None
    provenance: str | None = None

    @property
    def stop_frame(self) -> int:
        return self.start_frame + self.num_frames

    def cut(self, start_frame: int, stop_frame: int) -> Span:
        """The frames [start_frame, stop_frame) of the source, with the columns cut to them."""
        part = slice(start_frame - self.start_frame, stop_frame - self.start_frame)
        return replace(
            self,
            start_frame=start_frame,
            num_frames=stop_frame - start_frame,
            landmarks_px=None if self.landmarks_px is None else self.landmarks_px[part],
            confidence=None if self.confidence is None else self.confidence[part],
            head_box=None if self.head_box is None else self.head_box[part],
        )

    def set_aside(self, reason: str, message: str) -> Span:
        """This span, excluded, with a code of `preprocessing.reasons` and a one-line message; without its arrays."""
        return replace(
            self, reason=reason, message=message, landmarks_px=None, confidence=None, head_box=None, identity_box=None
        )


_NAMES = [field.name for field in fields(Span)]
assert SPAN_SCHEMA.names == _NAMES


def spans_to_table(spans: Iterable[Span]) -> pa.Table:
    """Columnar batch (SPAN_SCHEMA) of spans, in their order."""
    return pa.Table.from_pylist([span_row(span) for span in spans], schema=SPAN_SCHEMA)


def span_row(span: Span) -> dict[str, Any]:
    """A span as a row of SPAN_SCHEMA, with flat arrays."""
    row = {name: getattr(span, name) for name in _NAMES}
    return row | {name: None if row[name] is None else row[name].ravel() for name in _FLOAT_SHAPES}


def spans_from_table(batch: pa.Table) -> list[Span]:
    """Inverse of `spans_to_table`. Missing columns take their defaults, as for a list of paths alone."""
    present = [name for name in _NAMES if name in batch.column_names]
    spans = []
    for row in range(batch.num_rows):
        values: dict = {}
        for name in present:
            cell = batch.column(name)[row]
            if not cell.is_valid:
                continue
            if name in _FLOAT_SHAPES:
                flat = cell.values.to_numpy(zero_copy_only=False).astype(np.float32)
                values[name] = flat.reshape(-1, *_FLOAT_SHAPES[name])
            else:
                value = cell.as_py()
                values[name] = tuple(value) if isinstance(value, list) else value
        spans.append(Span(**values))
    return spans
