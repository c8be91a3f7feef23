"""How parent and child talk: small messages through a socket, pictures and sound through memory that they share."""

from __future__ import annotations

import array
import fcntl
import json
import mmap
import os
import socket
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from tccp.media import MediaInfo
from tccp.media.source import Span
from tccp.media.upright import DisplayTurn

_LONGEST_MESSAGE = 1 << 17
_SEND_S = 2.0  # the other end reads long before the socket is full, or it will never read
Message = dict[str, Any]


class Closed(Exception):
    """Nobody is at the other end any more."""


class Channel:
    """One end. A message is a JSON object in a packet of its own; a descriptor may come with it."""

    def __init__(self, end: socket.socket):
        self._end = end

    def send(self, message: Message, descriptor: int | None = None) -> None:
        """Raises Closed, and TimeoutError if the other end does not read."""
        rights = [] if descriptor is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor]))]
        self._end.settimeout(_SEND_S)
        try:
            self._end.sendmsg([json.dumps(message).encode("ascii")], rights)
        except (BrokenPipeError, ConnectionResetError):
            raise Closed from None

    def receive(self, timeout_s: float | None = None) -> Message:
        """The next message; a descriptor that came with it is its `descriptor`.

        timeout_s: None waits for ever, 0 does not wait.
        Raises Closed, TimeoutError, and ValueError for what is not a message.
        """
        self._end.settimeout(timeout_s)
        rights = socket.CMSG_SPACE(array.array("i").itemsize)
        try:
            packet, ancillary, _, _ = self._end.recvmsg(_LONGEST_MESSAGE, rights)
        except BlockingIOError:
            raise TimeoutError from None
        except ConnectionResetError:
            raise Closed from None
        if not packet:
            raise Closed
        message = json.loads(packet)
        if not isinstance(message, dict):
            raise ValueError("no message")
        for _, _, data in ancillary:
            message["descriptor"] = array.array("i", data)[0]
        return message

    def close(self) -> None:
        self._end.close()


def shared_memory(num_bytes: int) -> int:
    """A descriptor of nameless memory whose size is fixed: were it cut short, reading it would kill the reader."""
    descriptor = os.memfd_create("tccp-pictures", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, num_bytes)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return descriptor


def mapped(descriptor: int) -> UInt8[np.ndarray, " n"]:
    """The memory behind a descriptor. It stays as long as the array, also when the descriptor is closed."""
    return np.frombuffer(mmap.mmap(descriptor, 0), np.uint8)


def info_to_message(info: MediaInfo) -> Message:
    """All but the path."""
    return {
        "size": [info.width, info.height],
        "turn": [info.turn.transpose, info.turn.mirror_x, info.turn.mirror_y],
        "frame_rate": None if info.frame_rate is None else str(info.frame_rate),
        "num_pictures": info.num_pictures,
        "codecs": [info.video_codec, info.audio_codec],
        "audio": [info.audio_sample_rate_hz, info.audio_channels],
        "seeks": info.seeks,
        "spans": [None if s is None else [str(s.start), str(s.end)] for s in (info.video_span, info.audio_span)],
    }


def info_from_message(message: Message, path: Path) -> MediaInfo:
    """Inverse of `info_to_message`. Raises ValueError, TypeError or KeyError for anything else."""
    width, height, num_pictures, rate_hz, channels = map(
        int, (*message["size"], message["num_pictures"], *message["audio"])
    )
    transpose, mirror_x, mirror_y = map(bool, message["turn"])
    video_codec, audio_codec = (None if name is None else str(name) for name in message["codecs"])
    video_span, audio_span = (
        None if span is None else Span(Fraction(span[0]), Fraction(span[1])) for span in message["spans"]
    )
    if min(width, height, num_pictures, rate_hz, channels) < 0 or (video_span is None and audio_span is None):
        raise ValueError("no media")
    return MediaInfo(
        path=path,
        width=width,
        height=height,
        turn=DisplayTurn(transpose, mirror_x, mirror_y),
        frame_rate=None if message["frame_rate"] is None else Fraction(message["frame_rate"]),
        num_pictures=num_pictures,
        video_codec=video_codec,
        audio_codec=audio_codec,
        audio_sample_rate_hz=rate_hz,
        audio_channels=channels,
        video_span=video_span,
        audio_span=audio_span,
        seeks=bool(message["seeks"]),
    )
