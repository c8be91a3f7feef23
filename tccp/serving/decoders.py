"""Decoding processes that are used again: to start one takes longer than to read a short film."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tccp.media.sandbox import Decoder, Limits

_MOST_IDLE = 4


class Decoders:
    """A stock of decoders. A process decodes files of different clients one after the other, at most 200 films."""

    def __init__(self, limits: Limits | None = None):
        self._limits = limits
        self._idle: list[Decoder] = []
        self._closed = False
        self._lock = threading.Lock()

    @contextmanager
    def borrowed(self) -> Iterator[Decoder]:
        """A decoder that nobody else uses within the context."""
        with self._lock:
            decoder = self._idle.pop() if self._idle else Decoder(self._limits)
        try:
            yield decoder
        except BaseException:
            decoder.close()  # it may be in the middle of a film
            raise
        with self._lock:
            if len(self._idle) < _MOST_IDLE and not self._closed:
                self._idle.append(decoder)
                return
        decoder.close()

    def close(self) -> None:
        with self._lock:
            idle, self._idle, self._closed = self._idle, [], True
        for decoder in idle:
            decoder.close()
