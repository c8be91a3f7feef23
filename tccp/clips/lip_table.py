"""The lip table: lip pictures of clips at rest, keyed by (hash of the lip source, clip_id)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8

from tccp.errors import DamagedData, TccpError
from tccp.files import Folder, retried

LIPS = "lips"
"""Folder of the lip table, in a storage or beside the clips."""


@dataclass(frozen=True)
class LipFiles:
    """Lip pictures at rest: `<hash>/<clip_id>.npy`, uint8 `f s s 3`, in one of some folders."""

    hash: str
    folders: tuple[Folder, ...]

    def name(self, clip_id: str) -> str:
        return f"{self.hash}/{clip_id}.npy"

    def names(self) -> set[str]:
        """Names of the files that are there, in any of the folders."""
        return set().union(*(folder.names(self.hash) for folder in self.folders))

    def __contains__(self, clip_id: str) -> bool:
        return any(folder.exists(self.name(clip_id)) for folder in self.folders)

    def read(self, clip_id: str, start_frame: int = 0, num_frames: int | None = None) -> UInt8[np.ndarray, "f s s 3"]:
        """Lip pictures of these frames, and only they are read.

        Raises TccpError if the clip has none, DamagedData if their file is not one of lip pictures, StorageError.
        """
        name = self.name(clip_id)
        folder = next((one for one in self.folders if one.exists(name)), self.folders[0])
        try:
            pictures = retried(f"read {folder.path(name)}", lambda: _opened(folder, name))
        except FileNotFoundError as error:
            raise TccpError(f"lips of clip {clip_id}: {error}; draw the lip table for this clip table first") from None
        end = len(pictures) if num_frames is None else start_frame + num_frames
        if not 0 <= start_frame < end <= len(pictures):
            raise TccpError(f"frames {start_frame} to {end} are not in clip {clip_id} of {len(pictures)} frames")
        return np.array(pictures[start_frame:end])


def _opened(folder: Folder, name: str) -> np.ndarray:
    """The pictures, memory-mapped. An unreadable file is no failure of the storage: another attempt reads it alike."""
    with folder.local_file(name) as path:
        try:
            return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
        except (EOFError, ValueError) as error:
            raise DamagedData(f"{folder.path(name)} is damaged ({error}); remove it and draw the lips again") from None
