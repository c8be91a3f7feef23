"""The loop of a stage: windows of many films in shared evaluations, and what happens to those that must not go on."""

from __future__ import annotations

import dataclasses
import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from tccp.diffusion.chains import run_round
from tccp.errors import StorageError, TccpError
from tccp.inference.components import Components, load_components
from tccp.inference.conditioning import landmark_pictures
from tccp.inference.film import with_sampling_options
from tccp.inference.film_networks import FilmNetworks
from tccp.inference.film_windows import LandmarkWindow, SceneWindow
from tccp.serving.window_loop import WindowLoop
from tccp.serving.work import ChainPoint, FacesDone, FilmKey, JobLost, LandmarksDone, Task

pytest_plugins = ["tiny_fixtures"]
SIZE = tiny.SETTINGS.picture_px
WINDOW = tiny.SETTINGS.window
TOLERANCE = 1e-4  # of latents between evaluations of other sizes; latents are about 1


@pytest.fixture
def components(weights: Path) -> Components:
    return load_components(weights)


class Stage:
    """A loop, with its answers under control. evaluations: sizes, with those that failed."""

    def __init__(self, components: Components, kind: Any = "landmark", **options: Any):
        self.refused: set[str] = set()
        self.store_fails = False
        self.sizes: list[int] = []
        self.before: Callable[[int], object] = lambda rows: None
        """Called before each evaluation, in the thread of the loop, with its rows."""
        self.loaded: list[str] = []
        self.may_load = threading.Event()
        self.may_load.set()
        self._components = components
        self._hooks = [net.register_forward_pre_hook(self._count) for net in components.networks.values()]
        options = {"load": self._load, "still_held": self._held} | options
        self.loop = WindowLoop(kind, **options)

    def _count(self, network: Any, given: Any) -> None:
        self.sizes.append(len(given[0]))
        self.before(len(given[0]))

    def _load(self, version: str) -> Components:
        self.loaded.append(version)
        self.may_load.wait(60)
        return self._components

    def _held(self, fences: Mapping[str, int]) -> set[str]:
        if self.store_fails:
            raise StorageError("the job store is away")
        return set(fences) - self.refused

    def submit(self, *tasks: Task) -> list[Future[Any]]:
        """Submits windows that the loop finds together."""
        with self.loop._wake:  # meanwhile the thread takes none
            return [self.loop.submit(task) for task in tasks]

    def results(self, *tasks: Task) -> list[Any]:
        return [future.result(60) for future in self.submit(*tasks)]

    def close(self) -> None:
        self.may_load.set()
        self.before = lambda rows: None
        self.loop.close()
        for hook in self._hooks:
            hook.remove()


@pytest.fixture
def stage(components: Components) -> Iterator[Stage]:
    made = Stage(components)
    yield made
    made.close()


def window(seed: int, first: int, frames: int, given: bool = False) -> SceneWindow:
    rng = np.random.default_rng([seed, first])
    masked = rng.integers(0, 256, (frames, SIZE, SIZE, 3), np.uint8)
    boxes = np.tile(np.array([0.2, 0.3, 0.8, 0.9], np.float32), (frames, 1))
    mel = rng.normal(size=(frames, 80, 16)).astype(np.float32)
    landmarks = None
    if given:
        points = rng.uniform(0.2, 0.8, (frames, 68, 2)).astype(np.float32)
        landmarks = LandmarkWindow(landmark_pictures(points, SIZE), points, np.ones(frames, np.float32))
    return SceneWindow(first, masked, boxes, mel, mel, landmarks)


def film(job: str, seed: int = 0, weights: str = "v1", **sampling: Any) -> FilmKey:
    identity = np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
    return FilmKey(job, 1, weights, identity, seed, read_landmarks=False, sampling=sampling or None)


def first_window(key: FilmKey, shot: int = 0, given: bool = False) -> Task:
    return Task(key, shot, window(key.seed, shot, 1, given), None)


def next_window(task: Task, point: ChainPoint, frames: int = WINDOW - 1, given: bool = False) -> Task:
    first = task.window.first + task.window.num_frames
    return Task(task.film, task.shot, window(task.film.seed, first, frames, given), point)


def alone(components: Components, key: FilmKey, kind: str, windows: list[SceneWindow]) -> list[np.ndarray]:
    """The latents of a film's windows without a loop, one after the other."""
    settings = with_sampling_options(components.settings, key.sampling or {})
    networks = FilmNetworks(
        dataclasses.replace(components, settings=settings), key.identity, key.seed, read_landmarks=False, traced=True
    )
    variant = "landmark_sequence" if kind == "landmark" else networks.face_variant
    chain = networks.chain(variant, windows[0].first)
    made = []
    for one in windows:
        inputs = networks.inputs(variant, one, one.landmarks)
        (latents,) = run_round([chain.window(inputs)], 1)
        made.append(chain.finish(latents).transpose(0, 1).numpy())
    return made


# Shared evaluations


@pytest.mark.parametrize("limit", [1, 8])
def test_windows_of_different_films_share_evaluations(components: Components, limit: int) -> None:
    stage = Stage(components, limit=limit)
    films = [film("a", 0, steps=2), film("b", 1, steps=3), film("c", 2, steps=4, solver="ddim")]
    first = [first_window(key, shot) for key, shot in zip(films, (0, 5, 0), strict=True)]
    begun: list[LandmarksDone] = stage.results(*first)
    by_size = {1: 2 + 3 + 4} if limit == 1 else {3: 2, 2: 1, 1: 1}
    assert dict(stage.loop.counts.by_size) == by_size
    # The last window of the second film does not fill the network's window.
    more = [next_window(one, done.point, frames) for one, done, frames in zip(first, begun, (3, 1, 3), strict=True)]
    ended: list[LandmarksDone] = stage.results(*more)
    counts = stage.loop.counts
    assert dict(counts.by_size) == {size: 2 * times for size, times in by_size.items()}
    assert counts.evaluations_of == {"a": 4, "b": 6, "c": 8}
    assert (counts.windows, counts.evaluations, counts.rows) == (6, len(stage.sizes), sum(stage.sizes))
    stage.close()
    for key, one, two, start, end in zip(films, first, more, begun, ended, strict=True):
        expected = alone(components, key, "landmark", [one.window, two.window])
        for done, latents in zip((start, end), expected, strict=True):
            assert done.latents is not None and done.latents.shape == latents.shape
            np.testing.assert_allclose(done.latents, latents, rtol=0, atol=0 if limit == 1 else TOLERANCE)
        assert end.point.position == two.window.num_frames
        np.testing.assert_array_equal(end.point.latents, end.latents[-1])


def test_guidance_takes_two_rows(stage: Stage) -> None:
    guided, plain = film("a", guidance_scale=3.0, steps=2), film("b", 1, steps=2)
    stage.results(first_window(guided), first_window(plain))
    assert stage.sizes == [3, 3] and stage.loop.counts.by_size == {3: 2}


def test_faces_share_evaluations_and_are_pictures(components: Components) -> None:
    """With given landmarks, so that one stage is enough."""
    stage = Stage(components, "face", limit=8)
    films = [film("a", 0), film("b", 1)]
    first = [first_window(key, given=True) for key in films]
    begun: list[FacesDone] = stage.results(*first)
    more = [next_window(one, done.point, given=True) for one, done in zip(first, begun, strict=True)]
    ended: list[FacesDone] = stage.results(*more)
    assert set(stage.loop.counts.by_size) == {2}
    stage.close()
    for key, one, two, start, end in zip(films, first, more, begun, ended, strict=True):
        expected = alone(components, key, "face", [one.window, two.window])
        assert start.faces.shape == (1, SIZE, SIZE, 3) and end.faces.shape == (WINDOW - 1, SIZE, SIZE, 3)
        np.testing.assert_allclose(start.point.latents, expected[0][-1], rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(end.point.latents, expected[1][-1], rtol=0, atol=TOLERANCE)
    assert np.abs(begun[0].faces.astype(int) - begun[1].faces).max() > 0


def test_windows_join_only_together_without_continuous_batching(components: Components) -> None:
    stage = Stage(components, limit=2, continuous=False)
    stage.results(*(first_window(film(job, seed, steps=2 + seed)) for seed, job in enumerate("abc")))
    assert stage.sizes == [2, 2, 1, 1, 1, 1, 1]  # the third waits until the second is done
    stage.close()


def test_a_job_with_many_windows_does_not_keep_out_another_one(components: Components) -> None:
    stage = Stage(components, limit=2)
    ended: list[str] = []
    futures = stage_order(stage, ended, [("many", 6), ("one", 1)])
    for future in futures:
        future.result(60)
    assert ended.index("one") <= 1, "its only window runs beside the first of the other job"
    stage.close()


def stage_order(stage: Stage, ended: list[str], jobs: list[tuple[str, int]]) -> list[Future[Any]]:
    """Windows of jobs, all at once. ended: gets the job of each window that ends."""
    tasks = [first_window(film(job), 10 * shot) for job, count in jobs for shot in range(count)]
    gate = threading.Event()
    stage.before = lambda rows: gate.wait(60)
    futures = stage.submit(*tasks)
    for task, future in zip(tasks, futures, strict=True):
        future.add_done_callback(lambda done, job=task.film.job_id: ended.append(job))
    gate.set()
    return futures


# Windows that must not go on


@pytest.mark.parametrize("how", ["not held", "future cancelled"])
def test_a_window_that_must_not_go_on_is_in_no_further_evaluation(stage: Stage, how: str) -> None:
    reached, go = threading.Event(), threading.Event()

    def block_the_third(rows: int) -> None:
        if len(stage.sizes) == 3:
            reached.set()
            go.wait(60)

    stage.before = block_the_third
    gone, stays = stage.submit(first_window(film("gone", 0, steps=9)), first_window(film("stays", 1, steps=9)))
    assert reached.wait(60)
    (running,) = (one for one in stage.loop._running.values() if one.task.film.job_id == "gone")
    assert running.job is not None and running.networks is not None
    memory = [weakref.ref(one) for one in (running, running.job, running.job.state.latents, running.chain)]
    if how == "not held":
        memory.append(weakref.ref(running.networks))
    before = stage.loop.counts.evaluations_of["gone"]
    del running
    if how == "not held":
        stage.refused.add("gone")
    else:
        assert gone.cancel()
    go.set()
    with pytest.raises(JobLost if how == "not held" else CancelledError):
        gone.result(60)
    stays.result(60)
    assert stage.sizes == [2, 2, 2, 1, 1, 1, 1, 1, 1], "the evaluation in flight was its last one"
    assert before == 2 and stage.loop.counts.evaluations_of == {"gone": 3, "stays": 9}
    assert until(lambda: stage.loop.stuck_s == 0.0)
    gc.collect()
    assert [one() for one in memory] == [None] * len(memory)


def until(condition: Callable[[], bool], seconds: float = 60.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def test_an_idle_loop_keeps_no_window(stage: Stage) -> None:
    tasks = [first_window(film(job)) for job in "ab"]
    memory = [weakref.ref(task) for task in tasks]
    futures = stage.submit(*tasks)
    for future in futures:
        future.result(60)
    assert until(lambda: stage.loop.stuck_s == 0.0)
    del tasks, futures, future
    gc.collect()
    assert [one() for one in memory] == [None, None]


def test_windows_that_are_cancelled_or_lost_before_they_begin_are_never_evaluated(stage: Stage) -> None:
    stage.refused.add("lost")
    gate = threading.Event()
    stage.before = lambda rows: gate.wait(60)
    tasks = [first_window(film(job)) for job in ("runs", "lost", "cancelled")]
    with stage.loop._wake:
        runs, lost, cancelled = stage.submit(*tasks)
        assert cancelled.cancel()
    gate.set()
    runs.result(60)
    with pytest.raises(JobLost):
        lost.result(60)
    assert set(stage.loop.counts.evaluations_of) == {"runs"} and set(stage.sizes) == {1}


def test_nothing_goes_on_while_the_store_does_not_answer(stage: Stage) -> None:
    reached, go = threading.Event(), threading.Event()

    def block(rows: int) -> None:
        reached.set()
        go.wait(60)

    stage.before = block
    (future,) = stage.submit(first_window(film("a", steps=9)))
    assert reached.wait(60)
    stage.store_fails = True
    go.set()
    with pytest.raises(StorageError):
        future.result(60)
    assert len(stage.sizes) == 1
    with pytest.raises(StorageError):
        stage.loop.submit(first_window(film("b"))).result(60)
    stage.store_fails = False
    stage.loop.submit(first_window(film("b"))).result(60)


# Failures


def test_wrong_inputs_fail_only_their_window(stage: Stage) -> None:
    good = first_window(film("good"))
    too_many = dataclasses.replace(first_window(film("bad", 1)), window=window(1, 0, 3))
    options = first_window(film("options", 2, steps=10**6))
    point = ChainPoint(0, np.zeros((1, 2, 2), np.float32), np.zeros((1, 2, 2), np.float32))
    shape = next_window(first_window(film("shape", 3)), point)
    futures = stage.submit(too_many, good, options, shape)
    assert isinstance(futures[1].result(60), LandmarksDone)
    with pytest.raises(ValueError, match="3 frames for a window"):
        futures[0].result(60)
    with pytest.raises(TccpError, match="--steps"):
        futures[2].result(60)
    assert futures[3].exception(60) is not None
    assert set(stage.loop.counts.evaluations_of) == {"good"}
    assert stage.loop.alive and stage.loop.load == 0


def test_a_network_that_fails_fails_its_own_windows(stage: Stage, components: Components) -> None:
    """Also of one job: two of its shots are in different networks."""
    key = film("a")
    one = first_window(key)
    (begun,) = stage.results(one)

    def fail(network: Any, given: Any) -> None:
        raise RuntimeError("a kernel failed")

    hook = components.networks["landmark_sequence"].register_forward_pre_hook(fail)
    continued, other_shot = stage.submit(next_window(one, begun.point), first_window(key, 50))
    assert isinstance(other_shot.result(60), LandmarksDone)
    with pytest.raises(RuntimeError, match="kernel"):
        continued.result(60)
    hook.remove()
    (again,) = stage.results(next_window(one, begun.point))
    assert isinstance(again, LandmarksDone)


@pytest.mark.parametrize("continuous", [True, False])
def test_out_of_memory_halves_the_limit(components: Components, continuous: bool) -> None:
    stage = Stage(components, limit=8, continuous=continuous)

    def too_large(rows: int) -> None:
        if rows > 2:
            raise torch.OutOfMemoryError("there is room for two")

    stage.before = too_large
    tasks = [first_window(film(job, seed)) for seed, job in enumerate("abcdefgh")]
    done: list[LandmarksDone] = stage.results(*tasks)
    assert stage.sizes == [8, 4] + [2] * 8
    assert stage.loop.limit == 2 and stage.loop.counts.by_size == {2: 8}
    stage.results(*tasks)
    assert stage.sizes == [8, 4] + [2] * 16, "it is not tried again"
    stage.close()
    for task, one in zip(tasks, done, strict=True):
        (expected,) = alone(components, task.film, "landmark", [task.window])
        assert one.latents is not None
        np.testing.assert_allclose(one.latents, expected, rtol=0, atol=TOLERANCE)


def test_the_limit_is_halved_in_rows(components: Components) -> None:
    stage = Stage(components, limit=8)
    failed: list[int] = []

    def once(rows: int) -> None:
        if not failed:
            failed.append(rows)
            raise torch.OutOfMemoryError("no room")

    stage.before = once
    stage.results(*(first_window(film(job, seed, guidance_scale=2.0)) for seed, job in enumerate("abcd")))
    assert failed == [8] and stage.loop.limit == 4 and set(stage.sizes[1:]) == {4}
    stage.close()


def test_a_window_that_never_fits_fails_and_the_loop_goes_on(stage: Stage) -> None:
    def never(rows: int) -> None:
        raise torch.OutOfMemoryError("no room")

    stage.before = never
    (future,) = stage.submit(first_window(film("a")))
    with pytest.raises(torch.OutOfMemoryError):
        future.result(60)
    stage.before = lambda rows: None
    (done,) = stage.results(first_window(film("b")))
    assert isinstance(done, LandmarksDone)


# Weights


class Versions:
    """Loads a new copy for each version."""

    def __init__(self, components: Components):
        self.loaded: list[str] = []
        self.memory: dict[str, weakref.ref[Components]] = {}
        self._components = components

    def __call__(self, version: str) -> Components:
        if version == "broken":
            raise TccpError("weights broken are damaged")
        made = dataclasses.replace(self._components, _traced={})
        self.loaded.append(version)
        self.memory[version] = weakref.ref(made)
        return made

    def in_memory(self) -> set[str]:
        gc.collect()
        return {version for version, one in self.memory.items() if one() is not None}


def test_the_version_that_was_used_longest_ago_is_unloaded(components: Components) -> None:
    versions = Versions(components)
    stage = Stage(components, load=versions, most_models=2)

    def use(*names: str) -> None:
        for future in [stage.loop.submit(first_window(film(f"job of {name}", weights=name))) for name in names]:
            assert isinstance(future.result(60), LandmarksDone)
        assert until(lambda: stage.loop.stuck_s == 0.0)

    use("a", "b")
    assert versions.loaded == ["a", "b"] and versions.in_memory() == {"a", "b"}
    use("a")
    use("c")
    assert versions.in_memory() == {"a", "c"}
    with pytest.raises(TccpError, match="damaged"):
        stage.loop.preload("broken").result(60)
    use("b")
    assert versions.loaded == ["a", "b", "c", "b"]
    stage.close()


def test_versions_in_use_and_versions_for_which_there_is_room_stay(components: Components) -> None:
    versions = Versions(components)
    stage = Stage(components, load=versions, most_models=1)
    used = [first_window(film(f"job of {name}", weights=name)) for name in "abc"]
    gate = threading.Event()
    stage.before = lambda rows: gate.wait(60)
    futures = [stage.loop.submit(task) for task in used]
    gate.set()
    assert all(isinstance(future.result(60), LandmarksDone) for future in futures)
    stage.close()

    versions = Versions(components)
    stage = Stage(components, load=versions, most_models=4)
    for name in "abcabc":
        stage.loop.preload(name).result(60)
    assert versions.loaded == ["a", "b", "c"]
    stage.close()


# Health, and the end


def test_stuck_s_rises_while_the_thread_hangs(components: Components) -> None:
    stage = Stage(components)
    assert until(lambda: stage.loop.stuck_s == 0.0)
    stage.may_load.clear()
    future = stage.loop.submit(first_window(film("a")))
    assert until(lambda: bool(stage.loaded))
    assert rises(stage.loop), "in loading weights"
    reached, go = threading.Event(), threading.Event()

    def hang(rows: int) -> None:
        reached.set()
        go.wait(60)

    stage.before = hang
    stage.may_load.set()
    assert reached.wait(60)
    assert rises(stage.loop), "in an evaluation"
    assert stage.loop.load == 1
    go.set()
    future.result(60)
    assert until(lambda: stage.loop.stuck_s == 0.0) and stage.loop.load == 0
    stage.close()
    assert not stage.loop.alive


def rises(loop: WindowLoop) -> bool:
    before = loop.stuck_s
    return until(lambda: loop.stuck_s > before > 0.0 or before == 0.0) and loop.stuck_s > 0.0


def test_closing_ends_futures_that_wait(components: Components) -> None:
    stage = Stage(components, limit=1)
    reached, go = threading.Event(), threading.Event()

    def hang(rows: int) -> None:
        reached.set()
        go.wait(60)

    stage.before = hang
    futures = stage.submit(*(first_window(film(job, steps=9)) for job in "ab"))
    assert reached.wait(60)
    futures.append(stage.loop.submit(first_window(film("c"))))
    preload = stage.loop.preload("v2")
    closing = threading.Thread(target=stage.loop.close)
    closing.start()
    assert until(lambda: stage.loop._closed)
    go.set()
    closing.join(60)
    for future in (*futures, preload):
        with pytest.raises(JobLost, match="closed"):
            future.result(60)
    assert len(stage.sizes) == 1, "the evaluation in flight was the last one"
    for call in (lambda: stage.loop.submit(first_window(film("d"))), lambda: stage.loop.preload("v1")):
        with pytest.raises(RuntimeError, match="closed"):
            call()
    stage.close()
