"""Rooms: the background and the table. A room is painted once per clip; the camera moves over that picture."""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Float64, UInt8

from tccp.roundtable.canvas import SUPERSAMPLING, Canvas
from tccp.roundtable.people import Colour, shade

_Block = Callable[[float, float, float, float, Colour], None]
"""Fills a rectangle x0 y0 x1 y1, given in fractions of the room's picture."""

MARGIN = 0.12
"""Margin of the room's picture around the scene, as a fraction of the scene's size, for the movement of the camera."""


@dataclass(frozen=True)
class Room:
    """picture: at canvas resolution, with margins. table_y: the table's top as a fraction of the height, or None."""

    picture: UInt8[np.ndarray, "H W 3"]
    table_y: float | None
    table: Colour


def tint(rng: np.random.Generator, saturation: tuple[float, float], value: tuple[float, float]) -> Colour:
    """A random colour: any hue, saturation and value in these ranges."""
    r, g, b = colorsys.hsv_to_rgb(rng.random(), rng.uniform(*saturation), rng.uniform(*value))
    return round(255 * r), round(255 * g), round(255 * b)


def make_room(rng: np.random.Generator, width: int, height: int) -> Room:
    """A room for scenes of this size. It does not depend on the persons in it."""
    wall = tint(rng, (0.08, 0.4), (0.6, 0.92))
    full_width, full_height = round(width * (1 + 2 * MARGIN)), round(height * (1 + 2 * MARGIN))
    shape = (full_height * SUPERSAMPLING, full_width * SUPERSAMPLING, 3)
    left, right = rng.uniform(0.94, 1.04, 2)
    light = np.linspace(1.06, 0.9, shape[0])[:, None] * np.linspace(left, right, shape[1])
    ground = np.clip(light[..., None] * np.array(wall), 0, 255).astype(np.uint8)
    canvas = Canvas(ground)

    def block(x0: float, y0: float, x1: float, y1: float, colour: Colour) -> None:
        corners = np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])
        canvas.fill(corners * (full_width, full_height), colour)

    floor_y = rng.uniform(0.72, 0.84)
    for _ in range(int(rng.integers(2, 5))):
        _hang_on_wall(rng, block, wall)
    if rng.random() < 0.5:
        _put_shelf(rng, block, floor_y)
    block(0.0, floor_y, 1.0, 1.0, tint(rng, (0.1, 0.45), (0.3, 0.6)))
    block(0.0, floor_y - 0.025, 1.0, floor_y, shade(wall, 0.75))
    table_y = float(rng.uniform(0.86, 0.93)) if rng.random() < 0.6 else None
    return Room(picture=ground, table_y=table_y, table=tint(rng, (0.25, 0.55), (0.35, 0.7)))


def _hang_on_wall(rng: np.random.Generator, block: _Block, wall: Colour) -> None:
    """Paints a window or a framed picture."""
    x, y = rng.uniform(0.0, 0.9), rng.uniform(0.05, 0.3)
    wide, high = rng.uniform(0.08, 0.24), rng.uniform(0.14, 0.36)
    is_window = rng.random() < 0.5
    frame = (236, 234, 228) if is_window else shade(wall, 0.45)
    glass = tint(rng, (0.15, 0.4), (0.85, 1.0)) if is_window else tint(rng, (0.2, 0.6), (0.4, 0.9))
    block(x, y, x + wide, y + high, frame)
    block(x + 0.01, y + 0.013, x + wide - 0.01, y + high - 0.013, glass)
    if is_window:
        block(x + wide / 2 - 0.004, y, x + wide / 2 + 0.004, y + high, frame)
        block(x, y + high / 2 - 0.005, x + wide, y + high / 2 + 0.005, frame)
    else:
        block(x + 0.03, y + high * 0.55, x + wide - 0.03, y + high - 0.03, tint(rng, (0.2, 0.6), (0.3, 0.8)))


def _put_shelf(rng: np.random.Generator, block: _Block, floor_y: float) -> None:
    x, wide, top = rng.uniform(0.0, 0.8), rng.uniform(0.14, 0.22), rng.uniform(0.2, 0.45)
    wood = tint(rng, (0.3, 0.55), (0.3, 0.55))
    block(x, top, x + wide, floor_y, wood)
    for y in np.arange(top + 0.015, floor_y - 0.1, 0.13):
        block(x + 0.01, y, x + wide - 0.01, y + 0.11, shade(wood, 0.6))
        at = x + 0.012
        while at < x + wide - 0.035:
            thick = rng.uniform(0.012, 0.024)
            block(at, y + rng.uniform(0.01, 0.05), at + thick, y + 0.11, tint(rng, (0.2, 0.6), (0.4, 0.8)))
            at += thick + 0.002


def camera_view(
    room: Room, width: int, height: int, zoom: float, pan_px: Float64[np.ndarray, " 2"]
) -> UInt8[np.ndarray, "H W 3"]:
    """The part of the room that the camera shows: a new picture of SUPERSAMPLING times width x height."""
    full_height, full_width = room.picture.shape[:2]
    size = np.array([width, height]) * SUPERSAMPLING
    shift = size / 2 + pan_px * SUPERSAMPLING - zoom * np.array([full_width, full_height]) / 2
    view = np.array([[zoom, 0, shift[0]], [0, zoom, shift[1]]])
    shape = (int(size[0]), int(size[1]))
    return cv2.warpAffine(room.picture, view, shape, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
