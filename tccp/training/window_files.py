"""What training reads, as arrays: which windows and pictures a step takes, and how they are read from disk.

Nothing here needs torch: Ray Data's workers import this module, and start in a second.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from jaxtyping import Int64, UInt8
from safetensors import SafetensorError, safe_open

from tccp import headbox
from tccp.clips.clip_table import ClipTable
from tccp.clips.lip_table import LipFiles
from tccp.clips.order import PlannedWindow, TrainingOrder, window_ids
from tccp.clips.windows import mirrored, view
from tccp.config import Settings, TrainingSettings, VariantName
from tccp.errors import DamagedData
from tccp.files import Folder, retried
from tccp.models.variants import FIRST_OF, VARIANTS, ConditionKind, PictureKind, Variant
from tccp.seeds import rng_seed

FRAMES_PER_CLIP = 4
"""Frames a step takes of each clip it reads: fewer clips are decoded for the same number of pictures."""

PICTURES: dict[PictureKind, str] = {"face": "face", "landmark": "landmark_pictures", "scene": "masked_scene"}
"""Kind of latents -> the field of ClipView they are encoded from."""

FileKind = Literal["inputs", "face", "landmark", "scene", "surround"]
"""What a clip and draw have a file each of: `inputs` (mel and identity) and latents."""


def files_needed(names: Iterable[str], settings: Settings) -> tuple[FileKind, ...]:
    """What training these variants reads."""
    kinds: list[FileKind] = ["inputs"]
    for row in (VARIANTS[name] for name in VARIANTS if name in names):
        kinds += [row.generates, row.control]
        kinds += ["surround"] if shows_surround(row, settings) else []
    return tuple(dict.fromkeys(kinds))


def shows_surround(row: Variant, settings: Settings) -> bool:
    return settings.surround and row.generates == "face"


def latent_name(clip_id: str, draw: int, kind: FileKind) -> str:
    return f"{clip_id}-{draw}.{kind}.safetensors"


def conditions_of(row: Variant, settings: Settings) -> tuple[ConditionKind, ...]:
    """The conditions that training this variant reads: its own, and those of the network that makes initial frames."""
    rows = [row]
    if row.continues and settings.for_variant(row.name).training.initial_frames != "truth":
        rows.append(VARIANTS[FIRST_OF[row.name]])
    kinds = itertools.chain.from_iterable(one.conditions_with(settings.lips.source) for one in rows)
    return tuple(dict.fromkeys(kinds))


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
        """The windows, stacked: latents, control, surround float16 `n f c h w`, and conditions as they are at rest.

        Which jitter draw a window takes is drawn from (seed, id, epoch).
        """
        read: dict[str, FileKind] = {"latents": row.generates, "control": row.control}
        if shows_surround(row, self.settings):
            read["surround"] = "surround"
        columns: dict[str, list[np.ndarray]] = {name: [] for name in (*read, *kinds)}
        for epoch, (clip_id, start) in planned:
            draw = rng_seed(self.settings.seed, "draw", clip_id, start, epoch) % self.settings.headbox.draws
            frames = slice(start, start + num_frames)
            for name, kind in read.items():
                with self._opened(clip_id, draw, kind) as file:
                    columns[name].append(file.get_slice("latents")[frames])
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
        if self.settings.context == "none":
            for name in ("control", "surround") if row.control == "scene" else ("surround",):
                columns[name] = [np.zeros_like(latents) for latents in columns.get(name, [])]
        return {name: np.stack(values) for name, values in columns.items() if values}

    def _opened(self, clip_id: str, draw: int, kind: FileKind) -> Any:
        name = latent_name(clip_id, draw, kind)
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
        around = shows_surround(row, self.settings)
        names = ["latents", "control", *(["surround"] if around else [])]
        columns: dict[str, list[np.ndarray]] = {name: [] for name in (*names, *kinds)}
        for epoch, (clip_id, start) in planned:
            seed = self.settings.seed
            draw = rng_seed(seed, "draw", clip_id, start, epoch) % self.settings.headbox.draws
            seen = view(self.clips[clip_id], self.settings, draw, seed, start, num_frames)
            columns["latents"].append(getattr(seen, PICTURES[row.generates]))
            columns["control"].append(getattr(seen, PICTURES[row.control]))
            if around:
                columns["surround"].append(headbox.surround(seen.masked_scene, seen.mask_box))
            if "audio" in kinds:
                columns["audio"].append(seen.mel)
            if "identity" in kinds:
                columns["identity"].append(seen.identity)
            if "lips" in kinds:
                assert self.lips is not None
                lips = self.lips.read(clip_id, start, num_frames)
                columns["lips"].append(lips[..., ::-1, :] if mirrored(self.settings, draw) else lips)
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
        kinds = ["face", "landmark_pictures", "face", "masked_scene"]
        pictures: list[np.ndarray] = []
        number = 0
        while number < count:
            clip_id = table.ids[int(rng.integers(len(table)))]
            draw = int(rng.integers(settings.headbox.draws))
            for frame in rng.integers(table.num_frames[clip_id], size=FRAMES_PER_CLIP):
                if number in mine:
                    seen = view(table[clip_id], settings, draw, settings.seed, int(frame), 1)
                    pictures.append(getattr(seen, kinds[number % 4])[0])
                number += 1
        return PictureBatch(np.stack(pictures), np.array(mine, np.int64) + step * count)
