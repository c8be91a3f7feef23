"""Paints a face from its landmarks. Every outline runs through the landmarks that are stored as ground truth."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float64

from tccp.roundtable.canvas import Canvas, loop, spline_matrix
from tccp.roundtable.head import PIVOT
from tccp.roundtable.people import Colour, Person, blend, shade

_SPLINE = {n: spline_matrix(n, 4) for n in (4, 5, 7)}
_JAW_SPLINE = spline_matrix(17, 2)
_TEETH: Colour = (246, 242, 232)
_MOUTH: Colour = (66, 18, 22)
_TONGUE: Colour = (190, 84, 88)
_EYE_WHITE: Colour = (246, 246, 242)
_BRIDGE, _NOSTRILS, _BROWS = slice(27, 31), slice(31, 36), (slice(17, 22), slice(22, 27))
# Indices of jaw landmarks and of the head model's face points.
_SIDE_PLANES = (([*range(7)], [18, 17, 16]), ([*range(16, 9, -1)], [8, 7, 6]))
_EYES = ((36, 37, 38, 39, 40, 41), (42, 43, 44, 45, 46, 47))


@dataclass(frozen=True)
class HeadView:
    """A head in one frame: `landmarks` of the turned head, x and y in scene pixels, z in units; `matrix`: its rotation.

    gaze_deg: yaw of the eyes relative to the head.
    """

    landmarks: Float64[np.ndarray, "68 3"]
    matrix: Float64[np.ndarray, "3 3"]
    origin: Float64[np.ndarray, " 2"]
    unit_px: float
    gaze_deg: float


def _is_side_visible(view: HeadView, side: int) -> bool:
    """Whether eye and brow of the left (0) or right (1) half face the viewer."""
    x, z = (-0.45, 0.45)[side], 0.8
    return float(view.matrix[2, 0] * x + view.matrix[2, 2] * z) > 0.12


def _ground(view: HeadView, face: Float[np.ndarray, "n 2"]) -> Float64[np.ndarray, "m 2"]:
    """Points whose convex hull is the face. It includes the lips, so that they stay on the skin when the head turns."""
    points = view.landmarks[:, :2]
    mouth = points[48:60]
    middle = mouth.mean(axis=0)
    return np.concatenate([face, points[17:27], points[31:36], middle + 1.12 * (mouth - middle)])


def paint_skin(
    canvas: Canvas, person: Person, view: HeadView, face: Float[np.ndarray, "n 2"], depth: Float[np.ndarray, " n"]
) -> None:
    """Paints the face's skin, down to the jaw line, and its shaded sides. face: the points that are no landmarks."""
    jaw = view.landmarks[:17]
    curve = _JAW_SPLINE @ jaw
    near = curve[:, 2] > PIVOT[2] - 0.12
    canvas.fill_hull(np.concatenate([_ground(view, face), curve[near, :2]]), person.skin)
    # Shaded sides, from the jaw line to the cheek, make a turn of the head look three-dimensional.
    for half, cheek in _SIDE_PLANES:
        if jaw[half, 2].sum() + depth[cheek].sum() > 0:
            canvas.fill(np.concatenate([jaw[half, :2], face[cheek]]), shade(person.skin, 0.94))


def paint_profile(canvas: Canvas, person: Person, view: HeadView, face: Float[np.ndarray, "n 2"]) -> None:
    """Paints cheek and nose of a face that is turned away. Skull and hair are painted over the rest later."""
    canvas.fill_hull(np.concatenate([_ground(view, face), view.landmarks[:17, :2]]), shade(person.skin, 0.94))
    canvas.fill_hull(view.landmarks[27:36, :2], shade(person.skin, 0.94))


def paint_features(canvas: Canvas, person: Person, view: HeadView, pupils: Float[np.ndarray, "2 2"]) -> None:
    points, unit = view.landmarks[:, :2], view.unit_px
    for k, eye in enumerate(_EYES):
        if _is_side_visible(view, k):
            _paint_eye(canvas, person, view, points[list(eye)], pupils[k])
    if view.matrix[2, 2] > 0.05:
        _paint_mouth(canvas, person, points, unit)
    _paint_nose(canvas, person, view)


def _paint_eye(
    canvas: Canvas, person: Person, view: HeadView, eye: Float[np.ndarray, "6 2"], pupil: Float[np.ndarray, " 2"]
) -> None:
    unit = view.unit_px
    upper, lower = _SPLINE[4] @ eye[:4], _SPLINE[4] @ eye[[3, 4, 5, 0]]
    canvas.fill(loop([upper, lower]), _EYE_WHITE)
    centre = pupil + np.array([0.10 * unit * np.sin(np.deg2rad(view.gaze_deg)), 0.0])
    top = upper if upper[0, 0] < upper[-1, 0] else upper[::-1]
    bottom = lower if lower[0, 0] < lower[-1, 0] else lower[::-1]
    angles = np.linspace(0, 2 * np.pi, 14, endpoint=False)
    circle = np.stack([np.cos(angles) * max(0.35, view.matrix[2, 2]), np.sin(angles)], axis=-1)
    for radius, colour in ((0.16, person.iris), (0.085, (16, 14, 16))):
        disc = centre + radius * unit * circle
        disc[:, 0] = np.clip(disc[:, 0], top[0, 0], top[-1, 0])
        lid = np.interp(disc[:, 0], top[:, 0], top[:, 1])
        disc[:, 1] = np.clip(disc[:, 1], lid, np.maximum(lid, np.interp(disc[:, 0], bottom[:, 0], bottom[:, 1])))
        canvas.fill(disc, colour)
    canvas.line(upper, blend(person.hair, (20, 14, 14), 0.7), 0.075 * unit)
    canvas.line(lower, shade(person.skin, 0.68), 0.035 * unit)


def paint_brows(canvas: Canvas, person: Person, view: HeadView) -> None:
    for side, points in enumerate(_BROWS):
        if _is_side_visible(view, side):
            _paint_brow(canvas, person, view.landmarks[points, :2], view.unit_px)


def _paint_brow(canvas: Canvas, person: Person, brow: Float[np.ndarray, "5 2"], unit: float) -> None:
    spine = _SPLINE[5] @ brow
    taper = np.interp(np.linspace(0, 1, len(spine)), [0, 0.3, 0.7, 1], [0.5, 1, 1, 0.5])
    lift = np.stack([np.zeros_like(taper), 0.075 * person.brow_thickness * unit * taper], axis=-1)
    canvas.fill(loop([spine - lift, (spine + lift)[::-1]]), shade(person.hair, 0.7))


def _paint_nose(canvas: Canvas, person: Person, view: HeadView) -> None:
    points, unit = view.landmarks[:, :2], view.unit_px
    bridge, nostrils = points[_BRIDGE], points[_NOSTRILS]
    canvas.fill_hull(np.concatenate([bridge, nostrils]), shade(person.skin, 1.03))
    # The side that faces away from the viewer is in shade; in a frontal face, the right side.
    shaded = nostrils[[0, 1, 2]] if view.matrix[0, 2] < -0.05 else nostrils[[4, 3, 2]]
    canvas.fill(np.concatenate([bridge, shaded[::-1]]), shade(person.skin, 0.86))
    canvas.line(bridge, shade(person.skin, 0.72), 0.05 * unit)
    canvas.line(_SPLINE[5] @ nostrils, shade(person.skin, 0.55), 0.07 * unit)


def _paint_mouth(canvas: Canvas, person: Person, points: Float[np.ndarray, "68 2"], unit: float) -> None:
    upper, lower = _SPLINE[7] @ points[48:55], _SPLINE[7] @ points[[54, 55, 56, 57, 58, 59, 48]]
    inner_upper, inner_lower = _SPLINE[5] @ points[60:65], _SPLINE[5] @ points[[64, 65, 66, 67, 60]]
    canvas.fill(loop([upper, lower]), person.lips)
    gap = float(np.hypot(*(points[66] - points[62])))
    if gap < 0.06 * unit:
        canvas.line(inner_upper, shade(person.lips, 0.45), 0.06 * unit)
        return
    canvas.fill(loop([inner_upper, inner_lower]), _MOUTH)
    across = inner_lower[::-1] - inner_upper  # from each upper point to the lower one below it
    if gap > 0.3 * unit:
        canvas.fill(loop([inner_upper + 0.68 * across, inner_lower]), _TONGUE)
    teeth = min(0.45, 0.15 * unit / gap)
    canvas.fill(loop([inner_upper, (inner_upper + teeth * across)[::-1]]), _TEETH)


def paint_glasses(canvas: Canvas, person: Person, view: HeadView, temples: Float[np.ndarray, "2 2"]) -> None:
    if person.glasses == "none":
        return
    points, unit = view.landmarks[:, :2], view.unit_px
    width = 0.085 * unit
    angles = np.linspace(0, 2 * np.pi, 17)
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    if person.glasses == "square":
        circle = np.sign(circle) * np.abs(circle) ** 0.55 * (1.0, 0.85)
    across = np.array([view.matrix[0, 0], view.matrix[1, 0]])
    inner_ends = []
    for k, eye in enumerate(_EYES):
        sign = (-1, 1)[k]
        if not _is_side_visible(view, k):
            continue
        centre = points[list(eye)].mean(axis=0) + 0.12 * unit * view.matrix[:2, 2]
        rim = centre + 0.37 * unit * (circle[:, :1] * across + circle[:, 1:] * view.matrix[:2, 1])
        canvas.line(rim, person.rims, width)
        inner_ends.append(centre - sign * 0.37 * unit * across)
        if view.matrix[2, 0] * sign > 0.0:
            canvas.line(np.stack([centre + sign * 0.37 * unit * across, temples[k]]), person.rims, width)
    if len(inner_ends) == 2:
        canvas.line(np.stack(inner_ends), person.rims, width)
