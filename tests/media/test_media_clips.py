"""Every shared clip: counts and start times against a table from its packets, pictures against a plain decode."""

from __future__ import annotations

import bisect
import itertools
import math
from fractions import Fraction
from pathlib import Path

import av
import decord
import numpy as np
import pytest

from tccp.media import MediaError, fit_samples, open_audio, probe, read_frames

# Clip: stored pictures, their rate, first picture and first sample in seconds, frames at 25 fps, samples at 16 kHz.
# Frames are ceil(25 (last picture's end - zero)), samples are ceil(16000 (end of sound - zero)).
GRID = (75, 25, 0, 0, 75, 47648)  # 114 blocks of 1152 samples at 44.1 kHz
SYNC = (73, 25, 0, 0, 73, 46400)
CLIPS: dict[str, tuple] = {
    "audio_only.m4a": (0, None, None, 0, 0, 48000),
    "audio_short_2s.mp4": (100, 25, 0, 0, 100, 32000),
    "face_gap.mp4": (150, 25, 0, 0, 150, 96000),
    "fps_29.97.mp4": (120, Fraction(30000, 1001), 0, 0, 101, 64000),  # 4.004 s: the remainder is one more frame
    "fps_50.mp4": (200, 50, 0, 0, 100, 64000),
    "fps_59.94.mp4": (240, Fraction(60000, 1001), 0, 0, 101, 64000),
    "grid_bbaf2n.mpg": GRID,
    "grid_brbk7n.mpg": GRID,
    "grid_lwbsza.mpg": GRID,
    "hard_cut.mp4": (146, 25, 0, 0, 146, 93440),
    "intel_asl_again.mkv": (77, 30, 0.033, None, 65, None),
    "intel_asl_book.mkv": (109, 30, 0.033, None, 91, None),
    "latentsync_demo1.mp4": (250, 25, 0, 0, 250, 160125),
    "latentsync_demo2.mp4": (502, 25, 0, 0, 502, 320622),
    "lowres_180x320.mp4": (75, 25, 0, 0, 75, 48000),
    "moviepy_chaplin.mp4": (241, 25, 0, 0, 241, 153827),
    "nasa_13013.mp4": (390, Fraction(30000, 1001), 0, 0, 326, 208896),
    "no_audio.mp4": (100, 25, 0, None, 100, None),
    "rotate_tag.mp4": (100, 25, 0, 0, 100, 64000),
    "short_hamilton_clip.mp4": (275, Fraction(2997, 100), 10214 / 11988, 353 / 44100, 252, 160701),
    "sync_grid_0.mp4": SYNC,
    "sync_grid_audio_early_200ms.mp4": SYNC,
    "sync_grid_audio_late_200ms.mp4": SYNC,
    "two_person_overlap.mp4": SYNC,
    "two_person_turns.mp4": (148, 25, 0, 0, 148, 93440),
    "vfr.mp4": (78, None, 0, 0, 100, 64000),
}
BROKEN = {
    "corrupt_empty.mp4": "empty_file",
    "corrupt_text.mp4": "not_media",
    "corrupt_truncated_no_moov.mp4": "no_index",
    "corrupt_truncated_faststart.mp4": "truncated",
    "corrupt_bitflips.mp4": "corrupt",
}


def test_table_lists_every_shared_clip(shared_clips: Path):
    assert {path.name for path in shared_clips.iterdir() if path.suffix != ".md"} == set(CLIPS) | set(BROKEN)


@pytest.mark.parametrize("name", CLIPS)
def test_counts_and_start_times_are_exact(shared_clips: Path, name: str):
    pictures, rate, video_start_s, audio_start_s, num_frames, num_samples = CLIPS[name]
    info = probe(shared_clips / name)
    assert (info.num_pictures, info.frame_rate, info.num_frames) == (pictures, rate, num_frames)
    assert info.video_start_s == (None if video_start_s is None else pytest.approx(video_start_s, abs=1e-9))
    assert info.audio_start_s == (None if audio_start_s is None else pytest.approx(audio_start_s, abs=1e-9))
    if num_samples is None:
        with pytest.raises(MediaError, match="no sound"):
            open_audio(shared_clips / name)
        return
    with open_audio(shared_clips / name) as sound:
        assert sound.num_samples == num_samples
        assert np.abs(sound.samples).max() > 0.01
        assert len(fit_samples(sound.samples, num_frames)) == num_frames * 640


@pytest.mark.parametrize("name", [name for name, row in CLIPS.items() if row[0]])
def test_every_frame_is_the_picture_shown_at_its_time(shared_clips: Path, name: str):
    """The reference is a plain decode with a list of all picture times and a search for each i/25."""
    path = shared_clips / name
    stored, times, turns = [], [], 0
    with av.open(str(path)) as container:
        stream = container.streams[3 if name == "nasa_13013.mp4" else 0]
        for frame in container.decode(stream):
            times.append(frame.pts * frame.time_base)
            stored.append(frame.to_ndarray(format="rgb24")[::16, ::16].astype(np.int16))
            turns = frame.rotation // 90  # counter-clockwise, as numpy turns
        starts = [Fraction(s.start_time or 0) * s.time_base for s in container.streams if s.type in ("video", "audio")]
    end = times[-1] + (times[-1] - times[0]) / (len(times) - 1) if name != "vfr.mp4" else times[-1] + Fraction(1, 25)
    zero = times[0] - max(Fraction(0), Fraction(math.ceil((times[0] - min(starts)) * 25), 25))
    due = [times[0], *(time - min(time - before, Fraction(1, 25)) / 2 for before, time in itertools.pairwise(times))]
    expected = [
        max(0, bisect.bisect_right(due, zero + Fraction(i, 25)) - 1) for i in range(math.ceil((end - zero) * 25))
    ]
    begin = max(0, len(expected) - 251)  # only the end of the one long clip, reached by seeking
    count = begin
    for i, picture in enumerate(read_frames(path, begin), begin):
        want = np.rot90(stored[expected[i]], turns)
        # The plain decode converts colours to slightly darker ones. Rotation moves its thumbnails to other pixels.
        offset = tuple((length - 1) % 16 if turns else 0 for length in picture.shape[:2])
        thumbnail = picture[(offset[0] if turns == 1 else 0) :: 16, (offset[1] if turns == 3 else 0) :: 16]
        assert np.abs(thumbnail.astype(np.int16) - want).mean() < 2.5, (i, expected[i])
        count += 1
    assert count == len(expected) == CLIPS[name][4]


@pytest.mark.parametrize("name", ["lowres_180x320.mp4", "face_gap.mp4", "hard_cut.mp4", "latentsync_demo1.mp4"])
def test_decord_gives_the_same_pictures_at_constant_25_fps(shared_clips: Path, name: str):
    """MP4 (H.264 and HEVC) at constant 25 fps from zero, where picture i is frame i."""
    reader = decord.VideoReader(str(shared_clips / name), num_threads=1)
    assert len(reader) == probe(shared_clips / name).num_frames
    for picture in read_frames(shared_clips / name, 0, 60):
        other = reader.next().asnumpy()
        assert np.abs(picture[::4, ::4].astype(np.int16) - other[::4, ::4]).mean() < 2.5


@pytest.mark.parametrize(
    "name", ["latentsync_demo2.mp4", "short_hamilton_clip.mp4", "grid_lwbsza.mpg", "intel_asl_book.mkv"]
)
def test_range_gives_the_same_pictures_as_the_whole_film(shared_clips: Path, name: str):
    last = min(100, probe(shared_clips / name).num_frames)
    ranges = [(0, 2), (last // 2, 3), (last - 3, 3)]
    wanted = {i for start, count in ranges for i in range(start, start + count)}
    whole = {i: picture for i, picture in enumerate(read_frames(shared_clips / name, 0, last)) if i in wanted}
    for start, count in ranges:
        for i, picture in enumerate(read_frames(shared_clips / name, start, count), start):
            np.testing.assert_array_equal(picture, whole[i])


def test_rotated_film_is_read_upright(shared_clips: Path):
    """The clip is another one stored sideways with a rotation tag: read upright and downscaled, both look the same."""
    (turned,) = read_frames(shared_clips / "rotate_tag.mp4", 10, 1)
    (original,) = read_frames(shared_clips / "latentsync_demo2.mp4", 10, 1)
    assert turned.shape == (1280, 720, 3)
    small = [np.mean(p.reshape(16, p.shape[0] // 16, 9, p.shape[1] // 9, 3), axis=(1, 3)) for p in (turned, original)]
    assert np.abs(small[0] - small[1]).mean() < 4
    assert np.abs(small[0][::-1, ::-1] - small[1]).mean() > 20


@pytest.mark.parametrize(("name", "reason"), BROKEN.items())
def test_broken_clips_give_a_one_line_error(shared_clips: Path, name: str, reason: str):
    with pytest.raises(MediaError) as caught:
        list(read_frames(shared_clips / name))
    assert caught.value.reason == reason
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


def test_damage_is_reported_when_it_is_reached_in_video_and_audio(shared_clips: Path):
    """The bit flips begin after a third of the file: earlier pictures are returned, damaged ones are not."""
    damaged = shared_clips / "corrupt_bitflips.mp4"
    pictures = read_frames(damaged)
    for _ in range(15):
        next(pictures)
    with pytest.raises(MediaError, match=r"the picture at \d\.\d\d s is damaged"):
        list(pictures)
    with pytest.raises(MediaError, match="the file is damaged") as caught:
        open_audio(damaged)
    assert caught.value.reason == "corrupt"
