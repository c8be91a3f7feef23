"""How long the parent waits for the child."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from tccp.media.sandbox.limits import Limits

_ANSWER_S = 1.0
_SHORTEST_WAIT_S = 1e-3
Received = TypeVar("Received")


class Patience:
    """How much longer to wait for the child: limits.stall_s, and `extra_s` for the first answer.

    Every answer adds a second, up to stall_s, so that a film cannot continue for ever at one picture a minute.
    """

    def __init__(self, limits: Limits, extra_s: float):
        self._limits = limits
        self._left_s = float(limits.stall_s) + extra_s

    def spend(self, receive: Callable[[float], Received]) -> Received:
        began = time.monotonic()
        try:
            return receive(max(self._left_s, _SHORTEST_WAIT_S))
        finally:
            self._left_s -= time.monotonic() - began

    def answered(self) -> None:
        self._left_s = max(self._left_s, min(self._left_s + _ANSWER_S, float(self._limits.stall_s)))
