"""Errors by who can act on them: the user, whoever runs the storage, or nobody, because one item of data is damaged."""

from __future__ import annotations


class TccpError(ValueError):
    """A mistake that the user can correct. It ends the command with exit code 2.

    The message is one line: what was given, what is allowed, what to do.
    """

    exit_code = 2


class DamagedData(TccpError):
    """One item of data cannot be used: a film that does not decode, a file that was cut short.

    Code that works through many items catches it and sets the item aside with a reason. Uncaught, it ends the command
    like any TccpError.
    """


class StorageError(Exception):
    """Storage or network failed, and so did every retry of `tccp.files.retry`. It ends the command with exit code 3.

    It is not a TccpError, because another attempt may succeed with nothing changed: the launcher starts training
    workers again after it. The message is one line; `reason` is the part of it that the filesystem gave.
    """

    exit_code = 3

    def __init__(self, message: str, reason: str | None = None):
        super().__init__(message)
        self.reason = reason or message
