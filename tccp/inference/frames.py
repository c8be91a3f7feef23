"""A frame before and after generation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, UInt8


@dataclass(frozen=True)
class SceneFrame:
    """A frame to generate.

    index: frame number in the generated film, at 25 fps. picture: the frame of the scene. box: the head box x0 y0 x1 y1
    in pixels of `picture`; None if the person is absent. starts_shot: whether a new shot starts at this frame. reason:
    why there is no box (`tccp.inference.head_tracks.Reason`).
    """

    index: int
    picture: UInt8[np.ndarray, "h w 3"]
    box: Float32[np.ndarray, "4"] | None
    starts_shot: bool
    reason: str | None = None


@dataclass(frozen=True)
class GeneratedFrame:
    """A finished frame. If it is passed through, `picture` is the frame of the scene, `reason` says why, and the other
    fields are None.

    picture: RGB, the scene with the generated head in it. masked_scene, landmark_picture and face are the square
    inputs and outputs of the networks (s = picture_px). points: 68 landmarks in 0..1 of `box`, NaN if none could be
    read. confidence: of the landmark reading, 0..1. Landmark fields are None with the one-stage networks. reason: one
    of `tccp.inference.coverage.REASONS`.
    """

    index: int
    picture: UInt8[np.ndarray, "h w 3"]
    box: Float32[np.ndarray, "4"] | None = None
    masked_scene: UInt8[np.ndarray, "s s 3"] | None = None
    landmark_picture: UInt8[np.ndarray, "s s 3"] | None = None
    points: Float32[np.ndarray, "68 2"] | None = None
    confidence: float | None = None
    face: UInt8[np.ndarray, "s s 3"] | None = None
    reason: str | None = None
