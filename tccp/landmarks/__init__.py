"""68 facial points: their geometry, drawing them as a picture, and reading them from a picture.

Points are in iBUG order (jaw, brows, nose, eyes, lips: `GROUPS`). Coordinates are continuous: a picture's left edge is
x = 0, its top edge y = 0, and pixel (column i, row j) covers [i, i + 1) x [j, j + 1). Crop coordinates are the same,
divided by the picture's side. Left and right are those of the picture, not of the person.
"""

from tccp.landmarks.drawing import DRAWING_VERSION, LAYERS, draw, stroke_px
from tccp.landmarks.geometry import (
    GROUPS,
    MEAN_FACE,
    MIRROR,
    NUM_POINTS,
    RIGID,
    HeadPose,
    head_pose,
    mouth_opening,
    mouth_width,
    normalise,
    smooth,
    smooth_over_time,
    yaw_deg,
)
from tccp.landmarks.reading import read

__all__ = [
    "DRAWING_VERSION",
    "GROUPS",
    "LAYERS",
    "MEAN_FACE",
    "MIRROR",
    "NUM_POINTS",
    "RIGID",
    "HeadPose",
    "draw",
    "head_pose",
    "mouth_opening",
    "mouth_width",
    "normalise",
    "read",
    "smooth",
    "smooth_over_time",
    "stroke_px",
    "yaw_deg",
]
