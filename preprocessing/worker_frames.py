"""Tells the driver of a Ray cluster how many frames its workers have seen, while they work on reels."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from preprocessing.frame_progress import FrameProgress, ReelKey

_EVERY_S = 1.0


class SentFrames:
    """A worker's end: `begin` with each reel, `on_frame` with each frame. Counts are sent once a second."""

    def __init__(self, counts: Any) -> None:
        self._counts = counts  # an actor of _Counts
        self._reel: ReelKey = (-1, -1)
        self._unsent, self._sent_at = 0, 0.0

    def begin(self, reel: ReelKey) -> None:
        self._send()
        self._reel = reel

    def on_frame(self) -> None:
        self._unsent += 1
        if time.monotonic() - self._sent_at >= _EVERY_S:
            self._send()

    def _send(self) -> None:
        if self._unsent:
            self._counts.add.remote(self._reel, self._unsent)
        self._unsent, self._sent_at = 0, time.monotonic()


class _Counts:
    def __init__(self) -> None:
        self._seen: Counter[ReelKey] = Counter()

    def add(self, reel: ReelKey, frames: int) -> None:
        self._seen[reel] += frames

    def seen(self) -> dict[ReelKey, int]:
        """All counts, those of reels that have ended too: they are few numbers each."""
        return dict(self._seen)


@contextmanager
def frames_of_workers(progress: FrameProgress) -> Iterator[SentFrames]:
    """Gives what workers count their frames with; tells `progress` of them during the block. Ray must be running."""
    import ray

    counts = ray.remote(num_cpus=0)(_Counts).remote()
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(_EVERY_S):
            try:
                seen = ray.get(counts.seen.remote(), timeout=10 * _EVERY_S)
            except ray.exceptions.RayError:  # progress is worth less than the run
                continue
            progress.workers_have_seen(seen)

    thread = threading.Thread(target=watch, name="tccp-worker-frames", daemon=True)
    thread.start()
    try:
        yield SentFrames(counts)
    finally:
        ended.set()
        thread.join()
        ray.kill(counts)
