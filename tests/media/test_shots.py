"""Shots: cuts are found to the frame, even between short shots; flashes and pans are not cuts."""

from __future__ import annotations

import itertools
import tracemalloc
from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tccp import media
from tccp.media.shots import CONTEXT_FRAMES, CutFinder
from tccp.roundtable.reel import Shot, pictures

WIDTH, HEIGHT = 128, 96
Picture = np.ndarray


def cuts_of(frames: Iterable[Picture]) -> list[int]:
    finder, cuts = CutFinder(), []
    for number, frame in enumerate(frames):
        found = finder.add(frame)
        assert all(number - cut == CONTEXT_FRAMES for cut in found)
        cuts += found
    return cuts + finder.finish()


Scenes = list[list[Picture]]


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    """26 frames of each of six rooms; the rooms of odd number have the same talker."""
    return [list(pictures([Shot(seed, 26, 7 if seed % 2 else None)], WIDTH, HEIGHT)) for seed in range(6)]


@pytest.fixture(params=[(0, 2), (1, 3), (4, 5)])
def two_scenes(request: pytest.FixtureRequest, scenes: Scenes) -> tuple[list[Picture], list[Picture]]:
    first, second = request.param
    return scenes[first], scenes[second]


def mixed(a: Picture, b: Picture, share: float) -> Picture:
    return np.asarray(cv2.addWeighted(a, 1 - share, b, share, 0), np.uint8)


def lit(frame: Picture, gain: float) -> Picture:
    return mixed(frame, np.full_like(frame, 255), gain)


# Cuts


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.sampled_from([2, 2, 3, 4, 5, 9, 20]), min_size=2, max_size=12),
    begins=st.integers(0, 5),
    step=st.sampled_from([1, 2]),
)
def test_every_cut_is_found_to_the_frame_without_false_cuts(
    scenes: Scenes, lengths: list[int], begins: int, step: int
) -> None:
    """Includes shots of two frames at the film's start and end. With step 2, only every other scene is used."""
    film = [scenes[step * k % 6][begins : begins + length] for k, length in enumerate(lengths)]
    assert cuts_of(itertools.chain(*film)) == list(itertools.accumulate(lengths[:-1]))


def test_consecutive_shots_of_two_frames_are_found(scenes: Scenes) -> None:
    film = [scenes[k % 6][k : k + 2] for k in range(20)]
    assert cuts_of(itertools.chain(*film)) == list(range(2, 40, 2))


def test_one_blended_frame_makes_no_second_cut(two_scenes: tuple[list[Picture], list[Picture]]) -> None:
    a, b = two_scenes
    for share in (0.3, 0.5, 0.7):
        assert cuts_of([*a[:15], mixed(a[15], b[0], share), *b]) in ([15], [16])


def test_cuts_of_an_encoded_film_are_exact(scenes: Scenes, tmp_path: Path) -> None:
    with media.VideoWriter(tmp_path / "film.mp4", WIDTH, HEIGHT) as film:
        for scene, length in ((1, 9), (2, 2), (3, 12), (5, 10), (0, 2)):
            for frame in scenes[scene][:length]:
                film.write(frame)
    assert cuts_of(media.read_frames(tmp_path / "film.mp4")) == [9, 11, 23, 33]


# Changes that are not cuts


@pytest.mark.parametrize("gain", [0.4, 0.7, 1.0])
@pytest.mark.parametrize("shape", [(1.0,), (1.0, 1.0), (1.0,) * 4, (1.0, 0.6, 0.35, 0.2, 0.1)])
def test_flash_is_not_a_cut(two_scenes: tuple[list[Picture], list[Picture]], gain: float, shape: tuple) -> None:
    frames = list(two_scenes[0])
    for step, part in enumerate(shape, start=15):
        frames[step] = lit(frames[step], gain * part)
    assert cuts_of(frames) == []


def test_short_black_and_a_single_foreign_frame_are_not_cuts(two_scenes: tuple[list[Picture], list[Picture]]) -> None:
    a, b = two_scenes
    for length in (1, 2, 3):
        assert cuts_of([*a[:15], *[np.zeros_like(a[0])] * length, *a[15:]]) == []
    assert cuts_of([*a[:15], b[0], *a[16:]]) == []


def test_short_scenes_are_not_mistaken_for_flashes(two_scenes: tuple[list[Picture], list[Picture]]) -> None:
    a, b = two_scenes
    for length in (2, 3, 4):
        assert cuts_of([*a[:15], *b[:length], *a[15:]]) == [15, 15 + length]


def test_pans_are_not_cuts(two_scenes: tuple[list[Picture], list[Picture]]) -> None:
    """Steady pans of up to a fifth of the width per frame, and whip pans with motion blur."""
    wide = np.concatenate([cv2.resize(scene[0], None, fx=6, fy=6) for scene in two_scenes], axis=1)
    width, height = 512, 384

    def seen(places: np.ndarray) -> list[Picture]:
        blur = np.maximum(np.abs(np.diff(places, prepend=places[:1])) / 2, 1).astype(int)
        parts = [wide[:height, int(x) : int(x) + width] for x in places]
        return [np.asarray(cv2.blur(part, (int(b), 1)), np.uint8) for part, b in zip(parts, blur, strict=True)]

    reach = wide.shape[1] - width
    for step in (15, 40, 100):
        assert cuts_of(seen(np.minimum(np.maximum(np.arange(40) - 10, 0) * step, reach))) == []
    for length in (3, 4, 6, 8):
        speed = np.hanning(length + 2)[1:-1]
        way = np.cumsum(speed) / speed.sum()
        assert cuts_of(seen(np.concatenate([np.zeros(10), way, np.ones(20)]) * reach)) == []


# Gradual changes


def test_short_dissolve_is_cut_at_its_middle(two_scenes: tuple[list[Picture], list[Picture]]) -> None:
    a, b = two_scenes
    for length in (3, 5, 8):
        middle = [mixed(a[12 + i], b[i], (i + 1) / (length + 1)) for i in range(length)]
        (cut,) = cuts_of([*a[:12], *middle, *b[length:]])
        assert abs(cut - (12 + (length - 1) / 2)) <= 1


def test_long_dissolve_contains_no_stretch_as_long_as_a_clip(two_scenes: tuple[list[Picture], list[Picture]]) -> None:
    a, b = two_scenes
    for length in (12, 20):
        middle = [mixed(a[6 + i], b[i], (i + 1) / (length + 1)) for i in range(length)]
        cuts = cuts_of([*a[:6], *middle, *b[length:]])
        assert cuts and all(4 <= cut <= 8 + length for cut in cuts)
        assert max(b - a for a, b in itertools.pairwise([6, *cuts, 6 + length])) < 16  # frames of the shortest clip


def test_a_fade_through_black_ends_a_shot(two_scenes: tuple[list[Picture], list[Picture]]) -> None:
    a, b = two_scenes
    for length in (8, 12, 16):
        down = [mixed(a[10 + i], np.zeros_like(a[0]), (i + 1) / length) for i in range(length)]
        up = [mixed(np.zeros_like(b[0]), b[i], (i + 1) / length) for i in range(length)]
        cuts = cuts_of([*a[:10], *down, *up, *b[length:]])
        assert cuts and all(10 < cut < 10 + 2 * length for cut in cuts)


# Streams


def test_cuts_depend_only_on_nearby_frames(scenes: Scenes) -> None:
    """A part of a film, with its context, has the same cuts as in the whole film, wherever it starts."""
    a, b = scenes[1], scenes[3]
    dissolve = [mixed(a[16 + i], b[i], (i + 1) / 11) for i in range(10)]
    film = [*a[:16], *dissolve, *b[10:16], *scenes[4][:2], *scenes[5][:3], *scenes[2][:12], lit(a[0], 0.8), *a[:14]]
    whole = cuts_of(film)
    assert len(whole) >= 5
    for start in range(0, len(film) - 12, 3):
        stop = min(start + 12, len(film))
        first, last = max(start - CONTEXT_FRAMES, 0), min(stop + CONTEXT_FRAMES, len(film))
        here = [first + cut for cut in cuts_of(film[first:last])]
        assert [cut for cut in here if start < cut < stop] == [cut for cut in whole if start < cut < stop]


def test_memory_does_not_grow_with_film_length(scenes: Scenes) -> None:
    frames = [*scenes[0][:10], *scenes[2][:10]]

    def peak(count: int) -> int:
        finder = CutFinder()
        tracemalloc.start()
        for i in range(count):
            finder.add(frames[i % len(frames)])
        high = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return high

    peak(20)  # one-time allocations
    assert peak(400) < 1.05 * peak(40)


def test_films_of_zero_to_two_frames_have_no_cut(scenes: Scenes) -> None:
    assert CutFinder().finish() == []
    frame = scenes[0][0]
    assert cuts_of([frame]) == cuts_of([frame, frame]) == []


# Real footage


@pytest.mark.parametrize(
    ("name", "cuts"),
    [
        ("hard_cut.mp4", [73]),
        ("face_gap.mp4", [50, 100]),
        ("two_person_turns.mp4", []),
        ("no_audio.mp4", []),  # handheld camera, walking
        ("moviepy_chaplin.mp4", []),  # grain and flicker
        ("vfr.mp4", []),  # repeated frames
        ("short_hamilton_clip.mp4", [39, 90, 198]),
    ],
)
def test_cuts_of_real_films(shared_clips: Path, name: str, cuts: list[int]) -> None:
    assert cuts_of(itertools.islice(media.read_frames(shared_clips / name), 220)) == cuts
