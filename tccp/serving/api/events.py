"""The events of a video, as server-sent events: its object at every change, and how the stream ended."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.concurrency import run_in_threadpool

from tccp.serving.api.objects import video
from tccp.serving.api.server import Server
from tccp.serving.store.job_store import RUNNING

logger = logging.getLogger(__name__)

_PING_S = 10.0
_UNSTABLE = ("eta_s",)  # changes all the time, so that it is no reason for an event


async def events_of(job_id: str, owner: str, server: Server, number: int) -> AsyncIterator[bytes]:
    """number: of the last event that the client has seen.

    The last event is `end` if the video has ended, `reconnect` after `events_s`, or `error`.
    """
    limits = server.limits
    ends_at = time.monotonic() + limits.events_s
    last: dict[str, Any] | None = None
    sent_at = time.monotonic()
    yield b"retry: 1000\n\n"
    try:
        while True:
            now = await run_in_threadpool(_seen, job_id, owner, server)
            if now is None:
                yield _event("end", number + 1, {"id": job_id, "status": "deleted"})
                return
            if _stable(now) != _stable(last):
                number, last, sent_at = number + 1, now, time.monotonic()
                yield _event("video", number, now)
            if now["status"] not in RUNNING:
                yield _event("end", number + 1, {"id": job_id, "status": now["status"]})
                return
            left_s = ends_at - time.monotonic()
            if left_s <= 0:
                yield _event("reconnect", number + 1, {"id": job_id})
                return
            if time.monotonic() - sent_at > _PING_S:
                sent_at = time.monotonic()
                yield b": the server is there\n\n"
            await asyncio.sleep(min(limits.poll_s, left_s))
    except Exception as error:  # the answer has begun, with status 200
        logger.warning("the events of %s end: %s", job_id, error)
        message = "the server failed: ask again"
        yield _event(
            "error", number + 1, {"error": {"message": message, "type": "server_error", "code": "unavailable"}}
        )


def _seen(job_id: str, owner: str, server: Server) -> dict[str, Any] | None:
    job = server.store.get(job_id, owner)
    return None if job is None else video(job, server.store)


def _stable(seen: dict[str, Any] | None) -> dict[str, Any] | None:
    return None if seen is None else {name: value for name, value in seen.items() if name not in _UNSTABLE}


def _event(name: str, number: int, data: dict[str, Any]) -> bytes:
    return f"event: {name}\nid: {number}\ndata: {json.dumps(data)}\n\n".encode()
