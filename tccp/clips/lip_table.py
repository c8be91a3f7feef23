"""The lip table: stored lip pictures of clips, keyed by (hash of the lip source, clip_id)."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8

from tccp.errors import DamagedData, TccpError
from tccp.files import Folder, retried

LIPS = "lips"
"""Name of the lip table's folder, in a storage or beside the clips."""


@dataclass(frozen=True)
class LipFiles:
    """Stored lip pictures: files `<hash>/<clip_id>.npy`, uint8 `f s s 3`, in any of several folders."""

    hash: str
    folders: tuple[Folder, ...]

    def name(self, clip_id: str) -> str:
        return f"{self.hash}/{clip_id}.npy"

    def names(self) -> set[str]:
        """Names of the existing files, in any of the folders."""
        return set().union(*(folder.names(self.hash) for folder in self.folders))

    def __contains__(self, clip_id: str) -> bool:
        return any(folder.exists(self.name(clip_id)) for folder in self.folders)

    def read(self, clip_id: str, start_frame: int = 0, num_frames: int | None = None) -> UInt8[np.ndarray, "f s s 3"]:
        """Lip pictures of these frames, and only they are read.

        Raises TccpError if the clip has none, DamagedData if their file is not one of lip pictures, StorageError.
        """
        pictures = self._opened(clip_id)
        end = len(pictures) if num_frames is None else start_frame + num_frames
        if not 0 <= start_frame < end <= len(pictures):
            raise TccpError(f"frames {start_frame} to {end} are not in clip {clip_id} of {len(pictures)} frames")
        return np.array(pictures[start_frame:end])

    def _opened(self, clip_id: str) -> np.ndarray:
        name = self.name(clip_id)
        for folder in self.folders:
            try:
                return retried(f"read {folder.path(name)}", functools.partial(_mapped, folder, name))
            except FileNotFoundError:  # instead of asking first, which costs object stores a request each time
                continue
        missing = self.folders[0].path(name)
        raise TccpError(
            f"lips of clip {clip_id}: {missing} does not exist; render the lip table for this clip table first"
        )


def _mapped(folder: Folder, name: str) -> np.ndarray:
    """The pictures, memory-mapped. A file of other content is no failure of the storage: a retry would not help."""
    with folder.local_file(name) as path:
        try:
            return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
        except (EOFError, ValueError) as error:
            raise DamagedData(
                f"{folder.path(name)} is damaged ({error}); remove it and render the lips again"
            ) from None
