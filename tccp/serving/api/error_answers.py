"""Errors of the API: every answer that is no success has the body `{"error": {message, type, code, param}}`."""

from __future__ import annotations

import errno
import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from tccp.errors import StorageError, TccpError
from tccp.serving.store import Full, KeyReused

logger = logging.getLogger(__name__)

_TYPES = {401: "authentication_error", 403: "authentication_error", 404: "not_found_error", 409: "conflict_error"}
_CODES = {400: "invalid_request", 404: "not_found", 405: "method_not_allowed", 413: "too_large"}
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class ErrorDetail(BaseModel):
    message: str
    type: str
    code: str
    param: str | None


class ErrorBody(BaseModel):
    """Every answer that is no success."""

    error: ErrorDetail


MEANINGS = {
    400: "The request cannot be used; the message names the field and what is allowed.",
    401: "The token is missing or unknown.",
    403: "The request comes from a page of another site.",
    404: "There is no such thing, or it belongs to somebody else.",
    408: "The request was not sent to its end.",
    409: "It conflicts with the state of the video, or the Idempotency-Key came with another request.",
    410: "It has expired.",
    413: "The request is too large.",
    415: "The request has a content type that is not accepted.",
    416: "The range lies outside of the file.",
    429: "There is no room now: try again after Retry-After seconds.",
    503: "The server cannot work now: try again after Retry-After seconds.",
}


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The error responses of an operation, for its documentation; those that any operation may have are added."""
    return {
        status: {"model": ErrorBody, "description": MEANINGS[status]}
        for status in sorted({400, 401, 403, 413, 503, *statuses})
    }


class ApiError(HTTPException):
    """Becomes the answer. message: one line: what was given, what is allowed, what to do. param: field it is about."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(status, " ".join(message.split()), dict(headers or {}))
        self.code, self.param = code, param


def invalid(param: str | None, message: str, code: str = "invalid_request") -> ApiError:
    return ApiError(400, code, f"{param}: {message}" if param else message, param)


def not_found(kind: str, name: str) -> ApiError:
    return ApiError(404, "not_found", f"there is no {kind} {shown(name)}")


def busy(message: str, retry_after_s: float = 5.0) -> ApiError:
    return ApiError(429, "too_many", message, headers={"Retry-After": f"{retry_after_s:.0f}"})


def unavailable(message: str) -> ApiError:
    return ApiError(503, "unavailable", message, headers={"Retry-After": "5"})


def shown(given: object) -> str:
    """What a client gave, short enough for a message."""
    text = str(given).encode("ascii", "backslashreplace").decode()
    return repr(text if len(text) <= 60 else text[:57] + "...")


def response(error: ApiError) -> JSONResponse:
    status = error.status_code
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else _TYPES.get(status)
    detail = ErrorDetail(message=error.detail, type=kind or "invalid_request_error", code=error.code, param=error.param)
    return JSONResponse(ErrorBody(error=detail).model_dump(), status, headers=error.headers)


def of_validation(errors: list[Any], prefix: str = "", fields: tuple[str, ...] = ()) -> ApiError:
    """The first of pydantic's errors in one line. fields: names that are allowed, for a field that is unknown."""
    first = errors[0]
    place = [str(part) for part in first["loc"] if part not in ("body", "query", "path", "header")]
    param = prefix + ".".join(place) or None
    message = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = f"unknown field; fields are {', '.join(fields)}" if fields else "unknown field"
    elif first["type"] != "missing" and not isinstance(first.get("input"), dict):
        message = f"{shown(first.get('input'))}: {message[:1].lower()}{message[1:]}"
    return invalid(param, message)


def add_handlers(app: FastAPI) -> None:
    @app.exception_handler(HTTPException)
    async def of_http(request: Request, error: HTTPException) -> JSONResponse:
        if not isinstance(error, ApiError):
            status = error.status_code
            message = str(error.detail)
            if status == 404:
                message = f"there is nothing at {shown(request.url.path)}; see /docs"
            elif status == 405:
                message = f"{request.method} is not allowed at {shown(request.url.path)}; see /docs"
            error = ApiError(status, _CODES.get(status, "http_error"), message, headers=error.headers)
        return response(error)

    @app.exception_handler(RequestValidationError)
    async def of_request(request: Request, error: RequestValidationError) -> JSONResponse:
        return response(of_validation(list(error.errors())))

    @app.exception_handler(Full)
    async def of_full(request: Request, error: Full) -> JSONResponse:
        return response(busy(str(error), error.retry_after_s))

    @app.exception_handler(KeyReused)
    async def of_key(request: Request, error: KeyReused) -> JSONResponse:
        return response(ApiError(409, "idempotency_key_reused", str(error), "Idempotency-Key"))

    @app.exception_handler(StorageError)
    @app.exception_handler(TccpError)  # of the storage: errors of a client's files are handled where they arise
    async def of_storage(request: Request, error: Exception) -> JSONResponse:
        logger.error("%s %s: %s", request.method, request.url.path, error)
        return response(unavailable("the server's storage or job store fails now: try again later"))

    @app.exception_handler(OSError)
    async def of_disk(request: Request, error: OSError) -> JSONResponse:
        if error.errno in _DISK_FULL:
            return await of_storage(request, error)
        raise error

    @app.exception_handler(Exception)
    async def of_bug(request: Request, error: Exception) -> JSONResponse:
        return response(ApiError(500, "internal", "the server made a mistake; its log says which"))
