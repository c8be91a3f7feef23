"""`/v1/files`: files that clients upload once, to name them in several requests."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile

from tccp.errors import StorageError
from tccp.serving.api.access import Owner, TheServer
from tccp.serving.api.error_answers import documented, invalid, not_found
from tccp.serving.api.objects import ID_PATTERN, DeletedFile, File, FileList, is_id, page, stored_file
from tccp.serving.api.requests import body_of
from tccp.serving.api.server import Server
from tccp.serving.api.submission import cleaned_name, file_place, stored
from tccp.serving.store import StoredFile
from tccp.serving.store.job_store import new_id

router = APIRouter(prefix="/v1/files", tags=["files"])
_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "maxLength": 64, "default": "input"},
                    },
                    "required": ["file"],
                    "additionalProperties": False,
                }
            }
        },
    }
}
After = Annotated[
    str | None, Query(pattern=ID_PATTERN["file"], description="The id of the last file of the page before")
]


@router.post("", response_model=File, responses=documented(408, 415, 429), openapi_extra=_BODY)
async def upload_file(request: Request, server: TheServer, owner: Owner) -> dict[str, Any]:
    """Keeps a file, whose id can then stand in requests for videos. It expires after a day, unless set otherwise."""
    with request.app.state.uploads.taken():
        async with body_of(request) as fields:
            for name in fields:
                if name not in ("file", "purpose"):
                    raise invalid(name, "unknown field; fields are file, purpose")
            file, purpose = fields.get("file"), fields.get("purpose", "input")
            if not isinstance(file, UploadFile):
                raise invalid("file", "it is missing: send the file as a part of a form")
            if not file.size:
                raise invalid("file", "the file is empty: send one with content", "empty_file")
            if not isinstance(purpose, str) or len(purpose) > 64:
                raise invalid("purpose", "give up to 64 characters")
            return await run_in_threadpool(_keep, server, owner, file, purpose)


def _keep(server: Server, owner: str, file: UploadFile, purpose: str) -> dict[str, Any]:
    file_id = new_id("file")
    limits = server.limits
    try:
        info = stored(file.file, file_place(file_id), server.storage)
        name = cleaned_name(file.filename)
        new = StoredFile(file_id, 0, owner, name, purpose, info["bytes"], info["sha256"], 0.0, 0.0)
        return stored_file(server.store.add_file(new, limits.keep_files_s, limits.max_file_bytes_of_owner))
    except StorageError:  # it may be kept
        raise
    except BaseException:
        server.storage.remove(file_place(file_id))
        raise


@router.get("", response_model=FileList, responses=documented())
async def list_files(
    server: TheServer,
    owner: Owner,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: After = None,
) -> dict[str, Any]:
    """The files of this owner, newest first."""
    rows = await run_in_threadpool(server.store.files_of, owner, limit + 1, after)
    return page([stored_file(row) for row in rows], limit)


@router.get("/{file_id}", response_model=File, responses=documented(404))
async def get_file(file_id: str, server: TheServer, owner: Owner) -> dict[str, Any]:
    """What is known of a file."""
    return stored_file(await run_in_threadpool(file_of, server, owner, file_id))


@router.delete("/{file_id}", response_model=DeletedFile, responses=documented(404))
async def delete_file(file_id: str, server: TheServer, owner: Owner) -> dict[str, Any]:
    """Removes a file. Videos that were asked for with it have copies."""

    def delete() -> None:
        if not is_id("file", file_id) or not server.store.drop_file(file_id, owner):
            raise not_found("file", file_id)
        server.storage.remove(file_place(file_id))

    await run_in_threadpool(delete)
    return {"id": file_id}


def file_of(server: Server, owner: str, file_id: str) -> StoredFile:
    """A file of this owner. Raises ApiError 404."""
    file = server.store.file(file_id, owner) if is_id("file", file_id) else None
    if file is None:
        raise not_found("file", file_id)
    return file
