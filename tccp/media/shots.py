"""Finds where shots begin in a stream of frames.

PySceneDetect's content detector proposes every frame that differs enough from the one before. The code here decides
which of them begin a shot, by comparing the frames around them: the detector's own filters handle neither shots of two
frames, flashes nor dissolves, and their result depends on the whole film so far.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Int16, UInt8

from tccp.clock import FPS
from tccp.errors import TccpError

CONTEXT_FRAMES = 8
"""Only so many frames before and after a frame decide whether it begins a shot, wherever the stream starts or ends."""
_ANALYSIS_PX = 192  # longer side of the shrunk picture; a new shot changes the whole picture, so details are not needed
_HALF = CONTEXT_FRAMES // 2

# Changes are PySceneDetect's: mean differences of hue, saturation and value, each 0..255.
_LEAST_CHANGE = 15.0  # PySceneDetect's default with a rolling average; a fast gesture before a still camera reaches 13
_CLEAR_CHANGE = 27.0  # PySceneDetect's default without one
_STANDS_OUT = 3.0  # ratio of a cut's change to that of its neighbours; PySceneDetect's default
# The other thresholds are for colours, 0..255.
_LEAST_COLOUR = 12.0  # hue is unstable in grey pictures, so colours must change as well; measured cuts reach 27 or more
_ONE_WAY = 0.9  # if only the light changes, this share of the change has one sign; two scenes differ in both directions
# During a dissolve, a frame differs from the mean of the frames around it by a tenth of their difference; where people
# or the camera move, by at least a third (measured on real clips).
_LEAST_DISSOLVE = 8.0
_MIXED = 0.2
_BLACK = 12.0  # PySceneDetect's default for fades
_UNLIKE = 0.25  # mean difference between pictures of two scenes, after scaling both to mean 1


class _View(NamedTuple):
    """The shrunk copies of a frame that CutFinder keeps."""

    hsv: Int16[np.ndarray, "h w 3"]
    bgr: Int16[np.ndarray, "h w 3"]

    @property
    def is_black(self) -> bool:
        return float(self.bgr.mean()) < _BLACK


class CutFinder:
    """Finds the first frame of each shot in a stream of frames at 25 fps, in constant memory.

    Cuts: a change that is large compared with its neighbours, so a fast pan is not a cut. If the old scene returns
    after a flash or after one odd frame, there is no cut. A shot may be as short as two frames. Dissolves: their middle
    frame, and several frames of a dissolve of more than eight frames, so that no shot consists of a dissolve. Fades
    through black: the first frame that is not black. Changes in a part of the picture only, such as a jump cut within
    one scene, are not found.
    """

    def __init__(self) -> None:
        try:
            from scenedetect import FrameTimecode
            from scenedetect.detectors import ContentDetector
        except ImportError:
            raise TccpError("shots need scenedetect: pip install -c constraints.txt -e '.[preprocess]'") from None
        self._timecode = FrameTimecode
        self._detector = ContentDetector(threshold=_LEAST_CHANGE, min_scene_len=0)
        self._num_frames = 0
        self._views: deque[_View] = deque(maxlen=2 * CONTEXT_FRAMES + 1)
        self._proposed: set[int] = set()

    def add(self, frame: UInt8[np.ndarray, "h w 3"]) -> list[int]:
        """Takes the next frame. Returns the frame CONTEXT_FRAMES before it if that one begins a shot."""
        scale = _ANALYSIS_PX / max(frame.shape[:2])
        if scale < 1:
            frame = np.asarray(cv2.resize(frame, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA), np.uint8)
        bgr = cv2.cvtColor(frame, cv2.COLOR_RGB2BGR)
        found = self._detector.process_frame(self._timecode(self._num_frames, fps=float(FPS)), bgr)
        self._proposed |= {cut.frame_num for cut in found}
        self._views.append(_View(cv2.cvtColor(bgr, cv2.COLOR_BGR2HSV).astype(np.int16), bgr.astype(np.int16)))
        self._num_frames += 1
        judged = self._num_frames - 1 - CONTEXT_FRAMES
        self._proposed.discard(judged - 2)
        return [judged] if self._begins_shot(judged) else []

    def finish(self) -> list[int]:
        """Call it after the last frame. Returns those of the last CONTEXT_FRAMES frames that begin a shot."""
        first = max(self._num_frames - CONTEXT_FRAMES, 0)
        return [frame for frame in range(first, self._num_frames) if self._begins_shot(frame)]

    def _begins_shot(self, frame: int) -> bool:
        # A cut with one mixed picture also looks like a very short dissolve. It counts as a cut.
        if any(near in self._proposed and self._is_cut(near) for near in (frame - 1, frame, frame + 1)):
            return frame in self._proposed and self._is_cut(frame)
        return self._is_middle_of_dissolve(frame) or self._comes_from_black(frame)

    def _is_cut(self, frame: int) -> bool:
        change = self._change(frame)
        before, after = self._change(frame - 1) or 0.0, self._change(frame + 1) or 0.0
        # A cut may contain one picture mixed from both shots, so of two changes in a row only the larger counts.
        if change is None or change <= before or change < after:
            return False
        if self._is_same_colour(frame) or self._comes_back(frame, change, 1) or self._comes_back(frame - 1, change, -1):
            return False
        near, around = self._neighbours(frame, 2), self._neighbours(frame, 3)
        if near and change >= _STANDS_OUT * float(np.mean(near)):
            return True
        # Even with a cut every two or three frames, at most half of the neighbours are cuts: the median excludes them.
        alone = change >= max(_CLEAR_CHANGE, 2 * before, 2 * after)
        return alone and (not around or change >= _STANDS_OUT * float(np.median(around)))

    def _is_same_colour(self, frame: int) -> bool:
        before, view = self._view(frame - 1), self._view(frame)
        return before is None or view is None or _colour_difference(before, view) < _LEAST_COLOUR

    def _comes_back(self, frame: int, change: float, direction: int) -> bool:
        """Whether the picture before `frame` returns a little later. direction: 1 forwards, -1 backwards in time.

        Looks further than one frame only if just the light changed, because a whole shot may be that short.
        """
        before, there = self._view(frame - direction), self._view(frame)
        if before is None or there is None:
            return False
        reach = _HALF if _is_light(before, there) else 1
        later = (self._view(frame + direction * step) for step in range(1, reach + 1))
        return any(view is not None and change >= _STANDS_OUT * _difference(before, view) for view in later)

    def _is_middle_of_dissolve(self, frame: int) -> bool:
        here = self._mixture(frame)
        if here >= _MIXED:
            return False
        around = [self._mixture(frame + step) for step in range(-_HALF, _HALF + 1)]
        return all(here < other for other in around[:_HALF]) and all(here <= other for other in around[_HALF:])

    def _mixture(self, frame: int) -> float:
        """The distance of a frame from the mean of the frames four before and four after, relative to their difference.

        1 if these two do not differ, or only by light.
        """
        before, view, after = self._view(frame - _HALF), self._view(frame), self._view(frame + _HALF)
        if before is None or view is None or after is None:
            return 1.0
        difference = _colour_difference(before, after)
        if difference < _LEAST_DISSOLVE or _is_light(before, after):
            return 1.0
        return float(np.abs(2 * view.bgr - before.bgr - after.bgr).mean()) / (2 * difference)

    def _comes_from_black(self, frame: int) -> bool:
        view, last = self._view(frame), self._view(frame - 1)
        if view is None or last is None or view.is_black or not last.is_black:
            return False
        for length in range(1, _HALF):
            before = self._view(frame - 1 - length)
            if before is None:
                return False
            if not before.is_black:  # after few black frames the same scene may return
                return _unlike(self._view(frame - length - _HALF), self._view(frame - 1 + _HALF))
        return True

    def _neighbours(self, frame: int, reach: int) -> list[float]:
        """The changes around a frame without its own. There are fewer at the ends of the film."""
        near = [*range(frame - reach, frame), *range(frame + 1, frame + reach + 1)]
        return [change for change in map(self._change, near) if change is not None]

    def _change(self, frame: int) -> float | None:
        """The difference between a frame and the one before it."""
        before, view = self._view(frame - 1), self._view(frame)
        return None if before is None or view is None else _difference(before, view)

    def _view(self, frame: int) -> _View | None:
        """None outside the film."""
        index = frame - (self._num_frames - len(self._views))
        return self._views[index] if 0 <= index < len(self._views) else None


def _difference(a: _View, b: _View) -> float:
    return float(np.abs(a.hsv - b.hsv).mean())


def _colour_difference(a: _View, b: _View) -> float:
    return float(np.abs(a.bgr - b.bgr).mean())


def _is_light(a: _View, b: _View) -> bool:
    """Whether one of two pictures is brighter than the other nearly everywhere."""
    change = b.bgr - a.bgr
    return abs(float(change.mean())) >= _ONE_WAY * float(np.abs(change).mean())


def _unlike(a: _View | None, b: _View | None) -> bool:
    """Whether two pictures still differ after scaling them to the same brightness."""
    if a is None or b is None:
        return False
    one, other = (view.bgr / max(float(view.bgr.mean()), 1.0) for view in (a, b))
    return float(np.abs(one - other).mean()) > _UNLIKE
