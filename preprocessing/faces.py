"""Who is on screen: shots, and within each the main person's landmarks, in one pass over the film."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float32, UInt8

from preprocessing.decode import frames_at
from preprocessing.spans import Span, spans_from_table, spans_to_table
from tccp import faces
from tccp.config import FPS
from tccp.media import MediaError
from tccp.shots import CutFinder

MAX_BRIDGED_FRAMES = FPS // 2
"""Gaps without a face up to here, just under half a second, are bridged; longer ones end the clip."""


def find_tracks(
    batch: pa.Table,
    backend: str = "mediapipe",
    weights: Path | None = None,
    on_frame: Callable[[], object] = lambda: None,
) -> Iterator[pa.Table]:
    """Spans of film to spans of one person on screen, with `track`, `landmarks_px` and `confidence`; a table per film.

    A cut ends a span. Each shot is one track: that of the face that is there most, as `tccp.faces.track` says. Frames
    without it are set aside as `no_face`, or bridged in a straight line with confidence 0 where they are few. Only
    numbers are kept from frame to frame.
    """
    detector = None
    try:
        for span in spans_from_table(batch):
            if span.reason is None:
                detector = detector or faces.open_backend(backend, weights)
                yield spans_to_table(_tracks(span, detector, on_frame))
            else:
                yield spans_to_table([span])
    finally:
        if detector is not None:
            detector.close()


def _tracks(span: Span, detector: faces.FaceBackend, on_frame: Callable[[], object]) -> list[Span]:
    cutter = CutFinder()
    found: list[list[faces.Face]] = []  # of the frames since the last known cut
    shots: list[Span] = []
    start, number = span.start_frame, 0
    try:
        for _, picture in frames_at(Path(span.path), range(span.start_frame, span.stop_frame)):
            found.append(detect(detector, picture))
            for cut in cutter.add(picture):
                length = span.start_frame + cut - start
                shots += _runs(replace(span.cut(start, start + length), track=number), found[:length])
                found, start, number = found[length:], start + length, number + 1
            on_frame()
    except MediaError as error:
        return [span.set_aside(error.reason, str(error))]
    return shots + _runs(replace(span.cut(start, span.stop_frame), track=number), found)


def _runs(shot: Span, found: Sequence[Sequence[faces.Face]]) -> list[Span]:
    """The spans of one shot on which its main person is to be seen, and those set aside, in order of time."""
    person = faces.track(found)
    seen = np.zeros(len(person), bool)
    points = np.full((len(person), 68, 2), np.nan, np.float32)
    confidence = np.zeros(len(person), np.float32)
    for i, face in enumerate(person):
        if face is not None and face.landmarks_px is not None and face.confidence > 0:
            seen[i], points[i], confidence[i] = True, face.landmarks_px, face.confidence
    spans: list[Span] = []
    done = 0
    for first, stop in [*runs(seen), (len(person), len(person))]:
        if first > done:
            gap = shot.cut(shot.start_frame + done, shot.start_frame + first)
            spans.append(
                gap.set_aside("no_face", f"{shot.path}: nobody's face is to be seen; give film of one person's face")
            )
        if stop > first:
            run = shot.cut(shot.start_frame + first, shot.start_frame + stop)
            filled = _bridged(points[first:stop], seen[first:stop])
            spans.append(replace(run, landmarks_px=filled, confidence=confidence[first:stop]))
        done = stop
    return spans


def detect(detector: faces.FaceBackend, picture: UInt8[np.ndarray, "h w 3"]) -> list[faces.Face]:
    """The faces of a frame; where none is found, those of square tiles of it.

    Detectors scale the frame to a small square of their own, in which a face that is small in a wide frame is lost.
    """
    found = detector.detect(picture)
    if found:
        return found
    tiled = [(tile, face) for tile in _tiles(picture) for face in _moved(detector.detect(tile.picture), tile)]
    # Tiles overlap: of a face seen in several, the one that lies most in the middle of its tile is whole.
    tiled.sort(key=lambda pair: float(np.abs(pair[1].center - pair[0].center).max()))
    for _, face in tiled:
        if not any((f.box[:2] <= face.center).all() and (face.center <= f.box[2:]).all() for f in found):
            found.append(face)
    return found


class _Tile(NamedTuple):
    picture: UInt8[np.ndarray, "s s 3"]
    x: int
    y: int

    @property
    def center(self) -> Float32[np.ndarray, "2"]:
        return np.array([self.x, self.y], np.float32) + self.picture.shape[0] / 2


def _tiles(picture: UInt8[np.ndarray, "h w 3"]) -> list[_Tile]:
    """Squares as high (or wide) as the frame, overlapping by half or more; none for a frame that is nearly square."""
    height, width = picture.shape[:2]
    side, rest = min(height, width), abs(height - width)
    if 4 * rest < side:
        return []
    count = 1 + -(-2 * rest // side)
    places = [rest * i // (count - 1) for i in range(count)]
    corners = [(p, 0) if width > height else (0, p) for p in places]
    return [_Tile(np.ascontiguousarray(picture[y : y + side, x : x + side]), x, y) for x, y in corners]


def _moved(found: Sequence[faces.Face], tile: _Tile) -> list[faces.Face]:
    """Faces of a tile in the pixels of its frame."""
    by = np.array([tile.x, tile.y], np.float32)
    return [
        replace(f, box=f.box + np.tile(by, 2), landmarks_px=None if f.landmarks_px is None else f.landmarks_px + by)
        for f in found
    ]


def runs(seen: Bool[np.ndarray, "f"], max_bridged: int = MAX_BRIDGED_FRAMES) -> list[tuple[int, int]]:
    """[first, stop) of each stretch that begins and ends with a face and has no longer gap in it than `max_bridged`."""
    stretches: list[tuple[int, int]] = []
    for i in map(int, np.flatnonzero(seen)):
        if stretches and i - stretches[-1][1] <= max_bridged:
            stretches[-1] = (stretches[-1][0], i + 1)
        else:
            stretches.append((i, i + 1))
    return stretches


def _bridged(points: np.ndarray, seen: Bool[np.ndarray, "f"]) -> np.ndarray:
    frames = np.arange(len(points))
    flat = points.reshape(len(points), -1)
    filled = [np.interp(frames, frames[seen], column[seen]) for column in flat.T]
    return np.stack(filled, axis=1).reshape(points.shape).astype(np.float32)
