"""What went wrong on another machine, without what Ray wraps it in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tccp.config import TccpError


def _mistake(error: BaseException | None) -> TccpError | None:
    while error is not None:
        cause = getattr(error, "cause", None)  # of Ray's own, which are of the cause's type, too, and say its traceback
        if isinstance(error, TccpError) and cause is None:
            return error
        error = cause if isinstance(cause, BaseException) else error.__cause__
    return None


@contextmanager
def unwrapped() -> Iterator[None]:
    """A user's mistake that was found in a Ray task, or actor, is raised as itself: one line, known for what it is."""
    try:
        yield
    except Exception as error:
        mistake = _mistake(error)
        if mistake is None:
            raise
        mistake.args = tuple(str(mistake).splitlines()[:1])  # Ray Data appends lines about its own settings
        raise mistake from None
