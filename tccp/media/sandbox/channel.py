"""The connection of parent and child: small messages through a socket, pictures and sound through shared memory."""

from __future__ import annotations

import array
import fcntl
import mmap
import os
import socket
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
from jaxtyping import UInt8

from tccp.media.sandbox.messages import Message

_LONGEST_MESSAGE = 1 << 17  # bytes
_MOST_DESCRIPTORS = 2
_SEND_S = 2.0  # a working process reads long before the socket is full
Received = TypeVar("Received")


class Closed(Exception):
    """The process at the other end has closed the connection or has died."""


class Channel:
    """One end of the connection. A message is one packet with one JSON object; file descriptors may come with it."""

    def __init__(self, end: socket.socket):
        self._end = end

    def send(self, message: Message, descriptors: Sequence[int] = ()) -> None:
        """Raises Closed, and TimeoutError if the other end does not read."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        self._end.settimeout(_SEND_S)
        try:
            self._end.sendmsg([message.model_dump_json().encode()], rights)
        except (BrokenPipeError, ConnectionResetError):
            raise Closed from None

    def receive(self, parse: Callable[[bytes], Received], timeout_s: float | None = None) -> Received:
        """The next message, which carries no descriptors: the kernel closes those of a hostile sender at once.

        parse: checks and converts a packet, such as `parse_answer`.
        timeout_s: None waits without limit, 0 does not wait.
        Raises Closed, TimeoutError, and ValueError if `parse` refuses the message, or if it is too long or came with
        descriptors.
        """
        packet, _, flags = self._packet(timeout_s, 0)
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise ValueError("too long, or with descriptors")
        return parse(packet)

    def receive_with_descriptors(
        self, parse: Callable[[bytes], Received], timeout_s: float | None = None
    ) -> tuple[Received, list[int]]:
        """Like `receive`, from a trusted sender. Also returns the descriptors that came with the message."""
        packet, ancillary, _ = self._packet(timeout_s, socket.CMSG_SPACE(_MOST_DESCRIPTORS * array.array("i").itemsize))
        descriptors = array.array("i")
        for _, _, data in ancillary:
            descriptors.frombytes(data)
        return parse(packet), list(descriptors)

    def _packet(self, timeout_s: float | None, rights_bytes: int) -> tuple[bytes, list[tuple[int, int, bytes]], int]:
        self._end.settimeout(timeout_s)
        try:
            packet, ancillary, flags, _ = self._end.recvmsg(_LONGEST_MESSAGE, rights_bytes)
        except BlockingIOError:
            raise TimeoutError from None
        except ConnectionResetError:
            raise Closed from None
        if not packet:
            raise Closed
        return packet, ancillary, flags

    def close(self) -> None:
        self._end.close()


def shared_memory(num_bytes: int) -> int:
    """A descriptor of unnamed memory of fixed size. If the child could shrink it, reading it would kill the parent."""
    descriptor = os.memfd_create("tccp-pictures", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, num_bytes)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return descriptor


def mapped(descriptor: int, num_bytes: int) -> UInt8[np.ndarray, " n"]:
    """The memory behind a descriptor. It stays mapped as long as the array exists, even if the descriptor is closed."""
    return np.frombuffer(mmap.mmap(descriptor, num_bytes), np.uint8)
