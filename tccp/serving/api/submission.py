"""Turns requests into jobs. A job owns its inputs: files that a client uploaded before are copied into its folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from starlette.datastructures import UploadFile

from tccp.errors import StorageError
from tccp.files import Folder
from tccp.serving.api.error_answers import ApiError, invalid, shown
from tccp.serving.api.objects import is_id
from tccp.serving.api.requests import Given
from tccp.serving.api.server import Server
from tccp.serving.job_folder import JobFolder
from tccp.serving.spec import ROLES, Role, VideoSpec
from tccp.serving.store import Job, NewJob
from tccp.serving.store.job_store import new_id

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Upload:
    """A file that came with the request."""

    file: BinaryIO
    name: str


@dataclass(frozen=True)
class Kept:
    """A file in the storage. info: its name, bytes and sha256."""

    place: str
    info: Mapping[str, Any]


Source = Upload | Kept


@dataclass(frozen=True)
class Order:
    """A request for a video that was checked. key: the Idempotency-Key. batch: its id, and the number of the row."""

    owner: str
    spec: VideoSpec
    sources: Mapping[Role, Source]
    webhook: str | None = None
    key: str | None = None
    batch: tuple[str, int] | None = None
    remix_of: str | None = None


def file_place(file_id: str) -> str:
    """The name in the storage of a file that a client uploaded."""
    return f"files/{file_id}"


def cleaned_name(given: str | None) -> str:
    """The name of a client's file, for showing: its last part, without characters that cannot be shown."""
    last = (given or "").replace("\\", "/").rsplit("/", 1)[-1]
    shown_name = "".join(one for one in last if one.isprintable() and not 0xD800 <= ord(one) < 0xE000)
    return shown_name[:200] or "file"


def sources_of(given: Given, owner: str, server: Server) -> dict[Role, Source]:
    """The files of a request. Raises ApiError for an id that the owner does not have."""
    return {role: _source(role, given.files[role], owner, server) for role in ROLES if role in given.files}


def _source(role: Role, value: UploadFile | str, owner: str, server: Server) -> Source:
    if isinstance(value, UploadFile):
        return Upload(value.file, cleaned_name(value.filename))
    file = server.store.file(value, owner) if is_id("file", value) else None
    if file is None:
        raise invalid(role, f"there is no file {shown(value)}: upload it to /v1/files, or send it here", "no_such_file")
    return Kept(file_place(file.id), {"name": file.name, "bytes": file.bytes, "sha256": file.sha256})


def submit(order: Order, server: Server) -> Job:
    """Writes the inputs into the job's folder, and then adds the job; if it is refused, the inputs are removed.

    It returns the job that came with the same Idempotency-Key, if there is one.
    Raises Full, KeyReused, and ApiError for a file that is gone.
    """
    limits = server.limits
    job_id = new_id("video")
    folder = JobFolder(server.storage, job_id)
    try:
        inputs: dict[str, Any] = {role: _written(folder, role, source) for role, source in order.sources.items()}
        spec = order.spec.model_dump(mode="json")
        same = [spec, {role: one["sha256"] for role, one in inputs.items()}, order.webhook, order.remix_of]
        new = NewJob(
            id=job_id,
            owner=order.owner,
            spec=spec,
            inputs=inputs,
            model=order.spec.model,
            weights=server.versions()[order.spec.model],
            request_hash=hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest(),
            expires_in_s=limits.keep_videos_s,
            idempotency_key=order.key,
            batch=order.batch,
            remix_of=order.remix_of,
            webhook=order.webhook,
            input_bytes=sum(one["bytes"] for one in inputs.values()),
        )
        job, added = server.store.add(
            new,
            most_waiting=limits.max_waiting,
            most_of_owner=limits.max_jobs_of_owner,
            most_bytes_of_owner=limits.max_input_bytes_of_owner,
        )
    except StorageError:  # the job may have been added, and then needs its inputs
        raise
    except BaseException:
        folder.remove()
        raise
    if not added:
        folder.remove()
        if job.hidden:
            text = f"the video {job.id} of this Idempotency-Key was deleted: use a new key"
            raise ApiError(409, "deleted", text, "Idempotency-Key")
    return job


def _written(folder: JobFolder, role: Role, source: Source) -> dict[str, Any]:
    """Puts an input into the job's folder; returns what is known of it."""
    if isinstance(source, Kept):
        try:
            folder.storage.copy(source.place, folder.input_name(role))
        except FileNotFoundError:
            raise invalid(role, "the file is gone: upload it again", "no_such_file") from None
        return dict(source.info)
    return {"name": source.name, **stored(source.file, folder.input_name(role), folder.storage)}


def stored(file: BinaryIO, name: str, storage: Folder) -> dict[str, Any]:
    """Writes an upload to the storage; returns its bytes and sha256."""
    digest, count = hashlib.sha256(), 0
    file.seek(0)
    with storage.writing(name) as path, path.open("wb") as target:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            target.write(chunk)
            count += len(chunk)
    return {"bytes": count, "sha256": digest.hexdigest()}


def check_room(server: Server, owner: str, key: str | None, input_bytes: int) -> None:
    """Raises Full, before anything of a request is received, if there is no room for another video."""
    if key is not None and server.store.known_key(owner, key) is not None:
        return
    limits = server.limits
    server.store.check_room(
        owner,
        input_bytes,
        most_waiting=limits.max_waiting,
        most_of_owner=limits.max_jobs_of_owner,
        most_bytes_of_owner=limits.max_input_bytes_of_owner,
    )
