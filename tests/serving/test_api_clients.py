"""Clients that others wrote: a tester of OpenAPI documents, and openai-python's `videos`."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator

import hypothesis
import pytest
import requests
from api_server import CONSENT, FILES, complete, post_video, server_for, serving

from tccp.files import Folder
from tccp.serving.api import ServerLimits
from tccp.serving.store import JobStore

pytest_plugins = ["api_fixtures"]


@pytest.fixture
def busy_url(store: JobStore, server_storage: Folder) -> Iterator[str]:
    """A server with a completed video, a file and a batch, whose streams of events are short."""
    with serving(server_for(store, server_storage, limits=ServerLimits(events_s=0.05))) as url:
        post_video(url)
        complete(store, server_storage, bytes(1000))
        yield url


@pytest.mark.slow
def test_documented_requests_have_documented_answers(busy_url: str, store: JobStore) -> None:
    """No 5xx, and nothing that the document does not say: statuses, content types, shapes of answers."""
    reason = "schemathesis is not installed: pip install -c constraints.txt -e '.[serve,dev]'"
    schemathesis = pytest.importorskip("schemathesis", reason=reason)
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        response_schema_conformance,
        status_code_conformance,
    )

    schema = schemathesis.openapi.from_url(f"{busy_url}/openapi.json")
    names = [job.id for job in store.listed(None, 10)]
    tested = set()
    for found in schema.get_all_operations():
        operation = found.ok()

        @hypothesis.seed(1)
        @hypothesis.settings(
            max_examples=12,
            deadline=None,
            database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
            phases=[hypothesis.Phase.generate],
        )
        @hypothesis.given(case=operation.as_strategy(), known=hypothesis.strategies.sampled_from([None, *names]))
        def check(case, known) -> None:  # type: ignore[no-untyped-def]
            if known is not None and "video_id" in (case.path_parameters or {}) and case.method != "DELETE":
                case.path_parameters["video_id"] = known
            answer = case.call(timeout=20)
            case.validate_response(
                answer,
                checks=[
                    schemathesis.checks.not_a_server_error,
                    status_code_conformance,
                    content_type_conformance,
                    response_schema_conformance,
                ],
            )

        check()
        tested.add(operation.label)
    assert len(tested) >= 22


def test_openai_creates_polls_and_downloads(store: JobStore, server_storage: Folder) -> None:
    reason = "openai is not installed: pip install -c constraints.txt -e '.[serve,dev]'"
    openai = pytest.importorskip("openai", reason=reason)
    with serving(server_for(store, server_storage, tokens={"a-token": "somebody"})) as url:
        headers = {"Authorization": "Bearer a-token"}
        ids = {
            role: requests.post(f"{url}/v1/files", files={"file": file}, headers=headers).json()["id"]
            for role, file in FILES.items()
        }
        client = openai.OpenAI(api_key="a-token", base_url=f"{url}/v1", max_retries=0)
        with client, warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # its methods say that OpenAI's service has closed
            audio, identity = ids["audio"], ids["identity"]
            extra = {"audio": audio, "identity": identity, "consent": CONSENT, "person": [3, 4], "redraw": True}
            scene = ("scene.mp4", b"scene", "video/mp4")
            video = client.videos.create(prompt="a note", input_reference=scene, extra_body=extra)
            assert video.status == "queued" and video.prompt == "a note"
            job = store.get(video.id)
            assert job is not None and job.spec["person"] == [3.0, 4.0] and job.spec["redraw"] is True
            finisher = threading.Timer(0.2, complete, (store, server_storage, b"the film"))
            finisher.start()
            ended = client.videos.poll(video.id, poll_interval_ms=50)
            finisher.join()
            assert ended.status == "completed" and ended.progress == 100 and ended.seconds == "4.0"
            assert client.videos.download_content(video.id).read() == b"the film"
            assert client.videos.download_content(video.id, variant="thumbnail").read() == b"\xff\xd8 a frame"
            other = client.videos.create(prompt="", extra_body={**extra, "scene": ids["scene"]})
            assert [one.id for one in client.videos.list(limit=1)] == [other.id, video.id], "it asks for all pages"
            remix = client.videos.remix(video.id, prompt="another note")
            assert remix.remixed_from_video_id == video.id
            assert client.videos.delete(other.id).deleted
            with pytest.raises(openai.BadRequestError, match="sound"):
                client.videos.create(prompt="x", seconds="4", extra_body={**extra, "scene": ids["scene"]})
            with pytest.raises(openai.NotFoundError):
                client.videos.retrieve("video_" + "0" * 24)
