"""68 facial points: geometry, drawing them as a picture, and reading them back.

Points are in iBUG order (jaw, brows, nose, eyes, lips: `GROUPS`). Coordinates are continuous: a picture's left edge is
x = 0, its top y = 0, and pixel (column i, row j) covers [i, i + 1) x [j, j + 1). Crop coordinates are the same, divided
by the picture's side. Left and right are the picture's, not the person's.

A landmark picture is three layers, one per colour channel, so that strokes of different groups that touch or cross can
never mix: red holds brows, nose bridge and outer lip, green eyes, nostrils and inner lip, blue the jaw. Lips and eyes
are filled, because the amount of colour in a filled shape survives what a blurred outline loses: a closed mouth is
a green line, and every bit of opening adds green.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Float, Float32, UInt8

from tccp.config import TccpError

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
LAYERS: tuple[tuple[str, ...], ...] = (
    ("left_brow", "right_brow", "bridge", "outer_lip"),
    ("left_eye", "right_eye", "nostrils", "inner_lip"),
    ("jaw",),
)
"""Groups of the red, green and blue channel. Within a channel no two groups are neighbours on a face."""
FILLED = ("left_eye", "right_eye", "outer_lip", "inner_lip")

RIGID = (27, 28, 29, 30, 31, 32, 33, 34, 35, 36, 39, 42, 45)
"""Points that neither speech nor blinks nor brows move: nose and eye corners."""


def _mirrored(left_half: str) -> Float[np.ndarray, "68 3"]:
    """All 68 points from those on the picture's left and on the midline (x = 0)."""
    points = np.full((NUM_POINTS, 3), np.nan)
    for line in left_half.strip().splitlines():
        index, *xyz = line.split()
        points[int(index)] = [float(value) for value in xyz]
    missing = np.isnan(points[:, 0])
    points[missing] = points[MIRROR][missing] * (-1, 1, 1)
    return points


MIRROR = np.array(
    [*range(16, -1, -1), *range(26, 16, -1), *range(27, 31), *range(35, 30, -1)]
    + [45, 44, 43, 42, 47, 46, 39, 38, 37, 36, 41, 40]
    + [*range(54, 47, -1), *range(59, 54, -1), *range(64, 59, -1), *range(67, 64, -1)]
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

Mean of mediapipe's points over five real people, their poses undone, made symmetric."""

_SHIFT = 4  # fractional bits of the coordinates handed to OpenCV


def _stroke(size_px: int) -> tuple[int, int]:
    """How strokes are drawn: (supersampling factor, OpenCV's thickness there).

    Drawn large and averaged down, strokes have fractional widths and exact coverage. OpenCV covers one pixel more than
    an even thickness says.
    """
    factor = 4 if size_px <= 128 else 2
    return factor, max(2, 2 * round((max(1.75, size_px / 73) * factor - 1) / 2))


def stroke_px(size_px: int) -> float:
    """Width of a stroke in a landmark picture: an f8 auto-encoder at 64 px and an f16 one at 256 px keep it."""
    factor, thickness = _stroke(size_px)
    return (thickness + 1) / factor


def draw(points: Float[np.ndarray, "f 68 2"], size_px: int) -> UInt8[np.ndarray, "f {size_px} {size_px} 3"]:
    """Landmark pictures: the points' groups on black, anti-aliased, one colour layer per set of groups (`LAYERS`).

    points: crop coordinates, 0..1 inside the picture; what lies outside is cut off. A face with a NaN point leaves its
    picture black.
    Raises TccpError if size_px is below 16.
    """
    if size_px < 16:
        raise TccpError(f"landmark pictures of {size_px} px are asked for; they need at least 16 px")
    factor, stroke = _stroke(size_px)
    large = size_px * factor
    pictures = np.zeros((len(points), size_px, size_px, 3), np.uint8)
    plane = np.zeros((large, large), np.uint8)
    # OpenCV's whole coordinates are pixel centres; the bound keeps its fixed-point arithmetic from overflowing.
    fixed = np.clip((points * large - 0.5) * 2**_SHIFT, -(2**20), 2**20)
    for index, face in enumerate(fixed):
        if not np.isfinite(face).all():
            continue
        face = np.rint(face).astype(np.int32)
        for channel, groups in enumerate(LAYERS):
            plane[:] = 0
            for group in groups:
                line = face[GROUPS[group][0] : GROUPS[group][-1] + 1]
                if group in FILLED:
                    cv2.fillPoly(plane, [line], 255, cv2.LINE_8, _SHIFT)
                cv2.polylines(plane, [line], group in FILLED, 255, stroke, cv2.LINE_8, _SHIFT)
            pictures[index, :, :, channel] = cv2.resize(plane, (size_px, size_px), interpolation=cv2.INTER_AREA)
    return pictures


@dataclass(frozen=True)
class HeadPose:
    """Weak-perspective fit of `MEAN_FACE`: points are about scale * (rotation @ MEAN_FACE)[:2] + origin."""

    scale: Float[np.ndarray, "f"]  # length of MEAN_FACE's unit, in the points' unit: does not shrink as the head turns
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
        """Where a point of the head, given in MEAN_FACE's coordinates, stands in each picture."""
        return self.scale[:, None] * (self.rotation[:, :2] @ point) + self.origin


_RIGID_FACE = np.column_stack([MEAN_FACE[list(RIGID)], np.ones(len(RIGID))])
_FIT_RIGID = np.linalg.pinv(_RIGID_FACE)


def _affine(points: Float[np.ndarray, "f 68 2"]) -> Float[np.ndarray, "f 4 2"]:
    """Least-squares map from (x, y, z, 1) of MEAN_FACE's rigid points to the picture."""
    return _FIT_RIGID @ points[:, list(RIGID)].astype(np.float64)


def head_pose(points: Float[np.ndarray, "f 68 2"]) -> HeadPose:
    """Pose of each head, from its rigid points only: lips, lids, brows and jaw do not enter. NaN where points are."""
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
    """Rough head yaw: 0 facing the camera, positive when the nose points to the right of the picture."""
    return head_pose(points).yaw_deg


def mouth_opening(points: Float[np.ndarray, "f 68 2"]) -> Float[np.ndarray, "f"]:
    """Mean gap of the inner lips, in units of the (frontal) distance of the outer eye corners; pitch corrected."""
    pose = head_pose(points)
    gap = np.linalg.norm(points[:, [61, 62, 63]] - points[:, [67, 66, 65]], axis=-1).mean(1)
    return gap / (pose.scale * _foreshortening(pose, 1))


def mouth_width(points: Float[np.ndarray, "f 68 2"]) -> Float[np.ndarray, "f"]:
    """Distance of the mouth corners, in units of the (frontal) distance of the outer eye corners; yaw corrected."""
    pose = head_pose(points)
    return np.linalg.norm(points[:, 54] - points[:, 48], axis=-1) / (pose.scale * _foreshortening(pose, 0))


def _foreshortening(pose: HeadPose, axis: int) -> Float[np.ndarray, "f"]:
    # Beyond about 70 degrees a length along the axis says nothing any more: do not blow up its noise.
    return np.maximum(np.linalg.norm(pose.rotation[:, :2, axis], axis=1), 0.35)


def normalise(points: Float[np.ndarray, "f 68 2"]) -> Float[np.ndarray, "f 68 2"]:
    """Place, roll and size taken out: the eye line is horizontal through the origin, one unit is the (frontal) distance
    of the outer eye corners."""
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
    """Points with jitter taken out over time; NaN frames stay NaN and do not touch their neighbours.

    The head's movement is smoothed apart from that of the face on it, with Gaussians of these standard deviations:
    speech moves the lips at up to 8 Hz, where the head does not move.
    """
    head = np.column_stack([MEAN_FACE, np.ones(NUM_POINTS)]) @ _affine(points)
    return smooth_over_time(head, head_frames) + smooth_over_time(points - head, face_frames)


def smooth_over_time(values: Float[np.ndarray, "f *rest"], sigma_frames: float) -> Float[np.ndarray, "f *rest"]:
    """Gaussian mean over the finite neighbours in time; NaN where the value itself is NaN. Ends are not pulled inward:
    the series is continued by point reflection."""
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


# ---- reading a picture back


def read(pictures: UInt8[np.ndarray, "f h w 3"]) -> tuple[Float32[np.ndarray, "f 68 2"], Float32[np.ndarray, "f"]]:
    """The 68 points of landmark pictures, in crop coordinates, and how sure each picture is (0..1).

    The inverse of `draw`, for pictures that an auto-encoder has blurred and a sampler has disturbed: amounts of colour
    and their centres are measured, not edges. Where a curve has no corner to hold on to, points are spaced along it as
    they are on MEAN_FACE in this head's pose. A group that is missing is put where the others say, and lowers the
    confidence, which is the agreement of the picture with its points drawn anew times the share of groups found.
    A picture without a face gives NaN points and confidence 0.
    """
    points = np.full((len(pictures), NUM_POINTS, 2), np.nan, np.float32)
    confidence = np.zeros(len(pictures), np.float32)
    for index, picture in enumerate(pictures):
        if len(picture) > _READING_PX:  # finer tells nothing more: strokes are wider there
            picture = cv2.resize(picture, (_READING_PX, _READING_PX), interpolation=cv2.INTER_AREA)
        found = _Reading(picture, stroke_px(pictures.shape[1]) * len(picture) / pictures.shape[1]).points()
        if found is not None:
            points[index], confidence[index] = found
    return points, confidence


_GROUP_OF = np.empty(NUM_POINTS, np.int64)
for _number, _indices in enumerate(GROUPS.values()):
    _GROUP_OF[list(_indices)] = _number
_LAYER_OF = np.array([next(c for c, groups in enumerate(LAYERS) if name in groups) for name in GROUPS])[_GROUP_OF]
_READING_PX = 128
_INK = 0.2  # amount of colour from which a pixel is taken for a stroke
_OTHER_LAYER = np.where(np.arange(len(LAYERS))[:, None] == _LAYER_OF, 0, 1e9)
_MEAN_FACE_1 = np.column_stack([MEAN_FACE, np.ones(NUM_POINTS)])


class _Reading:
    """One picture on its way to points. Lengths are pixels, coordinates continuous."""

    def __init__(self, picture: np.ndarray, stroke: float) -> None:
        self.size, self.stroke = len(picture), stroke
        layers = picture.astype(np.float32) / 255
        self.layers = np.maximum(layers - np.median(layers, (0, 1)), 0)
        # Blurred strokes side by side are told apart by the valley between them.
        reach = 2 * int(np.ceil(stroke)) + 1
        self.ink = self.layers > np.maximum(_INK, 0.5 * cv2.dilate(self.layers, np.ones((reach, reach), np.uint8)))

    def points(self) -> tuple[np.ndarray, float] | None:
        rows, columns, channels = np.nonzero(self.ink)
        if len(rows) < 4 * self.stroke**2:
            return None
        pixels = np.stack([columns, rows], 1) + 0.5
        face = self._fit_template(pixels, channels)
        labels = self._labels(pixels, channels, face)
        points, found = face.copy(), 0
        for number, (name, indices) in enumerate(GROUPS.items()):
            own = labels == number
            if own.sum() < 2 * self.stroke:
                continue
            layer = self._group_layer(rows, columns, channels, labels, number)
            measure = self._jaw if name == "jaw" else self._closed if name in FILLED else self._open
            curve = measure(layer, face[list(indices)], pixels[own])
            if curve is not None:
                points[list(indices)] = curve
                found += 1
        return (points / self.size).astype(np.float32), self._agreement(points) * found / len(GROUPS)

    def _agreement(self, points: np.ndarray) -> float:
        again = draw(points[None] / self.size, self.size)[0].astype(np.float32) / 255
        blur = self.stroke * 0.7
        a, b = cv2.GaussianBlur(again, None, blur), cv2.GaussianBlur(self.layers, None, blur)
        return float(2 * (a * b).sum() / max((a * a).sum() + (b * b).sum(), 1e-6))

    def _fit_template(self, pixels: np.ndarray, channels: np.ndarray) -> np.ndarray:
        """MEAN_FACE, turned and scaled to the ink: iterated closest points within each layer, from three rolls."""
        step = max(1, len(pixels) // 250)
        pixels, channels = pixels[::step], channels[::step]
        faces = []
        for roll in np.radians((0.0, -25.0, 25.0)):
            turn = np.array([[np.cos(roll), -np.sin(roll)], [np.sin(roll), np.cos(roll)]])
            low, high = np.percentile(pixels @ turn, (2, 98), axis=0)
            top, height = MEAN_FACE[:, 1].min(), np.ptp(MEAN_FACE[:, 1])
            scale = (high - low)[1] / height
            faces.append((MEAN_FACE[:, :2] * scale + ((low + high)[0] / 2, low[1] - top * scale)) @ turn.T)
        fits = [self._closest_points(face, pixels, channels, rounds=3) for face in faces]
        face, _ = min(fits, key=lambda fit: fit[1])
        return self._closest_points(face, pixels, channels, rounds=6)[0]

    def _closest_points(
        self, face: np.ndarray, pixels: np.ndarray, channels: np.ndarray, rounds: int
    ) -> tuple[np.ndarray, float]:
        """The face moved onto the ink, and the mean squared distance before the last move."""
        distance = np.zeros(1)
        for _ in range(rounds):
            distance = _squared_distances(pixels, channels, face)
            model = _MEAN_FACE_1[distance.argmin(1)]
            # Depth is held back a little: it is only seen through what yaw and pitch do to the outline.
            normal = model.T @ model + np.diag([1e-6, 1e-6, 0.01 * len(model), 1e-6])
            face = _MEAN_FACE_1 @ np.linalg.solve(normal, model.T @ pixels)
        return face, float(distance.min(1).mean())

    def _labels(self, pixels: np.ndarray, channels: np.ndarray, face: np.ndarray) -> np.ndarray:
        """The group of each ink pixel: that of the nearest template point, by majority within a connected stroke."""
        labels = _GROUP_OF[_squared_distances(pixels, channels, face).argmin(1)]
        for channel in range(3):
            _, components = cv2.connectedComponents(self.ink[..., channel].astype(np.uint8), connectivity=8)
            here = np.flatnonzero(channels == channel)
            part = components[self.ink[..., channel]]
            for number in range(1, components.max() + 1):
                members = here[part == number]
                counts = np.bincount(labels[members], minlength=len(GROUPS))
                if counts.max() > 0.8 * len(members):
                    labels[members] = counts.argmax()
        return labels

    def _group_layer(
        self, rows: np.ndarray, columns: np.ndarray, channels: np.ndarray, labels: np.ndarray, number: int
    ) -> np.ndarray:
        """The group's layer with the surroundings of its own ink only, and nothing of its neighbours."""
        channel = _LAYER_OF[_GROUP_OF == number][0]
        own, other = np.zeros((2, self.size, self.size), np.uint8)
        mine = labels == number
        own[rows[mine], columns[mine]] = 1
        theirs = ~mine & (channels == channel)
        other[rows[theirs], columns[theirs]] = 1
        reach = 2 * round(1.6 * self.stroke) + 1
        near = cv2.dilate(own, np.ones((reach, reach), np.uint8)) > cv2.dilate(other, np.ones((3, 3), np.uint8))
        return self.layers[..., channel] * (near | (own > 0))

    def _strip(
        self, layer: np.ndarray, start: np.ndarray, end: np.ndarray, height: float
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ink along the line from start to end, widened by 3 strokes: (position, amount of ink across, its centre)."""
        length = max(float(np.linalg.norm(end - start)), 1.0)
        along = (end - start) / length
        across = np.array([-along[1], along[0]])
        step = self.stroke / 3
        s = np.arange(-3 * self.stroke, length + 3 * self.stroke, step, dtype=np.float32)
        n = np.arange(-height, height + step, step, dtype=np.float32)
        x, y = (start[axis] + s[None] * along[axis] + n[:, None] * across[axis] - 0.5 for axis in (0, 1))
        values = cv2.remap(layer, x.astype(np.float32), y.astype(np.float32), cv2.INTER_LINEAR, borderValue=0)
        values = cv2.GaussianBlur(values, (0, 0), 1.0)
        amount = values.sum(0) * step
        return s, amount, (values * n[:, None]).sum(0) * step / np.maximum(amount, 1e-3)

    def _ends(self, s: np.ndarray, amount: np.ndarray) -> tuple[float, float] | None:
        """Where the ink begins and ends along a strip: half a stroke's amount, less the stroke's round cap."""
        inked = np.flatnonzero(amount > 0.5 * min(self.stroke, float(np.percentile(amount, 80))))
        if len(inked) < 3:
            return None
        level = 0.5 * min(self.stroke, float(np.median(amount[inked])))
        first, last = inked[0], inked[-1]
        low = float(np.interp(level, amount[first - 1 : first + 1], s[first - 1 : first + 1])) if first else s[0]
        high = float(np.interp(-level, -amount[last : last + 2], s[last : last + 2])) if last + 1 < len(s) else s[-1]
        cap = 0.43 * self.stroke
        return (low + cap, high - cap) if high - low > 2.5 * cap else None

    def _oriented(
        self, layer: np.ndarray, start: np.ndarray, end: np.ndarray, pixels: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None:
        """A strip whose line runs from end to end of the shape, found from a rough line."""
        for last in (False, True):
            along = (end - start) / max(float(np.linalg.norm(end - start)), 1e-6)
            across = np.array([-along[1], along[0]])
            # The rough line is stretched and moved onto the ink.
            reach, off = (pixels - start) @ along, (pixels - start) @ across
            if not last:
                start, end = start + along * (reach.min() + 0.5), start + along * (reach.max() - 0.5)
                start, end = start + across * np.median(off), end + across * np.median(off)
            height = float(np.abs((pixels - start) @ across).max()) + 2 * self.stroke
            s, amount, center = self._strip(layer, start, end, height)
            ends = self._ends(s, amount)
            if ends is None:
                return None
            along = (end - start) / max(float(np.linalg.norm(end - start)), 1e-6)
            across = np.array([-along[1], along[0]])
            tips = [start + along * e + across * np.interp(e, s, center) for e in ends]
            if last:
                return s, amount, center, np.array([start, along, across]), np.array(ends)
            start, end = tips
        return None

    def _open(self, layer: np.ndarray, template: np.ndarray, pixels: np.ndarray) -> np.ndarray | None:
        strip = self._oriented(layer, template[0], template[-1], pixels)
        if strip is None:
            return None
        s, _, center, (start, along, across), ends = strip
        inside = np.linspace(*ends, 33)
        curve = start + inside[:, None] * along + np.interp(inside, s, center)[:, None] * across
        return _at_fractions(curve, _fractions(template))

    def _closed(self, layer: np.ndarray, template: np.ndarray, pixels: np.ndarray) -> np.ndarray | None:
        half = len(template) // 2
        strip = self._oriented(layer, template[0], template[half], pixels)
        if strip is None:
            return None
        s, amount, center, (start, along, across), ends = strip
        # In a turned head a corner can hide behind the lips: then it is not the shape's end.
        reach = (template - template[0]) @ (template[half] - template[0])
        where = np.interp(reach, (reach.min(), reach.max()), ends)
        upper, lower = center - amount / 2, center + amount / 2
        # A sloping edge's stroke is thicker, measured straight across.
        rise = [np.sqrt(1 + np.clip(np.gradient(edge, s), -1, 1) ** 2) for edge in (upper, lower)]
        upper, lower = upper + rise[0] * self.stroke / 2, lower - rise[1] * self.stroke / 2
        middle = (upper + lower) / 2
        upper, lower = np.minimum(upper, middle), np.maximum(lower, middle)
        offset = np.empty(len(template))
        offset[1:half] = np.interp(where[1:half], s, upper)
        offset[half + 1 :] = np.interp(where[half + 1 :], s, lower)
        offset[[0, half]] = np.interp(where[[0, half]], s, center)
        return start + where[:, None] * along + offset[:, None] * across

    def _jaw(self, layer: np.ndarray, template: np.ndarray, pixels: np.ndarray) -> np.ndarray | None:
        """The jaw in polar coordinates around the middle of its hull, from the top over the chin."""
        hull = cv2.convexHull(pixels.astype(np.float32))
        moments = cv2.moments(hull)
        if moments["m00"] < self.stroke**2:
            return None
        middle = np.array([moments["m10"], moments["m01"]]) / moments["m00"]
        opening = (template[0] + template[-1]) / 2 - middle  # the gap of the jaw, where the angle starts and ends
        from_angle = np.arctan2(opening[1], opening[0])
        radius = float(np.linalg.norm(pixels - middle, axis=1).max()) + 2 * self.stroke
        step = self.stroke / 3
        r = np.arange(step, radius, step, dtype=np.float32)
        # From the gap against the clock (in the picture), because the jaw's first point is at its left.
        angle = from_angle - np.arange(0, 2 * np.pi, step / (0.6 * radius), dtype=np.float32)
        x, y = (middle[axis] + r[None] * f(angle)[:, None] - 0.5 for axis, f in ((0, np.cos), (1, np.sin)))
        values = cv2.remap(layer, x.astype(np.float32), y.astype(np.float32), cv2.INTER_LINEAR, borderValue=0)
        values = cv2.GaussianBlur(values, (0, 0), 1.0)
        amount = values.sum(1) * step
        center = (values * r).sum(1) * step / np.maximum(amount, 1e-3)
        inked = np.flatnonzero(amount > 0.5 * min(self.stroke, float(np.percentile(amount, 70))))
        if len(inked) < 9:
            return None
        curve = middle + center[inked, None] * np.stack([np.cos(angle[inked]), np.sin(angle[inked])], 1)
        length = np.linalg.norm(np.diff(curve, axis=0), axis=1).sum()
        cap = 0.43 * self.stroke / max(length, 1e-6)
        return _at_fractions(curve, cap + (1 - 2 * cap) * _fractions(template))


def _squared_distances(pixels: np.ndarray, channels: np.ndarray, face: np.ndarray) -> np.ndarray:
    """From each ink pixel to each of the 68 points, those of other layers being out of reach."""
    distance = (pixels**2).sum(1)[:, None] - 2 * pixels @ face.T + (face**2).sum(1)
    return distance + _OTHER_LAYER[channels]


def _fractions(curve: np.ndarray) -> np.ndarray:
    """Arc length up to each point of an open curve, the whole being 1."""
    lengths = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(curve, axis=0), axis=1))])
    return lengths / max(float(lengths[-1]), 1e-6)


def _at_fractions(curve: np.ndarray, fractions: np.ndarray) -> np.ndarray:
    """Points of an open curve at these fractions of its length."""
    lengths = _fractions(curve)
    return np.stack([np.interp(fractions, lengths, curve[:, axis]) for axis in (0, 1)], 1)
