"""Media files damaged on purpose, in ways that decoders and demuxers are known to stumble over. All by seed."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.audio import AudioStream
from av.container import OutputContainer
from av.video import VideoStream

from tccp.config import FPS, SAMPLE_RATE_HZ
from tccp.media import open_audio, read_frames
from tccp.roundtable import write_clips

_KINDS: list[tuple[str, str | None, dict[str, str], str, int]] = [
    # ending, video codec, its options, audio codec, its rate
    ("mkv", "libx264", {"bf": "2", "g": "10"}, "flac", SAMPLE_RATE_HZ),
    ("webm", "libvpx", {"deadline": "good", "cpu-used": "4"}, "libopus", 48000),
    ("avi", "mpeg4", {"bf": "0", "g": "10"}, "libmp3lame", SAMPLE_RATE_HZ),
    ("mpg", "mpeg2video", {"bf": "2", "g": "10"}, "mp2", 48000),
    ("mov", "mjpeg", {}, "pcm_s16le", SAMPLE_RATE_HZ),
    ("ts", "libx264", {"bf": "2", "g": "10"}, "aac", SAMPLE_RATE_HZ),
    ("wav", None, {}, "pcm_s16le", SAMPLE_RATE_HZ),
]
# What headers begin with.
_MARKS = [
    *(b"ftyp", b"moov", b"mvhd", b"tkhd", b"mdhd", b"hdlr", b"stsd", b"stts", b"stss", b"ctts", b"stsc", b"stsz"),
    *(b"stco", b"elst", b"avc1", b"avcC", b"mp4a", b"esds", b"mdat", b"jpeg"),
    *(b"RIFF", b"LIST", b"avih", b"strh", b"strf", b"idx1", b"movi", b"data", b"fmt "),
    # Matroska: EBML, Info, TimestampScale, Duration, Tracks, TrackEntry, Video, width, height, CodecPrivate, Cluster
    *map(
        bytes.fromhex,
        ("1a45dfa3", "1549a966", "2ad7b1", "4489", "1654ae6b", "ae", "e0", "b0", "ba", "63a2", "1f43b675"),
    ),
    # MPEG: pack, system, sequence, extension, picture, video and audio packets; transport packets that begin a unit
    *map(bytes.fromhex, ("000001ba", "000001bb", "000001b3", "000001b5", "00000100", "000001e0", "000001c0", "4741")),
]
_EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)

Random = np.random.Generator


def write_films(folder: Path, seconds: float = 0.8) -> list[Path]:
    """One RoundTable film as MP4, MKV, WebM, AVI, MPEG, QuickTime and transport stream, and its sound as WAV."""
    (film,) = write_clips(folder, 1, seconds, seed=9, width=128, height=96)
    pictures = list(read_frames(film))
    with open_audio(film) as sound:
        samples = np.array(sound.samples)
    paths = [film]
    for ending, video_codec, options, audio_codec, rate_hz in _KINDS:
        path = folder / f"film.{ending}"
        # Without the flag, Matroska would have identifiers drawn at random.
        with av.open(str(path), "w", options={"fflags": "+bitexact"}) as container:
            video = None if video_codec is None else container.add_stream(video_codec, FPS, options=options)
            audio = container.add_stream(audio_codec, rate_hz, layout="mono")
            if isinstance(video, VideoStream):
                video.width, video.height, video.pix_fmt = 128, 96, "yuvj420p" if video_codec == "mjpeg" else "yuv420p"
                _write_pictures(container, video, pictures)
            assert isinstance(audio, AudioStream)
            _write_sound(container, audio, samples)
        paths.append(path)
    return paths


def _write_pictures(container: OutputContainer, video: VideoStream, pictures: Sequence[np.ndarray]) -> None:
    for number, picture in enumerate(pictures):
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        frame.pts, frame.time_base = number, Fraction(1, FPS)
        container.mux(video.encode(frame))
    container.mux(video.encode(None))


def _write_sound(container: OutputContainer, audio: AudioStream, samples: np.ndarray) -> None:
    block = av.AudioFrame.from_ndarray(samples[None], "fltp", "mono")
    block.sample_rate, block.pts, block.time_base = SAMPLE_RATE_HZ, 0, Fraction(1, SAMPLE_RATE_HZ)
    converter = av.AudioResampler(audio.format.name, "mono", audio.rate, audio.frame_size or None)
    for part in [*converter.resample(block), *converter.resample(None)]:
        container.mux(audio.encode(part))
    container.mux(audio.encode(None))


def _flip_bits(data: bytearray, random: Random) -> None:
    for place in random.integers(len(data), size=int(random.integers(1, 64))):
        data[place] ^= 1 << int(random.integers(8))


def _flip_early(data: bytearray, random: Random) -> None:
    """Where headers are."""
    for place in random.integers(min(len(data), 2048), size=int(random.integers(1, 16))):
        data[place] = int(random.integers(256))


def _cut(data: bytearray, random: Random) -> None:
    del data[int(random.integers(len(data))) :]


def _take_out(data: bytearray, random: Random) -> None:
    start, stop = _stretch(data, random)
    del data[start:stop]


def _splice(data: bytearray, random: Random) -> None:
    """A stretch of the file once more, in another place of it."""
    start, stop = _stretch(data, random)
    place = int(random.integers(len(data)))
    data[place:place] = data[start:stop]


def _swap(data: bytearray, random: Random) -> None:
    """A stretch over another."""
    start, stop = _stretch(data, random)
    place = int(random.integers(len(data)))
    part = data[start:stop][: len(data) - place]
    data[place : place + len(part)] = part


def _zero(data: bytearray, random: Random) -> None:
    start, stop = _stretch(data, random)
    data[start:stop] = bytes(stop - start)


def _noise(data: bytearray, random: Random) -> None:
    start, stop = _stretch(data, random)
    data[start:stop] = random.bytes(stop - start)


def _header_fields(data: bytearray, random: Random) -> None:
    """Some fields near the beginnings of headers set to extreme values, big- or little-endian."""
    places = [place for mark in _MARKS for place in _places(bytes(data), mark)]
    for _ in range(int(random.integers(1, 4))):
        width = int(random.choice([1, 2, 4]))
        value = int(random.choice(_EXTREMES)) & (1 << 8 * width) - 1
        if not places or len(data) < 8:
            return
        place = min(places[int(random.integers(len(places)))] + int(random.integers(48)), len(data) - width)
        data[place : place + width] = value.to_bytes(width, "big" if random.integers(2) else "little")


MUTATIONS = (_flip_bits, _flip_early, _cut, _take_out, _splice, _swap, _zero, _noise, _header_fields, _header_fields)
"""Fields of headers twice: they reach furthest."""


def mutated(data: bytes, seed: int) -> tuple[str, bytes]:
    """The name of what was done and `data` with it done. Never empty."""
    random = np.random.default_rng([seed, len(data)])
    mutation = MUTATIONS[int(random.integers(len(MUTATIONS)))]
    changed = bytearray(data)
    mutation(changed, random)
    return mutation.__name__.strip("_"), bytes(changed) or b"\0"


def _stretch(data: bytearray, random: Random) -> tuple[int, int]:
    """Of 1 byte to a quarter of the file; short ones are as likely as long ones."""
    length = int(np.exp(random.uniform(0, np.log(max(2, len(data) // 4)))))
    start = int(random.integers(max(1, len(data) - length)))
    return start, start + length


def _places(data: bytes, mark: bytes, most: int = 8) -> list[int]:
    places: list[int] = []
    place = data.find(mark)
    while place >= 0 and len(places) < most:
        places.append(place)
        place = data.find(mark, place + 1)
    return places
