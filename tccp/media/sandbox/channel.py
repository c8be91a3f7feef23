"""The connection of parent and child: small messages through a socket, pictures and sound through shared memory."""

from __future__ import annotations

import array
import fcntl
import mmap
import os
import socket
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from jaxtyping import UInt8

from tccp.media.sandbox.messages import Message

_LONGEST_MESSAGE = 1 << 17  # bytes
_SEND_S = 2.0  # a working process reads long before the socket is full
Received = TypeVar("Received")


class Closed(Exception):
    """The process at the other end has closed the connection or has died."""


class Channel:
    """One end of the connection. A message is one packet with one JSON object; a file descriptor may come with it."""

    def __init__(self, end: socket.socket):
        self._end = end

    def send(self, message: Message, descriptor: int | None = None) -> None:
        """Raises Closed, and TimeoutError if the other end does not read."""
        rights = [] if descriptor is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor]))]
        self._end.settimeout(_SEND_S)
        try:
            self._end.sendmsg([message.model_dump_json().encode()], rights)
        except (BrokenPipeError, ConnectionResetError):
            raise Closed from None

    def receive(self, parse: Callable[[bytes], Received], timeout_s: float | None = None) -> Received:
        """The next message. The kernel drops descriptors that come with it, so a hostile sender cannot use them up.

        parse: checks and converts a packet, such as `validate_json` of a pydantic TypeAdapter.
        timeout_s: None waits without limit, 0 does not wait.
        Raises Closed, TimeoutError, and ValueError if `parse` refuses the message.
        """
        return self._receive(parse, timeout_s, 0)[0]

    def receive_with_descriptor(
        self, parse: Callable[[bytes], Received], timeout_s: float | None = None
    ) -> tuple[Received, int | None]:
        """Like `receive`, from a trusted sender. Also returns the descriptor that came with the message, or None."""
        return self._receive(parse, timeout_s, socket.CMSG_SPACE(array.array("i").itemsize))

    def _receive(
        self, parse: Callable[[bytes], Received], timeout_s: float | None, rights_bytes: int
    ) -> tuple[Received, int | None]:
        self._end.settimeout(timeout_s)
        try:
            packet, ancillary, _, _ = self._end.recvmsg(_LONGEST_MESSAGE, rights_bytes)
        except BlockingIOError:
            raise TimeoutError from None
        except ConnectionResetError:
            raise Closed from None
        if not packet:
            raise Closed
        descriptors = [array.array("i", data)[0] for _, _, data in ancillary]
        return parse(packet), descriptors[0] if descriptors else None

    def close(self) -> None:
        self._end.close()


def shared_memory(num_bytes: int) -> int:
    """A descriptor of unnamed memory of fixed size. If the child could shrink it, reading it would kill the parent."""
    descriptor = os.memfd_create("tccp-pictures", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, num_bytes)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return descriptor


def mapped(descriptor: int) -> UInt8[np.ndarray, " n"]:
    """The memory behind a descriptor. It stays mapped as long as the array exists, even if the descriptor is closed."""
    return np.frombuffer(mmap.mmap(descriptor, 0), np.uint8)
