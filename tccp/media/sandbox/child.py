"""The child process: `python -m tccp.media.sandbox.child SOCKET PARENT`. `process` starts it; it is no user command.

It works on one request at a time (probe, frames or sound). A new request ends the one before it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Generator, Iterator
from pathlib import Path

import av
import numpy as np
from jaxtyping import UInt8

from tccp.config import SAMPLE_RATE_HZ
from tccp.errors import TccpError
from tccp.media import MediaError, MediaInfo, pictures, probe, read_frames
from tccp.media.sandbox.channel import Channel, Closed, mapped
from tccp.media.sandbox.limits import Limits
from tccp.media.sandbox.messages import (
    LONGEST_PROBLEM,
    TO_CHILD,
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
    Ready,
    Request,
    SoundRequest,
    Start,
    Stop,
)
from tccp.media.sound import MonoSound
from tccp.media.source import checked_file, opened

_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
_WATCH_EVERY_S = 0.5
_OPEN_FILES = 64
# Formats whose header states the film's duration. In others FFmpeg guesses, which could reject a good film.
_STATES_DURATION = {"mov", "matroska", "avi", "flac"}
_LARGEST_ALLOCATION = 1 << 31  # bytes, the limit of av_malloc itself
_NO_MEMORY = MemoryError, BlockingIOError  # FFmpeg raises the latter (EAGAIN) if it gets no memory for a thread's stack
_NEARLY_ALL = 0.75  # share of the allowed memory in use: memory that was allocated but not written to does not count


class _Abandoned(Exception):
    """The parent has stopped the request; `message` is its next request, if there is one."""

    def __init__(self, message: Message | None):
        super().__init__()
        self.message = message


class _Server:
    def __init__(self, channel: Channel, limits: Limits):
        self._channel, self._limits = channel, limits
        self._memory: UInt8[np.ndarray, " n"] = np.zeros(0, np.uint8)
        self._idle_bytes = _status_bytes("VmRSS")

    def run(self) -> None:
        message: Message | None = None
        while True:
            message = message or self._receive(None)
            request, message = message, None
            if not isinstance(request, ProbeRequest | FramesRequest | SoundRequest):
                continue  # `Free` or `Stop` for a request that has ended
            try:
                self._answer(request)
            except _Abandoned as abandoned:
                message = abandoned.message

    def _receive(self, timeout_s: float | None) -> Message:
        message, descriptor = self._channel.receive_with_descriptor(TO_CHILD.validate_json, timeout_s)
        if descriptor is not None:
            self._memory = mapped(descriptor)
            os.close(descriptor)
        return message

    def _answer(self, request: ProbeRequest | FramesRequest | SoundRequest) -> None:
        path = Path(os.fsdecode(request.path))
        with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as peak:
            peak.write("5")
        answer: Answer
        try:
            match request:
                case ProbeRequest():
                    answer = self._probe(path, request)
                case FramesRequest():
                    answer = self._frames(path, request)
                case SoundRequest():
                    answer = self._sound(path, request)
        except MediaError as error:
            reason = "too_much_memory" if self._was_memory(error) else error.reason
            answer = _failure(request, reason, error.problem)
        except TccpError as error:
            answer = _failure(request, None, str(error).removeprefix(f"{path}: "))
        except _NO_MEMORY:
            answer = _failure(request, "too_much_memory", "")
        except (_Abandoned, Closed):
            raise
        except Exception as error:  # an error that tccp.media did not expect must cost one file, not the run
            answer = _failure(request, "decoder_crashed", f"{type(error).__name__}: {error}")
        self._channel.send(answer)

    def _probe(self, path: Path, request: ProbeRequest) -> MediaAnswer:
        info = self._checked(path, request)
        if request.start_frame is not None:  # read_frames checks the range when it is called
            read_frames(path, request.start_frame, request.num_frames)
        return MediaAnswer.of(request.id, info)

    def _frames(self, path: Path, request: FramesRequest) -> End:
        self._checked(path, request)
        wanted = None if request.offsets is None else iter(request.offsets)
        self._deliver(request, _picked(read_frames(path, request.start_frame, request.num_frames), wanted))
        return End(id=request.id)

    def _sound(self, path: Path, request: SoundRequest) -> End:
        info = self._checked(path, request)
        sound = MonoSound(info)
        self._deliver(request, self._samples(info, sound, request.slot_bytes // 4))
        return End(id=request.id, notes=tuple(sound.notes))

    def _samples(self, info: MediaInfo, sound: MonoSound, most: int) -> Generator[np.ndarray, None, None]:
        """The sound in blocks of up to `most` samples."""
        num_samples = 0
        for block in sound:
            num_samples += len(block)
            self._check_duration(info.path, num_samples / SAMPLE_RATE_HZ)
            for start in range(0, len(block), most):
                yield block[start : start + most]

    def _deliver(self, request: Delivery, items: Generator[np.ndarray, None, None]) -> None:
        """Writes each item into a free slot. Waits for the parent to free one if there is none."""
        free = list(range(request.slots))
        with contextlib.closing(items):
            for item in items:
                while True:
                    try:
                        message = self._receive(0 if free else None)
                    except TimeoutError:
                        break
                    if isinstance(message, Free) and message.id == request.id:
                        free.append(message.slot)
                    else:
                        raise _Abandoned(None if isinstance(message, Stop) else message)
                slot = free.pop()
                start = slot * request.slot_bytes
                self._memory[start : start + item.nbytes].view(item.dtype).reshape(item.shape)[...] = item
                self._channel.send(Block(id=request.id, slot=slot, num_bytes=item.nbytes))

    def _checked(self, path: Path, request: Request) -> MediaInfo:
        """Like `probe`, but raises MediaError `unsafe` as early as possible for a file beyond the limits."""
        file = checked_file(path)
        status = file.stat()
        if status.st_size > self._limits.max_file_bytes:
            raise _unsafe(
                path, f"it is a file of {status.st_size} bytes", self._limits.max_file_bytes, "max_file_bytes"
            )
        self._channel.send(FileSize(id=request.id, num_bytes=status.st_size))
        self._check_header(file.absolute(), status.st_size, status.st_mtime_ns)
        info = probe(path)
        self._check_pixels(path, info.width, info.height)
        self._check_duration(path, info.duration_s)
        if info.audio_sample_rate_hz > self._limits.max_sample_rate_hz:  # the resampler's filters grow with it
            what = f"its sound has {info.audio_sample_rate_hz} samples a second"
            raise _unsafe(path, what, self._limits.max_sample_rate_hz, "max_sample_rate_hz")
        return info

    @functools.lru_cache(maxsize=256)  # noqa: B019 - there is one server, and it lives as long as the process
    def _check_header(self, path: Path, size: int, mtime_ns: int) -> None:
        with opened(path) as container:
            if len(container.streams) > self._limits.max_streams:
                what = f"it has {len(container.streams)} streams"
                raise _unsafe(path, what, self._limits.max_streams, "max_streams")
            for stream in container.streams.video:
                if stream.codec_context is not None:
                    self._check_pixels(path, stream.codec_context.width, stream.codec_context.height)
            if container.duration is not None and _STATES_DURATION & set(container.format.name.split(",")):
                self._check_duration(path, container.duration / av.time_base)

    def _check_pixels(self, path: Path, width: int, height: int) -> None:
        if width * height > self._limits.max_pixels:
            raise _unsafe(path, f"its pictures are {width}x{height}", self._limits.max_pixels, "max_pixels")

    def _check_duration(self, path: Path, duration_s: float) -> None:
        if duration_s > self._limits.max_duration_s:
            what = f"it lasts {duration_s:.0f} s"
            raise _unsafe(path, what, self._limits.max_duration_s, "max_duration_s")

    def _was_memory(self, error: MediaError) -> bool:
        """Whether the limit on memory probably caused the error.

        Some decoders that get no memory report a damaged file. And FFmpeg reports a lack of memory where a damaged
        header asks for more than av_malloc's own limit.
        """
        used = _status_bytes("VmHWM") - self._idle_bytes
        if isinstance(error.__context__, _NO_MEMORY):
            return used + _LARGEST_ALLOCATION > self._limits.memory_bytes
        return error.reason == "corrupt" and used > _NEARLY_ALL * self._limits.memory_bytes


def _picked(frames: Iterator[np.ndarray], offsets: Iterator[int] | None) -> Generator[np.ndarray, None, None]:
    """The frames at ascending `offsets` (None: all)."""
    if offsets is None:
        yield from frames
        return
    due = next(offsets, None)
    for offset, picture in enumerate(frames):
        if offset == due:
            yield picture
            due = next(offsets, None)


def _unsafe(path: Path, what: str, limit: float, name: str) -> MediaError:
    return MediaError(
        path, "unsafe", f"{what}; the limit is {limit:.12g} ({name}): cut or shrink the film, or allow more"
    )


def _failure(request: Request, reason: str | None, problem: str) -> Failure:
    encodable = problem.encode("utf-8", "backslashreplace").decode()  # file names need not be valid UTF-8
    return Failure(id=request.id, reason=reason, problem=encodable[:LONGEST_PROBLEM])


def _status_bytes(name: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(f"{name}:"))


def _end_with(parent: int, signalled: bool) -> None:
    """Ends this process when its parent ends, even in the middle of decoding.

    signalled: let the kernel also send a signal, which works without a thread. The kernel sends it when the *thread*
    that started this process ends, so use it only if that was the parent's main thread.
    """
    if signalled:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_WATCH_EVERY_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _give_up_rights(limits: Limits) -> None:
    """From here on this process can write no files, dump no core and take no memory beyond the limit."""
    sys.dont_write_bytecode = True
    ctypes.CDLL(None).prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    for kind, most in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, _OPEN_FILES),
        (resource.RLIMIT_DATA, _status_bytes("VmData") + limits.memory_bytes),
    ):
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
        score.write("1000")  # if memory runs out all the same, the kernel ends this process rather than its parent


def main(descriptor: str, parent: str, signalled: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles interrupts
    _end_with(int(parent), signalled == "signalled")
    channel = Channel(socket.socket(fileno=int(descriptor)))
    with contextlib.suppress(Closed):
        start = channel.receive(Start.model_validate_json)
        if start.threads is not None:
            pictures.MAX_THREADS = start.threads
        _give_up_rights(start.limits)
        with open(os.devnull, "r+b") as nowhere:  # FFmpeg's messages must not reach the user's terminal
            os.dup2(nowhere.fileno(), 2)
        channel.send(Ready())
        _Server(channel, start.limits).run()


if __name__ == "__main__":
    main(*sys.argv[1:])
