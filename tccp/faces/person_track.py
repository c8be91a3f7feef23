"""Links faces to persons over time, and makes head boxes from face boxes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32

from tccp.errors import TccpError
from tccp.faces.face import Face, iou
from tccp.headbox import steady_boxes, steady_size

_MIN_IOU = 0.2


def link(frames: Sequence[Sequence[Face]]) -> list[dict[int, Face]]:
    """The persons in the frames of one shot, in order of appearance. Each person is a dict of frame number to face.

    A face is linked to the person whose last box it overlaps most. After a gap of any length, a face of similar size
    whose centre lies within about its own size of the last position is the same person.
    """
    people: list[dict[int, Face]] = []
    for number, faces in enumerate(frames):
        free = set(range(len(people)))
        pairs = [
            (_similarity(people[p][last], face, number - last), p, f)
            for p in free
            for last in [next(reversed(people[p]))]
            for f, face in enumerate(faces)
        ]
        linked: set[int] = set()
        for similarity, p, f in sorted(pairs, key=lambda pair: -pair[0]):
            if similarity > 0 and p in free and f not in linked:
                people[p][number] = faces[f]
                free.remove(p)
                linked.add(f)
        people += [{number: face} for f, face in enumerate(faces) if f not in linked]
    return people


def track(frames: Sequence[Sequence[Face]], choose: tuple[float | int, float | int] | None = None) -> list[Face | None]:
    """One person's face in each frame of one shot, None in frames without it.

    choose: a point in pixels. Selects the person whose face covers it in most frames, else the nearest person. Without
    it, the function selects the person with the largest sum of face sides over all frames.
    """
    people = link(frames)
    if not people:
        return [None] * len(frames)
    person = max(people, key=lambda faces: sum(face.side for face in faces.values()))
    if choose is not None:
        point = np.array(choose)
        person = max(people, key=lambda faces: _covers(faces, point))
    return [person.get(number) for number in range(len(frames))]


def _covers(faces: dict[int, Face], point: np.ndarray) -> tuple[int, float]:
    """The number of frames in which the face covers the point, and minus its least distance, as a tie-break."""
    hits = sum(bool((face.box[:2] <= point).all() and (point <= face.box[2:]).all()) for face in faces.values())
    return hits, -min(float(np.linalg.norm(face.center - point)) for face in faces.values())


def _similarity(last: Face, face: Face, gap: int) -> float:
    """How likely two faces belong to one person: their overlap, or less after a gap if they are near; 0 if not."""
    overlap = iou(last, face)
    if overlap >= _MIN_IOU:
        return overlap
    near = float(np.linalg.norm(last.center - face.center)) < max(last.side, face.side)
    same_size = 1 / 1.6 < face.side / max(last.side, 1e-6) < 1.6
    return _MIN_IOU / 2 if gap > 1 and near and same_size else 0.0


LBP_SIDE, LBP_DROP = 2.0, 0.02
"""Head box relative to a box of the cascade: ratio of sides; downward offset of the centre in sides (test_faces)."""
_BOX_SIZE_CHANGE = 0.25
"""Least change of size that counts (`steady_size`). The cascade's boxes grow in steps of 20 %."""


def head_boxes_from_faces(person: Sequence[Face | None]) -> Float32[np.ndarray, "f 4"]:
    """Head boxes of one shot from face boxes, for a backend without landmarks. Less exact than `head_boxes`.

    Raises TccpError if there is no face in any frame.
    """
    sides = np.array([np.nan if face is None else face.side for face in person])
    if not np.isfinite(sides).any():
        raise TccpError(f"no face in any of the {len(person)} frames of the shot: head boxes need at least one")
    side = steady_size(sides, _BOX_SIZE_CHANGE)
    centers = np.full((len(person), 2), np.nan)
    for number, face in enumerate(person):
        if face is not None:
            centers[number] = face.center + np.array([0, LBP_DROP * side[number]])
    return steady_boxes(centers, LBP_SIDE * side)
