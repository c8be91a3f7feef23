"""Chosen frames of a film, in one pass and flat memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from tccp.config import FPS
from tccp.media import read_frames

_SEEK_GAP_FRAMES = 4 * FPS  # decoding on is cheaper than a seek to a keyframe some seconds back


def frames_at(path: Path, frames: Sequence[int]) -> Iterator[tuple[int, UInt8[np.ndarray, "h w 3"]]]:
    """(frame, picture) for ascending frames of the 25 fps clock. Raises MediaError where the file does not decode."""
    start = 0
    for end in range(1, len(frames) + 1):
        if end < len(frames) and frames[end] - frames[end - 1] <= _SEEK_GAP_FRAMES:
            continue
        first, last = frames[start], frames[end - 1]
        for frame, picture in enumerate(read_frames(path, first, last - first + 1), start=first):
            if frame == frames[start]:
                yield frame, picture
                start += 1
