"""A stage as the conductor calls it: one window at a time, with nothing left behind if the caller goes away."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt8

from tccp.files import Folder
from tccp.serving.job_folder import JobFolder
from tccp.serving.publishing import PreparedWindow
from tccp.serving.window_loop import WindowLoop
from tccp.serving.work import ChainPoint, FacesDone, FilmKey, KeptWindow, LandmarksDone, Task


@dataclass(frozen=True)
class WindowMade:
    """What the conductor learns of a finished window, whose heads are kept in the storage."""

    first: int
    point: ChainPoint
    face: UInt8[np.ndarray, "s s 3"]


class StageService:
    """Runs windows in the loop of a stage. Call it in one event loop."""

    def __init__(self, loop: WindowLoop, storage: Folder):
        self.loop, self._storage = loop, storage

    async def landmarks(
        self, film: FilmKey, shot: int, prepared: PreparedWindow, point: ChainPoint | None
    ) -> LandmarksDone:
        done = await self._run(Task(film, shot, prepared.window, point))
        assert isinstance(done, LandmarksDone)
        return done

    async def faces(
        self,
        film: FilmKey,
        shot: int,
        prepared: PreparedWindow,
        landmarks: LandmarksDone | None,
        point: ChainPoint | None,
    ) -> WindowMade:
        """Generates the heads of a window and keeps them. The window counts as finished once this returns."""
        window = prepared.window
        done = await self._run(Task(film, shot, window, point, landmarks))
        assert isinstance(done, FacesDone)
        read = window.landmarks if landmarks is None else landmarks.landmarks
        kept = KeptWindow(
            window.first,
            done.faces,
            done.point,
            None if landmarks is None else landmarks.point,
            None if read is None else read.points,
            None if read is None else read.confidence,
        )
        await asyncio.to_thread(JobFolder(self._storage, film.job_id).write_window, kept)
        return WindowMade(window.first, done.point, done.faces[0])

    async def _run(self, task: Task) -> Any:
        future = self.loop.submit(task)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            future.cancel()
            raise
