"""The files of jobs in the server's storage, which is a folder or a URL of any fsspec filesystem.

jobs/ID/inputs/ROLE       what the client sent
jobs/ID/plan.json, .npz   what preparation found: shots, head boxes, the person's picture
jobs/ID/windows/FRAME     finished windows, by their first frame
jobs/ID/previews/NUMBER   pictures of frames as they are made
films/ID/FENCE/           film.mp4, landmarks.jsonl, report.json of the attempt that completed
files/ID                  files that clients uploaded to name in requests
"""

from __future__ import annotations

import io
import json
import logging
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8

from tccp.errors import StorageError, TccpError
from tccp.files import Folder
from tccp.inference.head_tracks import HeadTrack
from tccp.serving.spec import Role
from tccp.serving.work import KeptWindow, from_bytes, to_bytes

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shot:
    """An uninterrupted stretch of frames that show the person: one chain of windows."""

    first: int
    num_frames: int

    def windows(self, window: int) -> list[tuple[int, int]]:
        """First frame and number of frames that each window adds. window: frames of a window."""
        starts = [self.first, *range(self.first + 1, self.first + self.num_frames, window - 1)]
        ends = [*starts[1:], self.first + self.num_frames]
        return [(start, end - start) for start, end in zip(starts, ends, strict=True)]


@dataclass(frozen=True)
class Plan:
    """What preparation found in the inputs of a job.

    num_frames: of the film. window: frames of a window. track: of the scene. identity: picture of the person for the
    networks. points, confidence: given landmarks by frame, NaN where the file has none.
    """

    num_frames: int
    width: int
    height: int
    window: int
    picture_px: int
    shots: tuple[Shot, ...]
    warnings: tuple[str, ...]
    track: HeadTrack
    identity: UInt8[np.ndarray, "s s 3"]
    points: Float32[np.ndarray, "f 68 2"] | None = None
    confidence: Float32[np.ndarray, " f"] | None = None

    @property
    def num_windows(self) -> int:
        return sum(len(shot.windows(self.window)) for shot in self.shots)


def _plan(record: dict[str, Any], arrays: dict[str, np.ndarray]) -> Plan:
    if sorted(arrays) != record["arrays"]:
        raise ValueError("a part is missing")
    cuts = None if record["cuts"] is None else frozenset(record["cuts"])
    reasons = {int(frame): reason for frame, reason in record["reasons"].items()}
    return Plan(
        num_frames=record["num_frames"],
        width=record["width"],
        height=record["height"],
        window=record["window"],
        picture_px=record["picture_px"],
        shots=tuple(Shot(**shot) for shot in record["shots"]),
        warnings=tuple(record["warnings"]),
        track=HeadTrack(arrays["boxes"], cuts, reasons),
        identity=arrays["identity"],
        points=arrays.get("points"),
        confidence=arrays.get("confidence"),
    )


class JobFolder:
    """The files of one job. `storage`: of the server."""

    def __init__(self, storage: Folder, job_id: str):
        self.storage, self.job_id = storage, job_id
        self._root = f"jobs/{job_id}"

    def input_name(self, role: Role) -> str:
        return f"{self._root}/inputs/{role}"

    @contextmanager
    def local_inputs(self, roles: list[Role]) -> Iterator[dict[Role, Path]]:
        """The inputs as files of this machine. Raises TccpError if one is gone."""
        with ExitStack() as opened:
            files = {}
            for role in roles:
                try:
                    files[role] = opened.enter_context(self.storage.local_file(self.input_name(role)))
                    files[role].stat()
                except FileNotFoundError:
                    raise TccpError(f"an input of {self.job_id} is gone: {role}") from None
            yield files

    def write_plan(self, plan: Plan) -> None:
        arrays: dict[str, Any] = {"boxes": plan.track.boxes, "identity": plan.identity}
        if plan.points is not None and plan.confidence is not None:
            arrays |= {"points": plan.points, "confidence": plan.confidence}
        content = io.BytesIO()
        np.savez_compressed(content, allow_pickle=False, **arrays)
        self.storage.write(f"{self._root}/plan.npz", content.getvalue())
        record = {name: getattr(plan, name) for name in ("num_frames", "width", "height", "window", "picture_px")}
        record |= {"shots": [asdict(shot) for shot in plan.shots], "warnings": list(plan.warnings)}
        record["arrays"] = sorted(arrays)
        record["cuts"] = None if plan.track.cuts is None else sorted(plan.track.cuts)
        record["reasons"] = {str(frame): reason for frame, reason in plan.track.reasons.items()}
        self.storage.write(f"{self._root}/plan.json", json.dumps(record).encode())  # last: it says that both are there

    def read_plan(self) -> Plan | None:
        """The plan; None if there is none yet. A damaged one is removed, as if there were none."""
        try:
            record = self.storage.read(f"{self._root}/plan.json")
            arrays = self.storage.read(f"{self._root}/plan.npz")
        except FileNotFoundError:
            return None
        try:
            return _plan(json.loads(record), dict(np.load(io.BytesIO(arrays), allow_pickle=False)))
        except Exception as error:  # numpy and zipfile raise a dozen kinds for what is damaged
            logger.warning("the plan of %s is damaged (%s: %s)", self.job_id, type(error).__name__, error)
            self.storage.remove(f"{self._root}/plan.json")
            return None

    def kept_windows(self) -> set[int]:
        """First frames of the windows that are finished."""
        return {int(name.partition(".")[0]) for name in self.storage.names(f"{self._root}/windows")}

    def write_window(self, window: KeptWindow) -> None:
        self.storage.write(self._window(window.first), to_bytes(window))

    def read_window(self, first: int, faces: bool = True) -> KeptWindow:
        """Raises FileNotFoundError, and StorageError if the file is damaged: it is removed, to be made again."""
        content = self.storage.read(self._window(first))
        try:
            return from_bytes(content, faces)
        except ValueError as error:
            self.storage.remove(self._window(first))
            raise StorageError(f"{self._window(first)} is damaged ({error}): the window is made again") from None

    def _window(self, first: int) -> str:
        return f"{self._root}/windows/{first:08d}.npz"

    def preview_name(self, number: int) -> str:
        return f"{self._root}/previews/{number:06d}.jpg"

    def write_preview(self, number: int, jpeg: bytes) -> None:
        self.storage.write(self.preview_name(number), jpeg)

    def film_folder(self, fence: int) -> str:
        """Where an attempt puts its film. Attempts do not share names, so that none replaces another's film."""
        return f"films/{self.job_id}/{fence:06d}"

    def remove_work(self) -> None:
        """Removes what only work on the job needs. Inputs stay, for remixes, and previews."""
        for name in ("windows", "plan.npz", "plan.json"):
            self.storage.remove(f"{self._root}/{name}")

    def remove(self) -> None:
        """Removes everything."""
        self.storage.remove(self._root)
        self.storage.remove(f"films/{self.job_id}")


class PlanCache:
    """Plans that were read lately. Plans never change."""

    def __init__(self, most: int = 16):
        self._plans: OrderedDict[str, Plan] = OrderedDict()
        self._most = most
        self._lock = threading.Lock()

    def of(self, folder: JobFolder) -> Plan:
        """Raises StorageError if the job has no plan: another attempt makes one."""
        with self._lock:
            if folder.job_id in self._plans:
                self._plans.move_to_end(folder.job_id)
                return self._plans[folder.job_id]
        plan = folder.read_plan()
        if plan is None:
            raise StorageError(f"{folder.job_id} is not prepared, or its plan was damaged")
        with self._lock:
            self._plans[folder.job_id] = plan
            while len(self._plans) > self._most:
                self._plans.popitem(last=False)
        return plan
