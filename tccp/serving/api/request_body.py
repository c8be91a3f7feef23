"""Bounds on the bodies of requests, before and while they are received."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tccp.serving.api.error_answers import ApiError, busy, response
from tccp.serving.api.server import ServerLimits

_DRAIN_S = 5.0


class BodyLimits:
    """ASGI middleware: answers 413 as soon as a body is too large, whether or not its length is announced.

    It also lets a client that is answered early send on for a moment: if the connection were closed at once, the client
    would see a broken connection in place of the answer.
    """

    def __init__(self, app: ASGIApp, limits: ServerLimits):
        self._app, self._limits = app, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        limits = self._limits
        is_upload = headers.get("content-type", "").startswith("multipart/form-data")
        limit = limits.max_upload_bytes if is_upload else limits.max_json_bytes
        received, ended, answered = 0, False, False

        async def bounded_receive() -> Message:
            nonlocal received, ended
            if ended:
                return await receive()
            try:
                async with asyncio.timeout(None if answered else limits.upload_idle_s):
                    message = await receive()
            except TimeoutError:
                text = f"no part of the request came for {limits.upload_idle_s:g} s: send it again"
                raise ApiError(408, "timeout", text, headers={"Connection": "close"}) from None
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                ended = not message.get("more_body", False)
                if received > limit and not answered:
                    raise _too_large(limit)
            else:
                ended = True
            return message

        async def draining_send(message: Message) -> None:
            nonlocal answered
            last = message["type"] == "http.response.body" and not message.get("more_body", False)
            if message["type"] == "http.response.start":
                answered = True
            if not last or ended or "expect" in headers or not _has_body(headers):
                await send(message)
                return
            await send({**message, "more_body": True})
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_DRAIN_S):
                    while not ended:
                        await bounded_receive()
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        announced = headers.get("content-length", "")
        if announced.isdigit() and int(announced) > limit:
            await response(_too_large(limit))(scope, bounded_receive, draining_send)
            return
        await self._app(scope, bounded_receive, draining_send)


def _has_body(headers: Headers) -> bool:
    return headers.get("content-length", "0") != "0" or "transfer-encoding" in headers


def _too_large(limit: int) -> ApiError:
    text = f"the request has more than {limit:,} bytes: send less, or upload files one by one to /v1/files"
    return ApiError(413, "too_large", text, headers={"Connection": "close"})


class Places:
    """Bounds how many requests of a kind one process works on at once."""

    def __init__(self, most: int, what: str):
        self._free, self._what = most, what

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """Raises ApiError 429 if none is free."""
        if self._free <= 0:
            raise busy(f"the server {self._what} for others now: try again in a moment")
        self._free -= 1
        try:
            yield
        finally:
            self._free += 1
