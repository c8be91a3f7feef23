"""The parts of the server in one process, without Ray: what deployments wrap, called directly."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from tccp.files import Folder
from tccp.inference.components import Components, load_components
from tccp.serving.conductor import WorkOrder
from tccp.serving.job_folder import JobFolder
from tccp.serving.preparation import Preparation
from tccp.serving.publishing import PreparedWindow, Publishing, preview
from tccp.serving.stage_service import StageService, WindowMade
from tccp.serving.store import JobStore
from tccp.serving.weight_versions import place
from tccp.serving.window_loop import WindowLoop
from tccp.serving.work import ChainPoint, FilmKey, JobLost, LandmarksDone


class LocalStages:
    """Implements `tccp.serving.conductor.Stages`."""

    def __init__(self, store: JobStore, storage: Folder, limit: int = 1):
        self._store, self._storage = store, storage
        self._components: dict[str, Components] = {}
        self.preparation = Preparation(storage)
        self.publishing = Publishing(storage)
        self.loops = {kind: WindowLoop(kind, self._load, store.still_held, limit) for kind in ("landmark", "face")}
        self.services = {kind: StageService(loop, storage) for kind, loop in self.loops.items()}
        self.made: list[tuple[str, int]] = []
        """Job and first frame of each window that stage 2 has made."""

    def _load(self, version: str) -> Components:
        if version not in self._components:  # both stages in one process share them
            self._components[version] = load_components(Path(place(version, self._storage)), ALL)
        return self._components[version]

    def close(self) -> None:
        for loop in self.loops.values():
            loop.close()
        self.preparation.close()
        self.publishing.close()

    async def analyse(self, order: WorkOrder) -> AsyncIterator[tuple[str, float]]:
        given = (order.job_id, order.spec, list(order.roles), order.weights, 60.0)
        await asyncio.to_thread(self.preparation.analyse, *given)
        yield "prepared", 1.0

    async def prepared(self, order: WorkOrder, first: int, num_frames: int) -> PreparedWindow:
        given = (order.job_id, order.spec, list(order.roles), order.weights, first, num_frames)
        return await asyncio.to_thread(self.preparation.prepared, *given)

    async def landmarks(
        self, film: FilmKey, shot: int, prepared: PreparedWindow, point: ChainPoint | None
    ) -> LandmarksDone:
        return await self.services["landmark"].landmarks(film, shot, prepared, point)

    async def faces(
        self,
        film: FilmKey,
        shot: int,
        prepared: PreparedWindow,
        landmarks: LandmarksDone | None,
        point: ChainPoint | None,
    ) -> WindowMade:
        made = await self.services["face"].faces(film, shot, prepared, landmarks, point)
        self.made.append((film.job_id, made.first))
        return made

    async def preview(self, order: WorkOrder, prepared: PreparedWindow, made: WindowMade, number: int) -> None:
        assert prepared.preview is not None
        jpeg = preview(prepared.preview, made.face, order.spec.color_match)
        JobFolder(self._storage, order.job_id).write_preview(number, jpeg)

    async def finish(self, order: WorkOrder) -> AsyncIterator[tuple[int, int] | dict[str, Any]]:
        def check(done: int, total: int) -> None:
            if order.job_id not in self._store.still_held({order.job_id: order.fence}):
                raise JobLost

        yield await asyncio.to_thread(
            self.publishing.finish, order.job_id, order.fence, order.spec, list(order.roles), order.model, check
        )


ALL = (
    "landmark_first",
    "landmark_sequence",
    "face_first",
    "face_sequence",
    "one_stage_first",
    "one_stage_sequence",
)
