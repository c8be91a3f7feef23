"""Which frames show a clip's person from elsewhere: never from the clip itself, or the picture would give it away."""

from __future__ import annotations

from collections.abc import Sequence

from preprocessing.spans import Span

PICTURES = 4
"""Identity pictures per clip, at most."""
_POOL = 16  # places of a track that its clips choose from: enough for variety, few to decode


Place = tuple[int, int]
"""Number of a run within its track, and a frame of the source in that run."""


def places_seen(runs: Sequence[Span]) -> list[Place]:
    """Where a track's face was seen, not bridged."""
    return [
        (index, run.start_frame + offset)
        for index, run in enumerate(runs)
        if run.confidence is not None
        for offset, confidence in enumerate(run.confidence)
        if confidence > 0
    ]


def choose_places(seen: list[Place], start_frame: int, stop_frame: int) -> list[Place]:
    """Up to PICTURES of the places of a track, spread over it, outside [start_frame, stop_frame); empty if none is."""

    def outside(places: list[Place]) -> list[Place]:
        return [place for place in places if not start_frame <= place[1] < stop_frame]

    return _spread(outside(_spread(seen, _POOL)) or outside(seen), PICTURES)


def _spread(items: list[Place], count: int) -> list[Place]:
    """`count` of the items at even distances, each from the middle of its share."""
    if len(items) <= count:
        return items
    return [items[(2 * i + 1) * len(items) // (2 * count)] for i in range(count)]
