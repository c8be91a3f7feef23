"""Face detectors that work side by side."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue

import numpy as np
from jaxtyping import UInt8

from tccp.faces import Face, FaceBackend

MOST_DETECTORS = 4
"""Each takes about 100 MiB."""


class Detectors:
    """Detects faces in several frames at once. Frames do not influence each other, so results are those of one."""

    def __init__(self, open_one: Callable[[], FaceBackend], most: int) -> None:
        """most: number of detectors, if they can work at the same time (`FaceBackend.works_beside_others`); else one.

        open_one: raises TccpError if there is no such detector.
        """
        self._all = [open_one()]
        if self._all[0].works_beside_others:
            self._all += [open_one() for _ in range(most - 1)]
        self._free: SimpleQueue[FaceBackend] = SimpleQueue()
        for detector in self._all:
            self._free.put(detector)
        self._threads = ThreadPoolExecutor(len(self._all), "tccp-detect") if len(self._all) > 1 else None

    @property
    def count(self) -> int:
        return len(self._all)

    def detect(self, frame: UInt8[np.ndarray, "h w 3"]) -> Future[list[Face]]:
        """The faces of a frame, as `FaceBackend.detect`. With one detector, the call waits for them.

        With several, the frame must not change before the result is there.
        """
        if self._threads is not None:
            return self._threads.submit(self._detect, frame)
        done: Future[list[Face]] = Future()
        done.set_result(self._detect(frame))
        return done

    def _detect(self, frame: UInt8[np.ndarray, "h w 3"]) -> list[Face]:
        detector = self._free.get()
        try:
            return detector.detect(frame)
        finally:
            self._free.put(detector)

    def close(self) -> None:
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
        for detector in self._all:
            detector.close()
