"""The clip table, which preprocessing writes and training reads.

One Parquet row is one talking shot of one person. Pictures are encoded still images, so any frame can be read without
its neighbours. One row is one row group, so memory use does not grow with the length of the table. Scenes are stored
with the head and without loss: `tccp.clips.windows` masks the head when it reads a row, and a lossy picture would carry
traces of the head across the edge of the mask.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import UInt8

from tccp.clips.clip import (
    AUDIO_CONTEXT_FRAMES,
    GEOMETRY_VERSION,
    STORED_MARGIN,
    Clip,
    Quality,
    audio_context_start,
    clip_id_of,
    stored_box_of,
)
from tccp.errors import DamagedData, StorageError, TccpError
from tccp.files import AccessError, Folder, Reading, atomic_path, is_storage_failure, redacted

__all__ = [
    "AUDIO_CONTEXT_FRAMES",
    "GEOMETRY_VERSION",
    "INDEX",
    "INDEX_SCHEMA",
    "SCHEMA",
    "SCHEMA_VERSION",
    "STORED_MARGIN",
    "Clip",
    "ClipTable",
    "Quality",
    "audio_context_start",
    "check_schema",
    "clip_from_row",
    "clip_id_of",
    "clips_to_table",
    "decode_still",
    "encode_still",
    "migrated",
    "stored_box_of",
    "write_parquet",
    "write_table",
]

SCHEMA_VERSION = 3
JPEG_QUALITY = 95

_VERSION_KEY = b"tccp.clip.schema_version"
_FLOATS = pa.list_(pa.float32())
_STILLS = pa.list_(pa.binary())

SCHEMA = pa.schema(
    [
        ("clip_id", pa.string()),
        ("schema_version", pa.int32()),
        ("source", pa.string()),  # file name, relative to the folder given
        ("source_hash", pa.string()),  # of the file's bytes
        ("track", pa.int32()),  # number of one person's track in one shot, unique within a reel of the source
        ("person", pa.int32()),  # number of the person, the same in all shots of the reel
        ("start_s", pa.float64()),  # on the source's clock; a whole number of frames
        ("num_frames", pa.int32()),
        ("source_width", pa.int32()),
        ("source_height", pa.int32()),
        ("picture_px", pa.int32()),  # side of scene and identity stills
        ("head_box", _FLOATS),  # f x 4: x0 y0 x1 y1, source pixels, row-major
        ("stored_box", _FLOATS),  # f x 4: the boxes of the face stills
        ("landmarks", _FLOATS),  # f x 68 x 2: 0..1 of the head box
        ("landmark_confidence", _FLOATS),  # f: 0 in interpolated frames of a short gap
        ("scene", _STILLS),  # f stills, letterboxed to a square, head not masked, lossless
        ("face", _STILLS),  # f stills of stored_box
        ("identity", _STILLS),  # head-box crops of the person from outside this clip
        ("audio", pa.binary()),  # 16 kHz mono PCM, little-endian int16, num_frames * 640 samples
        ("audio_before", pa.binary()),  # the sound from audio_context_start to the clip
        ("audio_after", pa.binary()),  # the sound after the clip, up to AUDIO_CONTEXT_FRAMES
        ("blur", pa.float32()),  # 0 sharp .. 1 blurred
        ("face_px", pa.float32()),  # brow to chin, source pixels
        ("brightness", pa.float32()),  # mean luma of the head box, 0..1
        ("yaw_deg", pa.float32()),  # median over the clip
        ("sync_confidence", pa.float32()),  # confidence of av_offset_ms
        ("av_offset_ms", pa.float32()),  # estimated delay of the source's sound; null: no estimate
        ("av_corrected", pa.bool_()),  # whether `audio` was shifted by it
        ("speaking_score", pa.float32()),  # share of the clip in which voice and mouth movement agree, 0..1
        ("occlusion", pa.float32()),  # 0 free .. 1 mouth covered, the maximum over the clip
        ("jitter", pa.float32()),  # of the detected landmarks, in eye distances
        ("bridged", pa.float32()),  # share of frames whose landmarks are interpolated, 0..1
        ("visible", pa.float32()),  # share of the film's picture outside the head box, 0..1, mean over the clip
    ],
    metadata={_VERSION_KEY: str(SCHEMA_VERSION)},
)


_SINCE = {2: {"person", "av_corrected", "speaking_score", "occlusion", "jitter"}, 3: {"bridged", "visible"}}
"""Columns that tables of older versions lack. They are read as null."""
_OPTIONAL = set().union(*_SINCE.values())


_QUALITY = [field.name for field in fields(Quality)]
_FLOAT_SHAPES = {"head_box": (4,), "stored_box": (4,), "landmarks": (68, 2), "landmark_confidence": ()}
_SOUND = ("audio", "audio_before", "audio_after")


def encode_still(picture: UInt8[np.ndarray, "h w 3"], lossless: bool = False) -> bytes:
    """Encodes an RGB picture as JPEG (quality 95, colour at full resolution) or as PNG."""
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
    """A clip table (SCHEMA) with these clips in their order."""
    return pa.Table.from_pylist([_to_row(clip) for clip in clips], schema=SCHEMA)


def _to_row(clip: Clip) -> dict[str, object]:
    row: dict[str, object] = {name: getattr(clip, name) for name in SCHEMA.names if hasattr(clip, name)}
    row |= {"schema_version": SCHEMA_VERSION, **asdict(clip.quality)}
    row |= {name: np.ascontiguousarray(getattr(clip, name), np.float32).ravel() for name in _FLOAT_SHAPES}
    row |= {name: getattr(clip, name).astype("<i2").tobytes() for name in _SOUND}
    return row


def clip_from_row(table: pa.Table, row: int = 0) -> Clip:
    """Converts one row of a clip table to a Clip. Raises TccpError if the table has another schema."""
    check_schema(table.schema, "this table")
    values: dict = {}
    for name in SCHEMA.names:
        if name in _OPTIONAL and name not in table.column_names:
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


_READABLE = tuple(range(1, SCHEMA_VERSION + 1))


def check_schema(schema: pa.Schema, where: str) -> None:
    """Raises TccpError with the reason if this code cannot read clip tables of this `schema`.

    Tables of older versions are read with null in the missing columns. The version is in the file's metadata. For a
    table that lost its metadata (Ray Data blocks), this function checks the columns, and `clip_from_row` checks
    `schema_version` of each row.
    """
    version = (schema.metadata or {}).get(_VERSION_KEY)
    if version is not None and version not in [str(number).encode() for number in _READABLE]:
        raise TccpError(_other_version(where, version.decode(errors="replace")))
    missing = [name for name in SCHEMA.names if name not in schema.names]
    for older in _READABLE:
        names = set().union(*(_SINCE[newer] for newer in _SINCE if newer > older))
        if version == str(older).encode() or (version is None and set(missing) >= names):
            missing = [name for name in missing if name not in names]
            break
    if missing:
        raise TccpError(f"{where} is not a clip table: it has no column {missing[0]}; make one with `tccp preprocess`")


def _other_version(where: str, version: object) -> str:
    readable = f"{', '.join(map(str, _READABLE[:-1]))} and {_READABLE[-1]}"
    return f"{where} has clip schema version {version}, this code reads {readable}: preprocess the footage again"


def migrated(table: pa.Table) -> pa.Table:
    """Converts a table of any readable version to SCHEMA. Columns that an older version lacks are null."""
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
    """Writes clips, or clip tables, to one Parquet file with one row per row group. Returns the number of rows.

    Keeps one row in memory at a time. The file appears under its name only when it is complete.
    metadata: called after the last row; returns metadata for the file.
    """
    with atomic_path(Path(path)) as temporary:
        return write_parquet(rows, temporary, metadata)


def write_parquet(
    rows: Iterable[Clip] | Iterable[pa.Table], path: Path, metadata: Callable[[], dict[str, str]] | None = None
) -> int:
    """Like `write_table`, but writes directly to `path`, without a temporary file."""
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
"""The file that makes a folder a clip table. It lists all clips in order, with the file and row of each."""
_VALUES = [field for field in SCHEMA if not pa.types.is_list(field.type) and not pa.types.is_binary(field.type)]
INDEX_SCHEMA = pa.schema(
    [
        ("part", pa.string()),  # file with the row, relative to the folder
        ("row", pa.int32()),
        *_VALUES,
    ],
    metadata={_VERSION_KEY: str(SCHEMA_VERSION)},
)
"""Columns of the index: the file and row of a clip, and all its columns with a single value."""


_OPEN_FILES = 16


class ClipTable:
    """Random access to a clip table: a folder with an index and parts, or one Parquet file (`clips.parquet`).

    Keeps only the ids and the most recently used clips (`keep`) in memory. The folder may be a path or a URL. Use it
    from one thread: two threads that read one Parquet file can deadlock. Until it is closed, preprocessing removes no
    files of a table on this machine, not even those that a newer index no longer names.
    Raises TccpError if the table is missing, is not a clip table or has an unreadable version; KeyError for an unknown
    id.
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
        self._names = (INDEX, "clips", "lips") if name == INDEX else (name,)
        self.folder = folder
        self._files: OrderedDict[str, pq.ParquetFile] = OrderedDict()
        self._cache: OrderedDict[str, Clip] = OrderedDict()
        self._keep = keep
        self._reading = Reading(folder)  # before the index is read: then nobody removes what it names
        try:
            self._read_index(name)
        except (TccpError, StorageError):
            self.close()
            raise

    @property
    def places(self) -> list[str]:
        """What the table consists of: its file, or the index and the folders of parts and lips."""
        return [self.folder.path(name) for name in self._names]

    def _read_index(self, name: str) -> None:
        folder, index = self.folder, self._opened(name)
        columns = ["clip_id", "num_frames", "source_hash"]
        if name == INDEX:
            _check_version(index.schema_arrow, folder.path(name))
            table = index.read(columns=[*columns, "part", "row"])
            locations = zip(table.column("part").to_pylist(), table.column("row").to_pylist(), strict=True)
        else:
            check_schema(index.schema_arrow, folder.path(name))
            if index.num_row_groups != index.metadata.num_rows:
                raise TccpError(
                    f"{folder.path(name)} does not have one row per row group: "
                    "write it with tccp.clips.clip_table.write_table"
                )
            table = index.read(columns=columns)
            locations = zip(itertools.repeat(name), range(table.num_rows), strict=False)
        self.ids: list[str] = table.column("clip_id").to_pylist()
        self.num_frames: dict[str, int] = dict(zip(self.ids, table.column("num_frames").to_pylist(), strict=True))
        self.source_hash: dict[str, str] = dict(zip(self.ids, table.column("source_hash").to_pylist(), strict=True))
        self._location: dict[str, tuple[str, int]] = dict(zip(self.ids, locations, strict=True))
        if len(self._location) != len(self.ids):
            raise TccpError(f"{folder.path(name)} has the same clip_id in several rows: preprocess the footage again")

    def _absent(self, name: str) -> str:
        make = "give the folder that `tccp preprocess` writes"
        if name != self._names[0]:
            return f"the clip table {self.folder} lacks {name}: preprocess the footage again"
        there = self.folder.exists()
        problem = f"it holds neither {INDEX} nor {name}" if there else "there is no such folder or file"
        return f"no clip table at {redacted(str(self.folder))}: {problem}; {make}"

    def _opened(self, name: str) -> pq.ParquetFile:
        if name not in self._files:
            try:
                local = self.folder.local
                self._files[name] = pq.ParquetFile(self.folder.open(name) if local is None else local / name)
            except FileNotFoundError:
                raise TccpError(self._absent(name)) from None
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
        """The rows of these clips as one table, in the given order. Raises DamagedData if one cannot be read."""
        return pa.concat_tables([self._row(*self._location[clip_id]) for clip_id in clip_ids])

    def _row(self, part: str, row: int) -> pa.Table:
        try:
            return self._opened(part).read_row_group(row)
        except AccessError:  # wrong credentials damage nothing
            raise
        except (TccpError, pa.ArrowException, OSError) as error:
            if is_storage_failure(error):
                raise
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise DamagedData(
                f"row {row} of {self.folder.path(part)} cannot be read ({reason}): preprocess the footage again"
            ) from None

    def values(self, names: Sequence[str]) -> dict[str, list]:
        """Columns with single values, in the table's order, from its index or, without an index, clip by clip.

        A column that a table of an older schema lacks contains only None.
        """
        if self.folder.exists(INDEX):
            with self.folder.open(INDEX) as file:
                index = pq.read_table(file)
            if index.column("clip_id").to_pylist() == self.ids:
                absent = [None] * len(self.ids)
                there = set(index.column_names)
                return {name: index.column(name).to_pylist() if name in there else absent for name in names}
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
        self._reading.close()

    def __enter__(self) -> ClipTable:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _check_version(schema: pa.Schema, where: str) -> None:
    version = (schema.metadata or {}).get(_VERSION_KEY, b"none")
    if version not in [str(number).encode() for number in _READABLE]:
        raise TccpError(_other_version(where, version.decode(errors="replace")))
