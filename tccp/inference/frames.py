"""One frame before and after generation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, UInt8


@dataclass(frozen=True)
class SceneFrame:
    """One frame of the film to be.

    index: of the film to be, at 25 fps. picture: the scene's. box: the head box x0 y0 x1 y1 in its pixels, None where
    the person is absent. starts_shot: whether a cut lies before it.
    """

    index: int
    picture: UInt8[np.ndarray, "h w 3"]
    box: Float32[np.ndarray, "4"] | None
    starts_shot: bool


@dataclass(frozen=True)
class GeneratedFrame:
    """A finished frame. Where the person is absent, `picture` is the scene's own and the rest is None.

    picture: RGB, the scene with the generated head in it. masked_scene, landmark_picture and face are square pictures
    as the networks see and make them (s = picture_px). points: 68 landmarks in 0..1 of `box`, NaN where none could be
    read; confidence: of the reading, 0..1. Landmarks are None with the one-stage networks.
    """

    index: int
    picture: UInt8[np.ndarray, "h w 3"]
    box: Float32[np.ndarray, "4"] | None = None
    masked_scene: UInt8[np.ndarray, "s s 3"] | None = None
    landmark_picture: UInt8[np.ndarray, "s s 3"] | None = None
    points: Float32[np.ndarray, "68 2"] | None = None
    confidence: float | None = None
    face: UInt8[np.ndarray, "s s 3"] | None = None
