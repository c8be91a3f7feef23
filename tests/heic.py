"""HEIC pictures for tests, made of FFmpeg's HEVC and the boxes of ISO/IEC 23008-12."""

from __future__ import annotations

import io
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace


def write_heic(path: Path, picture: np.ndarray, quarter_turns: int = 0, nclx: tuple[int, int] = (1, 13)) -> None:
    """Writes an RGB picture, whose coded size is rounded up to even numbers; `clap` says which part of it to show.

    quarter_turns: anticlockwise, by which a reader turns the picture (`irot`). nclx: primaries and transfer of H.273.
    """
    height, width = picture.shape[:2]
    padded = np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), constant_values=255)
    configuration, data = _hevc(padded)
    properties = [
        _box(b"hvcC", configuration),
        _full(b"ispe", struct.pack(">II", padded.shape[1], padded.shape[0])),
        _box(b"colr", b"nclx" + struct.pack(">HHHB", *nclx, 6, 0x80)),
        # sizes, then the distances of the centres, as fractions
        _box(
            b"clap",
            struct.pack(">IIIIiIiI", width, 1, height, 1, -(width % 2), 2, -(height % 2), 2),
        ),
        _box(b"irot", bytes([quarter_turns])),
    ]
    item = _full(b"infe", struct.pack(">HH4s", 1, 0, b"hvc1") + b"\0", version=2)
    associations = struct.pack(">IHB", 1, 1, len(properties)) + bytes(0x80 | (i + 1) for i in range(len(properties)))
    kind = _box(b"ftyp", b"heic" + struct.pack(">I", 0) + b"mif1heic")

    def meta(offset: int) -> bytes:
        location = struct.pack(">HHHHHII", 0x4400, 1, 1, 0, 1, offset, len(data))
        boxes = [
            _full(b"hdlr", struct.pack(">I4s12s", 0, b"pict", b"") + b"\0"),
            _full(b"pitm", struct.pack(">H", 1)),
            _full(b"iinf", struct.pack(">H", 1) + item),
            _full(b"iloc", location),
            _box(b"iprp", _box(b"ipco", b"".join(properties)) + _full(b"ipma", associations)),
        ]
        return _full(b"meta", b"".join(boxes))

    head = kind + meta(len(kind) + len(meta(0)) + 8)
    path.write_bytes(head + _box(b"mdat", data))


def _hevc(picture: np.ndarray) -> tuple[bytes, bytes]:
    """The decoder's configuration and the data of one intra picture, as they stand in MP4."""
    film = io.BytesIO()
    options = {"x265-params": "lossless=1:log-level=none:pools=none:frame-threads=1:bframes=0", "preset": "ultrafast"}
    with av.open(film, "w", format="mp4") as container:
        stream = container.add_stream("libx265", 25, options=options)
        stream.width, stream.height, stream.pix_fmt = picture.shape[1], picture.shape[0], "yuv444p"
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(
            format="yuv444p", dst_colorspace=Colorspace.ITU601, dst_color_range=ColorRange.JPEG
        )
        frame.pts, frame.time_base = 0, Fraction(1, 25)
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    content = film.getvalue()
    at = content.index(b"hvcC")
    configuration = content[at + 4 : at - 4 + int.from_bytes(content[at - 4 : at], "big")]
    with av.open(io.BytesIO(content)) as container:
        return configuration, next(bytes(packet) for packet in container.demux() if packet.size)


def _box(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(content), name) + content


def _full(name: bytes, content: bytes, version: int = 0) -> bytes:
    return _box(name, struct.pack(">I", version << 24) + content)
