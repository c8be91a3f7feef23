"""The parent's side: the functions of tccp.media, carried out by a child process."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from jaxtyping import Float32, UInt8

from tccp.config import FPS, SAMPLE_RATE_HZ
from tccp.errors import TccpError
from tccp.media import AudioTrack, MediaError, MediaInfo
from tccp.media.mel import check_audio
from tccp.media.sandbox.channel import Closed, mapped, shared_memory
from tccp.media.sandbox.limits import Limits
from tccp.media.sandbox.messages import (
    MOST_FRAMES_LISTED,
    TO_PARENT,
    Answer,
    Block,
    Delivery,
    End,
    Failure,
    FileSize,
    FramesRequest,
    Free,
    MediaAnswer,
    Message,
    ProbeRequest,
    Request,
    SoundRequest,
    Stop,
)
from tccp.media.sandbox.process import Process

_SLOTS = 4  # pictures that the child may decode ahead
_MOST_MEMORY = 256 << 20  # bytes for the slots; very large pictures get fewer slots, but at least two
_KEPT_MEMORY = 64 << 20  # bytes; larger shared memory is released before the next film
_SOUND_BLOCK = 1 << 18  # bytes
_READ_BYTES_PER_S = 10e6
_ANSWER_S = 1.0
_SHORTEST_WAIT_S = 1e-3
_SEEK_GAP_FRAMES = 4 * FPS  # over a smaller gap, decoding on costs less than a seek to a keyframe some seconds back
Received = TypeVar("Received")


class SoundFile(AudioTrack):
    """An AudioTrack with `warnings`: its notes and those of `check_audio`."""

    def __init__(self, path: Path, samples: Float32[np.ndarray, " n"], notes: tuple[str, ...]):
        super().__init__(path, samples, notes)
        self.warnings = (*notes, *check_audio(samples))

    def __enter__(self) -> SoundFile:
        return self


class Decoder:
    """Decodes media files in a child process of its own. Use as a context manager and from one thread at a time.

    The child starts with the first film. It is replaced after a crash, after it stopped answering, and after every
    `recycle` films. threads: FFmpeg's threads (None: the default of tccp.media).

    Methods raise the errors of tccp.media with the same text, and MediaError with four more reasons: unsafe (beyond the
    limits), too_slow, too_much_memory and decoder_crashed. They raise RuntimeError if the child cannot be started.
    """

    def __init__(self, limits: Limits | None = None, threads: int | None = None, recycle: int = 200):
        self.limits = limits or Limits()
        self._threads, self._recycle = threads, recycle
        self._process: Process | None = None
        self._memory: UInt8[np.ndarray, " n"] = np.zeros(0, np.uint8)
        self._film: Path | None = None
        self._films = 0
        self._id = 0  # of the request that the child works on
        self._notes: tuple[str, ...] = ()  # of the last delivery

    def __enter__(self) -> Decoder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the child. Sound from `sound` stays usable."""
        if self._process is not None:
            self._process.end()
        self._process, self._films, self._film = None, 0, None
        self._id += 1
        self._memory = np.zeros(0, np.uint8)

    def probe(self, path: str | Path) -> MediaInfo:
        """Like tccp.media.probe."""
        return self._probe(Path(path))

    def sound(self, path: str | Path) -> SoundFile:
        """Like tccp.media.open_audio, with the warnings of tccp.media.mel.check_audio. A context manager as well."""
        film = Path(path)
        most_bytes = 4 * SAMPLE_RATE_HZ * math.ceil(self.limits.max_duration_s)
        try:
            with tempfile.TemporaryFile(prefix="tccp-sound-") as file:
                num_bytes = 0
                for block in self._delivered(film, SoundRequest, _SOUND_BLOCK):
                    file.write(block.data)
                    num_bytes += len(block)
                    if num_bytes > most_bytes:
                        raise self._invalid_answer(film)
                if num_bytes == 0 or num_bytes % 4:
                    raise self._invalid_answer(film)
                file.flush()
                # The mapping keeps the unnamed file alive after it is closed here.
                samples = np.memmap(file, np.float32, "r", shape=(num_bytes // 4,))
        except OSError as error:
            folder = tempfile.gettempdir()
            raise TccpError(
                f"{path}: its sound cannot be unpacked into {folder} ({error.strerror}); make room or set TMPDIR"
            ) from None
        return SoundFile(film, samples, self._notes)

    def frames(
        self, path: str | Path, start_frame: int = 0, num_frames: int | None = None
    ) -> Generator[UInt8[np.ndarray, "h w 3"], None, None]:
        """Like tccp.media.read_frames, with equal pictures. The child decodes some pictures ahead.

        Only the newest iterator of a decoder can continue. The others raise RuntimeError.
        """
        film = Path(path)
        info = self._probe(film, start_frame, num_frames)
        count = info.num_frames - start_frame if num_frames is None else num_frames
        return self._pictures(info, start_frame, count, None)

    def frames_at(
        self, path: str | Path, frames: Sequence[int]
    ) -> Generator[tuple[int, UInt8[np.ndarray, "h w 3"]], None, None]:
        """(frame, picture) for ascending frames of the 25 fps clock, in one pass with seeks over wide gaps."""
        film = Path(path)
        frames = [int(frame) for frame in frames]
        assert all(frame < later for frame, later in itertools.pairwise(frames)), "frames_at takes ascending frames"
        start = 0
        for end in range(1, len(frames) + 1):
            near = end < len(frames) and frames[end] - frames[end - 1] <= _SEEK_GAP_FRAMES
            if near and end - start < MOST_FRAMES_LISTED:
                continue
            first, count = frames[start], frames[end - 1] - frames[start] + 1
            info = self._probe(film, first, count)
            offsets = [frame - first for frame in frames[start:end]]
            yield from zip(frames[start:end], self._pictures(info, first, count, offsets), strict=True)
            start = end

    def _probe(self, film: Path, start_frame: int | None = None, num_frames: int | None = None) -> MediaInfo:
        patience = self._begin(film, ProbeRequest, start_frame=start_frame, num_frames=num_frames)
        answer = self._next(film, patience)
        if not isinstance(answer, MediaAnswer):
            raise self._invalid_answer(film)
        info = answer.media_info(film)
        if (
            info.width * info.height > self.limits.max_pixels
            or info.duration_s > self.limits.max_duration_s
            or info.audio_sample_rate_hz > self.limits.max_sample_rate_hz
        ):  # the child has checked this, unless the file has taken control of it
            raise self._invalid_answer(film)
        return info

    def _pictures(
        self, info: MediaInfo, start_frame: int, count: int, offsets: list[int] | None
    ) -> Generator[UInt8[np.ndarray, "h w 3"], None, None]:
        shape = info.height, info.width, 3
        if math.prod(shape) == 0 or count < 0:
            raise self._invalid_answer(info.path)
        missing = count if offsets is None else len(offsets)
        blocks = self._delivered(
            info.path,
            FramesRequest,
            math.prod(shape),
            extra_s=start_frame / FPS,  # without a keyframe nearby, the child decodes from the film's beginning
            start_frame=start_frame,
            num_frames=count,
            offsets=None if offsets is None else tuple(offsets),
        )
        for data in blocks:
            if missing == 0 or len(data) != math.prod(shape):
                raise self._invalid_answer(info.path)
            missing -= 1
            yield data.reshape(shape)
        if missing:
            raise MediaError(info.path, "corrupt", f"its last {missing} pictures are missing; get a complete copy")

    def _delivered(
        self, film: Path, kind: type[Delivery], slot_bytes: int, extra_s: float = 0.0, **fields: object
    ) -> Generator[UInt8[np.ndarray, " n"], None, None]:
        """Copies of the blocks that the child writes into the shared memory, until it reports the end."""
        slots = min(_SLOTS, max(2, _MOST_MEMORY // max(slot_bytes, 1)))
        patience = self._begin(film, kind, slots * slot_bytes, extra_s, slots=slots, slot_bytes=slot_bytes, **fields)
        current = self._id
        try:
            while not isinstance(answer := self._next(film, patience), End):
                if not isinstance(answer, Block) or answer.slot >= slots or answer.num_bytes > slot_bytes:
                    raise self._invalid_answer(film)
                data = self._memory[answer.slot * slot_bytes :][: answer.num_bytes].copy()
                self._send(film, Free(id=current, slot=answer.slot))
                yield data
                if self._id != current:
                    raise RuntimeError(f"{film}: this decoder has gone on to something else; use another one")
            self._notes = answer.notes
        finally:
            if self._id == current:
                with contextlib.suppress(MediaError):
                    self._send(film, Stop(id=current))

    def _begin(
        self, film: Path, kind: type[Request], memory_bytes: int = 0, extra_s: float = 0.0, **fields: object
    ) -> _Patience:
        """Sends the child a request. Replaces a child that died while it was idle.

        memory_bytes: how much shared memory the answers need.
        """
        foreign = self._process is not None and self._process.owner != os.getpid()
        if foreign or (film != self._film and self._films >= self._recycle):
            self.close()
        while True:
            fresh = self._process is None
            if self._process is None:
                self._process = Process(self.limits, self._threads)
            if film != self._film:
                self._film, self._films = film, self._films + 1
            self._id += 1
            descriptor = None
            if not memory_bytes <= len(self._memory) <= max(memory_bytes, _KEPT_MEMORY):
                descriptor = shared_memory(memory_bytes)
                self._memory = mapped(descriptor)
            request = kind.model_validate({"id": self._id, "path": os.fsencode(film.absolute()), **fields})
            try:
                self._process.channel.send(request, descriptor)
                return _Patience(self.limits, extra_s)
            except Closed:
                if fresh:
                    raise self._crashed(film, self._process.cause_of_death()) from None
                self.close()
            except TimeoutError:
                raise self._invalid_answer(film) from None
            finally:
                if descriptor is not None:
                    os.close(descriptor)

    def _send(self, film: Path, message: Message) -> None:
        """If the child is dead, the wait for its next answer reports that."""
        assert self._process is not None
        try:
            self._process.channel.send(message)
        except Closed:
            pass
        except TimeoutError:
            raise self._invalid_answer(film) from None

    def _next(self, film: Path, patience: _Patience) -> Answer:
        """The child's next answer to the current request. Raises the error that it reports."""
        assert self._process is not None
        channel = self._process.channel
        while True:
            try:
                answer = patience.spend(lambda timeout_s: channel.receive(TO_PARENT.validate_json, timeout_s))
            except TimeoutError:
                what = f"nothing came out of it for {self.limits.stall_s:g} s and it was given up"
                raise self._lost(film, "too_slow", f"{what}; convert it to H.264 and AAC") from None
            except Closed:
                raise self._crashed(film, self._process.cause_of_death()) from None
            except ValueError:
                raise self._invalid_answer(film) from None
            if answer.id != self._id:
                continue  # it belongs to an earlier request
            if isinstance(answer, FileSize):
                patience.extend(answer.num_bytes)
            elif isinstance(answer, Failure):
                raise self._error(film, answer.reason, " ".join(answer.problem.split()))
            else:
                patience.answered()
                return answer

    def _error(self, film: Path, reason: str | None, problem: str) -> TccpError:
        if reason is None:
            return TccpError(f"{film}: {problem}")
        if reason == "too_much_memory":
            most = f"{self.limits.memory_bytes / (1 << 20):.0f} MiB"
            what = f"decoding it takes more memory than the limit, {most} (memory_bytes)"
            return self._lost(film, "too_much_memory", f"{what}: shrink the film, or allow more")
        if reason == "decoder_crashed":
            return self._crashed(film, problem)
        return MediaError(film, reason, problem)

    def _invalid_answer(self, film: Path) -> MediaError:
        return self._crashed(film, "the decoding process sent an invalid answer")

    def _crashed(self, film: Path, what: str) -> MediaError:
        return self._lost(
            film, "decoder_crashed", f"decoding it crashed ({what}); restore it from its source, or convert it"
        )

    def _lost(self, film: Path, reason: str, problem: str) -> MediaError:
        """An error after which the child cannot be trusted, so it is ended."""
        self.close()
        return MediaError(film, reason, problem)


class _Patience:
    """How much longer to wait for the child: limits.stall_s, and more where it reads a whole file.

    Every answer adds a second, up to stall_s, so that a film cannot continue for ever at one picture a minute.
    """

    def __init__(self, limits: Limits, extra_s: float):
        self._limits = limits
        self._left_s = float(limits.stall_s) + extra_s
        self._extended = False

    def spend(self, receive: Callable[[float], Received]) -> Received:
        began = time.monotonic()
        try:
            return receive(max(self._left_s, _SHORTEST_WAIT_S))
        finally:
            self._left_s -= time.monotonic() - began

    def answered(self) -> None:
        self._left_s = max(self._left_s, min(self._left_s + _ANSWER_S, float(self._limits.stall_s)))

    def extend(self, file_bytes: int) -> None:
        """Adds the time to read a file of this size. Only the first call counts."""
        if not self._extended:
            self._left_s += min(file_bytes, self._limits.max_file_bytes) / _READ_BYTES_PER_S
            self._extended = True
