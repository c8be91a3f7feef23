"""The job store on SQLite and on PostgreSQL: each job once, none lost, in fair order, whoever dies."""

from __future__ import annotations

import dataclasses
import logging
import multiprocessing
import sqlite3
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import alembic.autogenerate
import pytest
import sqlalchemy as sa
from alembic.runtime.migration import MigrationContext
from store_workers import new_job, opened, work_off

from tccp.errors import StorageError, TccpError
from tccp.serving.scheduling import QUANTUM
from tccp.serving.store import Claim, Full, Job, JobStore, KeyReused, StoredFile
from tccp.serving.store.schema import deliveries, files, jobs, metadata

if TYPE_CHECKING:
    from postgres_server import PostgresServer

pytest_plugins = ["postgres_server"]
LEASE_S = 60.0
OVER = -1.0  # a lease or wait that is over at once
MOST = 3  # failures in a row


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Of a database without tables."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/jobs.db"
    server: PostgresServer = request.getfixturevalue("postgres")
    return server.database()


@pytest.fixture
def store(url: str) -> Iterator[JobStore]:
    made = JobStore(url)
    yield made
    made.close()


def add(store: JobStore, number: int, owner: str = "one", **options: Any) -> Job:
    return store.add(new_job(number, owner, **options), most_waiting=10_000, most_of_owner=10_000)[0]


def claim(store: JobStore, holder: str = "a", lease_s: float = LEASE_S) -> Claim:
    claimed = store.claim(holder, lease_s, MOST)
    assert claimed is not None
    return claimed


def read(store: JobStore, job_id: str) -> Job:
    job = store.get(job_id)
    assert job is not None
    return job


def let_pass(store: JobStore, seconds: float) -> None:
    """Moves all that is stored into the past, as if so much time had passed."""
    with store._transaction() as db:
        for table, names in (
            (jobs, ("not_before", "expires_at")),
            (files, ("expires_at",)),
            (deliveries, ("next_at",)),
        ):
            db.execute(table.update().values({name: table.c[name] - seconds for name in names}))
        db.execute(jobs.update().where(jobs.c.lease_until > 0).values(lease_until=jobs.c.lease_until - seconds))


def in_threads(number: int, work: Callable[[int], Any]) -> list[Any]:
    """Results of calls that all begin at the same moment."""
    barrier = threading.Barrier(number)

    def one(i: int) -> Any:
        barrier.wait()
        return work(i)

    with ThreadPoolExecutor(number) as pool:
        return list(pool.map(one, range(number)))


# Claims


@pytest.mark.parametrize("workers", ["threads", "processes"])
def test_each_job_is_worked_off_once_and_none_is_lost(url: str, workers: str) -> None:
    store = JobStore(url)
    added = {add(store, number, f"owner{number % 5}").id for number in range(60)}
    if workers == "threads":
        made = in_threads(6, lambda i: work_off(url, f"thread{i}"))
    else:
        with ProcessPoolExecutor(3, mp_context=multiprocessing.get_context("spawn")) as pool:
            made = list(pool.map(work_off, [url] * 3, ["p0", "p1", "p2"]))
    claims = [one for some in made for one in some]
    assert len(set(claims)) == len(claims), "no two claims of a job have the same fence"
    released = Counter(job_id for job_id, _ in claims)
    assert set(released) == added
    for job_id, times in released.items():
        job = read(store, job_id)
        assert (job.status, job.fence, job.windows_done, job.failures) == ("completed", times, 1, 0)
    assert store.counts() == {"completed": 60}
    store.close()


def test_threads_that_share_one_store_claim_different_jobs(store: JobStore) -> None:
    """More threads than the pool has connections at rest."""
    for number in range(24):
        add(store, number)
    claims = in_threads(24, lambda i: store.claim(f"holder{i}", LEASE_S, MOST))
    while None in claims:  # on PostgreSQL, who finds all free rows locked comes away with nothing
        claims.remove(None)
        claims.append(claim(store))
    assert len({one.id for one in claims}) == 24
    assert store.claim("late", LEASE_S, MOST) is None


def test_a_claim_shows_the_job_as_it_was_added(store: JobStore) -> None:
    added = add(store, 7, webhook="https://example.org/hook")
    assert (added.status, added.number, added.fence, added.stage) == ("queued", 1, 0, None)
    assert added.expires_at == pytest.approx(added.created_at + 3600)
    assert abs(store.now() - added.created_at) < 3600
    claimed = claim(store)
    expected = {"status": "in_progress", "stage": "preparing", "fence": 1, "holder": "a"}
    changed = {name for name, value in dataclasses.asdict(added).items() if getattr(claimed.job, name) != value}
    assert changed == {*expected, "started_at", "virtual_time"}
    assert {name: getattr(claimed.job, name) for name in expected} == expected
    assert claimed.job == read(store, added.id)


# Fences


def lose_by_lease(store: JobStore, lost: Claim) -> None:
    let_pass(store, LEASE_S + 1)
    assert claim(store, "b").id == lost.id


def lose_by_cancelling(store: JobStore, lost: Claim) -> None:
    assert store.cancel(lost.id)


def lose_by_release(store: JobStore, lost: Claim) -> None:
    assert store.release(lost)


def lose_by_failure(store: JobStore, lost: Claim) -> None:
    assert store.attempt_failed(lost, "attempt_failed", "the replica died", MOST)


def lose_by_completing(store: JobStore, lost: Claim) -> None:
    assert store.complete(lost, {"folder": "films/1"})


def lose_by_refusing(store: JobStore, lost: Claim) -> None:
    assert store.refuse(lost, "invalid_input", "no head")


@pytest.mark.parametrize(
    "lose",
    [
        lose_by_lease,
        lose_by_cancelling,
        lose_by_release,
        lose_by_failure,
        lose_by_completing,
        lose_by_refusing,
    ],
)
def test_late_writes_of_a_claim_that_is_over_change_nothing(
    store: JobStore, lose: Callable[[JobStore, Claim], None]
) -> None:
    add(store, 0, webhook="https://example.org/hook")
    lost = claim(store)
    assert store.still_held({lost.id: lost.fence}) == {lost.id}
    lose(store, lost)
    before = read(store, lost.id), lease_of(store, lost.id), events(store)
    assert store.still_held({lost.id: lost.fence}) == set()
    assert store.extend({lost.id: lost.fence}, LEASE_S) == set()
    assert not store.update(lost, stage="finishing", frames=9)
    assert not store.add_windows(lost, 1)
    assert not store.release(lost)
    assert not store.attempt_failed(lost, "attempt_failed", "late", 1)
    assert not store.refuse(lost, "invalid_input", "late")
    assert not store.complete(lost, {"late": True})
    assert store.gives_way(lost, 0)
    assert (read(store, lost.id), lease_of(store, lost.id), events(store)) == before


def lease_of(store: JobStore, job_id: str) -> float:
    with store._transaction(writes=False) as db:
        return float(db.execute(sa.select(jobs.c.lease_until).where(jobs.c.id == job_id)).scalar_one())


def events(store: JobStore) -> list[Any]:
    with store._transaction(writes=False) as db:
        return [tuple(row) for row in db.execute(sa.select(deliveries))]


def test_a_lease_that_is_extended_is_not_taken(store: JobStore) -> None:
    kept, lost = add(store, 0), add(store, 1)
    claims = {one.id: one.fence for one in (claim(store), claim(store))}
    let_pass(store, LEASE_S - 5)
    assert store.claim("b", LEASE_S, MOST) is None
    assert store.extend({kept.id: claims[kept.id]}, LEASE_S) == {kept.id}
    let_pass(store, 10)
    assert claim(store, "b").id == lost.id, "only the claims that were named are extended, though all are of one holder"
    assert store.claim("b", LEASE_S, MOST) is None
    assert store.extend(claims, LEASE_S) == {kept.id}
    assert store.extend({}, LEASE_S) == set() == store.still_held({})


# Attempts


def test_leases_that_run_out_count_as_failures(store: JobStore) -> None:
    job = add(store, 0, webhook="https://example.org/hook")
    other = add(store, 1)
    for attempt in range(MOST):
        lost = claim(store, lease_s=OVER)
        assert (lost.id, lost.fence, lost.job.failures) == (job.id, attempt + 1, attempt)
    assert claim(store).id == other.id, "the job that is given up does not stand before others"
    ended = read(store, job.id)
    assert (ended.status, ended.error_code, ended.failures) == ("failed", "worker_lost", MOST)
    assert ended.error_message is not None and f"{MOST} attempts" in ended.error_message
    assert ended.completed_at is not None and ended.stage is None and ended.holder is None
    assert [event.kind for event in store.due_deliveries(LEASE_S)] == ["video.failed"]


def test_attempts_that_fail_wait_longer_each_time_and_end_with_the_reason(store: JobStore) -> None:
    job = add(store, 0)
    waits = []
    for attempt in range(MOST):
        failing = claim(store)
        assert failing.job.failures == attempt
        assert store.attempt_failed(failing, "attempt_failed", f"reason {attempt}", MOST)
        if attempt < MOST - 1:
            assert store.claim("a", LEASE_S, MOST) is None, "it waits"
            assert read(store, job.id).error_message == f"reason {attempt}"
            with store._transaction(writes=False) as db:
                waits.append(db.scalar(sa.select(jobs.c.not_before)) - store._now(db))
            let_pass(store, waits[-1] + 1)
    assert waits == sorted(waits) and waits[0] > 0 and waits[-1] > waits[0] + 0.5
    ended = read(store, job.id)
    assert ended.status == "failed" and ended.error_code == "attempt_failed"
    assert ended.error_message is not None
    assert f"{MOST} attempts" in ended.error_message and ended.error_message.endswith("reason 2")


def test_a_window_ends_the_row_of_failures_and_completing_clears_the_error(store: JobStore) -> None:
    add(store, 0)
    for _ in range(2 * MOST):
        failing = claim(store)
        assert store.add_windows(failing, 2, previews=1)
        assert store.attempt_failed(failing, "attempt_failed", "again", MOST)
        let_pass(store, 100)
    last = claim(store)
    assert (last.job.windows_done, last.job.previews, last.job.failures) == (4 * MOST, 2 * MOST, 1)
    assert store.complete(last, {"folder": "films/1", "files": {}})
    ended = read(store, last.id)
    assert ended.result == {"folder": "films/1", "files": {}}
    assert (ended.status, ended.error_code, ended.error_message) == ("completed", None, None)


def test_a_job_that_is_given_back_waits_and_counts_no_failure(store: JobStore) -> None:
    job = add(store, 0)
    first = claim(store)
    assert store.update(first, stage="generating", frames=25, windows=9, warnings=["no sound"])
    assert store.release(first, wait_s=3600.0)
    assert store.claim("b", LEASE_S, MOST) is None
    let_pass(store, 3601)
    second = claim(store, "b")
    assert (second.id, second.fence, second.job.failures, second.job.stage) == (job.id, 2, 0, "generating")
    assert (second.job.frames, second.job.windows, second.job.warnings) == (25, 9, ["no sound"])
    assert second.job.started_at == first.job.started_at


# Cancelling


def test_jobs_are_cancelled_in_every_state(store: JobStore) -> None:
    hook = "https://example.org/hook"
    queued = add(store, 0, webhook=hook)
    cancelled = store.cancel(queued.id, "one")
    assert cancelled is not None and cancelled == read(store, queued.id)
    assert (cancelled.status, cancelled.fence, cancelled.stage) == ("canceled", 1, None)
    assert cancelled.completed_at is not None
    assert store.claim("a", LEASE_S, MOST) is None

    running = add(store, 1, webhook=hook)
    claim(store)
    assert store.cancel(running.id) == read(store, running.id)
    assert read(store, running.id).status == "canceled"

    failing = add(store, 2, webhook=hook)
    assert store.attempt_failed(claim(store), "attempt_failed", "the replica died", MOST)
    store.cancel(failing.id)
    assert read(store, failing.id).status == "canceled" and read(store, failing.id).error_code is None

    lost = add(store, 3, webhook=hook)
    claim(store, lease_s=OVER)
    store.cancel(lost.id)
    let_pass(store, 1000)
    assert store.claim("a", LEASE_S, MOST) is None

    assert Counter(event.kind for event in store.due_deliveries(LEASE_S)) == {"video.canceled": 4}
    for end in (lose_by_completing, lose_by_refusing, lose_by_cancelling):
        job = add(store, hash(end) % 1000 + 10)
        end(store, claim(store))
        before = read(store, job.id)
        assert store.cancel(job.id) == before == read(store, job.id), "what has ended stays as it is"
    assert not store.due_deliveries(LEASE_S)
    assert store.cancel("video_unknown") is None


def test_only_the_owner_sees_and_cancels_a_job(store: JobStore) -> None:
    job = add(store, 0, "one")
    assert store.cancel(job.id, "two") is None and store.get(job.id, "two") is None
    assert read(store, job.id).status == "queued"
    assert store.get(job.id, "one") == job


def test_a_completion_that_races_a_cancellation_shows_one_of_them_for_good(store: JobStore) -> None:
    ends = []
    for number in range(12):
        add(store, number, webhook="https://example.org/hook")
        held = claim(store)

        def race(i: int, held: Claim = held) -> Any:
            return store.complete(held, {"folder": "films"}) if i else store.cancel(held.id)

        cancelled, completed = in_threads(2, race)
        job = read(store, held.id)
        assert job == cancelled and job.status == ("completed" if completed else "canceled")
        assert (job.result is None) == (not completed)
        ends.append(f"video.{job.status}")
    assert sorted(event.kind for event in store.due_deliveries(LEASE_S)) == sorted(ends)


# Fairness, with windows that are only counted


class Simulation:
    """Workers that generate one window each at a time, with real claims. done: of each job, when it ended."""

    def __init__(self, store: JobStore, slots: int = 2):
        self._store, self._slots = store, slots
        self._held: dict[str, tuple[Claim, int]] = {}
        self._left: dict[str, int] = {}
        self.time = 0
        self.done: dict[str, int] = {}
        self.windows: list[str] = []

    def add(self, number: int, owner: str, windows: int) -> str:
        job = add(self._store, number, owner)
        self._left[job.id] = windows
        return job.id

    def step(self) -> None:
        while len(self._held) < self._slots and (new := self._store.claim("a", LEASE_S, MOST)) is not None:
            self._held[new.id] = new, 0
        self.time += 1
        for job_id, (held, since) in list(self._held.items()):
            if self._left[job_id] > 0:
                assert self._store.add_windows(held, 1)
                self._left[job_id] -= 1
                self.windows.append(job_id)
            if self._left[job_id] <= 0:
                if self._left[job_id] < 0:  # a job that is refused at once
                    assert self._store.refuse(held, "invalid_input", "no head")
                else:
                    assert self._store.complete(held, {})
                self.done[job_id] = self.time
                del self._held[job_id]
            elif self._store.gives_way(held, since + 1):
                assert self._store.release(held)
                del self._held[job_id]
            else:
                self._held[job_id] = held, since + 1

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.step()


def test_short_jobs_do_not_wait_for_a_long_one(store: JobStore) -> None:
    simulation = Simulation(store, slots=1)
    long = simulation.add(0, "one", 10_000)
    simulation.run(3 * QUANTUM)
    assert set(simulation.windows) == {long}, "alone, it gives way to nobody"
    short = simulation.add(1, "two", QUANTUM // 2)
    simulation.run(QUANTUM + 2)
    assert short in simulation.done


@pytest.mark.parametrize("windows", [1, QUANTUM, -1], ids=["one_window", "a_quantum", "refused"])
def test_a_long_job_is_not_starved_by_a_stream_of_short_ones(store: JobStore, windows: int) -> None:
    """However many come, the long one gets its share of windows. It was alone for a while, and so is ahead of them."""
    simulation = Simulation(store, slots=1)
    long = simulation.add(0, "long", 10_000)
    simulation.run(3 * QUANTUM)
    waiting = 3
    shorts = [simulation.add(number, f"owner{number}", windows) for number in range(1, waiting + 1)]
    start, gaps, gap = len(simulation.windows), [], 0
    for _ in range(12 * QUANTUM):
        before = simulation.windows.count(long)
        simulation.step()
        while len(shorts) - sum(one in simulation.done for one in shorts) < waiting:
            shorts.append(simulation.add(len(shorts) + 1, f"owner{len(shorts)}", windows))
        gap = 0 if simulation.windows.count(long) > before else gap + 1
        gaps.append(gap)
    assert max(gaps) <= (waiting + 1) * (QUANTUM + 1)
    own = simulation.windows[start:].count(long)
    assert own >= 12 * QUANTUM // (waiting + 2), "one of four gets about a fourth"
    assert sum(one in simulation.done for one in shorts) >= 3


@pytest.mark.parametrize("many", [5, 60])
def test_many_jobs_of_one_owner_do_not_keep_out_another_one(store: JobStore, many: int) -> None:
    simulation = Simulation(store)
    crowd = [simulation.add(number, "crowd", 2 * QUANTUM) for number in range(many)]
    simulation.run(QUANTUM // 2)
    other = simulation.add(0, "other", 2 * QUANTUM)
    simulation.run(6 * QUANTUM)
    assert other in simulation.done, "however many wait"
    assert 0 < sum(job in simulation.done for job in crowd) <= 8


def test_jobs_of_one_owner_come_in_their_order(store: JobStore) -> None:
    simulation = Simulation(store, slots=1)
    own = [simulation.add(number, "one", QUANTUM) for number in range(4)]
    simulation.run(4 * QUANTUM + 4)
    assert list(simulation.done) == own


def test_the_queue_position_counts_those_before(store: JobStore) -> None:
    crowd = [add(store, number, "crowd") for number in range(4)]
    other = add(store, 0, "other")
    assert [store.queue_position(job) for job in crowd] == [0, 2, 3, 4]
    assert store.queue_position(other) == 1
    order = [claim(store).id for _ in range(5)]
    assert order == [crowd[0].id, other.id, *(job.id for job in crowd[1:])]


# Admission


def test_an_idempotency_key_gives_the_same_job(store: JobStore) -> None:
    first, new = store.add(new_job(0, key="k"), most_waiting=1, most_of_owner=1)
    assert new
    again = dataclasses.replace(new_job(0, key="k"), id="video_again")
    assert store.add(again, most_waiting=1, most_of_owner=1) == (first, False), "also where nothing else is admitted"
    assert store.known_key("one", "k") == first and store.known_key("two", "k") is None
    with pytest.raises(KeyReused, match="k came before with another request"):
        store.add(new_job(1, key="k"), most_waiting=9, most_of_owner=9)
    other, new = store.add(new_job(1, "two", key="k"), most_waiting=9, most_of_owner=9)
    assert new and other.id != first.id
    store.cancel(first.id)
    assert store.add(again, most_waiting=9, most_of_owner=9)[0].status == "canceled"
    assert len(store.listed(None, 10)) == 2


def test_requests_with_one_key_at_the_same_moment_make_one_job(store: JobStore) -> None:
    def same(i: int) -> tuple[Job, bool]:
        new = dataclasses.replace(new_job(0, key="k"), id=f"video_{i}")
        return store.add(new, most_waiting=100, most_of_owner=100)

    answers = in_threads(8, same)
    assert len({job.id for job, _ in answers}) == 1
    assert sum(new for _, new in answers) == 1
    assert len(store.listed(None, 100)) == 1


def test_admission_is_bounded_for_all_and_for_each_owner(store: JobStore) -> None:
    for number in range(2):
        store.add(new_job(number), most_waiting=3, most_of_owner=2)
    with pytest.raises(Full, match="2 of your jobs") as full:
        store.add(new_job(2), most_waiting=3, most_of_owner=2)
    assert full.value.retry_after_s > 0
    claim(store)
    with pytest.raises(Full):  # one that runs counts as well
        store.add(new_job(2), most_waiting=3, most_of_owner=2)
    store.add(new_job(0, "two"), most_waiting=3, most_of_owner=2)
    with pytest.raises(Full, match="3 jobs wait or run") as full:
        store.add(new_job(0, "three"), most_waiting=3, most_of_owner=2)
    assert full.value.retry_after_s > 0
    store.cancel("video_one_0")
    store.add(new_job(0, "three"), most_waiting=3, most_of_owner=2)
    assert store.counts() == {"canceled": 1, "queued": 3}


def test_admission_is_bounded_when_all_come_at_once(store: JobStore) -> None:
    def one(i: int) -> bool:
        try:
            store.add(new_job(i, f"owner{i % 2}"), most_waiting=5, most_of_owner=4)
        except Full:
            return False
        return True

    assert sum(in_threads(14, one)) == 5
    assert store.counts() == {"queued": 5}
    assert [job.number for job in store.listed(None, 10, newest_first=False)] == [1, 2, 3, 4, 5]


# Lists


def test_pages_are_complete_while_jobs_are_added(store: JobStore) -> None:
    added = [add(store, number, "one").id for number in range(5)]
    add(store, 0, "two")
    pages, after = [], None
    while page := [job.id for job in store.listed("one", 2, after)]:
        pages.append(page)
        after = page[-1]
        if len(pages) == 1:
            add(store, 5, "one")  # newer than what is left
    newest = [*reversed(added)]
    assert pages == [newest[:2], newest[2:4], newest[4:]]
    oldest = [job.id for job in store.listed("one", 3, newest_first=False)]
    assert oldest == added[:3]
    assert [job.id for job in store.listed("one", 9, oldest[-1], newest_first=False)][:2] == added[3:]
    assert len(store.listed(None, 100)) == 7
    assert store.listed("one", 5, "video_unknown") == []


def test_batches(store: JobStore) -> None:
    rows = [{"custom_id": "a", "error": None}, {"custom_id": "b", "error": "no scene"}]
    created = store.add_batch("batch_1", "one", rows)
    store.add_batch("batch_2", "one", [])
    store.add_batch("batch_3", "two", [])
    for row in (2, 0):
        store.add(dataclasses.replace(new_job(row), batch=("batch_1", row)), most_waiting=9, most_of_owner=9)
    add(store, 9)
    batch = store.batch("batch_1", "one")
    assert batch is not None and batch["rows"] == rows and batch["created_at"] == created
    assert store.batch("batch_1", "two") is None
    assert [(job.batch_id, job.batch_row) for job in store.listed("one", 9, batch="batch_1", newest_first=False)] == [
        ("batch_1", 2),
        ("batch_1", 0),
    ]
    assert [one["id"] for one in store.batches_of("one", 9)] == ["batch_2", "batch_1"]
    assert [one["id"] for one in store.batches_of("one", 1)] == ["batch_2"]


def test_jobs_expire_after_their_end_and_their_files_are_removed_once(store: JobStore) -> None:
    waiting, completed, failed, cancelled = (add(store, number, f"owner{number}") for number in range(4))
    claims = {one.id: one for one in (claim(store) for _ in range(4))}
    store.release(claims[waiting.id])
    store.complete(claims[completed.id], {"folder": "films/1"})
    store.refuse(claims[failed.id], "invalid_input", "no head")
    store.cancel(cancelled.id)
    assert {job.id for job in store.removable()} == {failed.id, cancelled.id}
    assert len(store.removable(limit=1)) == 1
    assert store.expire() == 0
    store.removed(failed.id)
    assert {job.id for job in store.removable()} == {cancelled.id}
    let_pass(store, 4000)
    assert store.expire() == 3
    assert store.expire() == 0
    assert read(store, waiting.id).status == "in_progress", "what has not ended does not expire"
    assert read(store, completed.id).status == "expired" and read(store, completed.id).result is None
    assert {job.id for job in store.removable()} == {completed.id, cancelled.id}
    for job in store.removable():
        store.removed(job.id)
    assert store.removable() == []
    assert read(store, failed.id).removed_at is not None


# Files


def stored_file(number: int, owner: str = "one", size: int = 10) -> StoredFile:
    return StoredFile(f"file_{owner}_{number}", 0, owner, f"{number}.mp4", "scene", size, "0" * 64, 0.0, 0.0)


def test_files_are_counted_against_the_quota_of_their_owner(store: JobStore) -> None:
    made = [store.add_file(stored_file(number), 60.0, 30) for number in range(3)]
    assert [one.number for one in made] == [1, 2, 3] and made[0].expires_at == pytest.approx(made[0].created_at + 60)
    with pytest.raises(Full, match="30 bytes, and 30 are allowed"):
        store.add_file(stored_file(3, size=1), 60.0, 30)
    store.add_file(stored_file(0, "two"), 3600.0, 30)
    assert store.file(made[0].id, "one") == made[0] and store.file(made[0].id, "two") is None
    assert [one.id for one in store.files_of("one", 2)] == [made[2].id, made[1].id]
    assert [one.id for one in store.files_of("one", 2, made[1].id)] == [made[0].id]
    assert not store.drop_file(made[1].id, "two")
    assert store.drop_file(made[1].id, "one") and not store.drop_file(made[1].id, "one")
    store.add_file(stored_file(4), 3600.0, 30)
    assert store.drop_expired_files() == []
    let_pass(store, 100)
    assert sorted(store.drop_expired_files()) == [made[0].id, made[2].id]
    assert [one.id for one in store.files_of("one", 9)] == ["file_one_4"]


def test_the_quota_holds_when_files_come_at_once_and_files_may_be_large(store: JobStore) -> None:
    size = 3 * 2**31

    def one(i: int) -> bool:
        try:
            store.add_file(stored_file(i, size=size), 60.0, 3 * size)
        except Full:
            return False
        return True

    assert sum(in_threads(8, one)) == 3
    assert [file.bytes for file in store.files_of("one", 9)] == [size] * 3


# Webhooks


def test_each_event_is_delivered_once_and_retried_until_it_is(store: JobStore) -> None:
    for number in range(12):
        add(store, number, webhook=f"https://example.org/{number}")
    add(store, 99)  # without a webhook
    while (one := store.claim("a", LEASE_S, MOST)) is not None:
        store.complete(one, {})
    taken = [event for some in in_threads(4, lambda i: store.due_deliveries(LEASE_S, 5)) for event in some]
    taken += store.due_deliveries(LEASE_S)
    assert len(taken) == 12 == len({event.id for event in taken}) == len({event.job_id for event in taken})
    assert {event.attempts for event in taken} == {1} and {event.kind for event in taken} == {"video.completed"}
    assert store.due_deliveries(LEASE_S) == [], "others get them only after a while"

    done, failed, given_up, *silent = taken
    store.delivered(done.id)
    store.delivery_failed(failed.id, "503", wait_s=1000.0)
    store.delivery_failed(given_up.id, "410" * 1000, wait_s=None)
    let_pass(store, LEASE_S + 1)
    again = store.due_deliveries(OVER)
    assert {event.id for event in again} == {event.id for event in silent}, "who took them may have died"
    assert {event.attempts for event in again} == {2}
    for event in again:
        store.delivered(event.id)
    let_pass(store, 1000)
    assert [(event.id, event.attempts) for event in store.due_deliveries(OVER)] == [(failed.id, 2)]
    store.delivered(failed.id)
    let_pass(store, 10_000)
    assert store.due_deliveries(LEASE_S) == []


# The tables


def test_several_processes_create_the_tables_at_once(url: str) -> None:
    with ProcessPoolExecutor(4, mp_context=multiprocessing.get_context("spawn")) as pool:
        made = list(pool.map(opened, [url] * 8, range(8)))
    store = JobStore(url)
    assert {job.id for job in store.listed(None, 100)} == set(made) and len(set(made)) == 8
    store.close()


def test_several_threads_create_the_tables_at_once(url: str) -> None:
    assert len(set(in_threads(8, lambda i: opened(url, i)))) == 8


def test_the_steps_make_the_tables_of_the_schema(store: JobStore) -> None:
    with store._transaction(writes=False) as db:
        context = MigrationContext.configure(db, opts={"compare_type": True, "compare_server_default": True})
        assert alembic.autogenerate.compare_metadata(context, metadata) == []


def test_tables_of_a_newer_version_are_refused_in_one_line(url: str) -> None:
    store = JobStore(url)
    add(store, 0)
    with store._transaction() as db:
        db.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    store.close()
    with pytest.raises(TccpError, match=r"version 9999.*update TCCP") as refused:
        JobStore(url)
    assert "\n" not in str(refused.value)


def test_a_store_that_is_opened_again_has_everything(url: str) -> None:
    store = JobStore(url)
    job = add(store, 0)
    held = claim(store)
    store.close()
    again = JobStore(url)
    assert again.get(job.id) == held.job
    assert again.complete(held, {})
    again.close()


def test_opening_a_store_leaves_loggers_alone(url: str, caplog: pytest.LogCaptureFixture) -> None:
    """Alembic can be set up to replace the process's logging."""
    before = logging.getLogger().handlers.copy()
    JobStore(url).close()
    assert logging.getLogger().handlers == before
    logging.getLogger("tccp.serving").warning("still heard")
    assert "still heard" in caplog.text


# Errors


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("not a url", "give sqlite:///PATH or postgresql://"),
        ("mysql://user:secret@host/db", "of mysql: give sqlite"),
        ("sqlite://", "outlive the server"),
        ("sqlite:///:memory:", "outlive the server"),
        ("nosuch://user:secret@host/db", "give sqlite:///PATH"),
        ("postgresql+nosuch://user:secret@host/db", "give sqlite:///PATH"),
        ("postgresql://user:secret@host:secret/db", "no valid port"),
        ("postgresql://user:sec:ret@secret:host/db", "no valid port"),
    ],
)
def test_urls_that_cannot_be_used_are_mistakes_of_the_user(url: str, message: str) -> None:
    with pytest.raises(TccpError, match=message) as refused:
        JobStore(url)
    assert "secret" not in str(refused.value) and "\n" not in str(refused.value)


def test_a_folder_that_cannot_be_made_is_a_mistake_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(TccpError, match="give sqlite:///PATH"):
        JobStore(f"sqlite:///{tmp_path}/file/jobs.db")


def failure(url: str) -> str:
    """The message of a store that cannot be opened."""
    with pytest.raises(StorageError) as failed:
        JobStore(url)
    text = str(failed.value)
    assert "\n" not in text and "secret" not in text
    assert text.endswith("check the database") and failed.value.reason in text
    return text


def test_files_that_are_no_database_are_a_failed_storage(tmp_path: Path) -> None:
    (tmp_path / "jobs.db").write_bytes(b"something else " * 1000)
    assert "not a database" in failure(f"sqlite:///{tmp_path}/jobs.db")
    assert "unable to open" in failure(f"sqlite:///{tmp_path}")


def test_a_damaged_database_is_a_failed_storage(tmp_path: Path) -> None:
    path = tmp_path / "jobs.db"
    store = JobStore(f"sqlite:///{path}")
    for number in range(50):
        add(store, number)
    store.close()
    content = bytearray(path.read_bytes())
    content[8192:] = b"\xff" * (len(content) - 8192)
    path.write_bytes(content)
    damaged = JobStore(f"sqlite:///{path}")
    with pytest.raises(StorageError, match="malformed"):
        damaged.listed(None, 100)
    damaged.close()


def test_a_postgresql_that_cannot_be_reached_is_a_failed_storage(postgres: PostgresServer, tmp_path: Path) -> None:
    for url in (
        f"postgresql://tester:secret@/db?host={tmp_path}",
        f"postgresql://tester@/db?host={tmp_path}&password=secret",
        postgres.url("no_such_database").replace("tester@", "tester:secret@"),
        postgres.url("postgres", user="no_such_user"),
    ):
        assert "failed" in failure(url)


def test_a_user_who_may_not_create_tables_is_told_so(postgres: PostgresServer) -> None:
    postgres.database()
    postgres.sql("CREATE USER guest; GRANT USAGE ON SCHEMA public TO guest")
    assert "permission denied" in failure(postgres.url("postgres", "guest"))
    postgres.sql("DROP OWNED BY guest; DROP USER guest")


def test_a_store_works_again_after_its_server_was_away(postgres: PostgresServer) -> None:
    store = JobStore(postgres.database())
    job = add(store, 0)
    held = claim(store)
    postgres.stop()
    try:
        for call in (lambda: store.get(job.id), lambda: store.complete(held, {}), store.counts, lambda: add(store, 1)):
            with pytest.raises(StorageError):
                call()
    finally:
        postgres.start()
    assert store.get(job.id) == held.job
    assert store.complete(held, {})
    store.close()


def test_what_is_written_on_sqlite_is_on_the_disk(tmp_path: Path) -> None:
    """WAL alone does not keep the last transactions if the power is cut."""
    store = JobStore(f"sqlite:///{tmp_path}/jobs.db")
    with store._transaction() as db:
        assert db.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert db.exec_driver_sql("PRAGMA synchronous").scalar() == 2  # FULL
    store.close()
    with sqlite3.connect(tmp_path / "jobs.db") as raw:
        assert raw.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    raw.close()
