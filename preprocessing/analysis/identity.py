"""Chooses the frames for a clip's identity pictures: outside the clip, so that they do not show what is generated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32

from preprocessing.reels import Track

PICTURES = 4
"""Identity pictures per clip, at most."""
_POOL = 16  # sightings of a person that the clips choose from: enough for variety, few to decode


class Sighting(NamedTuple):
    """A frame of the source that shows a person, and the head box x0 y0 x1 y1 in it, in source pixels."""

    frame: int
    box: tuple[float, float, float, float]


def sightings_of(track: Track, head_box: Float32[np.ndarray, "f 4"], usable: Bool[np.ndarray, " f"]) -> list[Sighting]:
    """The frames of a track in which the face was detected, not bridged, and which are `usable` as pictures."""
    return [_sighting(track.start_frame + int(i), head_box[i]) for i in np.flatnonzero(usable & (track.confidence > 0))]


def _sighting(frame: int, box: Float32[np.ndarray, "4"]) -> Sighting:
    x0, y0, x1, y1 = map(float, box)
    return Sighting(frame, (x0, y0, x1, y1))


def choose_sightings(sightings: Sequence[Sighting], start_frame: int, stop_frame: int) -> list[Sighting]:
    """Up to PICTURES sightings outside the frames [start_frame, stop_frame), evenly spaced; empty if there is none."""

    def outside(items: Sequence[Sighting]) -> list[Sighting]:
        return [item for item in items if not start_frame <= item.frame < stop_frame]

    return _evenly_spaced(outside(_evenly_spaced(sightings, _POOL)) or outside(sightings), PICTURES)


def _evenly_spaced(items: Sequence[Sighting], count: int) -> list[Sighting]:
    """`count` of the items: the sequence is divided into `count` equal parts, and the middle item of each is taken."""
    if len(items) <= count:
        return list(items)
    return [items[(2 * i + 1) * len(items) // (2 * count)] for i in range(count)]
