"""The child process: `python -m tccp.media.sandbox.child SOCKET PARENT`. `process` starts it; it is no user command.

It works on one request at a time. A new request ends the one before it. It reads only the file whose descriptor came
with the request. Everything that decoding needs is imported before the kernel confines the process (`confinement`).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import os
import pkgutil
import resource
import signal
import socket
import stat
import sys
import threading
import time
import warnings
from collections.abc import Generator, Iterator
from pathlib import Path

import av
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from tccp.clock import SAMPLE_RATE_HZ
from tccp.errors import TccpError
from tccp.media import MediaError, MediaInfo, pictures, probe, read_frames
from tccp.media.file_access import FileStatus, file_status, grant, open_nothing_by_path
from tccp.media.film_sound import film_sound
from tccp.media.sandbox.channel import Channel, Closed, mapped
from tccp.media.sandbox.confinement import confine
from tccp.media.sandbox.limits import Limits
from tccp.media.sandbox.messages import (
    LONGEST_PROBLEM,
    TO_CHILD,
    Answer,
    Block,
    Delivery,
    End,
    Failure,
    FilmSoundRequest,
    FramesRequest,
    Free,
    MediaAnswer,
    PictureAnswer,
    PictureRequest,
    PixelsRequest,
    ProbeRequest,
    Ready,
    Request,
    SoundFormat,
    SoundRequest,
    Start,
    Stop,
    ToChild,
)
from tccp.media.sound import MonoSound
from tccp.media.source import checked_file, opened
from tccp.media.still_pictures import Still, read_picture

_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
_WATCH_EVERY_S = 0.5
_LONGEST_WAIT_S = 0.25  # of a finished picture for others, before the parent gets it
_OPEN_FILES = 64
# Formats whose header states the film's duration. In others FFmpeg guesses, which could reject a good film.
_STATES_DURATION = {"mov", "matroska", "avi", "flac"}
_LARGEST_ALLOCATION = 1 << 31  # bytes, the limit of av_malloc itself
_NO_MEMORY = MemoryError, BlockingIOError  # FFmpeg raises the latter (EAGAIN) if it gets no memory for a thread's stack
_NEARLY_ALL = 0.75  # share of the allowed memory in use: memory that was allocated but not written to does not count


class _Abandoned(Exception):
    """The parent has stopped the request; `message` is its next request, if there is one."""

    def __init__(self, message: ToChild | None):
        super().__init__()
        self.message = message


class _OwnMemory:
    """How much memory this process uses, in bytes. Opens its files in /proc once, before that is forbidden."""

    def __init__(self) -> None:
        self._status = os.open("/proc/self/status", os.O_RDONLY | os.O_CLOEXEC)
        self._peak: int | None = None
        with contextlib.suppress(OSError):
            self._peak = os.open("/proc/self/clear_refs", os.O_WRONLY | os.O_CLOEXEC)

    def read(self, name: str) -> int:
        lines = os.pread(self._status, 1 << 16, 0).decode(errors="replace").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))

    def forget_peak(self) -> None:
        if self._peak is not None:
            with contextlib.suppress(OSError):
                os.write(self._peak, b"5")


class _Server:
    def __init__(self, channel: Channel, limits: Limits, own_memory: _OwnMemory):
        self._channel, self._limits, self._own_memory = channel, limits, own_memory
        self._memory: UInt8[np.ndarray, " n"] = np.zeros(0, np.uint8)
        self._still: Still | None = None  # the picture of the last PictureRequest
        self._idle_bytes = own_memory.read("VmRSS")

    def run(self) -> None:
        message: ToChild | None = None
        while True:
            message = message or self._receive(None)
            request, message = message, None
            if not isinstance(request, Request):
                continue  # `Free` or `Stop` for a request that has ended
            try:
                self._answer(request)
            except _Abandoned as abandoned:
                message = abandoned.message

    def _receive(self, timeout_s: float | None) -> ToChild:
        message, descriptors = self._channel.receive_with_descriptors(TO_CHILD.validate_json, timeout_s)
        if isinstance(message, Request):
            status = FileStatus(stat.S_IFREG, message.num_bytes, message.mtime_ns)
            grant(Path(os.fsdecode(message.path)), descriptors[0], status)
            if message.memory_bytes:
                self._memory = mapped(descriptors[1], message.memory_bytes)
                os.close(descriptors[1])
        return message

    def _answer(self, request: Request) -> None:
        path = Path(os.fsdecode(request.path))
        self._own_memory.forget_peak()
        if not isinstance(request, PixelsRequest):
            self._still = None
        answer: Answer
        try:
            match request:
                case ProbeRequest():
                    answer = self._probe(path, request)
                case FramesRequest():
                    answer = self._frames(path, request)
                case SoundRequest():
                    answer = self._sound(path, request)
                case FilmSoundRequest():
                    answer = self._film_sound(path, request)
                case PictureRequest():
                    answer = self._picture(path, request)
                case PixelsRequest():
                    answer = self._pixels(request)
                case _:
                    raise AssertionError(request)
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
        info = self._checked(path)
        if request.start_frame is not None:  # read_frames checks the range when it is called
            read_frames(path, request.start_frame, request.num_frames)
        return MediaAnswer.of(request.id, info)

    def _frames(self, path: Path, request: FramesRequest) -> End:
        self._checked(path)
        wanted = None if request.offsets is None else iter(request.offsets)
        shown = read_frames(path, request.start_frame, request.num_frames, copy=False)
        self._deliver(request, _picked(shown, wanted), several=True)
        return End(id=request.id)

    def _sound(self, path: Path, request: SoundRequest) -> End:
        info = self._checked(path)
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

    def _film_sound(self, path: Path, request: FilmSoundRequest) -> End:
        self._checked(path)
        sound = film_sound(path)
        answer = SoundFormat(
            id=request.id, sample_rate_hz=sound.sample_rate_hz, num_channels=sound.num_channels, layout=sound.layout
        )
        self._channel.send(answer)
        most = request.slot_bytes // (4 * sound.num_channels)
        parts = (block[:, at : at + most] for block in sound.blocks for at in range(0, block.shape[1], most))
        self._deliver(request, parts)
        return End(id=request.id)

    def _picture(self, path: Path, request: PictureRequest) -> PictureAnswer:
        still = self._still = read_picture(checked_file(path), self._limits.max_pixels)
        height, width, _ = still.pixels.shape
        ignored = still.profile_ignored
        return PictureAnswer(
            id=request.id, width=width, height=height, num_pictures=still.num_pictures, profile_ignored=ignored
        )

    def _pixels(self, request: PixelsRequest) -> End:
        assert self._still is not None
        self._deliver(request, (pixels for pixels in (self._still.pixels,)))
        return End(id=request.id)

    def _deliver(self, request: Delivery, items: Generator[np.ndarray, None, None], several: bool = False) -> None:
        """Writes the items into free slots. Waits for the parent to free one if there is none.

        several: whether a slot may hold several items of one size. A message costs as much as copying a small picture.
        """
        free = list(range(request.slots))
        slot, filled, begun_s = None, 0, 0.0
        with contextlib.closing(items):
            for item in items:
                if slot is None:
                    slot, filled, begun_s = self._free_slot(request, free), 0, time.monotonic()
                start = slot * request.slot_bytes + filled
                self._memory[start : start + item.nbytes].view(item.dtype).reshape(item.shape)[...] = item
                filled += item.nbytes
                full = not several or filled + item.nbytes > request.slot_bytes
                if full or time.monotonic() - begun_s > _LONGEST_WAIT_S:
                    self._channel.send(Block(id=request.id, slot=slot, num_bytes=filled))
                    slot = None
        if slot is not None:
            self._channel.send(Block(id=request.id, slot=slot, num_bytes=filled))

    def _free_slot(self, request: Delivery, free: list[int]) -> int:
        """Takes a slot from `free`, after the messages of the parent. Raises _Abandoned if it has given up."""
        while True:
            try:
                message = self._receive(0 if free else None)
            except TimeoutError:
                return free.pop()
            if isinstance(message, Free) and message.id == request.id:
                free.extend(message.slots)
            else:
                raise _Abandoned(None if isinstance(message, Stop) else message)

    def _checked(self, path: Path) -> MediaInfo:
        """Like `probe`, but raises MediaError `unsafe` as early as possible for a file beyond the limits."""
        file = checked_file(path)
        status = file_status(file)
        if (size := status.num_bytes) > self._limits.max_file_bytes:
            raise _unsafe(path, f"it is a file of {size} bytes", self._limits.max_file_bytes, "max_file_bytes")
        self._check_header(file.absolute(), size, status.mtime_ns)
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
        used = self._own_memory.read("VmHWM") - self._idle_bytes
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


def _import_all_of_av() -> None:
    """PyAV imports some of its modules when they are first needed, which is too late here."""
    for module in pkgutil.walk_packages(av.__path__, "av."):
        if module.name not in ("av.__main__", "av.datasets"):
            importlib.import_module(module.name)


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


def _give_up_rights(limits: Limits, own_memory: _OwnMemory) -> str | None:
    """From here on this process can write no files, dump no core and take no memory beyond the limit.

    Nor can it do anything else that `confine` forbids. Returns why, if this machine has no such protection.
    """
    sys.dont_write_bytecode = True
    ctypes.CDLL(None).prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    for kind, most in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, _OPEN_FILES),
        (resource.RLIMIT_DATA, own_memory.read("VmData") + limits.memory_bytes),
    ):
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
        score.write("1000")  # if memory runs out all the same, the kernel ends this process rather than its parent
    Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit; ours is max_pixels
    warnings.simplefilter("ignore")  # to show a warning, Python opens source files
    open_nothing_by_path()
    return confine()


def main(descriptor: str, parent: str, signalled: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles interrupts
    _end_with(int(parent), signalled == "signalled")
    channel = Channel(socket.socket(fileno=int(descriptor)))
    with contextlib.suppress(Closed):
        start = channel.receive(Start.model_validate_json)
        if start.threads is not None:
            pictures.MAX_THREADS = start.threads
        _import_all_of_av()
        own_memory = _OwnMemory()
        with open(os.devnull, "r+b") as nowhere:  # FFmpeg's messages must not reach the user's terminal
            os.dup2(nowhere.fileno(), 2)
        channel.send(Ready(unconfined=_give_up_rights(start.limits, own_memory)))
        _Server(channel, start.limits, own_memory).run()


if __name__ == "__main__":
    main(*sys.argv[1:])
