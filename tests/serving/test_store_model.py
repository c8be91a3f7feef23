"""The job store against a model in plain Python: whatever is called in whatever order, both say the same."""

from __future__ import annotations

import functools
import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import sqlalchemy as sa
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from store_workers import new_job

from tccp.serving.scheduling import CLAIM_COSTS, QUANTUM, gives_way
from tccp.serving.store import Claim, JobStore
from tccp.serving.store.schema import jobs

MOST = 3
LEASE_S = 1000.0


@functools.cache
def empty_database() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        JobStore(f"sqlite:///{folder}/jobs.db").close()
        return (Path(folder) / "jobs.db").read_bytes()


@dataclass
class Expected:
    """A job. waits: for another attempt. lease: whether somebody's lease runs."""

    number: int
    owner: str
    virtual_time: float
    status: str = "queued"
    fence: int = 0
    failures: int = 0
    windows: int = 0
    held: bool = False
    lease: bool = False
    waits: bool = False

    def end(self, status: str) -> None:
        self.status, self.held, self.lease = status, False, False


@dataclass
class Model:
    jobs: dict[str, Expected] = field(default_factory=dict)
    clock: float = 0.0  # the greatest virtual time at work so far

    def next_free(self) -> str | None:
        free = [
            (one.virtual_time, one.number, job_id)
            for job_id, one in self.jobs.items()
            if one.status in ("queued", "in_progress") and not one.lease and not one.waits
        ]
        return min(free)[2] if free else None

    def claim(self, lease: bool) -> str | None:
        while (job_id := self.next_free()) is not None:
            job = self.jobs[job_id]
            job.failures += job.held
            job.fence += 1
            job.virtual_time += CLAIM_COSTS
            self.clock = max(self.clock, job.virtual_time)
            if job.failures < MOST:
                job.status, job.held, job.lease = "in_progress", True, lease
                return job_id
            job.end("failed")
        return None

    def holds(self, claim: Claim) -> bool:
        job = self.jobs[claim.id]
        return job.held and job.status == "in_progress" and job.fence == claim.fence


class StoreMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.mkdtemp()
        path = Path(self.folder) / "jobs.db"
        path.write_bytes(empty_database())
        self.store = JobStore(f"sqlite:///{path}")
        self.model = Model()
        self.claims: list[Claim] = []
        """All that were ever made."""

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.folder)

    def _any_claim(self, data: st.DataObject) -> tuple[Claim, Expected, bool]:
        claim = data.draw(st.sampled_from(self.claims[-4:]))  # of the last ones, more hold
        return claim, self.model.jobs[claim.id], self.model.holds(claim)

    @rule(owner=st.sampled_from(["one", "two", "three"]))
    def add(self, owner: str) -> None:
        number = len(self.model.jobs)
        waiting = sum(one.owner == owner and one.status == "queued" for one in self.model.jobs.values())
        job, new = self.store.add(new_job(number, owner), most_waiting=99, most_of_owner=99)
        expected = Expected(number + 1, owner, self.model.clock + waiting * QUANTUM)
        assert new and (job.number, job.virtual_time) == (expected.number, expected.virtual_time)
        self.model.jobs[job.id] = expected

    @rule(lease=st.booleans())
    def claim(self, lease: bool) -> None:
        """lease: whether it lasts; otherwise it is over at once, as of somebody who dies."""
        expected = self.model.claim(lease)
        claim = self.store.claim("holder", LEASE_S if lease else -LEASE_S, MOST)
        assert (None if claim is None else claim.id) == expected
        if claim is not None:
            assert claim.fence == self.model.jobs[claim.id].fence
            self.claims.append(claim)

    @rule()
    def time_passes(self) -> None:
        with self.store._transaction() as db:
            db.execute(jobs.update().values(not_before=0.0))
            db.execute(jobs.update().where(jobs.c.lease_until > 0).values(lease_until=1.0))
        for job in self.model.jobs.values():
            job.lease = job.waits = False

    @precondition(lambda self: self.claims)
    @rule()
    def extend(self) -> None:
        fences = {claim.id: claim.fence for claim in self.claims}  # of each job the last one
        held = {claim.id for claim in self.claims if self.model.holds(claim)}
        assert self.store.extend(fences, LEASE_S) == held
        for job_id in held:
            self.model.jobs[job_id].lease = True

    @precondition(lambda self: self.claims)
    @rule(data=st.data(), windows=st.integers(1, 2 * QUANTUM))
    def add_windows(self, data: st.DataObject, windows: int) -> None:
        claim, job, held = self._any_claim(data)
        assert self.store.add_windows(claim, windows) == held
        if held:
            job.windows += windows
            job.virtual_time += windows
            job.failures = 0
            self.model.clock = max(self.model.clock, job.virtual_time)

    @precondition(lambda self: self.claims)
    @rule(data=st.data(), windows=st.sampled_from([1, QUANTUM]))
    def gives_way(self, data: st.DataObject, windows: int) -> None:
        claim, job, held = self._any_claim(data)
        waiting = [
            one.virtual_time
            for one in self.model.jobs.values()
            if one.status in ("queued", "in_progress") and not one.held and not one.waits
        ]
        expected = gives_way(job.virtual_time, min(waiting, default=None), windows)
        assert self.store.gives_way(claim, windows) == (expected or not held)

    @precondition(lambda self: self.claims)
    @rule(data=st.data(), wait=st.booleans())
    def release(self, data: st.DataObject, wait: bool) -> None:
        claim, job, held = self._any_claim(data)
        assert self.store.release(claim, LEASE_S if wait else 0.0) == held
        if held:
            job.held, job.lease, job.waits = False, False, wait

    @precondition(lambda self: self.claims)
    @rule(data=st.data())
    def attempt_failed(self, data: st.DataObject) -> None:
        claim, job, held = self._any_claim(data)
        assert self.store.attempt_failed(claim, "attempt_failed", "it died", MOST) == held
        if held:
            job.failures += 1
            job.held, job.lease, job.waits = False, False, True
            if job.failures >= MOST:
                job.end("failed")
            with self.store._transaction() as db:  # so that the time that this test takes changes nothing
                db.execute(jobs.update().where(jobs.c.id == claim.id).values(not_before=jobs.c.not_before + LEASE_S))

    @precondition(lambda self: self.claims)
    @rule(data=st.data(), status=st.sampled_from(["completed", "failed"]))
    def end(self, data: st.DataObject, status: str) -> None:
        claim, job, held = self._any_claim(data)
        done = self.store.complete(claim, {}) if status == "completed" else self.store.refuse(claim, "invalid", "no")
        assert done == held
        if held:
            job.end(status)

    @precondition(lambda self: self.model.jobs)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        job_id = data.draw(st.sampled_from(sorted(self.model.jobs)))
        job = self.model.jobs[job_id]
        if job.status in ("queued", "in_progress"):
            job.fence += 1
            job.end("canceled")
        cancelled = self.store.cancel(job_id)
        assert cancelled is not None and cancelled.status == job.status

    @invariant()
    def both_say_the_same(self) -> None:
        with self.store._transaction(writes=False) as db:
            columns = jobs.c["id", "status", "fence", "failures", "windows_done", "virtual_time"]
            rows = {row[0]: tuple(row[1:]) for row in db.execute(sa.select(*columns))}
        assert rows == {
            job_id: (one.status, one.fence, one.failures, one.windows, one.virtual_time)
            for job_id, one in self.model.jobs.items()
        }
        assert self.store.counts() == Counter(one.status for one in self.model.jobs.values())
        last = {claim.id: claim for claim in self.claims}
        held = self.store.still_held({claim.id: claim.fence for claim in last.values()})
        assert held == {claim.id for claim in last.values() if self.model.holds(claim)}


StoreMachine.TestCase.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
TestStore = StoreMachine.TestCase
