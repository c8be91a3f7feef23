"""Films written and read back: exact frame counts, start times of zero, colours, metadata, no partial files."""

from __future__ import annotations

import os
import subprocess
import sys
import wave
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from tccp import __version__
from tccp.errors import TccpError
from tccp.media import MediaError, VideoWriter, mark_generated, open_audio, probe, read_frames, read_metadata
from tccp.media.sound import decode_sound

RNG = np.random.default_rng(7)


def noise(count: int, width: int = 48, height: int = 32) -> np.ndarray:
    return RNG.integers(0, 256, (count, height, width, 3), np.uint8)


def write(path: Path, pictures: np.ndarray, **options) -> None:
    with VideoWriter(path, pictures.shape[2], pictures.shape[1], **options) as film:
        for picture in pictures:
            film.write(picture)


def packets(path: Path, kind: str) -> list[tuple[Fraction, Fraction]]:
    """(time, duration) of each packet that is not discarded, read with PyAV."""
    with av.open(str(path)) as container:
        stream = container.streams.get({kind: 0})[0]
        return [
            (packet.pts * stream.time_base, packet.duration * stream.time_base)
            for packet in container.demux(stream)
            if packet.pts is not None and not packet.is_discard
        ]


@pytest.mark.parametrize("count", [1, 2, 7, 60])
@pytest.mark.parametrize("lossless", [False, True])
def test_frames_have_exact_timestamps_at_25_fps(tmp_path: Path, count: int, lossless: bool):
    film = tmp_path / "film.mp4"
    write(film, noise(count), audio_from=np.zeros(count * 640, np.float32), lossless=lossless)
    assert packets(film, "video") == [(Fraction(k, 25), Fraction(1, 25)) for k in range(count)]
    sound = packets(film, "audio")
    assert sound[0][0] == 0
    assert sum(duration for _, duration in sound) == Fraction(count, 25)
    info = probe(film)
    assert (info.num_frames, info.video_start_s, info.audio_start_s, info.frame_rate) == (count, 0, 0, 25)


@pytest.mark.parametrize(("width", "height"), [(48, 32), (49, 33), (16, 17)])
def test_lossless_films_round_trip_bit_for_bit(tmp_path: Path, width: int, height: int):
    film = tmp_path / "film.mp4"
    pictures = noise(9, width, height)
    write(film, pictures, lossless=True)
    np.testing.assert_array_equal(np.stack(list(read_frames(film))), pictures)


@pytest.mark.parametrize(("width", "height"), [(128, 96), (127, 95)])
def test_colours_are_not_shifted(tmp_path: Path, width: int, height: int):
    """Smooth pictures of many hues are read back without a colour bias, which would add up over generations."""
    film = tmp_path / "film.mp4"
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    pictures = np.stack([np.stack([40 + 150 * x, 30 + 20 * k + 80 * y, 220 - 90 * (x + y)], axis=-1) for k in range(6)])
    pictures = pictures.round().astype(np.uint8)
    write(film, pictures, exact_size=True)
    back = np.stack(list(read_frames(film)))
    assert back.shape == pictures.shape
    error = back.astype(float) - pictures
    assert np.abs(error).mean() < 1
    assert np.abs(error.mean(axis=(0, 1, 2))).max() < 0.8
    with av.open(str(film)) as container:
        frame = next(container.decode(video=0))
        assert (frame.colorspace, frame.color_range, frame.color_primaries, frame.color_trc) == (1, 1, 1, 1)


@pytest.mark.parametrize(("width", "height"), [(127, 96), (128, 95), (127, 95)])
def test_odd_sizes_are_padded_so_that_every_player_shows_them(tmp_path: Path, width: int, height: int):
    film = tmp_path / "film.mp4"
    x = np.mgrid[0:height, 0:width][1]
    picture = np.stack([2 * x, 255 - 2 * x, x], axis=-1).astype(np.uint8)
    write(film, np.stack([picture] * 3))
    with av.open(str(film)) as container:
        frame = next(container.decode(video=0))
        assert (frame.format.name, frame.width % 2, frame.height % 2) == ("yuv420p", 0, 0)
    back = next(iter(read_frames(film))).astype(int)
    assert back.shape == (height + height % 2, width + width % 2, 3)
    assert np.abs(back[:height, :width] - picture).mean() < 2
    assert np.abs(back[height - 1 :, width - 1 :] - picture[-1, -1]).max() < 12


@pytest.mark.parametrize("rate_hz", [16000, 44100, 48000, 11025])
def test_audio_keeps_its_rate_channels_and_timing(tmp_path: Path, rate_hz: int):
    """Clicks stay within a millisecond; the audio is cut or padded to the length of the pictures."""
    wav, film = tmp_path / "sound.wav", tmp_path / "film.mp4"
    sound = np.zeros((int(1.5 * rate_hz), 2))
    for click_s in (0.25, 0.9, 1.3):
        sound[round(click_s * rate_hz)] = (0.9, 0.4)
    with wave.open(str(wav), "wb") as file:
        file.setparams((2, 2, rate_hz, 0, "NONE", ""))
        file.writeframes((sound * 32767).astype("<i2").tobytes())
    for count, audio_from in ((50, wav), (25, str(wav)), (38, open_audio(wav))):
        write(film, noise(count), audio_from=audio_from)
        info = probe(film)
        assert (info.audio_sample_rate_hz, info.audio_channels) == (rate_hz, 2)
        assert info.audio_span is not None
        assert info.audio_span == (0, Fraction(count, 25))
        with open_audio(film) as track:
            assert track.num_frames == count
            for click_s in (0.25, 0.9, 1.3):
                if click_s < count / 25:
                    begin = round((click_s - 0.05) * 16000)
                    heard_s = (begin + np.abs(track.samples[begin : begin + 1600]).argmax()) / 16000
                    assert heard_s == pytest.approx(click_s, abs=1e-3)


def test_audio_from_an_array_and_from_a_wav_with_a_rate_unsupported_by_aac(tmp_path: Path):
    film, wav = tmp_path / "film.mp4", tmp_path / "odd.wav"
    tone = 0.5 * np.sin(np.arange(16000) * 0.3)
    write(film, noise(25), audio_from=tone)
    with open_audio(film) as track:
        assert np.corrcoef(track.samples[1000:15000], tone[1000:15000])[0, 1] > 0.999
    with wave.open(str(wav), "wb") as file:  # a rate that AAC does not support
        file.setparams((1, 2, 20000, 0, "NONE", ""))
        file.writeframes((np.sin(np.arange(20000) * 0.24) * 16000).astype("<i2").tobytes())
    write(film, noise(25), audio_from=wav)
    assert (probe(film).audio_sample_rate_hz, probe(film).audio_channels) == (22050, 1)


@pytest.mark.parametrize(("rate_hz", "channels"), [(96000, 2), (176400, 1), (192000, 6)])
def test_high_rates_are_resampled_to_48_khz_with_their_channels(tmp_path: Path, rate_hz: int, channels: int):
    wav, film = tmp_path / "sound.wav", tmp_path / "film.mp4"
    tone = np.sin(2 * np.pi * 9000 * np.arange(rate_hz) / rate_hz) * 0.4  # 16 kHz sound has no 9 kHz
    with wave.open(str(wav), "wb") as file:
        file.setparams((channels, 2, rate_hz, 0, "NONE", ""))
        file.writeframes(np.repeat((tone * 32767).astype("<i2"), channels).tobytes())
    write(film, noise(25), audio_from=wav)
    info = probe(film)
    assert (info.audio_sample_rate_hz, info.audio_channels) == (48000, channels)
    sound = np.concatenate(list(decode_sound(info)), axis=1)[:, 4800:43200]
    power = np.abs(np.fft.rfft(sound[0] * np.hanning(sound.shape[1])))
    assert power.argmax() == pytest.approx(9000 * sound.shape[1] / 48000, abs=2)
    assert np.sqrt(np.mean(sound[0] ** 2)) == pytest.approx(0.4 / np.sqrt(2), rel=0.05)


def test_metadata_marks_are_read_back(tmp_path: Path):
    film = tmp_path / "film.mp4"
    write(film, noise(3), metadata={**mark_generated(seed="17"), "title": "Zwei Köpfe"})
    tags = read_metadata(film)
    assert f"AI-generated by TCCP {__version__}" in tags["comment"]
    assert "seed=17" in tags["comment"]
    assert "compositeWithTrainedAlgorithmicMedia" in tags["comment"]
    assert tags["description"].startswith("AI-generated")
    assert tags["title"] == "Zwei Köpfe"


def files(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_failed_write_leaves_no_partial_file_and_keeps_the_old_film(tmp_path: Path):
    film = tmp_path / "film.mp4"
    film.write_bytes(b"what was there before")

    def write_and_stop() -> None:
        with VideoWriter(film, 48, 32) as writer:
            for picture in noise(30):
                writer.write(picture)
            assert len(files(tmp_path)) == 2, "the film must grow in a temporary file beside its target"
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_and_stop()
    with pytest.raises(TccpError, match="no picture was written"), VideoWriter(film, 48, 32):
        pass
    with (
        pytest.raises(TccpError, match="a picture of 32x48 was given for a film of 48x32"),
        VideoWriter(film, 48, 32) as writer,
    ):
        writer.write(noise(1, 32, 48)[0])
    assert files(tmp_path) == ["film.mp4"]
    assert film.read_bytes() == b"what was there before"
    write(film, noise(2))
    assert files(tmp_path) == ["film.mp4"]
    assert probe(film).num_frames == 2


def test_unwritable_targets_are_refused(tmp_path: Path):
    (tmp_path / "file").touch()
    (tmp_path / "folder.mp4").mkdir()
    for target in (tmp_path / "none" / "film.mp4", tmp_path / "file" / "film.mp4", tmp_path / "folder.mp4"):
        with pytest.raises(TccpError) as caught:
            write(target, noise(1))
        assert "cannot be written" in str(caught.value)
        assert "\n" not in str(caught.value)
        assert "[Errno" not in str(caught.value)
    with pytest.raises(TccpError, match=r"\.mp4"):
        VideoWriter(tmp_path / "film.avi", 48, 32)
    with pytest.raises(MediaError, match="no such file"):
        VideoWriter(tmp_path / "film.mp4", 48, 32, audio_from=tmp_path / "none.wav")
    assert files(tmp_path) == ["file", "folder.mp4"]


def test_full_disk_gives_a_one_line_error_and_no_file(tmp_path: Path):
    """A limit on the file size simulates a full disk: the same call fails."""
    script = """
import resource, signal, sys
import numpy as np
from tccp.errors import TccpError
from tccp.media import VideoWriter
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
try:
    with VideoWriter(sys.argv[1], 256, 256, lossless=True) as film:
        for _ in range(40):
            film.write(np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8))
except TccpError as error:
    print(error)
"""
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "film.mp4")], capture_output=True, text=True, check=True
    )
    assert "cannot be written" in run.stdout
    assert run.stdout.count("\n") == 1
    assert files(tmp_path) == []


def test_memory_does_not_grow_with_film_length(tmp_path: Path):
    script = """
import resource, sys
import numpy as np
from tccp.media import VideoWriter
count = int(sys.argv[2])
with VideoWriter(sys.argv[1], 128, 128, audio_from=np.zeros(640, np.float32)) as film:
    picture = np.zeros((128, 128, 3), np.uint8)
    for k in range(count):
        picture[:] = k % 256
        film.write(picture)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    peaks = [
        int(
            subprocess.run(
                [sys.executable, "-c", script, str(tmp_path / "film.mp4"), count], capture_output=True, check=True
            ).stdout
        )
        for count in ("200", "2000")
    ]
    assert peaks[1] < 1.1 * peaks[0], peaks
