"""Reads pictures at 25 fps, one at a time.

PyAV decodes everything. decord converts to RGB faster, but (0.6.0, measured on the shared clips) it returns damaged
pictures without an error, starts MPEG-1 films at the second group of pictures, and drops the start offset between
picture and sound.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from fractions import Fraction
from itertools import chain
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from jaxtyping import UInt8

from tccp.clock import FPS
from tccp.errors import TccpError
from tccp.media.deinterlace import Timed, deinterlaced
from tccp.media.source import MediaError, MediaInfo, Span, no_stream, opened, pick_video, probe
from tccp.media.timeline import carried_on
from tccp.media.to_rgb import ToRgb

MAX_THREADS = 4  # each decoding thread holds its own pictures, so without a limit memory would grow with the core count
_BEFORE_INTERLACED_S = Fraction(1, 4)  # a picture made of fields depends on those before it
# Seek this long before the wanted time to find a keyframe. If no attempt succeeds, decode the film from its beginning.
_SEEK_MARGINS_S = (Fraction(0), Fraction(2), Fraction(15))
# Formats without presentation times. FFmpeg's guesses are wrong for reordered pictures, but their distances are right.
_NO_PRESENTATION_TIMES = {"avi"}


def read_frames(
    path: str | Path, start_frame: int = 0, num_frames: int | None = None, copy: bool = True
) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
    """Pictures start_frame .. start_frame + num_frames - 1 at 25 fps (default: all), upright, RGB.

    Each picture is an array of its own, unless `copy` is False: then it may be a view of FFmpeg's memory, to be copied
    at once. Memory does not grow with the length of the film.
    Before the first picture: raises MediaError like `probe` or if the file has no pictures, and TccpError if the film
    does not have these frames. Later: raises MediaError `corrupt` when it reaches a damaged picture.
    """
    info = probe(path)
    if info.video_span is None:
        raise no_stream(info.path, "video")
    stop_frame = info.num_frames if num_frames is None else start_frame + num_frames
    if not 0 <= start_frame <= stop_frame <= info.num_frames:
        raise TccpError(
            f"{path}: frames {start_frame} to {stop_frame} were asked for; the film has 0 to {info.num_frames} "
            f"at {FPS} fps"
        )
    return _on_the_clock(info, info.video_span, start_frame, stop_frame, copy)


def _on_the_clock(
    info: MediaInfo, span: Span, start_frame: int, stop_frame: int, copy: bool
) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
    """Repeats each picture until the next one is due, the first also before its own time, the last to the end.

    A picture is due half a frame before its time, by the shorter of its predecessor's duration and 1/25 s. So every
    picture is shown at the frame nearest to its time.
    """
    due = start_frame
    to_rgb = ToRgb(info)
    current: av.VideoFrame | None = None
    before = Fraction(0)
    for time, frame in _decoded(info, span, info.zero + Fraction(start_frame, FPS)):
        if due == stop_frame:
            return
        begin = due
        early_s = Fraction(0) if current is None else min(Fraction(1, FPS), time - before) / 2
        while due < stop_frame and info.zero + Fraction(due, FPS) < time - early_s:
            due += 1
        yield from _copies(current or frame, due - begin, to_rgb, copy)
        current, before = frame, time
    if current is not None:
        yield from _copies(current, stop_frame - due, to_rgb, copy)


def _copies(frame: av.VideoFrame, count: int, to_rgb: ToRgb, copy: bool) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
    if count == 0:
        return
    view = to_rgb(frame)
    picture = np.ascontiguousarray(view) if copy else view
    for _ in range(count - 1):
        yield picture.copy() if copy else picture
    yield picture


def _decoded(info: MediaInfo, span: Span, time: Fraction) -> Iterator[Timed]:
    """Pictures in presentation order. The first one is the picture at `time` or an earlier one."""
    if info.stored.interlaced:
        time -= _BEFORE_INTERLACED_S
    for margin in _SEEK_MARGINS_S:
        if time - margin <= span.start + 1 or not info.seeks:
            break
        with opened(info.path) as container:
            pictures = deinterlaced(_timed(info, span, container, time - margin), info.frame_rate)
            first = next(pictures, None)
            if first is not None and first[0] <= time:
                yield first
                yield from pictures
                return
    with opened(info.path) as container:
        yield from deinterlaced(_timed(info, span, container, None), info.frame_rate)


def _timed(info: MediaInfo, span: Span, container: InputContainer, seek_to: Fraction | None) -> Iterator[Timed]:
    stream = pick_video(container)
    assert stream is not None
    assert stream.time_base is not None
    stream.thread_type = "AUTO"
    stream.codec_context.thread_count = min(MAX_THREADS, os.cpu_count() or 1)
    if seek_to is not None:
        container.seek(int(seek_to / stream.time_base), stream=stream)
    by_dts = _NO_PRESENTATION_TIMES & set(container.format.name.split(","))
    dts: int | None = None
    time = span.start
    packets = carried_on(container.demux(stream), info.video_restarts)
    for frame in chain.from_iterable(packet.decode() for packet in packets):
        assert isinstance(frame, av.VideoFrame)
        if by_dts and dts is not None:  # the last, delayed pictures have no dts; AVI advances one tick per picture
            ticks = frame.dts - dts if frame.dts is not None else 1
            time, dts = time + ticks * stream.time_base, dts + ticks
        elif by_dts:
            dts = frame.dts
        elif frame.pts is not None:
            time = max(time, frame.pts * stream.time_base)
        if frame.is_corrupt:
            at_s = float(time - info.zero)
            raise MediaError(
                info.path, "corrupt", f"the picture at {at_s:.2f} s is damaged; restore the file from its source"
            )
        yield time, frame
