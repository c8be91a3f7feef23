"""The job store: SQLite, or PostgreSQL where several machines share it."""

from tccp.serving.store.job_store import (
    Claim,
    Full,
    Job,
    JobStore,
    KeyReused,
    NewJob,
    StoredFile,
)

__all__ = ["Claim", "Full", "Job", "JobStore", "KeyReused", "NewJob", "StoredFile"]
