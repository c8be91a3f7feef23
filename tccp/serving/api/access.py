"""Who sends a request: by a token in the header `Authorization`, or by the cookie that the page uses."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Mapping
from typing import Annotated
from urllib.parse import urlsplit

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from tccp.serving.api.error_answers import ApiError
from tccp.serving.api.server import Server

COOKIE = "tccp_session"
SESSION_S = 7 * 86400
_LOCAL = "local"
_READS = ("GET", "HEAD", "OPTIONS")
_bearer = HTTPBearer(auto_error=False, description="A token of the server. Servers without tokens need none.")
_Bearer = Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]


def session_of(token: str) -> str:
    """What the cookie holds: it proves that its holder knew the token, and does not tell it."""
    return hmac.digest(token.encode(), b"tccp session", "sha256").hex()


def owner_with_token(tokens: Mapping[str, str], given: str) -> str | None:
    """The owner of a token; None if it is unknown. It takes as long whatever is given."""
    return _owner({_digest(token): owner for token, owner in tokens.items()}, _digest(given))


def _owner_with_session(tokens: Mapping[str, str], given: str) -> str | None:
    sessions = {_digest(session_of(token)): owner for token, owner in tokens.items()}
    return _owner(sessions, _digest(given))


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()


def _owner(owners: Mapping[bytes, str], given: bytes) -> str | None:
    found = None
    for known, owner in owners.items():
        if hmac.compare_digest(known, given):
            found = owner
    return found


def check_origin(request: Request) -> None:
    """Refuses what a page of another site makes a browser send, whose cookie or place would be trusted."""
    origin = request.headers.get("origin")
    if request.method not in _READS and origin and urlsplit(origin).netloc != request.headers.get("host"):
        raise ApiError(403, "other_origin", "this request comes from a page of another site: it is not accepted")


def server_of(request: Request) -> Server:
    server = request.app.state.server
    assert isinstance(server, Server)
    return server


def owner_of(request: Request, server: Annotated[Server, Depends(server_of)], bearer: _Bearer) -> str:
    """The owner of what the request makes or asks for."""
    if server.tokens is None:
        check_origin(request)
        if not _is_loopback(request.url.hostname or ""):  # a name of another site that leads to this machine
            text = "this server has no tokens, so it serves this machine only: ask for it as localhost, or set tokens"
            raise ApiError(403, "not_local", text)
        return _LOCAL
    if bearer is not None:
        owner = owner_with_token(server.tokens, bearer.credentials)
    else:
        check_origin(request)
        owner = _owner_with_session(server.tokens, request.cookies.get(COOKIE, ""))
    if owner is None:
        raise ApiError(
            401,
            "unknown_token",
            "the token is missing or unknown: send the header `Authorization: Bearer TOKEN`",
            headers={"WWW-Authenticate": "Bearer"},
        )
    return owner


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


TheServer = Annotated[Server, Depends(server_of)]
Owner = Annotated[str, Depends(owner_of)]
