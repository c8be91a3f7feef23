"""68 points read back from a landmark picture."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Float32, UInt8

from tccp.landmarks.drawing import FILLED, LAYERS, draw, stroke_px
from tccp.landmarks.geometry import GROUPS, MEAN_FACE, NUM_POINTS


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
_LAYER_OF_GROUP = [next(channel for channel, groups in enumerate(LAYERS) if name in groups) for name in GROUPS]
_LAYER_OF = np.array(_LAYER_OF_GROUP)[_GROUP_OF]
_READING_PX = 128
_INK = 0.2  # amount of colour from which a pixel is taken for a stroke
_OTHER_LAYER = np.where(np.arange(len(LAYERS))[:, None] == _LAYER_OF, 0, 1e9)
_MEAN_FACE_1 = np.column_stack([MEAN_FACE, np.ones(NUM_POINTS)])


@dataclass(frozen=True)
class _Region:
    """Where the ink of one group is."""

    channel: int
    pixels: np.ndarray  # centres of its ink
    surroundings: np.ndarray  # mask of the picture: what is measured


@dataclass(frozen=True)
class _Strip:
    """Ink measured across a line: at position s along it, the amount, in pixels of full colour, and its centre."""

    start: np.ndarray
    along: np.ndarray
    across: np.ndarray
    s: np.ndarray
    amount: np.ndarray
    center: np.ndarray
    ends: np.ndarray  # positions where the shape begins and ends

    def at(self, s: np.ndarray, offset: np.ndarray) -> np.ndarray:
        """The points of the picture at positions along, and offsets across, the line."""
        return self.start + s[:, None] * self.along + offset[:, None] * self.across

    def positions(self, template: np.ndarray, stroke: float) -> np.ndarray:
        """Positions of a closed shape's points: spaced as the template's, its centre of area moved onto this one's.

        In a turned head lips that bulge less or more than the mean face's sit elsewhere between their ends. The less
        area there is beyond the mere stroke, the less it says.
        """
        toward = template[len(template) // 2] - template[0]
        reach = (template - template[0]) @ toward
        # In a turned head a corner can hide behind the lips: then it is not the shape's end.
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
        regions = self._regions(rows, columns, channels, labels, face)
        points, found = self._measure(self.layers, face, regions)
        # Blur and corners pull the measures aside. By how much, the same measures of known points, drawn alike, tell.
        again = self._drawn_alike(points)
        pull = self._measure(again, face, regions)[0] - points
        points = points - np.clip(pull, -self.stroke, self.stroke)
        agreement = float(2 * (again * self.layers).sum() / max((again**2).sum() + (self.layers**2).sum(), 1e-6))
        return (points / self.size).astype(np.float32), agreement * found / len(GROUPS)

    def _measure(self, layers: np.ndarray, face: np.ndarray, regions: list[_Region | None]) -> tuple[np.ndarray, int]:
        """The points of every group that is there, the fitted template's elsewhere; and how many groups are there."""
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
        # The outer lip's corners lie beside the inner lip's, which stay sharp in a wide open or turned-away mouth.
        points[[48, 54]] = points[[60, 64]] + face[[48, 54]] - face[[60, 64]]
        return points, found

    def _drawn_alike(self, points: np.ndarray) -> np.ndarray:
        """The points drawn anew, as blurred as this picture: of the blurs tried, the one that comes closest to it."""
        sharp = draw(points[None] / self.size, self.size)[0].astype(np.float32) / 255
        blurs = [0.0, 0.3, 0.55, 0.9]
        drawn = [sharp if not b else cv2.GaussianBlur(sharp, (0, 0), b * self.stroke) for b in blurs]
        return min(drawn, key=lambda layers: float(((layers - self.layers) ** 2).sum()))

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
                if counts.max() > 0.6 * len(members):
                    labels[members] = counts.argmax()
        return labels

    def _regions(
        self, rows: np.ndarray, columns: np.ndarray, channels: np.ndarray, labels: np.ndarray, face: np.ndarray
    ) -> list[_Region | None]:
        """Of each group its ink and the surroundings that are nearer to it than to its neighbours."""
        regions: list[_Region | None] = []
        reach = 2 * round(1.6 * self.stroke) + 1
        for number, (channel, indices) in enumerate(zip(_LAYER_OF_GROUP, GROUPS.values(), strict=True)):
            mine = labels == number
            length = np.linalg.norm(np.diff(face[list(indices)], axis=0), axis=1).sum()
            if mine.sum() < self.stroke * max(2, 0.35 * length):  # crumbs of a neighbour
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
        """The ink measured across the line from start to end and a little beyond; None if there is none."""
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
        """Where the ink begins and ends along a strip: half a stroke's amount, less the stroke's round cap."""
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
        """A strip whose line runs from end to end of the shape, from the template's rough line."""
        along = (end - start) / max(float(np.linalg.norm(end - start)), 1e-6)
        across = np.array([-along[1], along[0]])
        reach, off = (pixels - start) @ along, (pixels - start) @ across
        start = start + across * _quantile(off, 0.5)
        rough = self._strip(layer, start + along * (reach.min() + 0.5), start + along * (reach.max() - 0.5), pixels)
        if rough is None:
            return None
        # An open mouth, turned away, is taller than wide: then its ends say little about where its line runs.
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
        # A sloping edge's stroke is thicker, measured straight across.
        rise = [np.sqrt(1 + np.clip(np.gradient(edge, strip.s), -1, 1) ** 2) for edge in (upper, lower)]
        upper, lower = upper + rise[0] * self.stroke / 2, lower - rise[1] * self.stroke / 2
        middle = (upper + lower) / 2
        upper, lower = np.minimum(upper, middle), np.maximum(lower, middle)
        offset = np.interp(where, strip.s, strip.center)
        offset[1:half] = np.interp(where[1:half], strip.s, upper)
        offset[half + 1 :] = np.interp(where[half + 1 :], strip.s, lower)
        return strip.at(where, offset)

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
        inked = np.flatnonzero(amount > 0.5 * min(self.stroke, _quantile(amount, 0.7)))
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


def _quantile(values: np.ndarray, share: float) -> float:
    """np.quantile without its overhead, which on some dozens of numbers is all there is."""
    return float(np.sort(values)[int(share * (len(values) - 1))])


def _fractions(curve: np.ndarray) -> np.ndarray:
    """Arc length up to each point of an open curve, the whole being 1."""
    lengths = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(curve, axis=0), axis=1))])
    return lengths / max(float(lengths[-1]), 1e-6)


def _at_fractions(curve: np.ndarray, fractions: np.ndarray) -> np.ndarray:
    """Points of an open curve at these fractions of its length."""
    lengths = _fractions(curve)
    return np.stack([np.interp(fractions, lengths, curve[:, axis]) for axis in (0, 1)], 1)
