"""The parent's side: the functions of tccp.media, carried out by a child process."""

from __future__ import annotations

import contextlib
import itertools
import math
import mmap
import os
import tempfile
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from av.audio.layout import AudioLayout
from jaxtyping import Float32, UInt8

from tccp.clock import FPS, SAMPLE_RATE_HZ
from tccp.errors import TccpError
from tccp.media import AudioTrack, MediaError, MediaInfo
from tccp.media.file_access import FileStatus, open_descriptor
from tccp.media.film_sound import FilmSound
from tccp.media.mel import check_audio
from tccp.media.sandbox.channel import Closed, mapped, shared_memory
from tccp.media.sandbox.limits import Limits
from tccp.media.sandbox.messages import (
    MOST_FRAMES_LISTED,
    Block,
    Delivery,
    End,
    Failure,
    FilmSoundRequest,
    FramesRequest,
    Free,
    MediaAnswer,
    Message,
    PictureAnswer,
    PictureRequest,
    PixelsRequest,
    ProbeRequest,
    Request,
    SoundFormat,
    SoundRequest,
    Stop,
    ToParent,
    parse_answer,
)
from tccp.media.sandbox.patience import Patience
from tccp.media.sandbox.process import Process
from tccp.media.source import checked_file
from tccp.media.still_pictures import Still

# Pictures that the child may decode ahead: many small ones, so that neither process waits for the other at each.
_MOST_SLOTS, _FEW_SLOTS, _AHEAD = 32, 4, 2 << 20  # bytes
_MOST_TOGETHER, _TOGETHER = 16, 2 << 20  # small pictures that come in one message, and their bytes
_MOST_MEMORY = 256 << 20  # bytes for the slots; very large pictures get fewer slots, but at least two
_KEPT_MEMORY = 64 << 20  # bytes; larger shared memory is released before the next film
_SOUND_BLOCK = 1 << 18  # bytes
_READ_BYTES_PER_S = 10e6
_MOST_STALE = 4 * _MOST_SLOTS  # answers in a row to requests that were given up; there is about one for each slot
_SEEK_GAP_FRAMES = 4 * FPS  # over a smaller gap, decoding on costs less than a seek to a keyframe some seconds back


@dataclass(frozen=True)
class _Asked:
    """A request whose result comes in blocks."""

    id: int
    slots: int
    slot_bytes: int
    patience: Patience


class SoundFile(AudioTrack):
    """An AudioTrack with `warnings`: its notes and those of `check_audio`."""

    def __init__(self, path: Path, samples: Float32[np.ndarray, " n"], notes: tuple[str, ...]):
        super().__init__(path, samples, notes)
        self.warnings = (*notes, *check_audio(samples))

    def __enter__(self) -> SoundFile:
        return self


class Decoder:
    """Decodes media files in a child process of its own. Use as a context manager and from one thread at a time.

    The child starts with the first film, or with `start`. It is replaced after a crash, after it stopped answering, and
    after every `recycle` films. threads: FFmpeg's threads (None: the default of tccp.media).

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
        self._file_bytes = 0  # of the file that the request is about
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

    def unconfined(self) -> str | None:
        """Why the kernel of this machine does not confine the child; None if it does. Starts the child."""
        return self._ready().ready.unconfined

    def start(self) -> None:
        """Starts the child without waiting for it, so that the first film finds it ready. Raises RuntimeError."""
        if self._process is None:
            self._process = Process(self.limits, self._threads)

    def _ready(self) -> Process:
        """The child, once it can decode."""
        self.start()
        assert self._process is not None
        try:
            self._process.ready  # noqa: B018 - waits
        except RuntimeError:
            self.close()
            raise
        return self._process

    def probe(self, path: str | Path) -> MediaInfo:
        """Like tccp.media.probe."""
        return self._probe(Path(path))

    def sound(self, path: str | Path) -> SoundFile:
        """Like tccp.media.open_audio, with the warnings of tccp.media.mel.check_audio. A context manager as well."""
        film = Path(path)
        try:
            with tempfile.TemporaryFile(prefix="tccp-sound-") as file:
                num_bytes = 0
                asked = self._ask_for(film, SoundRequest, _SOUND_BLOCK)
                for block in self._sound_blocks(film, asked, SAMPLE_RATE_HZ, 1):
                    file.write(block.data)
                    num_bytes += block.nbytes
                file.flush()
                # The mapping keeps the unnamed file alive after it is closed here.
                samples = np.memmap(file, np.float32, "r", shape=(num_bytes // 4,))
        except OSError as error:
            folder = tempfile.gettempdir()
            raise TccpError(
                f"{path}: its sound cannot be unpacked into {folder} ({error.strerror}); make room or set TMPDIR"
            ) from None
        return SoundFile(film, samples, self._notes)

    def film_sound(self, path: str | Path) -> FilmSound:
        """Like tccp.media.film_sound.film_sound. The decoder can do nothing else until the last block has come."""
        film = Path(path)
        asked = self._ask_for(film, FilmSoundRequest, _SOUND_BLOCK)
        sound = self._next(film, asked.patience)
        if not isinstance(sound, SoundFormat) or not _is_layout(sound.layout, sound.num_channels):
            raise self._invalid_answer(film)
        blocks = self._sound_blocks(film, asked, sound.sample_rate_hz, sound.num_channels)
        return FilmSound(sound.sample_rate_hz, sound.num_channels, sound.layout, blocks)

    def picture(self, path: str | Path) -> Still:
        """Like tccp.media.still_pictures.read_picture."""
        film = Path(path)
        answer = self._next(film, self._begin(film, PictureRequest))
        if not isinstance(answer, PictureAnswer) or answer.width * answer.height > self.limits.max_pixels:
            raise self._invalid_answer(film)
        shape = answer.height, answer.width, 3
        pixels = None
        for block in self._delivered(film, self._ask_for(film, PixelsRequest, math.prod(shape))):
            if pixels is not None or len(block) != math.prod(shape):
                raise self._invalid_answer(film)
            pixels = block.reshape(shape).copy()
        if pixels is None:
            raise self._invalid_answer(film)
        return Still(pixels, answer.num_pictures, answer.profile_ignored)

    def frames(
        self, path: str | Path, start_frame: int = 0, num_frames: int | None = None, copy: bool = True
    ) -> Generator[UInt8[np.ndarray, "h w 3"], None, None]:
        """Like tccp.media.read_frames, with equal pictures. The child decodes some pictures ahead.

        copy: without it, a picture lies in memory that the child writes again once the next picture is taken.
        Only the newest iterator of a decoder can continue. The others raise RuntimeError.
        """
        film = Path(path)
        info = self._probe(film, start_frame, num_frames)
        count = info.num_frames - start_frame if num_frames is None else num_frames
        return self._pictures(info, start_frame, count, None, copy)

    def frames_at(
        self, path: str | Path, frames: Sequence[int], copy: bool = True
    ) -> Generator[tuple[int, UInt8[np.ndarray, "h w 3"]], None, None]:
        """(frame, picture) for ascending frames of the 25 fps clock, in one pass with seeks over wide gaps.

        copy: as for `frames`.
        """
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
            yield from zip(frames[start:end], self._pictures(info, first, count, offsets, copy), strict=True)
            start = end

    def _probe(self, film: Path, start_frame: int | None = None, num_frames: int | None = None) -> MediaInfo:
        patience = self._begin(film, ProbeRequest, start_frame=start_frame, num_frames=num_frames)
        answer = self._next(film, patience)
        if not isinstance(answer, MediaAnswer):
            raise self._invalid_answer(film)
        info = replace(answer.media_info(film), notes=tuple(map(_printable, answer.notes)))
        if not self._is_plausible(info):  # the child has checked this, unless the file has taken control of it
            raise self._invalid_answer(film)
        return info

    def _is_plausible(self, info: MediaInfo) -> bool:
        limits = self.limits
        spans = [span for span in (info.video_span, info.audio_span) if span is not None]
        return (
            info.width * info.height <= limits.max_pixels
            and max(span.end for span in spans) - info.zero <= limits.max_duration_s
            and 0 <= info.first_frame <= info.num_frames <= math.ceil(limits.max_duration_s * FPS)
            and info.num_pictures <= self._file_bytes
            and info.audio_sample_rate_hz <= limits.max_sample_rate_hz
        )

    def _pictures(
        self, info: MediaInfo, start_frame: int, count: int, offsets: list[int] | None, copy: bool
    ) -> Generator[UInt8[np.ndarray, "h w 3"], None, None]:
        shape = info.height, info.width, 3
        if math.prod(shape) == 0 or count < 0:
            raise self._invalid_answer(info.path)
        missing = count if offsets is None else len(offsets)
        size = math.prod(shape)
        asked = self._ask_for(
            info.path,
            FramesRequest,
            size * min(_MOST_TOGETHER, max(1, _TOGETHER // size)),
            extra_s=start_frame / FPS,  # without a keyframe nearby, the child decodes from the film's beginning
            start_frame=start_frame,
            num_frames=count,
            offsets=None if offsets is None else tuple(offsets),
        )
        for data in self._delivered(info.path, asked):
            together, rest = divmod(len(data), size)
            if rest or together > missing:
                raise self._invalid_answer(info.path)
            missing -= together
            for number in range(together):
                self._check_newest(info.path, asked)
                picture = data[number * size :][:size].reshape(shape)
                yield picture.copy() if copy else picture
        if missing:
            raise MediaError(info.path, "corrupt", f"its last {missing} pictures are missing; get a complete copy")

    def _sound_blocks(
        self, film: Path, asked: _Asked, sample_rate_hz: int, num_channels: int
    ) -> Generator[Float32[np.ndarray, "channels n"], None, None]:
        left = most = sample_rate_hz * math.ceil(self.limits.max_duration_s)
        for data in self._delivered(film, asked):
            if len(data) % (4 * num_channels):
                raise self._invalid_answer(film)
            block = data.copy().view(np.float32).reshape(num_channels, -1)  # first copied, then checked
            left -= block.shape[1]
            if left < 0 or not np.isfinite(block).all():
                raise self._invalid_answer(film)
            yield block
        if left == most:  # the child reports empty sound as an error
            raise self._invalid_answer(film)

    def _ask_for(
        self, film: Path, kind: type[Delivery], slot_bytes: int, extra_s: float = 0.0, **fields: object
    ) -> _Asked:
        slot_bytes = max(slot_bytes, 1)
        few = min(_FEW_SLOTS, max(2, _MOST_MEMORY // slot_bytes))
        slots = min(_MOST_SLOTS, max(few, _AHEAD // slot_bytes))
        patience = self._begin(film, kind, slots * slot_bytes, extra_s, slots=slots, slot_bytes=slot_bytes, **fields)
        return _Asked(self._id, slots, slot_bytes, patience)

    def _check_newest(self, film: Path, asked: _Asked) -> None:
        if self._id != asked.id:
            raise RuntimeError(f"{film}: this decoder has gone on to something else; use another one")

    def _delivered(self, film: Path, asked: _Asked) -> Generator[UInt8[np.ndarray, " n"], None, None]:
        """The blocks that the child writes into the shared memory, until it reports the end.

        A block is a view of that memory: the child may write it again once the next block is taken.
        """
        used: list[int] = []
        try:
            while True:
                self._check_newest(film, asked)
                answer = self._next(film, asked.patience)
                if isinstance(answer, End):
                    self._notes = tuple(map(_printable, answer.notes))
                    return
                if not isinstance(answer, Block) or answer.slot >= asked.slots or answer.num_bytes > asked.slot_bytes:
                    raise self._invalid_answer(film)
                yield self._memory[answer.slot * asked.slot_bytes :][: answer.num_bytes]
                used.append(answer.slot)
                if 2 * len(used) >= asked.slots:
                    self._check_newest(film, asked)
                    self._send(film, Free(id=asked.id, slots=tuple(used)))
                    used.clear()
        finally:
            if self._id == asked.id:
                with contextlib.suppress(MediaError):
                    self._send(film, Stop(id=asked.id))

    def _begin(
        self, film: Path, kind: type[Request], memory_bytes: int = 0, extra_s: float = 0.0, **fields: object
    ) -> Patience:
        """Sends the child a request, with the open file. Replaces a child that died while it was idle.

        memory_bytes: how much shared memory the answers need.
        """
        file, status = _opened(film)
        try:
            return self._sent(film, file, status, kind, memory_bytes, extra_s, fields)
        finally:
            os.close(file)

    def _sent(
        self,
        film: Path,
        file: int,
        status: FileStatus,
        kind: type[Request],
        memory_bytes: int,
        extra_s: float,
        fields: dict[str, object],
    ) -> Patience:
        foreign = self._process is not None and self._process.owner != os.getpid()
        if foreign or (film != self._film and self._films >= self._recycle):
            self.close()
        while True:
            fresh = self._process is None
            process = self._ready()
            if film != self._film:
                self._film, self._films = film, self._films + 1
                if len(self._memory) > _KEPT_MEMORY:
                    memory_bytes = max(memory_bytes, mmap.PAGESIZE)  # replaces it
            self._id, self._file_bytes = self._id + 1, status.num_bytes
            memory = None
            if memory_bytes and not memory_bytes <= len(self._memory) <= max(memory_bytes, _KEPT_MEMORY):
                memory = shared_memory(memory_bytes)
                self._memory = mapped(memory, memory_bytes)
            request = kind.model_validate(
                {
                    "id": self._id,
                    "path": os.fsencode(film.absolute()),
                    "num_bytes": status.num_bytes,
                    "mtime_ns": status.mtime_ns,
                    "memory_bytes": 0 if memory is None else memory_bytes,
                    **fields,
                }
            )
            try:
                process.channel.send(request, [file] if memory is None else [file, memory])
                return Patience(
                    self.limits, extra_s + min(status.num_bytes, self.limits.max_file_bytes) / _READ_BYTES_PER_S
                )
            except Closed:
                if fresh:
                    raise self._crashed(film, process.cause_of_death()) from None
                self.close()
            except TimeoutError:
                raise self._invalid_answer(film) from None
            finally:
                if memory is not None:
                    os.close(memory)

    def _send(self, film: Path, message: Message) -> None:
        """If the child is dead, the wait for its next answer reports that."""
        assert self._process is not None
        try:
            self._process.channel.send(message)
        except Closed:
            pass
        except TimeoutError:
            raise self._invalid_answer(film) from None

    def _next(self, film: Path, patience: Patience) -> ToParent:
        """The child's next answer to the current request. Raises the error that it reports."""
        assert self._process is not None
        channel = self._process.channel
        for _ in range(_MOST_STALE):
            try:
                answer = patience.spend(lambda timeout_s: channel.receive(parse_answer, timeout_s))
            except TimeoutError:
                what = f"nothing came out of it for {self.limits.stall_s:g} s and it was given up"
                raise self._lost(film, "too_slow", f"{what}; convert it to H.264 and AAC") from None
            except Closed:
                raise self._crashed(film, self._process.cause_of_death()) from None
            except ValueError:
                break
            if answer.id < self._id:
                continue  # it belongs to an earlier request
            if answer.id > self._id:
                break
            if isinstance(answer, Failure):
                raise self._error(film, answer.reason, _printable(answer.problem))
            patience.answered()
            return answer
        raise self._invalid_answer(film)

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


def _opened(film: Path) -> tuple[int, FileStatus]:
    """The file, opened for the child. Raises MediaError as `checked_file`."""
    checked_file(film)
    try:
        descriptor, status = open_descriptor(film)
    except OSError as error:  # it has changed since
        raise MediaError(film, "unreadable", f"cannot be read ({error.strerror}); check path and permissions") from None
    if not status.is_plain:
        os.close(descriptor)
        raise MediaError(film, "not_a_file", "this is not a plain file; give one video or audio file")
    return descriptor, status


def _is_layout(name: str, num_channels: int) -> bool:
    """Whether FFmpeg has a layout of this name with as many channels."""
    try:
        return AudioLayout(name).nb_channels == num_channels
    except ValueError:
        return False


def _printable(text: str) -> str:
    """One line without control characters, which could move the cursor of a terminal."""
    return "".join(character if character.isprintable() else "\ufffd" for character in " ".join(text.split()))
