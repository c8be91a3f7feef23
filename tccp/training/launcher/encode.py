"""Latents and lips ahead of training: Ray Data's workers compute them on the whole cluster, into storage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch

from tccp.clips.clip_table import ClipTable
from tccp.cluster import data_settings, dataset, max_resources
from tccp.config import Settings, VariantName
from tccp.errors import DamagedData
from tccp.files import Folder
from tccp.inference.pipeline_folder import load_autoencoder
from tccp.training.latent_cache import LatentCache
from tccp.training.launcher.job import Allocation
from tccp.training.lip_folds import LipPlace


@dataclass(frozen=True)
class ClipEncoder:
    """What each worker needs to open its `LatentCache` for a variant."""

    storage: Folder
    table: str
    settings: Settings
    pipeline: Folder
    lips: LipPlace | None
    variant: VariantName

    def cache(self, device: str) -> LatentCache:
        with self.pipeline.as_local() as place:
            autoencoder = load_autoencoder(place, device)
        sources = self.lips.open(device) if self.lips else None
        table = ClipTable(self.table)
        return LatentCache(self.storage, table, self.settings, autoencoder, sources, [self.variant])


class EncodeClips:
    """A Ray Data actor: takes ids of clips, and returns them once their latents and lips are in storage.

    It adds the column `damage`: why a clip could not be encoded, else null.
    """

    def __init__(self, encoder: ClipEncoder, lips_alone: bool):
        self.lips_alone = lips_alone
        self.cache = encoder.cache("cuda" if torch.cuda.is_available() else "cpu")

    def __call__(self, batch: pa.Table) -> pa.Table:
        damage: list[str | None] = []
        for clip_id in batch.column("clip_id").to_pylist():
            try:
                self.cache.build_clip(clip_id, self.lips_alone)
                damage.append(None)
            except DamagedData as error:
                damage.append(str(error))
        return batch.append_column("damage", pa.array(damage, pa.string()))


def encoded(
    encoder: ClipEncoder, clip_ids: Sequence[str], lips_alone: bool, allocation: Allocation
) -> Iterator[dict[str, Any]]:
    """A row for each clip when it is done. One actor for each future rank on GPUs, else one for each CPU."""
    import ray.data

    cpus = int(max_resources().get("CPU", 1))
    size = allocation.workers if allocation.use_gpu else max(1, min(cpus, len(clip_ids)))
    with data_settings(in_order=False):
        data = dataset(pa.table({"clip_id": list(clip_ids)})).map_batches(
            EncodeClips,
            fn_constructor_args=(encoder, lips_alone),
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=size),
            num_cpus=0.5,
            num_gpus=1 if allocation.use_gpu else 0,
            batch_size=1,
            batch_format="pyarrow",
        )
        yield from data.iter_rows()
