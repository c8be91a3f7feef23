"""Paints a head from any side: neck, hair and ears around the face."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Float64

from tccp.roundtable.canvas import Canvas
from tccp.roundtable.face_painting import (
    HeadView,
    paint_brows,
    paint_features,
    paint_glasses,
    paint_profile,
    paint_skin,
)
from tccp.roundtable.head import PIVOT, turned
from tccp.roundtable.people import Colour, Person, shade

# Points of the face that are no landmarks: forehead up to the hairline, temples, cheekbones, cheeks.
_FACE = [(0.0, -0.98, 0.72), (0.0, -0.55, 0.93)] + [
    (side * x, y, z)
    for side in (-1, 1)
    for x, y, z in (
        (0.40, -0.96, 0.64), (0.72, -0.80, 0.38), (0.93, -0.45, 0.10), (0.45, -0.55, 0.86), (0.86, -0.25, 0.50),
        (0.92, 0.10, 0.38), (0.86, 0.48, 0.48), (0.74, 0.92, 0.52), (0.40, 0.55, 0.85), (0.45, 1.25, 0.74),
    )
]  # fmt: skip


class HeadModel:
    """All points of one person's head that are not landmarks, in one array, so that one product rotates them."""

    def __init__(self, person: Person) -> None:
        self.person = person
        wide = person.face_width
        groups = {
            "face": np.array(_FACE) * (wide, 1, 1),
            "ears": np.array([(side * wide, y, -0.18) for side in (-1, 1) for y in (-0.12, 0.18, 0.46)]),
            "pupils": np.array([(side * 0.43 * person.eye_distance * wide, -0.005, 0.80) for side in (-1, 1)]),
            "temples": np.array([(side * wide, -0.06, -0.12) for side in (-1, 1)]),
            "neck": np.array([(side * 0.52, 0.55, -0.30) for side in (-1, 1)]),
            "skull": _cap((0.97, 1.02, 1.08), 1.0),
            **_hair_points(person),
        }
        self.slices: dict[str, slice] = {}
        start = 0
        for name, points in groups.items():
            self.slices[name] = slice(start, start + len(points))
            start += len(points)
        self.points = np.concatenate(list(groups.values()))


def _cap(radii: tuple[float, float, float], lowest: float) -> Float64[np.ndarray, "n 3"]:
    """Points on the outside of the hair: an ellipsoid around the skull, down to the ears in front, the nape behind."""
    longitude, latitude = np.meshgrid(np.linspace(0, 2 * np.pi, 16, endpoint=False), np.linspace(-1.1, 1.45, 10))
    points = np.stack(
        [
            radii[0] * np.sin(longitude) * np.cos(latitude),
            -0.32 - radii[1] * np.sin(latitude),
            -0.22 + radii[2] * np.cos(longitude) * np.cos(latitude),
        ],
        axis=-1,
    ).reshape(-1, 3)
    limit = np.where(points[:, 2] > -0.2, 0.05, lowest)
    return points[(points[:, 1] < limit) & ((points[:, 2] < 0.55) | (points[:, 1] < -0.9))]


def _curtain(bottom: float, spread: float) -> Float64[np.ndarray, "n 3"]:
    """Hair that falls behind face and neck."""
    rows = [(-0.5, 1.08), (0.4, 1.12), ((0.4 + bottom) / 2, spread), (bottom, 0.88 * spread)]
    angles = np.linspace(-0.55 * np.pi, 0.55 * np.pi, 9)
    return np.array([(r * np.sin(a), y, -0.22 - 0.95 * r * np.cos(a)) for y, r in rows for a in angles])


def _strands(bottom: float) -> Float64[np.ndarray, "n 3"]:
    """Hair in front of the ears, left then right."""
    left = [
        (-0.90, -0.85, 0.15), (-1.10, -0.3, 0.10), (-1.14, 0.5, 0.06),
        (-1.08, bottom, 0.0), (-1.1, bottom, -0.7), (-1.1, -0.5, -0.8),
    ]  # fmt: skip
    return np.array(left + [(-x, y, z) for x, y, z in left])


def _fringe(heights: tuple[float, ...]) -> Float64[np.ndarray, "n 3"]:
    """Hair over the forehead: first its lower edge, at these heights from left to right, then its upper edge."""
    x = np.linspace(-0.98, 0.98, len(heights))
    y = np.array(heights)
    z = 0.10 + 0.87 * np.sqrt(np.clip(1 - (x / 1.02) ** 2 - (np.minimum(0, y + 0.45) / 0.85) ** 2, 0, 1))
    lower = np.stack([x, y, z], axis=-1)
    upper = np.stack([0.62 * x, np.full_like(x, -1.18), 0.45 * z], axis=-1)
    return np.concatenate([lower, upper])


def _hair_points(person: Person) -> dict[str, Float64[np.ndarray, "_ 3"]]:
    none = np.zeros((0, 3))
    full, flat = (1.09, 1.10, 1.20), (1.03, 1.02, 1.10)
    high = (-0.30, -0.86, -0.94, -0.96, -0.94, -0.86, -0.30)
    parted = (-0.30, -0.62, -0.66, -0.78, -0.98, -0.90, -0.30)
    bangs = (-0.20, -0.56, -0.60, -0.62, -0.60, -0.56, -0.20)
    cap, curtain, strands, fringe, bun = {
        "short": (_cap(full, 0.65), none, none, _fringe(high), none),
        "parted": (_cap(full, 0.70), none, none, _fringe(parted), none),
        "bob": (_cap(full, 0.80), _curtain(1.25, 1.22), _strands(1.2), _fringe(bangs), none),
        "long": (_cap(full, 0.80), _curtain(2.05, 1.25), _strands(1.75), _fringe(parted), none),
        "curly": (_cap((1.32, 1.16, 1.36), 0.85), none, none, _fringe(high), none),
        "bun": (_cap(full, 0.65), none, none, _fringe(high), np.array([(0.0, -0.95, -1.22)])),
        "bald": (_cap(flat, 0.55), none, none, none, none),
    }[person.hair_style]
    return {"cap": cap, "curtain": curtain, "strands": strands, "fringe": fringe, "bun": bun}


def paint_head(canvas: Canvas, model: HeadModel, view: HeadView, neck_base: Float[np.ndarray, " 2"]) -> None:
    """Paints neck, hair and face. Paint the body first, because the head is in front of it."""
    person, unit = model.person, view.unit_px
    extra = turned(model.points, view.matrix)
    flat = view.origin + unit * extra[:, :2]
    group = {name: flat[where] for name, where in model.slices.items()}
    depth = {name: extra[where, 2] for name, where in model.slices.items()}
    hair = person.skin if person.hair_style == "bald" else person.hair
    back_hair = shade(hair, 0.8)
    fall = np.concatenate([group["curtain"], group["cap"]]) if len(group["curtain"]) else None
    ears = [] if person.hair_style in ("bob", "long") else [slice(0, 3), slice(3, 6)]
    is_away = view.matrix[2, 2] < 0

    def paint_bun() -> None:
        for knot in group["bun"]:
            canvas.disc(knot, 0.42 * unit, back_hair)

    def paint_ears(near: bool) -> None:
        for ear in ears:
            if (depth["ears"][ear].mean() >= PIVOT[2] + 0.07) == near:
                _paint_ear(canvas, person, group["ears"][ear], unit)

    def paint_strands(near: bool) -> None:
        for strand in (slice(0, 6), slice(6, 12)) if len(group["strands"]) else ():
            if (depth["strands"][strand].mean() > PIVOT[2] - 0.15) == near:
                canvas.fill_hull(group["strands"][strand], shade(hair, 0.93 if near else 0.86))

    if is_away:
        paint_profile(canvas, person, view, group["face"])
    elif fall is not None:
        canvas.fill_hull(fall, back_hair)
    _paint_neck(canvas, person, group["neck"], neck_base, unit)
    if not is_away:
        paint_bun()
    paint_ears(near=False)
    canvas.fill_hull(group["skull"], shade(person.skin, 0.88))
    canvas.fill_hull(group["cap"], hair)
    if is_away:
        if fall is not None:
            canvas.fill_hull(fall, hair)
        paint_ears(near=True)
        paint_bun()
        return
    paint_strands(near=False)
    paint_skin(canvas, person, view, group["face"], depth["face"])
    paint_ears(near=True)
    paint_features(canvas, person, view, group["pupils"])
    _paint_fringe(canvas, group["fringe"], depth["fringe"], hair)
    paint_strands(near=True)
    # Brows and glasses are painted over a fringe, because hair would hide the movement of the brows.
    paint_brows(canvas, person, view)
    paint_glasses(canvas, person, view, group["temples"])


def _paint_fringe(
    canvas: Canvas, fringe: Float64[np.ndarray, "n 2"], depth: Float64[np.ndarray, " n"], hair: Colour
) -> None:
    half = len(fringe) // 2
    visible = depth[:half] > PIVOT[2]
    if np.count_nonzero(visible) > 1:
        canvas.fill(np.concatenate([fringe[:half][visible], fringe[half:][visible][::-1]]), hair)


def _paint_neck(
    canvas: Canvas, person: Person, top: Float[np.ndarray, "2 2"], base: Float[np.ndarray, " 2"], unit: float
) -> None:
    left, right = top[np.argsort(top[:, 0])]
    # A neck seen from the side is as thick as from the front.
    centre = (left + right) / 2
    half = np.array([0.5 * unit, 0.0])
    foot = np.array([0.6 * unit, 0.12 * unit])
    ring = [base + foot * share for share in ((-1, -1), (-0.4, 1.6), (0.4, 1.6), (1, -1))]
    canvas.fill(np.stack([centre - half, *ring, centre + half]), shade(person.skin, 0.82))


def _paint_ear(canvas: Canvas, person: Person, ear: Float[np.ndarray, "3 2"], unit: float) -> None:
    down = ear[2] - ear[0]
    across = np.array([-down[1], down[0]]) * 0.30
    angles = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    shape = np.cos(angles)[:, None] * down * 0.5 + np.sin(angles)[:, None] * across
    canvas.fill(ear[1] + shape, shade(person.skin, 0.93))
    canvas.fill(ear[1] + 0.5 * shape, shade(person.skin, 0.78))
