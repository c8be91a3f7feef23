"""Sound on the common clock: decoded in a stream to 16 kHz mono, kept on disk."""

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

from tccp.config import SAMPLE_RATE_HZ, SAMPLES_PER_FRAME, TccpError
from tccp.media.source import MediaError, MediaInfo, no_stream, opened, pick_stream, probe

# Timestamps that stray from the sample count by less are rounding or jitter; by more, a gap or an overlap to make good.
_MAX_STRAY_S = Fraction(1, 50)
_BLOCK = 1 << 16


class AudioTrack:
    """16 kHz mono sound on disk, its sample 0 at the common start of the file it came from.

    samples: float32 in [-1, 1], memory-mapped: slice what is needed. Use as a context manager, or call close(): the
    temporary file goes with it (and with the process, in any case).
    """

    def __init__(self, path: Path, samples: Float32[np.ndarray, "n"], file):
        self.path = path
        self.samples = samples
        self._file = file

    @property
    def num_samples(self) -> int:
        return len(self.samples)

    @property
    def num_frames(self) -> int:
        """Frames at 25 fps that this sound asks for: a ceiling, the last one may be partly silent."""
        return math.ceil(self.num_samples / SAMPLES_PER_FRAME)

    def close(self) -> None:
        self.samples = np.zeros(0, np.float32)
        self._file.close()

    def __enter__(self) -> AudioTrack:
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def open_audio(path: str | Path) -> AudioTrack:
    """The sound of any media file at 16 kHz mono, from the file's common start to the end of the sound.

    Memory stays flat: the sound is decoded in a stream to an unnamed temporary file.
    Raises MediaError: no_audio, empty_audio, corrupt, not_finite, and what `probe` raises.
    """
    info = probe(path)
    file = tempfile.TemporaryFile(prefix="tccp-sound-")
    try:
        num_samples = 0
        for block in resampled(decode_sound(info, mono=True), info.audio_sample_rate_hz or 0):
            if not np.isfinite(block).all():
                raise MediaError(info.path, "not_finite", "its sound holds values that are not numbers; export it again")
            file.write(block.tobytes())
            num_samples += len(block)
        if num_samples == 0:
            raise MediaError(info.path, "empty_audio", "its audio track is empty; give a file with sound in it")
        file.flush()
        return AudioTrack(info.path, np.memmap(file, np.float32, "r", shape=(num_samples,)), file)
    except BaseException:
        file.close()
        raise


def decode_sound(info: MediaInfo, mono: bool) -> Iterator[Float32[np.ndarray, "channels n"]]:
    """The file's sound in blocks at its own rate, from the common start: silence before its first sample and in gaps.

    mono: one channel, else one or two as in the file (more than two are mixed down to two).
    """
    if not info.has_audio:
        raise no_stream(info.path, "audio")
    assert info.audio_sample_rate_hz is not None
    channels = 1 if mono or info.audio_channels == 1 else 2
    position = 0  # samples delivered so far
    with opened(info.path) as container:
        stream = pick_stream(container, info.path, "audio")
        # Two channels at most pass untouched. More are mixed by the resampler, whose 16-bit path scales so as not to clip.
        surround = info.audio_channels > 2
        to_float = av.AudioResampler("s16p" if surround else "fltp", "stereo" if surround else None)
        for frame in container.decode(stream):
            if frame.sample_rate != info.audio_sample_rate_hz or frame.layout.nb_channels != info.audio_channels:
                raise MediaError(info.path, "unsupported", "its sound changes rate or channels midway; convert it to WAV")
            start = position
            if frame.pts is not None:
                start = round((frame.pts * frame.time_base - info.start_s) * frame.sample_rate)
            played = _played_samples(frame)
            for part in to_float.resample(frame):
                block = part.to_ndarray()[:, :played]
                block = block.astype(np.float32) / 32768 if surround else block
                block = block.mean(axis=0, keepdims=True, dtype=np.float32) if channels == 1 else block
                stray = start - position
                if position == 0 or abs(stray) > _MAX_STRAY_S * frame.sample_rate:
                    while stray > 0:
                        silence = np.zeros((channels, min(stray, _BLOCK)), np.float32)
                        yield silence
                        position += silence.shape[1]
                        stray -= silence.shape[1]
                    block = block[:, -stray:] if stray < 0 else block
                position += block.shape[1]
                if block.shape[1]:
                    yield block


def _played_samples(frame: av.AudioFrame) -> int:
    """Samples of the frame that are meant to be heard: encoders fill the last frame up and shorten its duration.

    Only a duration shorter than the samples by more than a tick's rounding is such a cut.
    """
    if not frame.duration:
        return frame.samples
    played = frame.duration * frame.time_base * frame.sample_rate
    tick = max(1, frame.time_base * frame.sample_rate)
    return round(played) if played + tick < frame.samples else frame.samples


def resampled(blocks: Iterable[Float32[np.ndarray, "1 n"]], sample_rate_hz: int) -> Iterator[Float32[np.ndarray, "n"]]:
    """Mono blocks brought to 16 kHz: exactly ceil(n * 16000 / sample_rate_hz) samples in all, time zero kept."""
    resampler = av.AudioResampler("fltp", "mono", SAMPLE_RATE_HZ)
    given = delivered = 0

    def converted(frame: av.AudioFrame | None) -> Iterator[np.ndarray]:
        nonlocal delivered
        for part in resampler.resample(frame):
            out = part.to_ndarray()[0]
            if frame is None:
                out = out[: max(0, math.ceil(Fraction(given * SAMPLE_RATE_HZ, sample_rate_hz)) - delivered)]
            delivered += len(out)
            yield out

    for block in blocks:
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(block), "fltp", "mono")
        frame.sample_rate = sample_rate_hz
        given += block.shape[1]
        yield from converted(frame)
    if given:
        yield from converted(None)
        rest = math.ceil(Fraction(given * SAMPLE_RATE_HZ, sample_rate_hz)) - delivered
        if rest > 0:
            yield np.zeros(rest, np.float32)


def fit_samples(samples: Float[np.ndarray, "n"], num_frames: int) -> Float32[np.ndarray, "m"]:
    """Exactly num_frames * 640 samples: longer sound is cut, shorter is followed by silence."""
    fitted = np.zeros(num_frames * SAMPLES_PER_FRAME, np.float32)
    kept = samples[: len(fitted)]
    fitted[: len(kept)] = kept
    return fitted


def write_audio_wav(path: str | Path, samples: Float[np.ndarray, "n"]) -> None:
    """16 kHz mono samples in [-1, 1] as a 16-bit WAV file (values beyond are clipped). Raises TccpError if not writable."""
    try:
        with wave.open(str(path), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(SAMPLE_RATE_HZ)
            for start in range(0, len(samples), _BLOCK):
                block = np.asarray(samples[start : start + _BLOCK], np.float64)
                file.writeframes(np.round(np.clip(block, -1, 1) * 32767).astype("<i2").tobytes())
    except OSError as error:
        raise TccpError(f"{path}: cannot be written ({error.strerror}); choose a folder you can write to") from None
