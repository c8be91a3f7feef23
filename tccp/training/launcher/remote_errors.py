"""What went wrong on another machine, without what Ray wraps it in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tccp.errors import TccpError


@contextmanager
def unwrapped() -> Iterator[None]:
    """A user's mistake that was found in a Ray task, or actor, is raised as itself: one line, known for what it is.

    Ray raises an error of the mistake's type whose text is a traceback, once for each task that it came through; Ray
    Data appends lines about its own settings.
    """
    try:
        yield
    except TccpError as error:
        mistake = error
        while isinstance(cause := getattr(mistake, "cause", None), TccpError):
            mistake = cause
        raise type(mistake)(str(mistake).partition("\n")[0]) from None
