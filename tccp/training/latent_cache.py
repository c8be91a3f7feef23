"""The latent cache: what training reads, computed once per clip and jitter draw.

Scenes are masked before they are encoded, so each draw of the mask has latents of its own. A file is memory-mapped and
a window reads only its own frames: memory does not grow with the data set.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, get_args, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from safetensors.numpy import save
from torch import Tensor

from tccp import headbox
from tccp.clips.clip_table import Clip, ClipTable
from tccp.clips.lip_table import LIPS
from tccp.clips.order import PlannedWindow
from tccp.clips.windows import view
from tccp.config import Settings
from tccp.files import Folder
from tccp.models.autoencoder import PictureAutoencoder, to_model
from tccp.models.conditions import Conditions
from tccp.models.lip_sources import weights_hash
from tccp.models.variants import VARIANTS, ConditionKind, PictureKind, Variant
from tccp.progress import progress
from tccp.training.lip_folds import LipSources, LipTable
from tccp.training.window_files import PICTURES, FileKind, LatentFiles, conditions_of, files_needed, latent_name

ENCODE_BATCH = 64


@dataclass(frozen=True)
class TrainingBatch:
    """Windows ready for the loss: normalised latents `b c f h w` and condition inputs."""

    latents: Float[Tensor, "b c f h w"]
    control: Float[Tensor, "b c2 f h w"]
    conditions: Conditions

    def only(self, kinds: Sequence[ConditionKind]) -> TrainingBatch:
        """With these conditions alone."""
        left = {name: None for name in get_args(ConditionKind) if name not in kinds}
        return replace(self, conditions=replace(self.conditions, **left))

    def first_frame(self) -> TrainingBatch:
        """The windows' first frames: what the first-frame variant is shown of them."""
        told = self.conditions
        first = {name: value[:, :1] for name in ("audio", "lips") if (value := getattr(told, name)) is not None}
        return TrainingBatch(self.latents[:, :, :1], self.control[:, :, :1], replace(told, **first))

    def __getitem__(self, rows: Sequence[int]) -> TrainingBatch:
        told = {name: None if value is None else value[rows] for name, value in vars(self.conditions).items()}
        return TrainingBatch(self.latents[rows], self.control[rows], Conditions(**told))


@runtime_checkable
class Windows(Protocol):
    """Where a training's windows come from."""

    @property
    def lengths(self) -> Mapping[str, int]:
        """Frames of every clip, by clip_id."""

    def batch(
        self, planned: Sequence[PlannedWindow], row: Variant, num_frames: int, kinds: Sequence[ConditionKind] = ()
    ) -> TrainingBatch:
        """These windows, with these kinds of conditions (default: those that training the variant reads).

        Sources that stream hand out one micro-batch after the other, and raise RuntimeError if it is not this one.
        """


@runtime_checkable
class Unplanned(Protocol):
    """Where windows come from that cannot be listed beforehand: straight from film."""

    def take(self, row: Variant) -> tuple[list[PlannedWindow], TrainingBatch]:
        """The rank's next micro-batch, and which windows it holds."""


def encode_clip(
    clip: Clip, settings: Settings, draw: int, seed: int, autoencoder: PictureAutoencoder, kinds: Iterable[FileKind]
) -> dict[FileKind, dict[str, np.ndarray]]:
    """One clip under one draw: latents `f c h w` in half precision, mel `f 80 16`, identity `s s 3`.

    The colours of `headbox.surround` count as a scene's.
    """
    seen = view(clip, settings, draw, seed)
    device = autoencoder.mean.device
    files: dict[FileKind, dict[str, np.ndarray]] = {}
    with torch.inference_mode():
        for file in kinds:
            if file == "inputs":
                files[file] = {name: np.ascontiguousarray(getattr(seen, name)) for name in ("mel", "identity")}
                continue
            kind: PictureKind = "scene" if file == "surround" else file
            shown = (
                headbox.surround(seen.masked_scene, seen.mask_box)
                if file == "surround"
                else getattr(seen, PICTURES[kind])
            )
            parts = []
            for batch in torch.from_numpy(shown).split(ENCODE_BATCH):
                latents = autoencoder.encode(to_model(batch).to(device).unsqueeze(2), kind)
                parts.append(latents.squeeze(2).half().cpu().numpy())
            # In C order: safetensors writes memory as it lies.
            files[file] = {"latents": np.ascontiguousarray(np.concatenate(parts))}
    return files


def _tensor(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values if values.flags.writeable else values.copy())  # Ray's are read-only


def to_batch(columns: Mapping[str, np.ndarray]) -> TrainingBatch:
    """Columns of `LatentFiles.columns` as tensors."""
    told = {name: _tensor(columns[name]) for name in get_args(ConditionKind) if name in columns}
    pictures = {name: to_model(value) for name, value in told.items() if name != "audio"}
    latents, *control = (
        _tensor(columns[name]).float().transpose(1, 2) for name in ("latents", "control", "surround") if name in columns
    )
    return TrainingBatch(
        latents.contiguous(), torch.cat(control, dim=1).contiguous(), Conditions(audio=told.get("audio"), **pictures)
    )


@torch.inference_mode()
def encode_columns(
    columns: Mapping[str, np.ndarray], autoencoder: PictureAutoencoder, row: Variant, settings: Settings
) -> dict[str, np.ndarray]:
    """Columns of `PictureFiles` to those of `LatentFiles`: rounded to half precision as those are."""
    encoded = dict(columns)
    device = autoencoder.mean.device
    kinds: dict[str, PictureKind] = {"latents": row.generates, "control": row.control, "surround": "scene"}
    for name, kind in kinds.items():
        if name not in columns:
            continue
        pictures = _tensor(columns[name])
        parts = [
            autoencoder.encode(to_model(batch).to(device).unsqueeze(2), kind).squeeze(2).half().cpu()
            for batch in pictures.flatten(0, 1).split(ENCODE_BATCH)
        ]
        latents = torch.cat(parts).unflatten(0, pictures.shape[:2]).numpy()
        blind = settings.context == "none" and (name == "surround" or kind == "scene")
        encoded[name] = np.zeros_like(latents) if blind else latents
    return encoded


class LatentCache:
    """Latents in `<root>/latents/<hash>/` and lips in `<root>/lips/`; the hash is of all that latents depend on."""

    def __init__(
        self,
        root: Folder | Path,
        table: ClipTable,
        settings: Settings,
        autoencoder: PictureAutoencoder,
        lips: LipSources | None,
        names: Iterable[str] = tuple(VARIANTS),
    ):
        """names: the variants it is for; what none of them reads is not computed."""
        root = root if isinstance(root, Folder) else Folder(root)
        self.table = table
        self.settings = settings
        self.autoencoder = autoencoder
        beside = Folder(table.folder.path(LIPS))
        self.lips = LipTable(root.path(LIPS), lips, also=[beside]) if lips else None
        self.kinds = files_needed(names, settings)
        key = f"{weights_hash(autoencoder)} {settings.headbox.model_dump_json()} {settings.picture_px} {settings.seed}"
        self.folder = Folder(root.path(f"latents/{hashlib.blake2b(key.encode(), digest_size=8).hexdigest()}"))

    @property
    def lengths(self) -> Mapping[str, int]:
        return self.table.num_frames

    @property
    def files(self) -> LatentFiles:
        """What reads it elsewhere."""
        return LatentFiles(self.settings, self.folder, self.lips.pictures if self.lips else None)

    def batch(
        self, planned: Sequence[PlannedWindow], row: Variant, num_frames: int, kinds: Sequence[ConditionKind] = ()
    ) -> TrainingBatch:
        return to_batch(self.files.columns(planned, row, num_frames, kinds or conditions_of(row, self.settings)))

    def build(self, part: int = 0, parts: int = 1) -> None:
        """Computes what is missing, in all or of one part of the clips. Interrupted, it goes on where it was."""
        ids = self.table.ids[part::parts]
        missing = [(c, d) for c in ids for d in range(self.settings.headbox.draws) if self._missing(c, d)]
        with progress() as bar:
            task = bar.add_task("encoding clips to latents", total=len(missing))
            for clip_id, draw in missing:
                self._encode(clip_id, draw)
                bar.advance(task)
            if self.lips:
                task = bar.add_task("drawing lip references", total=len(ids))
                self.lips.write(self.table, lambda done, total: bar.update(task, completed=done), ids)

    def build_clip(self, clip_id: str, lips_alone: bool = False) -> None:
        """Computes what is missing of one clip."""
        for draw in () if lips_alone else range(self.settings.headbox.draws):
            self._encode(clip_id, draw)
        if self.lips:
            self.lips.write(self.table, clip_ids=[clip_id])

    def missing_clips(self, lips_alone: bool = False) -> list[str]:
        """Clips of which anything is missing, found with one listing of each folder."""
        there = set() if lips_alone else self.folder.names()
        drawn = self.lips.pictures.names() if self.lips else set()
        draws = () if lips_alone else range(self.settings.headbox.draws)
        return [
            clip_id
            for clip_id in self.table.ids
            if any(latent_name(clip_id, draw, kind) not in there for draw in draws for kind in self.kinds)
            or (self.lips is not None and f"{clip_id}.npy" not in drawn)
        ]

    def _encode(self, clip_id: str, draw: int) -> None:
        kinds = self._missing(clip_id, draw)  # another training may have been here meanwhile
        clip, seed = self.table[clip_id], self.settings.seed
        files = encode_clip(clip, self.settings, draw, seed, self.autoencoder, kinds) if kinds else {}
        for kind, arrays in files.items():
            self.folder.write(latent_name(clip_id, draw, kind), save(arrays))

    def _missing(self, clip_id: str, draw: int) -> list[FileKind]:
        return [kind for kind in self.kinds if not self.folder.exists(latent_name(clip_id, draw, kind))]
