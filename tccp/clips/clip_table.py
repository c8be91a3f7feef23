"""The clip table: what preprocessing writes and everything about training data reads.

One Parquet row is one talking shot of one person. Pictures are encoded still images, so any frame is read without its
neighbours; one row is one row group, so a table of any length is read row by row in the same memory. Scenes are stored
with the head in them and without loss: the mask is drawn when a row is read (`tccp.clips.windows`), and a lossy still would have
carried traces of the head across the mask's edge.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float32, Int16, UInt8

from tccp.config import FPS, SAMPLES_PER_FRAME
from tccp.errors import DamagedData, StorageError, TccpError
from tccp.files import Folder, atomic_path, is_storage_failure

SCHEMA_VERSION = 2
GEOMETRY_VERSION = 2
"""Raised whenever head boxes or crops of the same footage come out differently, so that clip ids change with them."""
STORED_MARGIN = 1.25
"""Side of the stored face picture over the side of the head box: the room that jitter may use."""
AUDIO_CONTEXT_FRAMES = 5
"""Frames of sound kept before (at least) and after a clip where the film has them, for its outermost mel windows."""
JPEG_QUALITY = 95

_VERSION_KEY = b"tccp.clips.clip_table.schema_version"
_FLOATS = pa.list_(pa.float32())
_STILLS = pa.list_(pa.binary())

SCHEMA = pa.schema(
    [
        ("clip_id", pa.string()),
        ("schema_version", pa.int32()),
        ("source", pa.string()),  # file name, relative to the folder that was given
        ("source_hash", pa.string()),  # of the file's bytes
        ("track", pa.int32()),  # one person in one shot; number within a minute or so of the source
        ("person", pa.int32()),  # likewise; the same over its shots
        ("start_s", pa.float64()),  # after the source's common start; a whole number of frames
        ("num_frames", pa.int32()),
        ("source_width", pa.int32()),
        ("source_height", pa.int32()),
        ("picture_px", pa.int32()),  # side of scene and identity stills
        ("head_box", _FLOATS),  # f x 4: x0 y0 x1 y1, source pixels, row-major
        ("stored_box", _FLOATS),  # f x 4: what the face stills show
        ("landmarks", _FLOATS),  # f x 68 x 2: 0..1 of the head box
        ("landmark_confidence", _FLOATS),  # f: 0 where a short gap was bridged
        ("scene", _STILLS),  # f stills, letterboxed to a square, head not masked, lossless
        ("face", _STILLS),  # f stills of stored_box
        ("identity", _STILLS),  # head-box crops of the person from outside this clip
        ("audio", pa.binary()),  # 16 kHz mono PCM, little-endian int16, num_frames * 640 samples
        ("audio_before", pa.binary()),  # the sound from audio_context_start to the clip
        ("audio_after", pa.binary()),  # up to AUDIO_CONTEXT_FRAMES
        ("blur", pa.float32()),  # 0 sharp .. 1 blurred
        ("face_px", pa.float32()),  # brow to chin, source pixels
        ("brightness", pa.float32()),  # mean luma of the head box, 0..1
        ("yaw_deg", pa.float32()),  # median over the clip
        ("sync_confidence", pa.float32()),  # how far to trust av_offset_ms
        ("av_offset_ms", pa.float32()),  # best guess by how much the source's sound comes late; null: none
        ("av_corrected", pa.bool_()),  # whether `audio` was moved back by it
        ("speaking_score", pa.float32()),  # share of the clip in which voice and mouth go together, 0..1
        ("occlusion", pa.float32()),  # 0 free .. 1 something before the mouth, the clip's worst
        ("jitter", pa.float32()),  # of the landmarks as found, in eye distances
    ],
    metadata={_VERSION_KEY: str(SCHEMA_VERSION)},
)


_SINCE_2 = {"person", "av_corrected", "speaking_score", "occlusion", "jitter"}
"""Columns that tables of version 1 lack; read from there, they are null."""


@dataclass(frozen=True)
class Quality:
    """Numbers to filter clips by; units are those of the clip table's columns, None is not measured."""

    blur: float
    face_px: float
    brightness: float
    yaw_deg: float
    sync_confidence: float | None = None
    av_offset_ms: float | None = None
    av_corrected: bool | None = None
    speaking_score: float | None = None
    occlusion: float | None = None
    jitter: float | None = None


@dataclass(frozen=True, eq=False)
class Clip:
    """One row of the clip table, with numeric columns as arrays and pictures still encoded."""

    clip_id: str
    source: str
    source_hash: str
    track: int
    start_s: float
    num_frames: int
    source_width: int
    source_height: int
    picture_px: int
    head_box: Float32[np.ndarray, "f 4"]
    stored_box: Float32[np.ndarray, "f 4"]
    landmarks: Float32[np.ndarray, "f 68 2"]
    landmark_confidence: Float32[np.ndarray, "f"]
    scene: list[bytes]
    face: list[bytes]
    identity: list[bytes]
    audio: Int16[np.ndarray, "samples"]
    audio_before: Int16[np.ndarray, "before"]
    audio_after: Int16[np.ndarray, "after"]
    quality: Quality
    person: int | None = None

    def __post_init__(self) -> None:
        for name in ("head_box", "stored_box", "landmarks", "landmark_confidence", "scene", "face"):
            if len(getattr(self, name)) != self.num_frames:
                given = f"{name} has {len(getattr(self, name))} frames"
                raise TccpError(f"clip {self.clip_id}: {given}, num_frames is {self.num_frames}")
        if len(self.audio) != self.num_frames * SAMPLES_PER_FRAME:
            raise TccpError(
                f"clip {self.clip_id}: {len(self.audio)} samples of sound; {self.num_frames} frames need "
                f"{self.num_frames * SAMPLES_PER_FRAME}"
            )
        if len(self.audio_before) % SAMPLES_PER_FRAME:
            raise TccpError(f"clip {self.clip_id}: sound before the clip must be whole frames")
        if not self.identity:
            raise TccpError(f"clip {self.clip_id} has no identity picture")

    @property
    def start_frame(self) -> int:
        return round(self.start_s * FPS)


_QUALITY = [field.name for field in fields(Quality)]
_FLOAT_SHAPES = {"head_box": (4,), "stored_box": (4,), "landmarks": (68, 2), "landmark_confidence": ()}
_SOUND = ("audio", "audio_before", "audio_after")


def clip_id_of(source_hash: str, track: int, start_frame: int, content: bytes = b"") -> str:
    """Stable content hash of a clip, 32 hex digits: the file's bytes, not its name, and where in it the clip lies.

    content: whatever else the clip was made from; what is derived from a clip is kept under its id.
    """
    key = f"{source_hash}/{track}/{start_frame}/{GEOMETRY_VERSION}".encode()
    return hashlib.blake2b(key + content, digest_size=16).hexdigest()


def audio_context_start(start_frame: int) -> int:
    """The frame at which the sound kept before a clip begins.

    A multiple of 5 frames, which is a whole number of mel columns (16): so a clip's mel is the film's, to the column.
    """
    return max(0, (start_frame - AUDIO_CONTEXT_FRAMES) // 5 * 5)


def stored_box_of(head_box: Float32[np.ndarray, "f 4"]) -> Float32[np.ndarray, "f 4"]:
    """Head boxes enlarged by STORED_MARGIN about their centres."""
    center = (head_box[:, :2] + head_box[:, 2:]) / 2
    half = (head_box[:, 2:] - head_box[:, :2]) / 2 * STORED_MARGIN
    return np.concatenate([center - half, center + half], axis=1).astype(np.float32)


def encode_still(picture: UInt8[np.ndarray, "h w 3"], lossless: bool = False) -> bytes:
    """RGB picture as JPEG (quality 95, colour at full resolution), or as PNG."""
    if lossless:
        suffix, flags = ".png", {cv2.IMWRITE_PNG_COMPRESSION: 1}
    else:
        full_colour = {cv2.IMWRITE_JPEG_SAMPLING_FACTOR: cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444}
        suffix, flags = ".jpg", {cv2.IMWRITE_JPEG_QUALITY: JPEG_QUALITY, **full_colour}
    flat = [value for pair in flags.items() for value in pair]
    done, data = cv2.imencode(suffix, cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), flat)
    assert done, f"cannot encode a picture of shape {picture.shape}"
    return data.tobytes()


def decode_still(data: bytes) -> UInt8[np.ndarray, "h w 3"]:
    """RGB picture of an encoded still. Raises DamagedData if the bytes are no picture."""
    picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) if data else None
    if picture is None:
        raise DamagedData(f"a still of {len(data)} bytes does not decode: the clip table is damaged, preprocess again")
    return np.asarray(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB), np.uint8)


def clips_to_table(clips: Iterable[Clip]) -> pa.Table:
    """Clip table (SCHEMA) of clips, in their order."""
    return pa.Table.from_pylist([_to_row(clip) for clip in clips], schema=SCHEMA)


def _to_row(clip: Clip) -> dict[str, object]:
    row: dict[str, object] = {name: getattr(clip, name) for name in SCHEMA.names if hasattr(clip, name)}
    row |= {"schema_version": SCHEMA_VERSION, **asdict(clip.quality)}
    row |= {name: np.ascontiguousarray(getattr(clip, name), np.float32).ravel() for name in _FLOAT_SHAPES}
    row |= {name: getattr(clip, name).astype("<i2").tobytes() for name in _SOUND}
    return row


def clip_from_row(table: pa.Table, row: int = 0) -> Clip:
    """One row of a clip table as a Clip. Raises TccpError if the table is of another schema."""
    check_schema(table.schema, "this table")
    values: dict = {}
    for name in SCHEMA.names:
        if name in _SINCE_2 and name not in table.column_names:
            values[name] = None
            continue
        cell = table.column(name)[row]
        if name in _FLOAT_SHAPES:
            flat = cell.values.to_numpy(zero_copy_only=False).astype(np.float32)
            values[name] = flat.reshape(-1, *_FLOAT_SHAPES[name])
        elif name in _SOUND:
            values[name] = np.frombuffer(cell.as_py(), "<i2").astype(np.int16)
        else:
            values[name] = cell.as_py()
    version = values.pop("schema_version")
    if version not in _READABLE:
        raise TccpError(_other_version("this row", version))
    return Clip(quality=Quality(**{name: values.pop(name) for name in _QUALITY}), **values)


_READABLE = (1, SCHEMA_VERSION)


def check_schema(schema: pa.Schema, where: str) -> None:
    """Raises TccpError, naming the reason, unless `schema` is that of a clip table this code reads.

    Tables of version 1 are read as they are: what they lack is null. The version stands in the file's metadata; a table
    that lost its metadata on the way (Ray Data blocks) is judged by its columns here and by each row's
    `schema_version` in `clip_from_row`.
    """
    version = (schema.metadata or {}).get(_VERSION_KEY)
    if version is not None and version not in [str(number).encode() for number in _READABLE]:
        raise TccpError(_other_version(where, version.decode(errors="replace")))
    missing = [name for name in SCHEMA.names if name not in schema.names]
    if version == b"1" or set(missing) >= _SINCE_2:
        missing = [name for name in missing if name not in _SINCE_2]
    if missing:
        raise TccpError(f"{where} is not a clip table: it has no column {missing[0]}; make one with `tccp preprocess`")


def _other_version(where: str, version: object) -> str:
    readable = " and ".join(map(str, _READABLE))
    return f"{where} has clip schema version {version}, this code reads {readable}: preprocess the footage again"


def migrated(table: pa.Table) -> pa.Table:
    """A table of any readable version as SCHEMA: columns in order, what an older version lacks null."""
    check_schema(table.schema, "this table")
    columns = [
        table.column(field.name) if field.name in table.column_names else pa.nulls(table.num_rows, field.type)
        for field in SCHEMA
    ]
    versions = pa.array([SCHEMA_VERSION] * table.num_rows, pa.int32())
    columns[SCHEMA.get_field_index("schema_version")] = versions
    return pa.table(columns, names=SCHEMA.names).cast(SCHEMA)


def write_table(
    rows: Iterable[Clip] | Iterable[pa.Table], path: Path, metadata: Callable[[], dict[str, str]] | None = None
) -> int:
    """Writes clips, or clip tables, to one Parquet file, one row per row group; returns the number of rows.

    Streams: one row is in memory at a time. The file appears under its name only when it is whole.
    metadata: asked after the last row, for the file's own.
    """
    with atomic_path(Path(path)) as temporary:
        return write_parquet(rows, temporary, metadata)


def write_parquet(
    rows: Iterable[Clip] | Iterable[pa.Table], path: Path, metadata: Callable[[], dict[str, str]] | None = None
) -> int:
    """As `write_table`, but straight to the name that is given."""
    lossless = [name for name in SCHEMA.names if SCHEMA.field(name).type in (_FLOATS, pa.binary())]
    count = 0
    with pq.ParquetWriter(
        path,
        SCHEMA,
        compression={name: "zstd" if name in lossless else "none" for name in SCHEMA.names},
        use_dictionary=False,
        write_statistics=False,
    ) as writer:
        for item in rows:
            table = migrated(item if isinstance(item, pa.Table) else clips_to_table([item]))
            for row in range(table.num_rows):
                writer.write_table(table.slice(row, 1), row_group_size=1)
                count += 1
        if metadata is not None:
            writer.add_key_value_metadata(metadata())
    return count


INDEX = "index.parquet"
"""The file that makes a folder a clip table: which clips there are, in order, and where their rows lie."""
_VALUES = [field for field in SCHEMA if not pa.types.is_list(field.type) and not pa.types.is_binary(field.type)]
INDEX_SCHEMA = pa.schema(
    [
        ("part", pa.string()),  # file with the row, relative to the folder
        ("row", pa.int32()),
        *_VALUES,
    ],
    metadata={_VERSION_KEY: str(SCHEMA_VERSION)},
)
"""Columns of the index: a clip's place, and all of its columns that are single values."""


_OPEN_FILES = 16


class ClipTable:
    """Random access to a clip table: a folder with an index and parts, or one Parquet file (`clips.parquet`).

    Only ids, and the clips used last, are in memory. A folder may be a path or a URL. For one thread: a Parquet file
    read by two at once can make both wait for ever.
    Raises TccpError if it is absent, not a clip table, or of a version that cannot be read; KeyError for an unknown id.
    """

    def __init__(self, path: Path | str, keep: int = 8) -> None:
        folder, name = Folder(path), ""
        if folder.local is not None and folder.local.is_file():
            name = folder.local.name
            folder = Folder(folder.local.parent)
        elif folder.exists(INDEX):
            name = INDEX
        else:
            name = "clips.parquet"
        self.folder = folder
        self._files: OrderedDict[str, pq.ParquetFile] = OrderedDict()
        self._cache: OrderedDict[str, Clip] = OrderedDict()
        self._keep = keep
        try:
            self._read_index(name)
        except (TccpError, StorageError):
            self.close()
            raise

    def _read_index(self, name: str) -> None:
        folder, index = self.folder, self._opened(name)
        columns = ["clip_id", "num_frames", "source_hash"]
        if name == INDEX:
            _check_version(index.schema_arrow, folder.path(name))
            table = index.read(columns=[*columns, "part", "row"])
            places = zip(table.column("part").to_pylist(), table.column("row").to_pylist(), strict=True)
        else:
            check_schema(index.schema_arrow, folder.path(name))
            if index.num_row_groups != index.metadata.num_rows:
                raise TccpError(
                    f"{folder.path(name)} does not have one row per row group: write it with tccp.clips.clip_table.write_table"
                )
            table = index.read(columns=columns)
            places = zip(itertools.repeat(name), range(table.num_rows), strict=False)
        self.ids: list[str] = table.column("clip_id").to_pylist()
        self.num_frames: dict[str, int] = dict(zip(self.ids, table.column("num_frames").to_pylist(), strict=True))
        self.source_hash: dict[str, str] = dict(zip(self.ids, table.column("source_hash").to_pylist(), strict=True))
        self._place: dict[str, tuple[str, int]] = dict(zip(self.ids, places, strict=True))
        if len(self._place) != len(self.ids):
            raise TccpError(f"{folder.path(name)} has the same clip_id in several rows: preprocess the footage again")

    def _opened(self, name: str) -> pq.ParquetFile:
        if name not in self._files:
            try:
                local = self.folder.local
                self._files[name] = pq.ParquetFile(self.folder.open(name) if local is None else local / name)
            except FileNotFoundError:
                raise TccpError(f"no clip table at {self.folder.path(name)}: make one with `tccp preprocess`") from None
            except (pa.ArrowInvalid, OSError) as error:
                if is_storage_failure(error):
                    raise StorageError(f"cannot read {self.folder.path(name)}: {str(error).splitlines()[0]}") from None
                reason = str(error).splitlines()[0]
                raise TccpError(f"{self.folder.path(name)} is not a readable clip table ({reason})") from None
        self._files.move_to_end(name)
        while len(self._files) > _OPEN_FILES:
            self._files.popitem(last=False)[1].close(force=True)
        return self._files[name]

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[Clip]:
        return (self[clip_id] for clip_id in self.ids)

    def __getitem__(self, clip_id: str) -> Clip:
        if clip_id in self._cache:
            self._cache.move_to_end(clip_id)
            return self._cache[clip_id]
        clip = clip_from_row(self.rows([clip_id]))
        self._cache[clip_id] = clip
        while len(self._cache) > self._keep:
            self._cache.popitem(last=False)
        return clip

    def rows(self, clip_ids: Sequence[str]) -> pa.Table:
        """The rows of these clips, in the order given, as a columnar batch."""
        rows = []
        for clip_id in clip_ids:
            part, row = self._place[clip_id]
            rows.append(self._opened(part).read_row_group(row))
        return pa.concat_tables(rows)

    def values(self, names: Sequence[str]) -> dict[str, list]:
        """Columns of single values, in the table's order: from its index, or without one clip by clip.

        A column that a table of an older schema lacks is None throughout.
        """
        if self.folder.exists(INDEX):
            with self.folder.open(INDEX) as file:
                index = pq.read_table(file, columns=["clip_id", *(name for name in names if name != "clip_id")])
            if index.column("clip_id").to_pylist() == self.ids:
                return {name: index.column(name).to_pylist() for name in names}
        columns: dict[str, list] = {name: [] for name in names}
        for clip_id in self.ids:
            row = self.rows([clip_id])
            for name in names:
                columns[name].append(row.column(name)[0].as_py() if name in row.column_names else None)
        return columns

    def close(self) -> None:
        for file in self._files.values():
            file.close(force=True)
        self._files.clear()

    def __enter__(self) -> ClipTable:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _check_version(schema: pa.Schema, where: str) -> None:
    version = (schema.metadata or {}).get(_VERSION_KEY, b"none")
    if version != str(SCHEMA_VERSION).encode():
        raise TccpError(_other_version(where, version.decode(errors="replace")))
