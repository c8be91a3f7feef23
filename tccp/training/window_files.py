"""Reads the training data of a step from disk, as arrays: selects its windows and pictures and loads their files.

This module does not import torch: Ray Data workers import it and start in about a second.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from jaxtyping import Float16, Int64, UInt8
from safetensors import SafetensorError, safe_open

from tccp.clips.clip_table import ClipTable
from tccp.clips.lip_table import LipFiles
from tccp.clips.order import PlannedWindow, TrainingOrder, WindowId, window_ids
from tccp.clips.windows import mirrored, view
from tccp.config import Settings, TrainingSettings, VariantName
from tccp.errors import DamagedData
from tccp.files import Folder, retried
from tccp.inference.conditioning import (
    CONDITION_FIELDS,
    LOSS_FIELDS,
    control_kinds,
    picture_of,
    training_pictures,
    zero_if_hidden,
)
from tccp.models.variants import ONE_PER_WINDOW, VARIANTS, ConditionKind, PictureKind, Variant
from tccp.seeds import rng_seed
from tccp.training.set_aside import read_or_other

SET_ASIDE = "set_aside"
"""Column of bool `n`: windows that are damaged, in whose place the columns hold others."""
FRAMES_PER_CLIP = 4
"""Frames that a step takes from each clip, so that it decodes fewer clips for the same number of pictures."""

FileKind = Literal["inputs", "face", "landmark", "scene", "surround"]
"""The latent cache has one file per clip, jittered view and kind: `inputs` (conditions, LOSS_FIELDS), and latents."""


def files_needed(names: Iterable[str], settings: Settings) -> tuple[FileKind, ...]:
    """The kinds of files that training these variants reads."""
    kinds: list[FileKind] = ["inputs"]
    for row in (VARIANTS[name] for name in VARIANTS if name in names):
        kinds += [row.generates, *control_kinds(row, settings)]
    return tuple(dict.fromkeys(kinds))


def latent_name(clip_id: str, jitter: int, kind: FileKind) -> str:
    return f"{clip_id}-{jitter}.{kind}.safetensors"


def training_order(lengths: Mapping[str, int], variant: VariantName, settings: Settings) -> TrainingOrder:
    """The order in which training a variant takes the windows of clips of these lengths (frames, by clip_id)."""
    ids = window_ids(lengths, lengths.values(), VARIANTS[variant].num_frames(settings.window), stride=1)
    return TrainingOrder(ids, settings.seed)


def micro_batch(
    order: TrainingOrder, training: TrainingSettings, step: int, micro: int, rank: int = 0, num_ranks: int = 1
) -> list[PlannedWindow]:
    """The windows of one rank's micro-batch: micro-batch `micro` of the rank's share of the step's windows."""
    size = training.batch_size // (training.accumulation * num_ranks)
    return order.step(step, training.batch_size, rank, num_ranks)[micro * size : (micro + 1) * size]


class _WindowFiles(ABC):
    """Reads windows one by one and stacks them."""

    settings: Settings
    lips: LipFiles | None

    @abstractmethod
    def window(
        self, planned: PlannedWindow, row: Variant, num_frames: int, kinds: Sequence[ConditionKind]
    ) -> dict[str, np.ndarray]:
        """The arrays of one window. Raises DamagedData."""

    def columns(
        self,
        planned: Sequence[PlannedWindow],
        row: Variant,
        num_frames: int,
        kinds: Sequence[ConditionKind],
        others: Callable[[], Sequence[WindowId]] | None = None,
    ) -> dict[str, np.ndarray]:
        """The windows of `window`, stacked.

        others: all windows of the data, sorted. One of them, of the same epoch, takes the place of a damaged window,
        and the column SET_ASIDE says so; without it, DamagedData is raised.
        """
        columns: dict[str, list[Any]] = {} if others is None else {SET_ASIDE: []}
        for window in planned:
            epoch, (clip_id, start) = window

            def read(found: WindowId, epoch: int = epoch) -> dict[str, np.ndarray]:
                return self.window(PlannedWindow(epoch, found), row, num_frames, kinds)

            if others is None:
                parts = read(window.id)
            else:
                seed = rng_seed(self.settings.seed, clip_id, start, epoch)
                parts, damaged = read_or_other(clip_id, window.id, read, others, seed)
                columns[SET_ASIDE].append(damaged)
            for name, values in parts.items():
                columns.setdefault(name, []).append(values)
        return {name: np.stack(values) for name, values in columns.items()}

    def _jitter(self, planned: PlannedWindow) -> int:
        """The jittered view of a window: a random function of (seed, window id, epoch)."""
        epoch, (clip_id, start) = planned
        return rng_seed(self.settings.seed, "draw", clip_id, start, epoch) % self.settings.headbox.draws

    def _lips(self, planned: PlannedWindow, num_frames: int) -> UInt8[np.ndarray, "f s s 3"]:
        assert self.lips is not None
        lips = self.lips.read(*planned.id, num_frames)
        return lips[..., ::-1, :] if mirrored(self.settings, self._jitter(planned)) else lips


@dataclass(frozen=True)
class LatentFiles(_WindowFiles):
    """Reads windows from files of latents and lips. Small to pickle, so it can be sent to the processes that read.

    Local files are memory-mapped. A file at a URL is first downloaded to this machine, and kept.
    """

    settings: Settings
    folder: Folder
    lips: LipFiles | None

    def window(
        self, planned: PlannedWindow, row: Variant, num_frames: int, kinds: Sequence[ConditionKind]
    ) -> dict[str, np.ndarray]:
        """A window: latents float16 `f c h w`, control float16 `f c2 h w`, conditions and LOSS_FIELDS as stored.

        Raises DamagedData if a file is damaged or missing, as it is for clips that could not be encoded.
        """
        clip_id, start = planned.id
        jitter = self._jitter(planned)
        frames = slice(start, start + num_frames)
        control = [
            zero_if_hidden(kind, self._latents(clip_id, jitter, kind, frames), self.settings)
            for kind in control_kinds(row, self.settings)
        ]
        parts = {
            "latents": self._latents(clip_id, jitter, row.generates, frames),
            "control": np.concatenate(control, axis=1),
        }
        with self._open(clip_id, jitter, "inputs") as file:
            parts |= {name: np.asarray(file.get_slice(name)[frames]) for name in LOSS_FIELDS}
            for kind in (kind for kind in kinds if kind != "lips"):
                values = file.get_slice(CONDITION_FIELDS[kind])
                parts[kind] = values[:] if kind in ONE_PER_WINDOW else values[frames]
        if "lips" in kinds:
            parts["lips"] = self._lips(planned, num_frames)
        return parts

    def _latents(self, clip_id: str, jitter: int, kind: FileKind, frames: slice) -> Float16[np.ndarray, "f c h w"]:
        with self._open(clip_id, jitter, kind) as file:
            return np.asarray(file.get_slice("latents")[frames])

    def _open(self, clip_id: str, jitter: int, kind: FileKind) -> Any:
        name = latent_name(clip_id, jitter, kind)
        try:
            return retried(f"read {self.folder.path(name)}", lambda: self._mapped(name))
        except FileNotFoundError:
            raise DamagedData(f"{self.folder.path(name)} is missing; encode the clip again") from None

    def _mapped(self, name: str) -> Any:
        with self.folder.local_file(name) as path:
            try:
                return safe_open(path, framework="numpy")
            except SafetensorError as error:
                raise DamagedData(
                    f"{self.folder.path(name)} is damaged ({error}); remove it and encode again"
                ) from None


@dataclass(frozen=True)
class PictureFiles(_WindowFiles):
    """Reads the same windows as pictures from the clip table; the training step encodes them."""

    settings: Settings
    table: str
    lips: LipFiles | None

    @cached_property
    def clips(self) -> ClipTable:
        return ClipTable(self.table, keep=64)

    def window(
        self, planned: PlannedWindow, row: Variant, num_frames: int, kinds: Sequence[ConditionKind]
    ) -> dict[str, np.ndarray]:
        """As `LatentFiles.window`, with pictures uint8 `f s s 3` by kind in place of latents and control.

        `tccp.training.latent_cache.encode_columns` encodes them.
        """
        clip_id, start = planned.id
        jitter = self._jitter(planned)
        cut = view(self.clips[clip_id], self.settings, jitter, self.settings.seed, start, num_frames)
        parts = training_pictures(row, self.settings, vars(cut))
        parts |= {name: getattr(cut, name) for name in LOSS_FIELDS}
        for kind in (kind for kind in kinds if kind != "lips"):
            parts[kind] = getattr(cut, CONDITION_FIELDS[kind])
        if "lips" in kinds:
            parts["lips"] = self._lips(planned, num_frames)
        return parts


@dataclass(frozen=True)
class PictureBatch:
    """Pictures of one rank's micro-batch, and the number of each among the pictures of all steps."""

    pictures: UInt8[np.ndarray, "n s s 3"]
    numbers: Int64[np.ndarray, " n"]


class TablePictures:
    """Samples pictures from a clip table to train the auto-encoder."""

    def __init__(self, table: ClipTable, settings: Settings):
        self.table, self.settings = table, settings

    def batch(self, step: int, rank: int = 0, num_ranks: int = 1) -> PictureBatch:
        """The rank's share of the pictures of step k: half faces, a quarter landmark pictures, a quarter masked scenes.

        The pictures of a step depend on (seed, k) only. A clip that is damaged is set aside for another one.
        """
        settings, table = self.settings, self.table
        rng = np.random.default_rng(rng_seed(settings.seed, "autoencoder", step))
        count = settings.autoencoder.batch_size
        share = count // num_ranks
        mine = range(rank * share, (rank + 1) * share)
        kinds: list[PictureKind] = ["face", "landmark", "face", "scene"]
        pictures: list[np.ndarray] = []
        number = 0
        while number < count:
            clip_id = table.ids[int(rng.integers(len(table)))]
            jitter = int(rng.integers(settings.headbox.draws))
            for frame in rng.integers(table.num_frames[clip_id], size=FRAMES_PER_CLIP):
                if number in mine:
                    pictures.append(self._picture(clip_id, jitter, int(frame), kinds[number % 4]))
                number += 1
        return PictureBatch(np.stack(pictures), np.array(mine, np.int64) + step * count)

    def _picture(self, clip_id: str, jitter: int, frame: int, kind: PictureKind) -> UInt8[np.ndarray, "s s 3"]:
        def read(clip_id: str) -> UInt8[np.ndarray, "s s 3"]:
            number = frame % self.table.num_frames[clip_id]
            still = view(self.table[clip_id], self.settings, jitter, self.settings.seed, number, 1)
            return picture_of(kind, vars(still))[0]

        seed = rng_seed(self.settings.seed, clip_id, frame)
        return read_or_other(clip_id, clip_id, read, lambda: self.table.ids, seed)[0]
