"""Sends files of the storage, whole or in part."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import BinaryIO

from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from starlette.concurrency import run_in_threadpool

from tccp.files import Folder
from tccp.serving.api.error_answers import ApiError

_CHUNK = 1 << 18


async def file_response(
    request: Request, storage: Folder, place: str, media_type: str, name: str, etag: str | None = None
) -> Response:
    """A file of the storage; a part of it where the request has a range (RFC 9110, one range).

    name: for those who save it. etag: changes with the content; None: it has none.
    Raises FileNotFoundError, and ApiError 416 for a range outside of the file.
    """
    size = await run_in_threadpool(storage.size, place)
    if size is None:
        raise FileNotFoundError(place)
    headers = {
        "Accept-Ranges": "bytes",
        "Cache-Control": "private, no-cache",
        "Content-Disposition": f'inline; filename="{name}"',
    }
    tag = None if etag is None else f'"{etag}"'
    if tag is not None:
        headers["ETag"] = tag
        if tag in re.findall(r'"[^"]*"', request.headers.get("if-none-match", "")):
            return Response(status_code=304, headers=headers)
    first, last, status = 0, size - 1, 200
    asked = request.headers.get("range")
    if asked is not None and request.headers.get("if-range", tag) == tag:
        found = asked_range(asked, size)
        if found is not None:
            (first, last), status = found, 206
            headers["Content-Range"] = f"bytes {first}-{last}/{size}"
    headers["Content-Length"] = str(last - first + 1)
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers, media_type=media_type)
    file = await run_in_threadpool(storage.open, place)
    return StreamingResponse(_part(file, first, last - first + 1), status, headers, media_type)


def asked_range(header: str, size: int) -> tuple[int, int] | None:
    """First and last byte that a header `Range` asks for; None if it is to be ignored, as several ranges are.

    Raises ApiError 416 if no byte of the file lies in it.
    """
    match = re.fullmatch(r"bytes=\s*([0-9]{0,19})-([0-9]{0,19})\s*", header)
    if match is None or match[1] == match[2] == "":
        return None
    if match[1] == "":
        first, last = max(size - int(match[2]), 0), size - 1
    else:
        first, last = int(match[1]), min(int(match[2] or size), size - 1)
        if match[2] and int(match[2]) < first:
            return None
    if first > last or first >= size:
        text = f"the range {header[:60]!r} lies outside of the file, which has {size} bytes"
        raise ApiError(416, "range", text, "Range", {"Content-Range": f"bytes */{size}"})
    return first, last


async def _part(file: BinaryIO, first: int, count: int) -> AsyncIterator[bytes]:
    try:
        await run_in_threadpool(file.seek, first)
        while count:
            chunk = await run_in_threadpool(file.read, min(count, _CHUNK))
            if not chunk:
                raise EOFError("the file ended before its end")  # cuts the connection: the client sees a failure
            count -= len(chunk)
            yield chunk
    finally:
        file.close()
