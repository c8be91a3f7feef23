"""Ray Data's part of training: it turns step numbers into the micro-batches of those steps, in the order of the plan.

Every rank has its own stream, of exactly the windows that the plan gives it from its first step on. No stream is split,
so the result does not depend on how Ray distributes blocks. Ranks still compare what they receive with the plan.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import pyarrow as pa

from tccp.clips.clip_table import ClipTable
from tccp.clips.order import PlannedWindow, TrainingOrder
from tccp.clips.windows import clip_hash
from tccp.cluster import data_settings, dataset, worker_errors
from tccp.config import Settings, VariantName
from tccp.inference.conditioning import training_conditions
from tccp.models.variants import VARIANTS
from tccp.training.window_files import (
    LatentFiles,
    PictureFiles,
    TablePictures,
    micro_batch,
    training_order,
)

READER_CPUS = 0.25
_Item = TypeVar("_Item")
_BLOCK_BYTES = 16 << 20


@runtime_checkable
class Reader(Protocol):
    """What a Ray Data worker reads for one rank. Instances are pickled, so they stay small."""

    def read(self, step: int) -> Iterator[dict[str, np.ndarray]]:
        """The rank's micro-batches of a step, as columns of one row per window."""


@dataclass(frozen=True)
class WindowReader:
    """Windows of a variant's training, as latents from files or as pictures from the clip table."""

    table: str
    variant: VariantName
    settings: Settings
    files: LatentFiles | PictureFiles
    rank: int
    num_ranks: int

    @cached_property
    def order(self) -> TrainingOrder:  # computed in the worker, and not pickled with the reader
        with ClipTable(self.table) as table:
            return training_order(table.num_frames, self.variant, self.settings)

    def read(self, step: int) -> Iterator[dict[str, np.ndarray]]:
        row = VARIANTS[self.variant]
        training = self.settings.for_variant(self.variant).training
        kinds = training_conditions(row, self.settings)
        for micro in range(training.accumulation):
            planned = micro_batch(self.order, training, step, micro, self.rank, self.num_ranks)
            frames = row.num_frames(self.settings.window)
            columns = self.files.columns(planned, row, frames, kinds, lambda: self.order.ids)
            yield {**columns, **window_ids(planned)}


@dataclass(frozen=True)
class PictureReader:
    """Single pictures, for the auto-encoder."""

    table: str
    settings: Settings
    rank: int
    num_ranks: int

    @cached_property
    def pictures(self) -> TablePictures:
        return TablePictures(ClipTable(self.table, keep=64), self.settings)

    def read(self, step: int) -> Iterator[dict[str, np.ndarray]]:
        batch = self.pictures.batch(step, self.rank, self.num_ranks)
        yield {"pictures": batch.pictures, "numbers": batch.numbers}


class ReadSteps:
    """A Ray Data actor: takes numbers of steps, and returns the rows of their micro-batches."""

    def __init__(self, reader: Reader):
        self.reader = reader

    def __call__(self, batch: pa.Table) -> Iterator[dict[str, np.ndarray]]:
        for step in batch.column("step").to_pylist():
            yield from self.reader.read(step)


def window_ids(planned: Sequence[PlannedWindow]) -> dict[str, np.ndarray]:
    """Columns of numbers that identify the windows of a micro-batch."""
    return {
        "clip": np.array([clip_hash(window.id.clip_id) for window in planned], np.int64),
        "start": np.array([window.id.start_frame for window in planned], np.int32),
        "epoch": np.array([window.epoch for window in planned], np.int32),
    }


def micro_batches(
    reader: Reader, steps: range, rows: int, readers: int, timeout_s: float
) -> Iterator[dict[str, np.ndarray]]:
    """A rank's micro-batches of `rows` rows each, step after step, read ahead by at most `readers` Ray Data workers.

    Raises TimeoutError if the next one does not come in time: Ray Data waits for ever if the cluster has no CPU left.
    """
    yield from _in_time(lambda: _read(reader, steps, rows, readers), timeout_s)


def _read(reader: Reader, steps: range, rows: int, readers: int) -> Iterator[dict[str, np.ndarray]]:
    import ray.data

    with data_settings(in_order=True, block_bytes=_BLOCK_BYTES):
        data = dataset(pa.table({"step": list(steps)})).map_batches(
            ReadSteps,
            fn_constructor_args=(reader,),
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=readers, max_tasks_in_flight_per_actor=4),
            num_cpus=READER_CPUS,
            batch_size=1,
            batch_format="pyarrow",
        )
        yield from data.iter_batches(batch_size=rows, batch_format="numpy", prefetch_batches=4)


def _in_time(items: Callable[[], Iterable[_Item]], timeout_s: float) -> Iterator[_Item]:
    """The items, which a thread takes, at most one ahead. Raises what they raise, or TimeoutError."""
    ready: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=1)

    def take() -> None:
        try:
            with worker_errors():
                for item in items():
                    ready.put(("item", item))
            ready.put(("end", None))
        except BaseException as error:
            ready.put(("error", error))

    threading.Thread(target=take, daemon=True, name="windows").start()
    while True:
        try:
            kind, value = ready.get(timeout=timeout_s)
        except queue.Empty:
            raise TimeoutError(
                f"no windows for {timeout_s:g} s: has the cluster CPUs left to read them? See `ray status`"
            ) from None
        if kind == "error":
            raise value
        if kind == "end":
            return
        yield value
