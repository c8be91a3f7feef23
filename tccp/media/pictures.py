"""Pictures on the 25 fps clock, streamed."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import Interpolation
from jaxtyping import UInt8

from tccp.config import FPS, TccpError
from tccp.media.source import MediaError, MediaInfo, display_turn, no_stream, opened, pick_stream, probe

# Full chroma interpolation and exact rounding: the fast path smears chroma and differs from CPU to CPU.
_CONVERSION = Interpolation.BICUBIC | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
_SEEK_MARGINS_S = (Fraction(0), Fraction(2), Fraction(15))
_SEEKABLE = {"mov", "matroska"}  # an index of keyframes; elsewhere seeking guesses, so we decode from the start


def read_frames(
    path: str | Path, start_frame: int = 0, num_frames: int | None = None
) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
    """Pictures start_frame .. start_frame + num_frames - 1 of the 25 fps clock (all, by default): upright RGB, one at a time.

    Each is an array of its own. Memory does not grow with the length of the film.
    Raises MediaError if the file has no pictures, or as soon as a damaged one is met; TccpError if the file ends before the
    range does.
    """
    info = probe(path)
    if not info.has_video:
        raise no_stream(info.path, "video")
    stop_frame = info.num_frames if num_frames is None else start_frame + num_frames
    if not 0 <= start_frame <= stop_frame <= info.num_frames:
        raise TccpError(
            f"{path}: frames {start_frame} to {stop_frame} were asked for, the file has 0 to {info.num_frames} at {FPS} fps"
        )
    return _on_the_clock(info, start_frame, stop_frame)


def _on_the_clock(info: MediaInfo, start_frame: int, stop_frame: int) -> Iterator[np.ndarray]:
    wanted = start_frame
    shown: av.VideoFrame | None = None
    for time_s, frame in _decoded_from(info, Fraction(start_frame, FPS) + info.start_s):
        if wanted >= stop_frame:
            return
        due = wanted
        while due < stop_frame and info.start_s + Fraction(due, FPS) < time_s:
            due += 1
        yield from _pictures(shown or frame, due - wanted)
        wanted, shown = due, frame
    if shown is not None:
        yield from _pictures(shown, stop_frame - wanted)


def _pictures(frame: av.VideoFrame, count: int) -> Iterator[np.ndarray]:
    if count:
        picture = _to_rgb(frame)
        for _ in range(count - 1):
            yield picture.copy()
        yield picture


def _to_rgb(frame: av.VideoFrame) -> np.ndarray:
    rgb = frame.to_ndarray(format="rgb24", interpolation=_CONVERSION, src_color_range=frame.color_range)
    return display_turn(frame).apply(rgb)


def _decoded_from(info: MediaInfo, time_s: Fraction) -> Iterator[tuple[Fraction, av.VideoFrame]]:
    """Decoded pictures with their presentation times, beginning at or before the one on show at `time_s`."""
    assert info.video_start_s is not None
    with opened(info.path) as container:
        stream = pick_stream(container, info.path, "video")
        assert isinstance(stream, av.VideoStream)
        stream.thread_type = "AUTO"
        if time_s > info.video_start_s + 1 and _SEEKABLE & set(container.format.name.split(",")):
            for margin_s in _SEEK_MARGINS_S:
                target_s = time_s - margin_s
                if target_s <= info.video_start_s:
                    break
                container.seek(int(target_s / stream.time_base), stream=stream)
                pictures = _timed(info, container, stream)
                first = next(pictures, None)
                if first is not None and first[0] <= time_s:
                    yield first
                    yield from pictures
                    return
            container.seek(int(info.video_start_s / stream.time_base), stream=stream)
            # An index that leads nowhere: decode the whole file instead.
        else:
            yield from _timed(info, container, stream)
            return
    with opened(info.path) as container:
        yield from _timed(info, container, pick_stream(container, info.path, "video"))


def _timed(info, container, stream) -> Iterator[tuple[Fraction, av.VideoFrame]]:
    time_s = info.video_start_s
    for frame in container.decode(stream):
        if frame.pts is not None:
            time_s = max(time_s, frame.pts * frame.time_base)
        if frame.is_corrupt:
            raise MediaError(
                info.path, "corrupt", f"the picture at {float(time_s):.2f} s is damaged; restore the file from its source"
            )
        yield time_s, frame
