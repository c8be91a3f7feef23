"""Opening media files: what is in them, when it starts, and what is wrong with them."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import av.container
import numpy as np
from av.sidedata.sidedata import Type as SideDataType

from tccp.config import FPS, TccpError

# Demuxers a film or a recording can need. Playlists (HLS, concat, SDP, ...) stay out: they open other files and addresses.
_FORMATS = (
    "mov,matroska,avi,mpeg,mpegts,flv,asf,ogg,mxf,nut,dv,wav,w64,mp3,flac,aac,ac3,eac3,aiff,au,caf,amr,wv,ivf"
)
# Formats whose header states how long the streams are, so that a shorter content means a cut file.
_HEADER_STATES_DURATION = {"mov", "matroska", "avi", "wav", "w64", "flac"}
_TRUNCATION_TOLERANCE_S = Fraction(1, 2)  # headers round, and count half-open last frames


class MediaError(TccpError):
    """A media file that cannot be used. One line names the file, what is wrong and what to do.

    reason: short stable code: missing, not_a_file, unreadable, empty_file, not_media, no_index, truncated, corrupt,
    unsupported, no_video, no_audio, empty_audio, not_finite.
    """

    def __init__(self, path: str | Path, reason: str, problem: str):
        super().__init__(f"{path}: {problem}")
        self.path = Path(path)
        self.reason = reason

    def __reduce__(self):  # an exception travels between processes by its arguments, which here are not the message
        return (_restore_error, (self.path, self.reason, str(self).removeprefix(f"{self.path}: ")))


def _restore_error(path: Path, reason: str, problem: str) -> MediaError:
    return MediaError(path, reason, problem)


@dataclass(frozen=True)
class MediaInfo:
    """What a media file holds. Times are exact: `_s` fields are fractions of a second on the file's own clock.

    width, height: of the picture upright, as read_frames delivers it; 0 without video.
    rotation_deg: clockwise turn that the display matrix asks for (already applied by read_frames): 0, 90, 180 or 270.
    frame_rate: of a constant-rate stream; None if the rate varies or there is no video.
    video_start_s, audio_start_s: presentation of the first picture and first sample; None without such a stream.
    start_s: the common start, zero of the 25 fps clock. duration_s: from there to the end of the longer stream.
    num_frames: pictures on the 25 fps clock, 0 without video. first_frame: the first of them that is not held back from
    the future, i.e. at or after the first picture (0 unless sound starts before the pictures do).
    """

    path: Path
    width: int
    height: int
    rotation_deg: int
    frame_rate: Fraction | None
    video_start_s: Fraction | None
    audio_start_s: Fraction | None
    video_end_s: Fraction | None
    audio_end_s: Fraction | None
    video_codec: str | None
    audio_codec: str | None
    audio_sample_rate_hz: int | None
    audio_channels: int
    num_pictures: int  # as stored, on the stream's own clock

    @property
    def has_video(self) -> bool:
        return self.video_start_s is not None

    @property
    def has_audio(self) -> bool:
        return self.audio_start_s is not None

    @property
    def start_s(self) -> Fraction:
        return min(start for start in (self.video_start_s, self.audio_start_s) if start is not None)

    @property
    def duration_s(self) -> Fraction:
        return max(end for end in (self.video_end_s, self.audio_end_s) if end is not None) - self.start_s

    @property
    def num_frames(self) -> int:
        return 0 if self.video_end_s is None else math.ceil((self.video_end_s - self.start_s) * FPS)

    @property
    def first_frame(self) -> int:
        return 0 if self.video_start_s is None else math.ceil((self.video_start_s - self.start_s) * FPS)


def probe(path: str | Path) -> MediaInfo:
    """What the file holds and when. Reads every packet once (no decoding beyond the first picture and sound), and
    remembers the answer until the file changes.

    Raises MediaError if it is not a media file, is cut short, or has neither pictures nor sound.
    """
    file = checked_file(path)
    status = file.stat()
    return _probe(file, status.st_size, status.st_mtime_ns)


def checked_file(path: str | Path) -> Path:
    """`path` if it is a plain, readable file with something in it. Raises MediaError otherwise."""
    file = Path(path)
    try:
        if not file.exists():
            raise MediaError(path, "missing", "there is no such file; check the path")
        if not file.is_file():
            kind = "a folder" if file.is_dir() else "not a plain file"
            raise MediaError(path, "not_a_file", f"is {kind}; give one video or audio file")
        if file.stat().st_size == 0:
            raise MediaError(path, "empty_file", "the file is empty (0 bytes); copy or download it again")
        with file.open("rb"):
            pass
    except OSError as error:
        raise MediaError(path, "unreadable", f"cannot be read ({error.strerror}); check the permissions") from None
    return file


@contextlib.contextmanager
def opened(path: Path) -> Iterator[av.container.InputContainer]:
    """The file's container. Errors of the decoder inside the block become MediaError `corrupt`."""
    try:
        # The explicit protocol keeps a name such as `concat:x` a name.
        container = av.open(
            f"file:{path.absolute()}",
            container_options={"format_whitelist": _FORMATS, "protocol_whitelist": "file"},
            metadata_errors="replace",
        )
    except (av.error.FFmpegError, ValueError):
        raise _open_error(path) from None
    try:
        with container:
            yield container
    except av.error.FFmpegError as error:
        raise MediaError(
            path, "corrupt", f"is damaged: {error.strerror.lower()} while decoding; restore it from its source"
        ) from None


def _open_error(path: Path) -> MediaError:
    boxes = _mp4_boxes(path)
    if "ftyp" not in boxes and "moov" not in boxes:
        return MediaError(path, "not_media", "is not a video or audio file of a known format; give an MP4, MKV, WAV, ...")
    if "moov" not in boxes:
        return MediaError(
            path, "no_index", "has no index (moov box): the recording or download was cut; get a complete copy"
        )
    return MediaError(path, "corrupt", "has a damaged MP4 index; restore it from its source")


def _mp4_boxes(path: Path) -> list[str]:
    """Names of the top-level boxes, as far as they can be followed."""
    names: list[str] = []
    with path.open("rb") as file:
        size_of_file = path.stat().st_size
        position = 0
        while position + 8 <= size_of_file and len(names) < 64:
            file.seek(position)
            header = file.read(16)
            size = int.from_bytes(header[:4], "big")
            if size == 1:
                size = int.from_bytes(header[8:16], "big")
            name = header[4:8]
            if not name.isalnum() or size < 8:
                break
            names.append(name.decode("ascii"))
            position += size
    return names


def pick_streams(
    container: av.container.InputContainer,
) -> tuple[av.VideoStream | None, av.AudioStream | None]:
    """The video stream the container prefers, and the audio stream that goes with it."""
    video = container.streams.best("video")
    if video is not None and video.disposition & av.stream.Disposition.attached_pic:
        video = next(
            (s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic), None
        )
    audio = container.streams.best("audio", related=video)
    return video, audio  # type: ignore[return-value]


def pick_stream(container: av.container.InputContainer, path: Path, kind: str) -> av.stream.Stream:
    video, audio = pick_streams(container)
    stream = video if kind == "video" else audio
    if stream is None:
        raise no_stream(path, kind)
    if stream.codec_context is None:
        raise MediaError(path, "unsupported", f"its {kind} codec is unknown here; convert it to H.264 and AAC")
    return stream


def no_stream(path: Path, kind: str) -> MediaError:
    what = "has no pictures" if kind == "video" else "has no sound"
    return MediaError(path, f"no_{kind}", f"{what}; give a file with {'a video' if kind == 'video' else 'an audio'} track")


@dataclass
class _Extent:
    """What the packets of one stream say about its time, in ticks of its time base."""

    num_packets: int = 0
    first: int | None = None
    last: int | None = None
    end: int | None = None
    shortest: int | None = None
    longest: int | None = None
    torn: bool = False

    def add(self, packet: av.Packet) -> None:
        time = packet.pts if packet.pts is not None else packet.dts
        self.torn = packet.is_corrupt
        if time is None or packet.is_discard:
            return
        duration = packet.duration or 0
        self.num_packets += 1
        self.first = time if self.first is None else min(self.first, time)
        self.last = time if self.last is None else max(self.last, time)
        self.end = time + duration if self.end is None else max(self.end, time + duration)
        self.shortest = duration if self.shortest is None else min(self.shortest, duration)
        self.longest = duration if self.longest is None else max(self.longest, duration)


@functools.lru_cache(maxsize=256)
def _probe(path: Path, size: int, mtime_ns: int) -> MediaInfo:
    with opened(path) as container:
        video, audio = pick_streams(container)
        if video is None and audio is None:
            raise MediaError(path, "no_video", "has neither pictures nor sound; give a video or audio file")
        extents = _scan(container, path)
        width = height = rotation_deg = num_pictures = 0
        frame_rate = video_start_s = video_end_s = audio_start_s = audio_end_s = None
        if video is not None:
            first = _first_frame(path, "video")
            extent = extents[video.index]
            video_start_s = first.pts * first.time_base
            frame_rate = _constant_rate(extent, video)
            # The last frame lasts as long as its packet says; where it says nothing, as long as the stream's mean.
            mean_s = 1 / Fraction(frame_rate or video.average_rate or FPS)
            video_end_s = max(extent.end * video.time_base, extent.last * video.time_base + (0 if extent.shortest else mean_s))
            num_pictures = extent.num_packets
            turn = display_turn(first)
            rotation_deg = turn.rotation_deg
            height, width = (first.width, first.height) if turn.transpose else (first.height, first.width)
        if audio is not None:
            sound = _first_frame(path, "audio")
            audio_start_s = sound.pts * sound.time_base
            audio_end_s = max(extents[audio.index].end * audio.time_base, audio_start_s)
        return MediaInfo(
            path=path,
            width=width,
            height=height,
            rotation_deg=rotation_deg,
            frame_rate=frame_rate,
            video_start_s=video_start_s,
            audio_start_s=audio_start_s,
            video_end_s=video_end_s,
            audio_end_s=audio_end_s,
            video_codec=video.codec_context.codec.canonical_name if video is not None else None,
            audio_codec=audio.codec_context.codec.canonical_name if audio is not None else None,
            audio_sample_rate_hz=sound.sample_rate if audio is not None else None,
            audio_channels=sound.layout.nb_channels if audio is not None else 0,
            num_pictures=num_pictures,
        )


def _scan(container: av.container.InputContainer, path: Path) -> dict[int, _Extent]:
    """Extents of all streams from their packets; raises MediaError `truncated` if the content stops before the header says."""
    size = path.stat().st_size
    extents = {stream.index: _Extent() for stream in container.streams}
    missing = any(
        entry.pos + entry.size > size
        for stream in pick_streams(container)
        if stream is not None and "mov" in container.format.name
        for entry in stream.index_entries
    )
    for packet in container.demux():
        if packet.size:
            extents[packet.stream.index].add(packet)
    if missing or _ends_early(container, extents):
        raise MediaError(
            path, "truncated", "is cut short: its header promises more than the file holds; get a complete copy"
        )
    return extents


def _ends_early(container: av.container.InputContainer, extents: dict[int, _Extent]) -> bool:
    if not _HEADER_STATES_DURATION & set(container.format.name.split(",")) or container.duration is None:
        return False
    ends = [
        extents[stream.index].end * stream.time_base
        for stream in container.streams
        if extents[stream.index].end is not None
    ]
    promised_s = Fraction((container.start_time or 0) + container.duration, av.time_base)
    return not ends or max(ends) < promised_s - _TRUNCATION_TOLERANCE_S


def _constant_rate(extent: _Extent, stream: av.VideoStream) -> Fraction | None:
    """The stream's rate if all its pictures lie on it to within the rounding of its time base."""
    if extent.longest - extent.shortest > 1:
        return None
    for rate in (stream.average_rate, stream.guessed_rate):
        if rate and abs((extent.last - extent.first) - (extent.num_packets - 1) / (rate * stream.time_base)) <= 1:
            return Fraction(rate)
    return None


def _first_frame(path: Path, kind: str):
    """The first frame that the decoder delivers: its time is the true start, priming and edit lists applied."""
    with opened(path) as container:
        stream = pick_stream(container, path, kind)
        for frame in container.decode(stream):
            if frame.pts is None:
                frame.pts = 0
            return frame
    reason = "empty_audio" if kind == "audio" else "no_video"
    raise MediaError(path, reason, f"its {kind} track is empty; give a file with {kind} in it")


@dataclass(frozen=True)
class DisplayTurn:
    """How a stored picture is brought upright: transpose first, then mirror."""

    transpose: bool = False
    mirror_x: bool = False
    mirror_y: bool = False

    @property
    def rotation_deg(self) -> int:
        """Clockwise turn; a mirrored picture gives the turn that is left once it is mirrored horizontally."""
        if self.transpose:
            return 270 if self.mirror_y and not self.mirror_x else 90
        return 180 if self.mirror_y else 0

    def apply(self, picture: np.ndarray) -> np.ndarray:
        picture = picture.transpose(1, 0, 2) if self.transpose else picture
        picture = picture[::-1] if self.mirror_y else picture
        return np.ascontiguousarray(picture[:, ::-1] if self.mirror_x else picture)


def display_turn(frame: av.VideoFrame) -> DisplayTurn:
    """From the frame's display matrix (ISO 14496-12: x' = a x + c y, y' = b x + d y), to the nearest quarter turn."""
    for side_data in frame.side_data:
        if side_data.type == SideDataType.DISPLAYMATRIX:
            a, b, _, c, d = np.frombuffer(bytes(side_data), "<i4")[:5].tolist()
            if abs(a) + abs(d) >= abs(b) + abs(c):
                return DisplayTurn(False, a < 0, d < 0)
            return DisplayTurn(True, c < 0, b < 0)
    return DisplayTurn()
