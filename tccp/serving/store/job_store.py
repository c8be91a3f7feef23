"""Jobs, uploaded files, batches and webhook deliveries in one database.

Every change is one transaction. Whoever works on a job holds a `Claim`: its fence is compared in every write, so that
somebody whose lease has run out, or whose job was cancelled, changes nothing. Times are the database's, in seconds
since 1970, because clocks of several machines differ.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy import ColumnElement, Connection, Engine, event, func, select, update

from tccp.errors import StorageError, TccpError
from tccp.serving.scheduling import CLAIM_COSTS, first_turn, gives_way, retry_after_s
from tccp.serving.store.migrating import migrate
from tccp.serving.store.schema import batches, counters, deliveries, files, jobs

Status = Literal["queued", "in_progress", "completed", "failed", "canceled", "expired"]
Stage = Literal["preparing", "generating", "finishing"]
RUNNING = ("queued", "in_progress")
_BUSY_S = 30.0  # how long a transaction waits for another one of SQLite
_CONNECT_S = 10  # how long a connection to PostgreSQL may take


class Full(TccpError):
    """There is no room for another job or file now. retry_after_s: when to try again."""

    def __init__(self, message: str, retry_after_s: float):
        super().__init__(message)
        self.retry_after_s = retry_after_s


class KeyReused(TccpError):
    """An Idempotency-Key came again with another request."""


@dataclass(frozen=True)
class NewJob:
    """What a job is made of. inputs: by role, what is known of the file. weights: the version that it must use.

    input_bytes: of all inputs.
    """

    id: str
    owner: str
    spec: Mapping[str, Any]
    inputs: Mapping[str, Any]
    model: str
    weights: str
    request_hash: str
    expires_in_s: float
    idempotency_key: str | None = None
    batch: tuple[str, int] | None = None
    remix_of: str | None = None
    webhook: str | None = None
    input_bytes: int = 0


@dataclass(frozen=True)
class Job:
    """A row of the table `jobs`, as it was when it was read."""

    id: str
    number: int
    owner: str
    model: str
    weights: str
    spec: dict[str, Any]
    inputs: dict[str, Any]
    status: Status
    stage: Stage | None
    created_at: float
    started_at: float | None
    completed_at: float | None
    expires_at: float
    removed_at: float | None
    hidden: int
    frames: int
    windows: int
    windows_done: int
    previews: int
    warnings: list[str]
    virtual_time: float
    fence: int
    failures: int
    holder: str | None
    error_code: str | None
    error_message: str | None
    result: dict[str, Any] | None
    webhook: str | None
    batch_id: str | None
    batch_row: int | None
    remix_of: str | None
    request_hash: str


@dataclass(frozen=True)
class StoredFile:
    """A file that was uploaded to be named in requests."""

    id: str
    number: int
    owner: str
    name: str
    purpose: str
    bytes: int
    sha256: str
    created_at: float
    expires_at: float


@dataclass(frozen=True)
class Claim:
    """The right to work on a job until the lease ends. job: as it was claimed."""

    job: Job
    fence: int

    @property
    def id(self) -> str:
        return self.job.id


@dataclass(frozen=True)
class Delivery:
    """A webhook that is due."""

    id: str
    job_id: str
    url: str
    kind: str
    created_at: float
    attempts: int


_JOB_COLUMNS = [jobs.c[name] for name in Job.__dataclass_fields__]
_AT_WORK = sa.and_(jobs.c.status == "in_progress", jobs.c.holder.is_not(None))
_FILE_COLUMNS = [files.c[name] for name in StoredFile.__dataclass_fields__]


class JobStore:
    """url: of SQLAlchemy; SQLite serves one machine, PostgreSQL any number. Methods may be called from any thread.

    Raises TccpError for a URL that cannot be used, StorageError if the database cannot be reached. All methods raise
    StorageError if it fails.
    """

    def __init__(self, url: str):
        self.url = url
        try:
            parsed = sa.make_url(url)
            self.backend = parsed.get_backend_name()
            if self.backend not in ("sqlite", "postgresql"):
                raise TccpError(f"the job store {parsed!r} is of {self.backend}: give sqlite:///PATH or postgresql://")
            if self.backend == "sqlite":
                if not parsed.database or parsed.database == ":memory:":
                    raise TccpError("the job store must outlive the server: give sqlite:///PATH")
                Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
                self._engine = sa.create_engine(parsed, connect_args={"timeout": _BUSY_S})
                event.listen(self._engine, "connect", _prepare_sqlite)
                event.listen(self._engine, "begin", _begin_sqlite)
            else:
                if parsed.drivername == "postgresql":
                    parsed = parsed.set(drivername="postgresql+psycopg")
                wait = {} if "connect_timeout" in parsed.query else {"connect_timeout": _CONNECT_S}
                self._engine = sa.create_engine(
                    parsed, connect_args=wait, pool_pre_ping=True, pool_size=4, max_overflow=12
                )
        except TccpError:
            raise
        except (sa.exc.ArgumentError, ImportError, OSError) as error:
            raise TccpError(f"the job store cannot be used ({error}): give sqlite:///PATH or postgresql://") from None
        except ValueError:  # its text has a part of the URL, which may be one of the password
            raise TccpError(
                "the job store's URL has no valid port: give a number, and special characters of a password as %XX"
            ) from None
        try:
            with _storage_errors(self._engine):
                migrate(self._engine)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._engine.dispose()

    @contextmanager
    def _transaction(self, writes: bool = True) -> Iterator[Connection]:
        """A transaction; on SQLite one that writes has the lock from its start, and others wait for it."""
        engine = self._engine.execution_options(tccp_writes=writes)
        with _storage_errors(self._engine), engine.begin() as connection:
            yield connection

    # For clients

    def add(
        self, new: NewJob, *, most_waiting: int, most_of_owner: int, most_bytes_of_owner: int | None = None
    ) -> tuple[Job, bool]:
        """Adds a job; returns it, and whether it is new. With an Idempotency-Key that is known, it returns that job.

        most_waiting, most_of_owner: jobs that may wait or run, of all and of this owner. most_bytes_of_owner: in the
        inputs of all jobs of this owner whose files are kept.
        Raises Full if there are as many, KeyReused if the key came with another request.
        """
        with self._transaction() as db:
            _lock(db, "jobs")  # what is counted here must hold until the job is added
            if new.idempotency_key is not None:
                known = _by_key(db, new.owner, new.idempotency_key)
                if known is not None:
                    return self._same_request(known, new), False
            _check_room(db, new.owner, new.input_bytes, most_waiting, most_of_owner, most_bytes_of_owner)
            waiting = db.scalar(select(func.count()).where(jobs.c.status == "queued", jobs.c.owner == new.owner)) or 0
            now = self._now(db)
            row = {
                "id": new.id,
                "number": _next(db, "jobs"),
                "owner": new.owner,
                "idempotency_key": new.idempotency_key,
                "request_hash": new.request_hash,
                "batch_id": new.batch[0] if new.batch else None,
                "batch_row": new.batch[1] if new.batch else None,
                "remix_of": new.remix_of,
                "model": new.model,
                "weights": new.weights,
                "spec": dict(new.spec),
                "inputs": dict(new.inputs),
                "status": "queued",
                "created_at": now,
                "expires_at": now + new.expires_in_s,
                "hidden": 0,
                "input_bytes": new.input_bytes,
                "frames": 0,
                "windows": 0,
                "windows_done": 0,
                "previews": 0,
                "warnings": [],
                "virtual_time": first_turn(_counter(db, "virtual_time"), waiting),
                "fence": 0,
                "failures": 0,
                "lease_until": 0.0,
                "not_before": 0.0,
                "webhook": new.webhook,
            }
            inserted = db.execute(jobs.insert().values(row).returning(*_JOB_COLUMNS)).one()
            return _job(inserted), True

    def check_room(
        self, owner: str, input_bytes: int, *, most_waiting: int, most_of_owner: int, most_bytes_of_owner: int | None
    ) -> None:
        """Raises Full if `add` would refuse another job with so many bytes now."""
        with self._transaction(writes=False) as db:
            _check_room(db, owner, input_bytes, most_waiting, most_of_owner, most_bytes_of_owner)

    def _same_request(self, known: Job, new: NewJob) -> Job:
        if known.request_hash != new.request_hash:
            raise KeyReused(
                f"Idempotency-Key {new.idempotency_key} came before with another request: use a new key for it"
            )
        return known

    def known_key(self, owner: str, key: str) -> Job | None:
        """The job that came with this key."""
        with self._transaction(writes=False) as db:
            return _by_key(db, owner, key)

    def get(self, job_id: str, owner: str | None = None) -> Job | None:
        """A job; None if there is none. For an owner: None also if it is another's, or hidden."""
        with self._transaction(writes=False) as db:
            query = select(*_JOB_COLUMNS).where(jobs.c.id == job_id)
            row = db.execute(query if owner is None else query.where(_visible_to(owner))).first()
            return None if row is None else _job(row)

    def listed(
        self,
        owner: str | None,
        limit: int,
        after: str | None = None,
        newest_first: bool = True,
        batch: str | None = None,
    ) -> list[Job]:
        """Jobs that an owner sees (None: all jobs, hidden ones too), by arrival.

        after: the id of the last one of the page before.
        """
        query = select(*_JOB_COLUMNS)
        if owner is not None:
            query = query.where(_visible_to(owner))
        if batch is not None:
            query = query.where(jobs.c.batch_id == batch)
        if after is not None:
            last = select(jobs.c.number).where(jobs.c.id == after).scalar_subquery()
            query = query.where(jobs.c.number < last if newest_first else jobs.c.number > last)
        order = jobs.c.number.desc() if newest_first else jobs.c.number
        with self._transaction(writes=False) as db:
            return [_job(row) for row in db.execute(query.order_by(order).limit(limit))]

    def queue_position(self, job: Job) -> int:
        """How many waiting jobs have their turn before this one."""
        earlier = sa.or_(
            jobs.c.virtual_time < job.virtual_time,
            sa.and_(jobs.c.virtual_time == job.virtual_time, jobs.c.number < job.number),
        )
        with self._transaction(writes=False) as db:
            return db.scalar(select(func.count()).where(jobs.c.status == "queued", earlier)) or 0

    def counts(self) -> dict[str, int]:
        """Number of jobs by status."""
        with self._transaction(writes=False) as db:
            rows = db.execute(select(jobs.c.status, func.count()).group_by(jobs.c.status))
            return {row[0]: row[1] for row in rows}

    def cancel(self, job_id: str, owner: str | None = None) -> Job | None:
        """Cancels a job that waits or runs, and leaves others as they are; returns it as it is then.

        Once this has returned, nobody's claim of it holds, and it never completes.
        """
        mine = jobs.c.id == job_id if owner is None else sa.and_(jobs.c.id == job_id, _visible_to(owner))
        with self._transaction() as db:
            changed = db.execute(
                update(jobs)
                .where(mine, jobs.c.status.in_(RUNNING))
                .values(
                    status="canceled",
                    stage=None,
                    fence=jobs.c.fence + 1,
                    holder=None,
                    lease_until=0.0,
                    completed_at=self._now(db),
                    error_code=None,
                    error_message=None,
                )
                .returning(*_JOB_COLUMNS)
            ).first()
            if changed is not None:
                self._announce(db, _job(changed))
                return _job(changed)
            row = db.execute(select(*_JOB_COLUMNS).where(mine)).first()
            return None if row is None else _job(row)

    def hide(self, job_id: str, owner: str) -> bool:
        """Hides a job that has ended from its owner. Returns whether it was there, and had ended."""
        with self._transaction() as db:
            mine = sa.and_(jobs.c.id == job_id, _visible_to(owner), jobs.c.status.not_in(RUNNING))
            return bool(db.execute(update(jobs).where(mine).values(hidden=1)).rowcount)

    # For those who work

    def claim(self, holder: str, lease_s: float, most_failures: int) -> Claim | None:
        """Takes the job whose turn it is: one that waits, or one whose holder let its lease run out.

        A lease that ran out counts as a failure; with `most_failures` in a row, a job is failed and the next one taken.
        """
        with self._transaction() as db:
            while True:
                now = self._now(db)
                free = sa.and_(jobs.c.status.in_(RUNNING), jobs.c.lease_until < now, jobs.c.not_before <= now)
                turn = select(jobs.c.id).where(free).order_by(jobs.c.virtual_time, jobs.c.number).limit(1)
                if self.backend == "postgresql":
                    turn = turn.with_for_update(skip_locked=True)
                lost = jobs.c.holder.is_not(None)
                row = db.execute(
                    update(jobs)
                    .where(jobs.c.id == turn.scalar_subquery(), free)
                    .values(
                        status="in_progress",
                        stage=func.coalesce(jobs.c.stage, "preparing"),
                        started_at=func.coalesce(jobs.c.started_at, now),
                        fence=jobs.c.fence + 1,
                        failures=jobs.c.failures + sa.case((lost, 1), else_=0),
                        virtual_time=jobs.c.virtual_time + CLAIM_COSTS,
                        holder=holder,
                        lease_until=now + lease_s,
                    )
                    .returning(*_JOB_COLUMNS)
                ).first()
                if row is None:
                    return None
                job = _job(row)
                _raise_counter(db, "virtual_time", job.virtual_time)
                if job.failures >= most_failures:
                    text = f"it was given up after {job.failures} attempts: the last one ended without an answer"
                    self._end(db, job.id, job.fence, "failed", code="worker_lost", message=text)
                    continue
                return Claim(job, job.fence)

    def extend(self, fences: Mapping[str, int], lease_s: float) -> set[str]:
        """Makes claims with these fences last `lease_s` from now; returns the jobs whose claims still hold.

        fences: of the jobs at which somebody works. Others run out, whoever holds them.
        """
        if not fences:
            return set()
        with self._transaction() as db:
            rows = db.execute(
                update(jobs)
                .where(sa.tuple_(jobs.c.id, jobs.c.fence).in_(list(fences.items())), _AT_WORK)
                .values(lease_until=self._now(db) + lease_s)
                .returning(jobs.c.id)
            )
            return set(rows.scalars())

    def still_held(self, fences: Mapping[str, int]) -> set[str]:
        """Those of these jobs whose claims with these fences still hold."""
        if not fences:
            return set()
        with self._transaction(writes=False) as db:
            rows = db.execute(select(jobs.c.id, jobs.c.fence).where(jobs.c.id.in_(fences), _AT_WORK))
            return {job_id for job_id, fence in rows if fences[job_id] == fence}

    def update(self, claim: Claim, **values: Any) -> bool:
        """Writes what is known of a job: stage, frames, windows, warnings. Returns whether the claim holds."""
        with self._transaction() as db:
            return bool(db.execute(update(jobs).where(_held(claim.id, claim.fence)).values(**values)).rowcount)

    def add_windows(self, claim: Claim, windows: int, previews: int = 0) -> bool:
        """Counts windows that were generated. Returns whether the claim holds."""
        with self._transaction() as db:
            row = db.execute(
                update(jobs)
                .where(_held(claim.id, claim.fence))
                .values(
                    windows_done=jobs.c.windows_done + windows,
                    previews=jobs.c.previews + previews,
                    virtual_time=jobs.c.virtual_time + windows,
                    failures=0,
                )
                .returning(jobs.c.virtual_time)
            ).first()
            if row is not None:
                _raise_counter(db, "virtual_time", float(row.virtual_time))
            return row is not None

    def gives_way(self, claim: Claim, since_claim: int) -> bool:
        """Whether a job that has got so many windows since it was claimed must let others go on."""
        with self._transaction(writes=False) as db:
            own = db.scalar(select(jobs.c.virtual_time).where(_held(claim.id, claim.fence)))
            waits = sa.and_(jobs.c.status.in_(RUNNING), jobs.c.lease_until == 0.0, jobs.c.not_before <= self._now(db))
            next_turn = db.scalar(select(func.min(jobs.c.virtual_time)).where(waits))
            return own is None or gives_way(own, next_turn, since_claim)

    def release(self, claim: Claim, wait_s: float = 0.0) -> bool:
        """Gives a job back that is not finished. Returns whether the claim held."""
        with self._transaction() as db:
            not_before = self._now(db) + wait_s
            values = {"holder": None, "lease_until": 0.0, "not_before": not_before}
            return bool(db.execute(update(jobs).where(_held(claim.id, claim.fence)).values(values)).rowcount)

    def attempt_failed(self, claim: Claim, code: str, message: str, most_failures: int) -> bool:
        """Counts a failed attempt: the job waits for another, or fails for good. Returns whether the claim held."""
        with self._transaction() as db:
            row = db.execute(
                update(jobs)
                .where(_held(claim.id, claim.fence))
                .values(failures=jobs.c.failures + 1)
                .returning(jobs.c.failures)
            ).first()
            if row is None:
                return False
            if row.failures >= most_failures:
                text = f"it was given up after {row.failures} attempts; the last one: {message}"
                return self._end(db, claim.id, claim.fence, "failed", code=code, message=text)
            not_before = self._now(db) + retry_after_s(row.failures)
            values: dict[str, Any] = {"holder": None, "lease_until": 0.0, "not_before": not_before}
            values |= {"error_code": code, "error_message": message}
            return bool(db.execute(update(jobs).where(_held(claim.id, claim.fence)).values(values)).rowcount)

    def refuse(self, claim: Claim, code: str, message: str) -> bool:
        """Fails a job for good, because another attempt would end the same. Returns whether the claim held."""
        with self._transaction() as db:
            return self._end(db, claim.id, claim.fence, "failed", code=code, message=message)

    def complete(self, claim: Claim, result: Mapping[str, Any]) -> bool:
        """Completes a job. Returns whether the claim held; otherwise nobody will see the result."""
        with self._transaction() as db:
            return self._end(db, claim.id, claim.fence, "completed", result=dict(result))

    def _end(
        self,
        db: Connection,
        job_id: str,
        fence: int,
        status: Status,
        code: str | None = None,
        message: str | None = None,
        result: Mapping[str, Any] | None = None,
    ) -> bool:
        row = db.execute(
            update(jobs)
            .where(_held(job_id, fence))
            .values(
                status=status,
                stage=None,
                completed_at=self._now(db),
                holder=None,
                lease_until=0.0,
                error_code=code,
                error_message=message,
                result=result,
            )
            .returning(*_JOB_COLUMNS)
        ).first()
        if row is not None:
            self._announce(db, _job(row))
        return row is not None

    # Removal

    def expire(self) -> int:
        """Marks jobs that have ended, and whose time is over. Returns how many."""
        with self._transaction() as db:
            over = sa.and_(jobs.c.status.not_in((*RUNNING, "expired")), jobs.c.expires_at < self._now(db))
            return db.execute(update(jobs).where(over).values(status="expired", result=None)).rowcount

    def removable(self, limit: int = 100) -> list[Job]:
        """Jobs whose files are still there and that nobody needs: expired, failed, cancelled or hidden ones."""
        unneeded = sa.or_(jobs.c.status.in_(("expired", "failed", "canceled")), jobs.c.hidden == 1)
        with self._transaction(writes=False) as db:
            query = select(*_JOB_COLUMNS).where(unneeded, jobs.c.removed_at.is_(None))
            return [_job(row) for row in db.execute(query.limit(limit))]

    def removed(self, job_id: str) -> None:
        """Notes that a job's files are gone."""
        with self._transaction() as db:
            db.execute(update(jobs).where(jobs.c.id == job_id).values(removed_at=self._now(db)))

    # Files

    def add_file(self, new: StoredFile, expires_in_s: float, most_bytes_of_owner: int) -> StoredFile:
        """Adds a file whose content is stored already. Raises Full if the owner would have more bytes than allowed."""
        with self._transaction() as db:
            _lock(db, "files")
            own = db.scalar(select(func.sum(files.c.bytes)).where(files.c.owner == new.owner)) or 0
            if own + new.bytes > most_bytes_of_owner:
                raise Full(f"your files hold {own:,} bytes, and {most_bytes_of_owner:,} are allowed: delete some", 60.0)
            now = self._now(db)
            row = {name: getattr(new, name) for name in ("id", "owner", "name", "purpose", "bytes", "sha256")}
            row |= {"number": _next(db, "files"), "created_at": now, "expires_at": now + expires_in_s}
            db.execute(files.insert().values(row))
            return StoredFile(**row)

    def file(self, file_id: str, owner: str) -> StoredFile | None:
        with self._transaction(writes=False) as db:
            row = db.execute(select(*_FILE_COLUMNS).where(files.c.id == file_id, files.c.owner == owner)).first()
            return None if row is None else StoredFile(**row._mapping)

    def files_of(self, owner: str, limit: int, after: str | None = None) -> list[StoredFile]:
        """The files of an owner, newest first. after: the id of the last one of the page before."""
        query = select(*_FILE_COLUMNS).where(files.c.owner == owner)
        if after is not None:
            query = query.where(files.c.number < select(files.c.number).where(files.c.id == after).scalar_subquery())
        with self._transaction(writes=False) as db:
            rows = db.execute(query.order_by(files.c.number.desc()).limit(limit))
            return [StoredFile(**row._mapping) for row in rows]

    def drop_file(self, file_id: str, owner: str) -> bool:
        with self._transaction() as db:
            mine = sa.and_(files.c.id == file_id, files.c.owner == owner)
            return bool(db.execute(files.delete().where(mine)).rowcount)

    def drop_expired_files(self) -> list[str]:
        """Forgets files whose time is over; returns their ids, so that their contents can be removed."""
        with self._transaction() as db:
            over = files.c.expires_at < self._now(db)
            return list(db.scalars(files.delete().where(over).returning(files.c.id)))

    # Batches

    def add_batch(self, batch_id: str, owner: str, rows: Sequence[Mapping[str, Any]]) -> float:
        """Adds a batch, whose jobs name it. Returns when it was created."""
        with self._transaction() as db:
            now = self._now(db)
            row = {"id": batch_id, "number": _next(db, "batches"), "owner": owner, "created_at": now}
            db.execute(batches.insert().values(row | {"rows": [dict(one) for one in rows]}))
            return now

    def set_batch_rows(self, batch_id: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Replaces what is known of a batch's rows."""
        with self._transaction() as db:
            db.execute(update(batches).where(batches.c.id == batch_id).values(rows=[dict(one) for one in rows]))

    def batch(self, batch_id: str, owner: str) -> dict[str, Any] | None:
        with self._transaction(writes=False) as db:
            row = db.execute(select(batches).where(batches.c.id == batch_id, batches.c.owner == owner)).first()
            return None if row is None else dict(row._mapping)

    def batches_of(self, owner: str, limit: int, after: str | None = None) -> list[dict[str, Any]]:
        """The batches of an owner, newest first. after: the id of the last one of the page before."""
        query = select(batches).where(batches.c.owner == owner).order_by(batches.c.number.desc()).limit(limit)
        if after is not None:
            last = select(batches.c.number).where(batches.c.id == after).scalar_subquery()
            query = query.where(batches.c.number < last)
        with self._transaction(writes=False) as db:
            return [dict(row._mapping) for row in db.execute(query)]

    # Webhooks

    def _announce(self, db: Connection, job: Job) -> None:
        """Queues the webhook that tells how a job ended, in the transaction that ends it."""
        if job.webhook is not None:
            now = self._now(db)
            row: dict[str, Any] = {"id": new_id("evt"), "job_id": job.id, "url": job.webhook}
            row |= {"kind": f"video.{job.status}"}
            row |= {"created_at": now, "attempts": 0, "next_at": now, "given_up": 0}
            db.execute(deliveries.insert().values(row))

    def due_deliveries(self, wait_s: float, limit: int = 16) -> list[Delivery]:
        """Takes webhooks that are due; others get them only after `wait_s`, if their result is not written by then."""
        with self._transaction() as db:
            now = self._now(db)
            due = sa.and_(deliveries.c.delivered_at.is_(None), deliveries.c.given_up == 0, deliveries.c.next_at <= now)
            turn = select(deliveries.c.id).where(due).order_by(deliveries.c.next_at).limit(limit)
            if self.backend == "postgresql":
                turn = turn.with_for_update(skip_locked=True)
            names = [deliveries.c[name] for name in Delivery.__dataclass_fields__]
            ids = list(db.scalars(turn))
            rows = db.execute(
                update(deliveries)
                .where(deliveries.c.id.in_(ids))
                .values(attempts=deliveries.c.attempts + 1, next_at=now + wait_s)
                .returning(*names)
            )
            return [Delivery(**_values(row, names)) for row in rows]

    def delivered(self, delivery_id: str) -> None:
        with self._transaction() as db:
            own = deliveries.c.id == delivery_id
            db.execute(update(deliveries).where(own).values(delivered_at=self._now(db), last_error=None))

    def delivery_failed(self, delivery_id: str, error: str, wait_s: float | None) -> None:
        """wait_s: until the next attempt; None: it is given up."""
        with self._transaction() as db:
            values: dict[str, Any] = {"last_error": error[:500], "given_up": int(wait_s is None)}
            if wait_s is not None:
                values["next_at"] = self._now(db) + wait_s
            db.execute(update(deliveries).where(deliveries.c.id == delivery_id).values(values))

    def now(self) -> float:
        with self._transaction(writes=False) as db:
            return self._now(db)

    def _now(self, db: Connection) -> float:
        """Seconds since 1970, by the database's clock."""
        if self.backend == "postgresql":
            return float(db.execute(select(func.extract("epoch", func.clock_timestamp()))).scalar_one())
        return float(db.execute(select((func.julianday("now") - 2440587.5) * 86400.0)).scalar_one())


def new_id(kind: str) -> str:
    """An id that cannot be guessed."""
    return f"{kind}_{secrets.token_hex(12)}"


def _held(job_id: str, fence: int) -> ColumnElement[bool]:
    """Whether the claim with this fence holds: neither lost nor given back."""
    return sa.and_(jobs.c.id == job_id, jobs.c.fence == fence, _AT_WORK)


def _visible_to(owner: str) -> ColumnElement[bool]:
    return sa.and_(jobs.c.owner == owner, jobs.c.hidden == 0)


def _check_room(
    db: Connection, owner: str, input_bytes: int, most_waiting: int, most_of_owner: int, most_bytes: int | None
) -> None:
    running = jobs.c.status.in_(RUNNING)
    total = db.scalar(select(func.count()).where(running)) or 0
    own = db.scalar(select(func.count()).where(running, jobs.c.owner == owner)) or 0
    if own >= most_of_owner:
        raise Full(f"{own} of your jobs wait or run, and {most_of_owner} may: wait for one to end", 10.0)
    if total >= most_waiting:
        raise Full(f"{total} jobs wait or run, and {most_waiting} may: try again later", 30.0)
    if most_bytes is not None:
        kept = sa.and_(jobs.c.owner == owner, jobs.c.removed_at.is_(None))
        held = int(db.scalar(select(func.sum(jobs.c.input_bytes)).where(kept)) or 0)
        if held + input_bytes > most_bytes:
            raise Full(
                f"the inputs of your videos hold {held:,} bytes, this one has {input_bytes:,}, and {most_bytes:,} are "
                "allowed: delete videos that have ended",
                60.0,
            )


def _job(row: sa.Row[Any]) -> Job:
    return Job(**_values(row, _JOB_COLUMNS))


def _values(row: sa.Row[Any], columns: Iterable[sa.Column[Any]]) -> dict[str, Any]:
    values = dict(row._mapping)
    for column in columns:  # SQLite's RETURNING gives whole numbers of a FLOAT column as integers
        if isinstance(column.type, sa.Float) and values[column.name] is not None:
            values[column.name] = float(values[column.name])
    return values


def _by_key(db: Connection, owner: str, key: str) -> Job | None:
    row = db.execute(select(*_JOB_COLUMNS).where(jobs.c.owner == owner, jobs.c.idempotency_key == key)).first()
    return None if row is None else _job(row)


def _counter(db: Connection, name: str) -> float:
    return float(db.scalar(select(counters.c.value).where(counters.c.name == name)) or 0.0)


def _raise_counter(db: Connection, name: str, value: float) -> None:
    own = sa.and_(counters.c.name == name, counters.c.value < value)
    db.execute(update(counters).where(own).values(value=value))


def _lock(db: Connection, name: str) -> None:
    """Others that call it wait until this transaction ends. On SQLite all transactions that write do so anyway."""
    db.execute(select(counters.c.value).where(counters.c.name == name).with_for_update())


def _next(db: Connection, name: str) -> int:
    """The next number of a table."""
    row = db.execute(
        update(counters).where(counters.c.name == name).values(value=counters.c.value + 1).returning(counters.c.value)
    ).one()
    return int(row.value)


def _prepare_sqlite(connection: Any, _: object) -> None:
    """Readers do not wait for a writer. What is written survives a crash of the process, and a power cut."""
    connection.isolation_level = None  # so that `_begin_sqlite` begins transactions, not the driver
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")


def _begin_sqlite(connection: Connection) -> None:
    # Otherwise a transaction that reads and then writes fails if another one has written in between.
    writes = connection.get_execution_options().get("tccp_writes", True)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


@contextmanager
def _storage_errors(engine: Engine) -> Iterator[None]:
    """Raises StorageError for a database that fails or cannot be reached."""
    try:
        yield
    except (sa.exc.DBAPIError, sa.exc.TimeoutError) as error:
        if isinstance(error, sa.exc.IntegrityError | sa.exc.DataError):  # not the database's fault
            raise
        reason = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
        place = engine.url.difference_update_query(["password"]).render_as_string(hide_password=True)
        raise StorageError(f"the job store {place} failed ({reason}): check the database", reason) from None


def ended(statuses: Iterable[str]) -> bool:
    """Whether jobs of these statuses have all ended."""
    return not any(status in RUNNING for status in statuses)
