"""The files of a job: windows and plans come back as they were written, and damaged ones are noticed."""

from __future__ import annotations

import dataclasses
import io
import itertools
import pickle
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tccp.errors import StorageError, TccpError
from tccp.files import Folder
from tccp.inference.head_tracks import HeadTrack
from tccp.serving.job_folder import JobFolder, Plan, PlanCache, Shot
from tccp.serving.work import ChainPoint, KeptWindow, from_bytes, to_bytes


@pytest.fixture(params=["folder", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Folder]:
    place = str(tmp_path / "storage") if request.param == "folder" else f"memory://{uuid.uuid4().hex}"
    made = Folder(place)
    yield made
    made.remove("jobs")


def point(rng: np.random.Generator, position: int, full: bool = True) -> ChainPoint:
    def array(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    extra = (array(80, 16), array(3, 8, 8), array(68, 2)) if full else ()
    return ChainPoint(position, array(9, 4, 4), array(4, 4, 4), *extra)


def kept(first: int = 4, frames: int = 3, full: bool = True) -> KeptWindow:
    rng = np.random.default_rng(first)
    faces = rng.integers(0, 256, (frames, 16, 16, 3), np.uint8)
    if not full:
        return KeptWindow(first, faces, point(rng, frames, False))
    points, confidence = rng.uniform(size=(frames, 68, 2)).astype(np.float32), np.ones(frames, np.float32)
    return KeptWindow(first, faces, point(rng, frames), point(rng, frames), points, confidence)


def plan(full: bool = True) -> Plan:
    boxes = np.tile(np.array([1, 2, 33, 34], np.float32), (30, 1))
    boxes[10:12] = np.nan
    rng = np.random.default_rng(0)
    return Plan(
        num_frames=30,
        width=128,
        height=96,
        window=8,
        picture_px=32,
        shots=(Shot(0, 10), Shot(12, 18)),
        warnings=("the sound is short: 3 frames", "ümlaut"),
        track=HeadTrack(boxes, frozenset({12, 20}) if full else None, {10: "left_picture"} if full else {}),
        identity=rng.integers(0, 256, (32, 32, 3), np.uint8),
        points=rng.uniform(size=(30, 68, 2)).astype(np.float32) if full else None,
        confidence=rng.uniform(size=30).astype(np.float32) if full else None,
    )


def assert_same(one: Any, other: Any) -> None:
    """Equal to the bit, with the same types, in dataclasses and arrays."""
    assert type(one) is type(other)
    if isinstance(one, np.ndarray):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    elif dataclasses.is_dataclass(one):
        for field in dataclasses.fields(one):
            assert_same(getattr(one, field.name), getattr(other, field.name))
    else:
        assert one == other


@pytest.mark.parametrize("full", [True, False])
def test_windows_come_back_as_they_were_written(storage: Folder, full: bool) -> None:
    folder = JobFolder(storage, "video_1")
    assert folder.kept_windows() == set()
    windows = [kept(first, full=full) for first in (0, 4, 12345)]
    for window in windows:
        folder.write_window(window)
    assert folder.kept_windows() == {0, 4, 12345}
    for window in windows:
        assert_same(folder.read_window(window.first), window)
        without = folder.read_window(window.first, faces=False)
        assert without.faces.size == 0 and without.points is None
        assert_same(without.face_point, window.face_point)
        assert_same(without.landmark_point, window.landmark_point)
    folder.write_window(again := dataclasses.replace(windows[1], faces=255 - windows[1].faces))
    assert_same(folder.read_window(4), again)
    with pytest.raises(FileNotFoundError):
        folder.read_window(5)
    assert JobFolder(storage, "video_2").kept_windows() == set()


@pytest.mark.parametrize("full", [True, False])
def test_plans_come_back_as_they_were_written(storage: Folder, full: bool) -> None:
    folder = JobFolder(storage, "video_1")
    assert folder.read_plan() is None
    folder.write_plan(made := plan(full))
    read = folder.read_plan()
    assert read is not None
    assert_same(read, made)
    assert read.num_windows == 2 + 1 + 1 + 3
    cache = PlanCache(most=1)
    first = cache.of(folder)
    assert_same(first, made)
    assert cache.of(folder) is first
    with pytest.raises(StorageError, match="video_2 is not prepared"):
        cache.of(JobFolder(storage, "video_2"))


def test_work_is_removed_without_inputs_and_the_job_with_all(storage: Folder) -> None:
    folder, other = JobFolder(storage, "video_1"), JobFolder(storage, "video_2")
    for one in (folder, other):
        one.write_plan(plan())
        one.write_window(kept())
        one.write_preview(0, b"jpeg")
        storage.write(one.input_name("scene"), b"film")
        storage.write(f"{one.film_folder(2)}/film.mp4", b"film")
    folder.remove_work()
    assert folder.read_plan() is None and folder.kept_windows() == set()
    assert storage.read(folder.preview_name(0)) == b"jpeg"
    with folder.local_inputs(["scene"]) as files:
        assert files["scene"].read_bytes() == b"film"
    folder.remove()
    assert set(storage.tree("jobs")) == {f"video_2/{name}" for name in WHOLE}
    assert set(storage.tree("films")) == {"video_2/000002/film.mp4"}
    folder.remove()
    other.remove()


def test_an_input_that_is_gone_is_named_and_other_missing_files_are_not_taken_for_it(storage: Folder) -> None:
    folder = JobFolder(storage, "video_1")
    storage.write(folder.input_name("scene"), b"film")
    with pytest.raises(TccpError, match="an input of video_1 is gone: audio"), folder.local_inputs(["scene", "audio"]):
        pass
    with pytest.raises(FileNotFoundError), folder.local_inputs(["scene"]):
        folder.read_window(0)


WHOLE = {"plan.json", "plan.npz", "windows/00000004.npz", "previews/000000.jpg", "inputs/scene"}


def damaged(content: bytes) -> dict[str, bytes]:
    middle = len(content) // 2
    return {
        "empty": b"",
        "cut short": content[:middle],
        "without its end": content[:-10],
        "other": b"<html>503 Service Unavailable</html>",
        "one bit": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
        "zeros": bytes(len(content)),
    }


@pytest.mark.parametrize("how", damaged(b"0" * 100))
def test_a_damaged_window_is_noticed_removed_and_no_mistake_of_the_user(storage: Folder, how: str) -> None:
    """The job goes on: another attempt makes the window again."""
    folder = JobFolder(storage, "video_1")
    folder.write_window(kept(0))
    storage.write("jobs/video_1/windows/00000004.npz", damaged(to_bytes(kept(4)))[how])
    assert folder.kept_windows() == {0, 4}
    with pytest.raises(StorageError, match=r"windows/00000004\.npz is damaged") as noticed:
        folder.read_window(4)
    assert "\n" not in str(noticed.value)
    assert folder.kept_windows() == {0}


@pytest.mark.parametrize("name", ["plan.json", "plan.npz"])
@pytest.mark.parametrize("how", damaged(b"0" * 100))
def test_a_damaged_plan_is_none(storage: Folder, name: str, how: str) -> None:
    folder = JobFolder(storage, "video_1")
    folder.write_plan(made := plan())
    content = storage.read(f"jobs/video_1/{name}")
    if name == "plan.json" and how == "one bit":
        content = content.replace(b'"num_frames"', b'"num_fraMes"')
    else:
        content = damaged(content)[how]
    storage.write(f"jobs/video_1/{name}", content)
    assert folder.read_plan() is None
    assert not storage.exists("jobs/video_1/plan.json")
    folder.write_plan(made)
    assert folder.read_plan() is not None


@settings(max_examples=150)
@given(place=st.integers(0, 10**6), bit=st.integers(0, 7), cut=st.booleans())
def test_whatever_is_damaged_is_an_error_or_changes_nothing(place: int, bit: int, cut: bool) -> None:
    window = kept()
    content = bytearray(to_bytes(window))
    if cut:
        del content[place % len(content) :]
    else:
        content[place % len(content)] ^= 1 << bit
    try:
        read = from_bytes(bytes(content))
    except ValueError:
        return
    assert not cut, "no part of a file is taken for the whole"
    assert_same(read, window)  # for example the time of an entry, which nobody reads


class Harmful:
    """Leaves a trace if it is unpickled."""

    traces: list[str] = []  # noqa: RUF012

    def __reduce__(self) -> Any:
        return Harmful.traces.append, ("unpickled",)


@pytest.mark.parametrize("name", ["faces", "points", "face_point.latents", "first"])
def test_pickles_are_refused_unread(name: str) -> None:
    arrays: dict[str, Any] = dict(np.load(io.BytesIO(to_bytes(kept()))))
    arrays[name] = np.array([Harmful()], dtype=object)
    content = io.BytesIO()
    np.savez(content, **arrays)
    with pytest.raises(ValueError, match="allow_pickle"):
        from_bytes(content.getvalue())
    with pytest.raises(ValueError, match="allow_pickle"):
        from_bytes(pickle.dumps(Harmful()))
    assert Harmful.traces == []


def test_a_window_without_a_place_to_go_on_is_damaged() -> None:
    arrays = dict(np.load(io.BytesIO(to_bytes(kept()))))
    for removed in ("face_point.", "first", "faces", "face_point.latents"):
        content = io.BytesIO()
        rest = {name: one for name, one in arrays.items() if name != "names" and not name.startswith(removed)}
        np.savez(content, **rest, names=np.array(list(rest)))
        with pytest.raises(ValueError):  # noqa: PT011 - of many kinds
            from_bytes(content.getvalue())


@given(first=st.integers(0, 10**6), frames=st.integers(1, 300), window=st.integers(2, 40))
def test_the_windows_of_a_shot_cover_each_frame_once(first: int, frames: int, window: int) -> None:
    windows = Shot(first, frames).windows(window)
    covered = list(itertools.chain.from_iterable(range(start, start + count) for start, count in windows))
    assert covered == list(range(first, first + frames))
    assert windows[0] == (first, 1), "the first-frame network makes one frame"
    assert all(1 <= count <= window - 1 for _, count in windows[1:])
    assert all(count == window - 1 for _, count in windows[1:-1]), "only the last one may be shorter"
