"""The child: `python -m tccp.media.sandbox.child SOCKET PARENT`, started by `process` and of no use to people.

Commands are `probe`, `frames` and `sound`, one at a time; a new one puts an end to the one before.
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
from tccp.media.sandbox.channel import Channel, Closed, Message, info_to_message, mapped
from tccp.media.sandbox.limits import Limits
from tccp.media.sound import sound_blocks
from tccp.media.source import checked_file, opened

_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
_WATCH_EVERY_S = 0.5
_OPEN_FILES = 64
# Formats whose header states how long the film is; elsewhere FFmpeg guesses, and a good film may be set aside for it.
_STATES_DURATION = {"mov", "matroska", "avi", "flac"}
_LONGEST_TEXT = 500
_MOST_AT_ONCE = 1 << 31  # bytes, av_malloc's own limit
_NO_MEMORY = MemoryError, BlockingIOError  # the latter, EAGAIN, from FFmpeg: none for the stack of a thread
_NEARLY_ALL = 0.75  # of the memory allowed, in use: what is asked for but not yet written to does not count


class _Abandoned(Exception):
    """The parent wants no more of this; `message` is what it wants instead, if anything."""

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
            command, message = message, None
            if "do" not in command:
                continue  # about a command that has ended
            try:
                self._answer(command)
            except _Abandoned as abandoned:
                message = abandoned.message

    def _receive(self, timeout_s: float | None) -> Message:
        message = self._channel.receive(timeout_s)
        if "descriptor" in message:
            self._memory = mapped(message["descriptor"])
            os.close(message["descriptor"])
        return message

    def _answer(self, command: Message) -> None:
        path = Path(command["path"])
        with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as peak:
            peak.write("5")
        try:
            answer = {"probe": self._probe, "frames": self._frames, "sound": self._sound}[command["do"]](path, command)
        except MediaError as error:
            answer = _error("too_much_memory" if self._was_memory(error) else error.reason, error.problem)
        except TccpError as error:
            answer = _error(None, str(error).removeprefix(f"{path}: "))
        except _NO_MEMORY:
            answer = {"error": "too_much_memory"}
        except (_Abandoned, Closed):
            raise
        except Exception as error:  # what tccp.media did not foresee must cost a file, not the run
            answer = _error("decoder_crashed", f"{type(error).__name__}: {error}")
        self._channel.send({"id": command["id"], **answer})

    def _probe(self, path: Path, command: Message) -> Message:
        info = self._looked_at(path, command)
        if "start" in command:  # read_frames checks the range when it is called
            read_frames(path, command["start"], command["count"])
        return {"info": info_to_message(info)}

    def _frames(self, path: Path, command: Message) -> Message:
        self._looked_at(path, command)
        wanted = None if command["offsets"] is None else iter(command["offsets"])
        self._deliver(command, _picked(read_frames(path, command["start"], command["count"]), wanted))
        return {"end": True}

    def _sound(self, path: Path, command: Message) -> Message:
        info = self._looked_at(path, command)
        self._deliver(command, self._samples(info, command["slot_bytes"] // 4))
        return {"end": True}

    def _samples(self, info: MediaInfo, most: int) -> Generator[np.ndarray, None, None]:
        """The sound in blocks of up to `most` samples."""
        num_samples = 0
        for block in sound_blocks(info):
            num_samples += len(block)
            self._check_duration(info.path, num_samples / SAMPLE_RATE_HZ)
            for start in range(0, len(block), most):
                yield block[start : start + most]

    def _deliver(self, command: Message, items: Generator[np.ndarray, None, None]) -> None:
        """Puts each item into a slot that is free, as fast as the parent frees them."""
        slot_bytes = command["slot_bytes"]
        free = list(range(command["slots"]))
        with contextlib.closing(items):
            for item in items:
                while True:
                    try:
                        message = self._receive(0 if free else None)
                    except TimeoutError:
                        break
                    if message["id"] != command["id"] or "stop" in message:
                        raise _Abandoned(None if "stop" in message else message)
                    free.append(message["free"])
                slot = free.pop()
                start = slot * slot_bytes
                self._memory[start : start + item.nbytes].view(item.dtype).reshape(item.shape)[...] = item
                self._channel.send({"id": command["id"], "slot": slot, "bytes": item.nbytes})

    def _looked_at(self, path: Path, command: Message) -> MediaInfo:
        """`probe`, but what is beyond the limits is found as early as can be."""
        file = checked_file(path)
        status = file.stat()
        if status.st_size > self._limits.max_file_bytes:
            raise _unsafe(
                path, f"it is a file of {status.st_size} bytes", self._limits.max_file_bytes, "max_file_bytes"
            )
        self._channel.send({"id": command["id"], "file_bytes": status.st_size})
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
        """Whether the limit on memory is behind the error, as far as can be told.

        Some decoders that get no memory say that the file is damaged. And FFmpeg says that there is no memory where a
        damaged header asks for more than it ever gives at once.
        """
        taken = _status_bytes("VmHWM") - self._idle_bytes
        if isinstance(error.__context__, _NO_MEMORY):
            return taken + _MOST_AT_ONCE > self._limits.memory_bytes
        return error.reason == "corrupt" and taken > _NEARLY_ALL * self._limits.memory_bytes


def _picked(frames: Iterator[np.ndarray], offsets: Iterator[int] | None) -> Generator[np.ndarray, None, None]:
    """Those at ascending `offsets` (default: all)."""
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


def _error(reason: str | None, problem: str) -> Message:
    return {"error": reason, "problem": problem[:_LONGEST_TEXT]}


def _status_bytes(name: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(f"{name}:"))


def _end_with(parent: int, signalled: bool) -> None:
    """The process ends when its parent does, even in the middle of decoding.

    signalled: also by a signal of the kernel's, which needs no thread of ours. It is sent at the end of the *thread*
    that started the process, so this is for a process that was started by the main thread.
    """
    if signalled:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_WATCH_EVERY_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _give_up_rights(limits: Limits) -> None:
    """No file may be written, no core dumped, no more memory taken; what is left to gain by it is little."""
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
        score.write("1000")  # if memory runs out all the same, the kernel is to end this process and not its parent


def main(descriptor: str, parent: str, signalled: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt means
    _end_with(int(parent), signalled == "signalled")
    channel = Channel(socket.socket(fileno=int(descriptor)))
    with contextlib.suppress(Closed):
        given = channel.receive()
        limits = Limits(**given["limits"])
        if given["threads"] is not None:
            pictures.MAX_THREADS = given["threads"]
        _give_up_rights(limits)
        with open(os.devnull, "r+b") as nowhere:  # what FFmpeg has to say is not for the user's terminal
            os.dup2(nowhere.fileno(), 2)
        channel.send({"ready": True})
        _Server(channel, limits).run()


if __name__ == "__main__":
    main(*sys.argv[1:])
