"""What training reads, as arrays: which windows and pictures a step takes, and how they are read from disk.

Nothing here needs torch: Ray Data's workers import this module, and start in a second.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from jaxtyping import Float16, Int64, UInt8
from safetensors import safe_open

from tccp.clips.clip_table import ClipTable
from tccp.clips.lip_table import LipFiles
from tccp.clips.order import PlannedWindow, TrainingOrder, window_ids
from tccp.clips.windows import mirrored, view
from tccp.config import Settings, TrainingSettings, VariantName
from tccp.files import Folder, fetched
from tccp.inference.conditioning import as_shown, control_kinds, picture_of, training_pictures
from tccp.models.variants import VARIANTS, ConditionKind, PictureKind, Variant
from tccp.seeds import rng_seed

FRAMES_PER_CLIP = 4
"""Frames a step takes of each clip it reads: fewer clips are decoded for the same number of pictures."""

FileKind = Literal["inputs", "face", "landmark", "scene", "surround"]
"""What a clip and draw have a file each of: `inputs` (mel and identity) and latents."""


def files_needed(names: Iterable[str], settings: Settings) -> tuple[FileKind, ...]:
    """What training these variants reads."""
    kinds: list[FileKind] = ["inputs"]
    for row in (VARIANTS[name] for name in VARIANTS if name in names):
        kinds += [row.generates, *control_kinds(row, settings)]
    return tuple(dict.fromkeys(kinds))


def latent_name(clip_id: str, draw: int, kind: FileKind) -> str:
    return f"{clip_id}-{draw}.{kind}.safetensors"


def training_order(lengths: Mapping[str, int], variant: VariantName, settings: Settings) -> TrainingOrder:
    """Which windows of clips of these lengths the steps of a variant's training take."""
    ids = window_ids(lengths, lengths.values(), VARIANTS[variant].num_frames(settings.window), stride=1)
    return TrainingOrder(ids, settings.seed)


def micro_batch(
    order: TrainingOrder, training: TrainingSettings, step: int, micro: int, rank: int = 0, num_ranks: int = 1
) -> list[PlannedWindow]:
    """The windows of one rank's micro-batch: of its fixed part of the step's, a fixed part."""
    size = training.batch_size // (training.accumulation * num_ranks)
    return order.step(step, training.batch_size, rank, num_ranks)[micro * size : (micro + 1) * size]


@dataclass(frozen=True)
class LatentFiles:
    """Reads windows from files of latents and lips: small, and made to travel to where the reading is done.

    A local file is memory-mapped; one at a URL is fetched to this machine first, and kept.
    """

    settings: Settings
    folder: Folder
    lips: LipFiles | None

    def columns(
        self, planned: Sequence[PlannedWindow], row: Variant, num_frames: int, kinds: Sequence[ConditionKind]
    ) -> dict[str, np.ndarray]:
        """The windows, stacked: latents float16 `n f c h w`, control float16 `n f c2 h w`, and conditions as at rest.

        Which jitter draw a window takes is drawn from (seed, id, epoch).
        """
        columns: dict[str, list[np.ndarray]] = {name: [] for name in ("latents", "control", *kinds)}
        for epoch, (clip_id, start) in planned:
            draw = rng_seed(self.settings.seed, "draw", clip_id, start, epoch) % self.settings.headbox.draws
            frames = slice(start, start + num_frames)
            columns["latents"].append(self._latents(clip_id, draw, row.generates, frames))
            control = [
                as_shown(kind, self._latents(clip_id, draw, kind, frames), self.settings)
                for kind in control_kinds(row, self.settings)
            ]
            columns["control"].append(np.concatenate(control, axis=1))
            if "audio" in kinds or "identity" in kinds:
                with self._opened(clip_id, draw, "inputs") as file:
                    if "audio" in kinds:
                        columns["audio"].append(file.get_slice("mel")[frames])
                    if "identity" in kinds:
                        columns["identity"].append(file.get_tensor("identity"))
            if "lips" in kinds:
                assert self.lips is not None
                lips = self.lips.read(clip_id, start, num_frames)
                columns["lips"].append(lips[..., ::-1, :] if mirrored(self.settings, draw) else lips)
        return {name: np.stack(values) for name, values in columns.items()}

    def _latents(self, clip_id: str, draw: int, kind: FileKind, frames: slice) -> Float16[np.ndarray, "f c h w"]:
        with self._opened(clip_id, draw, kind) as file:
            return np.asarray(file.get_slice("latents")[frames])

    def _opened(self, clip_id: str, draw: int, kind: FileKind) -> Any:
        name = latent_name(clip_id, draw, kind)
        return safe_open(fetched(self.folder, name), framework="numpy")


@dataclass(frozen=True)
class PictureFiles:
    """Reads the same windows as pictures, straight from the clip table: for encoding in the training step."""

    settings: Settings
    table: str
    lips: LipFiles | None

    @cached_property
    def clips(self) -> ClipTable:
        return ClipTable(self.table, keep=64)

    def columns(
        self, planned: Sequence[PlannedWindow], row: Variant, num_frames: int, kinds: Sequence[ConditionKind]
    ) -> dict[str, np.ndarray]:
        """As `LatentFiles.columns`, with pictures uint8 `n f s s 3` in place of latents: see `encode_columns`."""
        columns: dict[str, list[np.ndarray]] = {}
        for epoch, (clip_id, start) in planned:
            seed = self.settings.seed
            draw = rng_seed(seed, "draw", clip_id, start, epoch) % self.settings.headbox.draws
            seen = view(self.clips[clip_id], self.settings, draw, seed, start, num_frames)
            parts = training_pictures(row, self.settings, vars(seen))
            if "audio" in kinds:
                parts["audio"] = seen.mel
            if "identity" in kinds:
                parts["identity"] = seen.identity
            if "lips" in kinds:
                assert self.lips is not None
                lips = self.lips.read(clip_id, start, num_frames)
                parts["lips"] = lips[..., ::-1, :] if mirrored(self.settings, draw) else lips
            for name, values in parts.items():
                columns.setdefault(name, []).append(values)
        return {name: np.stack(values) for name, values in columns.items()}


@dataclass(frozen=True)
class PictureBatch:
    """Pictures of one rank's micro-batch, uint8 at rest, and each one's number among those of all steps."""

    pictures: UInt8[np.ndarray, "n s s 3"]
    numbers: Int64[np.ndarray, " n"]


class TablePictures:
    """Pictures of a clip table."""

    def __init__(self, table: ClipTable, settings: Settings):
        self.table, self.settings = table, settings

    def batch(self, step: int, rank: int = 0, num_ranks: int = 1) -> PictureBatch:
        """Half faces, a quarter landmark images, a quarter scenes; the step's are a pure function of (seed, k)."""
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
            draw = int(rng.integers(settings.headbox.draws))
            for frame in rng.integers(table.num_frames[clip_id], size=FRAMES_PER_CLIP):
                if number in mine:
                    seen = view(table[clip_id], settings, draw, settings.seed, int(frame), 1)
                    pictures.append(picture_of(kinds[number % 4], vars(seen))[0])
                number += 1
        return PictureBatch(np.stack(pictures), np.array(mine, np.int64) + step * count)
