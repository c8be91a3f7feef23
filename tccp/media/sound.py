"""Decodes sound as a stream to 16 kHz mono, timed from the file's common start, and keeps it on disk."""

from __future__ import annotations

import math
import tempfile
import wave
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from jaxtyping import Float, Float32

from tccp.config import SAMPLE_RATE_HZ, SAMPLES_PER_FRAME
from tccp.errors import TccpError
from tccp.media.source import MediaError, MediaInfo, no_stream, opened, pick_audio, probe

# Smaller differences between timestamps and sample count are rounding or jitter. Larger ones are gaps or overlaps.
_MAX_STRAY_S = Fraction(1, 50)
_BLOCK = 1 << 16


class AudioTrack:
    """16 kHz mono sound on disk. Sample 0 lies at the common start of the source file.

    samples: in [-1, 1], memory-mapped, so slice what you need. Use as a context manager or call close() to free the
    temporary file. It also disappears when the process ends.
    """

    def __init__(self, path: Path, samples: Float32[np.ndarray, "n"]):
        self.path = path
        self.samples = samples

    @property
    def num_samples(self) -> int:
        return len(self.samples)

    @property
    def num_frames(self) -> int:
        """How many frames at 25 fps cover this sound, rounded up. The last frame may end in silence."""
        return math.ceil(self.num_samples / SAMPLES_PER_FRAME)

    def close(self) -> None:
        self.samples = np.zeros(0, np.float32)

    def __enter__(self) -> AudioTrack:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def open_audio(path: str | Path) -> AudioTrack:
    """The sound of any media file at 16 kHz mono, from the file's common start to the end of the sound.

    Memory use does not grow with length: the sound goes into an unnamed temporary file in TMPDIR (64 kB a second).
    Raises MediaError no_audio, empty_audio, corrupt or not_finite, and like `probe`; TccpError if the disk is full.
    """
    info = probe(path)
    num_samples = 0
    try:
        with tempfile.TemporaryFile(prefix="tccp-sound-") as file:
            for block in sound_blocks(info):
                file.write(block.tobytes())
                num_samples += len(block)
            file.flush()
            # The mapping keeps the unnamed file alive after it is closed here.
            return AudioTrack(info.path, np.memmap(file, np.float32, "r", shape=(num_samples,)))
    except OSError as error:
        folder = tempfile.gettempdir()
        raise TccpError(
            f"{path}: its sound cannot be unpacked into {folder} ({error.strerror}); make room or set TMPDIR"
        ) from None


def sound_blocks(info: MediaInfo) -> Iterator[Float32[np.ndarray, "n"]]:
    """The sound of `open_audio`, block by block. Raises MediaError no_audio, empty_audio, corrupt or not_finite."""
    empty = True
    for block in resampled(decode_sound(info, mono=True), info.audio_sample_rate_hz):
        if not np.isfinite(block).all():
            raise MediaError(info.path, "not_finite", "its sound holds values that are not numbers; export it again")
        empty = empty and not len(block)
        yield block
    if empty:
        raise MediaError(info.path, "empty_audio", "its audio track is empty; give a file with sound in it")


def decode_sound(info: MediaInfo, mono: bool) -> Iterator[Float32[np.ndarray, "channels n"]]:
    """The file's sound in blocks at its own rate, from the common start, with silence before it and in its gaps.

    mono: deliver one channel, the mean. Otherwise deliver one or two channels as stored (more are mixed to two).
    """
    if info.audio_span is None:
        raise no_stream(info.path, "audio")
    rate_hz, stored_channels = info.audio_sample_rate_hz, info.audio_channels
    channels = 1 if mono else min(stored_channels, 2)
    # One or two channels stay unchanged. swresample mixes more channels; its 16-bit path scales so that nothing clips.
    to_planes = av.AudioResampler("s16p", "stereo") if stored_channels > 2 else av.AudioResampler("fltp")
    position = 0  # samples delivered so far
    with opened(info.path) as container:
        stream = pick_audio(container)
        assert stream is not None
        for frame in container.decode(stream):
            if (frame.sample_rate, frame.layout.nb_channels) != (rate_hz, stored_channels):
                raise MediaError(
                    info.path, "unsupported", "its sound changes rate or channels midway; convert it to WAV"
                )
            planes = np.concatenate([part.to_ndarray() for part in to_planes.resample(frame)], axis=1)
            block = planes[:, : _audible_samples(frame)].astype(np.float32, copy=False)
            block = block / np.float32(32768) if stored_channels > 2 else block
            block = block.mean(axis=0, keepdims=True, dtype=np.float32) if channels == 1 else block
            stray = 0
            if frame.pts is not None and frame.time_base is not None:
                stray = round((frame.pts * frame.time_base - info.zero) * rate_hz) - position
            if position == 0 or abs(stray) > _MAX_STRAY_S * rate_hz:
                for count in _steps(stray):
                    yield np.zeros((channels, count), np.float32)
                position += max(stray, 0)
                block = block[:, max(-stray, 0) :]
            position += block.shape[1]
            if block.size:
                yield block


def _steps(count: int) -> Iterator[int]:
    """Splits `count` into steps that fit in memory; yields nothing if it is not positive."""
    while count > 0:
        yield min(count, _BLOCK)
        count -= _BLOCK


def _audible_samples(frame: av.AudioFrame) -> int:
    """The number of samples without padding: encoders fill up the last frame and shorten its duration.

    A duration that is shorter by no more than a tick is a rounding error, not a cut.
    """
    if not frame.duration or frame.time_base is None:
        return frame.samples
    audible = frame.duration * frame.time_base * frame.sample_rate
    tick = max(Fraction(1), frame.time_base * frame.sample_rate)
    return round(audible) if audible + tick < frame.samples else frame.samples


def resampled(blocks: Iterable[Float32[np.ndarray, "1 n"]], sample_rate_hz: int) -> Iterator[Float32[np.ndarray, "n"]]:
    """Resamples mono blocks to 16 kHz without a delay: exactly ceil(n * 16000 / sample_rate_hz) samples in all."""
    resampler = av.AudioResampler("fltp", "mono", SAMPLE_RATE_HZ)
    given = delivered = 0
    for block in blocks:
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(block), "fltp", "mono")
        frame.sample_rate = sample_rate_hz
        given += block.shape[1]
        for part in resampler.resample(frame):
            delivered += part.samples
            yield part.to_ndarray()[0]
    if given:
        rest = math.ceil(Fraction(given * SAMPLE_RATE_HZ, sample_rate_hz)) - delivered
        tail = np.concatenate([part.to_ndarray()[0] for part in resampler.resample(None)] or [np.zeros(0, np.float32)])
        yield np.pad(tail, (0, max(0, rest - len(tail))))[: max(rest, 0)]


def fit_samples(samples: Float[np.ndarray, "n"], num_frames: int) -> Float32[np.ndarray, "m"]:
    """Cuts the samples, or adds silence, to exactly num_frames * 640 samples."""
    fitted = np.zeros(num_frames * SAMPLES_PER_FRAME, np.float32)
    kept = samples[: len(fitted)]
    fitted[: len(kept)] = kept
    return fitted


def write_audio_wav(path: str | Path, samples: Float[np.ndarray, "n"]) -> None:
    """Writes 16 kHz mono samples in [-1, 1] to a 16-bit WAV file. Clips values outside that range.

    Raises TccpError if the file cannot be written.
    """
    try:
        with open(path, "wb") as raw, wave.open(raw, "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(SAMPLE_RATE_HZ)
            for start in range(0, len(samples), _BLOCK):
                block = np.asarray(samples[start : start + _BLOCK], np.float64)
                file.writeframes(np.clip(np.round(block * 32768), -32768, 32767).astype("<i2").tobytes())
    except OSError as error:
        raise TccpError(f"{path}: cannot be written ({error.strerror}); choose a folder you can write to") from None
