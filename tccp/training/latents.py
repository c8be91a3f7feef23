"""The latent cache: what training reads, computed once per clip and jitter draw.

Scenes are masked before they are encoded, so each draw of the mask has latents of its own. A file is memory-mapped and
a window reads only its own frames: memory does not grow with the data set.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import Tensor

from tccp import headbox
from tccp.clip import Clip, ClipTable, atomic_path
from tccp.config import Settings
from tccp.data import PlannedWindow, mirrored, rng_seed, view
from tccp.files import Folder
from tccp.models.autoencoder import PictureAutoencoder, to_model
from tccp.models.conditions import Conditions
from tccp.models.lips import weights_hash
from tccp.progress import progress
from tccp.training.lips import LIPS, LipSources, LipTable
from tccp.variants import VARIANTS, ConditionKind, PictureKind, Variant

ENCODE_BATCH = 64
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


@dataclass(frozen=True)
class TrainingBatch:
    """Windows ready for the loss: normalised latents `b c f h w` and condition inputs."""

    latents: Float[Tensor, "b c f h w"]
    control: Float[Tensor, "b c2 f h w"]
    conditions: Conditions


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


class LatentCache:
    """`<root>/<hash>/<clip_id>-<draw>.<kind>.safetensors`; the hash is of everything the latents depend on."""

    def __init__(
        self,
        root: Path,
        table: ClipTable,
        settings: Settings,
        autoencoder: PictureAutoencoder,
        lips: LipSources | None,
        names: Iterable[str] = tuple(VARIANTS),
    ):
        """names: the variants it is for; what none of them reads is not computed."""
        self.table = table
        self.settings = settings
        self.autoencoder = autoencoder
        beside = Folder(table.folder.path(LIPS))
        self.lips = LipTable(root / LIPS, lips, also=[beside]) if lips else None
        self.kinds = files_needed(names, settings)
        key = f"{weights_hash(autoencoder)} {settings.headbox.model_dump_json()} {settings.picture_px} {settings.seed}"
        self.folder = root / "latents" / hashlib.blake2b(key.encode(), digest_size=8).hexdigest()

    def path(self, clip_id: str, draw: int, kind: FileKind) -> Path:
        return self.folder / f"{clip_id}-{draw}.{kind}.safetensors"

    def build(self, part: int = 0, parts: int = 1) -> None:
        """Computes what is missing, in all or of one part of the clips. Interrupted, it goes on where it was."""
        ids = self.table.ids[part::parts]
        missing = [(c, d) for c in ids for d in range(self.settings.headbox.draws) if self._missing(c, d)]
        with progress() as bar:
            task = bar.add_task("encoding clips to latents", total=len(missing))
            for clip_id, draw in missing:
                kinds = self._missing(clip_id, draw)  # asked again: another training may have been here meanwhile
                clip, seed = self.table[clip_id], self.settings.seed
                files = encode_clip(clip, self.settings, draw, seed, self.autoencoder, kinds) if kinds else {}
                for kind, arrays in files.items():
                    with atomic_path(self.path(clip_id, draw, kind)) as temporary:
                        save_file(arrays, temporary)
                bar.advance(task)
            if self.lips:
                task = bar.add_task("drawing lip references", total=len(ids))
                self.lips.write(self.table, lambda done, total: bar.update(task, completed=done), ids)

    def _missing(self, clip_id: str, draw: int) -> list[FileKind]:
        return [kind for kind in self.kinds if not self.path(clip_id, draw, kind).exists()]

    def batch(self, planned: Sequence[PlannedWindow], row: Variant, num_frames: int) -> TrainingBatch:
        """The windows of one step. Which jitter draw a window takes is drawn from (seed, id, epoch)."""
        kinds = row.conditions_with(self.settings.lips.source)
        read: dict[str, FileKind] = {"latents": row.generates, "control": row.control}
        if shows_surround(row, self.settings):
            read["surround"] = "surround"
        columns: dict[str, list[np.ndarray]] = {name: [] for name in (*read, *kinds)}
        for epoch, (clip_id, start) in planned:
            draw = rng_seed(self.settings.seed, "draw", clip_id, start, epoch) % self.settings.headbox.draws
            frames = slice(start, start + num_frames)
            for name, kind in read.items():
                with safe_open(self.path(clip_id, draw, kind), framework="numpy") as file:
                    columns[name].append(file.get_slice("latents")[frames])
            if "audio" in kinds or "identity" in kinds:
                with safe_open(self.path(clip_id, draw, "inputs"), framework="numpy") as file:
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
        return self._tensors(columns, kinds)

    def _tensors(self, columns: dict[str, list[np.ndarray]], kinds: Sequence[ConditionKind]) -> TrainingBatch:
        stacked = {name: torch.from_numpy(np.stack(values)) for name, values in columns.items() if values}
        pictures = {name: to_model(stacked[name]) for name in kinds if name != "audio"}
        control = torch.cat([stacked[name] for name in ("control", "surround") if name in stacked], dim=2)
        return TrainingBatch(
            latents=stacked["latents"].float().transpose(1, 2).contiguous(),
            control=control.float().transpose(1, 2).contiguous(),
            conditions=Conditions(audio=stacked["audio"] if "audio" in kinds else None, **pictures),
        )
