"""Paints filled shapes on a canvas of twice the scene's resolution, for smooth edges and sub-pixel positions.

Coordinates are scene pixels, continuous: pixel i covers i..i+1.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from jaxtyping import Float, Float64, UInt8

from tccp.roundtable.people import Colour

SUPERSAMPLING = 2
_ROUND_FROM_PX = 8.0  # canvas pixels; the joints of thinner lines are not visible
_SHIFT = 4  # fractional bits of cv2's fixed-point coordinates


class Canvas:
    """A picture to paint on. `picture()` returns it at scene resolution."""

    def __init__(self, ground: UInt8[np.ndarray, "H W 3"]) -> None:
        """ground: the background at SUPERSAMPLING times the scene's resolution; it is painted over in place."""
        self._pixels = ground

    def fill(self, points: Float[np.ndarray, "n 2"], colour: Colour) -> None:
        cv2.fillPoly(self._pixels, [_fixed(points)], colour, cv2.LINE_AA, _SHIFT)

    def fill_hull(self, points: Float[np.ndarray, "n 2"], colour: Colour) -> None:
        """Fills the convex hull of the points."""
        cv2.fillConvexPoly(self._pixels, cv2.convexHull(_fixed(points)), colour, cv2.LINE_AA, _SHIFT)

    def line(self, points: Float[np.ndarray, "n 2"], colour: Colour, width: float) -> None:
        """Paints an open line with a sub-pixel width, which cv2's lines do not have. Wide lines have round joints."""
        along = np.diff(points, axis=0)
        along /= np.maximum(np.hypot(along[:, :1], along[:, 1:]), 1e-9)
        at_points = np.concatenate([along[:1], along[:-1] + along[1:], along[-1:]])
        # At a bend of angle a, a factor of 1 / cos(a / 2) keeps the ribbon's width. Sharp bends are cut off.
        length = np.hypot(at_points[:, :1], at_points[:, 1:])
        length[1:-1] = np.maximum(length[1:-1] ** 2 / 2, 0.5)
        side = np.stack([-at_points[:, 1], at_points[:, 0]], axis=-1) * (width / 2 / np.maximum(length, 1e-9))
        self.fill(np.concatenate([points + side, (points - side)[::-1]]), colour)
        if width * SUPERSAMPLING > _ROUND_FROM_PX:
            for point in points:
                self.disc(point, width / 2, colour)

    def disc(self, centre: Float[np.ndarray, " 2"], radius: float, colour: Colour) -> None:
        size = max(1, round(radius * SUPERSAMPLING * (1 << _SHIFT)))
        x, y = _fixed(centre[None])[0]
        cv2.circle(self._pixels, (int(x), int(y)), size, colour, cv2.FILLED, cv2.LINE_AA, _SHIFT)

    def picture(self) -> UInt8[np.ndarray, "h w 3"]:
        height, width = self._pixels.shape[:2]
        size = (width // SUPERSAMPLING, height // SUPERSAMPLING)
        return cv2.resize(self._pixels, size, interpolation=cv2.INTER_AREA)


def _fixed(points: Float[np.ndarray, "n 2"]) -> np.ndarray:
    # In cv2 a pixel's centre is an integer; here it is an integer + 0.5.
    return np.rint((points * SUPERSAMPLING - 0.5) * (1 << _SHIFT)).astype(np.int32)


def spline_matrix(num_points: int, per_span: int) -> Float64[np.ndarray, "m n"]:
    """Weights of a Catmull-Rom spline: `spline_matrix(n, k) @ points` runs through n points in k steps per span."""
    identity = np.eye(num_points)
    padded = np.concatenate([2 * identity[:1] - identity[1:2], identity, 2 * identity[-1:] - identity[-2:-1]])
    s = np.arange(per_span)[:, None] / per_span
    basis = [-s + 2 * s**2 - s**3, 2 - 5 * s**2 + 3 * s**3, s + 4 * s**2 - 3 * s**3, s**3 - s**2]
    weights = 0.5 * np.concatenate(basis, axis=1)
    spans = [weights @ padded[i : i + 4] for i in range(num_points - 1)]
    return np.concatenate([*spans, identity[-1:]])


def loop(curves: Sequence[Float[np.ndarray, "_ 2"]]) -> Float[np.ndarray, "n 2"]:
    """Joins curves end to end into one outline."""
    return np.concatenate(list(curves))
