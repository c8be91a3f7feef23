"""Limits on what a media file may ask for."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from tccp.errors import TccpError


@dataclass(frozen=True)
class Limits:
    """The defaults leave room for real footage: 8K pictures, half a day, a terabyte.

    max_pixels: per picture. max_duration_s: from the start of the clock to the end of pictures and sound.
    max_sample_rate_hz: of the sound as stored. memory_bytes: memory for decoding, on top of what an idle child uses.
    stall_s: the longest wait for an answer. The first answer may take longer: by the file's size at 10 MB/s, because
      the child reads the whole file, and by the time of the first picture, because the child may have to decode
      everything before it.
    Raises TccpError if a limit is not a positive finite number.
    """

    max_pixels: int = 8192 * 4320
    max_duration_s: float | int = 12 * 3600
    max_streams: int = 64
    max_sample_rate_hz: int = 768_000
    max_file_bytes: int = 1 << 40
    memory_bytes: int = 4 << 30
    stall_s: float | int = 60

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not (math.isfinite(value) and value > 0):
                raise TccpError(f"limit {name} {value}: give a number above 0")
