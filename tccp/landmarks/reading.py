"""Reads 68 points from a landmark picture."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Float32, UInt8

from tccp.landmarks.drawing import FILLED, LAYERS, draw, stroke_px
from tccp.landmarks.geometry import GROUPS, MEAN_FACE, NUM_POINTS


def read(pictures: UInt8[np.ndarray, "f h w 3"]) -> tuple[Float32[np.ndarray, "f 68 2"], Float32[np.ndarray, "f"]]:
    """The 68 points of landmark pictures, in crop coordinates, and a confidence per picture (0..1).

    The inverse of `draw`, for pictures that an auto-encoder has blurred and a sampler has disturbed. Measures amounts
    of colour and their centres instead of edges. Along a curve without corners, points are spaced as on MEAN_FACE in
    this head's pose. The other groups determine the position of a missing group. The confidence is the agreement of the
    picture with a drawing of the points found, times the share of groups found.
    A picture without a face gives NaN points and confidence 0.
    """
    points = np.full((len(pictures), NUM_POINTS, 2), np.nan, np.float32)
    confidence = np.zeros(len(pictures), np.float32)
    for index, picture in enumerate(pictures):
        if len(picture) > _READING_PX:  # larger pictures have wider strokes, so they hold no more detail
            picture = cv2.resize(picture, (_READING_PX, _READING_PX), interpolation=cv2.INTER_AREA)
        found = _Reading(picture, stroke_px(pictures.shape[1]) * len(picture) / pictures.shape[1]).points()
        if found is not None:
            points[index], confidence[index] = found
    return points, confidence


_GROUP_OF = np.empty(NUM_POINTS, np.int64)
for _number, _indices in enumerate(GROUPS.values()):
    _GROUP_OF[list(_indices)] = _number
_LAYER_OF_GROUP = [next(channel for channel, groups in enumerate(LAYERS) if name in groups) for name in GROUPS]
_LAYER_OF = np.array(_LAYER_OF_GROUP)[_GROUP_OF]
_READING_PX = 128
_INK = 0.2  # a pixel with at least this amount of colour belongs to a stroke
_OTHER_LAYER = np.where(np.arange(len(LAYERS))[:, None] == _LAYER_OF, 0, 1e9)
_MEAN_FACE_1 = np.column_stack([MEAN_FACE, np.ones(NUM_POINTS)])


@dataclass(frozen=True)
class _Region:
    """The part of the picture with the ink of one group."""

    channel: int
    pixels: np.ndarray  # centres of the ink pixels
    surroundings: np.ndarray  # mask of the picture: the pixels to measure


@dataclass(frozen=True)
class _Strip:
    """Ink measured across a line: its amount in pixels of full colour, and its centre, at each position s along it."""

    start: np.ndarray
    along: np.ndarray
    across: np.ndarray
    s: np.ndarray
    amount: np.ndarray
    center: np.ndarray
    ends: np.ndarray  # positions of the shape's two ends

    def at(self, s: np.ndarray, offset: np.ndarray) -> np.ndarray:
        """Picture coordinates of points at positions s along the line and offsets across it."""
        return self.start + s[:, None] * self.along + offset[:, None] * self.across

    def positions(self, template: np.ndarray, stroke: float) -> np.ndarray:
        """Positions of a closed shape's points, spaced as in the template and shifted to this shape's centre of area.

        In a turned head, lips that bulge less or more than those of the mean face lie elsewhere between their ends. The
        shift is smaller if there is little area beyond the stroke itself, because the centre is then uncertain.
        """
        toward = template[len(template) // 2] - template[0]
        reach = (template - template[0]) @ toward
        # In a turned head a corner can hide behind the lips. Then it is not the end of the shape.
        outer = (reach.min(), reach.max())
        positions = np.interp(reach, outer, self.ends)
        excess = np.maximum(self.amount - stroke, 0)
        area = float(excess.sum()) * float(self.s[1] - self.s[0])
        moments = cv2.moments(template.astype(np.float32)[:, None])
        if area <= 0 or abs(moments["m00"]) < 1e-3:
            return positions
        length = float(np.ptp(self.ends))
        inner = self.ends + np.array([0.15, -0.15]) * length
        middle = np.array([moments["m10"], moments["m01"]]) / moments["m00"]
        expected = np.clip(np.interp((middle - template[0]) @ toward, outer, self.ends), *inner)
        measured = np.clip(float((excess * self.s).sum() / excess.sum()), *inner)
        moved = expected + area / (area + 0.02 * length**2) * (measured - expected)
        return np.interp(positions, (self.ends[0], expected, self.ends[1]), (self.ends[0], moved, self.ends[1]))


class _Reading:
    """Reads the points of one picture. Lengths are in pixels, coordinates are continuous."""

    def __init__(self, picture: np.ndarray, stroke: float) -> None:
        self.size, self.stroke = len(picture), stroke
        layers = picture.astype(np.float32) / 255
        self.layers = np.maximum(layers - np.median(layers, (0, 1)), 0)
        # The local threshold separates blurred strokes that lie side by side.
        reach = 2 * int(np.ceil(stroke)) + 1
        self.ink = self.layers > np.maximum(_INK, 0.5 * cv2.dilate(self.layers, np.ones((reach, reach), np.uint8)))

    def points(self) -> tuple[np.ndarray, float] | None:
        rows, columns, channels = np.nonzero(self.ink)
        if len(rows) < 4 * self.stroke**2:
            return None
        pixels = np.stack([columns, rows], 1) + 0.5
        face = self._fit_template(pixels, channels)
        labels = self._labels(pixels, channels, face)
        regions = self._regions(rows, columns, channels, labels, face)
        points, found = self._measure(self.layers, face, regions)
        # Blur and corners bias the measured points. Measuring a drawing of known points with equal blur gives the bias.
        drawn = self._drawn_with_equal_blur(points)
        bias = self._measure(drawn, face, regions)[0] - points
        points = points - np.clip(bias, -self.stroke, self.stroke)
        agreement = float(2 * (drawn * self.layers).sum() / max((drawn**2).sum() + (self.layers**2).sum(), 1e-6))
        return (points / self.size).astype(np.float32), agreement * found / len(GROUPS)

    def _measure(self, layers: np.ndarray, face: np.ndarray, regions: list[_Region | None]) -> tuple[np.ndarray, int]:
        """The points of every group found, with the fitted template's points for the others; and the number found."""
        points, found = face.copy(), 0
        for (name, indices), region in zip(GROUPS.items(), regions, strict=True):
            if region is None:
                continue
            layer = layers[..., region.channel] * region.surroundings
            measure = self._jaw if name == "jaw" else self._closed if name in FILLED else self._open
            curve = measure(layer, face[list(indices)], region.pixels)
            if curve is not None:
                points[list(indices)] = curve
                found += 1
        # Place the outer lip's corners relative to the inner lip's, which stay sharp in an open or turned mouth.
        points[[48, 54]] = points[[60, 64]] + face[[48, 54]] - face[[60, 64]]
        return points, found

    def _drawn_with_equal_blur(self, points: np.ndarray) -> np.ndarray:
        """A drawing of the points, with the blur (of four tried) that comes closest to this picture."""
        sharp = draw(points[None] / self.size, self.size)[0].astype(np.float32) / 255
        blurs = [0.0, 0.3, 0.55, 0.9]
        drawn = [sharp if not b else cv2.GaussianBlur(sharp, (0, 0), b * self.stroke) for b in blurs]
        return min(drawn, key=lambda layers: float(((layers - self.layers) ** 2).sum()))

    def _fit_template(self, pixels: np.ndarray, channels: np.ndarray) -> np.ndarray:
        """Fits MEAN_FACE to the ink by iterated closest points within each layer, starting from three roll angles."""
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
        """Moves the face onto the ink. Also returns the mean squared distance before the last move."""
        distance = np.zeros(1)
        for _ in range(rounds):
            distance = _squared_distances(pixels, channels, face)
            model = _MEAN_FACE_1[distance.argmin(1)]
            # Depth gets some regularisation, because only the effect of yaw and pitch on the outline shows it.
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
                if counts.max() > 0.6 * len(members):
                    labels[members] = counts.argmax()
        return labels

    def _regions(
        self, rows: np.ndarray, columns: np.ndarray, channels: np.ndarray, labels: np.ndarray, face: np.ndarray
    ) -> list[_Region | None]:
        """The ink of each group, and its surroundings without the pixels next to other groups."""
        regions: list[_Region | None] = []
        reach = 2 * round(1.6 * self.stroke) + 1
        for number, (channel, indices) in enumerate(zip(_LAYER_OF_GROUP, GROUPS.values(), strict=True)):
            mine = labels == number
            length = np.linalg.norm(np.diff(face[list(indices)], axis=0), axis=1).sum()
            if mine.sum() < self.stroke * max(2, 0.35 * length):  # too little ink: it belongs to a neighbouring group
                regions.append(None)
                continue
            own, other = np.zeros((2, self.size, self.size), np.uint8)
            own[rows[mine], columns[mine]] = 1
            theirs = ~mine & (channels == channel)
            other[rows[theirs], columns[theirs]] = 1
            near = cv2.dilate(own, np.ones((reach, reach), np.uint8)) > cv2.dilate(other, np.ones((3, 3), np.uint8))
            pixels = np.stack([columns[mine], rows[mine]], 1) + 0.5
            regions.append(_Region(int(channel), pixels, near | (own > 0)))
        return regions

    def _strip(self, layer: np.ndarray, start: np.ndarray, end: np.ndarray, pixels: np.ndarray) -> _Strip | None:
        """Measures the ink across the line from start to end and a little beyond. None if there is none."""
        length = max(float(np.linalg.norm(end - start)), 1.0)
        along = (end - start) / length
        across = np.array([-along[1], along[0]])
        height = float(np.abs((pixels - start) @ across).max()) + 2 * self.stroke
        step = self.stroke / 3
        s = np.arange(-3 * self.stroke, length + 3 * self.stroke, step, dtype=np.float32)
        n = np.arange(-height, height + step, step, dtype=np.float32)
        x, y = (start[axis] + s[None] * along[axis] + n[:, None] * across[axis] - 0.5 for axis in (0, 1))
        values = cv2.remap(layer, x.astype(np.float32), y.astype(np.float32), cv2.INTER_LINEAR, borderValue=0)
        values = cv2.GaussianBlur(values, (0, 0), 1.0)
        amount = values.sum(0) * step
        center = (values * n[:, None]).sum(0) * step / np.maximum(amount, 1e-3)
        ends = self._ends(s, amount)
        return None if ends is None else _Strip(start, along, across, s, amount, center, np.array(ends))

    def _ends(self, s: np.ndarray, amount: np.ndarray) -> tuple[float, float] | None:
        """The ends of the ink along a strip: where it falls to half a stroke, minus the stroke's round cap."""
        inked = np.flatnonzero(amount > 0.5 * min(self.stroke, _quantile(amount, 0.8)))
        if len(inked) < 3:
            return None
        level = 0.5 * min(self.stroke, _quantile(amount[inked], 0.5))
        first, last = inked[0], inked[-1]
        low, high = float(s[first]), float(s[last])
        if first > 0:
            low = float(np.interp(level, amount[first - 1 : first + 1], s[first - 1 : first + 1]))
        if last + 1 < len(s):
            high = float(np.interp(-level, -amount[last : last + 2], s[last : last + 2]))
        cap = 0.43 * self.stroke
        return (low + cap, high - cap) if high - low > 2.5 * cap else None

    def _along_shape(self, layer: np.ndarray, start: np.ndarray, end: np.ndarray, pixels: np.ndarray) -> _Strip | None:
        """A strip along the line between the shape's two ends, found from the template's approximate line."""
        along = (end - start) / max(float(np.linalg.norm(end - start)), 1e-6)
        across = np.array([-along[1], along[0]])
        reach, off = (pixels - start) @ along, (pixels - start) @ across
        start = start + across * _quantile(off, 0.5)
        rough = self._strip(layer, start + along * (reach.min() + 0.5), start + along * (reach.max() - 0.5), pixels)
        if rough is None:
            return None
        # An open mouth in a turned head is taller than wide. Its ends then hardly determine its direction.
        off = np.interp(rough.ends, rough.s, rough.center)
        off = off.mean() + (off - off.mean()) * np.clip(1.6 - 1.2 * rough.amount.max() / np.ptp(rough.ends), 0, 1)
        first, last = rough.at(rough.ends, off)
        return self._strip(layer, first, last, pixels)

    def _open(self, layer: np.ndarray, template: np.ndarray, pixels: np.ndarray) -> np.ndarray | None:
        strip = self._along_shape(layer, template[0], template[-1], pixels)
        if strip is None:
            return None
        inside = np.linspace(float(strip.ends[0]), float(strip.ends[1]), 33)
        return _at_fractions(strip.at(inside, np.interp(inside, strip.s, strip.center)), _fractions(template))

    def _closed(self, layer: np.ndarray, template: np.ndarray, pixels: np.ndarray) -> np.ndarray | None:
        half = len(template) // 2
        strip = self._along_shape(layer, template[0], template[half], pixels)
        if strip is None:
            return None
        where = strip.positions(template, self.stroke)
        upper, lower = strip.center - strip.amount / 2, strip.center + strip.amount / 2
        # The stroke of a sloping edge is thicker when measured straight across.
        rise = [np.sqrt(1 + np.clip(np.gradient(edge, strip.s), -1, 1) ** 2) for edge in (upper, lower)]
        upper, lower = upper + rise[0] * self.stroke / 2, lower - rise[1] * self.stroke / 2
        middle = (upper + lower) / 2
        upper, lower = np.minimum(upper, middle), np.maximum(lower, middle)
        offset = np.interp(where, strip.s, strip.center)
        offset[1:half] = np.interp(where[1:half], strip.s, upper)
        offset[half + 1 :] = np.interp(where[half + 1 :], strip.s, lower)
        return strip.at(where, offset)

    def _jaw(self, layer: np.ndarray, template: np.ndarray, pixels: np.ndarray) -> np.ndarray | None:
        """Measures the jaw in polar coordinates around the centre of its hull, from the left end over the chin."""
        hull = cv2.convexHull(pixels.astype(np.float32))
        moments = cv2.moments(hull)
        if moments["m00"] < self.stroke**2:
            return None
        middle = np.array([moments["m10"], moments["m01"]]) / moments["m00"]
        opening = (template[0] + template[-1]) / 2 - middle  # the gap of the jaw: the angle starts and ends there
        from_angle = np.arctan2(opening[1], opening[0])
        radius = float(np.linalg.norm(pixels - middle, axis=1).max()) + 2 * self.stroke
        step = self.stroke / 3
        r = np.arange(step, radius, step, dtype=np.float32)
        # Counter-clockwise in the picture from the gap, because the jaw's first point is on the left.
        angle = from_angle - np.arange(0, 2 * np.pi, step / (0.6 * radius), dtype=np.float32)
        x, y = (middle[axis] + r[None] * f(angle)[:, None] - 0.5 for axis, f in ((0, np.cos), (1, np.sin)))
        values = cv2.remap(layer, x.astype(np.float32), y.astype(np.float32), cv2.INTER_LINEAR, borderValue=0)
        values = cv2.GaussianBlur(values, (0, 0), 1.0)
        amount = values.sum(1) * step
        center = (values * r).sum(1) * step / np.maximum(amount, 1e-3)
        inked = np.flatnonzero(amount > 0.5 * min(self.stroke, _quantile(amount, 0.7)))
        if len(inked) < 9:
            return None
        curve = middle + center[inked, None] * np.stack([np.cos(angle[inked]), np.sin(angle[inked])], 1)
        length = np.linalg.norm(np.diff(curve, axis=0), axis=1).sum()
        cap = 0.43 * self.stroke / max(length, 1e-6)
        return _at_fractions(curve, cap + (1 - 2 * cap) * _fractions(template))


def _squared_distances(pixels: np.ndarray, channels: np.ndarray, face: np.ndarray) -> np.ndarray:
    """Squared distance from each ink pixel to each of the 68 points; very large for points of other layers."""
    distance = (pixels**2).sum(1)[:, None] - 2 * pixels @ face.T + (face**2).sum(1)
    return distance + _OTHER_LAYER[channels]


def _quantile(values: np.ndarray, share: float) -> float:
    """Like np.quantile without its overhead, which dominates for arrays of some dozens of numbers."""
    return float(np.sort(values)[int(share * (len(values) - 1))])


def _fractions(curve: np.ndarray) -> np.ndarray:
    """Arc length up to each point of an open curve, as a fraction of the whole."""
    lengths = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(curve, axis=0), axis=1))])
    return lengths / max(float(lengths[-1]), 1e-6)


def _at_fractions(curve: np.ndarray, fractions: np.ndarray) -> np.ndarray:
    """Points of an open curve at the given fractions of its length."""
    lengths = _fractions(curve)
    return np.stack([np.interp(fractions, lengths, curve[:, axis]) for axis in (0, 1)], 1)
