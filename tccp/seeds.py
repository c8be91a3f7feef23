"""Seeds made of named parts, the source of every random number in the project."""

from __future__ import annotations

import hashlib
import struct

import numpy as np


def rng_seed(*parts: int | str | float | bytes | np.integer | np.floating) -> int:
    """A 63-bit seed from named parts, e.g. `rng_seed(seed, "noise", clip_id, start_frame, epoch)`.

    The result is equal in all processes, machines and versions of Python (BLAKE2b). Type and length of each part enter
    the hash, so that different parts with equal concatenation give different seeds. Raises TypeError for a bool.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        if isinstance(part, (bool, np.bool_)):
            raise TypeError("a bool cannot be part of a seed: use a name or a number")
        if isinstance(part, (int, np.integer)):
            tag, data = b"i", str(int(part)).encode()
        elif isinstance(part, (float, np.floating)):
            tag, data = b"f", struct.pack("<d", part)
        elif isinstance(part, str):
            tag, data = b"s", part.encode()
        else:
            tag, data = b"b", part
        digest.update(tag + struct.pack("<q", len(data)) + data)
    return int.from_bytes(digest.digest(), "little") >> 1
