"""The messages between parent and child, as pydantic models that check every field against bounds."""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, model_validator

from tccp.media.film_sound import MOST_CHANNELS
from tccp.media.sandbox.limits import Limits
from tccp.media.source import MediaInfo, Span
from tccp.media.upright import DisplayTurn

MOST_FRAMES_LISTED = 10_000  # offsets in one FramesRequest; the message stays well below the channel's limit
LONGEST_PROBLEM = 500  # characters
_LONGEST_ANSWER = 1 << 16  # bytes
_MOST_BRACKETS = 8  # in one answer, outside its texts; this bounds the depth of nesting too
_LARGEST = 1 << 63  # of times in seconds, and of what FFmpeg counts
_FRACTION = re.compile(r"-?[0-9]{1,40}(/[1-9][0-9]{0,39})?")
_TEXT = re.compile(rb'"(?:[^"\\]|\\.)*"')


class Message(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, ser_json_bytes="base64", val_json_bytes="base64"
    )


def _exact(value: Any) -> Any:
    """Converts only short fractions of integers: Fraction("1e999999999") would take gigabytes."""
    if not isinstance(value, str):
        return value
    if not _FRACTION.fullmatch(value):
        raise ValueError("not a fraction of two integers")
    exact = Fraction(value)
    if abs(exact) >= _LARGEST or exact.denominator >= _LARGEST:
        raise ValueError("too large")
    return exact


Exact = Annotated[Fraction, BeforeValidator(_exact)]
Count = Annotated[int, Field(ge=0, lt=1 << 63)]
SlotNumber = Annotated[int, Field(ge=0, lt=1 << 10)]
CodecName = Annotated[str, Field(pattern=r"^[\x20-\x7e]{1,64}$")]
Notes = Annotated[tuple[Annotated[str, Field(max_length=LONGEST_PROBLEM)], ...], Field(max_length=20)]


# From the parent


class Start(Message):
    """The first message: the limits to work under, and FFmpeg's threads (None: its default here)."""

    limits: Limits
    threads: Annotated[int, Field(ge=1)] | None


class Request(Message):
    """A request to decode something. It ends the request before it. The file's descriptor comes with it.

    id: comes back in every answer. path: as bytes, because file names need not be valid UTF-8. num_bytes, mtime_ns: of
    the file. memory_bytes: if not 0, the descriptor of shared memory of this size comes second.
    """

    id: int
    path: bytes
    num_bytes: Count
    mtime_ns: int
    memory_bytes: Count


class ProbeRequest(Request):
    """Asks for a MediaAnswer. start_frame, num_frames: the child also checks that the film has these frames."""

    kind: Literal["probe"] = "probe"
    start_frame: int | None = None
    num_frames: int | None = None


class Delivery(Request):
    """A request whose result comes in blocks of at most slot_bytes, each in one of `slots` slots of shared memory."""

    slots: Annotated[int, Field(gt=0)]
    slot_bytes: Annotated[int, Field(gt=0)]


class FramesRequest(Delivery):
    """Asks for num_frames pictures from start_frame, or only for those at ascending `offsets` from start_frame."""

    kind: Literal["frames"] = "frames"
    start_frame: int
    num_frames: Count
    offsets: Annotated[tuple[Count, ...], Field(max_length=MOST_FRAMES_LISTED)] | None


class SoundRequest(Delivery):
    """Asks for the sound, as float32 samples at 16 kHz mono."""

    kind: Literal["sound"] = "sound"


class FilmSoundRequest(Delivery):
    """Asks for a SoundFormat, then for the sound of `film_sound`: blocks of float32, one channel after the other."""

    kind: Literal["film_sound"] = "film_sound"


class PictureRequest(Request):
    """Asks for a PictureAnswer."""

    kind: Literal["picture"] = "picture"


class PixelsRequest(Delivery):
    """Asks for the pixels of the picture of the PictureRequest before, in one block."""

    kind: Literal["pixels"] = "pixels"


class Free(Message):
    """The parent has copied what was in these slots."""

    kind: Literal["free"] = "free"
    id: int
    slots: tuple[SlotNumber, ...]


class Stop(Message):
    """The parent wants no more blocks of a request."""

    kind: Literal["stop"] = "stop"
    id: int


# From the child, which may be under the control of a hostile file


class Ready(Message):
    """The child has given up its rights and waits for requests. unconfined: why the kernel does not confine it."""

    kind: Literal["ready"] = "ready"
    unconfined: Annotated[str, Field(max_length=200)] | None


class Answer(Message):
    id: Count


class SpanValue(Message):
    """A `Span`, in seconds."""

    start: Exact
    end: Exact

    @model_validator(mode="after")
    def _in_order(self) -> SpanValue:
        if self.end < self.start:
            raise ValueError("the end lies before the start")
        return self


class MediaAnswer(Answer):
    """A `MediaInfo` without its path."""

    kind: Literal["media"] = "media"
    width: Annotated[int, Field(ge=0, lt=1 << 31)]
    height: Annotated[int, Field(ge=0, lt=1 << 31)]
    transpose: bool
    mirror_x: bool
    mirror_y: bool
    frame_rate: Annotated[Exact, Field(gt=0)] | None
    num_pictures: Count
    video_codec: CodecName | None
    audio_codec: CodecName | None
    audio_sample_rate_hz: Annotated[int, Field(ge=0, lt=1 << 31)]
    audio_channels: Annotated[int, Field(ge=0, lt=1 << 31)]
    audio_layout: Annotated[str, Field(pattern=r"^[\x20-\x7e]{0,200}$")]
    video_span: SpanValue | None
    audio_span: SpanValue | None
    seeks: bool
    notes: Notes

    @model_validator(mode="after")
    def _is_consistent(self) -> MediaAnswer:
        if self.video_span is None and self.audio_span is None:
            raise ValueError("neither pictures nor sound")
        if (self.video_span is None) != (self.width == 0) or (self.width == 0) != (self.height == 0):
            raise ValueError("a video track without a size, or a size without one")
        if (self.video_span is None) != (self.video_codec is None) or (self.audio_span is None) != (
            self.audio_codec is None
        ):
            raise ValueError("a track without a codec, or a codec without one")
        if (self.audio_span is None) != (self.audio_sample_rate_hz == 0 or self.audio_channels == 0):
            raise ValueError("an audio track without rate or channels, or these without one")
        return self

    @classmethod
    def of(cls, request_id: int, info: MediaInfo) -> MediaAnswer:
        spans = (
            None if span is None else SpanValue(start=span.start, end=span.end)
            for span in (info.video_span, info.audio_span)
        )
        video_span, audio_span = spans
        return cls(
            id=request_id,
            width=info.width,
            height=info.height,
            transpose=info.turn.transpose,
            mirror_x=info.turn.mirror_x,
            mirror_y=info.turn.mirror_y,
            frame_rate=info.frame_rate,
            num_pictures=info.num_pictures,
            video_codec=info.video_codec,
            audio_codec=info.audio_codec,
            audio_sample_rate_hz=info.audio_sample_rate_hz,
            audio_channels=info.audio_channels,
            audio_layout=info.audio_layout,
            video_span=video_span,
            audio_span=audio_span,
            seeks=info.seeks,
            notes=info.notes,
        )

    def media_info(self, path: Path) -> MediaInfo:
        """Inverse of `of`."""
        video_span, audio_span = (
            None if span is None else Span(span.start, span.end) for span in (self.video_span, self.audio_span)
        )
        return MediaInfo(
            path=path,
            width=self.width,
            height=self.height,
            turn=DisplayTurn(self.transpose, self.mirror_x, self.mirror_y),
            frame_rate=self.frame_rate,
            num_pictures=self.num_pictures,
            video_codec=self.video_codec,
            audio_codec=self.audio_codec,
            audio_sample_rate_hz=self.audio_sample_rate_hz,
            audio_channels=self.audio_channels,
            audio_layout=self.audio_layout,
            video_span=video_span,
            audio_span=audio_span,
            seeks=self.seeks,
            notes=self.notes,
        )


class SoundFormat(Answer):
    """How the blocks of a FilmSoundRequest are to be read."""

    kind: Literal["sound_format"] = "sound_format"
    sample_rate_hz: Annotated[int, Field(gt=0, lt=1 << 20)]
    num_channels: Annotated[int, Field(gt=0, le=MOST_CHANNELS)]
    layout: Annotated[str, Field(pattern=r"^[A-Za-z0-9.()-]{1,32}$")]


class PictureAnswer(Answer):
    """What a `Still` says, without its pixels."""

    kind: Literal["picture"] = "picture"
    width: Annotated[int, Field(gt=0, lt=1 << 31)]
    height: Annotated[int, Field(gt=0, lt=1 << 31)]
    num_pictures: Annotated[int, Field(gt=0, lt=1 << 31)]
    profile_ignored: bool


class Block(Answer):
    """A slot of shared memory holds the next num_bytes of the result."""

    kind: Literal["block"] = "block"
    slot: SlotNumber
    num_bytes: Annotated[int, Field(gt=0, lt=1 << 63)]


class End(Answer):
    """There are no more blocks. notes: how what was delivered differs from what is stored."""

    kind: Literal["end"] = "end"
    notes: Notes = ()


class Failure(Answer):
    """The request failed. reason: as in MediaError; None for a TccpError that is about the request, not the file."""

    kind: Literal["failure"] = "failure"
    reason: Annotated[str, Field(pattern=r"^[a-z_]{1,40}$")] | None
    problem: Annotated[str, Field(max_length=LONGEST_PROBLEM)]


ToChild = ProbeRequest | FramesRequest | SoundRequest | FilmSoundRequest | PictureRequest | PixelsRequest | Free | Stop
ToParent = MediaAnswer | SoundFormat | PictureAnswer | Block | End | Failure
TO_CHILD: TypeAdapter[ToChild] = TypeAdapter(Annotated[ToChild, Field(discriminator="kind")])
TO_PARENT: TypeAdapter[ToParent] = TypeAdapter(Annotated[ToParent, Field(discriminator="kind")])


def parse_answer(packet: bytes) -> ToParent:
    """Checks and converts a message of the child. Raises ValueError if anything about it is not as it must be."""
    check_packet(packet)
    return TO_PARENT.validate_json(packet)


def parse_ready(packet: bytes) -> Ready:
    """Like `parse_answer`, for the child's first message."""
    check_packet(packet)
    return Ready.model_validate_json(packet)


def check_packet(packet: bytes) -> None:
    """Bounds the size and the nesting of a message before it is parsed. Raises ValueError."""
    if len(packet) > _LONGEST_ANSWER:
        raise ValueError("too long")
    outside = _TEXT.sub(b"", packet)
    if outside.count(b"{") + outside.count(b"[") > _MOST_BRACKETS:
        raise ValueError("nested too deeply")
