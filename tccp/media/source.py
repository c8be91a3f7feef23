"""Opens media files and finds their streams, the exact start and end of each, and damage."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
from av.audio import AudioStream
from av.audio.layout import AudioLayout
from av.container import InputContainer
from av.stream import Disposition
from av.video import VideoStream

from tccp.clock import FPS
from tccp.errors import DamagedData
from tccp.media.file_access import FileReader, file_status
from tccp.media.stored_pictures import StoredPictures, stored_pictures
from tccp.media.timeline import FREE_RUNNING, MOST_RESTARTS, Restart, StreamTimeline, Timeline
from tccp.media.upright import DisplayTurn, display_turn

# Demuxers for films and recordings. Playlists (HLS, concat, SDP) are excluded because they open other files and URLs.
_FORMATS = "mov,matroska,avi,mpeg,mpegts,flv,asf,ogg,mxf,nut,wav,w64,mp3,flac,aac,ac3,eac3,aiff,au,caf,amr,wv,ivf"
# Formats whose header states a duration. If there is less content, the file was cut short.
_STATES_DURATION = {"mov", "matroska", "avi", "wav", "w64", "flac"}
_TRUNCATION_TOLERANCE_S = Fraction(1, 2)  # headers round, and may count last frames that are not shown
KEYFRAMES_INDEXED = {"mov", "matroska"}  # seeking in other formats is a guess
# Containers round times to milliseconds. Sound that starts earlier than the pictures by less needs no further frame.
_ROUNDING_S = Fraction(1, 1000)
# A longer gap in a stream, or between the starts of two streams, is a damaged timestamp. Filling it could take days.
_MAX_LEAP_S = 600


class MediaError(DamagedData):
    """A media file cannot be used. The message is one line with the file, the problem and what to do.

    reason: a stable code. tccp.media uses missing, not_a_file, unreadable, empty_file, not_media, no_index, truncated,
    corrupt, unsupported, no_video, no_audio, empty_video, empty_audio and not_finite.
    """

    def __init__(self, path: str | Path, reason: str, problem: str):
        super().__init__(f"{path}: {problem}")
        self.path, self.reason, self.problem = Path(path), reason, problem
        self._given = path  # a Path would drop one slash of a URL

    def __reduce__(self) -> tuple:  # pickle would call the constructor with the message alone
        return (MediaError, (self._given, self.reason, self.problem))


class Span(NamedTuple):
    """Exact start and end of a stream, in seconds of the file's own clock."""

    start: Fraction
    end: Fraction


@dataclass(frozen=True)
class MediaInfo:
    """The streams of a media file and their timing.

    width, height: of the upright picture with square pixels, 0 without video.
    turn: how read_frames turns the stored pictures upright, from the display matrix.
    frame_rate: of the stored pictures if it is constant, else None. num_pictures: number of stored pictures.
    video_span, audio_span: from the first picture (sample) to the end of the last; None without such a stream.
    audio_sample_rate_hz, audio_channels: as stored, 0 without sound. audio_layout: FFmpeg's name of the channels, such
      as stereo or 5.1; empty without sound.
    seeks: True if the container has an index, so that read_frames can start anywhere at once. Otherwise it decodes
      everything before the first frame wanted.
    notes: what is unusual about the file and how it is read, one sentence each.
    stored: how the pictures are stored. video_restarts, audio_restarts: where the clock of the stream starts again
      (tccp.media.timeline). Only the process that decodes knows these three.
    """

    path: Path
    width: int
    height: int
    turn: DisplayTurn
    frame_rate: Fraction | None
    num_pictures: int
    video_codec: str | None
    audio_codec: str | None
    audio_sample_rate_hz: int
    audio_channels: int
    audio_layout: str
    video_span: Span | None
    audio_span: Span | None
    seeks: bool = False
    notes: tuple[str, ...] = ()
    stored: StoredPictures = field(default_factory=StoredPictures, compare=False)
    video_restarts: tuple[Restart, ...] = field(default=(), compare=False)
    audio_restarts: tuple[Restart, ...] = field(default=(), compare=False)

    @property
    def has_video(self) -> bool:
        return self.video_span is not None

    @property
    def has_audio(self) -> bool:
        return self.audio_span is not None

    @property
    def channel_names(self) -> tuple[str, ...]:
        """FFmpeg's names of the channels, such as FL and FR."""
        return tuple(channel.name for channel in AudioLayout(self.audio_layout).channels) if self.audio_layout else ()

    @property
    def rotation_deg(self) -> int:
        """The clockwise part of the turn: 0, 90, 180 or 270."""
        return self.turn.rotation_deg

    @property
    def zero(self) -> Fraction:
        """Where the 25 fps clock is zero, in seconds of the file's own clock.

        With pictures: the start of the first picture, or as many whole frames before it as sound that starts earlier
        needs. Without pictures: the first sample.
        """
        if self.video_span is None:
            assert self.audio_span is not None
            return self.audio_span.start
        if self.audio_span is None:
            return self.video_span.start
        early_s = self.video_span.start - self.audio_span.start - _ROUNDING_S
        return self.video_span.start - Fraction(max(0, math.ceil(early_s * FPS)), FPS)

    @property
    def video_start_s(self) -> float | None:
        return None if self.video_span is None else float(self.video_span.start)

    @property
    def audio_start_s(self) -> float | None:
        return None if self.audio_span is None else float(self.audio_span.start)

    @property
    def duration_s(self) -> float:
        """From `zero` to the end of the stream that ends last."""
        return float(max(span.end for span in (self.video_span, self.audio_span) if span is not None) - self.zero)

    @property
    def num_frames(self) -> int:
        """How many frames read_frames delivers: all i with i/25 s before the end of the last picture."""
        return 0 if self.video_span is None else math.ceil((self.video_span.end - self.zero) * FPS)

    @property
    def first_frame(self) -> int:
        """The frame at which the first picture starts. Earlier ones, if sound starts first, repeat that picture."""
        return 0 if self.video_span is None else math.ceil((self.video_span.start - self.zero) * FPS)


def probe(path: str | Path) -> MediaInfo:
    """The streams of a file and their timing.

    Reads every packet once, decodes only the first picture and the first sound, and caches the result until the file
    changes. Raises MediaError if the file is not a media file, is cut short, or has neither pictures nor sound.
    """
    file = checked_file(path)
    status = file_status(file)
    info = _probe(file.absolute(), status.num_bytes, status.mtime_ns)
    return dataclasses.replace(info, path=file)


def checked_file(path: str | Path) -> Path:
    """Returns `path` if it is a plain, readable file that is not empty. Raises MediaError otherwise."""
    file = Path(path)
    try:
        status = file_status(file)
        with FileReader(file) if status.is_plain else contextlib.nullcontext() as reader:
            empty = reader is not None and not reader.read(1)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        raise MediaError(path, "missing", "there is no such file; check the path") from None
    except OSError as error:
        raise MediaError(path, "unreadable", f"cannot be read ({error.strerror}); check path and permissions") from None
    if not status.is_plain:
        kind = "a folder" if status.is_folder else "not a plain file"
        raise MediaError(path, "not_a_file", f"this is {kind}; give one video or audio file")
    if empty:
        raise MediaError(path, "empty_file", "the file is empty (0 bytes); copy or download it again")
    return file


@contextlib.contextmanager
def opened(path: Path) -> Iterator[InputContainer]:
    """Opens the file's container. Turns decoding errors inside the block into MediaError `corrupt`."""
    with FileReader(path) as reader:
        try:
            # FFmpeg reads through `reader` alone: it may open no other file or address that the film names.
            container = av.open(
                reader,
                "r",
                container_options={"format_whitelist": _FORMATS, "protocol_whitelist": "none"},
                metadata_errors="replace",
            )
        except (av.error.FFmpegError, OSError):
            raise _reason_not_opened(path) from None
        try:
            with container:
                yield container
        except (av.error.FFmpegError, OSError) as error:
            what = (error.strerror or "decoding failed").lower()
            raise MediaError(path, "corrupt", f"the file is damaged ({what}); restore it from its source") from None


def _reason_not_opened(path: Path) -> MediaError:
    boxes = _mp4_boxes(path)
    if not {"ftyp", "moov", "mdat"} & set(boxes):
        return MediaError(
            path, "not_media", "this is no video or audio file of a known format; give MP4, MKV, WAV or the like"
        )
    if "moov" not in boxes:
        return MediaError(path, "no_index", "its index (moov box) is missing, so it was cut short; get a complete copy")
    return MediaError(path, "corrupt", "its MP4 index is damaged; restore it from its source")


def _mp4_boxes(path: Path) -> list[str]:
    """Names of the top-level MP4 boxes, up to the first one whose size is invalid."""
    names: list[str] = []
    end = file_status(path).num_bytes
    with FileReader(path) as file:
        position = 0
        while position + 8 <= end and len(names) < 100:
            file.seek(position)
            header = file.read(16)
            size, name = int.from_bytes(header[:4], "big"), header[4:8]
            if size == 1:  # a 64-bit size follows the name
                size = int.from_bytes(header[8:16], "big")
            if size < 8 or not name.isalnum():
                break
            names.append(name.decode("ascii"))
            position += size
    return names


def pick_video(container: InputContainer) -> VideoStream | None:
    """The stream that the container prefers (default flag, then size), without cover art."""
    films = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    best = container.streams.best("video")
    return next(
        (stream for stream in films if best is not None and stream.index == best.index), films[0] if films else None
    )


def pick_audio(container: InputContainer) -> AudioStream | None:
    """The audio stream that belongs to the stream of `pick_video`."""
    best = container.streams.best("audio", related=pick_video(container))
    return best if isinstance(best, AudioStream) else None


def no_stream(path: Path, kind: str) -> MediaError:
    if kind == "video":
        return MediaError(path, "no_video", "the file has no pictures; give one with a video track")
    return MediaError(path, "no_audio", "the file has no sound; give one with an audio track")


@functools.lru_cache(maxsize=256)
def _probe(path: Path, size: int, mtime_ns: int) -> MediaInfo:
    """Size and modification time are part of the cache key, so that a changed file is probed again."""
    turn, layout, stored = DisplayTurn(), "", StoredPictures()
    width = height = num_pictures = sample_rate_hz = channels = 0
    frame_rate = video_span = audio_span = video_codec = audio_codec = None
    video_restarts: tuple[Restart, ...] = ()
    audio_restarts: tuple[Restart, ...] = ()
    with opened(path) as container:
        video, audio = pick_video(container), pick_audio(container)
        if video is None and audio is None:
            raise MediaError(path, "no_video", "the file has neither pictures nor sound; give a video or audio file")
        timeline = _scan(container, path, size)
        seeks = bool(KEYFRAMES_INDEXED & set(container.format.name.split(",")))
        if video is not None:
            pictures = timeline.streams[video.index]
            picture = _first_frame(path, video.index)
            assert isinstance(picture, av.VideoFrame)
            frame_rate = _constant_rate(pictures, video)
            video_span = _video_span(picture, pictures, video, frame_rate)
            if "avi" in container.format.name.split(","):
                # FFmpeg guesses a delay for reordered pictures. If all have the same delay, none is reordered.
                delay_s = pictures.constant_delay * pictures.time_base
                video_span = Span(video_span.start - delay_s, video_span.end - delay_s)
            num_pictures, video_restarts = pictures.packets, pictures.restarts
            turn = display_turn(picture)
            stored = stored_pictures(video, picture)
            width, height = stored.shown_size[::-1] if turn.transpose else stored.shown_size
            video_codec = video.codec_context.codec.canonical_name
        if audio is not None:
            sound = _first_frame(path, audio.index)
            assert isinstance(sound, av.AudioFrame)
            start = _time(sound)
            audio_span = Span(start, max(start, timeline.streams[audio.index].end * _time_base(audio)))
            audio_restarts = timeline.streams[audio.index].restarts
            audio_codec = audio.codec_context.codec.canonical_name
            sample_rate_hz, channels = sound.sample_rate, sound.layout.nb_channels
            layout = sound.layout.name
        if video_span and audio_span and abs(apart := video_span.start - audio_span.start) > _MAX_LEAP_S:
            raise _leaping(path, apart)
    return MediaInfo(
        path=path,
        width=width,
        height=height,
        turn=turn,
        frame_rate=frame_rate,
        num_pictures=num_pictures,
        video_codec=video_codec,
        audio_codec=audio_codec,
        audio_sample_rate_hz=sample_rate_hz,
        audio_channels=channels,
        audio_layout=layout,
        video_span=video_span,
        audio_span=audio_span,
        seeks=seeks and not video_restarts,
        notes=(*timeline.notes, *stored.notes()),
        stored=stored,
        video_restarts=video_restarts,
        audio_restarts=audio_restarts,
    )


def _scan(container: InputContainer, path: Path, size: int) -> Timeline:
    """The clocks of all packets. Raises MediaError `truncated` if the header states more content."""
    names = set(container.format.name.split(","))
    chosen = [stream for stream in (pick_video(container), pick_audio(container)) if stream is not None]
    timeline = Timeline({s.index: (s.type, _time_base(s)) for s in chosen}, bool(FREE_RUNNING & names))
    ends: dict[int, int] = {}  # of all streams, because the header's duration counts them all
    for packet in container.demux():
        timeline.add(packet)
        ticks = packet.pts if packet.pts is not None else packet.dts
        if packet.size and ticks is not None and not packet.is_discard:
            ends[packet.stream_index] = max(ends.get(packet.stream_index, 0), ticks + (packet.duration or 0))
        if timeline.num_restarts > MOST_RESTARTS:
            problem = f"its clock starts again more than {MOST_RESTARTS} times; convert it to MP4"
            raise MediaError(path, "unsupported", problem)
    timeline.finish()
    indexed_end = 0
    if {"mov", "avi"} & names:  # the index of other formats may be a guess
        indexed_end = max((entry.pos + entry.size for s in chosen for entry in s.index_entries), default=0)
    end_s = max((end * _time_base(container.streams[index]) for index, end in ends.items()), default=Fraction(0))
    if indexed_end > size or _ends_early(container, end_s):
        raise MediaError(path, "truncated", "the file is cut short: its header promises more; get a complete copy")
    for stream in timeline.streams.values():
        if stream.leap_s > _MAX_LEAP_S:
            raise _leaping(path, stream.leap_s)
    return timeline


def _leaping(path: Path, leap_s: Fraction) -> MediaError:
    return MediaError(
        path, "corrupt", f"its timestamps leap by {float(leap_s):.0f} s; restore the file from its source"
    )


def _ends_early(container: InputContainer, end_s: Fraction) -> bool:
    names = set(container.format.name.split(","))
    if not _STATES_DURATION & names or container.duration is None:
        return False
    start = (container.start_time or 0) if "mov" in names else 0  # other formats count their duration from zero
    stated = Fraction(start + container.duration, av.time_base)
    if "avi" in names and (video := pick_video(container)):  # FFmpeg scales AVI's duration to the size of the file
        stated = max(stated, ((video.start_time or 0) + video.frames) * _time_base(video))
    return end_s < stated - _TRUNCATION_TOLERANCE_S


def _time_base(item: av.stream.Stream | av.frame.Frame) -> Fraction:
    assert item.time_base is not None
    return item.time_base


def _time(frame: av.frame.Frame) -> Fraction:
    assert frame.pts is not None
    return frame.pts * _time_base(frame)


def _constant_rate(pictures: StreamTimeline, stream: VideoStream) -> Fraction | None:
    """The stream's rate if all its pictures fit it to within the rounding of the time base, else None."""
    runs = pictures.presented
    if not runs or max(run.longest for run in runs) - min(run.shortest for run in runs) > 1:
        return None
    for rate in (stream.average_rate, stream.guessed_rate):
        if rate and all(
            abs((run.last - run.first) - (run.packets - 1) / (rate * pictures.time_base)) <= 1 for run in runs
        ):
            return rate
    return None


def _video_span(first: av.VideoFrame, pictures: StreamTimeline, stream: VideoStream, rate: Fraction | None) -> Span:
    """The duration of the last picture comes from its packet or, if packets have none, from the stream's mean rate."""
    start = _time(first)
    end = pictures.end * pictures.time_base
    if not any(run.longest for run in pictures.runs):
        end += 1 / (rate or stream.average_rate or Fraction(FPS))
    return Span(start, max(start, end))


def _first_frame(path: Path, index: int) -> av.VideoFrame | av.AudioFrame:
    """The first decoded frame. Its time is the true start, because the decoder has applied priming and edit lists."""
    with opened(path) as container:
        stream = container.streams[index]
        if not isinstance(stream, VideoStream | AudioStream) or stream.codec_context is None:
            raise MediaError(path, "unsupported", "its codec is not known here; convert it to H.264 and AAC")
        kind = stream.type  # a stream must not be touched after its container is closed
        for frame in container.decode(stream):
            assert isinstance(frame, av.VideoFrame | av.AudioFrame)
            if frame.pts is None:
                raise MediaError(path, "unsupported", f"its {kind} carries no timestamps; convert it to MP4")
            return frame
    what = "pictures" if kind == "video" else "sound"
    raise MediaError(path, f"empty_{kind}", f"its {kind} track is empty; give a file with {what}")
