"""The sound of a written film: decoded at its own rate and channels where AAC allows that."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from tccp.media.sound import decode_sound, mix_of, resampled
from tccp.media.source import MediaError, no_stream, probe

_AAC_RATES_HZ = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)  # players support higher ones rarely
_LAYOUTS = ("mono", "stereo", "2.1", "4.0", "5.0", "5.1", "6.1", "7.1")  # by number of channels
MOST_CHANNELS = len(_LAYOUTS)


@dataclass(frozen=True)
class FilmSound:
    """Sound from the film's `MediaInfo.zero`, in [-1, 1]. blocks: of any length, one after the other.

    layout: FFmpeg's name of the channels, such as stereo or 5.1.
    """

    sample_rate_hz: int
    num_channels: int
    layout: str
    blocks: Iterator[Float32[np.ndarray, "channels n"]]


def film_sound(path: str | Path) -> FilmSound:
    """The sound of a media file as VideoWriter stores it. The blocks raise MediaError `corrupt`, `not_finite` and
    `empty_audio`.

    Raises MediaError `no_audio`, and like `probe`.
    """
    info = probe(path)
    if not info.has_audio:
        raise no_stream(info.path, "audio")
    rate_hz, channels, layout = info.audio_sample_rate_hz, info.audio_channels, info.audio_layout
    blocks: Iterator[Float32[np.ndarray, "channels n"]] = decode_sound(info)
    if channels > MOST_CHANNELS:
        mix, channels, layout = mix_of(info), 1, "mono"
        blocks = (mix(block) for block in blocks)
    elif "NONE" in info.channel_names:  # WAV files often do not say which channel is which
        layout = _LAYOUTS[channels - 1]
    if rate_hz not in _AAC_RATES_HZ:
        to_hz = next((rate for rate in _AAC_RATES_HZ if rate > rate_hz), _AAC_RATES_HZ[-1])
        blocks, rate_hz = resampled(blocks, rate_hz, to_hz, layout), to_hz
    return FilmSound(rate_hz, channels, layout, _finite(info.path, blocks))


def _finite(path: Path, blocks: Iterator[Float32[np.ndarray, "channels n"]]) -> Iterator[np.ndarray]:
    empty = True
    for block in blocks:
        empty = empty and not block.size
        if not np.isfinite(block).all():
            raise MediaError(path, "not_finite", "its sound holds values that are not numbers; export it again")
        yield block
    if empty:
        raise MediaError(path, "empty_audio", "its audio track is empty; give a file with sound in it")
