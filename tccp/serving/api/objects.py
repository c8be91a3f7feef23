"""The objects that the API answers with."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, Field

from tccp.serving.store import Job, JobStore, StoredFile
from tccp.serving.store.job_store import RUNNING, Status

FPS = 25
Kind = Literal["video", "file", "batch"]
ID_PATTERN = {kind: f"^{kind}_[0-9a-f]{{24}}$" for kind in ("video", "file", "batch")}


class VideoError(BaseModel):
    code: str
    message: str


class FileInfo(BaseModel):
    bytes: int
    sha256: str


class Video(BaseModel):
    """A video, from its request to its expiry.

    progress: percent. seconds: of the film, as text; known after preparation. size: known when it is completed.
    queue_position: how many others have their turn before it. eta_s: estimated seconds until its windows are made.
    previews: how many frames can be seen at `previews/{n}`. files: of a completed video.
    """

    id: str
    object: Literal["video"] = "video"
    model: str
    status: Status
    progress: int = Field(ge=0, le=100)
    created_at: int
    completed_at: int | None
    expires_at: int
    error: VideoError | None
    seconds: str | None
    size: str | None
    prompt: str | None
    remixed_from_video_id: str | None
    stage: Literal["preparing", "generating", "finishing"] | None
    queue_position: int | None
    eta_s: int | None
    windows: int
    windows_done: int
    previews: int
    warnings: list[str]
    consent: str
    seed: int
    batch_id: str | None
    files: dict[str, FileInfo]


class VideoList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedVideo(BaseModel):
    """status: how the video had ended, or `canceled` if it was cancelled now."""

    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: Literal[True] = True
    status: Status


class File(BaseModel):
    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str


class FileList(BaseModel):
    object: Literal["list"] = "list"
    data: list[File]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedFile(BaseModel):
    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class Batch(BaseModel):
    """counts: rows by status; `refused` rows became no video."""

    id: str
    object: Literal["batch"] = "batch"
    status: Literal["in_progress", "completed"]
    created_at: int
    rows: int
    counts: dict[str, int]


class BatchList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Batch]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Head(BaseModel):
    box: tuple[float, float, float, float] = Field(description="x0, y0, x1, y1 in pixels of the scene")


class Heads(BaseModel):
    """frame: a frame of the scene as a data URL of a JPEG."""

    width: int
    height: int
    frame: str
    heads: list[Head]


def video(job: Job, store: JobStore) -> dict[str, Any]:
    """The object of a job. It may ask the store, so it is for threads."""
    spec, result = job.spec, job.result or {}
    progress = 100 if job.status == "completed" else min(99, 100 * job.windows_done // max(job.windows, 1))
    failed = job.status == "failed" and job.error_code is not None
    made = Video(
        id=job.id,
        model=job.model,
        status=job.status,
        progress=progress,
        created_at=int(job.created_at),
        completed_at=None if job.completed_at is None else int(job.completed_at),
        expires_at=int(job.expires_at),
        error=VideoError(code=str(job.error_code), message=job.error_message or "") if failed else None,
        seconds=str(job.frames / FPS) if job.frames else None,
        size=f"{result['width']}x{result['height']}" if result else None,
        prompt=spec.get("prompt"),
        remixed_from_video_id=job.remix_of,
        stage=job.stage if job.status == "in_progress" else None,
        queue_position=store.queue_position(job) if job.status == "queued" else None,
        eta_s=_eta_s(job, store),
        windows=job.windows,
        windows_done=job.windows_done,
        previews=job.previews,
        warnings=job.warnings,
        consent=str(spec.get("consent", "")),
        seed=int(spec.get("seed", 0)),
        batch_id=job.batch_id,
        files={name: FileInfo(**info) for name, info in result.get("files", {}).items()},
    )
    return made.model_dump()


def _eta_s(job: Job, store: JobStore) -> int | None:
    if job.status != "in_progress" or not job.windows_done or job.started_at is None:
        return None
    per_window_s = max(store.now() - job.started_at, 0.0) / job.windows_done
    return round(per_window_s * max(job.windows - job.windows_done, 0))


def stored_file(file: StoredFile) -> dict[str, Any]:
    made = File(
        id=file.id,
        bytes=file.bytes,
        created_at=int(file.created_at),
        expires_at=int(file.expires_at),
        filename=file.name,
        purpose=file.purpose,
    )
    return made.model_dump()


def is_id(kind: Kind, text: str) -> bool:
    """Whether a text can be an id; others are not given to the database."""
    return re.fullmatch(ID_PATTERN[kind], text) is not None and not text.endswith("\n")


def page(rows: list[dict[str, Any]], limit: int) -> dict[str, Any]:
    """A page of a list. rows: one more than `limit` if there are more."""
    shown = rows[:limit]
    ids = [row["id"] for row in shown]
    return {
        "object": "list",
        "data": shown,
        "first_id": ids[0] if ids else None,
        "last_id": ids[-1] if ids else None,
        "has_more": len(rows) > limit,
    }


def is_running(job: Job) -> bool:
    return job.status in RUNNING
