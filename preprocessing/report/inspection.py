"""Shows a clip table: its statistics, a sheet of pictures of its clips, and a preview film of one clip."""

from __future__ import annotations

import difflib
import math
import textwrap
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
from jaxtyping import Float32, UInt8

from tccp import headbox, landmarks
from tccp.clips.clip_table import SCHEMA, Clip, ClipTable, Quality, decode_still
from tccp.clips.windows import clip_sound, view
from tccp.config import FPS, HeadBoxSettings, Settings, toy
from tccp.errors import TccpError
from tccp.files import atomic_path, check_outputs, check_writable
from tccp.media import VideoWriter
from tccp.media import mel as audio
from tccp.progress import duration_text

PANEL_PX = 320
_TILE_PX, _TILE_TEXT_PX, _TILE_COLUMNS = 256, 76, 2
_CAPTION_PX, _MEL_PX, _LINE_PX = 26, 160, 22
_GROUND, _INK, _SOFT = (22, 24, 27), (235, 235, 235), (160, 168, 176)
_BOX, _POINT, _CURSOR, _OFFSET, _MOUTH = (255, 190, 40), (80, 255, 120), (255, 255, 255), (255, 120, 60), (80, 255, 120)
_BRIDGED = _OFFSET  # frames whose landmarks are interpolated over a gap
_BRIDGED_PX = 6
_VIEW_FRAMES = FPS  # frames that are decoded at once
_MAX_SHEET_CLIPS = 100  # a larger sheet would be too large to view

Picture = UInt8[np.ndarray, "_ _ 3"]


# Figures


def statistics(table: ClipTable) -> dict[str, Any]:
    """Statistics of a table: numbers of clips, hours, sources, schema, picture sizes; av_corrected counts clips.

    quality: for every figure of a clip, in the clip table's units: the number of clips that have it, and its minimum,
    median and maximum. Reads only the table's index; a table without an index is read clip by clip.
    """
    names = [field.name for field in SCHEMA if not pa.types.is_list(field.type) and not pa.types.is_binary(field.type)]
    columns = table.values(names)
    seconds = np.asarray(columns["num_frames"], np.float64) / FPS
    numbers = {"length_s": seconds}
    for item in fields(Quality):
        if item.name != "av_corrected":
            known = [value for value in columns[item.name] if value is not None]
            numbers[item.name] = np.asarray(known, np.float64)
    sizes = zip(columns["source_width"], columns["source_height"], strict=True)
    return {
        "clips": len(table),
        "hours": float(seconds.sum()) / 3600,
        "sources": len(set(columns["source_hash"])),
        "schema_versions": sorted(set(columns["schema_version"])),
        "columns": {field.name: str(field.type).replace("item: ", "") for field in SCHEMA},
        "picture_px": sorted(set(columns["picture_px"])),
        "source_sizes": [f"{width}x{height}" for width, height in sorted(set(sizes))],
        "av_corrected": sum(map(bool, columns["av_corrected"])),
        "quality": {name: _summary(values) for name, values in numbers.items()},
    }


def _summary(values: Float32[np.ndarray, " n"] | np.ndarray) -> dict[str, float | int | None]:
    if not len(values):
        return {"known": 0, "min": None, "median": None, "max": None}
    return {
        "known": len(values),
        "min": float(values.min()),
        "median": float(np.median(values)),
        "max": float(values.max()),
    }


def statistics_text(figures: dict[str, Any]) -> str:
    """The result of `statistics` as lines for a terminal."""
    columns = ", ".join(f"{name} {kind}" for name, kind in figures["columns"].items())
    clips = figures["clips"]
    versions, pictures = (", ".join(map(str, figures[name])) for name in ("schema_versions", "picture_px"))
    sizes = figures["source_sizes"]
    shown = ", ".join(sizes[:6]) + (f" and {len(sizes) - 6} more" if len(sizes) > 6 else "")
    lines = [
        f"{clips:,} clips, {duration_text(figures['hours'] * 3600)}, from {figures['sources']:,} sources",
        f"schema version {versions}; {figures['av_corrected']:,} clips with their a/v offset corrected",
        f"pictures of {pictures} px; films of {shown}",
        "",
        f"{'':16} {'known':>9} {'min':>9} {'median':>9} {'max':>9}",
    ]
    for name, summary in figures["quality"].items():
        numbers = [summary[key] for key in ("min", "median", "max")]
        cells = " ".join(f"{'-' if value is None else format(value, '.3g'):>9}" for value in numbers)
        lines.append(f"{name:16} {summary['known']:9,} {cells}")
    lines += ["", textwrap.fill(f"columns: {columns}", 100, break_long_words=False, break_on_hyphens=False)]
    return "\n".join(lines)


# Finding a clip


def find_clip(table: ClipTable, given: str) -> str:
    """The id in this table that equals `given`, or begins with it. Raises TccpError if none does, or several do."""
    found = [clip_id for clip_id in table.ids if clip_id.startswith(given.lower())] if given else []
    if given.lower() in found:
        return given.lower()
    if len(found) == 1:
        return found[0]
    if found:
        raise TccpError(f"clip {given!r} is the beginning of {len(found)} ids ({_examples(found)}): give more of it")
    length = max(len(given), 4)
    near = difflib.get_close_matches(given.lower(), {clip_id[:length] for clip_id in table.ids}, 3, 0.6)
    if near:
        raise TccpError(f"no clip {given!r} in this table of {len(table)}; near it: {_examples(sorted(near))}")
    raise TccpError(f"no clip {given!r} in this table of {len(table)}; it has, for example, {_examples(table.ids)}")


def _examples(ids: Sequence[str]) -> str:
    return ", ".join(clip_id[:12] for clip_id in ids[:3]) + (", ..." if len(ids) > 3 else "")


# Sheet


def sheet(table: ClipTable, out: str | Path, count: int = 24) -> int:
    """Writes a PNG of at most `count` clips, spaced evenly over the table; returns their number.

    For each clip it shows the middle frame: the scene with the head box, the face with the landmarks, the landmark
    picture; below them id, source, time and quality. One clip is in memory at a time. Raises TccpError for a count
    outside 1..100 and for an empty table.
    """
    if not 1 <= count <= _MAX_SHEET_CLIPS:
        raise TccpError(f"a sheet of {count} clips: give 1 to {_MAX_SHEET_CLIPS}")
    if not len(table):
        raise TccpError("the table has no clips: preprocess more footage")
    _check_out(table, out)
    rows_shown = sorted(set(np.linspace(0, len(table) - 1, min(count, len(table))).round().astype(int).tolist()))
    tiles = [_tile(table[table.ids[row]]) for row in rows_shown]
    columns = min(_TILE_COLUMNS, len(tiles))
    tiles += [np.full_like(tiles[0], _GROUND)] * (-len(tiles) % columns)
    rows = [np.concatenate(tiles[first : first + columns], axis=1) for first in range(0, len(tiles), columns)]
    done, data = cv2.imencode(".png", np.concatenate(rows)[..., ::-1])
    assert done
    with atomic_path(Path(out)) as temporary:
        temporary.write_bytes(data.tobytes())
    return len(rows_shown)


def _check_out(table: ClipTable, out: str | Path) -> None:
    check_outputs({"--out": out}, {"TABLE": table.places})
    check_writable("--out", Path(out))


def _tile(clip: Clip) -> Picture:
    middle = clip.num_frames // 2
    scene, face = _scene_panel(clip, middle, _TILE_PX), _face_panel(clip, middle, _TILE_PX)
    points = landmarks.draw(clip.landmarks[middle : middle + 1], _TILE_PX)[0]
    panels = np.concatenate([scene, face, points], axis=1)
    text = np.full((_TILE_TEXT_PX, panels.shape[1], 3), _GROUND, np.uint8)
    length = f"{clip.num_frames / FPS:.2f} s"
    _paint_text(text, f"{clip.clip_id[:12]}   {length}   from {clip.start_s:.2f} s of {clip.source}", 8, 20)
    texts = _quality_texts(clip.quality)
    for line, part in enumerate((texts[:4], [*texts[4:], _offset_text(clip.quality).split(",")[0]])):
        _paint_text(text, "   ".join(part), 8, 41 + 21 * line, _SOFT)
    tile = np.concatenate([panels, text])
    return cv2.copyMakeBorder(tile, 5, 5, 5, 5, cv2.BORDER_CONSTANT, value=_GROUND)


# Preview


def preview(table: ClipTable, clip_id: str, out: str | Path) -> Clip:
    """Writes an MP4 of one clip with its sound; returns the clip. clip_id: an id, or the unique beginning of one.

    Side by side: the scene with head box and points, the masked scene that networks receive, the face with its 68
    points, the landmark picture. Below: the mel spectrogram with the mouth's opening and a cursor, and figures. Frames
    whose landmarks are interpolated over a gap are marked in orange. Sound and mouth opening should rise together. If
    an a/v offset was measured and not corrected, a dashed line marks the sound that belongs to the picture. Raises
    TccpError as `find_clip`, or if the file cannot be written.
    """
    _check_out(table, out)
    clip = table[find_clip(table, clip_id)]
    width = 4 * PANEL_PX
    strip = _sound_strip(clip, width)
    top = _CAPTION_PX + PANEL_PX
    height = top + _MEL_PX + 3 * _LINE_PX + 10
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    with VideoWriter(out, width, height + height % 2, clip.audio.astype(np.float32) / 32768) as film:
        for first in range(0, clip.num_frames, _VIEW_FRAMES):
            views = view(clip, _settings(clip), None, 0, first, min(_VIEW_FRAMES, clip.num_frames - first))
            for i in range(len(views.face)):
                frame = first + i
                panels = [
                    _scene_panel(clip, frame, PANEL_PX, with_points=True),
                    _resized(views.masked_scene[i], PANEL_PX),
                    _face_panel(clip, frame, PANEL_PX),
                    _resized(views.landmark_pictures[i], PANEL_PX),
                ]
                canvas = np.full((film.height, width, 3), _GROUND, np.uint8)
                for number, (panel, name) in enumerate(zip(panels, _PANELS, strict=True)):
                    left = number * PANEL_PX
                    canvas[_CAPTION_PX : _CAPTION_PX + PANEL_PX, left : left + PANEL_PX] = panel
                    canvas[:top, left : left + 2] = _GROUND
                    _paint_text(canvas, name, left + 8, 18, _SOFT)
                canvas[top : top + _MEL_PX] = strip
                _paint_cursor(canvas[top : top + _MEL_PX], clip, frame)
                for line, (text, colour) in enumerate(_lines(clip, frame)):
                    _paint_text(canvas, text, 8, top + _MEL_PX + (line + 1) * _LINE_PX - 3, colour)
                film.write(canvas)
    return clip


_PANELS = ("scene, head box", "masked scene", "face, 68 points", "landmark picture")


def _settings(clip: Clip) -> Settings:
    """Settings with which `view` returns a clip as it is stored."""
    return toy().model_copy(update={"picture_px": clip.picture_px, "headbox": HeadBoxSettings()})


def _scene_panel(clip: Clip, frame: int, size_px: int, with_points: bool = False) -> Picture:
    picture = _resized(decode_still(clip.scene[frame]), size_px)
    fit = headbox.SceneFit(clip.source_width, clip.source_height, size_px)
    x0, y0, x1, y1 = np.rint(fit.boxes(clip.head_box[frame : frame + 1])[0]).astype(int).tolist()
    if with_points:
        points = fit.points(headbox.from_crop(clip.landmarks[frame], clip.head_box[frame]))
        _paint_points(picture, points, 1, _point_colour(clip, frame))
    cv2.rectangle(picture, (x0, y0), (x1 - 1, y1 - 1), _BOX, 2, cv2.LINE_AA)
    return picture


def _face_panel(clip: Clip, frame: int, size_px: int) -> Picture:
    """The head box, cut from the stored still (which is finer than training's crop), with the points."""
    still = decode_still(clip.face[frame])
    stored, box = clip.stored_box[frame], clip.head_box[frame]
    scale = still.shape[0] / (stored[2] - stored[0])
    inside = ((box - np.tile(stored[:2], 2)) * scale).astype(np.float32)
    in_film = headbox.inside_picture(box, clip.source_width, clip.source_height)
    picture = headbox.mark_outside(headbox.crop(still, inside, size_px, repeat_edge=True), in_film)
    _paint_points(picture, clip.landmarks[frame] * size_px, 2, _point_colour(clip, frame))
    if _is_bridged(clip, frame):
        _paint_text(picture, "bridged", 8, size_px - 10, _BRIDGED)
    return picture


def _is_bridged(clip: Clip, frame: int) -> bool:
    """Whether a frame's landmarks are interpolated over a gap."""
    return bool(clip.landmark_confidence[frame] == 0)


def _point_colour(clip: Clip, frame: int) -> tuple[int, int, int]:
    return _BRIDGED if _is_bridged(clip, frame) else _POINT


def _paint_points(
    picture: Picture, points: Float32[np.ndarray, "68 2"], radius: int, colour: tuple[int, int, int]
) -> None:
    for x, y in points:
        if math.isfinite(x) and math.isfinite(y):
            center = round(float(x)), round(float(y))
            cv2.circle(picture, center, radius + 1, (0, 0, 0), -1, cv2.LINE_AA)
            cv2.circle(picture, center, radius, colour, -1, cv2.LINE_AA)


def _resized(picture: Picture, size_px: int) -> Picture:
    how = cv2.INTER_AREA if picture.shape[0] > size_px else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(picture, (size_px, size_px), interpolation=how), np.uint8)


def _sound_strip(clip: Clip, width: int) -> Picture:
    """The clip's mel spectrogram, low frequencies at the bottom, with the mouth's opening painted over it."""
    samples, first = clip_sound(clip)
    columns = np.round(np.arange(width) / width * clip.num_frames * audio.MEL_COLUMNS_PER_S / FPS).astype(int)
    mel = audio.mel(samples)
    columns = np.minimum(columns + first * audio.MEL_COLUMNS_PER_S // FPS, mel.shape[1] - 1)
    loud = np.rint((mel[::-1, columns] + 4) * (255 / 8)).astype(np.uint8)
    coloured = cv2.applyColorMap(cv2.resize(loud, (width, _MEL_PX)), cv2.COLORMAP_MAGMA)
    strip = np.asarray(cv2.cvtColor(coloured, cv2.COLOR_BGR2RGB), np.uint8)
    opening = landmarks.mouth_opening(clip.landmarks)
    known = np.isfinite(opening)
    if known.any():
        most = max(float(opening[known].max()), 0.05)
        x = (np.arange(clip.num_frames) + 0.5) * width / clip.num_frames
        y = _MEL_PX - 6 - np.clip(opening / most, 0, 1) * (_MEL_PX - 20)
        line = np.rint(np.stack([x, y], 1)[known]).astype(np.int32)
        for thickness, colour in ((4, (0, 0, 0)), (2, _MOUTH)):
            cv2.polylines(strip, [line], False, colour, thickness, cv2.LINE_AA)
    bridged = clip.landmark_confidence == 0
    at = np.minimum(np.arange(width) * clip.num_frames // width, clip.num_frames - 1)
    strip[-_BRIDGED_PX:, bridged[at]] = _BRIDGED
    strip[:26, :250] = _GROUND
    _paint_text(strip, "mel, and the mouth's opening", 8, 18, _SOFT)
    return strip


def _paint_cursor(strip: Picture, clip: Clip, frame: int) -> None:
    width = strip.shape[1]
    offset_ms, corrected = clip.quality.av_offset_ms, clip.quality.av_corrected
    if offset_ms is not None and not corrected and abs(offset_ms) >= 1:
        x = round((frame + 0.5 + offset_ms / 1000 * FPS) * width / clip.num_frames)
        for top in range(0, _MEL_PX, 10):
            cv2.line(strip, (x, top), (x, top + 4), _OFFSET, 2)
    x = round((frame + 0.5) * width / clip.num_frames)
    cv2.line(strip, (x, 0), (x, _MEL_PX), _CURSOR, 2)


def _lines(clip: Clip, frame: int) -> list[tuple[str, tuple[int, int, int]]]:
    at_s = clip.start_s + frame / FPS
    where = f"frame {frame + 1}/{clip.num_frames}   {at_s:.2f} s of {clip.source}"
    confidence = f"landmarks {clip.landmark_confidence[frame]:.2f}"
    if _is_bridged(clip, frame):
        confidence = "landmarks bridged"
    return [
        (f"{clip.clip_id}   {where}   {confidence}", _INK),
        (_offset_text(clip.quality), _INK),
        ("   ".join(_quality_texts(clip.quality)), _SOFT),
    ]


def _offset_text(quality: Quality) -> str:
    """The a/v offset and whether it was corrected; after a comma its direction and its confidence."""
    offset_ms = quality.av_offset_ms
    if offset_ms is None:
        return "a/v offset not measured"
    where = "" if not offset_ms else ", sound late" if offset_ms > 0 else ", sound early"
    confidence = "" if quality.sync_confidence is None else f", confidence {quality.sync_confidence:.3g}"
    # An offset that is certain enough has been corrected.
    done = " (corrected)" if quality.av_corrected else " (a guess)" if offset_ms else ""
    return f"a/v offset {offset_ms:+.0f} ms{done}{where}{confidence}"


def _quality_texts(quality: Quality) -> list[str]:
    """Every known figure except those of the a/v offset."""
    values = {item.name: getattr(quality, item.name) for item in fields(quality) if item.name not in _OFFSET_FIELDS}
    return [f"{name} {value:.3g}" for name, value in values.items() if value is not None]


_OFFSET_FIELDS = {"av_offset_ms", "av_corrected", "sync_confidence"}


def _paint_text(picture: Picture, text: str, x: int, baseline: int, colour: tuple[int, int, int] = _INK) -> None:
    """Paints text with a dark outline. OpenCV has ASCII letters only: others become question marks."""
    line = text.encode("ascii", "replace").decode()
    for thickness, ink in ((3, (0, 0, 0)), (1, colour)):
        cv2.putText(picture, line, (x, baseline), cv2.FONT_HERSHEY_SIMPLEX, 0.46, ink, thickness, cv2.LINE_AA)
