"""Sessions of the page, and what those ask for who run the server: health and metrics."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from tccp.errors import StorageError
from tccp.serving.api.access import COOKIE, SESSION_S, TheServer, check_origin, owner_with_token, session_of
from tccp.serving.api.error_answers import ApiError, documented
from tccp.serving.store.job_store import RUNNING

router = APIRouter()
_STATUSES = (*RUNNING, "completed", "failed", "canceled", "expired")


class Session(BaseModel):
    """token: of the server; left out where it has none."""

    model_config = ConfigDict(extra="forbid")

    token: str = Field(default="", max_length=1000)


class SessionState(BaseModel):
    object: Literal["session"] = "session"
    owner: str | None


class Health(BaseModel):
    """problems: what keeps the server from working, in words."""

    status: Literal["ok", "not_ready"]
    problems: list[str]


@router.post("/v1/session", response_model=SessionState, responses=documented(408), tags=["session"])
async def start_session(given: Session, request: Request, response: Response, server: TheServer) -> SessionState:
    """Sets the cookie that the page uses in place of the header `Authorization`."""
    check_origin(request)
    if server.tokens is None:
        return SessionState(owner="local")
    owner = owner_with_token(server.tokens, given.token)
    if owner is None:
        raise ApiError(401, "unknown_token", "the token is unknown: ask who runs the server for one", "token")
    response.set_cookie(
        COOKIE,
        session_of(given.token),
        max_age=SESSION_S,
        httponly=True,
        samesite="strict",
        secure=request.url.scheme == "https",
    )
    return SessionState(owner=owner)


@router.delete("/v1/session", response_model=SessionState, responses=documented(), tags=["session"])
async def end_session(request: Request, response: Response) -> SessionState:
    """Removes the cookie."""
    check_origin(request)
    response.delete_cookie(COOKIE, httponly=True, samesite="strict", secure=request.url.scheme == "https")
    return SessionState(owner=None)


@router.get("/healthz", response_model=Health, responses=documented(), tags=["operation"])
async def health() -> Health:
    """Answers as long as the process works."""
    return Health(status="ok", problems=[])


@router.get(
    "/readyz",
    response_model=Health,
    responses={**documented(), 503: {"model": Health, "description": "It cannot work now."}},
    tags=["operation"],
)
async def ready(server: TheServer) -> JSONResponse:
    """Whether the server can take videos and make them; 503 with a list of what is the matter if not."""
    problems = []
    try:
        await run_in_threadpool(server.store.now)
    except StorageError as error:
        problems.append(f"the job store cannot be reached ({error.reason})")
    problems += await server.ready()
    found = Health(status="not_ready" if problems else "ok", problems=problems)
    return JSONResponse(found.model_dump(), 503 if problems else 200)


@router.get(
    "/metrics",
    response_class=Response,
    responses={
        200: {"description": "Metrics.", "content": {"text/plain": {"schema": {"type": "string"}}}},
        **documented(),
    },
    tags=["operation"],
)
async def metrics(server: TheServer) -> Response:
    """Metrics in the text format of Prometheus."""
    counts = await run_in_threadpool(server.store.counts)
    lines = ["# HELP tccp_videos Videos by status.", "# TYPE tccp_videos gauge"]
    lines += [f'tccp_videos{{status="{status}"}} {counts.get(status, 0)}' for status in _STATUSES]
    text = "\n".join(lines) + "\n"
    if server.metrics is not None:
        text += await server.metrics()
    return Response(text, media_type="text/plain; version=0.0.4")
