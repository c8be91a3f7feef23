"""Spans to rows of the clip table: pictures cut and encoded, sound attached, quality measured."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
from jaxtyping import Float32, Int16, UInt8

from preprocessing.decode import frames_at
from preprocessing.quality import blur, brightness, face_px, median_yaw_deg
from preprocessing.spans import Span, spans_from_table
from tccp.clip import (
    AUDIO_CONTEXT_FRAMES,
    SCHEMA,
    STORED_MARGIN,
    Clip,
    Quality,
    audio_context_start,
    clip_id_of,
    clips_to_table,
    encode_still,
    stored_box_of,
)
from tccp.config import FPS, SAMPLES_PER_FRAME
from tccp.headbox import SceneFit, crop, to_crop
from tccp.media import AudioTrack, MediaError, open_audio

_OVERSAMPLING = 1.25  # pixels of a face still per pixel of a crop, as far as the film has them: crops are resampled
_QUALITY_EVERY = 5  # frames

_REASON, _MESSAGE = pa.field("reason", pa.string()), pa.field("message", pa.string())
ROW_SCHEMA = SCHEMA.append(_REASON).append(_MESSAGE)
"""The clip table's columns, and why a stretch of film is no clip: null for clips; else source, source_hash, track,
start_s and num_frames say what was set aside, and the other columns are null."""


def render_clips(batch: pa.Table, picture_px: int, on_frame: Callable[[], object] = lambda: None) -> Iterator[pa.Table]:
    """Rows of ROW_SCHEMA from the spans of a batch: one table per clip, one for each span that is set aside.

    One clip's encoded pictures are in memory at a time. Spans that came with a reason are handed on; a film that turns
    out damaged midway keeps the clips before the damage, the others get its reason. on_frame is called after each
    frame, for progress.
    """
    films: dict[str, list[Span]] = {}
    for span in spans_from_table(batch):
        if span.reason is not None:
            yield _set_aside(span)
        else:
            films.setdefault(span.path, []).append(span)
    for path, spans in films.items():
        waiting = sorted(spans, key=lambda span: (span.track or 0, span.start_frame))
        try:
            with open_audio(path) as sound:
                for _, track in itertools.groupby(tuple(waiting), key=lambda span: span.track):
                    for clip in _render_track(list(track), sound, picture_px, on_frame):
                        yield _clip_row(clip)
                        waiting.pop(0)
        except MediaError as error:
            yield from (_set_aside(span.set_aside(error.reason, str(error))) for span in waiting)


def _clip_row(clip: Clip) -> pa.Table:
    table = clips_to_table([clip])
    for field in (_REASON, _MESSAGE):
        table = table.append_column(field, pa.nulls(table.num_rows, field.type))
    return table.cast(ROW_SCHEMA)


def _set_aside(span: Span) -> pa.Table:
    known = {
        name: getattr(span, name) for name in ("source", "source_hash", "track", "num_frames", "reason", "message")
    }
    return pa.Table.from_pylist([known | {"start_s": span.start_frame / FPS}], schema=ROW_SCHEMA)


def _render_track(
    track: Sequence[Span], sound: AudioTrack, picture_px: int, on_frame: Callable[[], object]
) -> Iterator[Clip]:
    path = Path(track[0].path)
    identities = _identity_stills(track, picture_px)
    frames = frames_at(path, [frame for span in track for frame in range(span.start_frame, span.stop_frame)])
    for span in track:
        yield _render(span, frames, identities, sound, picture_px, on_frame)


def _render(
    span: Span,
    frames: Iterator[tuple[int, UInt8[np.ndarray, "h w 3"]]],
    identities: dict[int | str, bytes],
    sound: AudioTrack,
    picture_px: int,
    on_frame: Callable[[], object],
) -> Clip:
    assert span.head_box is not None and span.landmarks_px is not None and span.confidence is not None
    assert span.source_hash is not None and span.track is not None
    assert span.width is not None and span.height is not None
    fit = SceneFit(span.width, span.height, picture_px)
    stored_box = stored_box_of(span.head_box)
    side = float(np.median(stored_box[:, 2] - stored_box[:, 0]))
    face_side_px = max(16, min(round(_OVERSAMPLING * STORED_MARGIN * picture_px), round(side)))
    scene, face, blurs, lights = [], [], [], []
    for i in range(span.num_frames):
        frame, picture = next(frames)
        assert frame == span.start_frame + i
        scene.append(encode_still(fit.fit(picture), lossless=True))
        face.append(encode_still(crop(picture, stored_box[i], face_side_px)))
        if i % _QUALITY_EVERY == 0:
            head = _head(picture, span.head_box[i], span.landmarks_px[i])
            blurs.append(blur(head))
            lights.append(brightness(head))
        on_frame()
    before, audio, after = _sound_of(sound, span.start_frame, span.num_frames)
    keys = [span.identity_path] if span.identity_path is not None else span.identity_frames
    return Clip(
        clip_id=clip_id_of(span.source_hash, span.track, span.start_frame),
        source=span.source,
        source_hash=span.source_hash,
        track=span.track,
        start_s=span.start_frame / FPS,
        num_frames=span.num_frames,
        source_width=span.width,
        source_height=span.height,
        picture_px=picture_px,
        head_box=span.head_box,
        stored_box=stored_box,
        landmarks=np.stack([to_crop(p, box) for p, box in zip(span.landmarks_px, span.head_box, strict=True)]),
        landmark_confidence=span.confidence,
        scene=scene,
        face=face,
        identity=[identities[key] for key in keys],
        audio=audio,
        audio_before=before,
        audio_after=after,
        quality=Quality(
            blur=float(np.median(blurs)),
            face_px=face_px(span.landmarks_px),
            brightness=float(np.mean(lights)),
            yaw_deg=median_yaw_deg(span.landmarks_px),
        ),
    )


def _head(
    picture: UInt8[np.ndarray, "h w 3"], box: Float32[np.ndarray, "4"], points: Float32[np.ndarray, "68 2"]
) -> UInt8[np.ndarray, "a b 3"]:
    """The face's own pixels, not resampled: what blur and brightness are measured on."""
    height, width = picture.shape[:2]
    low = np.maximum(points.min(0), box[:2]).clip(0, (width - 2, height - 2)).astype(int)
    high = np.minimum(points.max(0), box[2:]).clip(low + 2, (width, height)).astype(int)
    return picture[low[1] : high[1], low[0] : high[0]]


def _sound_of(
    sound: AudioTrack, start_frame: int, num_frames: int
) -> tuple[Int16[np.ndarray, "before"], Int16[np.ndarray, "samples"], Int16[np.ndarray, "after"]]:
    first = start_frame * SAMPLES_PER_FRAME
    stop = first + num_frames * SAMPLES_PER_FRAME
    before = _pcm(sound.samples[audio_context_start(start_frame) * SAMPLES_PER_FRAME : first])
    own = _pcm(sound.samples[first:stop])
    padded = np.zeros(stop - first, np.int16)  # the last frame of a film may be heard only in part
    padded[: len(own)] = own
    return before, padded, _pcm(sound.samples[stop : stop + AUDIO_CONTEXT_FRAMES * SAMPLES_PER_FRAME])


def _pcm(samples: Float32[np.ndarray, "n"]) -> Int16[np.ndarray, "n"]:
    return np.clip(np.rint(samples * 32768), -32768, 32767).astype(np.int16)


def _identity_stills(track: Sequence[Span], picture_px: int) -> dict[int | str, bytes]:
    """The identity pictures that the clips of a track use, by frame of the source, or by path if they came along."""
    stills: dict[int | str, bytes] = {}
    boxes: dict[int, Float32[np.ndarray, "4"]] = {}
    for span in track:
        if span.identity_path is not None:
            if span.identity_path not in stills:
                stills[span.identity_path] = _still_of_file(Path(span.identity_path), picture_px)
        elif span.identity_box is not None:
            boxes |= dict(zip(span.identity_frames, span.identity_box, strict=True))
    for frame, picture in frames_at(Path(track[0].path), sorted(boxes)):
        stills[frame] = encode_still(crop(picture, boxes[frame], picture_px))
    return stills


def _still_of_file(path: Path, picture_px: int) -> bytes:
    picture = cv2.imread(str(path), cv2.IMREAD_COLOR) if path.is_file() else None
    if picture is None:
        raise MediaError(path, "bad_identity", "is not a readable picture; restore it or make the footage again")
    height, width = picture.shape[:2]
    rgb = np.asarray(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB), np.uint8)
    return encode_still(crop(rgb, np.array([0, 0, width, height], np.float32), picture_px))
