"""Jobs through the whole server without Ray: the same films as `tccp generate`, whatever dies in between."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jobs
import numpy as np
import pytest
import tiny
from local_stages import LocalStages

from tccp.files import Folder
from tccp.serving.conductor import Conductor, Rules, WorkOrder
from tccp.serving.job_folder import JobFolder
from tccp.serving.publishing import PreparedWindow
from tccp.serving.store import Job, JobStore
from tccp.serving.weight_versions import pin
from tccp.serving.work import FilmKey

pytest_plugins = ["tiny_fixtures"]
pytestmark = pytest.mark.slow
RULES = Rules(slots=4, poll_s=0.02, lease_s=60.0)
SHORT_LEASES = Rules(slots=4, poll_s=0.02, lease_s=2.0, most_failures=100)


@pytest.fixture
def storage(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "storage")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    opened = JobStore(f"sqlite:///{tmp_path}/jobs.db")
    yield opened
    opened.close()


@pytest.fixture
def version(weights: Path, storage: Folder) -> str:
    return pin(weights, storage)


@pytest.fixture
def stages(store: JobStore, storage: Folder) -> Iterator[LocalStages]:
    made = LocalStages(store, storage)
    yield made
    made.close()


async def until_ended(store: JobStore, *conductors: Conductor, timeout_s: float = 120.0) -> None:
    tasks = [asyncio.create_task(conductor.run()) for conductor in conductors]
    try:
        async with asyncio.timeout(timeout_s):
            while any(job.status in ("queued", "in_progress") for job in store.listed(None, 100)):
                await asyncio.sleep(0.02)
                for task in tasks:
                    assert not task.done(), task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def film_of(storage: Folder, job: Job) -> np.ndarray:
    assert job.status == "completed" and job.result is not None, (job.status, job.error_code, job.error_message)
    assert storage.local is not None
    return tiny.pictures(storage.local / job.result["folder"] / "film.mp4")


def generated(film: Path, weights: Path, track: Path, out: Path, **options: Any) -> np.ndarray:
    tiny.generated(film, weights, out, box=str(track), batch=1, **options)
    return tiny.pictures(out)


def test_films_are_those_of_generate(
    film: Path, weights: Path, version: str, store: JobStore, storage: Folder, stages: LocalStages, tmp_path: Path
) -> None:
    """With a cut, absence, one stage, redrawn landmarks and other sampling: pixel for pixel."""
    cases: list[tuple[dict[str, Any], tuple[int, ...], tuple[int, ...]]] = [
        ({}, (), ()),
        ({"seed": 5, "steps": 3}, (9,), ()),
        ({"redraw": True}, (), (4, 5)),
        ({"one_stage": True}, (), (0, 24)),
    ]
    made = []
    for options, cuts, absent in cases:
        track = jobs.track_file(film, tmp_path, cuts, absent)
        made.append((jobs.add(store, jobs.new_job(film, track, storage, version, **options)), track, options))
    asyncio.run(until_ended(store, Conductor(store, storage, stages, RULES)))
    for number, (job, track, options) in enumerate(made):
        ended = store.get(job.id)
        assert ended is not None
        expected = generated(film, weights, track, tmp_path / f"{number}.mp4", **options)
        np.testing.assert_array_equal(film_of(storage, ended), expected, err_msg=str(options))
        assert ended.windows_done == ended.windows > 0
        assert ended.previews >= 1
        assert JobFolder(storage, job.id).read_plan() is None, "what only work on it needs is removed"
    assert max(Counter(stages.made).values()) == 1, "no window is made twice"


class Failing:
    """Wraps stages: some calls raise before or after their work, as those of a replica that dies."""

    def __init__(self, stages: LocalStages, seed: int):
        self._stages = stages
        self._rng = np.random.default_rng(seed)
        self.failures = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stages, name)

    def _dies(self) -> None:
        if self._rng.random() < 0.15:
            self.failures += 1
            raise ConnectionError("the replica died")

    async def prepared(self, order: WorkOrder, first: int, num_frames: int) -> PreparedWindow:
        self._dies()
        return await self._stages.prepared(order, first, num_frames)

    async def landmarks(self, film: FilmKey, *given: Any) -> Any:
        self._dies()
        return await self._stages.landmarks(film, *given)

    async def faces(self, film: FilmKey, *given: Any) -> Any:
        self._dies()
        return await self._stages.faces(film, *given)


def test_jobs_survive_stages_and_conductors_that_die(
    film: Path, weights: Path, version: str, store: JobStore, storage: Folder, stages: LocalStages, tmp_path: Path
) -> None:
    """Calls fail at random, and conductors are killed without a word to the store."""
    track = jobs.track_file(film, tmp_path, (12,))
    made = [jobs.add(store, jobs.new_job(film, track, storage, version, seed=seed % 2)) for seed in range(4)]
    failing = Failing(stages, 0)

    async def run() -> None:
        rng = np.random.default_rng(1)
        kills = 0
        async with asyncio.timeout(240):
            while True:
                conductor = Conductor(store, storage, failing, SHORT_LEASES)
                task = asyncio.create_task(conductor.run())
                deadline = asyncio.get_running_loop().time() + (rng.uniform(0.5, 1.5) if kills < 3 else 200)
                while asyncio.get_running_loop().time() < deadline:
                    await asyncio.sleep(0.02)
                    if not any(job.status in ("queued", "in_progress") for job in store.listed(None, 100)):
                        task.cancel()
                        await asyncio.gather(task, return_exceptions=True)
                        return
                kills += 1
                # Killed: it gives nothing back. Its leases run out.
                conductor._store = None  # type: ignore[assignment]
                for one, _ in conductor._tasks.values():
                    one.cancel()
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    asyncio.run(run())
    assert failing.failures > 0
    films = {}
    for number, job in enumerate(made):
        ended = store.get(job.id)
        assert ended is not None
        films.setdefault(number % 2, []).append(film_of(storage, ended))
    for seed, same in films.items():
        expected = generated(film, weights, track, tmp_path / f"seed{seed}.mp4", seed=seed)
        for one in same:
            np.testing.assert_array_equal(one, expected)
    again = [key for key, times in Counter(stages.made).items() if times > 1]
    assert len(again) <= 4 * SHORT_LEASES.slots * SHORT_LEASES.chains, "only windows that were in work are made twice"
