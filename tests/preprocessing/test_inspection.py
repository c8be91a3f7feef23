"""Inspection of a clip table: statistics, clip lookup, contact sheet and preview film."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest

from preprocessing.plan import make_plan
from preprocessing.report import inspection as inspecting
from preprocessing.report.inspection import PANEL_PX, find_clip, preview, sheet, statistics, statistics_text
from preprocessing.run import preprocess
from tccp import headbox, media, roundtable
from tccp.clips.clip_table import Clip, ClipTable, Quality, write_table
from tccp.config import FPS, toy
from tccp.errors import TccpError
from tccp.media import mel as audio

BOX_ORANGE, CURSOR_WHITE = np.array([255, 190, 40]), np.array([255, 255, 255])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspect")
    roundtable.write_clips(folder / "films", 2, 1.6, seed=5)
    preprocess([folder / "films"], folder / "table", make_plan(toy().picture_px, "truth"))
    return folder / "table"


@pytest.fixture
def table(place: Path) -> Iterator[ClipTable]:
    with ClipTable(place) as opened:
        yield opened


@pytest.fixture
def measured(table: ClipTable, tmp_path: Path) -> Iterator[ClipTable]:
    """The same clips in one file; the first has all quality values and an uncorrected a/v offset."""
    first, *rest = table
    quality = dataclasses.replace(
        first.quality, av_offset_ms=400.0, sync_confidence=2.5, av_corrected=False, speaking_score=0.9, occlusion=0.1
    )
    write_table([dataclasses.replace(first, quality=quality), *rest], tmp_path / "one.parquet")
    with ClipTable(tmp_path / "one.parquet") as opened:
        yield opened


def near(picture: np.ndarray, colour: np.ndarray, tolerance: int = 60) -> np.ndarray:
    """Mask of the pixels close to a colour, allowing for compression loss."""
    return (np.abs(picture.astype(int) - colour) < tolerance).all(-1)


def read_png(path: Path) -> np.ndarray:
    picture = cv2.imread(str(path))
    assert picture is not None
    return picture[..., ::-1]


# Statistics


def test_statistics_match_the_clips(table: ClipTable) -> None:
    figures = statistics(table)
    clips = list(table)
    assert (figures["clips"], figures["sources"]) == (len(clips), 2)
    assert figures["hours"] == pytest.approx(sum(clip.num_frames for clip in clips) / FPS / 3600)
    assert figures["picture_px"] == [64] and figures["source_sizes"] == ["256x192"]
    blurs = [clip.quality.blur for clip in clips]
    expected = {"known": len(clips), "min": min(blurs), "median": np.median(blurs), "max": max(blurs)}
    assert figures["quality"]["blur"] == pytest.approx(expected)
    assert figures["columns"]["landmarks"] == "list<float>"
    json.dumps(figures, allow_nan=False)


def test_statistics_list_every_quality_number_and_count_known_values(measured: ClipTable) -> None:
    figures = statistics(measured)
    numbers = {item.name for item in dataclasses.fields(Quality)} - {"av_corrected"}
    assert set(figures["quality"]) == numbers | {"length_s"}
    assert figures["quality"]["av_offset_ms"] == {"known": 1, "min": 400, "median": 400, "max": 400}
    assert figures["av_corrected"] == 0
    text = statistics_text(figures)
    assert all(name in text for name in numbers)
    line = next(line for line in text.splitlines() if line.startswith("sync_confidence"))
    assert line.split() == ["sync_confidence", "1", "2.5", "2.5", "2.5"]


def test_single_file_and_folder_give_the_same_statistics(table: ClipTable, tmp_path: Path) -> None:
    write_table(table, tmp_path / "clips.parquet")
    with ClipTable(tmp_path) as copy:
        assert statistics(copy) == statistics(table)


# Clip lookup


def test_clip_is_found_by_id_prefix(table: ClipTable) -> None:
    for clip_id in table.ids:
        assert find_clip(table, clip_id) == find_clip(table, clip_id[:10]) == find_clip(table, clip_id[:10].upper())


@pytest.mark.parametrize("given", ["", "zz", "zzzzzzzzzzzz"])
def test_unknown_clip_id_gives_a_one_line_error_with_existing_ids(table: ClipTable, given: str) -> None:
    with pytest.raises(TccpError, match=rf"no clip '{given}' in this table of {len(table)}") as caught:
        find_clip(table, given)
    assert "\n" not in str(caught.value) and table.ids[0][:12] in str(caught.value)


def test_mistyped_clip_id_suggests_the_nearest_id(table: ClipTable) -> None:
    meant = table.ids[1]
    with pytest.raises(TccpError, match=f"near it: {meant[:12]}"):
        find_clip(table, f"{meant[:13]}x{meant[14:]}")


def test_ambiguous_id_prefix_asks_for_a_longer_one(table: ClipTable, tmp_path: Path) -> None:
    first, second = list(table)[:2]
    write_table(
        [dataclasses.replace(first, clip_id="ab01"), dataclasses.replace(second, clip_id="ab02")], tmp_path / "t"
    )
    with (
        ClipTable(tmp_path / "t") as opened,
        pytest.raises(TccpError, match=r"'ab' is the beginning of 2 ids \(ab01, ab02\): give more"),
    ):
        find_clip(opened, "ab")


# Sheet


def test_sheet_shows_the_requested_number_of_clips(table: ClipTable, tmp_path: Path) -> None:
    assert sheet(table, tmp_path / "all.png") == len(table)
    assert sheet(table, tmp_path / "one.png", 1) == 1
    everything, one = (read_png(tmp_path / name) for name in ("all.png", "one.png"))
    rows = -(-len(table) // 2)
    assert everything.shape == (rows * one.shape[0], 2 * one.shape[1], 3)
    np.testing.assert_array_equal(everything[: one.shape[0], : one.shape[1]], one)


def test_sheet_tile_shows_the_head_box_in_place(table: ClipTable, tmp_path: Path) -> None:
    sheet(table, tmp_path / "one.png", 1)
    picture = read_png(tmp_path / "one.png")
    clip = table[table.ids[0]]
    scene = picture[5 : 5 + 256, 5 : 5 + 256]
    fit = headbox.SceneFit(clip.source_width, clip.source_height, 256)
    x0, y0, x1, y1 = fit.boxes(clip.head_box[clip.num_frames // 2][None])[0]
    rows, columns = np.nonzero(near(scene, BOX_ORANGE, 8))
    assert [columns.min(), rows.min(), columns.max(), rows.max()] == pytest.approx([x0, y0, x1, y1], abs=2.5)


@pytest.mark.parametrize("count", [0, -1, 101])
def test_sheet_refuses_invalid_clip_counts(table: ClipTable, tmp_path: Path, count: int) -> None:
    with pytest.raises(TccpError, match=f"a sheet of {count} clips: give 1 to 100"):
        sheet(table, tmp_path / "sheet.png", count)
    assert not list(tmp_path.iterdir())


# Preview


@pytest.fixture(scope="module")
def shown(place: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Clip, Path]:
    out = tmp_path_factory.mktemp("preview") / "clip.mp4"
    with ClipTable(place) as opened:
        return preview(opened, opened.ids[0][:12], out), out


def test_preview_has_the_frames_and_audio_of_the_clip(shown: tuple[Clip, Path]) -> None:
    clip, path = shown
    info = media.probe(path)
    assert info.num_frames == clip.num_frames and info.width == 4 * PANEL_PX
    with media.open_audio(path) as sound:
        heard = sound.samples[: len(clip.audio)]
    assert np.corrcoef(heard, clip.audio[: len(heard)])[0, 1] > 0.9


def test_preview_panels_show_scene_mask_face_and_landmarks(shown: tuple[Clip, Path]) -> None:
    clip, path = shown
    frame = clip.num_frames // 2
    (picture,) = media.read_frames(path, frame, 1)
    top = inspecting._CAPTION_PX
    scene, masked, face, marks = (
        picture[top : top + PANEL_PX, left : left + PANEL_PX] for left in range(0, 4 * PANEL_PX, PANEL_PX)
    )
    fit = headbox.SceneFit(clip.source_width, clip.source_height, PANEL_PX)
    x0, y0, x1, y1 = (round(float(v)) for v in fit.boxes(clip.head_box[frame : frame + 1])[0])
    inside = slice(y0 + 8, y1 - 8), slice(x0 + 8, x1 - 8)
    assert near(scene[y0 : y0 + 3, x0 + 8 : x1 - 8], BOX_ORANGE).mean() > 0.5
    assert np.abs(masked[inside].astype(int) - headbox.MASK_FILL).mean() < 4
    assert scene[inside].std() > 20 and face.std() > 20
    green = np.array([80, 255, 120])
    places = np.rint(clip.landmarks[frame] * PANEL_PX).astype(int).clip(0, PANEL_PX - 1)
    around = [near(face[max(y - 2, 0) : y + 3, max(x - 2, 0) : x + 3], green, 90).any() for x, y in places]
    assert np.mean(around) > 0.9
    assert np.median(marks) < 20 and marks.max() > 200


def strip_of(path: Path, frame: int) -> np.ndarray:
    (picture,) = media.read_frames(path, frame, 1)
    top = inspecting._CAPTION_PX + PANEL_PX
    return picture[top + 30 : top + inspecting._MEL_PX]


def test_cursor_follows_the_audio_position(shown: tuple[Clip, Path]) -> None:
    clip, path = shown
    for frame in (0, clip.num_frames // 2, clip.num_frames - 1):
        columns = np.flatnonzero(near(strip_of(path, frame), CURSOR_WHITE).mean(0) > 0.8)
        assert columns.mean() == pytest.approx((frame + 0.5) * 4 * PANEL_PX / clip.num_frames, abs=2)


def test_the_mel_is_bright_where_the_clip_is_loud(table: ClipTable) -> None:
    clip = table[table.ids[0]]
    strip = inspecting._sound_strip(clip, 400)[30:].astype(float).max(-1).mean(0)
    mel = audio.mel(clip.audio.astype(np.float32) / 32768).mean(0)
    expected = np.interp(np.linspace(0, 1, 400), np.linspace(0, 1, len(mel)), mel)
    assert np.corrcoef(strip, expected)[0, 1] > 0.9


def test_uncorrected_av_offset_is_drawn_beside_the_cursor(measured: ClipTable, tmp_path: Path) -> None:
    clip = preview(measured, measured.ids[0], tmp_path / "clip.mp4")
    strip = strip_of(tmp_path / "clip.mp4", 10)
    at = round((10.5 + 0.4 * FPS) * 4 * PANEL_PX / clip.num_frames)
    assert near(strip[:, at - 2 : at + 3], np.array([255, 120, 60]), 90).any(1).mean() > 0.3
    plain = dataclasses.replace(clip.quality, av_corrected=True)
    before = np.zeros((inspecting._MEL_PX, 400, 3), np.uint8)
    inspecting._paint_cursor(before, dataclasses.replace(clip, quality=plain), 10)
    assert not near(before, np.array([255, 120, 60])).any()


def test_bridged_frames_are_marked(table: ClipTable, tmp_path: Path) -> None:
    """In the frame itself and, along the sound, where they are."""
    clip = next(iter(table))
    confidence = np.ones(clip.num_frames, np.float32)
    confidence[6:12] = 0
    write_table([dataclasses.replace(clip, landmark_confidence=confidence)], tmp_path / "clips.parquet")
    with ClipTable(tmp_path) as opened:
        preview(opened, clip.clip_id, tmp_path / "clip.mp4")
    orange = np.array([255, 120, 60])
    frames = list(media.read_frames(tmp_path / "clip.mp4"))
    top = inspecting._CAPTION_PX
    face = np.s_[top : top + PANEL_PX, 2 * PANEL_PX : 3 * PANEL_PX]
    detected = [near(frame[face], np.array([80, 255, 120])).sum() for frame in frames]
    assert min(detected[:6] + detected[12:]) > 100 and max(detected[6:12]) == 0
    row = near(strip_of(tmp_path / "clip.mp4", 0)[-3], orange)
    found = np.flatnonzero(row) / len(row) * clip.num_frames
    assert found.min() == pytest.approx(6, abs=0.2) and found.max() == pytest.approx(12, abs=0.2)


def test_av_offset_caption() -> None:
    quality = Quality(0.5, 80.0, 0.5, 0.0)
    caption = inspecting._offset_text
    assert caption(quality) == "a/v offset not measured"
    late = dataclasses.replace(quality, av_offset_ms=200.0, sync_confidence=3.0)
    assert caption(late) == "a/v offset +200 ms (a guess), sound late, confidence 3"
    early = dataclasses.replace(quality, av_offset_ms=-40.0, av_corrected=True)
    assert caption(early) == "a/v offset -40 ms (corrected), sound early"
    assert caption(dataclasses.replace(quality, av_offset_ms=0.0)) == "a/v offset +0 ms"


def test_failed_preview_leaves_no_file(table: ClipTable, tmp_path: Path) -> None:
    with pytest.raises(TccpError, match="let the name end in"):
        preview(table, table.ids[0], tmp_path / "clip.avi")
    with pytest.raises(TccpError, match="no clip 'zz'"):
        preview(table, "zz", tmp_path / "clip.mp4")
    assert not list(tmp_path.iterdir())


def test_sheet_accepts_source_names_that_opencv_cannot_draw(table: ClipTable, tmp_path: Path) -> None:
    clip = dataclasses.replace(next(iter(table)), source="Großmutter – 北京.mp4")
    write_table([clip], tmp_path / "clips.parquet")
    with ClipTable(tmp_path) as opened:
        assert sheet(opened, tmp_path / "sheet.png") == 1
