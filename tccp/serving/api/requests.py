"""Reads what a client asks for, from a form or from JSON: options of a video, and files or ids of files."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from fastapi import Request
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile

from tccp.serving.api.error_answers import ApiError, invalid, of_validation, shown
from tccp.serving.api.objects import ID_PATTERN
from tccp.serving.api.server import Server
from tccp.serving.spec import NEEDED_ROLES, ROLES, Role, VideoSpec
from tccp.strict_json import parse_json

_ALIASES: dict[str, Role] = {"input_reference": "scene"}
_LISTS = ("person", "guidance_interval")
_NOT_OFFERED = {
    "seconds": "the film is as long as the sound: cut the sound instead",
    "size": "the film has the size of the scene: scale the scene instead",
}
_MAX_FIELDS = 64
_MAX_URL = 2000
_MAX_KEY = 200
FIELDS = (*ROLES, *_ALIASES, *VideoSpec.model_fields, "webhook_url")


@dataclass
class Given:
    """What a request names. files: an upload, or the id of a file, by role. webhook: where to tell how it ended."""

    options: dict[str, Any] = field(default_factory=dict)
    files: dict[Role, UploadFile | str] = field(default_factory=dict)
    webhook: str | None = None


@asynccontextmanager
async def body_of(request: Request) -> AsyncIterator[dict[str, Any]]:
    """The fields of a form or of a JSON object; uploads of a form are closed after the context.

    A field that comes several times, or whose name ends in `[]`, is a list. Empty fields are left out.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        yield await json_body(request)
    elif kind == "multipart/form-data":
        async with request.form(max_files=_MAX_FIELDS, max_fields=_MAX_FIELDS) as form:
            yield _fields(form)
    else:
        text = f"the content type is {shown(kind)}: send multipart/form-data or application/json"
        raise ApiError(415, "content_type", text, "Content-Type")


async def json_body(request: Request) -> dict[str, Any]:
    """A JSON object."""
    value = await run_in_threadpool(parsed, await request.body(), "the body")  # some have thousands of rows
    if not isinstance(value, dict):
        raise invalid(None, "the body is no JSON object: send {...}")
    return value


def parsed(text: str | bytes, what: str) -> Any:
    """The value of a JSON text whose strings can be stored."""
    try:
        value = parse_json(text)
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair cannot be stored or sent
    except (ValueError, UnicodeError) as error:
        raise invalid(None, f"{what} is not JSON that can be used ({error})") from None
    if "\\u0000" in json.dumps(value):
        raise invalid(None, f"{what} has a text with the character NUL: leave it out")
    return value


def _fields(form: FormData) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for key, value in form.multi_items():
        name, brackets = re.fullmatch(r"([^\[]*)(.*)", key, re.DOTALL).groups()  # type: ignore[union-attr]
        if isinstance(value, UploadFile):
            if not value.filename and not value.size:  # of a page's form, where no file is chosen
                continue
        elif value == "":
            continue
        elif "\x00" in value:
            raise invalid(name, "it has the character NUL: leave it out")
        if brackets in ("", "[file_id]") and name not in fields:
            fields[name] = value
        elif brackets in ("", "[]"):
            before = fields.get(name, [])
            fields[name] = [*(before if isinstance(before, list) else [before]), value]
        else:
            raise invalid(key, f"unknown field; fields are {', '.join(FIELDS)}")
    for name in _LISTS:  # lists may also come as JSON
        if isinstance(fields.get(name), str) and fields[name].lstrip().startswith("["):
            fields[name] = parsed(fields[name], name)
    return fields


def given_in(fields: Mapping[str, Any], server: Server) -> Given:
    """Sorts the fields of a request for a video. Raises ApiError for those that cannot be used."""
    given = Given()
    for name, value in fields.items():
        role = _ALIASES.get(name, name)
        if role in ROLES:
            if role in given.files:
                raise invalid(name, f"{role} is given twice: give it once")
            if isinstance(value, dict) and set(value) == {"file_id"}:
                value = value["file_id"]
            if isinstance(value, UploadFile):
                if not value.size:
                    raise invalid(name, "the file is empty: send one with content", "empty_file")
            elif not isinstance(value, str):
                raise invalid(name, "give one file, or the id of an uploaded file")
            given.files[role] = value
        elif name in _NOT_OFFERED:
            raise invalid(name, _NOT_OFFERED[name])
        elif name == "webhook_url":
            given.webhook = _webhook(value, server)
        elif isinstance(value, UploadFile) or (
            isinstance(value, list) and any(isinstance(one, UploadFile) for one in value)
        ):
            known = name in VideoSpec.model_fields
            raise invalid(name, "give text, no file" if known else f"unknown field; files are {', '.join(ROLES)}")
        else:
            given.options[name] = value
    return given


def checked_spec(options: Mapping[str, Any], server: Server) -> VideoSpec:
    """Raises ApiError for options that cannot be used, and for a model that the server does not have."""
    try:
        spec = VideoSpec.model_validate(options)
    except ValidationError as error:
        raise of_validation(list(error.errors()), fields=FIELDS) from None
    models = server.versions()
    if spec.model not in models:
        raise invalid("model", f"there is no model {shown(spec.model)}; models are {', '.join(sorted(models))}")
    return spec


def check_roles(roles: Mapping[Role, object]) -> None:
    """Raises ApiError if a file is missing that every video needs."""
    for role in NEEDED_ROLES:
        if role not in roles:
            raise invalid(role, "it is missing: give a file, or the id of an uploaded file", "missing_file")


def _webhook(value: object, server: Server) -> str:
    if server.webhook_secret is None:
        raise invalid("webhook_url", "this server sends no webhooks: ask for the video's state instead")
    text = "give an address such as https://example.org/hook, without user and password"
    if not isinstance(value, str) or len(value) > _MAX_URL or not value.isascii():
        raise invalid("webhook_url", text)
    try:
        url = urlsplit(value)
        usable = url.scheme in ("http", "https") and bool(url.hostname) and url.username is None
        usable = usable and (url.port is None or url.port > 0)
    except ValueError:
        usable = False
    if not usable:
        raise invalid("webhook_url", text)
    return value


def key_of(request: Request) -> str | None:
    """The header Idempotency-Key."""
    key = request.headers.get("idempotency-key")
    if key is not None and not (1 <= len(key) <= _MAX_KEY and key.isascii() and key.isprintable()):
        raise invalid("Idempotency-Key", f"give 1 to {_MAX_KEY} printable ASCII characters")
    return key


def key_parameter(description: str) -> dict[str, Any]:
    """The documentation of the header Idempotency-Key."""
    schema = {"type": "string", "minLength": 1, "maxLength": _MAX_KEY, "pattern": "^[ -~]+$"}
    return {
        "name": "Idempotency-Key",
        "in": "header",
        "required": False,
        "schema": schema,
        "description": description,
    }


def body_schema(*, needed: bool, multipart: bool = True, remix: bool = False) -> dict[str, Any]:
    """The documentation of a request for a video. needed: whether scene, audio, identity and consent must be given."""
    options = VideoSpec.model_json_schema()
    described = {"description": "The id of an uploaded file", "type": "string", "pattern": ID_PATTERN["file"]}
    roles = ("landmarks", "mask", "track") if remix else ROLES
    own = {"webhook_url": {"type": "string", "maxLength": _MAX_URL, "description": "Where to tell how it ended"}}
    required = [*NEEDED_ROLES, *options["required"]] if needed else []

    def schema(file: dict[str, Any]) -> dict[str, Any]:
        properties = {**dict.fromkeys(roles, file), **options["properties"], **own}
        found = {"type": "object", "properties": properties, "additionalProperties": False}
        return {**found, "required": required} if required else found

    content = {"application/json": {"schema": schema(described)}}
    if multipart:
        upload = {"anyOf": [{"type": "string", "format": "binary"}, described]}
        content = {"multipart/form-data": {"schema": schema(upload)}, **content}
    return {"requestBody": {"required": True, "content": content}}
