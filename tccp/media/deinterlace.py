"""Makes whole pictures of interlaced ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fractions import Fraction

import av
from av.filter import Graph

from tccp.clock import FPS

Timed = tuple[Fraction, av.VideoFrame]


def deinterlaced(pictures: Iterable[Timed], frame_rate: Fraction | None) -> Iterator[Timed]:
    """Pictures in presentation order, with their times; those marked as interlaced go through FFmpeg's bwdif.

    frame_rate: of the film. At 25 fps each pair of fields gives one picture; otherwise each field gives one, so that
    the 25 fps clock finds a picture near every time.
    """
    source = iter(pictures)
    for time, frame in source:
        if frame.interlaced_frame:
            yield from _filtered(time, frame, source, "send_frame" if frame_rate == FPS else "send_field")
            return
        yield time, frame


def _filtered(time: Fraction, first: av.VideoFrame, rest: Iterator[Timed], mode: str) -> Iterator[Timed]:
    graph, time_base = Graph(), Fraction(first.time_base or Fraction(1, 90_000))
    inlet = graph.add_buffer(width=first.width, height=first.height, format=first.format, time_base=time_base)
    bwdif = graph.add("bwdif", f"mode={mode}:deint=interlaced")
    outlet = graph.add("buffersink")
    inlet.link_to(bwdif)
    bwdif.link_to(outlet)
    graph.configure()

    def finished() -> Iterator[Timed]:
        while True:
            try:
                out = graph.vpull()
            except (av.error.BlockingIOError, av.error.EOFError):
                return
            assert out.pts is not None and out.time_base is not None
            yield out.pts * out.time_base, out

    frame: av.VideoFrame | None = first
    while frame is not None:
        frame.pts, frame.time_base = round(time / time_base), time_base
        graph.push(frame)
        yield from finished()
        time, frame = next(rest, (time, None))
    graph.push(None)
    yield from finished()
