"""Frame and audio timing at 25 fps, per picture and per click, on films with known timestamps.

The films are written with PyAV directly, independently of tccp.media's writer.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import pickle
import struct
import subprocess
import sys
import wave
from fractions import Fraction
from pathlib import Path

import av
import decord
import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from tccp.config import SAMPLES_PER_FRAME
from tccp.errors import TccpError
from tccp.media import MediaError, fit_samples, open_audio, probe, read_frames, write_audio_wav
from tccp.media.sound import SoundChanges, decode_sound

BITS = 12
WIDTH, HEIGHT = 16 * BITS, 32
NTSC = Fraction(30000, 1001)


def numbered(k: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """A picture that encodes its number k as a bar of `BITS` black or white blocks."""
    bar = np.array([255 * (k >> bit & 1) for bit in range(BITS)], np.uint8)
    picture = np.repeat(bar, width // BITS)[None, :, None]
    return np.broadcast_to(picture, (height, width, 3)).copy()


def number_of(picture: np.ndarray) -> int:
    blocks = picture.mean(axis=(0, 2)).reshape(BITS, -1)[:, 4:-4].mean(axis=1)
    assert (np.abs(blocks - 127.5) > 60).all(), "the bar cannot be read"
    return sum(int(block > 127.5) << bit for bit, block in enumerate(blocks))


@dataclasses.dataclass
class Sound:
    """Silence from start_s to end_s but for a click at each of `clicks_s`, all in seconds of the film."""

    clicks_s: tuple[float, ...] = ()
    start_s: float = 0.0
    end_s: float = 3.0
    rate_hz: int = 48000
    codec: str = "aac"
    layout: str = "mono"

    def samples(self) -> np.ndarray:
        begin = round(self.start_s * self.rate_hz)
        sound = np.zeros(round(self.end_s * self.rate_hz) - begin, np.float32)
        for click_s in self.clicks_s:
            sound[round(click_s * self.rate_hz) - begin] = 0.9
        return sound


def write_film(
    path: Path,
    times: list[Fraction],
    last_s: Fraction,
    time_base: Fraction = Fraction(1, 90000),
    sound: Sound | None = None,
    matrix: list[int] | None = None,
    b_frames: int = 2,
) -> None:
    """Writes a film that shows picture k from times[k], and the last one for `last_s`."""
    with av.open(str(path), "w") as container:
        packets = []
        if times:
            video = container.add_stream("libx264", rate=25)
            video.width, video.height, video.pix_fmt = WIDTH, HEIGHT, "yuv420p"
            video.codec_context.time_base = video.time_base = time_base
            video.options = {"bf": str(b_frames), "g": "12", "crf": "10", "preset": "ultrafast"}
            if matrix:
                video.set_display_matrix(matrix)
            for k, time in enumerate(times):
                frame = av.VideoFrame.from_ndarray(numbered(k), "rgb24")
                frame.time_base, frame.pts = time_base, int(time / time_base)
                assert frame.pts * time_base == time, "timestamps must be exact in the time base"
                packets += video.encode(frame)
            packets += video.encode(None)
            ends = [*times[1:], times[-1] + last_s]
            in_order = sorted(packets, key=lambda packet: packet.pts)
            for packet, begin, end in zip(in_order, times, ends, strict=True):
                packet.duration = int((end - begin) / time_base)  # the encoder knows only its nominal rate
        if sound is not None:
            packets += encode_sound(container, sound)
        container.mux(packets)


def encode_sound(container: av.container.OutputContainer, sound: Sound) -> list[av.Packet]:
    stream = container.add_stream(sound.codec, rate=sound.rate_hz, layout=sound.layout)
    packets = []
    samples, begin = sound.samples(), round(sound.start_s * sound.rate_hz)
    for at in range(0, len(samples), 1024):
        block = np.repeat(samples[None, at : at + 1024], stream.codec_context.channels, axis=0)
        frame = av.AudioFrame.from_ndarray(block, "fltp", sound.layout)
        frame.sample_rate, frame.pts, frame.time_base = sound.rate_hz, begin + at, Fraction(1, sound.rate_hz)
        packets += stream.encode(frame)
    return packets + stream.encode(None)


def regular(rate: Fraction | int, count: int, start: Fraction | int = 0) -> list[Fraction]:
    return [start + Fraction(k) / rate for k in range(count)]


def shown_at(times: list[Fraction], last_s: Fraction, zero: Fraction) -> list[int]:
    """Reference implementation: the latest picture that is due at every i/25 before the end.

    A picture is due half a frame early: half of the time since the picture before it, and at most 20 ms.
    """
    due = [times[0], *(time - min(time - before, Fraction(1, 25)) / 2 for before, time in itertools.pairwise(times))]
    expected = []
    while (now := zero + Fraction(len(expected), 25)) < times[-1] + last_s:
        begun = [k for k, time in enumerate(due) if time <= now]
        expected.append(begun[-1] if begun else 0)
    return expected


def numbers(path: Path, *args: int) -> list[int]:
    return [number_of(picture) for picture in read_frames(path, *args)]


@pytest.mark.parametrize("ending", ["mp4", "mkv", "ts", "avi", "flv"])
def test_every_container_gives_every_picture_of_25_fps_once(tmp_path: Path, ending: str):
    film = tmp_path / f"film.{ending}"
    write_film(film, regular(25, 40), Fraction(1, 25), Fraction(1, 25) if ending == "avi" else Fraction(1, 90000))
    assert numbers(film) == list(range(40))
    assert probe(film).frame_rate == 25


@pytest.mark.parametrize("rate", [Fraction(24000, 1001), 24, 25, NTSC, 30, 50, 2 * NTSC])
@pytest.mark.parametrize("b_frames", [0, 2])
def test_constant_rates_give_the_expected_pictures(tmp_path: Path, rate: Fraction | int, b_frames: int):
    film = tmp_path / "film.mp4"
    time_base = Fraction(1, 120000)  # exact for every rate here
    times, last_s = regular(rate, 130), 1 / Fraction(rate)
    write_film(film, times, last_s, time_base, b_frames=b_frames)
    info = probe(film)
    assert info.frame_rate == rate
    assert info.num_pictures == 130
    assert info.num_frames == math.ceil(130 / Fraction(rate) * 25)
    assert numbers(film) == shown_at(times, last_s, Fraction(0))


def test_an_independent_decoder_gives_the_same_pictures(tmp_path: Path):
    """decord, on a film whose picture i is frame i: constant 25 fps from zero, H.264 with B-frames."""
    film = tmp_path / "film.mp4"
    write_film(film, regular(25, 60), Fraction(1, 25))
    reader = decord.VideoReader(str(film), num_threads=1)
    assert len(reader) == probe(film).num_frames == 60
    for number, picture in enumerate(read_frames(film)):
        other = reader.next().asnumpy()
        assert number_of(picture) == number_of(other) == number
        assert np.abs(picture.astype(np.int16) - other).mean() < 2.5


@hypothesis.settings(max_examples=12)
@hypothesis.given(
    gaps_ms=st.lists(st.integers(5, 250), min_size=2, max_size=60), start_ms=st.integers(0, 900), data=st.data()
)
def test_variable_rate_and_any_range_give_the_expected_pictures(
    tmp_path_factory: pytest.TempPathFactory, gaps_ms: list[int], start_ms: int, data
):
    film = tmp_path_factory.mktemp("variable") / "film.mkv"
    times = [Fraction(start_ms + sum(gaps_ms[:k]), 1000) for k in range(len(gaps_ms))]
    last_s = Fraction(gaps_ms[-1], 1000)
    write_film(film, times, last_s, Fraction(1, 1000))
    info = probe(film)
    assert info.zero == times[0]
    expected = shown_at(times, last_s, times[0])
    # Matroska does not always keep the last picture's duration; everything else is exact.
    count = info.num_frames
    assert numbers(film) == (expected + [len(times) - 1] * count)[:count]
    assert count >= math.ceil((times[-1] - times[0]) * 25)
    first = data.draw(st.integers(0, count))
    some = data.draw(st.integers(0, count - first))
    assert numbers(film, first, some) == (expected + [len(times) - 1] * count)[first : first + some]


def clicks_heard(samples: np.ndarray, clicks_s: tuple[float, ...]) -> list[float]:
    """The time of the loudest sample within 50 ms of each expected click."""
    heard = []
    for click_s in clicks_s:
        begin = max(0, round((click_s - 0.05) * 16000))
        part = np.abs(samples[begin : begin + 1600])
        assert part.max() > 0.02, f"no click near {click_s} s"
        heard.append((begin + int(part.argmax())) / 16000)
    return heard


@pytest.mark.parametrize("rate_hz", [8000, 16000, 22050, 44100, 48000])
@pytest.mark.parametrize(
    ("ending", "codec"), [("mp4", "aac"), ("mkv", "flac"), ("mkv", "libopus"), ("mp4", "libmp3lame")]
)
def test_audio_clicks_keep_their_times(tmp_path: Path, rate_hz: int, ending: str, codec: str):
    if codec == "libopus" and rate_hz in (22050, 44100):
        rate_hz = 24000  # Opus supports few rates
    if codec == "libmp3lame":
        rate_hz = max(rate_hz, 16000)  # MP4 cannot hold MP3 at lower rates
    film = tmp_path / f"film.{ending}"
    clicks_s = (0.3, 1.0, 1.75, 2.9)
    write_film(film, regular(25, 75), Fraction(1, 25), sound=Sound(clicks_s, rate_hz=rate_hz, codec=codec))
    with open_audio(film) as sound:
        np.testing.assert_allclose(clicks_heard(sound.samples, clicks_s), clicks_s, atol=1e-3)
        assert sound.samples.dtype == np.float32
        if codec in ("aac", "flac"):  # the other formats pad the end
            assert sound.num_samples == 48000
            assert sound.num_frames == 75


@pytest.mark.parametrize("ending", ["mp4", "mkv", "ts"])
@pytest.mark.parametrize(("video_s", "audio_s"), [(0.84, 0.0), (0.0, 0.6), (1.5, 1.4), (0.2, 0.2), (3.333, 3.0)])
def test_start_offsets_of_video_and_audio_are_kept(tmp_path: Path, ending: str, video_s: float, audio_s: float):
    film = tmp_path / f"film.{ending}"
    video_start = Fraction(round(video_s * 1000), 1000)
    times = regular(25, 60, video_start)
    clicks_s = (audio_s + 0.2, audio_s + 1.1, audio_s + 2.0)
    codec = "mp2" if ending == "ts" else "flac"
    write_film(film, times, Fraction(1, 25), sound=Sound(clicks_s, audio_s, audio_s + 2.5, codec=codec))
    info = probe(film)
    assert info.video_span is not None
    assert info.audio_span is not None
    offset_s = float(info.video_span.start - info.audio_span.start)
    # FLAC starts exactly; MP2 starts up to one priming block earlier, which transport streams cannot signal.
    assert -1e-3 <= offset_s - (video_s - audio_s) <= (0.025 if ending == "ts" else 1e-3)
    muxed_s = info.video_span.start - video_start  # the muxer's constant shift of all times
    begun = [time + muxed_s for time in times]
    assert numbers(film) == shown_at(begun, Fraction(1, 25), info.zero)
    assert (
        info.first_frame == math.ceil((begun[0] - info.audio_span.start - Fraction(1, 1000)) * 25)
        or begun[0] <= info.audio_span.start
    )
    assert info.zero + Fraction(info.first_frame, 25) == begun[0]
    with open_audio(film) as sound:
        expected_s = [click_s + float(muxed_s - info.zero) for click_s in clicks_s]
        np.testing.assert_allclose(clicks_heard(sound.samples, tuple(expected_s)), expected_s, atol=1.1e-3)


def test_audio_gaps_become_silence_of_the_same_length(tmp_path: Path):
    film = tmp_path / "film.mkv"
    with av.open(str(film), "w") as container:
        first = encode_sound(container, Sound((0.2,), 0, 0.5, codec="pcm_s16le"))
        second = Sound((1.7,), 1.5, 2.0).samples()
        stream = container.streams[0]
        frame = av.AudioFrame.from_ndarray((second[None] * 32767).astype(np.int16), "s16", "mono")
        frame.sample_rate, frame.pts, frame.time_base = 48000, 72000, Fraction(1, 48000)
        container.mux(first)
        raw = av.Packet((second * 32767).astype("<i2").tobytes())
        raw.stream, raw.time_base, raw.pts, raw.dts = stream, Fraction(1, 48000), 72000, 72000
        container.mux(raw)
    with open_audio(film) as sound:
        np.testing.assert_allclose(clicks_heard(sound.samples, (0.2, 1.7)), (0.2, 1.7), atol=1e-3)
        assert sound.num_samples == pytest.approx(32000, abs=16)
        assert not sound.samples[9000:23000].any()


def test_audio_is_resampled_without_aliasing_or_loss(tmp_path: Path):
    wav = tmp_path / "tones.wav"
    time_s = np.arange(2 * 44100) / 44100
    tones = 0.4 * np.sin(2 * np.pi * 1000 * time_s) + 0.4 * np.sin(2 * np.pi * 11000 * time_s)  # 11 kHz must vanish
    with wave.open(str(wav), "wb") as file:
        file.setparams((2, 2, 44100, 0, "NONE", ""))
        file.writeframes(np.repeat((tones * 32767).astype("<i2"), 2).tobytes())
    with open_audio(wav) as sound:
        assert sound.num_samples == 32000
        kept = 0.4 * np.sin(2 * np.pi * 1000 * np.arange(32000) / 16000)
        error = (sound.samples - kept)[400:-400]
        assert np.sqrt((error**2).mean()) < 0.4 * 1e-3  # -60 dB


def test_channels_are_averaged_and_surround_does_not_clip(tmp_path: Path):
    one_sided = tmp_path / "one.wav"
    with wave.open(str(one_sided), "wb") as file:
        file.setparams((2, 2, 16000, 0, "NONE", ""))
        file.writeframes(np.array([[16384, 0]] * 8000, "<i2").tobytes())
    with open_audio(one_sided) as sound:  # the mean would be half as loud
        np.testing.assert_allclose(sound.samples[100:-100], 0.5, atol=1e-4)
        assert sound.notes == ("channel 1 of 2 is used: the mean of its 2 channels would be 6 dB quieter",)
    two_sided = tmp_path / "two.wav"
    with wave.open(str(two_sided), "wb") as file:
        file.setparams((2, 2, 16000, 0, "NONE", ""))
        file.writeframes(np.array([[16384, 8192]] * 8000, "<i2").tobytes())
    with open_audio(two_sided) as sound:
        np.testing.assert_allclose(sound.samples[100:-100], 0.375, atol=1e-4)
        assert sound.notes == ()
    surround = tmp_path / "surround.mkv"
    with av.open(str(surround), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=16000, layout="5.1")
        full = av.AudioFrame.from_ndarray(np.full((1, 6 * 4000), 32767, np.int16), "s16", "5.1")
        full.sample_rate = 16000
        container.mux(stream.encode(full) + stream.encode(None))
    with open_audio(surround) as sound:
        assert 0.9 < sound.samples[1000:3000].min() <= sound.samples.max() <= 1.01


def test_pictures_and_sound_of_25_fps_keep_their_offset(tmp_path: Path):
    """A flash (a change of picture) and a click at the same time, in films whose pictures start 0 to 40 ms late."""
    for ending, codec, offset_ms in itertools.product(("mp4", "mkv", "ts", "avi"), ("flac", "mp2"), (1, 8, 21, 39)):
        if (ending == "mkv") != (codec == "flac"):
            continue
        offset_s = Fraction(offset_ms, 1000)
        times = regular(25, 30, offset_s)
        click_s = float(times[20])
        film = tmp_path / f"film_{offset_ms}.{ending}"
        time_base = Fraction(1, 1000) if ending != "avi" else Fraction(1, 25)
        if ending == "avi":  # AVI has no start times: pictures and sound start together. MP2 starts 481 samples late
            times, click_s = regular(25, 30), 20 / 25 - 481 / 48000
        sound = Sound((click_s,), 0, 1.2, codec=codec)
        write_film(film, times, Fraction(1, 25), time_base, sound=sound, b_frames=0 if ending == "avi" else 2)
        flash = numbers(film).index(20)
        with open_audio(film) as sound:
            heard_s = clicks_heard(sound.samples, (flash / 25,))[0]
        assert heard_s == pytest.approx(flash / 25, abs=1.1e-3), (ending, codec, offset_ms)


@pytest.mark.parametrize("rate", [12, Fraction(24000, 1001), 24, NTSC, 30, 48, 50, 2 * NTSC])
def test_other_rates_are_late_or_early_by_at_most_half_a_frame(tmp_path: Path, rate: Fraction | int):
    film = tmp_path / "film.mp4"
    times = regular(rate, 90)
    write_film(film, times, 1 / Fraction(rate), Fraction(1, 120000))
    shown = numbers(film)
    late_s = [float(Fraction(i, 25) - times[k]) for i, k in enumerate(shown) if shown.index(k) == i]
    half_s = float(min(1 / Fraction(rate), Fraction(1, 25))) / 2
    assert -half_s <= min(late_s) and max(late_s) <= half_s
    assert abs(np.mean(late_s)) < half_s / 3


def raw_samples(path: Path) -> np.ndarray:
    """Reference: all decoded samples of the first channel one after the other, whatever their times are."""
    with av.open(str(path)) as container:
        return np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])


def test_vorbis_samples_stay_together(shared_faults: Path):
    """Where Vorbis blocks change their size, FFmpeg's durations and times are wrong by up to 10 ms."""
    path = shared_faults / "05_vorbis.ogg"
    changes = SoundChanges()
    decoded = np.concatenate(list(decode_sound(probe(path), changes)), axis=1)
    np.testing.assert_array_equal(decoded[0], raw_samples(path))
    assert changes.notes(44100) == []


def test_a_clock_that_starts_again_is_carried_on(tmp_path: Path, shared_faults: Path):
    """Films and recordings that were joined byte by byte: every picture and sample of all parts is delivered."""
    with open_audio(shared_faults / "04_chained.ogg") as sound:
        stored = len(raw_samples(shared_faults / "04_chained.ogg"))
        assert sound.num_samples == math.ceil(stored * 16000 / 44100)
    joined = probe(shared_faults / "04_joined.mpg")
    assert (joined.num_pictures, joined.num_frames) == (150, 150)
    assert "joined from 2 parts" in joined.notes[0]
    with open_audio(shared_faults / "04_joined.mpg") as sound:
        assert sound.num_samples / 16000 == pytest.approx(262656 / 44100, abs=0.025)
    for later in (0, 30, 5000):
        parts = []
        for number, start in enumerate((0, later)):
            part = tmp_path / f"{later}_{number}.ts"
            click = Sound((start + 0.4,), start, start + 1, codec="mp2")
            write_film(part, regular(25, 25, Fraction(start)), Fraction(1, 25), sound=click)
            parts.append(part.read_bytes())
        film = tmp_path / f"{later}.ts"
        film.write_bytes(b"".join(parts))
        shown, info = numbers(film), probe(film)
        assert [k for k, _ in itertools.groupby(shown)] == [*range(25), *range(25)]
        assert len(shown) == pytest.approx(50, abs=2)
        assert "joined from 2 parts" in info.notes[0]
        flashes_s = (shown.index(10) / 25, (len(shown) - shown[::-1].index(10) - 1) / 25)
        with open_audio(film) as sound:
            late_s = np.subtract(clicks_heard(sound.samples, flashes_s), flashes_s)
        assert late_s[1] == pytest.approx(late_s[0], abs=0.021)  # the second part starts between two frames


def test_pictures_of_the_same_time_are_counted(tmp_path: Path):
    film = tmp_path / "film.mkv"
    with av.open(str(film), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.options = WIDTH, HEIGHT, {"bf": "0"}
        packets = []
        for k in range(20):
            frame = av.VideoFrame.from_ndarray(numbered(k), "rgb24")
            frame.pts, frame.time_base = k, Fraction(1, 25)
            packets += stream.encode(frame)
        for k, packet in enumerate(packets + stream.encode(None)):
            packet.pts = packet.dts = k - (k > 9)
            container.mux(packet)
    assert probe(film).notes == ("1 of its 20 pictures have the time of another and are not shown",)
    assert len(numbers(film)) == 19


def test_a_gap_is_only_filled_if_it_lasts(tmp_path: Path):
    """Times that are wrong for a moment move no sample; sound that is missing is replaced by silence."""
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, 48000).astype(np.float32)

    def written(name: str, late: dict[int, int]) -> Path:
        path = tmp_path / name
        with av.open(str(path), "w") as container:
            stream = container.add_stream("pcm_s16le", rate=48000, layout="mono")
            container.start_encoding()
            shift = 0
            for number in range(48):
                shift += late.get(number, 0)
                packet = av.Packet((samples[1000 * number :][:1000] * 32767).astype("<i2").tobytes())
                packet.stream, packet.time_base = stream, Fraction(1, 48000)
                packet.pts = packet.dts = 1000 * number + shift
                packet.duration = 1000
                container.mux(packet)
        return path

    for late, filled, cut in (
        ({20: 990, 21: -990}, 0, 0),
        ({20: 2400}, 2400, 0),
        ({20: 9600, 40: -999}, 9600, 999),
    ):
        path, changes = written(f"{filled}.nut", late), SoundChanges()
        decoded = np.concatenate(list(decode_sound(probe(path), changes)), axis=1)[0]
        assert (changes.filled, changes.cut) == (filled, cut)
        np.testing.assert_allclose(decoded[:20000], samples[:20000], atol=1e-4)
        np.testing.assert_allclose(decoded[20000 + filled : 30000 + filled], samples[20000:30000], atol=1e-4)
        assert len(decoded) == 48000 + filled - cut


def test_a_packet_that_cannot_be_decoded_is_skipped(tmp_path: Path):
    """Joined MP3 files have the header of the second one in the middle, which is no sound."""
    parts = []
    for number in range(2):
        part = tmp_path / f"{number}.mp3"
        with av.open(str(part), "w") as container:
            container.mux(encode_sound(container, Sound((0.5,), codec="libmp3lame", rate_hz=44100, end_s=1)))
        parts.append(part.read_bytes())
    (tmp_path / "joined.mp3").write_bytes(b"".join(parts))
    with open_audio(tmp_path / "joined.mp3") as sound:
        assert sound.num_samples / 16000 == pytest.approx(2.1, abs=0.06)
        assert "1 of the packets of its sound could not be decoded" in sound.notes[0]


@pytest.mark.parametrize(
    ("levels", "layout", "note"),
    [
        ((0.5, -0.5), "stereo", "channel 1 of 2 is used"),
        ((0, 0, 0, 0, 0, 0.5, 0, 0), "7.1", "channel 6 of 8 is used"),
        ((0.1, 0.1, 0.5, 0.1, 0.1, 0.1), "5.1", "channel 3 of 6 (the centre)"),
        ((0.5, 0.5), "stereo", None),
    ],
)
def test_no_mix_of_channels_loses_the_voice(tmp_path: Path, levels: tuple[float, ...], layout: str, note: str | None):
    """The voice is at the level of 0.5 in some channels; the others have noise of their own."""
    generator = np.random.default_rng(1)
    voice = np.sin(2 * np.pi * 300 * np.arange(32000) / 16000)
    channels = [
        level * voice if abs(level) == 0.5 else (level + 0.003) * generator.uniform(-1, 1, len(voice))
        for level in levels
    ]
    path = tmp_path / "sound.wav"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=16000, layout=layout)
        interleaved = (np.stack(channels, axis=1) * 32767).astype(np.int16).reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(interleaved, "s16", layout)
        frame.sample_rate = 16000
        container.mux(stream.encode(frame) + stream.encode(None))
    with open_audio(path) as sound:
        assert np.abs(np.corrcoef(sound.samples[:32000], voice)[0, 1]) > 0.99
        assert np.sqrt(np.mean(sound.samples**2)) == pytest.approx(0.5 / np.sqrt(2), rel=0.02)
        assert [text[: len(note or "")] for text in sound.notes] == ([] if note is None else [note])


def test_audio_longer_or_shorter_than_the_video_keeps_its_length(tmp_path: Path):
    longer, shorter = tmp_path / "longer.mp4", tmp_path / "shorter.mp4"
    write_film(longer, regular(25, 50), Fraction(1, 25), sound=Sound(end_s=3.01))
    write_film(shorter, regular(25, 50), Fraction(1, 25), sound=Sound(end_s=1.01))
    for film, sound_frames, duration_s in ((longer, 76, 3.01), (shorter, 26, 2.0)):
        with open_audio(film) as sound:
            assert (probe(film).num_frames, sound.num_frames) == (50, sound_frames)
            assert probe(film).duration_s == pytest.approx(duration_s, abs=1e-3)
            assert len(fit_samples(sound.samples, 50)) == 50 * SAMPLES_PER_FRAME
    ramp = np.arange(1000, dtype=np.float32)
    np.testing.assert_array_equal(fit_samples(ramp, 1), ramp[:640])
    np.testing.assert_array_equal(fit_samples(ramp, 2), np.pad(ramp, (0, 280)))


ONE = 1 << 16


@pytest.mark.parametrize(
    ("a", "b", "c", "d", "rotation_deg", "undo"),
    [
        (0, 1, -1, 0, 90, lambda p: np.rot90(p, 1)),
        (-1, 0, 0, -1, 180, lambda p: np.rot90(p, 2)),
        (0, -1, 1, 0, 270, lambda p: np.rot90(p, -1)),
        (-1, 0, 0, 1, 0, lambda p: p[:, ::-1]),
        (1, 0, 0, -1, 180, lambda p: p[::-1]),
        (0, 1, 1, 0, 90, lambda p: p.transpose(1, 0, 2)),
    ],
)
def test_display_matrix_is_applied_to_pictures(tmp_path: Path, a: int, b: int, c: int, d: int, rotation_deg: int, undo):
    """The matrix maps stored (x, y) to (a x + c y, b x + d y); undoing it with numpy must give the stored picture."""
    film = tmp_path / "film.mp4"
    write_film(film, regular(25, 5), Fraction(1, 25), matrix=[a * ONE, b * ONE, 0, c * ONE, d * ONE, 0, 0, 0, 1 << 30])
    info = probe(film)
    assert info.rotation_deg == rotation_deg
    assert (info.width, info.height) == ((HEIGHT, WIDTH) if a == 0 else (WIDTH, HEIGHT))
    for k, picture in enumerate(read_frames(film)):
        assert picture.shape == (info.height, info.width, 3)
        assert number_of(undo(picture)) == k


def test_colours_survive_bt709_bt601_and_both_ranges(tmp_path: Path):
    """Flat colours in three tagged encodings; the expected planes are computed by hand."""
    rgb = np.array([200.0, 60.0, 120.0])
    for name, kr, kb, space, full in (
        ("709", 0.2126, 0.0722, 1, False),
        ("601", 0.299, 0.114, 5, False),
        ("709full", 0.2126, 0.0722, 1, True),
    ):
        film = tmp_path / f"{name}.mp4"
        luma = kr * rgb[0] + (1 - kr - kb) * rgb[1] + kb * rgb[2]
        blue, red = (rgb[2] - luma) / (2 - 2 * kb), (rgb[0] - luma) / (2 - 2 * kr)
        planes = (
            (luma, blue + 128, red + 128)
            if full
            else (16 + luma * 219 / 255, 128 + blue * 224 / 255, 128 + red * 224 / 255)
        )
        with av.open(str(film), "w") as container:
            stream = container.add_stream("libx264", rate=25, options={"qp": "0"})
            stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
            stream.codec_context.colorspace, stream.codec_context.color_range = space, 2 if full else 1
            yuv = np.concatenate(
                [
                    np.full(64 * 32 // part, round(value), np.uint8)
                    for value, part in zip(planes, (1, 4, 4), strict=True)
                ]
            )
            frame = av.VideoFrame.from_ndarray(yuv.reshape(48, 64), "yuv420p")
            frame.colorspace, frame.color_range = space, 2 if full else 1
            container.mux(stream.encode(frame) + stream.encode(None))
        (picture,) = read_frames(film)
        np.testing.assert_allclose(picture[8:-8, 8:-8].reshape(-1, 3), np.broadcast_to(rgb, (16 * 48, 3)), atol=2.0)


def test_default_stream_is_used_and_cover_art_is_not_video(tmp_path: Path):
    film = tmp_path / "film.mkv"
    with av.open(str(film), "w") as container:
        packets = []
        for which in range(2):
            video = container.add_stream("libx264", rate=25)
            video.width, video.height, video.pix_fmt = WIDTH, HEIGHT, "yuv420p"
            video.disposition = av.stream.Disposition.default if which else av.stream.Disposition(0)
            for k in range(10):
                packets += video.encode(av.VideoFrame.from_ndarray(numbered(1000 * which + k), "rgb24"))
            packets += video.encode(None)
        container.mux(packets)
    assert numbers(film) == list(range(1000, 1010))
    song = tmp_path / "song.m4a"
    with av.open(str(song), "w", format="mp4") as container:
        cover = container.add_stream("mjpeg", rate=25)
        cover.width, cover.height, cover.pix_fmt = 32, 32, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        packets = encode_sound(container, Sound(end_s=1.0))
        container.mux(cover.encode(av.VideoFrame.from_ndarray(numbered(0, 36, 32)[:, :32].copy(), "rgb24")))
        container.mux([*cover.encode(None), *packets])
    assert not probe(song).has_video
    assert probe(song).num_frames == 0


def reason(path: Path, read=lambda path: list(read_frames(path))) -> str:
    with pytest.raises(MediaError) as caught:
        read(path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(path)), "the message must name the file"
    assert ";" in message, "the message must give a remedy"
    assert "[Errno" not in message
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.reason, str(again), again.path) == (caught.value.reason, message, caught.value.path)
    return caught.value.reason


def test_invalid_files_are_refused_with_a_reason(tmp_path: Path):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("Not a film.\n" * 50)
    (tmp_path / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(20_000))
    (tmp_path / "list.mp4").write_text("#EXTM3U\n#EXTINF:1,\nsecret.mp4\n")
    write_film(tmp_path / "secret.mp4", regular(25, 5), Fraction(1, 25))
    (tmp_path / "concat.mp4").write_text("ffconcat version 1.0\nfile secret.mp4\n")
    os.mkfifo(tmp_path / "pipe.mp4")
    assert reason(tmp_path / "missing.mp4") == "missing"
    assert reason(tmp_path) == "not_a_file"
    assert reason(tmp_path / "pipe.mp4") == "not_a_file"
    assert reason(tmp_path / "empty.mp4") == "empty_file"
    for name in ("text.mp4", "noise.mp4", "list.mp4", "concat.mp4"):
        assert reason(tmp_path / name) == "not_media", name


def test_missing_audio_and_missing_video_are_reported(tmp_path: Path):
    silent, heard = tmp_path / "silent.mp4", tmp_path / "heard.m4a"
    write_film(silent, regular(25, 5), Fraction(1, 25))
    write_film(heard, [], Fraction(0), sound=Sound(end_s=1.0))
    assert reason(silent, open_audio) == "no_audio"
    assert reason(heard) == "no_video"
    with open_audio(heard) as sound:
        assert sound.num_frames == 25


def test_audio_with_nan_and_empty_audio_are_refused(tmp_path: Path):
    wav = tmp_path / "nan.wav"
    for samples, code in ((np.array([0.1] * 5000 + [np.nan] * 10), "not_finite"), (np.zeros(0), "empty_audio")):
        data = samples.astype("<f4").tobytes()
        form = struct.pack("<IHHIIHH", 16, 3, 1, 16000, 64000, 4, 32)  # 32-bit float, mono
        header = (
            b"RIFF" + struct.pack("<I", 36 + len(data)) + b"WAVEfmt " + form + b"data" + struct.pack("<I", len(data))
        )
        wav.write_bytes(header + data)
        assert reason(wav, open_audio) == code


@pytest.mark.parametrize("ending", ["mp4", "mkv", "avi"])
@pytest.mark.parametrize("share", [0.9, 0.5, 0.2])
def test_truncated_film_is_refused_not_read_as_a_shorter_one(tmp_path: Path, ending: str, share: float):
    film, cut = tmp_path / f"film.{ending}", tmp_path / f"cut.{ending}"
    write_film(film, regular(25, 200), Fraction(1, 25), Fraction(1, 25), sound=Sound(end_s=8.0, codec="libmp3lame"))
    data = film.read_bytes()
    cut.write_bytes(data[: int(len(data) * share)])
    assert reason(cut) == ("no_index" if ending == "mp4" else "truncated")
    if ending == "mp4":  # with the index first, the file opens
        with av.open(str(film)) as given, av.open(str(cut), "w", container_options={"movflags": "faststart"}) as front:
            for stream in given.streams:
                front.add_stream_from_template(stream)
            front.mux([packet for packet in given.demux() if packet.dts is not None])
        data = cut.read_bytes()
        assert probe(cut).num_frames == 200
        cut.write_bytes(data[: int(len(data) * share)])
        assert reason(cut) in ("truncated", "corrupt")  # corrupt if the index itself is truncated
        assert share < 0.5 or reason(cut) == "truncated"


def test_timestamp_jump_is_corruption_not_a_long_film(tmp_path: Path):
    film = tmp_path / "film.mkv"
    write_film(film, [*regular(25, 10), Fraction(100_000)], Fraction(1, 25), Fraction(1, 1000))
    assert reason(film) == "corrupt"
    write_film(film, regular(25, 10, 5000), Fraction(1, 25), Fraction(1, 1000), sound=Sound(codec="flac"))
    assert reason(film) == "corrupt"
    write_film(film, [*regular(25, 10), Fraction(60)], Fraction(1, 25), Fraction(1, 1000))
    assert probe(film).num_frames == 1501


@pytest.mark.parametrize("ending", ["mp4", "mkv", "avi", "ts", "flv"])
def test_mutated_files_are_read_or_raise_media_error(tmp_path: Path, ending: str):
    film, mutant = tmp_path / f"film.{ending}", tmp_path / f"mutant.{ending}"
    time_base = Fraction(1, 25) if ending == "avi" else Fraction(1, 90000)
    write_film(film, regular(25, 20), Fraction(1, 25), time_base, sound=Sound(end_s=0.8, codec="libmp3lame"))
    whole = np.frombuffer(film.read_bytes(), np.uint8)
    rng = np.random.default_rng(3)
    refused = 0
    for k in range(20):
        data = whole.copy()
        data[rng.integers(0, len(data) if k % 2 else min(len(data), 3000), 8)] = rng.integers(0, 256, 8)
        mutant.write_bytes(data[: rng.integers(1, len(data)) if k % 5 == 0 else len(data)].tobytes())
        for read in (lambda path: list(read_frames(path)), open_audio):
            try:
                read(mutant)
            except MediaError:
                refused += 1
    assert 0 < refused < 40


def test_change_of_picture_size_is_refused(tmp_path: Path):
    first, second = tmp_path / "first.ts", tmp_path / "second.ts"
    write_film(first, regular(25, 10), Fraction(1, 25))
    with av.open(str(second), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for k in range(10):
            frame = av.VideoFrame(64, 64, "yuv420p")
            frame.pts, frame.time_base = 50 + k, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    first.write_bytes(first.read_bytes() + second.read_bytes())
    assert reason(first) == "unsupported"


def test_ranges_are_checked_and_pictures_do_not_share_memory(tmp_path: Path):
    film = tmp_path / "film.mp4"
    write_film(film, regular(5, 10), Fraction(1, 5))
    for start_frame, num_frames in ((0, 51), (-1, 2), (51, 0), (5, -1)):
        with pytest.raises(TccpError, match="the film has 0 to 50 at 25 fps"):
            read_frames(film, start_frame, num_frames)
    assert numbers(film, 50, 0) == []
    for picture in read_frames(film):  # each picture fills five frames: writing to one must not change the next
        assert picture.flags.writeable
        assert picture.max() > 0 or number_of(picture) == 0
        number_of(picture)
        picture[:] = 77


def test_changed_file_is_read_again(tmp_path: Path):
    film = tmp_path / "film.mp4"
    for count in (10, 20):
        write_film(film, regular(25, count), Fraction(1, 25))
        assert probe(film).num_frames == count


def test_wav_files_round_trip(tmp_path: Path):
    wav = tmp_path / "sound.wav"
    samples = np.random.default_rng(1).uniform(-1, 1, 70_000)
    write_audio_wav(wav, samples)
    with open_audio(wav) as sound:
        np.testing.assert_allclose(sound.samples, samples, atol=0.51 / 32768)
    write_audio_wav(wav, np.array([-3.0, 3.0]))
    with open_audio(wav) as sound:
        np.testing.assert_allclose(sound.samples, [-1, 1], atol=1e-4)
    with pytest.raises(TccpError, match="cannot be written"):
        write_audio_wav(tmp_path / "no such folder" / "sound.wav", samples)


def test_memory_does_not_grow_with_film_length(tmp_path: Path):
    """Ten times the length raises the peak by less than 10%, with pictures and audio; each film has its own process.

    The garbage collector is off: pictures must not wait for it, at 6 MB each in full HD.
    """
    script = """
import gc, resource, sys
from tccp.media import open_audio, read_frames
gc.disable()
count = sum(1 for _ in read_frames(sys.argv[1]))
with open_audio(sys.argv[1]) as sound:
    print(count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    peaks = []
    for seconds in (10, 100):
        film = tmp_path / f"{seconds}.mp4"
        write_film(film, regular(25, 25 * seconds), Fraction(1, 25), sound=Sound(end_s=seconds))
        run = subprocess.run([sys.executable, "-c", script, str(film)], capture_output=True, text=True, check=True)
        count, peak = map(int, run.stdout.split())
        assert count == 25 * seconds
        peaks.append(peak)
    assert peaks[1] < 1.1 * peaks[0], peaks
