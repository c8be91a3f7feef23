"""From a form over HTTP to the film: the same pixels as `tccp generate`."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jobs
import numpy as np
import pytest
import requests
import tiny
from api_server import CONSENT, server_for, serving
from local_stages import LocalStages

from tccp.files import Folder
from tccp.roundtable import identity_path
from tccp.serving.conductor import Conductor, Rules
from tccp.serving.store import JobStore
from tccp.serving.weight_versions import pin

pytest_plugins = ["tiny_fixtures", "api_fixtures"]


@contextmanager
def conducting(store: JobStore, storage: Folder, stages: LocalStages) -> Iterator[None]:
    """A conductor that works in a thread within the context."""
    stopped = threading.Event()

    async def run() -> None:
        task = asyncio.create_task(Conductor(store, storage, stages, Rules(poll_s=0.02)).run())
        await asyncio.to_thread(stopped.wait)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


def ended(url: str, video_id: str) -> dict[str, object]:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        video = requests.get(f"{url}/v1/videos/{video_id}").json()
        if video["status"] not in ("queued", "in_progress"):
            return video
        time.sleep(0.05)
    pytest.fail(f"it has not ended: {video}")


@pytest.mark.slow
def test_films_over_http_are_those_of_generate(
    film: Path, weights: Path, store: JobStore, server_storage: Folder, tmp_path: Path
) -> None:
    """A film, its remix from the landmarks that stage 1 made, and a scene that is none."""
    track = jobs.track_file(film, tmp_path)
    stages = LocalStages(store, server_storage)
    server = server_for(store, server_storage, models={"default": pin(weights, server_storage)})
    try:
        with conducting(store, server_storage, stages), serving(server) as url:
            given = {"scene": film, "audio": film, "identity": identity_path(film), "track": track}
            files = {role: (path.name, path.read_bytes()) for role, path in given.items()}
            options = {"consent": CONSENT, "identity_box": "whole", "lossless": "true", "seed": "5"}
            answer = requests.post(f"{url}/v1/videos", data=options, files=files)
            assert answer.status_code == 200, answer.text
            video = ended(url, answer.json()["id"])
            assert video["status"] == "completed", video["error"]
            assert (video["seconds"], video["size"]) == ("1.0", "128x96")
            content = f"{url}/v1/videos/{video['id']}/content"
            landmarks = requests.get(content, params={"variant": "landmarks"}).content
            remix = requests.post(f"{url}/v1/videos/{video['id']}/remix", files={"landmarks": ("l.jsonl", landmarks)})
            assert remix.status_code == 200, remix.text
            again = ended(url, remix.json()["id"])
            assert again["status"] == "completed", again["error"]
            edited = tmp_path / "landmarks.jsonl"
            edited.write_bytes(landmarks)
            for one, options_of_generate in ((video, {}), (again, {"landmarks": edited})):
                got, out = tmp_path / f"{one['id']}.mp4", tmp_path / f"{one['id']}_expected.mp4"
                got.write_bytes(requests.get(f"{url}/v1/videos/{one['id']}/content").content)
                tiny.generated(film, weights, out, box=str(track), batch=1, seed=5, **options_of_generate)
                np.testing.assert_array_equal(tiny.pictures(got), tiny.pictures(out))
            assert requests.get(content, params={"variant": "report"}).json()["id"] == video["id"]
            preview = requests.get(content, params={"variant": "preview"})
            assert preview.content[:2] == b"\xff\xd8" and preview.headers["Content-Type"] == "image/jpeg"
            damaged = {**files, "scene": ("scene.mp4", b"this is no film")}
            refused = requests.post(f"{url}/v1/videos", data=options, files=damaged).json()
            failed = ended(url, refused["id"])
            assert failed["status"] == "failed"
            assert str(tmp_path) not in str(failed["error"]) and failed["error"]["code"] != "attempt_failed"  # type: ignore[index]
    finally:
        stages.close()
