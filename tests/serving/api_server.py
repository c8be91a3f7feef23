"""A server of the API on a free port, in a thread, for tests that talk to it over HTTP."""

from __future__ import annotations

import hashlib
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests
import uvicorn

from tccp.errors import TccpError
from tccp.files import Folder
from tccp.serving.api import Server, create_app
from tccp.serving.job_folder import JobFolder
from tccp.serving.store import Job, JobStore

CONSENT = "drawn people: nobody needs to agree"
FILES = {"scene": ("scene.mp4", b"scene"), "audio": ("sound.wav", b"sound"), "identity": ("face.png", b"face")}


async def heads_in(path: Path) -> tuple[int, int, bytes, list[list[float]]]:
    """Finds one head in a file that starts with `scene`."""
    if not path.read_bytes().startswith(b"scene"):
        raise TccpError(f"{path}: it is no film or picture; give one that ffmpeg can read")
    return 64, 48, b"\xff\xd8 a picture", [[1.0, 2.0, 30.0, 40.0]]


async def always_ready() -> list[str]:
    return []


def server_for(store: JobStore, storage: Folder, **changes: Any) -> Server:
    given = {"models": {"default": "0" * 16}, "find_heads": heads_in, "ready": always_ready, **changes}
    return Server(store, storage, **given)


@contextmanager
def serving(server: Server, **options: Any) -> Iterator[str]:
    """The address of a server that runs within the context."""
    config = uvicorn.Config(create_app(server, **options), log_level="warning", timeout_graceful_shutdown=1)
    running = uvicorn.Server(config)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    thread = threading.Thread(target=running.run, args=([listener],))
    thread.start()
    try:
        while not running.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        running.should_exit = True
        thread.join()
        listener.close()


def post_video(url: str, headers: dict[str, str] | None = None, **fields: Any) -> requests.Response:
    """Asks for a video of tiny files that nobody decodes."""
    return requests.post(f"{url}/v1/videos", data={"consent": CONSENT, **fields}, files=FILES, headers=headers)


def error_of(response: requests.Response) -> dict[str, Any]:
    """The error in an answer, whose shape is checked."""
    body = response.json()
    assert list(body) == ["error"], body
    error = body["error"]
    assert list(error) == ["message", "type", "code", "param"]
    assert error["message"] and "\n" not in error["message"]
    return error


def complete(store: JobStore, storage: Folder, film: bytes) -> Job:
    """Claims the job whose turn it is, and completes it with a film that is not one."""
    claim = store.claim("tester", 60.0, 5)
    assert claim is not None
    folder = JobFolder(storage, claim.id)
    folder.write_preview(0, b"\xff\xd8 a frame")
    assert store.update(claim, frames=100, windows=4) and store.add_windows(claim, 4, 1)
    files = {}
    for name, content in {"film.mp4": film, "landmarks.jsonl": b"{}\n", "report.json": b"{}"}.items():
        storage.write(f"{folder.film_folder(claim.fence)}/{name}", content)
        files[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    result = {"folder": folder.film_folder(claim.fence), "files": files, "width": 64, "height": 48, "seconds": 4.0}
    assert store.complete(claim, result)
    job = store.get(claim.id)
    assert job is not None
    return job
