"""Geometry of 68 facial points: order, mean face, head pose, mouth measures, normalisation and smoothing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

NUM_POINTS = 68
GROUPS: dict[str, tuple[int, ...]] = {
    "jaw": tuple(range(0, 17)),
    "left_brow": tuple(range(17, 22)),
    "right_brow": tuple(range(22, 27)),
    "bridge": tuple(range(27, 31)),
    "nostrils": tuple(range(31, 36)),
    "left_eye": tuple(range(36, 42)),
    "right_eye": tuple(range(42, 48)),
    "outer_lip": tuple(range(48, 60)),
    "inner_lip": tuple(range(60, 68)),
}
RIGID = (27, 28, 29, 30, 31, 32, 33, 34, 35, 36, 39, 42, 45)
"""Points that do not move with speech, blinks or brows: nose and eye corners."""


def _mirrored(left_half: str) -> Float[np.ndarray, "68 3"]:
    """Completes the points on the picture's left and on the midline (x = 0) to all 68 points."""
    points = np.full((NUM_POINTS, 3), np.nan)
    for line in left_half.strip().splitlines():
        index, *xyz = line.split()
        points[int(index)] = [float(value) for value in xyz]
    missing = np.isnan(points[:, 0])
    points[missing] = points[MIRROR][missing] * (-1, 1, 1)
    return points


MIRROR = np.array(
    [
        *(*range(16, -1, -1), *range(26, 16, -1), *range(27, 31), *range(35, 30, -1)),
        *(45, 44, 43, 42, 47, 46, 39, 38, 37, 36, 41, 40),
        *(*range(54, 47, -1), *range(59, 54, -1), *range(64, 59, -1), *range(67, 64, -1)),
    ]
)
"""Point i of a face is point MIRROR[i] of its mirror image."""

MEAN_FACE = _mirrored("""
0 -0.779 0.039 0.543
1 -0.776 0.267 0.590
2 -0.756 0.499 0.571
3 -0.711 0.721 0.510
4 -0.638 0.911 0.397
5 -0.536 1.058 0.247
6 -0.389 1.182 0.113
7 -0.220 1.277 -0.017
8 0 1.318 -0.075
17 -0.641 -0.181 0.011
18 -0.574 -0.244 -0.079
19 -0.471 -0.279 -0.152
20 -0.332 -0.274 -0.216
21 -0.167 -0.253 -0.248
27 0 -0.035 -0.239
28 0 0.136 -0.346
29 0 0.283 -0.472
30 0 0.374 -0.499
31 -0.179 0.509 -0.218
32 -0.087 0.524 -0.289
33 0 0.528 -0.307
36 -0.500 0 0
37 -0.429 -0.048 -0.073
38 -0.317 -0.055 -0.091
39 -0.195 0.017 -0.055
40 -0.301 0.037 -0.080
41 -0.412 0.041 -0.061
48 -0.280 0.796 -0.093
49 -0.162 0.724 -0.256
50 -0.083 0.702 -0.297
51 0 0.718 -0.305
57 0 0.934 -0.252
58 -0.086 0.926 -0.247
59 -0.161 0.900 -0.217
60 -0.253 0.795 -0.113
61 -0.068 0.785 -0.234
62 0 0.787 -0.242
66 0 0.824 -0.235
67 -0.069 0.819 -0.226
""")
"""A face at rest, seen from the front: x right, y down, z away from the viewer; the outer eye corners are 1 apart.

The mean of MediaPipe's points of five real people, with their head poses removed, made symmetric."""


@dataclass(frozen=True)
class HeadPose:
    """Weak-perspective fit of `MEAN_FACE`: points are about scale * (rotation @ MEAN_FACE)[:2] + origin."""

    scale: Float[np.ndarray, "f"]  # MEAN_FACE's unit in units of the points; it does not shrink when the head turns
    rotation: Float[np.ndarray, "f 3 3"]
    origin: Float[np.ndarray, "f 2"]  # midpoint of the outer eye corners

    @property
    def yaw_deg(self) -> Float[np.ndarray, "f"]:
        """Positive when the nose points to the right of the picture."""
        return np.degrees(np.arctan2(-self.rotation[:, 0, 2], self.rotation[:, 2, 2]))

    @property
    def pitch_deg(self) -> Float[np.ndarray, "f"]:
        """Positive when the nose points down."""
        return np.degrees(np.arcsin(np.clip(-self.rotation[:, 1, 2], -1, 1)))

    @property
    def roll_deg(self) -> Float[np.ndarray, "f"]:
        """Positive when the head leans clockwise in the picture."""
        return np.degrees(np.arctan2(self.rotation[:, 1, 0], self.rotation[:, 0, 0]))

    def project(self, point: Float[np.ndarray, "3"]) -> Float[np.ndarray, "f 2"]:
        """The position in each picture of a point of the head, given in MEAN_FACE's coordinates."""
        return self.scale[:, None] * (self.rotation[:, :2] @ point) + self.origin


_RIGID_FACE = np.column_stack([MEAN_FACE[list(RIGID)], np.ones(len(RIGID))])
_FIT_RIGID = np.linalg.pinv(_RIGID_FACE)


def _affine(points: Float[np.ndarray, "f 68 2"]) -> Float[np.ndarray, "f 4 2"]:
    """Least-squares map from (x, y, z, 1) of MEAN_FACE's rigid points to the picture."""
    return _FIT_RIGID @ points[:, list(RIGID)].astype(np.float64)


def head_pose(points: Float[np.ndarray, "f 68 2"]) -> HeadPose:
    """Pose of each head from its rigid points only, without lips, lids, brows and jaw. NaN where points are NaN."""
    affine = _affine(points)
    known = np.isfinite(affine).all((1, 2))
    linear = np.where(known[:, None, None], affine[:, :3], 0).swapaxes(1, 2)
    u, singular, vt = np.linalg.svd(linear, full_matrices=False)
    rows = u @ vt
    rotation = np.concatenate([rows, np.cross(rows[:, 0], rows[:, 1])[:, None]], 1)
    unknown = ~known
    scale = singular.mean(1)
    scale[unknown], rotation[unknown] = np.nan, np.nan
    return HeadPose(scale, rotation, affine[:, 3])


def yaw_deg(points: Float[np.ndarray, "f 68 2"]) -> Float[np.ndarray, "f"]:
    """Rough head yaw: 0 for a head that faces the camera, positive when the nose points to the picture's right."""
    return head_pose(points).yaw_deg


def mouth_opening(points: Float[np.ndarray, "f 68 2"]) -> Float[np.ndarray, "f"]:
    """Mean gap of the inner lips, in units of the frontal distance of the outer eye corners, corrected for pitch."""
    pose = head_pose(points)
    gap = np.linalg.norm(points[:, [61, 62, 63]] - points[:, [67, 66, 65]], axis=-1).mean(1)
    return gap / (pose.scale * _foreshortening(pose, 1))


def mouth_width(points: Float[np.ndarray, "f 68 2"]) -> Float[np.ndarray, "f"]:
    """Distance of the mouth corners, in units of the frontal distance of the outer eye corners, corrected for yaw."""
    pose = head_pose(points)
    return np.linalg.norm(points[:, 54] - points[:, 48], axis=-1) / (pose.scale * _foreshortening(pose, 0))


def _foreshortening(pose: HeadPose, axis: int) -> Float[np.ndarray, "f"]:
    # Beyond about 70 degrees a length along the axis is mostly noise. The bound keeps it from being amplified.
    return np.maximum(np.linalg.norm(pose.rotation[:, :2, axis], axis=1), 0.35)


def normalise(points: Float[np.ndarray, "f 68 2"]) -> Float[np.ndarray, "f 68 2"]:
    """Removes position, roll and size: the eye line becomes horizontal through the origin, and the unit is the frontal
    distance of the outer eye corners."""
    pose = head_pose(points)
    left, right = points[:, [36, 39]].mean(1), points[:, [42, 45]].mean(1)
    angle = np.arctan2(right[:, 1] - left[:, 1], right[:, 0] - left[:, 0])
    cos, sin = np.cos(angle), np.sin(angle)
    upright = np.stack([np.stack([cos, -sin], -1), np.stack([sin, cos], -1)], -2)
    centred = points - ((left + right) / 2)[:, None]
    return centred @ upright / pose.scale[:, None, None]


def smooth(
    points: Float[np.ndarray, "f 68 2"], head_frames: float = 1.5, face_frames: float = 0.5
) -> Float[np.ndarray, "f 68 2"]:
    """Removes jitter over time. NaN frames stay NaN and do not affect their neighbours.

    Smooths the movement of the head and the movement of the face on it separately, with Gaussians of these standard
    deviations: speech moves the lips at up to 8 Hz, the head moves more slowly.
    """
    head = np.column_stack([MEAN_FACE, np.ones(NUM_POINTS)]) @ _affine(points)
    return smooth_over_time(head, head_frames) + smooth_over_time(points - head, face_frames)


def smooth_over_time(values: Float[np.ndarray, "f *rest"], sigma_frames: float) -> Float[np.ndarray, "f *rest"]:
    """Gaussian mean over the finite neighbours in time; NaN where the value itself is NaN. Point reflection extends the
    series at its ends, so that they are not pulled inward."""
    frames = len(values)
    reach = min(int(np.ceil(3 * sigma_frames)), frames - 1)
    if sigma_frames <= 0 or reach < 1:
        return values
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma_frames) ** 2)
    before, after = 2 * values[:1] - values[reach:0:-1], 2 * values[-1:] - values[-2 : -2 - reach : -1]
    series = np.concatenate([before, values, after])
    known = np.isfinite(series)
    series = np.where(known, series, 0)
    total = sum(w * series[i : i + frames] for i, w in enumerate(weights))
    weight = sum(w * known[i : i + frames] for i, w in enumerate(weights))
    return np.where(np.isfinite(values), total / np.maximum(weight, 1e-12), np.nan)
