"""Paints a person's body and clothes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Float64

from tccp.roundtable.canvas import Canvas
from tccp.roundtable.people import Colour, Person, shade

NECK_BASE_Y = 2.12
"""Height of the neck base, where the neck enters the collar, in head units below the eyes. The body starts there."""
_SHOULDER_Y, _SHOULDER_Z = 0.78, -0.2
_Project = Callable[..., Float64[np.ndarray, "n 2"]]
"""Converts points of a body to the picture."""


@dataclass(frozen=True)
class Outfit:
    """Clothes. They are sampled for every scene."""

    cloth: Colour
    collar: Colour
    cut: Literal["crew", "shirt", "jacket"]
    shoulders: float


def torso_points(points: Float[np.ndarray, "n 3"], yaw_deg: float) -> Float64[np.ndarray, "n 2"]:
    """Projects points of a body turned by yaw_deg, in head units from the neck base.

    Slight perspective makes the nearer shoulder larger and lower. A body is half as thick as wide.
    """
    cos, sin = np.cos(np.deg2rad(yaw_deg)), np.sin(np.deg2rad(yaw_deg))
    across = np.copysign(np.hypot(cos, 0.5 * sin), cos)
    grow = 1 + 0.05 * (points[:, 2] * cos - points[:, 0] * sin)
    x = points[:, 0] * across + points[:, 2] * sin
    return np.stack([x * grow, points[:, 1] * grow], axis=-1)


def shoulder_ends(outfit: Outfit, yaw_deg: float) -> Float64[np.ndarray, "2 2"]:
    """Left and right end of the shoulders, relative to the neck base. Left and right as seen from the front."""
    ends = [(side * outfit.shoulders, _SHOULDER_Y, _SHOULDER_Z) for side in (-1.0, 1.0)]
    return torso_points(np.array(ends), yaw_deg)


def paint_body(
    canvas: Canvas,
    person: Person,
    outfit: Outfit,
    neck_base: Float[np.ndarray, " 2"],
    unit_px: float,
    torso_yaw_deg: float,
    hands: tuple[float, float],
) -> None:
    """Paints torso and arms. hands: how far the left and right hand (in the picture) are raised, 0..1."""
    yaw = np.deg2rad(torso_yaw_deg)
    faces_viewer = np.cos(yaw) > 0

    def at(*points: tuple[float | int, float | int, float | int]) -> Float64[np.ndarray, "n 2"]:
        return neck_base + unit_px * torso_points(np.array(points, dtype=np.float64), torso_yaw_deg)

    width = outfit.shoulders
    sleeve = shade(outfit.cloth, 0.86)
    side_order = sorted((-1, 1), key=lambda side: -side * np.sin(yaw))

    def arm(side: int) -> None:
        in_picture = 1 if at((side, 0, 0))[0, 0] > neck_base[0] else 0
        raised = hands[in_picture]
        shoulder, elbow, wrist, hand = at(
            (side * width * 0.9, 0.85, -0.1),
            (side * width * (1.02 + 0.1 * raised), 2.9, 0.0),
            (side * width * (0.98 + 0.35 * raised), 4.6 - 3.1 * raised, 0.45),
            (side * width * (0.98 + 0.38 * raised), 4.75 - 3.55 * raised, 0.5),
        )
        canvas.line(np.stack([shoulder, elbow, wrist]), sleeve, 0.78 * unit_px)
        canvas.disc(hand, 0.36 * unit_px, person.skin)

    arm(side_order[0])
    half = [(0.55, -0.12), (1.15, 0.22), (0.82 * width, 0.42), (width, _SHOULDER_Y), (width, 1.3), (0.86 * width, 9)]
    outline = [(x, y, _SHOULDER_Z) for x, y in half] + [(-x, y, _SHOULDER_Z) for x, y in half[::-1]]
    canvas.fill(at(*outline), outfit.cloth)
    if faces_viewer:
        _paint_front(canvas, person, outfit, at)
    arm(side_order[1])


def _paint_front(canvas: Canvas, person: Person, outfit: Outfit, at: _Project) -> None:
    if outfit.cut == "crew":
        outer = at((-0.66, -0.1, 0), (-0.4, 0.28, 0.4), (0, 0.42, 0.55), (0.4, 0.28, 0.4), (0.66, -0.1, 0))
        inner = at((-0.52, -0.16, 0), (-0.32, 0.12, 0.4), (0, 0.24, 0.55), (0.32, 0.12, 0.4), (0.52, -0.16, 0))
        canvas.fill(outer, outfit.collar)
        canvas.fill(inner, person.skin)
        return
    opening = 1.1 if outfit.cut == "shirt" else 2.6
    under = person.skin if outfit.cut == "shirt" else outfit.collar
    canvas.fill(at((-0.55, -0.14, 0), (0, opening, 0.7), (0.55, -0.14, 0)), under)
    if outfit.cut == "jacket":
        canvas.fill(at((-0.5, -0.15, 0), (0, 0.5, 0.6), (0.5, -0.15, 0)), person.skin)
    lapel = outfit.collar if outfit.cut == "shirt" else shade(outfit.cloth, 0.7)
    for side in (-1, 1):
        outer_edge = [(side * 0.82, 0.1, 0.3), (side * 0.5, opening * 0.62, 0.6)]
        canvas.fill(at((side * 0.5, -0.2, 0), *outer_edge, (0, opening, 0.72)), lapel)
    canvas.line(at((0, opening, 0.72), (0, 9, 0.8)), shade(outfit.cloth, 0.75), 1.2)
