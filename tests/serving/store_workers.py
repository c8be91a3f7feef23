"""What other processes do with a job store in tests. Imports little, because each process imports it."""

from __future__ import annotations

from tccp.serving.store import JobStore, NewJob


def new_job(number: int, owner: str = "one", key: str | None = None, webhook: str | None = None) -> NewJob:
    return NewJob(
        id=f"video_{owner}_{number}",
        owner=owner,
        spec={"consent": "nobody is shown", "seed": number},
        inputs={"scene": {"bytes": 5}},
        model="default",
        weights="0" * 16,
        request_hash=f"hash of {number}",
        expires_in_s=3600.0,
        idempotency_key=key,
        webhook=webhook,
    )


def work_off(url: str, holder: str) -> list[tuple[str, int]]:
    """Claims and completes jobs until there is none; ids and fences of the claims. Every seventh one is given back."""
    store = JobStore(url)
    made = []
    while (claim := store.claim(holder, 60.0, 5)) is not None:
        if len(made) % 7 == 3 and claim.fence == 1:
            assert store.release(claim)
        else:
            assert store.add_windows(claim, 1)
            assert store.complete(claim, {"by": holder})
        made.append((claim.id, claim.fence))
    store.close()
    return made


def opened(url: str, number: int) -> str:
    """Opens a store that may have no tables yet, and adds a job."""
    store = JobStore(url)
    job, _ = store.add(new_job(number), most_waiting=100, most_of_owner=100)
    store.close()
    return job.id
