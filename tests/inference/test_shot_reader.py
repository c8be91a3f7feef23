"""The order in which windows of shots are offered, and how far the scene is read ahead."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tccp.inference.frames import SceneFrame
from tccp.inference.shot_reader import ShotReader

PICTURE = np.zeros((2, 2, 3), np.uint8)
BOX = np.array([0, 0, 1, 1], np.float32)
WINDOW = 4


def scene(text: str) -> Iterator[SceneFrame]:
    """A frame for each character: `-` without the person; a letter per shot."""
    before = ""
    for index, name in enumerate(text):
        yield SceneFrame(index, PICTURE, None if name == "-" else BOX, starts_shot=name != before)
        before = name


def reader(text: str, horizon: int = 1000) -> ShotReader[str]:
    return ShotReader(scene(text), WINDOW, lambda frames: "".join(text[frame.index] for frame in frames), horizon)


def rounds(read: ShotReader[str], most: int) -> list[list[str]]:
    made = []
    while not read.done:
        made.append([kept for _, _, kept in read.offer(most)])
    return [one for one in made if one]


def test_one_at_a_time_windows_come_in_order_and_nothing_is_read_ahead() -> None:
    read = reader("aaaaaaaa--bbb")
    taken = []
    offered = []
    while not read.done:
        offered += [kept for _, _, kept in read.offer(1)]
        taken.append(len(read.taken()))
    assert offered == ["a", "aaa", "aaa", "a", "b", "bb"]
    assert sum(taken) == 13
    assert taken[:3] == [1, 3, 3]


def test_several_shots_share_a_round() -> None:
    assert rounds(reader("aaaaabbbbbcc"), 3) == [["a", "b", "c"], ["aaa", "bbb", "c"], ["a", "b"]]


def test_a_shot_joins_when_another_has_ended() -> None:
    assert rounds(reader("aabbbbbbbbcccccc"), 2) == [["a", "b"], ["a", "bbb"], ["bbb", "c"], ["b", "ccc"], ["cc"]]


def test_the_scene_is_not_read_beyond_the_horizon() -> None:
    """A shot that starts after it waits, so memory does not grow with the length of the one before."""
    read, most_ahead, num_read = reader("a" * 40 + "b" * 40, horizon=12), 0, 0
    offered = {"a": 0, "b": 0}
    while not read.done:
        for _, frames, kept in read.offer(2):
            offered[kept[0]] += len(frames)
        num_read += len(read.taken())
        oldest = offered["a"] if offered["a"] < 40 else 40 + offered["b"]
        most_ahead = max(most_ahead, num_read - oldest)
    assert offered == {"a": 40, "b": 40}
    assert 6 <= most_ahead <= 12 + WINDOW


def test_an_absence_is_reported_piece_by_piece() -> None:
    read = reader("-" * 50)
    taken = []
    while not read.done:
        assert read.offer(3) == []
        taken.append(len(read.taken()))
    assert sum(taken) == 50 and max(taken) <= WINDOW


@given(st.text("ab-", max_size=60), st.integers(1, 5), st.sampled_from([5, 1000]))
def test_every_frame_is_in_one_window_in_the_order_of_its_shot(text: str, most: int, horizon: int) -> None:
    read = reader(text, horizon)
    seen: dict[int, list[int]] = {}
    while not read.done:
        offered = read.offer(most)
        assert len({shot.first for shot, _, _ in offered}) == len(offered) <= most
        for shot, frames, _ in offered:
            numbers = [frame.index for frame in frames]
            assert numbers == list(range(shot.next - len(numbers), shot.next))
            assert len(numbers) <= (1 if shot.first not in seen else WINDOW - 1)
            seen.setdefault(shot.first, []).extend(numbers)
    for first, numbers in seen.items():
        assert numbers == list(range(first, first + len(numbers)))
    expected = [index for index, name in enumerate(text) if name != "-"]
    assert sorted(number for numbers in seen.values() for number in numbers) == expected


@pytest.mark.parametrize("most", [1, 3])
def test_the_end_is_reached_once(most: int) -> None:
    read = reader("ab", 10)
    while not read.done:
        read.offer(most)
    assert read.offer(most) == []
