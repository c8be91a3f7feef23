"""The progress of preprocessing in frames, of which the total is estimated until every film has been opened."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from typing import Any

from tccp.progress import Tasks

FRAMES_PER_BYTE = 25 / 125_000
"""Assumed until the first film is opened: a film of 1 Mbit/s."""


ReelKey = tuple[int, int]
"""A reel: the number of its source in the listing, and its first frame."""


class FrameProgress:
    """Reports frames that are done. Both passes over a film count, so that half is left after the first.

    sizes: bytes of the sources, by their number in the listing; 0 where they are unknown. A film that is not opened
    yet is estimated to have as many frames per byte as those before it, or as many frames as their mean.
    """

    def __init__(self, tasks: Tasks, title: str, sizes: Mapping[int, int]) -> None:
        self._tasks = tasks
        self._sizes = dict(sizes)
        self._frames: dict[int, float] = {}  # of opened sources
        self._done = 0.0  # frames of finished reels
        self._finished: set[ReelKey] = set()
        self._lengths: dict[ReelKey, int] = {}  # of reels that are being worked on in this process
        self._seen: dict[ReelKey, int] = {}  # passes over frames of reels that are being worked on
        self._lock = threading.Lock()  # steps may run in threads, and a thread reports what workers have seen
        self._task = tasks.add_task(title, total=self._total())

    def begin(self, reel: ReelKey, frames: int, share: float) -> None:
        """A reel begins in this process. frames: its length. share: of its source's frames."""
        with self._lock:
            self._frames[reel[0]] = frames / share if share else 0.0
            self._lengths[reel] = frames
            self._report()

    def on_frame(self, reel: ReelKey) -> None:
        """One pass is done with one frame of the reel."""
        with self._lock:
            self._seen[reel] = self._seen.get(reel, 0) + 1
            self._report()

    def workers_have_seen(self, passes: Mapping[ReelKey, int]) -> None:
        """How many frames workers have seen of each reel, both passes together."""
        with self._lock:
            self._seen.update((reel, seen) for reel, seen in passes.items() if reel not in self._finished)
            self._report()

    def end(self, row: Mapping[str, Any]) -> None:
        """A reel is done, with this row of `preprocessing.steps.RESULT_SCHEMA`."""
        order, frames, share = row["order"], row["frames"], row["share"]
        with self._lock:
            if frames and share:
                self._frames[order] = frames / share
            elif share >= 1:
                self._frames[order] = 0.0  # it cannot be used
            self._done += frames
            reel = order, row["start_frame"]
            self._finished.add(reel)
            self._lengths.pop(reel, None)
            self._seen.pop(reel, None)
            self._report()

    def _report(self) -> None:
        done = self._done + sum(min(seen / 2, self._lengths.get(reel, math.inf)) for reel, seen in self._seen.items())
        self._tasks.update(self._task, completed=round(done), total=max(round(self._total()), round(done)))

    def _total(self) -> float:
        known_bytes = sum(self._sizes[order] for order in self._frames)
        known = sum(self._frames.values())
        per_byte = known / known_bytes if known and known_bytes else FRAMES_PER_BYTE
        usual = known / len(self._frames) if known else 0.0
        rest = [size for order, size in self._sizes.items() if order not in self._frames]
        return known + sum(size * per_byte if size else usual for size in rest)
