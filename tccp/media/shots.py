"""Where a film goes from one shot to the next, found in a stream of frames.

PySceneDetect's content detector proposes every frame that differs enough from the one before. Which of them begin a
shot is decided here, from the frames around: its own filters know neither shots of two frames, flashes nor dissolves,
and judge by all of the film so far.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Int16, UInt8

from tccp.config import FPS
from tccp.errors import TccpError

CONTEXT_FRAMES = 8
"""So many frames before and after a frame settle whether a shot begins with it, wherever the stream begins and ends."""
_ANALYSIS_PX = 192  # longer side of the picture that is looked at: a new shot changes the whole picture
_HALF = CONTEXT_FRAMES // 2

# Changes are PySceneDetect's: mean differences of hue, saturation and value, each 0..255.
_LEAST_CHANGE = 15.0  # its default beside a rolling average; a fast gesture before a still camera reaches 13
_CLEAR_CHANGE = 27.0  # its default without one
_STANDS_OUT = 3.0  # a cut's difference over that of its neighbours; its default
# The rest is about colours, 0..255.
_LEAST_COLOUR = 12.0  # grey changes its hue from one shade to the next; cuts of the clips measured reach 27 and more
_ONE_WAY = 0.9  # share of the change that goes one way where only the light changes; two scenes differ both ways
# While scenes dissolve, a frame is the mean of those around it, to a tenth of their difference; where people or the
# camera move, to no less than a third (measured on real clips).
_LEAST_DISSOLVE = 8.0
_MIXED = 0.2
_BLACK = 12.0  # PySceneDetect's default for fades
_UNLIKE = 0.25  # mean difference of two pictures of mean 1 that are of two scenes


class _View(NamedTuple):
    """What is kept of a frame."""

    hsv: Int16[np.ndarray, "h w 3"]
    bgr: Int16[np.ndarray, "h w 3"]

    @property
    def is_black(self) -> bool:
        return float(self.bgr.mean()) < _BLACK


class CutFinder:
    """Finds the first frame of each shot in a stream of frames of the 25 fps clock, in constant memory.

    Cuts: a change that stands out against its neighbours, so that a fast pan is none; and what comes back after a
    flash, or after one odd frame, was not cut away from. A shot may be as short as two frames. Dissolves: their middle,
    and where one takes longer than eight frames several of its frames, so that nobody takes it for a shot. Fades
    through black: the first frame that is not black. A change of less than the picture, such as a jump within one
    scene, is not found.
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
        """Takes the next frame; returns the one CONTEXT_FRAMES back if, as is now known, it begins a shot."""
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
        """After the last frame: those of the last CONTEXT_FRAMES that begin a shot."""
        first = max(self._num_frames - CONTEXT_FRAMES, 0)
        return [frame for frame in range(first, self._num_frames) if self._begins_shot(frame)]

    def _begins_shot(self, frame: int) -> bool:
        # A cut over one mixed picture is a very short dissolve, too: it counts as the cut.
        if any(near in self._proposed and self._is_cut(near) for near in (frame - 1, frame, frame + 1)):
            return frame in self._proposed and self._is_cut(frame)
        return self._is_middle_of_dissolve(frame) or self._comes_from_black(frame)

    def _is_cut(self, frame: int) -> bool:
        change = self._change(frame)
        before, after = self._change(frame - 1) or 0.0, self._change(frame + 1) or 0.0
        # A cut may have a picture mixed of both shots in between: of two changes in a row the larger counts.
        if change is None or change <= before or change < after:
            return False
        if self._is_same_colour(frame) or self._comes_back(frame, change, 1) or self._comes_back(frame - 1, change, -1):
            return False
        near, around = self._neighbours(frame, 2), self._neighbours(frame, 3)
        if near and change >= _STANDS_OUT * float(np.mean(near)):
            return True
        # Where cut follows cut every two or three frames, they are among the neighbours, but at most half of them.
        alone = change >= max(_CLEAR_CHANGE, 2 * before, 2 * after)
        return alone and (not around or change >= _STANDS_OUT * float(np.median(around)))

    def _is_same_colour(self, frame: int) -> bool:
        before, view = self._view(frame - 1), self._view(frame)
        return before is None or view is None or _colour_difference(before, view) < _LEAST_COLOUR

    def _comes_back(self, frame: int, change: float, direction: int) -> bool:
        """Whether what stood before `frame`, in this direction of time, is there again a little later.

        After more than one frame only if the light alone had changed: another shot may be as short.
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
        """How far a frame is from the mean of those four before and after it, in units of their difference.

        1 where they do not differ, or by light alone.
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
            if not before.is_black:  # few black frames: the light may have been off for a moment
                return _unlike(self._view(frame - length - _HALF), self._view(frame - 1 + _HALF))
        return True

    def _neighbours(self, frame: int, reach: int) -> list[float]:
        """The changes around a frame, its own left out; fewer at the ends of the film."""
        near = [*range(frame - reach, frame), *range(frame + 1, frame + reach + 1)]
        return [change for change in map(self._change, near) if change is not None]

    def _change(self, frame: int) -> float | None:
        """By how much a frame differs from the one before it."""
        before, view = self._view(frame - 1), self._view(frame)
        return None if before is None or view is None else _difference(before, view)

    def _view(self, frame: int) -> _View | None:
        """None outside the film."""
        place = frame - (self._num_frames - len(self._views))
        return self._views[place] if 0 <= place < len(self._views) else None


def _difference(a: _View, b: _View) -> float:
    return float(np.abs(a.hsv - b.hsv).mean())


def _colour_difference(a: _View, b: _View) -> float:
    return float(np.abs(a.bgr - b.bgr).mean())


def _is_light(a: _View, b: _View) -> bool:
    """Whether one of two pictures is brighter than the other nearly everywhere."""
    change = b.bgr - a.bgr
    return abs(float(change.mean())) >= _ONE_WAY * float(np.abs(change).mean())


def _unlike(a: _View | None, b: _View | None) -> bool:
    """Whether two pictures differ by more than their light."""
    if a is None or b is None:
        return False
    one, other = (view.bgr / max(float(view.bgr.mean()), 1.0) for view in (a, b))
    return float(np.abs(one - other).mean()) > _UNLIKE
