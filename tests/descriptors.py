"""Descriptors that this process holds open, for tests that look for leaks."""

from __future__ import annotations

import gc
import os
from contextlib import suppress


def open_descriptors() -> set[tuple[int, str]]:
    """Number and target of every open descriptor.

    What earlier tests dropped is collected first: garbage that is collected in the middle of a test would close
    descriptors which that test has counted.
    """
    gc.collect()
    found = set()
    for number in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the descriptor of this very listing
            found.add((int(number), os.readlink(f"/proc/self/fd/{number}")))
    return found
