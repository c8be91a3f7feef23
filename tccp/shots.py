"""Where a film cuts from one shot to the next: PySceneDetect's adaptive detector, fed one frame at a time."""

from __future__ import annotations

import cv2
import numpy as np
from jaxtyping import UInt8

from tccp.config import FPS, TccpError

_ANALYSIS_PX = 192  # longer side of the picture the detector sees: cuts change the whole picture


class CutFinder:
    """Finds cuts in a stream of frames of the 25 fps clock, in constant memory.

    Adaptive: a change must stand out against its neighbours, so that a fast pan is no cut. It therefore answers a few
    frames late.
    """

    def __init__(self) -> None:
        try:
            from scenedetect import FrameTimecode
            from scenedetect.detectors import AdaptiveDetector
        except ImportError:
            raise TccpError("shots need scenedetect: pip install -c constraints.txt -e '.[preprocess]'") from None
        self._timecode = FrameTimecode
        self._detector = AdaptiveDetector(min_scene_len=2)
        self._next = 0

    def add(self, frame: UInt8[np.ndarray, "h w 3"]) -> list[int]:
        """Takes the next frame; returns the frames, at most a few back, that are now known to begin a shot."""
        scale = _ANALYSIS_PX / max(frame.shape[:2])
        if scale < 1:
            frame = np.asarray(cv2.resize(frame, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA), np.uint8)
        bgr = cv2.cvtColor(frame, cv2.COLOR_RGB2BGR)
        cuts = self._detector.process_frame(self._timecode(self._next, fps=float(FPS)), bgr)
        self._next += 1
        return [cut.frame_num for cut in cuts]
