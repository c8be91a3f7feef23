"""Errors, by who can act on them."""

from __future__ import annotations


class TccpError(ValueError):
    """A user's mistake. The message is one line: what was given, what is allowed, what to do."""
