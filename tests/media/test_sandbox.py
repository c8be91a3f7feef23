"""Decoding in a child process: the same pictures, audio and errors as in-process; no file causes more than an error."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.audio import AudioStream
from descriptors import open_descriptors
from mutations import mutated, write_films

from tccp.errors import TccpError
from tccp.media import MediaError, open_audio, probe, read_frames, write_audio_wav
from tccp.media.mel import check_audio
from tccp.media.sandbox import Decoder, Limits
from tccp.media.sandbox.messages import TO_PARENT, MediaAnswer

KINDS = ("mp4", "mkv", "webm", "avi", "mpg", "mov", "ts", "wav")


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A RoundTable film of 20 frames in all KINDS."""
    return {path.suffix[1:]: path for path in write_films(tmp_path_factory.mktemp("films"))}


@pytest.fixture(scope="module")
def long_film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """500 frames at 25 fps, from ten pictures of 256x192."""
    path = tmp_path_factory.mktemp("long") / "long.mp4"
    write_still_pictures(path, count=10, each_s=2, width=256, height=192)
    return path


@pytest.fixture(scope="module")
def shared_decoder() -> Iterator[Decoder]:
    with Decoder() as decoder:
        yield decoder


@pytest.fixture
def decoder(shared_decoder: Decoder) -> Decoder:
    """The shared decoder, for tests that leave it usable."""
    return shared_decoder


def write_still_pictures(path: Path, count: int, each_s: int, width: int, height: int) -> None:
    random = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", Fraction(1, each_s), options={"preset": "ultrafast", "g": "2"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(count):
            blocks = random.integers(0, 256, (height // 16, width // 16, 3), np.uint8)
            frame = av.VideoFrame.from_ndarray(np.kron(blocks, np.ones((16, 16, 1), np.uint8)), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(each_s)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def child_pid(decoder: Decoder) -> int:
    assert decoder._process is not None
    return decoder._process.pid


def same_reason(tried: Sequence[Callable[[Path], object]], path: Path) -> str:
    error = same_error(tried, path)
    assert isinstance(error, MediaError)
    return error.reason


def is_running(pid: int) -> bool:
    """Zombies count as running: their parent has not reaped them."""
    return Path(f"/proc/{pid}").exists()


def children() -> set[str]:
    """Ids of this process's children, zombies included."""
    return {pid for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()}


def same_error(tried: Sequence[Callable[[Path], object]], path: Path) -> TccpError:
    """Asserts that all calls in `tried` raise the same error, and returns it."""
    errors: list[TccpError] = []
    for call in tried:
        with pytest.raises(TccpError) as caught:
            call(path)
        errors.append(caught.value)
    assert len({(type(error), str(error), getattr(error, "reason", None)) for error in errors}) == 1
    return errors[0]


@pytest.mark.parametrize("used", [True, False])
def test_a_child_that_was_started_beforehand_is_used_and_ended(films: dict[str, Path], used: bool) -> None:
    with Decoder() as decoder:
        decoder.start()
        pid = child_pid(decoder)
        if used:
            decoder.probe(films["mp4"])
            assert child_pid(decoder) == pid
    assert not is_running(pid)


@pytest.mark.parametrize("kind", KINDS)
def test_child_gives_the_same_results_as_decoding_in_process(
    kind: str, films: dict[str, Path], decoder: Decoder
) -> None:
    path = films[kind]
    info = probe(path)
    assert decoder.probe(path) == info
    with decoder.sound(path) as sound, open_audio(path) as expected:
        assert np.array_equal(sound.samples, expected.samples) and sound.num_frames == expected.num_frames
        assert sound.samples.dtype == np.float32 and sound.path == path
    if info.has_video:
        pictures = list(decoder.frames(path))
        assert len(pictures) == info.num_frames
        for picture, other in zip(pictures, read_frames(path), strict=True):
            assert np.array_equal(picture, other)
        part = list(decoder.frames(path, 7, 6))
        assert np.array_equal(np.stack(part), np.stack(pictures[7:13]))
    else:
        assert same_reason([decoder.frames, read_frames], path) == "no_video"


def test_pictures_do_not_share_memory(films: dict[str, Path], decoder: Decoder) -> None:
    first, *others = decoder.frames(films["mp4"])
    before = [other.copy() for other in others]
    first[...] = 0
    assert all(np.array_equal(*pair) for pair in zip(before, others, strict=True))


def test_audio_carries_its_warnings(tmp_path: Path, decoder: Decoder) -> None:
    path = tmp_path / "silent.wav"
    write_audio_wav(path, np.zeros(16000, np.float32))
    with decoder.sound(path) as sound:
        assert sound.warnings == tuple(check_audio(sound.samples)) and "silent" in sound.warnings[0]


@pytest.mark.parametrize("frames", [[0], [3, 4, 9], [0, 3, 250, 251, 499], list(range(0, 500, 99)), []])
def test_frames_at_returns_the_requested_frames(frames: list[int], long_film: Path, decoder: Decoder) -> None:
    expected = {frame: picture for frame, picture in enumerate(read_frames(long_film)) if frame in frames}
    found = dict(decoder.frames_at(long_film, frames))
    assert list(found) == frames
    assert all(np.array_equal(found[frame], expected[frame]) for frame in frames)


def test_frames_out_of_range_are_refused(films: dict[str, Path], decoder: Decoder) -> None:
    same_error([lambda path: decoder.frames(path, 15, 6), lambda path: read_frames(path, 15, 6)], films["mp4"])
    with pytest.raises(TccpError, match="frames 3 to 31 were asked for"):
        list(decoder.frames_at(films["mp4"], [3, 30]))


def test_relative_and_unusual_paths_work(
    films: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoder: Decoder
) -> None:
    monkeypatch.chdir(tmp_path)
    odd = Path(os.fsdecode(b"concat:\xff \n.mp4"))
    odd.write_bytes(films["mp4"].read_bytes())
    assert decoder.probe(odd) == probe(odd) and decoder.probe(odd).path == odd
    Path("nothing.mp4").touch()
    Path("folder").mkdir()
    os.mkfifo("fifo.mp4")
    for name, reason in (
        ("missing.mp4", "missing"),
        ("nothing.mp4", "empty_file"),
        ("folder", "not_a_file"),
        ("fifo.mp4", "not_a_file"),
    ):
        assert same_reason([decoder.probe, decoder.frames, decoder.sound, probe], Path(name)) == reason


def test_missing_temporary_folder_gives_an_error_naming_tmpdir(
    films: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoder: Decoder
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    assert "TMPDIR" in str(same_error([decoder.sound, open_audio], films["mp4"]))


def test_audio_with_nan_is_refused(tmp_path: Path, decoder: Decoder) -> None:
    path = tmp_path / "nan.wav"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_f32le", 16000, layout="mono")
        assert isinstance(stream, AudioStream)
        block = av.AudioFrame.from_ndarray(np.full((1, 1600), np.nan, np.float32), "flt", "mono")
        block.sample_rate = 16000
        container.mux(stream.encode(block))
        container.mux(stream.encode(None))
    assert same_reason([decoder.sound, open_audio], path) == "not_finite"


def test_shared_clips_decode_the_same_in_the_child(shared_clips: Path, decoder: Decoder) -> None:
    """Rotated, late-starting, MPEG and variable-rate clips: the same pictures from the middle of each."""
    for name in ("rotate_tag.mp4", "short_hamilton_clip.mp4", "grid_bbaf2n.mpg", "vfr.mp4"):
        path = shared_clips / name
        assert decoder.probe(path) == probe(path)
        for picture, other in zip(decoder.frames(path, 20, 5), read_frames(path, 20, 5), strict=True):
            assert np.array_equal(picture, other)
    assert same_reason([decoder.sound, open_audio], shared_clips / "no_audio.mp4") == "no_audio"


@pytest.mark.parametrize(
    "name",
    [
        "01_sar_3to2.mp4",
        "02_hdr_hlg.mp4",
        "03_interlaced_tff.mp4",
        "04_joined.mpg",
        "04_chained.ogg",
        "05_vorbis.ogg",
        "07_antiphase.wav",
        "08_untagged_hd_bt709.mp4",
        "11_odd_427x171.mp4",
    ],
)
def test_unusual_files_need_nothing_that_the_child_cannot_reach(
    name: str, shared_faults: Path, decoder: Decoder
) -> None:
    """Tone mapping, filters and the choice of channels run after the child has given up all rights."""
    path = shared_faults / name
    info = decoder.probe(path)
    assert info == probe(path)
    if info.has_video:
        for picture, other in zip(decoder.frames(path, 5, 3), read_frames(path, 5, 3), strict=True):
            assert np.array_equal(picture, other)
    if info.has_audio:
        with decoder.sound(path) as sound, open_audio(path) as expected:
            assert np.array_equal(sound.samples, expected.samples)
            assert sound.notes == expected.notes


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("corrupt_empty.mp4", "empty_file"),
        ("corrupt_text.mp4", "not_media"),
        ("corrupt_truncated_no_moov.mp4", "no_index"),
        ("corrupt_truncated_faststart.mp4", "truncated"),
        ("corrupt_bitflips.mp4", "corrupt"),
    ],
)
def test_corrupt_clips_give_the_same_reason_in_the_child(
    name: str, reason: str, shared_clips: Path, decoder: Decoder
) -> None:
    tried = [lambda path: list(decoder.frames(path)), lambda path: list(read_frames(path))]
    assert same_reason(tried, shared_clips / name) == reason


def test_child_survives_iterators_closed_early(films: dict[str, Path], long_film: Path, decoder: Decoder) -> None:
    pid = None
    for _ in range(3):
        frames = decoder.frames(long_film)
        next(frames)
        pid = pid or child_pid(decoder)
        frames.close()
        assert sum(1 for _ in decoder.frames(films["mp4"])) == 20
        next(decoder.frames_at(long_film, [5, 6, 300]))
        decoder.sound(films["wav"]).close()
    assert child_pid(decoder) == pid


def test_only_the_newest_iterator_stays_valid(films: dict[str, Path], long_film: Path, decoder: Decoder) -> None:
    older, newer = decoder.frames(long_film), decoder.frames(films["mp4"])
    next(older)
    next(newer)
    with pytest.raises(RuntimeError, match=r"long\.mp4: this decoder has gone on"):
        next(older)
    assert sum(1 for _ in newer) == 19


def test_child_crash_is_an_error_of_the_film_being_decoded(films: dict[str, Path], long_film: Path) -> None:
    """A crash during decoding is an error of that film; a crash while idle is no error."""
    with Decoder() as decoder:
        frames = decoder.frames(long_film)
        next(frames)
        first = child_pid(decoder)
        os.kill(first, signal.SIGSEGV)
        with pytest.raises(MediaError, match=r"long\.mp4: decoding it crashed \(SIGSEGV\)") as caught:
            list(frames)
        assert caught.value.reason == "decoder_crashed" and not is_running(first)
        assert decoder.probe(films["mp4"]).num_frames == 20
        second = child_pid(decoder)
        os.kill(second, signal.SIGKILL)
        os.waitid(os.P_PID, second, os.WEXITED | os.WNOWAIT)
        assert sum(1 for _ in decoder.frames(films["mp4"])) == 20
        assert not is_running(second)
        last = child_pid(decoder)
    assert not is_running(last)


def wait_for(condition: Callable[[], object], within_s: float = 20.0) -> None:
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end, "the condition did not hold in time"
        time.sleep(0.02)


def test_hanging_child_is_killed_after_the_stall_limit(films: dict[str, Path], long_film: Path) -> None:
    with Decoder(Limits(stall_s=0.4)) as decoder:
        frames = decoder.frames(long_film)
        next(frames)
        stopped = child_pid(decoder)
        os.kill(stopped, signal.SIGSTOP)
        began = time.monotonic()
        with pytest.raises(MediaError, match=r"nothing came out of it for 0\.4 s") as caught:
            list(frames)
        assert caught.value.reason == "too_slow" and time.monotonic() - began < 10
        assert not is_running(stopped)


def test_child_that_cannot_start_is_not_a_media_error(films: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is not at fault, so it must not be set aside."""
    before = children()
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with Decoder() as decoder, pytest.raises(RuntimeError, match="did not start: status 1"):
        decoder.probe(films["mp4"])
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with Decoder() as decoder, pytest.raises(RuntimeError, match="did not start: No such file"):
        decoder.probe(films["mp4"])
    assert children() == before


def test_memory_limit_is_enforced(tmp_path: Path) -> None:
    path = tmp_path / "large.mp4"
    write_still_pictures(path, count=3, each_s=1, width=2560, height=1440)
    for mebibytes in (16, 48):  # FFmpeg's allocations fail in different places
        with Decoder(Limits(memory_bytes=mebibytes << 20), threads=1) as decoder:
            with pytest.raises(MediaError, match=f"more memory than the limit, {mebibytes} MiB") as caught:
                list(decoder.frames(path))
            assert caught.value.reason == "too_much_memory"
    with Decoder(Limits(memory_bytes=300 << 20), threads=1) as decoder:
        assert sum(1 for _ in decoder.frames(path, 45, 20)) == 20


def test_header_that_demands_a_huge_allocation_is_corrupt(
    films: dict[str, Path], tmp_path: Path, decoder: Decoder
) -> None:
    """FFmpeg refuses to allocate 2 GiB at once; that does not mean the memory limit was reached."""
    data = bytearray(films["mp4"].read_bytes())
    place = data.find(b"stsz") + 12  # after the version and the common size, the number of samples
    data[place : place + 4] = (0x1FFFFFFF).to_bytes(4, "big")
    path = tmp_path / "asks.mp4"
    path.write_bytes(data)
    assert same_reason([decoder.probe, probe], path) == "corrupt"


def test_files_beyond_the_limits_are_unsafe(films: dict[str, Path], long_film: Path, tmp_path: Path) -> None:
    short_wide = tmp_path / "wide.mp4"
    write_still_pictures(short_wide, count=1, each_s=1, width=256, height=192)
    streams = tmp_path / "streams.mkv"
    with av.open(str(streams), "w") as container:
        tracks = [container.add_stream("pcm_s16le", 16000, layout="mono") for _ in range(5)]
        for track in tracks:
            block = av.AudioFrame.from_ndarray(np.zeros((1, 1600), np.int16), "s16", "mono")
            block.sample_rate = 16000
            assert isinstance(track, AudioStream)
            container.mux(track.encode(block))
    fast = tmp_path / "fast.wav"
    write_audio_wav(fast, np.zeros(16000, np.float32))
    header = bytearray(fast.read_bytes())
    header[24:28] = (900_000_000).to_bytes(4, "little")  # the resampler's filters would take a gigabyte
    fast.write_bytes(header)
    wide = r"its pictures are 256x192; the limit is 30000 \(max_pixels\)"
    long = r"it lasts 20 s; the limit is 10 \(max_duration_s\)"
    many = r"it has 5 streams; the limit is 4 \(max_streams\)"
    big = rf"it is a file of {films['mov'].stat().st_size} bytes; the limit is 55000 \(max_file_bytes\)"
    dense = r"its sound has 900000000 samples a second; the limit is 768000 \(max_sample_rate_hz\)"
    with Decoder(Limits(max_pixels=30_000, max_streams=4, max_file_bytes=55_000)) as decoder:
        for path, problem in ((short_wide, wide), (streams, many), (films["mov"], big), (fast, dense)):
            for call in (decoder.probe, decoder.frames, decoder.sound):
                with pytest.raises(MediaError, match=problem) as caught:
                    call(path)
                assert caught.value.reason == "unsafe" and str(caught.value).startswith(f"{path}: ")
        assert decoder.probe(films["mp4"]).num_frames == 20
    with Decoder(Limits(max_duration_s=10)) as decoder, pytest.raises(MediaError, match=long) as caught:
        decoder.probe(long_film)
    assert caught.value.reason == "unsafe"
    # A transport stream has no header with its duration.
    with Decoder(Limits(max_duration_s=0.5)) as decoder, pytest.raises(MediaError, match="it lasts 1 s") as caught:
        decoder.sound(films["ts"])
    assert caught.value.reason == "unsafe"


@pytest.mark.parametrize("value", [0, -1, float("inf"), float("nan")])
def test_limits_must_be_positive_and_finite(value: float) -> None:
    with pytest.raises(TccpError, match="limit stall_s"):
        Limits(stall_s=value)


def test_child_has_restricted_rights(
    films: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, long_film: Path
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    with Decoder() as decoder:
        frames = decoder.frames(long_film)
        next(frames)
        process = Path(f"/proc/{child_pid(decoder)}")
        granted = {line[:25].strip(): line[26:46].strip() for line in (process / "limits").read_text().splitlines()}
        assert granted["Max file size"] == granted["Max core file size"] == "0"
        assert int(granted["Max open files"]) <= 64 and granted["Max data size"] != "unlimited"
        assert "NoNewPrivs:\t1" in (process / "status").read_text()
        assert b"hunter2" not in (process / "environ").read_bytes()
        open_files = [os.readlink(file) for file in (process / "fd").iterdir()]
        expected = {"/dev/null", str(long_film), "/memfd:tccp-pictures (deleted)"}
        expected |= {f"{process}/status", f"{process}/clear_refs"}  # its own figures, opened before it gave up rights
        assert {file for file in open_files if not file.startswith("socket:")} == expected
        os.kill(child_pid(decoder), signal.SIGINT)  # the child ignores SIGINT
        assert sum(1 for _ in frames) == 499


def test_threads_sets_the_number_of_decoder_threads(long_film: Path) -> None:
    counts = []
    for threads in (1, 3):
        with Decoder(threads=threads) as decoder:
            next(decoder.frames(long_film))
            frames = decoder.frames(long_film)
            next(frames)
            counts.append(len(list(Path(f"/proc/{child_pid(decoder)}/task").iterdir())))
    assert counts[1] >= counts[0] + 2


def test_child_is_replaced_after_the_set_number_of_films(films: dict[str, Path]) -> None:
    pids = []
    with Decoder(recycle=2) as decoder:
        for kind in ("mp4", "mkv", "avi", "mov", "ts"):
            for _ in range(2):  # a repeated film does not count
                assert sum(1 for _ in decoder.frames(films[kind])) == decoder.probe(films[kind]).num_frames
            pids.append(child_pid(decoder))
    assert [len(list(group)) for _, group in itertools.groupby(pids)] == [2, 2, 1]
    assert not any(map(is_running, pids))


def test_no_descriptors_processes_or_files_are_leaked(
    films: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decodes fifty films, closing some early, and probes a missing one each time."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = children(), open_descriptors()
    with Decoder(recycle=30) as decoder:
        for number in range(50):
            path = films[KINDS[number % len(KINDS)]]
            sound = decoder.sound(path)
            if decoder.probe(path).has_video:
                for _ in itertools.islice(decoder.frames(path), 5 if number % 3 else None):
                    pass
            sound.close()
            with pytest.raises(MediaError):
                decoder.probe(tmp_path / "missing.mp4")
            if number == 1:
                held = len(open_descriptors())
        assert len(open_descriptors()) <= held
        assert len(children() - before[0]) == 1
    assert (children(), open_descriptors()) == before
    assert not list(tmp_path.iterdir())


def test_deleted_decoder_ends_its_child(films: dict[str, Path]) -> None:
    decoder = Decoder()
    decoder.probe(films["mp4"])
    pid = child_pid(decoder)
    del decoder
    assert not is_running(pid)


ORPHAN = """
import sys, threading, time
from tccp.media.sandbox import Decoder

def decode():
    global frames
    decoder = Decoder()
    frames = decoder.frames(sys.argv[1])
    next(frames)
    print(decoder._process.pid, flush=True)

if sys.argv[2] == "main":
    decode()
else:
    thread = threading.Thread(target=decode)
    thread.start()
    thread.join()
    time.sleep(1.5)
    print(sum(1 for _ in frames), flush=True)  # the child outlives the thread that started it
time.sleep(600)
"""


@pytest.mark.parametrize("started_by", ["main", "thread"])
def test_child_ends_with_its_parent(started_by: str, long_film: Path, tmp_path: Path) -> None:
    """The parent is killed while decoding. The child outlives the thread that started it, but not the parent."""
    command = [sys.executable, "-c", ORPHAN, str(long_film), started_by]
    root = Path(__file__).resolve().parent.parent.parent
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(root)}
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        try:
            assert is_running(child)
            if started_by == "thread":
                assert int(parent.stdout.readline()) == 499
        finally:
            parent.kill()
    wait_for(lambda: not is_running(child))


FORKED = """
import os, sys
from tccp.media.sandbox import Decoder

decoder = Decoder()
decoder.probe(sys.argv[1])
pid = decoder._process.pid
frames = decoder.frames(sys.argv[1])
next(frames)
fork = os.fork()
if fork == 0:
    assert decoder.probe(sys.argv[1]).num_frames == 20
    assert decoder._process.pid != pid
    decoder.close()
    os._exit(0)
assert os.waitpid(fork, 0)[1] == 0
assert sum(1 for _ in frames) == 19
assert decoder._process.pid == pid
"""


def test_forked_process_starts_its_own_child(films: dict[str, Path], tmp_path: Path) -> None:
    root = Path(__file__).resolve().parent.parent.parent
    environment = os.environ | {"PYTHONPATH": str(root)}
    command = [sys.executable, "-c", FORKED, str(films["mp4"])]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_invalid_child_answers_are_rejected(films: dict[str, Path]) -> None:
    info = probe(films["mp4"])
    sent = MediaAnswer.of(1, info).model_dump_json()
    received = TO_PARENT.validate_json(sent)
    assert isinstance(received, MediaAnswer) and received.media_info(info.path) == info
    message = json.loads(sent)
    for changed in (
        {"width": -1},
        {"width": "128"},
        {"width": 1 << 40},
        {"height": None},
        {"video_span": None, "audio_span": None},
        {"video_span": {"start": "0", "end": "1/0"}},
        {"video_span": {"start": "0", "end": "1e999999999"}},
        {"video_span": {"start": "0", "end": "9" * 100}},
        {"video_span": {"start": "1", "end": "0"}},
        {"frame_rate": "fast"},
        {"audio_channels": None},
        {"audio_codec": "x" * 100},
        {"seeks": 1},
        {"kind": "unknown"},
        {"unknown": 1},
    ):
        with pytest.raises(ValueError, match="validation error"):
            TO_PARENT.validate_json(json.dumps(message | changed))
    for name in message:
        with pytest.raises(ValueError, match="validation error"):
            TO_PARENT.validate_json(json.dumps({key: value for key, value in message.items() if key != name}))
    failure = {"kind": "failure", "id": 1, "reason": "corrupt", "problem": "it is damaged"}
    TO_PARENT.validate_json(json.dumps(failure))
    for changed in ({"reason": "No reason"}, {"reason": "x" * 100}, {"problem": "x" * 1000}, {"problem": None}):
        with pytest.raises(ValueError, match="validation error"):
            TO_PARENT.validate_json(json.dumps(failure | changed))


LIAR = """#!{python}
import json, socket, sys

end = socket.socket(fileno=int(sys.argv[3]))
end.recv(1 << 17)
end.send(json.dumps({{"kind": "ready", "unconfined": None}}).encode())
while packet := end.recv(1 << 17):
    request = json.loads(packet)
    if request["kind"] == "probe":
        end.send(json.dumps(json.loads({info!r}) | {{"id": request["id"]}}).encode())
    elif request["kind"] in ("frames", "sound"):
        while True:
            end.send(json.dumps({{"id": request["id"]}} | json.loads({lie!r})).encode())
"""


@pytest.mark.parametrize(
    "lie",
    [
        {"kind": "block", "slot": 4, "num_bytes": 100},
        {"kind": "block", "slot": -1, "num_bytes": 100},
        {"kind": "block", "slot": 0, "num_bytes": 0},
        {"kind": "block", "slot": 0, "num_bytes": 1 << 40},
        {"kind": "block", "slot": 0, "num_bytes": 100},
        {"kind": "block", "slot": None, "num_bytes": []},
        {"kind": "block", "slot": 0, "num_bytes": 128 * 96 * 3},  # of the right size, but endless
        {"kind": "sound_format", "sample_rate_hz": 48000, "num_channels": 2},
        {"nothing": "known"},
    ],
)
def test_invalid_child_messages_are_reported_as_a_decoder_crash(
    lie: dict[str, object], films: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Code that took over the child can only make decoding of this film fail."""
    install_fake_child(MediaAnswer.of(1, probe(films["mp4"])), lie, tmp_path / "liar", monkeypatch)
    with Decoder(Limits(max_duration_s=1, stall_s=20)) as decoder:
        for call in (decoder.frames, lambda path: iter([decoder.sound(path)])):
            with pytest.raises(MediaError, match="sent an invalid answer") as caught:
                list(call(films["mp4"]))
            assert caught.value.reason == "decoder_crashed"


def install_fake_child(answer: MediaAnswer, lie: object, liar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces new children by a program that sends `answer` to `probe` and repeats `lie` after any other request."""
    text = LIAR.format(python=sys.executable, info=answer.model_dump_json(), lie=json.dumps(lie))
    liar.write_text(text)
    liar.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(liar))


@pytest.mark.parametrize("changed", [{"width": 0}, {"width": 10_000}, {"audio_sample_rate_hz": 1 << 30}])
def test_probe_answer_beyond_the_limits_is_invalid(
    changed: dict[str, object], films: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = MediaAnswer.of(1, probe(films["mp4"])).model_copy(update=changed)
    install_fake_child(answer, {"kind": "end"}, tmp_path / "liar", monkeypatch)
    invalid = pytest.raises(MediaError, match="sent an invalid answer")
    with Decoder(Limits(max_pixels=400_000, stall_s=20)) as decoder, invalid:
        next(decoder.frames(films["mp4"]))
    with Decoder(Limits(max_duration_s=0.5, stall_s=20)) as decoder, invalid:
        decoder.probe(films["mp4"])


def test_mutated_films_are_decoded_or_give_a_one_line_error(films: dict[str, Path], tmp_path: Path) -> None:
    """The error names the file, and the next film is decoded normally."""
    outcomes, texts = [], []
    before = children(), open_descriptors()
    with Decoder() as decoder:
        for seed in range(30):
            kind = KINDS[seed % len(KINDS)]
            path = tmp_path / f"{seed}.{kind}"
            path.write_bytes(mutated(films[kind].read_bytes(), seed)[1])
            try:
                info = decoder.probe(path)
                if info.has_audio:
                    assert len(decoder.sound(path).samples)
                if info.has_video:
                    shapes = [picture.shape for picture in decoder.frames(path)]
                    assert shapes == [(info.height, info.width, 3)] * info.num_frames
                outcomes.append("decoded")
            except MediaError as error:
                texts.append((path, str(error)))
                outcomes.append(error.reason)
        assert sum(1 for _ in decoder.frames(films["mp4"])) == 20
    assert all(text.startswith(f"{path}: ") and "\n" not in text for path, text in texts)
    assert {"decoded", "corrupt"} <= set(outcomes)
    assert not {"too_slow", "decoder_crashed"} & set(outcomes)
    assert (children(), open_descriptors()) == before


@pytest.mark.slow
def test_soak_benchmark_resumes_where_it_stopped(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parent.parent.parent
    work, out = tmp_path / "work.jsonl", tmp_path / "folder" / "out.json"
    command = [sys.executable, str(root / "benchmarks" / "mutated_media.py"), "--work", str(work), "--out", str(out)]
    environment = os.environ | {"PYTHONPATH": str(root)}
    for count in (6, 10):
        given = [*command, "--count", str(count), "--clips", str(tmp_path / "none")]
        subprocess.run(given, cwd=tmp_path, env=environment, capture_output=True, check=True)
        summary = json.loads(out.read_text())
        assert summary["files"] == count and sum(summary["outcomes"].values()) == count
        assert summary["left_behind"] == {
            "files": {6: 6, 10: 5}[count],
            "processes": 0,
            "descriptors": 0,
            "temporary_files": 0,
        }
        lines = work.read_text().splitlines()
        work.write_text("\n".join([*lines[:-1], lines[-1][:40]]))  # stopped in the middle of a line
    assert {path.name for path in tmp_path.iterdir()} == {"work.jsonl", "folder"}


@pytest.mark.cluster
@pytest.mark.slow
def test_decoder_works_in_a_ray_actor_and_its_child_ends_with_it(
    ray_with_two_cpus: Any, films: dict[str, Path]
) -> None:
    ray = ray_with_two_cpus

    class Actor:
        def decode(self, path: Path) -> tuple[int, int, int]:
            from tccp.media.sandbox import Decoder

            self.decoder = Decoder()
            with self.decoder.sound(path) as sound:
                frames = sum(1 for _ in self.decoder.frames(path))
                assert self.decoder._process is not None
                return frames, sound.num_frames, self.decoder._process.pid

    actor = ray.remote(Actor).remote()
    frames, sound_frames, child = ray.get(actor.decode.remote(films["mp4"]))
    assert (frames, sound_frames) == (20, 20) and is_running(child)
    ray.kill(actor)
    wait_for(lambda: not is_running(child))
