"""URLs of fsspec filesystems: what they name, what messages may show of them, and the filesystem behind them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from tccp.errors import TccpError


def is_url(place: str | Path) -> bool:
    """Whether a place is a URL rather than a path of this machine."""
    return re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*://", str(place)) is not None


def is_http(url: str) -> bool:
    return url.startswith(("http://", "https://"))


def bare(path: str, root: str = "") -> str:
    """A path or URL without protocol, user and query: what can be used as a name.

    root: the URL that a relative path belongs to.
    """
    if is_http(root or path):
        path = unquote(path.partition("?")[0].partition("#")[0])
    return re.sub(r"^[a-zA-Z][a-zA-Z0-9+.-]*://([^/@]*@)?", "", path)


def redacted(path: str) -> str:
    """A path or URL for messages: without user, password and signed query."""
    if not is_url(path):
        return path
    path = path.partition("?")[0] if is_http(path) else path
    return re.sub(r"://[^/@]*@", "://", path)


def local_path(path: str) -> str:
    """The path that a `file://` URL names; anything else unchanged."""
    protocol, _, place = path.partition("://")
    return place if is_url(path) and protocol in ("file", "local") else path


def open_filesystem(url: str) -> tuple[Any, str]:
    """The fsspec filesystem of a URL, and the path in it. No request is sent yet.

    It remembers no listings, because other machines write to the same place.
    Raises TccpError for chained URLs (`zip://a::s3://b`), for an unknown protocol, and if its package is missing.
    """
    from fsspec.config import conf
    from fsspec.core import url_to_fs

    if "::" in url:
        raise TccpError(f"{redacted(url)} joins several addresses; unpack the archive, and give one address")
    options: dict[str, Any] = {"use_listings_cache": False}
    if is_http(url):
        import aiohttp

        # The default ends a transfer after five minutes, whether it makes progress or hangs.
        options["client_kwargs"] = {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)}
    if url.startswith(("s3://", "s3a://")):
        # By default a request to a storage that does not answer takes minutes: 60 s per try, five tries in botocore
        # and five in s3fs. Retries belong to tccp.files.retry.
        given = conf.get(url.partition("://")[0], {}).get("config_kwargs", {})
        ours = {"connect_timeout": 10, "read_timeout": 20, "retries": {"total_max_attempts": 1}}
        options["config_kwargs"] = {**ours, **given}
    try:
        fs, path = url_to_fs(url, **options)
    except ImportError as error:
        raise TccpError(f"{redacted(url)}: a package is missing for such addresses: {error}") from None
    except ValueError as error:
        reason = str(error).splitlines()[0].replace(url, redacted(url))
        raise TccpError(f"{redacted(url)}: {reason}; give a path, or a URL of a kind that fsspec knows") from None
    return fs, str(path)
