"""Reads the training data of a step from disk, as arrays: selects its windows and pictures and loads their files.

This module does not import torch: Ray Data workers import it and start in about a second.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from jaxtyping import Float16, Int64, UInt8
from safetensors import SafetensorError, safe_open

from tccp.clips.clip_table import ClipTable
from tccp.clips.lip_table import LipFiles
from tccp.clips.order import PlannedWindow, TrainingOrder, window_ids
from tccp.clips.windows import mirrored, view
from tccp.config import Settings, TrainingSettings, VariantName
from tccp.errors import DamagedData
from tccp.files import Folder, retried
from tccp.inference.conditioning import CONDITION_FIELDS, control_kinds, picture_of, training_pictures, zero_if_hidden
from tccp.models.variants import ONE_PER_WINDOW, VARIANTS, ConditionKind, PictureKind, Variant
from tccp.seeds import rng_seed

FRAMES_PER_CLIP = 4
"""Frames that a step takes from each clip, so that it decodes fewer clips for the same number of pictures."""

FileKind = Literal["inputs", "face", "landmark", "scene", "surround"]
"""The latent cache has one file per clip, jittered view and kind: `inputs` (mel and identity), and latents."""


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


@dataclass(frozen=True)
class LatentFiles:
    """Reads windows from files of latents and lips. Small to pickle, so it can be sent to the processes that read.

    Local files are memory-mapped. A file at a URL is first downloaded to this machine, and kept.
    """

    settings: Settings
    folder: Folder
    lips: LipFiles | None

    def columns(
        self, planned: Sequence[PlannedWindow], row: Variant, num_frames: int, kinds: Sequence[ConditionKind]
    ) -> dict[str, np.ndarray]:
        """The windows, stacked: latents float16 `n f c h w`, control float16 `n f c2 h w`, and conditions as stored.

        The jittered view of a window is a random function of (seed, window id, epoch).
        """
        columns: dict[str, list[np.ndarray]] = {name: [] for name in ("latents", "control", *kinds)}
        for epoch, (clip_id, start) in planned:
            jitter = rng_seed(self.settings.seed, "draw", clip_id, start, epoch) % self.settings.headbox.draws
            frames = slice(start, start + num_frames)
            columns["latents"].append(self._latents(clip_id, jitter, row.generates, frames))
            control = [
                zero_if_hidden(kind, self._latents(clip_id, jitter, kind, frames), self.settings)
                for kind in control_kinds(row, self.settings)
            ]
            columns["control"].append(np.concatenate(control, axis=1))
            with self._open(clip_id, jitter, "inputs") as file:
                for kind in (kind for kind in kinds if kind != "lips"):
                    values = file.get_slice(CONDITION_FIELDS[kind])
                    columns[kind].append(values[:] if kind in ONE_PER_WINDOW else values[frames])
            if "lips" in kinds:
                assert self.lips is not None
                lips = self.lips.read(clip_id, start, num_frames)
                columns["lips"].append(lips[..., ::-1, :] if mirrored(self.settings, jitter) else lips)
        return {name: np.stack(values) for name, values in columns.items()}

    def _latents(self, clip_id: str, jitter: int, kind: FileKind, frames: slice) -> Float16[np.ndarray, "f c h w"]:
        with self._open(clip_id, jitter, kind) as file:
            return np.asarray(file.get_slice("latents")[frames])

    def _open(self, clip_id: str, jitter: int, kind: FileKind) -> Any:
        name = latent_name(clip_id, jitter, kind)
        return retried(f"read {self.folder.path(name)}", lambda: self._mapped(name))

    def _mapped(self, name: str) -> Any:
        with self.folder.local_file(name) as path:
            try:
                return safe_open(path, framework="numpy")
            except SafetensorError as error:
                raise DamagedData(
                    f"{self.folder.path(name)} is damaged ({error}); remove it and encode again"
                ) from None


@dataclass(frozen=True)
class PictureFiles:
    """Reads the same windows as pictures from the clip table; the training step encodes them."""

    settings: Settings
    table: str
    lips: LipFiles | None

    @cached_property
    def clips(self) -> ClipTable:
        return ClipTable(self.table, keep=64)

    def columns(
        self, planned: Sequence[PlannedWindow], row: Variant, num_frames: int, kinds: Sequence[ConditionKind]
    ) -> dict[str, np.ndarray]:
        """As `LatentFiles.columns`, with pictures uint8 `n f s s 3` by kind in place of latents and control.

        `tccp.training.latent_cache.encode_columns` encodes them.
        """
        columns: dict[str, list[np.ndarray]] = {}
        for epoch, (clip_id, start) in planned:
            seed = self.settings.seed
            jitter = rng_seed(seed, "draw", clip_id, start, epoch) % self.settings.headbox.draws
            window = view(self.clips[clip_id], self.settings, jitter, seed, start, num_frames)
            parts = training_pictures(row, self.settings, vars(window))
            for kind in (kind for kind in kinds if kind != "lips"):
                parts[kind] = getattr(window, CONDITION_FIELDS[kind])
            if "lips" in kinds:
                assert self.lips is not None
                lips = self.lips.read(clip_id, start, num_frames)
                parts["lips"] = lips[..., ::-1, :] if mirrored(self.settings, jitter) else lips
            for name, values in parts.items():
                columns.setdefault(name, []).append(values)
        return {name: np.stack(values) for name, values in columns.items()}


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

        The pictures of a step depend on (seed, k) only.
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
                    still = view(table[clip_id], settings, jitter, settings.seed, int(frame), 1)
                    pictures.append(picture_of(kinds[number % 4], vars(still))[0])
                number += 1
        return PictureBatch(np.stack(pictures), np.array(mine, np.int64) + step * count)
