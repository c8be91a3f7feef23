"""The latent cache: training inputs, computed once per clip and jittered view.

Scenes are masked before they are encoded, so each jittered view has its own latents. Files are memory-mapped and a
window reads only its own frames, so memory use does not grow with the data set.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, get_args, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float
from safetensors.numpy import save
from torch import Tensor

from tccp.clips.clip_table import Clip, ClipTable
from tccp.clips.lip_table import LIPS
from tccp.clips.order import PlannedWindow, WindowId, window_ids
from tccp.clips.windows import VIEW_VERSIONS, view
from tccp.config import Settings
from tccp.errors import DamagedData
from tccp.files import Folder
from tccp.headbox import SURROUND_VERSION
from tccp.inference.conditioning import (
    CONDITION_FIELDS,
    LOSS_FIELDS,
    control_kinds,
    picture_of,
    training_conditions,
    zero_if_hidden,
)
from tccp.inference.encoding import Encoder
from tccp.models.autoencoder import PictureAutoencoder, to_model
from tccp.models.conditions import Conditions
from tccp.models.lip_sources import weights_hash
from tccp.models.variants import ONE_PER_WINDOW, VARIANTS, ConditionKind, ControlKind, PictureKind, Variant
from tccp.progress import progress
from tccp.training.lip_folds import LipSources, LipTable
from tccp.training.set_aside import say_set_aside
from tccp.training.window_files import SET_ASIDE, FileKind, LatentFiles, files_needed, latent_name


@dataclass(frozen=True)
class TrainingBatch:
    """Windows ready for the loss: normalised latents, control latents and conditions.

    known, inside: as in `tccp.clips.windows.ClipView`; None: all frames are known and inside their pictures.
    """

    latents: Float[Tensor, "b c f h w"]
    control: Float[Tensor, "b c2 f h w"]
    conditions: Conditions
    known: Bool[Tensor, "b f"] | None = None
    inside: Float[Tensor, "b f 4"] | None = None

    def only(self, kinds: Sequence[ConditionKind]) -> TrainingBatch:
        """This batch with only these kinds of conditions."""
        left = {name: None for name in get_args(ConditionKind) if name not in kinds}
        return replace(self, conditions=replace(self.conditions, **left))

    def first_frame(self) -> TrainingBatch:
        """The first frame of each window, as the first-frame variant takes it."""
        conditions = self.conditions
        first = {
            name: value[:, :1]
            for name in get_args(ConditionKind)
            if name not in ONE_PER_WINDOW and (value := getattr(conditions, name)) is not None
        }
        known, inside = (None if value is None else value[:, :1] for value in (self.known, self.inside))
        latents, control = self.latents[:, :, :1], self.control[:, :, :1]
        return TrainingBatch(latents, control, replace(conditions, **first), known, inside)

    def target_weight(self, generates: PictureKind) -> Float[Tensor, "b f h w"] | None:
        """The weight of each latent of the target in the loss, 0..1; None if all of them count fully.

        Frames whose landmarks are interpolated over a gap do not count: their landmarks were not seen, and a face with
        other landmarks teaches the wrong relation. Of a face, only the part inside the film's picture counts.
        """
        height, width = self.latents.shape[-2:]
        weight = torch.ones(self.latents.shape[0], self.latents.shape[2], height, width)
        if self.known is not None:
            weight = weight * self.known[..., None, None]
        if self.inside is not None and generates == "face":
            columns = _covered(self.inside[..., 0::2], width)[..., None, :]
            weight = weight * columns * _covered(self.inside[..., 1::2], height)[..., :, None]
        return None if bool((weight == 1).all()) else weight

    def __getitem__(self, rows: Sequence[int]) -> TrainingBatch:
        selected = {name: None if value is None else value[rows] for name, value in vars(self.conditions).items()}
        known, inside = (None if value is None else value[rows] for value in (self.known, self.inside))
        return TrainingBatch(self.latents[rows], self.control[rows], Conditions(**selected), known, inside)


def _covered(span: Float[Tensor, "b f 2"], cells: int) -> Float[Tensor, "b f cells"]:
    """The share of each of `cells` equal parts of 0..1 that lies between the two numbers."""
    edges = span.clamp(0, 1)[..., None] * cells
    first = torch.arange(cells)
    return (edges[..., 1, :].minimum(first + 1) - edges[..., 0, :].maximum(first)).clamp(0, 1)


@runtime_checkable
class Windows(Protocol):
    """A source of training windows that are known beforehand."""

    @property
    def lengths(self) -> Mapping[str, int]:
        """Number of frames of every clip, by clip_id."""

    def batch(
        self, planned: Sequence[PlannedWindow], row: Variant, num_frames: int, kinds: Sequence[ConditionKind] = ()
    ) -> TrainingBatch:
        """These windows with these kinds of conditions; by default with those that training the variant reads.

        Streaming sources give consecutive micro-batches only; they raise RuntimeError if asked for another one.
        """


@runtime_checkable
class Unplanned(Protocol):
    """A source of training windows that cannot be listed beforehand: windows cut directly from films."""

    def take(self, row: Variant) -> tuple[list[PlannedWindow], TrainingBatch]:
        """The windows of the rank's next micro-batch, and the batch itself."""


def encode_clip(
    clip: Clip, settings: Settings, jitter: int, seed: int, autoencoder: PictureAutoencoder, kinds: Iterable[FileKind]
) -> dict[FileKind, dict[str, np.ndarray]]:
    """Encodes one jittered view of a clip: latents `f c h w` in half precision, and the inputs: mel `f 80 16`, identity
    `s s 3`, LOSS_FIELDS.

    kinds: the files to compute.
    """
    fields = vars(view(clip, settings, jitter, seed))
    encoder = Encoder(autoencoder, settings)
    files: dict[FileKind, dict[str, np.ndarray]] = {}
    for kind in kinds:
        if kind == "inputs":
            names = [field for condition, field in CONDITION_FIELDS.items() if condition != "lips"]
            files[kind] = {name: np.ascontiguousarray(fields[name]) for name in (*names, *LOSS_FIELDS)}
            continue
        latents = encoder.encode(picture_of(kind, fields), kind).half().cpu().numpy()
        files[kind] = {"latents": np.ascontiguousarray(latents)}  # C order: safetensors writes the memory unchanged
    return files


def _tensor(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values if values.flags.writeable else values.copy())  # Ray's arrays are read-only


def to_batch(columns: Mapping[str, np.ndarray]) -> TrainingBatch:
    """Converts columns of `LatentFiles.columns` to tensors."""
    conditions = {name: _tensor(columns[name]) for name in get_args(ConditionKind) if name in columns}
    conditions = {name: to_model(value) if value.dtype == torch.uint8 else value for name, value in conditions.items()}
    latents, control = (_tensor(columns[name]).float().transpose(1, 2).contiguous() for name in ("latents", "control"))
    known, inside = (_tensor(columns[name]) for name in LOSS_FIELDS)
    return TrainingBatch(latents, control, Conditions(**conditions), known, inside)


def encode_columns(
    columns: Mapping[str, np.ndarray], autoencoder: PictureAutoencoder, row: Variant, settings: Settings
) -> dict[str, np.ndarray]:
    """Encodes columns of `PictureFiles` to those of `LatentFiles`, rounded to half precision like the latter."""
    encoder = Encoder(autoencoder, settings)

    def encoded(name: str, kind: PictureKind | ControlKind) -> np.ndarray:
        pictures = columns[name]
        latents = encoder.encode(np.concatenate(pictures), kind).half().cpu()
        return latents.unflatten(0, pictures.shape[:2]).numpy()

    control = [zero_if_hidden(kind, encoded(kind, kind), settings) for kind in control_kinds(row, settings)]
    others = {name: values for name, values in columns.items() if name not in control_kinds(row, settings)}
    return {**others, "latents": encoded("latents", row.generates), "control": np.concatenate(control, axis=2)}


class LatentCache:
    """Latents in `<root>/latents/<hash>/` and lips in `<root>/lips/`; the hash covers everything they depend on.

    That is, weights, settings, and the versions of the code that draws, masks, and computes mels.
    """

    def __init__(
        self,
        root: Folder | Path,
        table: ClipTable,
        settings: Settings,
        autoencoder: PictureAutoencoder,
        lips: LipSources | None,
        names: Iterable[str] = tuple(VARIANTS),
    ):
        """names: the variants to cache for. Files that none of them reads are not computed."""
        root = root if isinstance(root, Folder) else Folder(root)
        self.table = table
        self.settings = settings
        self.autoencoder = autoencoder
        beside = Folder(table.folder.path(LIPS))
        self.lips = LipTable(root.path(LIPS), lips, also=[beside]) if lips else None
        self.kinds = files_needed(names, settings)
        versions = {**VIEW_VERSIONS, "surround": SURROUND_VERSION}
        key = (
            f"{weights_hash(autoencoder)} {settings.headbox.model_dump_json()} {settings.picture_px} {settings.seed} "
            f"{json.dumps(versions)}"
        )
        self.windows_set_aside = 0
        self._ids: dict[int, list[WindowId]] = {}
        self.folder = Folder(root.path(f"latents/{hashlib.blake2b(key.encode(), digest_size=8).hexdigest()}"))

    @property
    def lengths(self) -> Mapping[str, int]:
        return self.table.num_frames

    @property
    def files(self) -> LatentFiles:
        """A reader of this cache for other processes and machines."""
        return LatentFiles(self.settings, self.folder, self.lips.pictures if self.lips else None)

    def batch(
        self, planned: Sequence[PlannedWindow], row: Variant, num_frames: int, kinds: Sequence[ConditionKind] = ()
    ) -> TrainingBatch:
        kinds = kinds or training_conditions(row, self.settings)
        columns = self.files.columns(planned, row, num_frames, kinds, lambda: self._windows(num_frames))
        self.windows_set_aside += int(columns[SET_ASIDE].sum())
        return to_batch(columns)

    def _windows(self, num_frames: int) -> list[WindowId]:
        if num_frames not in self._ids:
            self._ids[num_frames] = sorted(window_ids(self.lengths, self.lengths.values(), num_frames, stride=1))
        return self._ids[num_frames]

    def build(self, part: int = 0, parts: int = 1) -> None:
        """Computes the missing files of clips `part`, `part + parts`, ... Can be repeated after an interruption.

        A damaged clip is set aside: it gets no files.
        """
        ids = self.table.ids[part::parts]
        missing = [(c, d) for c in ids for d in range(self.settings.headbox.draws) if self._missing(c, d)]
        with progress() as bar:
            task = bar.add_task("encoding clips to latents", total=len(missing))
            for clip_id, jitter in missing:
                try:
                    self._encode(clip_id, jitter)
                except DamagedData as error:
                    say_set_aside(f"clip {clip_id}", error)
                bar.advance(task)
            if self.lips:
                task = bar.add_task("drawing lip references", total=len(ids))
                self.lips.write(self.table, lambda done, total: bar.update(task, completed=done), ids)

    def build_clip(self, clip_id: str, lips_alone: bool = False) -> None:
        """Computes the missing files of one clip. Raises DamagedData."""
        for jitter in () if lips_alone else range(self.settings.headbox.draws):
            self._encode(clip_id, jitter)
        if self.lips and clip_id not in self.lips:
            self.lips.render(self.table[clip_id])

    def missing_clips(self, lips_alone: bool = False) -> list[str]:
        """Clips with missing files, found with one listing of each folder."""
        there = set() if lips_alone else self.folder.names()
        drawn = self.lips.pictures.names() if self.lips else set()
        jitters = () if lips_alone else range(self.settings.headbox.draws)
        return [
            clip_id
            for clip_id in self.table.ids
            if any(latent_name(clip_id, jitter, kind) not in there for jitter in jitters for kind in self.kinds)
            or (self.lips is not None and f"{clip_id}.npy" not in drawn)
        ]

    def _encode(self, clip_id: str, jitter: int) -> None:
        kinds = self._missing(clip_id, jitter)  # another training may have computed them meanwhile
        clip, seed = self.table[clip_id], self.settings.seed
        files = encode_clip(clip, self.settings, jitter, seed, self.autoencoder, kinds) if kinds else {}
        for kind, arrays in files.items():
            self.folder.write(latent_name(clip_id, jitter, kind), save(arrays))

    def _missing(self, clip_id: str, jitter: int) -> list[FileKind]:
        return [kind for kind in self.kinds if not self.folder.exists(latent_name(clip_id, jitter, kind))]
