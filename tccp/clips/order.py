"""The order in which training takes windows: a pure function of (seed, window id, epoch).

Resuming, streaming and the number of workers change nothing about it.
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
    """A window as one step takes it. Noise, t, mask and dropout draw from (seed, id, epoch)."""

    epoch: int
    id: WindowId


def window_starts(num_frames: int, window: int, stride: int) -> list[int]:
    """First frames of a clip's windows: every `stride` frames, and one more that ends with the clip if any are left."""
    if window < 1 or stride < 1:
        raise TccpError(f"window {window} and stride {stride} must be at least 1 frame")
    starts = list(range(0, num_frames - window + 1, stride))
    if starts and starts[-1] + window < num_frames and stride <= window:
        starts.append(num_frames - window)
    return starts


def window_ids(clip_ids: Iterable[str], num_frames: Iterable[int], window: int, stride: int) -> list[WindowId]:
    """All windows of clips of these lengths; a clip shorter than a window has none."""
    return [
        WindowId(clip_id, start)
        for clip_id, length in zip(clip_ids, num_frames, strict=True)
        for start in window_starts(length, window, stride)
    ]


def plan(ids: Iterable[WindowId], seed: int, epoch: int) -> list[WindowId]:
    """The order of one epoch: every window once, shuffled by (seed, epoch) alone, whatever order `ids` came in."""
    ordered = sorted(ids)
    order = np.random.default_rng(rng_seed(seed, "plan", epoch)).permutation(len(ordered))
    return [ordered[i] for i in order]


def step_slice(
    num_windows: int, step: int, batch_size: int, rank: int = 0, num_ranks: int = 1
) -> list[tuple[int, int]]:
    """(epoch, position in that epoch's plan) of each window that global step `step`, counted from 0, takes.

    Steps run through the epochs without a seam: a batch may end one epoch and begin the next, so no tail is dropped
    and a plan shorter than a batch works. Rank r takes a fixed, contiguous part; the parts of all ranks are the step's
    slice in order. Raises TccpError if there are no windows or the ranks do not divide the batch.
    """
    if num_windows < 1:
        raise TccpError("no training windows: every clip is shorter than the window; preprocess longer footage")
    if batch_size < 1 or batch_size % num_ranks or not 0 <= rank < num_ranks:
        raise TccpError(f"batch_size {batch_size} cannot be divided among {num_ranks} workers (rank {rank})")
    share = batch_size // num_ranks
    first = step * batch_size + rank * share
    return [divmod(position, num_windows) for position in range(first, first + share)]


def shuffled(windows: Iterable[_Item], seed: int, epoch: int, buffer: int) -> Iterator[_Item]:
    """A stream in another order, drawn from (seed, epoch) alone, with at most `buffer` items in memory.

    Where windows come straight from film there is no list of them to plan by: this is their order. The same items in
    the same order give the same order, wherever they come from. Raises TccpError for a buffer below one.
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
    """`plan` and `step_slice` together; keeps the last epochs' plans, which costs time, never changes results."""

    def __init__(self, ids: Iterable[WindowId], seed: int) -> None:
        self.ids = sorted(ids)
        if len(set(self.ids)) != len(self.ids):
            raise TccpError("the same window is listed twice: give each clip table once")
        self.seed = seed
        self._plans: dict[int, list[WindowId]] = {}

    def step(self, step: int, batch_size: int, rank: int = 0, num_ranks: int = 1) -> list[PlannedWindow]:
        """The windows of global step `step` that rank `rank` of `num_ranks` trains on."""
        places = step_slice(len(self.ids), step, batch_size, rank, num_ranks)
        needed = sorted({epoch for epoch, _ in places})
        self._plans = {
            epoch: self._plans[epoch] if epoch in self._plans else plan(self.ids, self.seed, epoch) for epoch in needed
        }
        return [PlannedWindow(epoch, self._plans[epoch][position]) for epoch, position in places]
