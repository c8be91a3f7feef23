"""Draws one person: body, neck, hair, face. The face is filled from the very points that are its landmarks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Float64

from tccp.roundtable.draw import Canvas, loop, spline_matrix
from tccp.roundtable.head import PIVOT, turned
from tccp.roundtable.people import Colour, Person, blend, shade

NECK_BASE_Y = 2.12
"""Where the neck enters the collar, in head units below the eyes; the body hangs from there."""
_SHOULDER_Y, _SHOULDER_Z = 0.78, -0.2
_SPLINE = {n: spline_matrix(n, 4) for n in (4, 5, 7)}
_JAW_SPLINE = spline_matrix(17, 2)
_TEETH: Colour = (246, 242, 232)
_MOUTH: Colour = (66, 18, 22)
_TONGUE: Colour = (190, 84, 88)
_EYE_WHITE: Colour = (246, 246, 242)
# Face beyond the landmarks: forehead up to the hairline, temples, cheekbones, cheeks.
_FACE = [(0.0, -0.98, 0.72), (0.0, -0.55, 0.93)] + [
    (side * x, y, z)
    for side in (-1, 1)
    for x, y, z in (
        (0.40, -0.96, 0.64), (0.72, -0.80, 0.38), (0.93, -0.45, 0.10), (0.45, -0.55, 0.86), (0.86, -0.25, 0.50),
        (0.92, 0.10, 0.38), (0.86, 0.48, 0.48), (0.74, 0.92, 0.52), (0.40, 0.55, 0.85), (0.45, 1.25, 0.74),
    )
]  # fmt: skip
_BRIDGE, _NOSTRILS, _BROWS = slice(27, 31), slice(31, 36), (slice(17, 22), slice(22, 27))
_EYES = ((36, 37, 38, 39, 40, 41), (42, 43, 44, 45, 46, 47))


_Project = Callable[..., Float64[np.ndarray, "n 2"]]
"""From points of a body to the picture."""


@dataclass(frozen=True)
class Outfit:
    """Clothes, drawn anew in every scene."""

    cloth: Colour
    collar: Colour
    cut: Literal["crew", "shirt", "jacket"]
    shoulders: float


class HeadModel:
    """Points of one person's head that are not landmarks, gathered so that a frame turns them all at once."""

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
    """Points of the hair's outside: an ellipsoid around the skull, cut below the ears in front, at the nape behind."""
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
    """Hair that falls from the skull behind face and neck."""
    rows = [(-0.5, 1.08), (0.4, 1.12), ((0.4 + bottom) / 2, spread), (bottom, 0.88 * spread)]
    angles = np.linspace(-0.55 * np.pi, 0.55 * np.pi, 9)
    return np.array([(r * np.sin(a), y, -0.22 - 0.95 * r * np.cos(a)) for y, r in rows for a in angles])


def _strands(bottom: float) -> Float64[np.ndarray, "n 3"]:
    """Left then right: hair in front of the ear."""
    left = [
        (-0.90, -0.85, 0.15), (-1.10, -0.3, 0.10), (-1.14, 0.5, 0.06),
        (-1.08, bottom, 0.0), (-1.1, bottom, -0.7), (-1.1, -0.5, -0.8),
    ]  # fmt: skip
    return np.array(left + [(-x, y, z) for x, y, z in left])


def _fringe(heights: tuple[float, ...]) -> Float64[np.ndarray, "n 3"]:
    """Hair over the forehead: its lower edge at these heights from left to right, then the crown."""
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


@dataclass(frozen=True)
class HeadView:
    """A head as this frame shows it: `landmarks` turned, x and y in scene pixels, z in units; `matrix` its rotation.

    gaze_deg: where the eyes look beyond the head's own yaw.
    """

    landmarks: Float64[np.ndarray, "68 3"]
    matrix: Float64[np.ndarray, "3 3"]
    origin: Float64[np.ndarray, " 2"]
    unit_px: float
    gaze_deg: float


def torso_points(points: Float[np.ndarray, "n 3"], yaw_deg: float) -> Float64[np.ndarray, "n 2"]:
    """Points of a body turned by yaw_deg, in head units from the neck base.

    A little perspective makes the nearer shoulder larger and lower, and a body is half as thick as wide.
    """
    cos, sin = np.cos(np.deg2rad(yaw_deg)), np.sin(np.deg2rad(yaw_deg))
    across = np.copysign(np.hypot(cos, 0.5 * sin), cos)
    grow = 1 + 0.05 * (points[:, 2] * cos - points[:, 0] * sin)
    x = points[:, 0] * across + points[:, 2] * sin
    return np.stack([x * grow, points[:, 1] * grow], axis=-1)


def shoulder_ends(outfit: Outfit, yaw_deg: float) -> Float64[np.ndarray, "2 2"]:
    """Left and right end of the shoulders in the picture (of a body seen from the front), from the neck base."""
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
    """Torso and arms under a neck base. hands: how far the left and right (in the picture) hand is raised, 0..1."""
    yaw = np.deg2rad(torso_yaw_deg)
    faces_viewer = np.cos(yaw) > 0

    def at(*points: tuple[float, float, float]) -> Float64[np.ndarray, "n 2"]:
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


def paint_head(canvas: Canvas, model: HeadModel, view: HeadView, neck_base: Float[np.ndarray, " 2"]) -> None:
    """Hair, neck and face. Draw the body first: the head stands before it."""
    person, unit = model.person, view.unit_px
    extra = turned(model.points, view.matrix)
    flat = view.origin + unit * extra[:, :2]
    depth = extra[:, 2]
    group = {name: flat[where] for name, where in model.slices.items()}
    facing = float(view.matrix[2, 2])
    is_away = facing < 0
    hair = person.skin if person.hair_style == "bald" else person.hair
    back_hair = shade(hair, 0.8)
    if len(group["curtain"]) and not is_away:
        canvas.fill_hull(np.concatenate([group["curtain"], group["cap"]]), back_hair)
    _paint_neck(canvas, person, group["neck"], neck_base, unit)
    if len(group["bun"]):
        bun_depth = float(depth[model.slices["bun"]][0])
        if bun_depth < 0:
            canvas.disc(group["bun"][0], 0.42 * unit, back_hair)
    ears = [(float(depth[model.slices["ears"]][3 * k + 1]), group["ears"][3 * k : 3 * k + 3]) for k in (0, 1)]
    hides_ears = person.hair_style in ("bob", "long")
    if not hides_ears:
        for ear_depth, ear in ears:
            if ear_depth < -0.18:
                _paint_ear(canvas, person, ear, unit)
    canvas.fill_hull(group["skull"], shade(person.skin, 0.88))
    canvas.fill_hull(group["cap"], hair)
    near = _near_strands(depth[model.slices["strands"]])
    for k in (0, 1) if len(group["strands"]) else ():
        if not near[k]:
            canvas.fill_hull(group["strands"][6 * k : 6 * k + 6], shade(hair, 0.86))
    visible = _paint_skin(canvas, person, view, group["face"], depth[model.slices["face"]])
    if len(group["curtain"]) and is_away:
        canvas.fill_hull(np.concatenate([group["curtain"], group["cap"]]), hair)
    if not hides_ears:
        for ear_depth, ear in ears:
            if ear_depth >= -0.18:
                _paint_ear(canvas, person, ear, unit)
    if visible:
        _paint_features(canvas, person, view, group["pupils"])
    _paint_front_hair(canvas, person, model, view, group, depth, hair)
    if visible and facing > 0.1:
        # Brows and glasses lie over a fringe, else bangs would hide what stress does.
        for k, brow in enumerate(_BROWS):
            if _is_side_visible(view, k):
                _paint_brow(canvas, person, view.landmarks[brow, :2], unit)
        if person.glasses != "none":
            _paint_glasses(canvas, person, view, group["temples"])
    if len(group["bun"]) and float(depth[model.slices["bun"]][0]) >= 0:
        canvas.disc(group["bun"][0], 0.42 * unit, shade(hair, 0.9))


def _is_side_visible(view: HeadView, side: int) -> bool:
    """Whether eye and brow of the left (0) or right (1) half face the viewer."""
    x, z = (-0.45, 0.45)[side], 0.8
    return float(view.matrix[2, 0] * x + view.matrix[2, 2] * z) > 0.12


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


def _paint_skin(
    canvas: Canvas, person: Person, view: HeadView, face: Float[np.ndarray, "n 2"], depth: Float[np.ndarray, " n"]
) -> bool:
    """The face's ground with the shaded side planes and jaw. False if the face is turned away."""
    jaw = view.landmarks[:17]
    # The lips stand out from the cheeks: the ground reaches around them, so that no mouth hangs in the air at a turn.
    mouth = view.landmarks[48:60]
    around = mouth.mean(axis=0) + (1.12, 1.12, 1.0) * (mouth - mouth.mean(axis=0))
    solid = np.concatenate([np.column_stack([face, depth]), jaw, view.landmarks[17:27], view.landmarks[31:36], around])
    points, depths = solid[:, :2], solid[:, 2]
    visible = depths > PIVOT[2] - 0.12
    if view.matrix[2, 2] < -0.55 or np.count_nonzero(visible) < 4:
        return False
    curve = _JAW_SPLINE @ jaw[:, :2]
    curve_depth = _JAW_SPLINE @ jaw[:, 2]
    canvas.fill_hull(np.concatenate([points[visible], curve[curve_depth > PIVOT[2] - 0.12]]), person.skin)
    # Side planes, from the jaw line to the cheek: they give the turn its depth.
    for half, cheek in ((range(0, 7), (18, 17, 16)), (range(16, 9, -1), (8, 7, 6))):
        ring = np.concatenate([jaw[list(half)], np.column_stack([face[list(cheek)], depth[list(cheek)]])])
        if ring[:, 2].mean() > 0:
            canvas.fill(ring[:, :2], shade(person.skin, 0.94))
    return view.matrix[2, 2] > -0.15


def _paint_features(canvas: Canvas, person: Person, view: HeadView, pupils: Float[np.ndarray, "2 2"]) -> None:
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


def _paint_brow(canvas: Canvas, person: Person, brow: Float[np.ndarray, "5 2"], unit: float) -> None:
    spine = _SPLINE[5] @ brow
    taper = np.interp(np.linspace(0, 1, len(spine)), [0, 0.3, 0.7, 1], [0.5, 1, 1, 0.5])
    lift = np.stack([np.zeros_like(taper), 0.075 * person.brow_thickness * unit * taper], axis=-1)
    canvas.fill(loop([spine - lift, (spine + lift)[::-1]]), shade(person.hair, 0.7))


def _paint_nose(canvas: Canvas, person: Person, view: HeadView) -> None:
    points, unit = view.landmarks[:, :2], view.unit_px
    bridge, nostrils = points[_BRIDGE], points[_NOSTRILS]
    canvas.fill_hull(np.concatenate([bridge, nostrils]), shade(person.skin, 1.03))
    # The side turned away from the viewer lies in shade; straight ahead, the right one.
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


def _paint_front_hair(
    canvas: Canvas,
    person: Person,
    model: HeadModel,
    view: HeadView,
    group: dict[str, Float64[np.ndarray, "_ 2"]],
    depth: Float64[np.ndarray, " n"],
    hair: Colour,
) -> None:
    fringe = group["fringe"]
    if len(fringe) and view.matrix[2, 2] > -0.3:
        half = len(fringe) // 2
        seen = depth[model.slices["fringe"]][:half] > PIVOT[2]
        lower, upper = fringe[:half][seen], fringe[half:][seen]
        if len(lower) > 1:
            canvas.fill(np.concatenate([lower, upper[::-1]]), hair)
    near = _near_strands(depth[model.slices["strands"]])
    for k in (0, 1) if len(group["strands"]) else ():
        if near[k]:
            canvas.fill_hull(group["strands"][6 * k : 6 * k + 6], shade(hair, 0.93))


def _near_strands(depth: Float64[np.ndarray, " n"]) -> tuple[bool, bool]:
    """Whether the left and right strand lie before the face; else it lies behind."""
    if not len(depth):
        return False, False
    return bool(depth[:6].mean() > PIVOT[2] - 0.15), bool(depth[6:].mean() > PIVOT[2] - 0.15)


def _paint_glasses(canvas: Canvas, person: Person, view: HeadView, temples: Float[np.ndarray, "2 2"]) -> None:
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
