"""Latents and lips ahead of training: computed by Ray Data's workers, on all of the cluster, and kept in storage."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch

from tccp.clips.clip_table import ClipTable
from tccp.cluster import could_have
from tccp.config import Settings, VariantName
from tccp.files import Folder
from tccp.inference.pipeline_folder import verified
from tccp.models.autoencoder import PictureAutoencoder
from tccp.training.latent_cache import LatentCache
from tccp.training.launcher.job import AUTOENCODER, Spread
from tccp.training.lip_folds import LipPlace


@dataclass(frozen=True)
class ClipEncoder:
    """How the clips of a table are encoded for a variant: what each worker makes its `LatentCache` from."""

    storage: Folder
    table: str
    settings: Settings
    pipeline: Folder
    lips: LipPlace | None
    variant: VariantName

    def cache(self, device: str) -> LatentCache:
        with self.pipeline.here() as place:
            autoencoder = PictureAutoencoder.load(verified(place, AUTOENCODER)).to(device).eval()
        sources = self.lips.open(device) if self.lips else None
        table = ClipTable(self.table)
        return LatentCache(self.storage, table, self.settings, autoencoder, sources, [self.variant])


class EncodeClips:
    """The actor: ids of clips in, the same out once their latents and lips are in storage."""

    def __init__(self, encoder: ClipEncoder, lips_alone: bool):
        self.lips_alone = lips_alone
        self.cache = encoder.cache("cuda" if torch.cuda.is_available() else "cpu")

    def __call__(self, batch: pa.Table) -> pa.Table:
        for clip_id in batch.column("clip_id").to_pylist():
            self.cache.build_clip(clip_id, self.lips_alone)
        return batch


def encoded(encoder: ClipEncoder, clip_ids: Sequence[str], lips_alone: bool, spread: Spread) -> Iterable[Any]:
    """Rows as clips are done. As many actors as there will be ranks, or as there are CPUs."""
    import ray

    cpus = int(could_have().get("CPU", 1))
    size = spread.workers if spread.use_gpu else max(1, min(cpus, len(clip_ids)))
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.raise_original_map_exception = True
    step = max(1, -(-len(clip_ids) // 2000))
    blocks = [pa.table({"clip_id": list(clip_ids[i : i + step])}) for i in range(0, len(clip_ids), step)]
    data = ray.data.from_blocks(blocks).map_batches(
        EncodeClips,
        fn_constructor_args=(encoder, lips_alone),
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=size),
        num_cpus=0.5,
        num_gpus=1 if spread.use_gpu else 0,
        batch_size=1,
        batch_format="pyarrow",
    )
    return data.iter_rows()
