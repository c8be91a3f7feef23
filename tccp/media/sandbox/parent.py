"""The parent's side: what tccp.media does, done by a child."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float32, UInt8

from tccp.config import FPS, SAMPLE_RATE_HZ
from tccp.errors import TccpError
from tccp.media import AudioTrack, MediaError, MediaInfo
from tccp.media.mel import check_audio
from tccp.media.sandbox.channel import Closed, Message, info_from_message, mapped, shared_memory
from tccp.media.sandbox.limits import Limits
from tccp.media.sandbox.process import Process

_SLOTS = 4  # pictures that the child may be ahead
_MOST_MEMORY = 256 << 20  # for them; of giant pictures fewer are kept, but two at least
_KEPT_MEMORY = 64 << 20  # more is given back before the next film
_SOUND_BLOCK = 1 << 18
_READ_BYTES_PER_S = 10e6
_ANSWER_S = 1.0
_SHORTEST_WAIT_S = 1e-3
_SEEK_GAP_FRAMES = 4 * FPS  # decoding on is cheaper than a seek to a keyframe some seconds back
_MOST_FRAMES_NAMED = 10_000  # in one message


class SoundFile(AudioTrack):
    """An AudioTrack with what check_audio had to say of it."""

    def __init__(self, path: Path, samples: Float32[np.ndarray, " n"], warnings: tuple[str, ...]):
        super().__init__(path, samples)
        self.warnings = warnings

    def __enter__(self) -> SoundFile:
        return self


class Decoder:
    """Decodes media files in a child process of its own: a context manager, for one thread at a time.

    The child starts with the first film and is replaced after a crash, after it fell silent and after every `recycle`
    films. threads: of FFmpeg; by default as many as tccp.media takes.

    Errors are those of tccp.media, word for word, and MediaErrors of four more reasons: unsafe (beyond the limits),
    too_slow, too_much_memory and decoder_crashed. RuntimeError: the child cannot be started at all.
    """

    def __init__(self, limits: Limits | None = None, threads: int | None = None, recycle: int = 200):
        self.limits = limits or Limits()
        self._threads, self._recycle = threads, recycle
        self._process: Process | None = None
        self._memory: UInt8[np.ndarray, " n"] = np.zeros(0, np.uint8)
        self._film: Path | None = None
        self._films = 0
        self._id = 0  # of the command that the child is at

    def __enter__(self) -> Decoder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the child. Sound that was handed out stays."""
        if self._process is not None:
            self._process.end()
        self._process, self._films, self._film = None, 0, None
        self._id += 1
        self._memory = np.zeros(0, np.uint8)

    def probe(self, path: str | Path) -> MediaInfo:
        """As tccp.media.probe."""
        return self._probe(Path(path), {})

    def sound(self, path: str | Path) -> SoundFile:
        """As tccp.media.open_audio, with the warnings of tccp.media.mel.check_audio; a context manager as well."""
        film = Path(path)
        most_bytes = 4 * SAMPLE_RATE_HZ * math.ceil(self.limits.max_duration_s)
        try:
            with tempfile.TemporaryFile(prefix="tccp-sound-") as file:
                num_bytes = 0
                for block in self._delivered(film, {"do": "sound"}, _SOUND_BLOCK):
                    file.write(block.data)
                    num_bytes += len(block)
                    if num_bytes > most_bytes:
                        raise self._nonsense(film)
                if num_bytes == 0 or num_bytes % 4:
                    raise self._nonsense(film)
                file.flush()
                # The mapping keeps the nameless file alive after it is closed here.
                samples = np.memmap(file, np.float32, "r", shape=(num_bytes // 4,))
        except OSError as error:
            folder = tempfile.gettempdir()
            raise TccpError(
                f"{path}: its sound cannot be unpacked into {folder} ({error.strerror}); make room or set TMPDIR"
            ) from None
        return SoundFile(film, samples, tuple(check_audio(samples)))

    def frames(
        self, path: str | Path, start_frame: int = 0, num_frames: int | None = None
    ) -> Generator[UInt8[np.ndarray, "h w 3"], None, None]:
        """As tccp.media.read_frames, bit for bit. The child decodes some pictures ahead.

        Only the newest of a decoder's iterators can go on: RuntimeError from the others.
        """
        film = Path(path)
        info = self._probe(film, {"start": start_frame, "count": num_frames})
        count = info.num_frames - start_frame if num_frames is None else num_frames
        return self._pictures(info, start_frame, count, None)

    def frames_at(
        self, path: str | Path, frames: Sequence[int]
    ) -> Generator[tuple[int, UInt8[np.ndarray, "h w 3"]], None, None]:
        """(frame, picture) for ascending frames of the 25 fps clock, in one pass with seeks over wide gaps."""
        film = Path(path)
        frames = [int(frame) for frame in frames]
        assert all(frame < later for frame, later in itertools.pairwise(frames)), "frames_at goes forward only"
        start = 0
        for end in range(1, len(frames) + 1):
            near = end < len(frames) and frames[end] - frames[end - 1] <= _SEEK_GAP_FRAMES
            if near and end - start < _MOST_FRAMES_NAMED:
                continue
            first, count = frames[start], frames[end - 1] - frames[start] + 1
            info = self._probe(film, {"start": first, "count": count})
            offsets = [frame - first for frame in frames[start:end]]
            yield from zip(frames[start:end], self._pictures(info, first, count, offsets), strict=True)
            start = end

    def _probe(self, film: Path, extra: Message) -> MediaInfo:
        patience = self._begin(film, {"do": "probe", **extra})
        answer = self._next(film, patience)
        try:
            return info_from_message(answer["info"], film)
        except (ValueError, TypeError, LookupError, ArithmeticError):
            raise self._nonsense(film) from None

    def _pictures(
        self, info: MediaInfo, start_frame: int, count: int, offsets: list[int] | None
    ) -> Generator[UInt8[np.ndarray, "h w 3"], None, None]:
        command = {"do": "frames", "start": start_frame, "count": count, "offsets": offsets}
        shape = info.height, info.width, 3
        missing = count if offsets is None else len(offsets)
        # Without a keyframe near the first of them, the film is decoded from its beginning.
        for data in self._delivered(info.path, command, math.prod(shape), extra_s=start_frame / FPS):
            if missing == 0 or len(data) != math.prod(shape):
                raise self._nonsense(info.path)
            missing -= 1
            yield data.reshape(shape)
        if missing:
            raise MediaError(info.path, "corrupt", f"its last {missing} pictures are missing; get a complete copy")

    def _delivered(
        self, film: Path, command: Message, slot_bytes: int, extra_s: float = 0.0
    ) -> Generator[UInt8[np.ndarray, " n"], None, None]:
        """What the child puts into the shared memory, each an array of its own, up to the end."""
        patience = self._begin(film, command, slot_bytes, extra_s)
        current = self._id
        try:
            while "end" not in (answer := self._next(film, patience)):
                try:
                    slot, num_bytes = int(answer["slot"]), int(answer["bytes"])
                except (ValueError, TypeError, LookupError):
                    raise self._nonsense(film) from None
                if not (0 <= slot < self._slots(slot_bytes) and 0 < num_bytes <= slot_bytes):
                    raise self._nonsense(film)
                data = self._memory[slot * slot_bytes :][:num_bytes].copy()
                self._tell(film, {"free": slot})
                yield data
                if self._id != current:
                    raise RuntimeError(f"{film}: this decoder has gone on to something else; use another one")
        finally:
            if self._id == current:
                with contextlib.suppress(MediaError):
                    self._tell(film, {"stop": True})

    def _begin(self, film: Path, command: Message, slot_bytes: int = 0, extra_s: float = 0.0) -> _Patience:
        """Gives the child something to do. A child that died while it was idle is replaced without a word."""
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
            needed = slot_bytes * self._slots(slot_bytes)
            descriptor = None
            if not needed <= len(self._memory) <= max(needed, _KEPT_MEMORY):
                descriptor = shared_memory(needed)
                self._memory = mapped(descriptor)
            message = {"id": self._id, "path": str(film.absolute()), **command}
            if slot_bytes:
                message |= {"slots": self._slots(slot_bytes), "slot_bytes": slot_bytes}
            try:
                self._process.channel.send(message, descriptor)
                return _Patience(self.limits, extra_s)
            except Closed:
                if fresh:
                    raise self._crashed(film, self._process.cause_of_death()) from None
                self.close()
            except TimeoutError:
                raise self._nonsense(film) from None
            finally:
                if descriptor is not None:
                    os.close(descriptor)

    def _slots(self, slot_bytes: int) -> int:
        return min(_SLOTS, max(2, _MOST_MEMORY // max(slot_bytes, 1)))

    def _tell(self, film: Path, message: Message) -> None:
        """If the child is dead, that shows when its next answer is waited for."""
        assert self._process is not None
        try:
            self._process.channel.send({"id": self._id, **message})
        except Closed:
            pass
        except TimeoutError:
            raise self._nonsense(film) from None

    def _next(self, film: Path, patience: _Patience) -> Message:
        """The child's next answer to the command that it is at."""
        assert self._process is not None
        while True:
            try:
                answer = patience.spend(self._process.channel.receive)
            except TimeoutError:
                what = f"nothing came out of it for {self.limits.stall_s:g} s and it was given up"
                raise self._lost(film, "too_slow", f"{what}; convert it to H.264 and AAC") from None
            except Closed:
                raise self._crashed(film, self._process.cause_of_death()) from None
            except ValueError:
                raise self._nonsense(film) from None
            if answer.get("id") != self._id:
                continue  # from before
            if "file_bytes" in answer:
                patience.extend(answer["file_bytes"])
            elif "error" in answer:
                raise self._error(film, answer["error"], " ".join(str(answer.get("problem")).split()))
            else:
                patience.answered()
                return answer

    def _error(self, film: Path, reason: object, problem: str) -> TccpError:
        if reason is None:
            return TccpError(f"{film}: {problem}")
        if reason == "too_much_memory":
            most = f"{self.limits.memory_bytes / (1 << 20):.0f} MiB"
            what = f"decoding it takes more memory than the limit, {most} (memory_bytes)"
            return self._lost(film, "too_much_memory", f"{what}: shrink the film, or allow more")
        if reason == "decoder_crashed":
            return self._crashed(film, problem)
        return MediaError(film, str(reason), problem)

    def _nonsense(self, film: Path) -> MediaError:
        return self._crashed(film, "nonsense came out of it")

    def _crashed(self, film: Path, what: str) -> MediaError:
        return self._lost(
            film, "decoder_crashed", f"decoding it crashed ({what}); restore it from its source, or convert it"
        )

    def _lost(self, film: Path, reason: str, problem: str) -> MediaError:
        """An error after which the child is no longer to be trusted."""
        self.close()
        return MediaError(film, reason, problem)


class _Patience:
    """How much longer the child may be waited for: limits.stall_s, and more where a file is read as a whole.

    Every answer buys a second, up to stall_s, so that a film cannot go on for ever at one picture a minute.
    """

    def __init__(self, limits: Limits, extra_s: float):
        self._limits = limits
        self._left_s = float(limits.stall_s) + extra_s
        self._extended = False

    def spend(self, receive: Callable[[float], Message]) -> Message:
        began = time.monotonic()
        try:
            return receive(max(self._left_s, _SHORTEST_WAIT_S))
        finally:
            self._left_s -= time.monotonic() - began

    def answered(self) -> None:
        self._left_s = max(self._left_s, min(self._left_s + _ANSWER_S, float(self._limits.stall_s)))

    def extend(self, file_bytes: object) -> None:
        """Once."""
        if isinstance(file_bytes, int) and not self._extended:
            self._left_s += min(max(file_bytes, 0), self._limits.max_file_bytes) / _READ_BYTES_PER_S
            self._extended = True
