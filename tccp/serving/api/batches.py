"""`/v1/batches`: many videos by one request. Rows that cannot be used do not stop the others."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response
from starlette.concurrency import run_in_threadpool

from tccp.serving.api.access import Owner, TheServer
from tccp.serving.api.error_answers import ApiError, documented, invalid, not_found, shown
from tccp.serving.api.objects import ID_PATTERN, Batch, BatchList, is_id, page, video
from tccp.serving.api.requests import (
    FIELDS,
    check_roles,
    checked_spec,
    given_in,
    json_body,
    key_of,
    key_parameter,
    parsed,
)
from tccp.serving.api.server import Server
from tccp.serving.api.submission import Order, file_place, sources_of, submit
from tccp.serving.store import Full, Job, KeyReused
from tccp.serving.store.job_store import RUNNING, new_id

router = APIRouter(prefix="/v1/batches", tags=["batches"])

_UNFINISHED_S = 300.0  # after which a row without a video is given up: the server has ended while it took the batch
_ROW = {"type": "object", "description": "Fields of a request for a video, with ids of files, and `custom_id`"}
_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "properties": {
                        "rows": {"type": "array", "items": _ROW, "minItems": 1},
                        "input_file_id": {"type": "string", "pattern": ID_PATTERN["file"]},
                    },
                    "additionalProperties": False,
                    "oneOf": [{"required": ["rows"]}, {"required": ["input_file_id"]}],
                }
            }
        },
    },
    "parameters": [key_parameter("A batch that is sent again with its key goes on where it was cut off.")],
}
After = Annotated[
    str | None, Query(pattern=ID_PATTERN["batch"], description="The id of the last batch of the page before")
]


@router.post("", response_model=Batch, responses=documented(408, 409, 429), openapi_extra=_BODY)
async def create_batch(request: Request, server: TheServer, owner: Owner) -> dict[str, Any]:
    """Asks for a video for each row. Rows are given here, or as the lines of an uploaded JSONL file."""
    key = key_of(request)
    body = await json_body(request)
    return await run_in_threadpool(_create, server, owner, key, body)


def _create(server: Server, owner: str, key: str | None, body: dict[str, Any]) -> dict[str, Any]:
    rows = _rows(server, owner, body)
    digest = hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
    batch_id = new_id("batch")
    if key is not None:  # so that it goes on where an earlier request with this key was cut off
        batch_id = f"batch_{hashlib.sha256(json.dumps([owner, key]).encode()).hexdigest()[:24]}"
    known = server.store.batch(batch_id, owner)
    notes: list[dict[str, Any]] = [{"custom_id": _custom_id(row), "error": None, "digest": digest} for row in rows]
    if known is None:
        server.store.add_batch(batch_id, owner, notes)
    elif known["rows"][0]["digest"] != digest:
        raise KeyReused(f"Idempotency-Key {key} came before with another batch: use a new key for it")
    taken = set() if known is None else set(_jobs(server, known))
    for number, row in enumerate(rows):
        if number not in taken:
            notes[number]["error"] = _submitted(server, owner, batch_id, number, row)
    server.store.set_batch_rows(batch_id, notes)
    return _object(server, batch_of(server, owner, batch_id))


def _rows(server: Server, owner: str, body: dict[str, Any]) -> list[Any]:
    if len(body) != 1 or not body.keys() <= {"rows", "input_file_id"}:
        raise invalid(None, "give either rows or input_file_id, and nothing else")
    limits = server.limits
    if "rows" in body:
        rows = body["rows"]
        if not isinstance(rows, list):
            raise invalid("rows", "give a list of objects")
    else:
        file_id = body["input_file_id"]
        file = server.store.file(file_id, owner) if isinstance(file_id, str) and is_id("file", file_id) else None
        if file is None:
            raise invalid("input_file_id", f"there is no file {shown(file_id)}: upload it to /v1/files")
        if file.bytes > limits.max_json_bytes:
            raise invalid("input_file_id", f"the file has {file.bytes:,} bytes: give up to {limits.max_json_bytes:,}")
        lines = server.storage.read(file_place(file.id)).split(b"\n")
        rows = [_row(line) for line in lines if line.strip()]
    if not 1 <= len(rows) <= limits.max_batch_rows:
        raise invalid("rows", f"there are {len(rows)}: give 1 to {limits.max_batch_rows}")
    return rows


def _row(line: bytes) -> Any:
    try:
        return parsed(line, "the row")
    except ApiError:  # this row is refused, for being a text, and not the batch
        return line[:200].decode("ascii", "backslashreplace")


def _custom_id(row: Any) -> str | None:
    custom_id = row.get("custom_id") if isinstance(row, dict) else None
    return None if custom_id is None else str(custom_id)[:200]


def _submitted(server: Server, owner: str, batch_id: str, number: int, row: Any) -> dict[str, str] | None:
    """Asks for the video of a row; returns why it was refused. Asking again gives the same video."""
    key = f"{batch_id}/{number}"
    try:
        if not isinstance(row, dict):
            raise invalid(None, f"the row is no JSON object with fields of a video, which are {', '.join(FIELDS)}")
        given = given_in({name: value for name, value in row.items() if name != "custom_id"}, server)
        check_roles(given.files)
        spec = checked_spec(given.options, server)
        sources = sources_of(given, owner, server)
        submit(Order(owner, spec, sources, given.webhook, key, (batch_id, number)), server)
    except ApiError as error:
        return {"code": error.code, "message": error.detail}
    except Full as error:
        return {"code": "too_many", "message": str(error)}
    return None


@router.get("", response_model=BatchList, responses=documented())
async def list_batches(
    server: TheServer,
    owner: Owner,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: After = None,
) -> dict[str, Any]:
    """The batches of this owner, newest first."""

    def listed() -> dict[str, Any]:
        return page([_object(server, one) for one in server.store.batches_of(owner, limit + 1, after)], limit)

    return await run_in_threadpool(listed)


@router.get("/{batch_id}", response_model=Batch, responses=documented(404))
async def get_batch(batch_id: str, server: TheServer, owner: Owner) -> dict[str, Any]:
    """How many rows of a batch stand how."""
    return await run_in_threadpool(lambda: _object(server, batch_of(server, owner, batch_id)))


@router.get(
    "/{batch_id}/output",
    response_class=Response,
    responses={
        200: {
            "description": "One JSON object a line, in the order of the rows.",
            "content": {"application/jsonl": {"schema": {"type": "string"}}},
        },
        **documented(404),
    },
)
async def get_output(batch_id: str, server: TheServer, owner: Owner) -> Response:
    """What became of each row so far: custom_id, id of the video, status, error, and where its film is."""

    def lines() -> str:
        return "".join(json.dumps(row) + "\n" for row in _results(server, batch_of(server, owner, batch_id)))

    return Response(await run_in_threadpool(lines), media_type="application/jsonl")


@router.post("/{batch_id}/cancel", response_model=Batch, responses=documented(404))
async def cancel_batch(batch_id: str, server: TheServer, owner: Owner) -> dict[str, Any]:
    """Cancels the videos of a batch that have not ended."""

    def cancel() -> dict[str, Any]:
        batch = batch_of(server, owner, batch_id)
        for job in _jobs(server, batch).values():
            if job.status in RUNNING:
                server.store.cancel(job.id, owner)
        return _object(server, batch)

    return await run_in_threadpool(cancel)


def batch_of(server: Server, owner: str, batch_id: str) -> dict[str, Any]:
    """A batch of this owner, as the store has it. Raises ApiError 404."""
    batch = server.store.batch(batch_id, owner) if is_id("batch", batch_id) else None
    if batch is None:
        raise not_found("batch", batch_id)
    return batch


def _jobs(server: Server, batch: dict[str, Any]) -> dict[int, Job]:
    """The jobs of a batch by row."""
    jobs = server.store.listed(None, len(batch["rows"]), newest_first=False, batch=batch["id"])
    return {job.batch_row: job for job in jobs if job.batch_row is not None}


def _status(server: Server, batch: dict[str, Any], job: Job | None, error: Any) -> str:
    if job is not None:
        return "deleted" if job.hidden else job.status
    if error is not None or server.store.now() - batch["created_at"] > _UNFINISHED_S:
        return "refused"
    return "queued"


def _results(server: Server, batch: dict[str, Any]) -> list[dict[str, Any]]:
    jobs = _jobs(server, batch)
    results = []
    for number, note in enumerate(batch["rows"]):
        job, error = jobs.get(number), note["error"]
        status = _status(server, batch, job, error)
        if status == "refused" and error is None:
            text = "the server ended before it took this row: send the batch again with its Idempotency-Key"
            error = {"code": "not_taken", "message": text}
        if job is not None and job.status == "failed":
            error = video(job, server.store)["error"]
        url = f"/v1/videos/{job.id}/content" if job is not None and status == "completed" else None
        video_id = None if job is None else job.id
        row = {"custom_id": note["custom_id"], "row": number, "video_id": video_id, "status": status}
        results.append({**row, "error": error, "content_url": url})
    return results


def _object(server: Server, batch: dict[str, Any]) -> dict[str, Any]:
    jobs = _jobs(server, batch)
    counts = Counter(
        _status(server, batch, jobs.get(number), note["error"]) for number, note in enumerate(batch["rows"])
    )
    return {
        "id": batch["id"],
        "status": "in_progress" if any(counts[status] for status in RUNNING) else "completed",
        "created_at": int(batch["created_at"]),
        "rows": len(batch["rows"]),
        "counts": dict(counts),
    }
