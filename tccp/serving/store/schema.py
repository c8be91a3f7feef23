"""The tables of the job store. A change of them needs a new step in `migrations/versions`."""

from __future__ import annotations

from sqlalchemy import JSON, BigInteger, Column, Float, Index, Integer, MetaData, String, Table, Text

metadata = MetaData()

jobs = Table(
    "jobs",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("number", Integer, nullable=False, unique=True),  # in the order of arrival
    Column("owner", String(64), nullable=False),
    Column("idempotency_key", String(255)),
    Column("request_hash", String(64), nullable=False),  # of what the client sent, to notice a key that is used twice
    Column("batch_id", String(40)),
    Column("batch_row", Integer),
    Column("remix_of", String(40)),
    Column("model", String(64), nullable=False),  # as the client named it
    Column("weights", String(64), nullable=False),  # the version that it meant when the job arrived
    Column("spec", JSON, nullable=False),
    Column("inputs", JSON, nullable=False),
    Column("status", String(16), nullable=False),
    Column("stage", String(16)),
    Column("created_at", Float, nullable=False),
    Column("started_at", Float),
    Column("completed_at", Float),
    Column("expires_at", Float, nullable=False),
    Column("removed_at", Float),  # when its files were removed
    Column("hidden", Integer, nullable=False),  # 1: its owner has deleted it
    Column("input_bytes", BigInteger, nullable=False),
    Column("frames", Integer, nullable=False),
    Column("windows", Integer, nullable=False),
    Column("windows_done", Integer, nullable=False),
    Column("previews", Integer, nullable=False),
    Column("warnings", JSON, nullable=False),
    Column("virtual_time", Float, nullable=False),  # see tccp.serving.scheduling
    Column("fence", Integer, nullable=False),  # rises with every claim: writes with an older one are refused
    Column("failures", Integer, nullable=False),  # in a row, without a window in between
    Column("holder", String(80)),
    Column("lease_until", Float, nullable=False),
    Column("not_before", Float, nullable=False),
    Column("error_code", String(40)),
    Column("error_message", Text),
    Column("result", JSON),
    Column("webhook", Text),
    Index("jobs_by_key", "owner", "idempotency_key", unique=True),
    Index("jobs_by_turn", "status", "virtual_time", "number"),
    Index("jobs_by_owner", "owner", "number"),
    Index("jobs_by_batch", "batch_id", "batch_row"),
)

files = Table(
    "files",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("number", Integer, nullable=False, unique=True),
    Column("owner", String(64), nullable=False),
    Column("name", String(255), nullable=False),
    Column("purpose", String(64), nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float, nullable=False),
    Index("files_by_owner", "owner", "number"),
)

batches = Table(
    "batches",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("number", Integer, nullable=False, unique=True),
    Column("owner", String(64), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("rows", JSON, nullable=False),  # per row: its own id, and why it was refused if it was
    Index("batches_by_owner", "owner", "number"),
)

deliveries = Table(
    "deliveries",
    metadata,
    Column("id", String(40), primary_key=True),  # the event's id, the same in every attempt
    Column("job_id", String(40), nullable=False),
    Column("url", Text, nullable=False),
    Column("kind", String(40), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("next_at", Float, nullable=False),
    Column("delivered_at", Float),
    Column("given_up", Integer, nullable=False),
    Column("last_error", Text),
    Index("deliveries_due", "delivered_at", "given_up", "next_at"),
)

counters = Table("counters", metadata, Column("name", String(40), primary_key=True), Column("value", Float))
"""`virtual_time`: of the scheduler. `jobs`, `files`, `batches`: the number given last."""
