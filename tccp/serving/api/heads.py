"""`/v1/heads`: the heads in a scene, so that a person can say which one is meant."""

from __future__ import annotations

import asyncio
import base64
import shutil
import tempfile
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile

from tccp.errors import TccpError
from tccp.serving.api.access import Owner, TheServer
from tccp.serving.api.error_answers import documented, invalid, shown, unavailable
from tccp.serving.api.objects import ID_PATTERN, Heads, is_id
from tccp.serving.api.requests import body_of
from tccp.serving.api.server import FoundHeads, Server
from tccp.serving.api.submission import file_place
from tccp.serving.errors_for_clients import code_of, message_for_client

router = APIRouter(prefix="/v1/heads", tags=["heads"])
_FILE = {"type": "string", "pattern": ID_PATTERN["file"], "description": "The id of an uploaded file"}
_BINARY = {"anyOf": [{"type": "string", "format": "binary"}, _FILE]}


def _schema(file: dict[str, Any]) -> dict[str, Any]:
    schema = {"type": "object", "properties": {"scene": file}, "required": ["scene"], "additionalProperties": False}
    return {"schema": schema}


_BODY = {
    "requestBody": {
        "required": True,
        "content": {"multipart/form-data": _schema(_BINARY), "application/json": _schema(_FILE)},
    }
}


@router.post("", response_model=Heads, responses=documented(408, 415, 429), openapi_extra=_BODY)
async def find_heads(request: Request, server: TheServer, owner: Owner) -> dict[str, Any]:
    """The size of a scene, one of its frames, and the heads in it."""
    with request.app.state.heads.taken():
        async with body_of(request) as fields:
            scene = fields.get("scene")
            if len(fields) != 1 or not isinstance(scene, UploadFile | str):
                raise invalid("scene", "give one scene, and nothing else")
            if isinstance(scene, UploadFile) and not scene.size:
                raise invalid("scene", "the file is empty: send one with content", "empty_file")
            width, height, jpeg, boxes = await _found(server, owner, scene)
    frame = f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"
    heads = [{"box": [float(edge) for edge in box]} for box in boxes]
    return {"width": width, "height": height, "frame": frame, "heads": heads}


async def _found(server: Server, owner: str, scene: UploadFile | str) -> FoundHeads:
    with tempfile.TemporaryDirectory(prefix="tccp-heads-") as place:
        path = Path(place) / "scene"
        await run_in_threadpool(_fetch, server, owner, scene, path)
        try:
            async with asyncio.timeout(server.limits.heads_s):
                return await server.find_heads(path)
        except TccpError as error:
            message = message_for_client(error, server.storage).replace(str(path), "the scene")
            raise invalid("scene", message, code_of(error)) from None
        except TimeoutError:
            raise unavailable(f"no heads were found within {server.limits.heads_s:g} s: draw a box") from None


def _fetch(server: Server, owner: str, scene: UploadFile | str, path: Path) -> None:
    if isinstance(scene, UploadFile):
        scene.file.seek(0)
        with path.open("wb") as target:
            shutil.copyfileobj(scene.file, target, 1 << 20)
        return
    file = server.store.file(scene, owner) if is_id("file", scene) else None
    if file is None:
        raise invalid("scene", f"there is no file {shown(scene)}: upload it to /v1/files, or send it here")
    with server.storage.open(file_place(file.id)) as source, path.open("wb") as target:
        shutil.copyfileobj(source, target, 1 << 20)
