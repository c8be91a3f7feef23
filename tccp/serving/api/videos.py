"""`/v1/videos`: to ask for videos, to watch and fetch them, and to delete them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response, StreamingResponse
from starlette.concurrency import run_in_threadpool

from tccp.serving.api.access import Owner, TheServer
from tccp.serving.api.content import file_response
from tccp.serving.api.error_answers import ApiError, documented, invalid, not_found
from tccp.serving.api.events import events_of
from tccp.serving.api.objects import ID_PATTERN, DeletedVideo, Video, VideoList, is_id, is_running, page, video
from tccp.serving.api.requests import (
    Given,
    body_of,
    body_schema,
    check_roles,
    checked_spec,
    given_in,
    key_of,
    key_parameter,
)
from tccp.serving.api.server import Server
from tccp.serving.api.submission import Kept, Order, Source, check_room, sources_of, submit
from tccp.serving.job_folder import JobFolder
from tccp.serving.publishing import FILM, LANDMARKS, REPORT, film_file
from tccp.serving.spec import ROLES, Role
from tccp.serving.store import Job

router = APIRouter(prefix="/v1/videos", tags=["videos"])

Variant = Literal["film", "video", "landmarks", "report", "preview", "thumbnail"]
_FILES = {
    "film": (FILM, "video/mp4", "mp4"),
    "landmarks": (LANDMARKS, "application/jsonl", "jsonl"),
    "report": (REPORT, "application/json", "json"),
}
_ALIASES = {"video": "film", "thumbnail": "preview"}
_KEY = key_parameter("The same request with the same key gives the same video, however often it is sent.")
After = Annotated[
    str | None, Query(pattern=ID_PATTERN["video"], description="The id of the last video of the page before")
]
_EVENT = {
    "type": "object",
    "properties": {name: {"type": "string"} for name in ("event", "id", "data")},
    "description": "data: the object of the video as JSON",
}
_BYTES: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}


@router.post(
    "",
    response_model=Video,
    responses=documented(408, 409, 415, 429),
    openapi_extra=body_schema(needed=True) | {"parameters": [_KEY]},
)
async def create_video(request: Request, server: TheServer, owner: Owner) -> dict[str, Any]:
    """Asks for a video of a scene in which a person says what the sound says.

    Files are parts of a form, or ids of files that were uploaded before. Options are those of `tccp generate`.
    """
    key = key_of(request)
    await _admitted(request, server, owner, key)
    with request.app.state.uploads.taken():
        async with body_of(request) as fields:
            given = given_in(fields, server)
            check_roles(given.files)
            spec = checked_spec(given.options, server)
            return await run_in_threadpool(_create, server, owner, given, spec, key)


def _create(server: Server, owner: str, given: Given, spec: Any, key: str | None) -> dict[str, Any]:
    sources = sources_of(given, owner, server)
    job = submit(Order(owner, spec, sources, webhook=given.webhook, key=key), server)
    return video(job, server.store)


async def _admitted(request: Request, server: Server, owner: str, key: str | None) -> None:
    """Raises Full if there is no room for the video, before its files are received."""
    announced = request.headers.get("content-length", "")
    input_bytes = int(announced) if announced.isdigit() else 0
    await run_in_threadpool(check_room, server, owner, key, input_bytes)


@router.get("", response_model=VideoList, responses=documented())
async def list_videos(
    server: TheServer,
    owner: Owner,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: After = None,
    order: Literal["asc", "desc"] = "desc",
) -> dict[str, Any]:
    """The videos of this owner, newest first."""

    def listed() -> dict[str, Any]:
        jobs = server.store.listed(owner, limit + 1, after, newest_first=order == "desc")
        return page([video(job, server.store) for job in jobs], limit)

    return await run_in_threadpool(listed)


@router.get("/{video_id}", response_model=Video, responses=documented(404))
async def get_video(video_id: str, server: TheServer, owner: Owner) -> dict[str, Any]:
    """How a video stands."""
    return await run_in_threadpool(lambda: video(job_of(server, owner, video_id), server.store))


@router.delete("/{video_id}", response_model=DeletedVideo, responses=documented(404))
async def delete_video(video_id: str, server: TheServer, owner: Owner) -> dict[str, Any]:
    """Cancels a video that waits or is made; it stays in the list as `canceled`, and never completes.

    Removes a video that has ended, and its files.
    """
    return await run_in_threadpool(_delete, server, owner, video_id)


def _delete(server: Server, owner: str, video_id: str) -> dict[str, Any]:
    before = job_of(server, owner, video_id)
    job = server.store.cancel(video_id, owner)
    if job is None:
        raise not_found("video", video_id)
    if not is_running(before) or job.status != "canceled":  # also if it has completed in this moment
        server.store.hide(video_id, owner)
        JobFolder(server.storage, video_id).remove()
        server.store.removed(video_id)
    return {"id": video_id, "status": job.status}


@router.post(
    "/{video_id}/remix",
    response_model=Video,
    responses=documented(404, 408, 409, 410, 415, 429),
    openapi_extra=body_schema(needed=False, remix=True) | {"parameters": [_KEY]},
)
async def remix_video(video_id: str, request: Request, server: TheServer, owner: Owner) -> dict[str, Any]:
    """Asks for another video of the same scene, sound and identity, from edited landmarks or with other options.

    Options that are not given are those of the first video, its consent among them.
    """
    key = key_of(request)
    job = await run_in_threadpool(job_of, server, owner, video_id)
    if job.removed_at is not None or job.status == "expired":
        raise ApiError(410, "expired", f"the files of {video_id} are gone: ask for a new video")
    await _admitted(request, server, owner, key)
    with request.app.state.uploads.taken():
        async with body_of(request) as fields:
            given = given_in(fields, server)
            for role in given.files:
                if role in ("scene", "audio", "identity"):
                    raise invalid(role, "a remix has that of the first video: leave it out, or ask for a new video")
            spec = checked_spec(_remixed_options(job, given), server)
            return await run_in_threadpool(_remix, server, owner, job, given, spec, key)


def _remixed_options(job: Job, given: Given) -> dict[str, Any]:
    """The options of the first video, except those that are given anew or that do not fit together with these."""
    options = {**job.spec, **given.options}
    for name, other in (("box", "person"), ("person", "box")):
        if name in given.options and other not in given.options:
            options[other] = None
    if "landmarks" in given.files and "one_stage" not in given.options:
        options["one_stage"] = False
    return options


def _remix(server: Server, owner: str, job: Job, given: Given, spec: Any, key: str | None) -> dict[str, Any]:
    folder = JobFolder(server.storage, job.id)
    kept: dict[Role, Source] = {
        role: Kept(folder.input_name(role), job.inputs[role]) for role in ROLES if role in job.inputs
    }
    sources = {**kept, **sources_of(given, owner, server)}
    order = Order(owner, spec, sources, webhook=given.webhook, key=key, remix_of=job.id)
    return video(submit(order, server), server.store)


@router.get(
    "/{video_id}/content",
    response_class=Response,
    responses={
        200: {
            "description": "The file.",
            "content": dict.fromkeys(("video/mp4", "application/jsonl", "application/json", "image/jpeg"), _BYTES),
        },
        206: {
            "description": "A part of the file.",
            "content": {"video/mp4": _BYTES, "application/octet-stream": _BYTES},
        },
        304: {"description": "It has not changed."},
        **documented(404, 409, 410, 416),
    },
)
async def get_content(
    video_id: str, request: Request, server: TheServer, owner: Owner, variant: Variant = "film"
) -> Response:
    """The film, its landmarks, its report, or the last preview."""
    job = await run_in_threadpool(job_of, server, owner, video_id)
    kind = _ALIASES.get(variant, variant)
    if kind == "preview":
        return await _preview(request, server, job, job.previews - 1)
    if job.status == "expired":
        raise _expired(job)
    if job.status != "completed" or job.result is None:
        raise ApiError(409, "not_completed", f"{video_id} is {job.status}: there is no film", "video_id")
    name, media_type, ending = _FILES[kind]
    place = film_file(job.result, name)
    if place is None:
        raise ApiError(404, "not_found", f"{video_id} has no {kind}: ask for a video with save_landmarks", "variant")
    sha256 = job.result["files"][name]["sha256"]
    try:
        return await file_response(request, server.storage, place, media_type, f"{video_id}.{ending}", sha256)
    except FileNotFoundError:
        raise _expired(job) from None


router.head("/{video_id}/content", include_in_schema=False)(get_content)


@router.get(
    "/{video_id}/previews/{number}",
    response_class=Response,
    responses={
        200: {"description": "The frame.", "content": {"image/jpeg": _BYTES}},
        206: {"description": "A part of it.", "content": {"image/jpeg": _BYTES}},
        **documented(404, 410, 416),
    },
)
async def get_preview(video_id: str, number: int, request: Request, server: TheServer, owner: Owner) -> Response:
    """A frame of the film, as it was made. number: from 0 to `previews` - 1."""
    return await _preview(request, server, await run_in_threadpool(job_of, server, owner, video_id), number)


async def _preview(request: Request, server: Server, job: Job, number: int) -> Response:
    if job.status == "expired":
        raise _expired(job)
    if not 0 <= number < job.previews:
        raise ApiError(404, "not_found", f"{job.id} has {job.previews} previews so far, from 0", "number")
    place = JobFolder(server.storage, job.id).preview_name(number)
    try:
        return await file_response(request, server.storage, place, "image/jpeg", f"{job.id}_{number}.jpg")
    except FileNotFoundError:
        raise _expired(job) from None


@router.get(
    "/{video_id}/events",
    response_class=StreamingResponse,
    responses={
        200: {
            "description": "`video` at every change; at last `end`, `reconnect` or `error`.",
            "content": {"text/event-stream": {"schema": _EVENT}},
        },
        **documented(404),
    },
)
async def get_events(video_id: str, request: Request, server: TheServer, owner: Owner) -> StreamingResponse:
    """The object of the video at every change, as server-sent events. It ends within a minute: then ask again."""
    await run_in_threadpool(job_of, server, owner, video_id)
    seen = request.headers.get("last-event-id", "")
    number = int(seen) if seen.isascii() and seen.isdigit() and len(seen) < 16 else 0
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    stream = events_of(video_id, owner, server, number)
    return StreamingResponse(stream, headers=headers, media_type="text/event-stream")


def job_of(server: Server, owner: str, video_id: str) -> Job:
    """The job of a video that this owner sees. Raises ApiError 404."""
    job = server.store.get(video_id, owner) if is_id("video", video_id) else None
    if job is None:
        raise not_found("video", video_id)
    return job


def _expired(job: Job) -> ApiError:
    return ApiError(410, "expired", f"{job.id} has expired: its files are gone")
