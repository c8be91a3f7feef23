"""scikit-image's cascade, which returns boxes and needs no weights file."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import cv2
import numpy as np
from jaxtyping import UInt8

from tccp.faces.face import Face

_LBP_PX = 320  # longer side of the picture for the cascade; larger pictures take longer and give more false positives


class LbpBackend:
    """scikit-image's local-binary-pattern cascade: boxes of frontal faces, with occasional false positives."""

    name = "lbp"
    works_beside_others = False

    def __init__(self) -> None:
        from skimage import data
        from skimage.feature import Cascade

        self.key = f"lbp scikit-image {importlib.metadata.version('scikit-image')}"
        self._cascade: Any = Cascade(data.lbp_frontal_face_cascade_filename())

    def detect(self, frame: UInt8[np.ndarray, "h w 3"]) -> list[Face]:
        scale = min(1.0, _LBP_PX / max(frame.shape[:2]))
        small = cv2.resize(frame, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        smallest = max(24, min(small.shape[:2]) // 10)
        found = self._cascade.detect_multi_scale(
            img=np.ascontiguousarray(small),
            scale_factor=1.2,
            step_ratio=1,
            min_size=(smallest, smallest),
            max_size=(min(small.shape[:2]), min(small.shape[:2])),
        )
        faces = []
        for hit in found:
            x, y, width, height = (hit[key] / scale for key in ("c", "r", "width", "height"))
            faces.append(Face(np.array([x, y, x + width, y + height], np.float32), None, 0.5))
        return sorted(faces, key=lambda face: -face.side)

    def close(self) -> None:
        pass
