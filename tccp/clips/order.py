"""The order in which training takes windows: a pure function of (seed, window id, epoch).

Resuming, streaming and the number of workers do not change it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple, TypeVar

import numpy as np

from tccp.errors import TccpError
from tccp.seeds import rng_seed

_Item = TypeVar("_Item")


class WindowId(NamedTuple):
    """A training window: `window` frames of a clip from `start_frame` of that clip."""

    clip_id: str
    start_frame: int


class PlannedWindow(NamedTuple):
    """A window in one epoch. Noise, t, mask and dropout are sampled with the seed parts (seed, id, epoch)."""

    epoch: int
    id: WindowId


def window_starts(num_frames: int, window: int, stride: int) -> list[int]:
    """First frames of a clip's windows: every `stride` frames, and one more at the end of the clip for the remainder.

    Raises TccpError if window or stride is below 1.
    """
    if window < 1 or stride < 1:
        raise TccpError(f"window {window} and stride {stride} must be at least 1 frame")
    starts = list(range(0, num_frames - window + 1, stride))
    if starts and starts[-1] + window < num_frames and stride <= window:
        starts.append(num_frames - window)
    return starts


def window_ids(clip_ids: Iterable[str], num_frames: Iterable[int], window: int, stride: int) -> list[WindowId]:
    """All windows of clips of these lengths. A clip shorter than a window has none."""
    return [
        WindowId(clip_id, start)
        for clip_id, length in zip(clip_ids, num_frames, strict=True)
        for start in window_starts(length, window, stride)
    ]


def epoch_order(ids: Iterable[WindowId], seed: int, epoch: int) -> list[WindowId]:
    """The order of one epoch: every window once, shuffled by (seed, epoch), independent of the order of `ids`."""
    ordered = sorted(ids)
    order = np.random.default_rng(rng_seed(seed, "plan", epoch)).permutation(len(ordered))
    return [ordered[i] for i in order]


def step_slice(
    num_windows: int, step: int, batch_size: int, rank: int = 0, num_ranks: int = 1
) -> list[tuple[int, int]]:
    """(epoch, position in that epoch's order) of each window in global step `step`, counted from 0.

    A batch may contain the end of one epoch and the start of the next, so no window is dropped and an epoch may be
    shorter than a batch. Rank r takes a fixed, contiguous part; the parts of all ranks in order are the whole batch.
    Raises TccpError if there are no windows or the ranks do not divide the batch.
    """
    if num_windows < 1:
        raise TccpError("no training windows: every clip is shorter than the window; preprocess longer footage")
    if batch_size < 1 or batch_size % num_ranks or not 0 <= rank < num_ranks:
        raise TccpError(f"batch_size {batch_size} cannot be divided among {num_ranks} workers (rank {rank})")
    share = batch_size // num_ranks
    first = step * batch_size + rank * share
    return [divmod(position, num_windows) for position in range(first, first + share)]


def shuffled(windows: Iterable[_Item], seed: int, epoch: int, buffer: int) -> Iterator[_Item]:
    """Shuffles a stream by (seed, epoch) with at most `buffer` items in memory.

    Windows that come directly from films are ordered in this way, because there is no list of all of them. Equal
    items in equal order give an equal result, whatever their origin. Raises TccpError for a buffer below 1.
    """
    if buffer < 1:
        raise TccpError(f"shuffle buffer {buffer}: give at least 1")
    rng = np.random.default_rng(rng_seed(seed, "shuffle", epoch))
    held: list[_Item] = []
    for item in windows:
        held.append(item)
        if len(held) > buffer:
            yield held.pop(int(rng.integers(len(held))))
    yield from (held[i] for i in rng.permutation(len(held)))


class TrainingOrder:
    """Combines `epoch_order` and `step_slice`. Caches the orders of the epochs of the last step.

    Raises TccpError if a window is listed twice.
    """

    def __init__(self, ids: Iterable[WindowId], seed: int) -> None:
        self.ids = sorted(ids)
        if len(set(self.ids)) != len(self.ids):
            raise TccpError("the same window is listed twice: give each clip table once")
        self.seed = seed
        self._orders: dict[int, list[WindowId]] = {}

    def step(self, step: int, batch_size: int, rank: int = 0, num_ranks: int = 1) -> list[PlannedWindow]:
        """The windows of global step `step` that rank `rank` of `num_ranks` trains on."""
        positions = step_slice(len(self.ids), step, batch_size, rank, num_ranks)
        needed = sorted({epoch for epoch, _ in positions})
        self._orders = {
            epoch: self._orders[epoch] if epoch in self._orders else epoch_order(self.ids, self.seed, epoch)
            for epoch in needed
        }
        return [PlannedWindow(epoch, self._orders[epoch][position]) for epoch, position in positions]
