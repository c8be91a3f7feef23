"""What a rank receives from its stream: micro-batches as the losses take them, each compared with the plan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tccp.clips.order import PlannedWindow, WindowId
from tccp.cluster import worker_errors
from tccp.config import Settings
from tccp.models.autoencoder import PictureAutoencoder
from tccp.models.variants import ConditionKind, Variant
from tccp.training.latent_cache import TrainingBatch, encode_columns, to_batch
from tccp.training.launcher.ingest import window_ids
from tccp.training.set_aside import say_set_aside
from tccp.training.window_files import SET_ASIDE, PictureBatch


def _check(columns: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    for name, values in expected.items():
        given = columns[name]
        if not np.array_equal(given, values):
            first = int(np.argmin(given == values)) if given.shape == values.shape else 0
            raise RuntimeError(
                f"Ray Data gave {len(given)} windows, the plan has {len(values)}; from window {first} on, their {name} "
                f"is {given.tolist()[first : first + 4]} where the plan has {values.tolist()[first : first + 4]}"
            )


class StreamedWindows:
    """`Windows` from a rank's stream."""

    def __init__(
        self,
        stream: Iterator[dict[str, np.ndarray]],
        lengths: Mapping[str, int],
        settings: Settings,
        encoder: PictureAutoencoder | None = None,
    ):
        """encoder: encodes pictures, if the stream has pictures in place of latents."""
        self.stream, self._lengths, self.settings, self.encoder = stream, lengths, settings, encoder
        self.windows_set_aside = 0

    @property
    def lengths(self) -> Mapping[str, int]:
        return self._lengths

    def batch(
        self, planned: Sequence[PlannedWindow], row: Variant, num_frames: int, kinds: Sequence[ConditionKind] = ()
    ) -> TrainingBatch:
        columns = next(self.stream)
        _check(columns, window_ids(planned))
        for window, damaged in zip(planned, columns[SET_ASIDE], strict=True):
            if damaged:
                self.windows_set_aside += 1
                say_set_aside(f"clip {window.id.clip_id}", "its data are damaged or missing; others take their place")
        if self.encoder is not None:
            columns = encode_columns(columns, self.encoder, row, self.settings)
        return to_batch(columns)


class StreamedPictures:
    """`Pictures` from a rank's stream."""

    def __init__(self, stream: Iterator[dict[str, np.ndarray]], batch_size: int):
        self.stream, self.batch_size = stream, batch_size

    def batch(self, step: int, rank: int, num_ranks: int) -> PictureBatch:
        columns = next(self.stream)
        share = self.batch_size // num_ranks
        first = step * self.batch_size + rank * share
        _check(columns, {"numbers": np.arange(first, first + share, dtype=np.int64)})
        return PictureBatch(np.array(columns["pictures"]), columns["numbers"])


class FilmStream:
    """`Unplanned` from a `FilmOrder`. The next micro-batch is fetched while the rank trains on the current one."""

    def __init__(self, order: Any, rank: int, settings: Settings, encoder: PictureAutoencoder, timeout_s: float):
        self.order, self.rank, self.settings, self.encoder, self.timeout_s = order, rank, settings, encoder, timeout_s
        self.next = order.take.remote(rank)

    def take(self, row: Variant) -> tuple[list[PlannedWindow], TrainingBatch]:
        import ray

        with worker_errors():
            columns = ray.get(self.next, timeout=self.timeout_s)
        self.next = self.order.take.remote(self.rank)
        # The hash of its clip identifies a window: the clip's id is not part of the columns.
        planned = [
            PlannedWindow(int(epoch), WindowId(str(clip), int(start)))
            for epoch, clip, start in zip(columns["epoch"], columns["clip"], columns["start"], strict=True)
        ]
        return planned, to_batch(encode_columns(columns, self.encoder, row, self.settings))
