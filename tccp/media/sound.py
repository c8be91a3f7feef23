"""Decodes sound as a stream to 16 kHz mono, timed on the file's clock, and keeps it on disk."""

from __future__ import annotations

import math
import tempfile
import wave
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from jaxtyping import Float, Float32

from tccp.clock import SAMPLE_RATE_HZ, SAMPLES_PER_FRAME
from tccp.errors import TccpError
from tccp.media.mix import Mix, choose_mix
from tccp.media.source import MediaError, MediaInfo, no_stream, opened, pick_audio, probe
from tccp.media.timeline import carried_on

# Smaller differences between timestamps and sample count are rounding or jitter. Larger ones are gaps or overlaps.
_MAX_STRAY_S = Fraction(1, 50)
_LOOK_AHEAD_S = Fraction(3, 10)  # of a gap or overlap: it must last as long
_MOST_SKIPPED = 0.01  # share of packets that may be undecodable, besides a single one
_BLOCK = 1 << 16


class AudioTrack:
    """16 kHz mono sound on disk. Sample 0 lies at the start of the source file's clock (`MediaInfo.zero`).

    samples: in [-1, 1], memory-mapped, so slice what you need. notes: how the delivered sound differs from the stored
    one, one sentence each: the choice of channels, gaps, overlaps, packets that were skipped. Use as a context manager
    or call close() to free the temporary file. It also disappears when the process ends.
    """

    def __init__(self, path: Path, samples: Float32[np.ndarray, "n"], notes: tuple[str, ...] = ()):
        self.path = path
        self.samples = samples
        self.notes = notes

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
    """The sound of any media file at 16 kHz mono, from the start of the file's clock to the end of the sound.

    Memory use does not grow with length: the sound goes into an unnamed temporary file in TMPDIR (64 kB a second).
    Raises MediaError no_audio, empty_audio, corrupt or not_finite, and like `probe`; TccpError if the disk is full.
    """
    info = probe(path)
    num_samples = 0
    try:
        with tempfile.TemporaryFile(prefix="tccp-sound-") as file:
            sound = MonoSound(info)
            for block in sound:
                file.write(block.tobytes())
                num_samples += len(block)
            file.flush()
            # The mapping keeps the unnamed file alive after it is closed here.
            samples = np.memmap(file, np.float32, "r", shape=(num_samples,))
            return AudioTrack(info.path, samples, tuple(sound.notes))
    except OSError as error:
        folder = tempfile.gettempdir()
        raise TccpError(
            f"{path}: its sound cannot be unpacked into {folder} ({error.strerror}); make room or set TMPDIR"
        ) from None


class MonoSound:
    """The sound of `open_audio`, block by block. Iterate once; `notes` is complete after the last block.

    Raises MediaError no_audio, empty_audio, corrupt or not_finite while iterating.
    """

    def __init__(self, info: MediaInfo):
        self.notes: list[str] = []
        self._info = info

    def __iter__(self) -> Iterator[Float32[np.ndarray, "n"]]:
        info = self._info
        if info.audio_span is None:
            raise no_stream(info.path, "audio")
        mix, changes = mix_of(info), SoundChanges()
        if mix.note:
            self.notes.append(mix.note)
        empty = True
        mono = (mix(block) for block in decode_sound(info, changes))
        for block in resampled(mono, info.audio_sample_rate_hz):
            if not np.isfinite(block).all():
                raise MediaError(
                    info.path, "not_finite", "its sound holds values that are not numbers; export it again"
                )
            empty = empty and not block.size
            yield block[0]
        if empty:
            raise MediaError(info.path, "empty_audio", "its audio track is empty; give a file with sound in it")
        self.notes += changes.notes(info.audio_sample_rate_hz)


def mix_of(info: MediaInfo) -> Mix:
    """How to mix the file's channels to one. Decodes the whole sound, unless it has one channel."""
    if info.audio_channels == 1:
        return Mix(np.ones(1, np.float32))
    return choose_mix(decode_sound(info), info.channel_names, info.audio_sample_rate_hz)


@dataclass
class SoundChanges:
    """How delivered sound differs from stored sound, in samples.

    filled: silence in gaps. cut: sound that overlaps sound before it. skipped: packets that cannot be decoded.
    """

    filled: int = 0
    cut: int = 0
    skipped: int = 0

    def notes(self, sample_rate_hz: int) -> list[str]:
        found = []
        if self.skipped:
            found.append(f"{self.skipped} of the packets of its sound could not be decoded and are left out")
        if self.filled:
            found.append(f"gaps in its sound are filled with {self.filled / sample_rate_hz:.3f} s of silence")
        if self.cut:
            found.append(f"{self.cut / sample_rate_hz:.3f} s of its sound overlap what comes before and are cut")
        return found


def decode_sound(info: MediaInfo, changes: SoundChanges | None = None) -> Iterator[Float32[np.ndarray, "channels n"]]:
    """The file's sound in blocks, with its own rate and channels, from the start of the clock (`MediaInfo.zero`).

    Samples that follow each other in the stream stay together. Silence fills the time before the sound, and gaps.
    changes: counts what is filled, cut and skipped. Raises MediaError no_audio or corrupt.
    """
    if info.audio_span is None:
        raise no_stream(info.path, "audio")
    changes = SoundChanges() if changes is None else changes
    channels, rate_hz = info.audio_channels, info.audio_sample_rate_hz
    position = 0  # samples delivered so far
    most_stray = _MAX_STRAY_S * rate_hz
    waiting: deque[_Block] = deque()
    blocks = _decoded(info, changes)
    ended = False
    while True:
        while not ended and (not waiting or _is_stray(waiting[0], position, most_stray)):
            if sum(block.samples.shape[1] for block in waiting) > _LOOK_AHEAD_S * rate_hz:
                break
            following = next(blocks, None)
            ended = following is None
            if following is not None:
                waiting.append(following)
        if not waiting:
            return
        if position == 0 and waiting[0].first:
            lead = max(waiting[0].position or 0, 0)
            for count in _steps(lead):
                yield np.zeros((channels, count), np.float32)
            position += lead
        elif _is_stray(waiting[0], position, most_stray):
            stray = _lasting_stray(waiting, position, most_stray)
            changes.filled += max(stray, 0)
            for count in _steps(stray):
                yield np.zeros((channels, count), np.float32)
            position += max(stray, 0)
            changes.cut += _cut(waiting, -stray)
        if waiting:
            block = waiting.popleft().samples
            position += block.shape[1]
            if block.size:
                yield block


class _Block(NamedTuple):
    """Decoded samples and their place on the clock, in samples. first: of the stream."""

    samples: Float32[np.ndarray, "channels n"]
    position: int | None
    first: bool


def _is_stray(block: _Block, position: int, most: Fraction) -> bool:
    return not block.first and block.position is not None and abs(block.position - position) > most


def _lasting_stray(waiting: Iterable[_Block], position: int, most: Fraction) -> int:
    """How far all these blocks lie after (before, if negative) the samples delivered. 0 if only some do.

    Timestamps that are wrong for a few blocks are no gap. FFmpeg's parser of Vorbis, for example, gives wrong
    durations where blocks change their size.
    """
    strays = []
    for block in waiting:
        if block.position is not None:
            strays.append(block.position - position)
        position += block.samples.shape[1]
    if min(strays) > most:
        return min(strays)
    if max(strays) < -most:
        return max(strays)
    return 0


def _cut(waiting: deque[_Block], count: int) -> int:
    """Removes the first `count` samples of the blocks. Returns how many there were."""
    removed = 0
    while waiting and removed < count:
        samples, position, first = waiting.popleft()
        part = min(count - removed, samples.shape[1])
        removed += part
        if part < samples.shape[1]:
            at = None if position is None else position + part
            waiting.appendleft(_Block(samples[:, part:], at, first))
    return removed


def _decoded(info: MediaInfo, changes: SoundChanges) -> Iterator[_Block]:
    """All decoded samples, in order."""
    to_floats = av.AudioResampler("flt")
    first, held = True, None
    with opened(info.path) as container:
        stream = pick_audio(container)
        assert stream is not None
        for frame in _frames(container.demux(stream), info, changes):
            if (frame.sample_rate, frame.layout.nb_channels) != (info.audio_sample_rate_hz, info.audio_channels):
                raise MediaError(
                    info.path, "unsupported", "its sound changes rate or channels midway; convert it to WAV"
                )
            if held is not None:
                yield _block(held, held.samples, first, info, to_floats)
                first = False
            held = frame
        if held is not None:  # only at the end of the stream does a short duration mark padding
            yield _block(held, _audible_samples(held), first, info, to_floats)


def _frames(packets: Iterable[av.Packet], info: MediaInfo, changes: SoundChanges) -> Iterator[av.AudioFrame]:
    """Decodes packets. Skips single packets that cannot be decoded, such as tags between joined MP3 files."""
    number = 0
    for number, packet in enumerate(carried_on(packets, info.audio_restarts), 1):
        try:
            frames: list[Any] = packet.decode()  # its type is that of all kinds of frames at once
        except av.error.InvalidDataError:
            changes.skipped += 1
            if changes.skipped > 1 + _MOST_SKIPPED * number:
                raise
            continue
        yield from frames


def _block(
    frame: av.AudioFrame, num_samples: int, first: bool, info: MediaInfo, to_floats: av.AudioResampler
) -> _Block:
    position = None
    if frame.pts is not None and frame.time_base is not None:
        position = round((frame.pts * frame.time_base - info.zero) * info.audio_sample_rate_hz)
    samples = _samples(to_floats.resample(frame), info.audio_channels)
    return _Block(samples[:, :num_samples], position, first)


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


def audio_frame(samples: Float32[np.ndarray, "channels n"], layout: str, sample_rate_hz: int) -> av.AudioFrame:
    """A frame of interleaved samples. PyAV (18.1) cannot convert frames of eight planes or more from and to arrays."""
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples.T).reshape(1, -1), "flt", layout)
    frame.sample_rate = sample_rate_hz
    return frame


def _samples(frames: list[av.AudioFrame], num_channels: int) -> Float32[np.ndarray, "channels n"]:
    """The samples of frames of interleaved samples."""
    parts = [frame.to_ndarray().reshape(-1, num_channels) for frame in frames]
    joined = np.concatenate(parts) if parts else np.zeros((0, num_channels), np.float32)
    return np.ascontiguousarray(joined.T, np.float32)


def resampled(
    blocks: Iterable[Float32[np.ndarray, "channels n"]],
    sample_rate_hz: int,
    to_rate_hz: int = SAMPLE_RATE_HZ,
    layout: str = "mono",
) -> Iterator[Float32[np.ndarray, "channels n"]]:
    """Resamples blocks without a delay: exactly ceil(n * to_rate_hz / sample_rate_hz) samples in all.

    layout: FFmpeg's name of the channels of the blocks.
    """
    resampler = av.AudioResampler("flt", layout, to_rate_hz)
    given = delivered = 0
    num_channels = 1
    for block in blocks:
        num_channels = len(block)
        given += block.shape[1]
        part = _samples(resampler.resample(audio_frame(block, layout, sample_rate_hz)), num_channels)
        delivered += part.shape[1]
        yield part
    if given:
        rest = math.ceil(Fraction(given * to_rate_hz, sample_rate_hz)) - delivered
        tail = _samples(resampler.resample(None), num_channels)
        yield np.pad(tail, ((0, 0), (0, max(0, rest - tail.shape[1]))))[:, : max(rest, 0)]


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
