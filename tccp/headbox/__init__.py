"""The head box: from landmarks to a steady square, from its mask to the crop, and the face pasted into the picture.

A box is (x0, y0, x1, y1) in the continuous coordinates of `tccp.landmarks`: pixel (column i, row j) covers
[i, i + 1) x [j, j + 1). Head boxes have integer corners, so a box, its mask and its crop determine each other exactly
(`crop_box_from_mask` inverts `mask_from_box`), and pasting at native size does not resample.
"""

from tccp.headbox.boxes import CENTER, SIDE, SIZE_CHANGE, head_boxes, jitter, steady_boxes, steady_size
from tccp.headbox.crops import (
    LETTERBOX_FILL,
    LITTLE_VISIBLE,
    OUTSIDE_FILL,
    SceneFit,
    crop,
    from_crop,
    inside_picture,
    mark_outside,
    to_crop,
    visible_share,
)
from tccp.headbox.masks import MASK_FILL, SURROUND_VERSION, crop_box_from_mask, mask_from_box, mask_scene, surround
from tccp.headbox.pasting import FEATHER, paste

__all__ = [
    "CENTER",
    "FEATHER",
    "LETTERBOX_FILL",
    "LITTLE_VISIBLE",
    "MASK_FILL",
    "OUTSIDE_FILL",
    "SIDE",
    "SIZE_CHANGE",
    "SURROUND_VERSION",
    "SceneFit",
    "crop",
    "crop_box_from_mask",
    "from_crop",
    "head_boxes",
    "inside_picture",
    "jitter",
    "mark_outside",
    "mask_from_box",
    "mask_scene",
    "paste",
    "steady_boxes",
    "steady_size",
    "surround",
    "to_crop",
    "visible_share",
]
