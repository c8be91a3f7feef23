"""Numbers by which clips are filtered, none of which needs a network."""

from __future__ import annotations

import cv2
import numpy as np
from jaxtyping import Float32, UInt8

from tccp.landmarks import yaw_deg


def blur(picture: UInt8[np.ndarray, "h w 3"]) -> float:
    """0 sharp .. 1 blurred, after Crete et al. 2007: how little of its contrast one more blur takes away."""
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY).astype(np.float32)
    shares = []
    for axis, kernel in ((0, (1, 9)), (1, (9, 1))):
        before = np.abs(np.diff(grey, axis=axis))
        after = np.abs(np.diff(cv2.blur(grey, kernel), axis=axis))
        total = float(before.sum())
        shares.append(1 - float(np.maximum(before - after, 0).sum()) / total if total else 1.0)
    return max(shares)


def brightness(picture: UInt8[np.ndarray, "h w 3"]) -> float:
    """Mean luma, 0..1."""
    return float(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY).mean()) / 255


def face_px(landmarks_px: Float32[np.ndarray, "f 68 2"]) -> float:
    """Median height of the face from the brows to the chin, in the points' pixels."""
    return float(np.median(landmarks_px[..., 1].max(axis=1) - landmarks_px[..., 1].min(axis=1)))


def median_yaw_deg(landmarks_px: Float32[np.ndarray, "f 68 2"]) -> float:
    """Median head yaw of a clip, sign as in `tccp.landmarks.yaw_deg`."""
    return float(np.median(yaw_deg(landmarks_px)))
