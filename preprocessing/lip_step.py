"""The lip references of clips: a table beside the clip table, keyed by clip and lip source; or a column of its rows.

The code that generation uses (`tccp.models.lip_sources`) renders them from a clip's sound and its first identity
picture, never from the clip's own mouth. torch is imported inside functions: most runs render no lips, and importing it
would cost each of their processes seconds.
"""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from preprocessing.parts import remove_unread
from tccp.clips.clip_table import ClipTable, clip_from_row
from tccp.clips.lip_table import LIPS
from tccp.config import LipSettings
from tccp.errors import DamagedData, TccpError
from tccp.files import Folder, storage_retries

logger = logging.getLogger("tccp.preprocessing")

RENDERED_SCHEMA = pa.schema([("clip_id", pa.string()), ("seconds", pa.float64()), ("storage_retries", pa.int64())])


@dataclass(frozen=True)
class LipWork:
    """The lip source, resolved once. hash: of its networks, which every worker must find alike."""

    settings: LipSettings
    weights: Path
    hash: str

    def open(self) -> Any:
        """The `tccp.training.lip_folds.LipSources`. Raises TccpError if this machine has other weights, or none."""
        from tccp.training.lip_folds import LipPlace

        sources = LipPlace(self.settings, Folder(self.weights)).open()
        if sources.hash != self.hash:
            raise TccpError(
                f"lip weights {self.weights} on {platform.node()} are {sources.hash}, the run began with {self.hash}: "
                "give every machine the same weights"
            )
        return sources


def lip_work(settings: LipSettings, weights: Path) -> LipWork:
    """Resolves the lip source.

    weights: according to `settings.source` the published Wav2Lip checkpoint, the folder of cross-fitted Liplets, or the
    lips of a pipeline that was trained on other footage.
    Raises TccpError if they cannot be loaded, or if the settings have no lips.
    """
    from tccp.training.lip_folds import LipPlace

    if settings.source == "none":
        raise TccpError("lip weights are given, but lips.source=none: choose a source (--set lips.source=wav2lip)")
    sources = LipPlace(settings, Folder(weights)).open()
    return LipWork(settings, weights.resolve(), sources.hash)


def lip_table(table: str, sources: Any) -> Any:
    """The lips beside a clip table, a `tccp.training.lip_folds.LipTable` of these sources."""
    from tccp.training.lip_folds import LipTable

    return LipTable(Folder(Folder(table).path(LIPS)), sources)


class RenderLips:
    """Renders the lips of batches with `clip_id`, into the lip table beside the clips. Returns RENDERED_SCHEMA."""

    def __init__(self, work: LipWork, table: str) -> None:
        self._clips = ClipTable(table)
        self._lips = lip_table(table, work.open())

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = []
        for clip_id in batch.column("clip_id").to_pylist():
            started, retries = time.monotonic(), storage_retries()
            try:
                self._lips.render(self._clips[clip_id])
            except DamagedData as error:  # training sets such a clip aside, too
                logger.warning("clip %s gets no lips: %s", clip_id, error)
                continue
            seconds, retries = time.monotonic() - started, storage_retries() - retries
            rows.append({"clip_id": clip_id, "seconds": seconds, "storage_retries": retries})
        return pa.Table.from_pylist(rows, schema=RENDERED_SCHEMA)

    def close(self) -> None:
        self._clips.close()


class AddLips:
    """Adds the column `lips`, uint8 `f s s 3` as bytes, to rows of the clip table, for `tccp.clips.windows.windows`.

    table: a clip table beside which lips may exist already. Missing ones are rendered and not kept.
    """

    def __init__(self, work: LipWork, table: str | None = None) -> None:
        self._sources = work.open()
        self._lips = None if table is None else lip_table(table, self._sources)

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = [self._pictures(batch, row).tobytes() for row in range(batch.num_rows)]
        return batch.append_column("lips", pa.array(rows, pa.binary()))

    def _pictures(self, batch: pa.Table, row: int) -> Any:
        from tccp.training.lip_folds import lip_pictures

        clip = clip_from_row(batch, row)
        if self._lips is not None and clip.clip_id in self._lips:
            return self._lips.read(clip.clip_id)
        return lip_pictures(clip, self._sources.for_clip(clip.clip_id, clip.source_hash))


def remove_stale_lips(table: str, work: LipWork, clip_ids: Iterable[str]) -> list[str]:
    """Removes the lips of clips that are not among `clip_ids`, unless a process may read them (`remove_unread`).

    Returns the clips that have no lips yet.
    """
    folder, wanted = Folder(Folder(table).path(LIPS)), list(clip_ids)
    present = {name.removesuffix(".npy") for name in folder.names(work.hash)}
    remove_unread(Folder(table), [f"{LIPS}/{work.hash}/{clip_id}.npy" for clip_id in present.difference(wanted)])
    return [clip_id for clip_id in wanted if clip_id not in present]
