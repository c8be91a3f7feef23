"""Windows straight from film for all ranks: one stream, in an order that does not depend on the number of ranks.

The windows of films are not known beforehand, so there is no plan: steps take them in the order of the films, shuffled
within a buffer (`tccp.clips.order.shuffled`). Nothing is stored; every epoch reads the films anew.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from tccp.clips.order import shuffled
from tccp.config import Settings, VariantName
from tccp.errors import TccpError
from tccp.files import Folder
from tccp.inference.conditioning import CONDITION_FIELDS, LOSS_FIELDS, training_conditions, training_pictures
from tccp.models.variants import VARIANTS

SHUFFLE_WINDOWS = 512
AHEAD = 4
RECORD = "stream.json"

FilmWindows = Callable[[int], Iterator[Mapping[str, np.ndarray]]]
"""Called with an epoch: its windows in order, rows of `tccp.clips.windows.windows`. It is pickled."""


class FilmOrder:
    """An actor: `take(rank)` returns a rank's micro-batches, one after the other, from step `start` on."""

    def __init__(
        self, windows: FilmWindows, settings: Settings, variant: VariantName, num_ranks: int, start: int, run: Folder
    ):
        """run: keeps the number of windows in an epoch once it is known, so that a resumed run skips whole epochs."""
        self.windows, self.settings, self.run = windows, settings, run
        self.row = VARIANTS[variant]
        self.training = settings.for_variant(variant).training
        self.kinds = training_conditions(self.row, settings)
        self.start, self.num_ranks = start, num_ranks
        ahead = AHEAD * self.training.accumulation
        self.ready: list[queue.Queue[Any]] = [queue.Queue(maxsize=ahead) for _ in range(num_ranks)]
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._produce, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stops reading films, and waits for the thread: a process that ends while the thread reads aborts."""
        self._closed.set()
        self._thread.join()

    def take(self, rank: int) -> dict[str, np.ndarray]:
        """Columns of `PictureFiles.columns`, and `clip`, `start` and `epoch`. Raises what reading films raises."""
        item = self.ready[rank].get()
        if isinstance(item, BaseException):
            raise item
        return dict(item)

    def _produce(self) -> None:
        try:
            windows = self._in_order()
            size = self.training.batch_size // (self.training.accumulation * self.num_ranks)
            while not self._closed.is_set():
                step = [next(windows) for _ in range(self.training.batch_size)]
                shares = [step[i : i + size] for i in range(0, len(step), size)]
                # As in a plan: each rank gets a contiguous part of the step, divided into micro-batches.
                for number, share in enumerate(shares):
                    self._put(number // self.training.accumulation, self._columns(share))
        except BaseException as error:
            for rank in range(self.num_ranks):
                self._put(rank, error)

    def _put(self, rank: int, item: Any) -> None:
        while not self._closed.is_set():
            with contextlib.suppress(queue.Full):
                self.ready[rank].put(item, timeout=0.2)
                return

    def _in_order(self) -> Iterator[tuple[int, Mapping[str, np.ndarray]]]:
        skipped = self.start * self.training.batch_size
        first = 0
        if self.run.exists(RECORD):
            first, skipped = divmod(skipped, int(json.loads(self.run.read(RECORD))["windows"]))
        for epoch in itertools.count(first):
            count = 0
            for row in shuffled(self.windows(epoch), self.settings.seed, epoch, SHUFFLE_WINDOWS):
                count += 1
                if skipped:
                    skipped -= 1
                else:
                    yield epoch, row
            if not count:
                raise TccpError("the films give no training windows: every clip is shorter than the window")
            self.run.write(RECORD, json.dumps({"windows": count}).encode())

    def _columns(self, share: list[tuple[int, Mapping[str, np.ndarray]]]) -> dict[str, np.ndarray]:
        rows = [row for _, row in share]
        pictures = [training_pictures(self.row, self.settings, row) for row in rows]
        columns = {name: np.stack([one[name] for one in pictures]) for name in pictures[0]}
        columns |= {
            "clip": np.array([row["clip_hash"] for row in rows], np.int64),
            "start": np.array([row["start_frame"] for row in rows], np.int32),
            "epoch": np.array([epoch for epoch, _ in share], np.int32),
        }
        columns |= {name: np.stack([row[name] for row in rows]) for name in LOSS_FIELDS}
        for kind in self.kinds:
            columns[kind] = np.stack([row[CONDITION_FIELDS[kind]] for row in rows])
        return columns
