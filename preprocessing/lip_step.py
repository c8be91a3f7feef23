"""The lip references of clips: a table beside theirs, keyed by clip and by what drew it; or a column of their rows.

Lips are drawn from a clip's sound and its first identity picture, by the code that generation uses
(`tccp.models.lip_sources`), and never from the clip's own mouth. The networks are imported where they are used: most runs draw
no lips, and torch would take each of their processes seconds to load.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from tccp.clips.clip_table import ClipTable, clip_from_row
from tccp.clips.lip_table import LIPS
from tccp.config import LipSettings
from tccp.errors import TccpError
from tccp.files import Folder

DRAWN_SCHEMA = pa.schema([("clip_id", pa.string()), ("seconds", pa.float64())])


@dataclass(frozen=True)
class LipWork:
    """What draws the lips, resolved once. hash: of its networks; every worker must come to the same one."""

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
    """weights: the published Wav2Lip checkpoint, the folder of cross-fitted Liplets, or the lips of a pipeline that was
    trained on other footage, as `settings.source` says.

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


class DrawLips:
    """Batches with `clip_id` to rows of DRAWN_SCHEMA: the clips' lips are drawn beside the table."""

    def __init__(self, work: LipWork, table: str) -> None:
        self._clips = ClipTable(table)
        self._lips = lip_table(table, work.open())

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = []
        for clip_id in batch.column("clip_id").to_pylist():
            started = time.monotonic()
            self._lips.draw(self._clips[clip_id])
            rows.append({"clip_id": clip_id, "seconds": time.monotonic() - started})
        return pa.Table.from_pylist(rows, schema=DRAWN_SCHEMA)

    def close(self) -> None:
        self._clips.close()


class AddLips:
    """Rows of the clip table with one column more: `lips`, uint8 `f s s 3` as bytes, for `tccp.clips.windows.windows`.

    table: where lips may have been drawn before; what is not there is drawn, and not kept.
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


def tidy(table: str, work: LipWork, clip_ids: Iterable[str]) -> list[str]:
    """Which of a table's clips have no lips yet; the lips of clips that are not among them are removed."""

    folder, wanted = Folder(Folder(table).path(LIPS)), list(clip_ids)
    there = {name.removesuffix(".npy") for name in folder.names(work.hash)}
    for clip_id in there.difference(wanted):
        folder.remove(f"{work.hash}/{clip_id}.npy")
    return [clip_id for clip_id in wanted if clip_id not in there]
