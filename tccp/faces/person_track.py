"""One person over time, and head boxes from faces alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32

from tccp.errors import TccpError
from tccp.faces.face import Face, iou
from tccp.headbox import steady_boxes

_MIN_IOU = 0.2


def link(frames: Sequence[Sequence[Face]]) -> list[dict[int, Face]]:
    """The persons in the frames of one shot, in order of appearance: each one's face by number of the frame.

    A face is linked to the person whose last box it overlaps most; after a gap, however long, one that comes back
    within about its own size of where it left is the same person.
    """
    people: list[dict[int, Face]] = []
    for number, faces in enumerate(frames):
        free = set(range(len(people)))
        pairs = [
            (_likeness(people[p][last], face, number - last), p, f)
            for p in free
            for last in [next(reversed(people[p]))]
            for f, face in enumerate(faces)
        ]
        taken: set[int] = set()
        for likeness, p, f in sorted(pairs, key=lambda pair: -pair[0]):
            if likeness > 0 and p in free and f not in taken:
                people[p][number] = faces[f]
                free.remove(p)
                taken.add(f)
        people += [{number: face} for f, face in enumerate(faces) if f not in taken]
    return people


def track(frames: Sequence[Sequence[Face]], choose: tuple[float | int, float | int] | None = None) -> list[Face | None]:
    """One person's face through the frames of one shot, None where he is not seen.

    choose: a point in pixels; the person whose face covers it most often, else the one nearest to it. Without it, the
    person who is there most, larger faces counting more.
    """
    people = link(frames)
    if not people:
        return [None] * len(frames)
    person = max(people, key=lambda seen: sum(face.side for face in seen.values()))
    if choose is not None:
        point = np.array(choose)
        person = max(people, key=lambda seen: _covers(seen, point))
    return [person.get(number) for number in range(len(frames))]


def _covers(seen: dict[int, Face], point: np.ndarray) -> tuple[int, float]:
    """In how many frames a face covers the point; and its nearness, for when none does."""
    hits = sum(bool((face.box[:2] <= point).all() and (point <= face.box[2:]).all()) for face in seen.values())
    return hits, -min(float(np.linalg.norm(face.center - point)) for face in seen.values())


def _likeness(last: Face, face: Face, gap: int) -> float:
    """How likely two faces are one person's: 0 for no; overlap as a rule; after a gap nearness, at a lower rank."""
    overlap = iou(last, face)
    if overlap >= _MIN_IOU:
        return overlap
    near = float(np.linalg.norm(last.center - face.center)) < max(last.side, face.side)
    alike = 1 / 1.6 < face.side / max(last.side, 1e-6) < 1.6
    return _MIN_IOU / 2 if gap > 1 and near and alike else 0.0


LBP_SIDE, LBP_DROP = 2.0, 0.02
"""Head box from a box of the cascade, in its sides: how much larger, and how much lower its centre (see test_faces)."""


def head_boxes_from_faces(person: Sequence[Face | None]) -> Float32[np.ndarray, "f 4"]:
    """Head boxes of one shot from face boxes alone, for a backend without landmarks; coarser than `head_boxes`.

    Raises TccpError if there is no face in any frame.
    """
    sides = [face.side for face in person if face is not None]
    if not sides:
        raise TccpError(f"no face in any of the {len(person)} frames of the shot: head boxes need at least one")
    side = float(np.median(sides))
    centers = np.full((len(person), 2), np.nan)
    for number, face in enumerate(person):
        if face is not None:
            centers[number] = face.center + np.array([0, LBP_DROP * side])
    return steady_boxes(centers, LBP_SIDE * side)
