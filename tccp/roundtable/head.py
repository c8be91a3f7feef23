"""A head model in three dimensions: template, expressions, pose and 68 landmarks (iBUG order).

Axes: x to the image's right, y down, z to the viewer. The unit is half the width of a mean face; the origin lies
between the ears at the height of the eyes. Projection is orthographic, so pixels = origin + unit_px * (x, y).
Every jaw landmark is a fixed point of the head. If the head turns, the far ones lie inside the outline, as in 3D fits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32, Float64

from tccp.roundtable.people import Person

PIVOT = np.array([0.0, 0.9, -0.25])
"""Centre of the head's rotation: the top of the neck. It stays fixed, so the head box need not follow a turn."""
MAX_GAP = 0.50
"""Distance between the middles of the inner lips at opening 1."""

_JAW_HALF = [
    (-1.00, 0.00, -0.20), (-0.99, 0.32, -0.16), (-0.95, 0.63, -0.08), (-0.88, 0.93, 0.04), (-0.76, 1.19, 0.20),
    (-0.60, 1.40, 0.40), (-0.42, 1.55, 0.58), (-0.22, 1.63, 0.70), (0.00, 1.66, 0.74),
]  # fmt: skip
_BROW_HALF = [
    (-0.80, -0.36, 0.62), (-0.66, -0.47, 0.76), (-0.50, -0.51, 0.85), (-0.33, -0.48, 0.90), (-0.17, -0.42, 0.92),
]  # fmt: skip
_NOSE = [
    (0.00, -0.05, 0.95), (0.00, 0.16, 1.05), (0.00, 0.36, 1.17), (0.00, 0.55, 1.27),
    (-0.23, 0.68, 0.96), (-0.12, 0.73, 1.04), (0.00, 0.76, 1.10), (0.12, 0.73, 1.04), (0.23, 0.68, 0.96),
]  # fmt: skip
_EYE_CENTRE = (-0.43, 0.02, 0.77)
_EYE_HALF = [
    (-0.25, 0.02, -0.10), (-0.10, -0.16, 0.0), (0.09, -0.16, 0.03),
    (0.24, 0.05, 0.02), (0.09, 0.14, 0.02), (-0.10, 0.14, 0.0),
]  # fmt: skip
_MOUTH_Y = 1.06
_MIRRORED_EYE = [3, 2, 1, 0, 5, 4]
_JAW_DROP = np.concatenate([ramp := np.linspace(0, 1, 9) ** 1.5, ramp[-2::-1]])
# x as a fraction of half the mouth's width, and lip thickness, for outer lip 48-59 and inner lip 60-67.
_OUTER_X = np.array([-1, -0.64, -0.24, 0, 0.24, 0.64, 1, 0.62, 0.26, 0, -0.26, -0.62])
_OUTER_LIP = np.array([0, -0.105, -0.155, -0.13, -0.155, -0.105, 0, 0.13, 0.175, 0.185, 0.175, 0.13])
_INNER_X = np.array([-0.88, -0.5, 0, 0.5, 0.88, 0.5, 0, -0.5])
# Shares of the gap: the lower lip goes down with the jaw, the upper lip rises a little.
_UPPER_SHARE, _LOWER_SHARE = 0.22, 0.78


@dataclass(frozen=True)
class Expression:
    """The face's expression per frame, each 0..1: mouth opening and width, brow raise; blink: 0 open, 1 closed lids."""

    opening: Float32[np.ndarray, " f"]
    width: Float32[np.ndarray, " f"]
    brow: Float32[np.ndarray, " f"]
    blink: Float32[np.ndarray, " f"]


@dataclass(frozen=True)
class Pose:
    """The head's rotation per frame in degrees; positive are yaw to the image's right, pitch down, roll clockwise."""

    yaw_deg: Float32[np.ndarray, " f"]
    pitch_deg: Float32[np.ndarray, " f"]
    roll_deg: Float32[np.ndarray, " f"]


def neutral_face(person: Person) -> Float64[np.ndarray, "68 3"]:
    """The person's face at rest, without the mouth (points 48-67), which `landmarks_3d` adds."""
    points = np.zeros((68, 3))
    jaw = np.array(_JAW_HALF)
    jaw[3:7, 0] *= person.jaw_width
    jaw[:, 1] *= np.linspace(1.0, person.chin, 9)
    points[:9] = jaw
    points[9:17] = jaw[-2::-1] * (-1, 1, 1)
    brow = np.array(_BROW_HALF)
    points[17:22] = brow
    points[22:27] = brow[::-1] * (-1, 1, 1)
    nose = np.array(_NOSE)
    nose[:, 0] *= person.nose
    nose[:, 2] = 0.95 + (nose[:, 2] - 0.95) * person.nose
    points[27:36] = nose
    eye = np.array(_EYE_CENTRE) * (person.eye_distance, 1, 1) + np.array(_EYE_HALF) * (person.eyes, person.eyes, 1)
    points[36:42] = eye
    points[42:48] = eye[_MIRRORED_EYE] * (-1, 1, 1)
    points[:, 0] *= person.face_width
    return points


def landmarks_3d(person: Person, expression: Expression) -> Float64[np.ndarray, "f 68 3"]:
    """The person's landmarks with this expression, before the head is turned."""
    points = np.repeat(neutral_face(person)[None], len(expression.opening), axis=0)
    gap = MAX_GAP * expression.opening.astype(np.float64)[:, None]
    points[:, :17, 1] += 0.62 * gap * _JAW_DROP
    points[:, 17:27, 1] -= 0.17 * expression.brow[:, None]
    _close_eyes(points, expression.blink.astype(np.float64))
    points[:, 48:68] = _mouth(person, gap, expression.width.astype(np.float64)[:, None])
    return points


def _close_eyes(points: Float64[np.ndarray, "f 68 3"], blink: Float64[np.ndarray, " f"]) -> None:
    for upper, lower in (((37, 38), (41, 40)), ((43, 44), (47, 46))):
        gap = points[:, lower] - points[:, upper]
        points[:, upper] += blink[:, None, None] * 0.92 * gap


def _mouth(
    person: Person, gap: Float64[np.ndarray, "f 1"], width: Float64[np.ndarray, "f 1"]
) -> Float64[np.ndarray, "f 20 3"]:
    half = person.mouth_width * person.face_width * (0.29 + 0.26 * width)
    # A rounded mouth has thick lips that protrude. An open mouth is an oval whose corners lie between the lips.
    fullness = person.lip_fullness * (1.12 - 0.27 * width)
    corner_y = _MOUTH_Y + 0.2 * gap

    def lip_y(x_share: Float64[np.ndarray, " p"], is_upper: np.ndarray) -> Float64[np.ndarray, "f p"]:
        bulge = np.sqrt(np.clip(1 - x_share**2, 0, 1))
        inner = np.where(is_upper, _MOUTH_Y - _UPPER_SHARE * gap, _MOUTH_Y + _LOWER_SHARE * gap)
        return corner_y + (inner - corner_y) * bulge

    outer_upper = np.arange(12) <= 6
    outer_y = lip_y(_OUTER_X, outer_upper) + fullness * _OUTER_LIP
    inner_upper = np.arange(8) <= 4
    inner_share = _INNER_X / 0.88
    inner_y = lip_y(inner_share, inner_upper)
    # Closed lips meet in a line. 0.012 keeps upper and lower points distinct.
    inner_y += 0.012 * np.where(inner_upper, -1, 1) * (np.abs(inner_share) < 1)
    x = half * np.concatenate([_OUTER_X, _INNER_X])
    z = 0.98 - 0.55 * x**2 + 0.08 * (1 - width)
    z = z - 0.12 * gap * (np.concatenate([~outer_upper, ~inner_upper]))
    return np.stack([x, np.concatenate([outer_y, inner_y], axis=1), z], axis=-1)


def rotation(pose: Pose) -> Float64[np.ndarray, "f 3 3"]:
    """Rotation matrices for column vectors: yaw first, then pitch, then roll."""
    yaw, pitch, roll = (np.deg2rad(a.astype(np.float64)) for a in (pose.yaw_deg, pose.pitch_deg, pose.roll_deg))
    zero, one = np.zeros_like(yaw), np.ones_like(yaw)

    def matrices(*rows: tuple[np.ndarray, np.ndarray, np.ndarray]) -> Float64[np.ndarray, "f 3 3"]:
        return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)

    turn = matrices((np.cos(yaw), zero, np.sin(yaw)), (zero, one, zero), (-np.sin(yaw), zero, np.cos(yaw)))
    nod = matrices((one, zero, zero), (zero, np.cos(pitch), np.sin(pitch)), (zero, -np.sin(pitch), np.cos(pitch)))
    tilt = matrices((np.cos(roll), -np.sin(roll), zero), (np.sin(roll), np.cos(roll), zero), (zero, zero, one))
    return tilt @ nod @ turn


def turned(points: Float[np.ndarray, "*f p 3"], matrix: Float[np.ndarray, "*f 3 3"]) -> Float64[np.ndarray, "*f p 3"]:
    """Rotates points of the head about `PIVOT`."""
    return (points - PIVOT) @ np.swapaxes(matrix, -1, -2) + PIVOT
