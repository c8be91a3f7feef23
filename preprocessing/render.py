"""Pass 2 over a film: makes the rows of its clips, with encoded pictures, sound and quality figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float32, UInt8

from preprocessing.analysis.quality import QualityBounds, blur, bridged_share, brightness, face_px, median_yaw_deg
from preprocessing.reasons import set_aside
from preprocessing.spans import Span
from tccp.clips.clip_table import STORED_MARGIN, Clip, Quality, clip_id_of, encode_still, stored_box_of
from tccp.config import FPS
from tccp.files import redacted
from tccp.headbox import SceneFit, crop, to_crop, visible_share
from tccp.media import MediaError
from tccp.media.remote import local_copy
from tccp.media.sandbox import Decoder

_OVERSAMPLING = 1.25  # pixels of a face still per pixel of a crop, if the film is fine enough: crops are resampled
_QUALITY_EVERY = 5  # frames

_Key = tuple[object, ...]
"""Identifies an identity picture: by its path, or by its frame and head box."""


def render_clips(
    spans: Sequence[Span],
    picture_px: int,
    decoder: Decoder,
    bounds: QualityBounds,
    on_frame: Callable[[], object] = lambda: None,
) -> Iterator[Clip | Span]:
    """Makes the clips of one source from the spans that `select` kept, in order of time.

    For each span it yields a clip, or the span with a reason: blur and brightness are checked here, on the pictures. If
    the film turns out to be damaged, the clips before the damage are kept, and the later spans get that reason. One
    clip's encoded pictures are in memory at a time. on_frame: called after each frame, for progress.
    """
    if not spans:
        return
    waiting = list(spans)
    try:
        with local_copy(spans[0].path) as path:
            identities = _identity_stills(spans, path, picture_px, decoder)
            wanted = [frame for span in spans for frame in range(span.start_frame, span.stop_frame)]
            frames = decoder.frames_at(path, wanted, copy=False)
            for span in spans:
                clip = _render(span, frames, identities, picture_px, on_frame)
                reason = bounds.reason({"blur": clip.quality.blur, "brightness": clip.quality.brightness})
                yield clip if reason is None else set_aside(span, reason)
                waiting.pop(0)
    except MediaError as error:
        yield from (span.set_aside(error.reason, f"{redacted(span.path)}: {error.problem}") for span in waiting)


def _render(
    span: Span,
    frames: Iterator[tuple[int, UInt8[np.ndarray, "h w 3"]]],
    identities: dict[_Key, bytes],
    picture_px: int,
    on_frame: Callable[[], object],
) -> Clip:
    assert span.head_box is not None and span.landmarks_px is not None and span.confidence is not None
    assert span.source_hash is not None and span.track is not None and span.audio is not None
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
        face.append(encode_still(crop(picture, stored_box[i], face_side_px, repeat_edge=True)))
        if i % _QUALITY_EVERY == 0:
            pixels = _face_pixels(picture, span.head_box[i], span.landmarks_px[i])
            blurs.append(blur(pixels))
            lights.append(brightness(pixels))
        on_frame()
    offset_ms = None if span.av_offset_frames is None else 1000 * span.av_offset_frames / FPS
    before, audio, after = (
        np.frombuffer(pcm or b"", "<i2").astype(np.int16) for pcm in (span.audio_before, span.audio, span.audio_after)
    )
    return Clip(
        clip_id=clip_id_of(span.source_hash, span.track, span.start_frame, _content_of(span)),
        source=span.source,
        source_hash=span.source_hash,
        track=span.track,
        person=span.person,
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
        identity=[identities[key] for key in _identity_keys(span)],
        audio=audio,
        audio_before=before,
        audio_after=after,
        quality=Quality(
            blur=float(np.median(blurs)),
            face_px=face_px(span.landmarks_px),
            brightness=float(np.mean(lights)),
            yaw_deg=median_yaw_deg(span.landmarks_px),
            sync_confidence=span.sync_confidence,
            av_offset_ms=offset_ms,
            av_corrected=span.av_corrected,
            speaking_score=span.speaking_score,
            occlusion=span.occlusion,
            jitter=span.jitter,
            bridged=bridged_share(span.confidence),
            visible=float(visible_share(span.head_box, span.width, span.height).mean()),
        ),
    )


def _content_of(span: Span) -> bytes:
    """Hash input that differs between clips of one start: source of landmarks, length, head boxes, sound, identity."""
    assert span.head_box is not None and span.audio is not None
    numbers = [span.num_frames, *span.identity_frames]
    return b"/".join([(span.provenance or "").encode(), repr(numbers).encode(), span.head_box.tobytes(), span.audio])


def _face_pixels(
    picture: UInt8[np.ndarray, "h w 3"], box: Float32[np.ndarray, "4"], points: Float32[np.ndarray, "68 2"]
) -> UInt8[np.ndarray, "a b 3"]:
    """The pixels of the face, not resampled, on which blur and brightness are measured."""
    height, width = picture.shape[:2]
    low = np.maximum(points.min(0), box[:2]).clip(0, (width - 2, height - 2)).astype(int)
    high = np.minimum(points.max(0), box[2:]).clip(low + 2, (width, height)).astype(int)
    return picture[low[1] : high[1], low[0] : high[0]]


def _identity_stills(spans: Sequence[Span], path: Path, picture_px: int, decoder: Decoder) -> dict[_Key, bytes]:
    """The encoded identity pictures of the clips, by key (`_Key`)."""
    keys = sorted({key for span in spans for key in _identity_keys(span)}, key=repr)
    stills: dict[_Key, bytes] = {key: _still_of_file(str(key[0]), picture_px, decoder) for key in keys if len(key) == 1}
    boxes: dict[int, list[_Key]] = {}
    for key in keys:
        if isinstance(key[0], int):
            boxes.setdefault(key[0], []).append(key)
    for frame, picture in decoder.frames_at(path, sorted(boxes), copy=False):
        for key in boxes[frame]:
            stills[key] = encode_still(crop(picture, np.array(key[1:], np.float32), picture_px))
    return stills


def _identity_keys(span: Span) -> list[_Key]:
    if span.identity_path is not None:
        return [(span.identity_path,)]
    assert span.identity_box is not None
    return [(frame, *map(float, box)) for frame, box in zip(span.identity_frames, span.identity_box, strict=True)]


def _still_of_file(place: str, picture_px: int, decoder: Decoder) -> bytes:
    """The identity picture at a path or URL."""
    try:
        with local_copy(place) as path:
            pixels = decoder.picture(path).pixels
    except MediaError as error:
        text = f"the identity picture cannot be used: {error.problem}"
        raise MediaError(redacted(place), "bad_identity", text) from None
    height, width = pixels.shape[:2]
    return encode_still(crop(pixels, np.array([0, 0, width, height], np.float32), picture_px))
