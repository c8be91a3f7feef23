"""Splits a scene into shots and windows, and reads ahead so that several shots can be generated at once.

A shot is an uninterrupted stretch of frames that show the person. It becomes one chain of windows, and chains do not
depend on each other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from tccp.inference.frames import SceneFrame

T = TypeVar("T")


@dataclass(eq=False)
class Shot(Generic[T]):
    """A shot. first: the number of its first frame. windows: those that are read and not yet offered, in order.

    next: the number of the first frame that is in no offered window. ended: all its windows are read.
    """

    first: int
    next: int
    windows: deque[tuple[list[SceneFrame], T]] = field(default_factory=deque)
    ended: bool = False


class ShotReader(Generic[T]):
    """Reads a scene and offers its windows."""

    def __init__(
        self,
        scene: Iterable[SceneFrame],
        window: int,
        prepare: Callable[[list[SceneFrame]], T],
        horizon: int,
    ):
        """window: frames of a window; its shot's first one adds one frame, every other one `window - 1`.

        prepare: makes what is kept of the frames that a window adds. horizon: how many frames may be read beyond the
        first one that is in no offered window.
        """
        self._scene = iter(scene)
        self._window = window
        self._prepare = prepare
        self._horizon = horizon
        self._shots: list[Shot[T]] = []
        self._frames: list[SceneFrame] = []  # of the next window
        self._present: bool | None = None
        self._num_read = 0
        self._new: list[SceneFrame] = []
        self._at_end = False

    def close(self) -> None:
        """Closes the iterator of the scene."""
        if isinstance(self._scene, Generator):
            self._scene.close()

    @property
    def done(self) -> bool:
        """Whether all windows are offered."""
        return self._at_end and not self._shots

    def taken(self) -> list[SceneFrame]:
        """The frames that were read since the last call."""
        taken, self._new = self._new, []
        return taken

    def offer(self, most: int) -> list[tuple[Shot[T], list[SceneFrame], T]]:
        """Up to `most` next windows, each of another shot, with the frames that it adds and what is kept of them.

        Which ones depends only on the scene, `most` and earlier calls. Empty where a window's length of frames shows
        nobody, or at the end.
        """
        offered = [shot for shot in self._shots if shot.windows][:most]
        first = self._num_read
        while len(offered) < most and not self._at_end and self._may_read(bool(offered), self._num_read - first, most):
            self._read()
            last = self._shots[-1] if self._shots else None
            if last is not None and last.windows and last not in offered:
                offered.append(last)
        result = []
        for shot in offered:
            frames, kept = shot.windows.popleft()
            shot.next = frames[-1].index + 1
            result.append((shot, frames, kept))
        self._shots = [shot for shot in self._shots if shot.windows or not shot.ended]
        return result

    def _may_read(self, has_window: bool, num_read: int, most: int) -> bool:
        if not has_window:  # finish the next window; but report now and then where nobody is seen
            return bool(self._frames) or num_read < self._window
        ahead = self._num_read - self._shots[0].next if self._shots else 0
        return num_read < most * self._window and ahead < self._horizon

    def _read(self) -> None:
        frame = next(self._scene, None)
        if frame is None:
            self._end_shot()
            self._at_end = True
            return
        self._num_read += 1
        self._new.append(frame)
        present = frame.box is not None
        if frame.starts_shot or present != self._present:
            self._end_shot()
            if present:
                self._shots.append(Shot(frame.index, frame.index))
        self._present = present
        if present:
            self._frames.append(frame)
            if len(self._frames) == (1 if frame.index == self._shots[-1].first else self._window - 1):
                self._end_window()

    def _end_window(self) -> None:
        self._shots[-1].windows.append((self._frames, self._prepare(self._frames)))
        self._frames = []

    def _end_shot(self) -> None:
        if self._frames:
            self._end_window()
        if self._shots:
            self._shots[-1].ended = True
