"""The messages between parent and child, as pydantic models that check every field against bounds."""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, model_validator

from tccp.media.sandbox.limits import Limits
from tccp.media.source import MediaInfo, Span
from tccp.media.upright import DisplayTurn

MOST_FRAMES_LISTED = 10_000  # offsets in one FramesRequest; the message stays well below the channel's limit
LONGEST_PROBLEM = 500  # characters
_FRACTION = re.compile(r"-?[0-9]{1,60}(/[1-9][0-9]{0,59})?")


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
    return Fraction(value)


Exact = Annotated[Fraction, BeforeValidator(_exact)]
Count = Annotated[int, Field(ge=0, lt=1 << 63)]
SlotNumber = Annotated[int, Field(ge=0, lt=1 << 10)]
CodecName = Annotated[str, Field(max_length=64)]
Notes = Annotated[tuple[Annotated[str, Field(max_length=LONGEST_PROBLEM)], ...], Field(max_length=20)]


# From the parent


class Start(Message):
    """The first message: the limits to work under, and FFmpeg's threads (None: its default here)."""

    limits: Limits
    threads: Annotated[int, Field(ge=1)] | None


class Request(Message):
    """A request to decode something. It ends the request before it.

    id: comes back in every answer. path: as bytes, because file names need not be valid UTF-8.
    """

    id: int
    path: bytes


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


class Free(Message):
    """The parent has copied what was in a slot."""

    kind: Literal["free"] = "free"
    id: int
    slot: SlotNumber


class Stop(Message):
    """The parent wants no more blocks of a request."""

    kind: Literal["stop"] = "stop"
    id: int


# From the child, which may be under the control of a hostile file


class Ready(Message):
    """The child has given up its rights and waits for requests."""

    kind: Literal["ready"] = "ready"


class Answer(Message):
    id: int


class FileSize(Answer):
    """The child starts to read a file of this size."""

    kind: Literal["file_size"] = "file_size"
    num_bytes: Count


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
    frame_rate: Exact | None
    num_pictures: Count
    video_codec: CodecName | None
    audio_codec: CodecName | None
    audio_sample_rate_hz: Annotated[int, Field(ge=0, lt=1 << 31)]
    audio_channels: Annotated[int, Field(ge=0, lt=1 << 31)]
    audio_layout: Annotated[str, Field(max_length=200)]
    video_span: SpanValue | None
    audio_span: SpanValue | None
    seeks: bool
    notes: Notes

    @model_validator(mode="after")
    def _has_a_stream(self) -> MediaAnswer:
        if self.video_span is None and self.audio_span is None:
            raise ValueError("neither pictures nor sound")
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


TO_CHILD: TypeAdapter[ProbeRequest | FramesRequest | SoundRequest | Free | Stop] = TypeAdapter(
    Annotated[ProbeRequest | FramesRequest | SoundRequest | Free | Stop, Field(discriminator="kind")]
)
TO_PARENT: TypeAdapter[FileSize | MediaAnswer | Block | End | Failure] = TypeAdapter(
    Annotated[FileSize | MediaAnswer | Block | End | Failure, Field(discriminator="kind")]
)
