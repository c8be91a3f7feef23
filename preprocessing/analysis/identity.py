"""Which frames show a clip's person from elsewhere: never from the clip itself, or the picture would give it away."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32

from preprocessing.reels import Track

PICTURES = 4
"""Identity pictures per clip, at most."""
_POOL = 16  # places of a person that the clips choose from: enough for variety, few to decode


class Place(NamedTuple):
    """Where a person is to be seen: a frame of the source, and the head's box in it."""

    frame: int
    box: tuple[float, float, float, float]


def places_seen(track: Track, head_box: Float32[np.ndarray, "f 4"], fit: Bool[np.ndarray, " f"]) -> list[Place]:
    """Where a track's face was seen, not bridged, and is `fit` to be shown."""
    usable = np.flatnonzero(fit & (track.confidence > 0))
    return [_place(track.start_frame + int(i), head_box[i]) for i in usable]


def _place(frame: int, box: Float32[np.ndarray, "4"]) -> Place:
    x0, y0, x1, y1 = map(float, box)
    return Place(frame, (x0, y0, x1, y1))


def choose_places(seen: Sequence[Place], start_frame: int, stop_frame: int) -> list[Place]:
    """Up to PICTURES of a person's places, spread over them, outside [start_frame, stop_frame); empty if none is."""

    def outside(places: Sequence[Place]) -> list[Place]:
        return [place for place in places if not start_frame <= place.frame < stop_frame]

    return _spread(outside(_spread(seen, _POOL)) or outside(seen), PICTURES)


def _spread(items: Sequence[Place], count: int) -> list[Place]:
    """`count` of the items at even distances, each from the middle of its share."""
    if len(items) <= count:
        return list(items)
    return [items[(2 * i + 1) * len(items) // (2 * count)] for i in range(count)]
