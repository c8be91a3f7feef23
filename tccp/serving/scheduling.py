"""Which job works next: start-time fair queueing over windows (Goyal, Vin and Cheng 1996).

Every job has a virtual time: where it started, plus the windows that it has got since. The job with the least one goes
first, and after `QUANTUM` windows it lets others go on. A new job starts at the greatest virtual time that a job has
reached at work, so it neither overtakes for long nor waits for all windows of those before it. Every further job that
an owner has waiting starts one quantum later: who sends a hundred jobs does not keep others from their first.
"""

from __future__ import annotations

QUANTUM = 16
"""Windows after which a job lets others go on that have had fewer: 4.5 s of film."""

CLAIM_COSTS = 1.0
"""Windows that a claim counts for: jobs that end before their first window get their share and no more, too."""


def first_turn(now: float, waiting: int) -> float:
    """The virtual time of a new job. now: the greatest one at work so far. waiting: waiting jobs of its owner."""
    return now + waiting * QUANTUM


def gives_way(virtual_time: float, next_turn: float | None, since_claim: int) -> bool:
    """Whether a job that has got `since_claim` windows lets others go on. next_turn: the least of those that wait."""
    return next_turn is not None and since_claim >= QUANTUM and next_turn < virtual_time


def retry_after_s(failures: int) -> float:
    """How long a job waits after so many failed attempts in a row."""
    return float(min(2 ** (failures - 1), 60))
