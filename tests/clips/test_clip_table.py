"""The clip table: clips round-trip through disk, writes are atomic, and incompatible tables are refused."""

from __future__ import annotations

import dataclasses
import errno
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_clips import make_clip

from tccp.clips import clip_table as clips
from tccp.clips.clip_table import Clip, ClipTable, clip_from_row, clip_id_of, clips_to_table, write_table
from tccp.errors import TccpError


def assert_same(a: Clip, b: Clip) -> None:
    for field in dataclasses.fields(Clip):
        one, other = getattr(a, field.name), getattr(b, field.name)
        if isinstance(one, np.ndarray):
            assert one.dtype == other.dtype, field.name
            np.testing.assert_array_equal(one, other, err_msg=field.name)
        else:
            assert one == other, field.name


def test_clip_round_trips_through_a_row():
    originals = [make_clip(0), make_clip(1, num_frames=20)]
    table = clips_to_table(originals)
    for row, original in enumerate(originals):
        assert_same(clip_from_row(table, row), original)
    assert clip_from_row(table).start_frame == 50
    assert clip_from_row(table).quality.sync_confidence is None


def test_clips_are_read_by_id_in_any_order(tmp_path: Path) -> None:
    originals = [make_clip(n, num_frames=16 + n) for n in range(5)]
    assert write_table(originals, tmp_path / "clips.parquet") == 5
    with ClipTable(tmp_path, keep=2) as table:
        assert table.ids == [c.clip_id for c in originals]
        assert table.num_frames == {c.clip_id: c.num_frames for c in originals}
        for n in (3, 0, 4, 3, 1, 2, 0):
            assert_same(table[originals[n].clip_id], originals[n])
        assert [c.clip_id for c in table] == table.ids
        both = table.rows([originals[4].clip_id, originals[1].clip_id])
        assert both.column("num_frames").to_pylist() == [20, 17]
        with pytest.raises(KeyError):
            table["nobody"]


def test_the_same_clips_write_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_table((make_clip(n) for n in range(3)), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_memory_does_not_grow_with_the_table(tmp_path: Path) -> None:
    """For writing and reading, the peak for many clips is that for a few, plus their ids."""

    def peak(count: int) -> int:
        path = tmp_path / f"{count}.parquet"
        pool = pa.default_memory_pool()
        tracemalloc.start()
        highest = 0
        write_table((make_clip(n, still_px=96) for n in range(count)), path)
        with ClipTable(path, keep=2) as table:
            for _ in table:
                highest = max(highest, pool.bytes_allocated())
        python = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return highest + python

    few, many = peak(6), peak(48)
    one = sum(map(len, make_clip(0, still_px=96).face))
    assert few > one  # the measurement includes the pictures
    assert many - few < 2 * one


def test_failed_write_keeps_the_old_table(tmp_path: Path) -> None:
    def rows():
        yield make_clip(0)
        raise TccpError("the film broke")

    (tmp_path / "clips.parquet").write_bytes(b"the table before")
    with pytest.raises(TccpError, match="the film broke"):
        write_table(rows(), tmp_path / "clips.parquet")
    assert [p.name for p in tmp_path.iterdir()] == ["clips.parquet"]
    assert (tmp_path / "clips.parquet").read_bytes() == b"the table before"


def test_full_disk_gives_a_one_line_error_and_no_file(tmp_path: Path) -> None:
    def rows() -> Iterator[Clip]:
        yield make_clip(0)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(TccpError, match=r"cannot write .*clips\.parquet: the disk is full"):
        write_table(rows(), tmp_path / "clips.parquet")
    assert not list(tmp_path.iterdir())


def test_unwritable_folder_gives_a_one_line_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(TccpError, match=r"cannot write .*clips\.parquet: .*; choose"):
        write_table([make_clip()], tmp_path / "file" / "clips.parquet")


def test_tables_of_another_version_or_kind_are_refused(tmp_path: Path) -> None:
    table = clips_to_table([make_clip()])
    newer = table.replace_schema_metadata({b"tccp.clip.schema_version": b"99"})
    pq.write_table(newer, tmp_path / "newer.parquet")
    pq.write_table(table.drop_columns(["audio"]), tmp_path / "part.parquet")
    pq.write_table(pa.concat_tables([table, clips_to_table([make_clip(1)])]), tmp_path / "grouped.parquet")
    (tmp_path / "text.parquet").write_text("no table")
    twice = tmp_path / "twice.parquet"
    write_table([make_clip(), make_clip()], twice)
    for name, message in (
        ("newer", "schema version 99, this code reads 1, 2 and 3: preprocess"),
        ("part", "no column audio"),
        ("grouped", "one row per row group"),
        ("text", "not a readable clip table"),
        ("absent", r"no clip table at .*absent\.parquet: there is no such folder or file; give the folder"),
        ("twice", "same clip_id"),
    ):
        with pytest.raises(TccpError, match=message) as caught:
            ClipTable(tmp_path / f"{name}.parquet")
        assert "\n" not in str(caught.value)


def test_a_missing_table_is_named_by_the_folder_that_was_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for folder, message in (
        (".", r"^no clip table at \.: it holds neither index\.parquet nor clips\.parquet; give the folder"),
        ("empty", "^no clip table at empty: it holds neither"),
        ("nowhere", "^no clip table at nowhere: there is no such folder or file"),
    ):
        with pytest.raises(TccpError, match=message):
            ClipTable(folder)


def test_row_of_another_version_is_refused_even_without_metadata():
    row = clips_to_table([make_clip()])
    place = row.column_names.index("schema_version")
    old = row.set_column(place, "schema_version", pa.array([7], pa.int32())).replace_schema_metadata(None)
    assert_same(clip_from_row(row.replace_schema_metadata(None)), make_clip())
    with pytest.raises(TccpError, match="version 7"):
        clip_from_row(old)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"audio": np.zeros(5, np.int16)}, "5 samples of sound"),
        ({"scene": []}, "scene has 0 frames"),
        ({"identity": []}, "no identity picture"),
        ({"audio_before": np.zeros(5, np.int16)}, "multiple of a frame's samples"),
    ],
)
def test_inconsistent_clip_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(TccpError, match=message):
        dataclasses.replace(make_clip(), **change)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_lossless_stills_are_lossless(height: int, width: int, seed: int) -> None:
    picture = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    np.testing.assert_array_equal(clips.decode_still(clips.encode_still(picture, lossless=True)), picture)


def test_lossy_stills_keep_fine_colour():
    """Full-resolution chroma: stripes of one pixel in red and blue survive, where 4:2:0 would make them purple."""
    picture = np.zeros((32, 32, 3), np.uint8)
    picture[:, ::2, 0] = 200
    picture[:, 1::2, 2] = 200
    decoded = clips.decode_still(clips.encode_still(picture))
    assert np.abs(decoded.astype(int) - picture).mean() < 8
    with pytest.raises(TccpError, match="does not decode"):
        clips.decode_still(b"no picture")


def test_clip_ids_are_stable_and_distinct():
    # Tables on disk and caches hold these ids: a change here must raise GEOMETRY_VERSION.
    assert clip_id_of("ab", 0, 25) == clip_id_of("ab", 0, 25) == "4cecc64721b15a87e27461fe6bad8155"
    ids = {clip_id_of(h, t, s) for h in ("ab", "ba") for t in (0, 1) for s in (0, 1, 10)}
    assert len(ids) == 12


def test_stored_boxes_share_the_head_boxes_centre():
    head = np.array([[10, 20, 50, 60], [11, 20, 51, 60]], np.float32)
    stored = clips.stored_box_of(head)
    np.testing.assert_allclose((stored[:, :2] + stored[:, 2:]) / 2, (head[:, :2] + head[:, 2:]) / 2)
    np.testing.assert_allclose(stored[:, 2] - stored[:, 0], 40 * clips.STORED_MARGIN)


@pytest.mark.parametrize("keeps_metadata", [True, False])
def test_version_2_tables_are_read_with_missing_columns_as_null(tmp_path: Path, keeps_metadata: bool) -> None:
    """A folder with an index, and rows that lost the file's metadata."""
    table = clips_to_table([make_clip(0)]).drop_columns(["bridged", "visible"])
    versions = pa.array([2], pa.int32())
    table = table.set_column(table.column_names.index("schema_version"), "schema_version", versions)
    old = table.replace_schema_metadata({b"tccp.clip.schema_version": b"2"} if keeps_metadata else None)
    clip = clip_from_row(old)
    assert (clip.quality.visible, clip.quality.bridged, clip.quality.blur) == (None, None, 0.25)
    with pytest.raises(TccpError, match="no column jitter"):
        clip_from_row(old.drop_columns(["jitter"]))
    if not keeps_metadata:
        return
    pq.write_table(old, tmp_path / "part.parquet", row_group_size=1)
    names = [name for name in clips.INDEX_SCHEMA.names if name in old.column_names]
    index = old.select(names).append_column("part", pa.array(["part.parquet"])).append_column("row", pa.array([0]))
    pq.write_table(index, tmp_path / clips.INDEX)
    with ClipTable(tmp_path) as opened:
        assert opened.values(["visible", "blur"]) == {"visible": [None], "blur": [0.25]}
        assert opened[clip.clip_id].quality == clip.quality


def test_version_1_tables_are_read_with_missing_columns_as_null(tmp_path: Path) -> None:
    new = ("person", "av_corrected", "speaking_score", "occlusion", "jitter", "bridged", "visible")
    table = clips_to_table([make_clip(0)]).drop_columns(list(new))
    versions = pa.array([1], pa.int32())
    table = table.set_column(table.column_names.index("schema_version"), "schema_version", versions)
    old = table.replace_schema_metadata({b"tccp.clip.schema_version": b"1"})
    pq.write_table(old, tmp_path / "clips.parquet")
    with ClipTable(tmp_path) as opened:
        (clip,) = opened
        assert (clip.person, clip.quality.occlusion, clip.quality.av_corrected) == (None, None, None)
        np.testing.assert_array_equal(clip.landmarks, make_clip(0).landmarks)
        assert write_table([opened.rows(opened.ids)], tmp_path / "new.parquet") == 1
    assert clip_from_row(pq.read_table(tmp_path / "new.parquet")).clip_id == clip.clip_id
    with pytest.raises(TccpError, match="no column face"):
        clip_from_row(old.drop_columns(["face"]))
