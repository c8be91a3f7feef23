"""Which frames show a clip's person from elsewhere: never from the clip itself, or the picture would give it away."""

from __future__ import annotations

from collections.abc import Sequence

from preprocessing.spans import Span

PICTURES = 4
"""Identity pictures per clip, at most."""
_POOL = 16  # frames of a track that its clips choose from: enough for variety, few to decode


def choose_frames(runs: Sequence[Span], start_frame: int, stop_frame: int) -> list[tuple[int, int]]:
    """(run, frame) of up to PICTURES frames of one track, spread over its runs, outside [start_frame, stop_frame).

    Only frames where a face was seen, not bridged. Empty if the track has no other frame.
    """
    seen = [
        (index, run.start_frame + offset)
        for index, run in enumerate(runs)
        if run.confidence is not None
        for offset, confidence in enumerate(run.confidence)
        if confidence > 0
    ]

    def outside(frames: list[tuple[int, int]]) -> list[tuple[int, int]]:
        return [place for place in frames if not start_frame <= place[1] < stop_frame]

    return _spread(outside(_spread(seen, _POOL)) or outside(seen), PICTURES)


def _spread(items: list[tuple[int, int]], count: int) -> list[tuple[int, int]]:
    """`count` of the items at even distances, each from the middle of its share."""
    if len(items) <= count:
        return items
    return [items[(2 * i + 1) * len(items) // (2 * count)] for i in range(count)]
