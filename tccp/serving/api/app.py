"""Puts the API together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tccp import __version__
from tccp.serving.api import batches, error_answers, heads, operation, uploaded_files, videos
from tccp.serving.api.request_body import BodyLimits, Places
from tccp.serving.api.server import Server

PAGE = Path(__file__).parent.parent / "page"
"""The page's files: `index.html` is served at `/`, all of them at `/page/`."""
_CONTENT = "default-src 'self'; img-src 'self' data: blob:; media-src 'self' blob:; style-src 'self' 'unsafe-inline'; "
_CONTENT += "frame-ancestors 'none'; base-uri 'none'; form-action 'self'"


def create_app(server: Server, page: Path = PAGE) -> FastAPI:
    """The API of a server. page: folder of the page's files; without it, there is no page."""
    app = FastAPI(title="TCCP", version=__version__, description="Films in which a person says what a sound says.")
    app.state.server = server
    app.state.uploads = Places(server.limits.max_uploads, "receives uploads")
    app.state.heads = Places(server.limits.max_heads, "looks for heads")
    error_answers.add_handlers(app)
    app.add_middleware(BodyLimits, limits=server.limits)
    app.add_middleware(_SafeHeaders)
    for module in (videos, uploaded_files, batches, heads, operation):
        app.include_router(module.router)
    if (page / "index.html").is_file():
        app.mount("/page", StaticFiles(directory=page))

        @app.get("/", include_in_schema=False)
        async def index() -> FileResponse:
            return FileResponse(page / "index.html")

    _document_errors_once(app)
    return app


def _document_errors_once(app: FastAPI) -> None:
    """Takes FastAPI's own 422 out of the documentation: requests that cannot be used are answered 400."""
    made = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = made()
            for path in schema["paths"].values():
                for operation_ in path.values():
                    operation_["responses"].pop("422", None)
            for name in ("HTTPValidationError", "ValidationError"):
                schema["components"]["schemas"].pop(name, None)
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


class _SafeHeaders:
    """ASGI middleware: tells browsers not to guess types, and not to run what does not come from the page."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["X-Content-Type-Options"] = "nosniff"
                headers["Referrer-Policy"] = "no-referrer"
                if scope["path"] == "/" or scope["path"].startswith("/page"):
                    headers["Content-Security-Policy"] = _CONTENT
            await send(message)

        await self._app(scope, receive, with_headers if scope["type"] == "http" else send)
