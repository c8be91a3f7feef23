"""Reels and tracks: the sound, cuts and faces of a part of a film, from which clips are selected.

A *reel* is a part of one source of bounded length, the unit of work: a two-hour film is 120 reels, one of which is in
memory at a time. A *track* is one person in one shot of a reel. Both hold numbers and small pictures, no frames.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
from jaxtyping import Float32, Int16, Int32

from preprocessing.spans import SPAN_SCHEMA, Span, span_row, spans_from_table
from tccp.config import SAMPLES_PER_FRAME

CHIP_PX = 112
"""Side of the small face pictures that are kept of every fifth frame."""
SPEECH_CHIP_PX = 224
"""Their side if a speech network (Light-ASD, SyncNet) uses them; then they are kept of every frame."""
CHIP_MARGIN = 0.4
"""Margin around the face in a chip, as in the training of the speech networks (syncnet_python's crop scale)."""


@dataclass(frozen=True, eq=False)
class FilmSound:
    """16 kHz mono sound of a reel and its surroundings, from frame `start_frame` of the source's 25 fps clock on."""

    pcm: Int16[np.ndarray, " n"]
    start_frame: int

    def between(self, start_frame: int, stop_frame: int, shift: int = 0) -> Int16[np.ndarray, " m"]:
        """The samples of frames [start_frame, stop_frame), padded with silence where there is no sound.

        shift: samples by which the sound is late; the returned sound is moved back by them.
        """
        first = (start_frame - self.start_frame) * SAMPLES_PER_FRAME + shift
        count = (stop_frame - start_frame) * SAMPLES_PER_FRAME
        padded = np.zeros(count, np.int16)
        low, high = max(first, 0), min(first + count, len(self.pcm))
        if low < high:
            padded[low - first : high - first] = self.pcm[low:high]
        return padded


@dataclass(frozen=True, eq=False)
class Faces:
    """The n faces of a reel, in order of frame.

    frame: on the source's clock. box: x0 y0 x1 y1 around the face, landmarks: 68 iBUG points, both in source pixels;
    landmarks are NaN if the detector gives none. confidence: 0..1. chips: JPEG pictures (`chip_box`) of some of the
    faces, by index 0..n-1, all of the same side.
    """

    frame: Int32[np.ndarray, " n"]
    box: Float32[np.ndarray, "n 4"]
    landmarks: Float32[np.ndarray, "n 68 2"]
    confidence: Float32[np.ndarray, " n"]
    chips: Mapping[int, bytes]


@dataclass(frozen=True, eq=False)
class Reel:
    """A part of one source, of bounded length.

    span: the source and the frames of the reel; if it has a reason, the whole reel is set aside. order: the source's
    number in the listing. usable: the frames [first, stop) of the whole source that have picture and sound; frames
    outside are counted, but not used. sound: from a second before the reel to a second after it. done: whether an
    earlier run has made its clips. share: the reel's share of the source's frames. times_s: duration of each step.
    storage_retries: how often the steps had to repeat an access to storage.
    Pass 1 adds the rest. cuts: frames at which a new shot begins, ascending. head_box: per frame, from truth files.
    """

    span: Span
    order: int = 0
    usable: tuple[int, int] = (0, 0)
    sound: FilmSound | None = None
    done: bool = False
    share: float = 1.0
    cuts: tuple[int, ...] = ()
    faces: Faces | None = None
    head_box: Float32[np.ndarray, "f 4"] | None = None
    times_s: Mapping[str, float] = field(default_factory=dict)
    storage_retries: int = 0

    @property
    def start_frame(self) -> int:
        """The first usable frame of the reel."""
        return min(max(self.span.start_frame, self.usable[0]), self.stop_frame)

    @property
    def stop_frame(self) -> int:
        """The end of the usable frames of the reel."""
        return max(min(self.span.stop_frame, self.usable[1]), self.span.start_frame)


@dataclass(frozen=True, eq=False)
class Track:
    """One person in one shot: a row for each frame from `start_frame` on, without gaps.

    Where a short gap was bridged, confidence is 0, and box and landmarks are interpolated linearly. box: x0 y0 x1 y1,
    landmarks: 68 iBUG points, both in source pixels. chips: JPEG pictures of the face, by frame on the source's clock.
    number: of the track within the reel. shot: number of the shot within the reel.
    """

    number: int
    shot: int
    start_frame: int
    box: Float32[np.ndarray, "f 4"]
    landmarks: Float32[np.ndarray, "f 68 2"]
    confidence: Float32[np.ndarray, " f"]
    chips: Mapping[int, bytes]

    @property
    def num_frames(self) -> int:
        return len(self.box)

    @property
    def stop_frame(self) -> int:
        return self.start_frame + len(self.box)


def chip_box(box: Float32[np.ndarray, "4"]) -> Float32[np.ndarray, "4"]:
    """The square that a face's chip shows: the face box with a margin at the sides and twice that margin below.

    With centre (x, y) and b half the longer side of the box: x - 1.4 b to x + 1.4 b and y - b to y + 1.8 b.
    """
    x, y = (box[:2] + box[2:]) / 2
    half = float(np.max(box[2:] - box[:2])) / 2
    wide = half * (1 + CHIP_MARGIN)
    return np.array([x - wide, y - half, x + wide, y - half + 2 * wide], np.float32)


_LOOKED = [
    ("cuts", pa.list_(pa.int64())),
    ("face_frame", pa.list_(pa.int32())),
    ("face_box", pa.list_(pa.float32())),  # n x 4
    ("face_landmarks", pa.list_(pa.float32())),  # n x 68 x 2
    ("face_confidence", pa.list_(pa.float32())),
    ("chip_face", pa.list_(pa.int32())),  # which face each chip shows
    ("chips", pa.list_(pa.binary())),
    ("reel_head_box", pa.list_(pa.float32())),  # f x 4
]
LOOKED_SCHEMA = pa.schema(_LOOKED)
"""The columns that pass 1 adds to a reel: numbers and chips."""
REEL_SCHEMA = pa.schema(
    [
        *SPAN_SCHEMA,
        ("order", pa.int64()),
        ("usable", pa.list_(pa.int64())),
        ("sound", pa.binary()),  # int16
        ("sound_start_frame", pa.int64()),
        ("done", pa.bool_()),
        ("share", pa.float64()),
        *_LOOKED,
        ("times_s", pa.string()),  # JSON
        ("storage_retries", pa.int64()),
    ]
)


def looked_to_table(reel: Reel) -> pa.Table:
    """The results of pass 1 for a reel, as one row of LOOKED_SCHEMA."""
    return pa.Table.from_pylist([_looked_row(reel)], schema=LOOKED_SCHEMA)


def with_looked(reel: Reel, table: pa.Table, row: int = 0) -> Reel:
    """The reel with the results of pass 1 from a row of LOOKED_SCHEMA."""
    cells = {name: table.column(name)[row] for name in LOOKED_SCHEMA.names}
    if not cells["face_frame"].is_valid:
        return reel

    def floats(name: str, *shape: int) -> Float32[np.ndarray, "..."]:
        return cells[name].values.to_numpy(zero_copy_only=False).astype(np.float32).reshape(-1, *shape)

    faces = Faces(
        frame=cells["face_frame"].values.to_numpy(zero_copy_only=False).astype(np.int32),
        box=floats("face_box", 4),
        landmarks=floats("face_landmarks", 68, 2),
        confidence=floats("face_confidence"),
        chips=dict(zip(cells["chip_face"].as_py(), cells["chips"].as_py(), strict=True)),
    )
    head_box = floats("reel_head_box", 4) if cells["reel_head_box"].is_valid else None
    return replace(reel, cuts=tuple(cells["cuts"].as_py()), faces=faces, head_box=head_box)


def _looked_row(reel: Reel) -> dict[str, object]:
    if reel.faces is None:
        return dict.fromkeys(LOOKED_SCHEMA.names)
    return {
        "cuts": list(reel.cuts),
        "face_frame": reel.faces.frame,
        "face_box": reel.faces.box.ravel(),
        "face_landmarks": reel.faces.landmarks.ravel(),
        "face_confidence": reel.faces.confidence,
        "chip_face": list(reel.faces.chips),
        "chips": list(reel.faces.chips.values()),
        "reel_head_box": None if reel.head_box is None else reel.head_box.ravel(),
    }


def reels_to_table(reels: Iterable[Reel]) -> pa.Table:
    """Columnar batch (REEL_SCHEMA) of reels, in their order."""
    rows = []
    for reel in reels:
        row: dict[str, object] = {
            "order": reel.order,
            "usable": list(reel.usable),
            "sound": None if reel.sound is None else reel.sound.pcm.astype("<i2").tobytes(),
            "sound_start_frame": None if reel.sound is None else reel.sound.start_frame,
            "done": reel.done,
            "share": reel.share,
            "times_s": json.dumps(dict(reel.times_s)),
            "storage_retries": reel.storage_retries,
        }
        rows.append(span_row(reel.span) | row | _looked_row(reel))
    return pa.Table.from_pylist(rows, schema=REEL_SCHEMA)


def reels_from_table(batch: pa.Table) -> list[Reel]:
    """Inverse of `reels_to_table`."""
    reels = []
    for row, span in enumerate(spans_from_table(batch)):
        cells = {name: batch.column(name)[row].as_py() for name in ("order", "usable", "sound", "sound_start_frame")}
        sound = None
        if cells["sound"] is not None:
            sound = FilmSound(np.frombuffer(cells["sound"], "<i2").astype(np.int16), cells["sound_start_frame"])
        first, stop = cells["usable"]
        done, times_s = batch.column("done")[row].as_py(), json.loads(batch.column("times_s")[row].as_py())
        share = batch.column("share")[row].as_py()
        retries = batch.column("storage_retries")[row].as_py()
        reel = Reel(span, cells["order"], (first, stop), sound, done, share, times_s=times_s, storage_retries=retries)
        reels.append(with_looked(reel, batch, row))
    return reels
