"""Progress of preprocessing in frames, with a total that is estimated until all films are open."""

from __future__ import annotations

import time

import pytest

from preprocessing.frame_progress import FRAMES_PER_BYTE, FrameProgress
from tccp.progress import ProgressEvent, ProgressLines, Tasks


def test_frames_are_counted_in_both_passes_and_the_total_follows_what_is_known() -> None:
    events: list[ProgressEvent] = []
    frames = FrameProgress(Tasks(events.append), "frames", {0: 1_000_000, 1: 3_000_000})
    assert (events[-1].done, events[-1].total) == (0, 4_000_000 * FRAMES_PER_BYTE)
    frames.begin((0, 0), 100, 0.5)  # the first of two reels of a film of 200 frames
    assert (events[-1].done, events[-1].total) == (0, 200 + 600)
    for _ in range(100):
        frames.on_frame((0, 0))
    assert events[-1].done == 50
    for _ in range(60):  # frames in clips
        frames.on_frame((0, 0))
    assert events[-1].done == 80
    frames.end({"order": 0, "start_frame": 0, "frames": 100, "share": 0.5})
    assert events[-1].done == 100
    frames.begin((0, 100), 100, 0.5)
    frames.end({"order": 0, "start_frame": 100, "frames": 100, "share": 0.5})
    frames.end({"order": 1, "start_frame": 0, "frames": 0, "share": 1.0})  # set aside
    assert (events[-1].done, events[-1].total) == (200, 200)


def test_frames_of_several_workers_count_while_they_work() -> None:
    events: list[ProgressEvent] = []
    frames = FrameProgress(Tasks(events.append), "frames", {0: 1_000_000})
    frames.workers_have_seen({(0, 0): 60, (0, 100): 20})
    assert events[-1].done == 40
    frames.end({"order": 0, "start_frame": 0, "frames": 100, "share": 0.5})
    assert (events[-1].done, events[-1].total) == (110, 200)
    frames.workers_have_seen({(0, 0): 200, (0, 100): 50})  # counts of reels that have ended do not count again
    assert events[-1].done == 125


def test_a_long_step_without_events_is_not_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tccp.progress._BEAT_S", 0.01)
    monkeypatch.setattr("tccp.progress.FIRST_LINE_S", 0.05)
    monkeypatch.setattr("tccp.progress.LINE_EVERY_S", 0.1)
    lines: list[str] = []
    tasks = Tasks(ProgressLines(lines.append))
    short = tasks.add_task("a short step")
    tasks.end()
    task = tasks.add_task("a long step", total=10)
    time.sleep(0.2)
    assert len(lines) >= 2 and all(line.startswith("a long step: 0/10, ") for line in lines), short
    tasks.update(task, completed=5)
    time.sleep(0.15)
    assert "5/10" in lines[-1] and ", ETA 0." in lines[-1]
    tasks.update(task, completed=10)
    assert "10/10" in lines[-1] and "ETA" not in lines[-1]
    tasks.end()
    written = len(lines)
    time.sleep(0.2)
    assert len(lines) == written
