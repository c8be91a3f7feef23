"""What the API refuses: too large, too many, from strangers; and what it says of itself."""

from __future__ import annotations

import hashlib
import http.client
import itertools
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
import requests
from api_server import CONSENT, FILES, always_ready, error_of, post_video, server_for, serving

from tccp.files import Folder
from tccp.serving.api import ServerLimits
from tccp.serving.api.access import owner_with_token
from tccp.serving.store import JobStore

pytest_plugins = ["api_fixtures"]
TOKENS = {"first-token": "first", "second-token": "second"}


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


@pytest.fixture
def guarded(store: JobStore, server_storage: Folder) -> Iterator[str]:
    """A server with tokens."""
    with serving(server_for(store, server_storage, tokens=TOKENS)) as url:
        yield url


@pytest.mark.parametrize("chunked", [False, True])
def test_too_large_requests_are_refused_while_they_are_sent(
    store: JobStore, server_storage: Folder, chunked: bool
) -> None:
    """The answer comes although the client has not sent everything, and with or without an announced length."""
    limits = ServerLimits(max_upload_bytes=100_000, max_json_bytes=1000)
    with serving(server_for(store, server_storage, limits=limits)) as url:
        for kind, limit in (("multipart/form-data; boundary=x", 100_000), ("application/json", 1000)):
            body = b"--x\r\nContent-Disposition: form-data; name=scene; filename=a\r\n\r\n" + bytes(limit + 1)
            with socket.create_connection((urlsplit(url).hostname or "", urlsplit(url).port or 0), 20) as client:
                length = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {10**9}"
                head = f"POST /v1/videos HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\n{length}\r\n\r\n"
                client.sendall(head.encode() + (b"%x\r\n%s\r\n" % (len(body), body) if chunked else body))
                answer = http.client.HTTPResponse(client)
                answer.begin()
                assert answer.status == 413
                assert f"{limit:,} bytes" in answer.read().decode()
        assert not server_storage.tree() and store.listed(None, 10) == []
        answer = post_video(url)
        assert answer.status_code == 200, "the limits are for each request"


def test_a_client_that_stops_sending_is_let_go(store: JobStore, server_storage: Folder) -> None:
    with serving(server_for(store, server_storage, limits=ServerLimits(upload_idle_s=0.2))) as url:
        with socket.create_connection((urlsplit(url).hostname or "", urlsplit(url).port or 0), 20) as client:
            head = "POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=x\r\n"
            client.sendall((head + "Content-Length: 1000\r\n\r\n--x\r\n").encode())
            answer = http.client.HTTPResponse(client)
            answer.begin()
            assert answer.status == 408
        with socket.create_connection((urlsplit(url).hostname or "", urlsplit(url).port or 0), 20) as client:
            client.sendall((head + "Content-Length: 1000\r\n\r\n--x\r\n").encode())  # and goes without a word
        assert requests.get(f"{url}/v1/files").json()["data"] == []


def test_a_large_upload_takes_no_memory(url: str, store: JobStore, server_storage: Folder, tmp_path: Path) -> None:
    size = 200 * 2**20
    with tempfile.TemporaryFile(dir=tmp_path) as file:
        file.truncate(size)
        before = psutil.Process().memory_info().rss
        most = before
        done = threading.Event()

        def watch() -> None:
            nonlocal most
            while not done.wait(0.01):
                most = max(most, psutil.Process().memory_info().rss)

        watcher = threading.Thread(target=watch)
        watcher.start()
        connection = http.client.HTTPConnection(urlsplit(url).hostname or "", urlsplit(url).port)
        start = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.mp4"\r\n\r\n'
        end = b"\r\n--x--\r\n"
        headers = {"Content-Type": "multipart/form-data; boundary=x", "Content-Length": str(size + len(start + end))}
        connection.request(
            "POST", "/v1/files", itertools.chain([start], iter(lambda: file.read(1 << 20), b""), [end]), headers
        )
        answer = connection.getresponse()
        done.set()
        watcher.join()
        assert answer.status == 200
        answer.read()
        connection.close()
    assert most - before < 80 * 2**20
    (kept,) = store.files_of("local", 10)
    assert kept.bytes == size
    assert kept.sha256 == hashlib.sha256(bytes(size)).hexdigest()


def test_quotas_are_checked_before_the_files_are_received(store: JobStore, server_storage: Folder) -> None:
    limits = ServerLimits(max_jobs_of_owner=2, max_waiting=3)
    with serving(server_for(store, server_storage, limits=limits, tokens=TOKENS)) as url:
        first, second = bearer("first-token"), bearer("second-token")
        keyed = {**first, "Idempotency-Key": "k"}
        assert post_video(url, keyed).status_code == 200 and post_video(url, first).status_code == 200
        answer = post_video(url, first)
        assert answer.status_code == 429 and error_of(answer)["type"] == "rate_limit_error"
        assert int(answer.headers["Retry-After"]) > 0
        head = {**first, "Content-Type": "multipart/form-data; boundary=x", "Content-Length": "100000000"}
        connection = http.client.HTTPConnection(urlsplit(url).hostname or "", urlsplit(url).port, timeout=20)
        connection.putrequest("POST", "/v1/videos")
        for name, value in head.items():
            connection.putheader(name, value)
        connection.endheaders()  # and not one byte of the body
        assert connection.getresponse().status == 429
        connection.close()
        assert post_video(url, keyed).status_code == 200, "a repeated request needs no room"
        assert post_video(url, second).status_code == 200
        assert post_video(url, second).status_code == 429, "the server is full"
        assert len(server_storage.subfolders("jobs")) == 3


def test_bytes_of_an_owner_are_bounded(store: JobStore, server_storage: Folder) -> None:
    limits = ServerLimits(max_input_bytes_of_owner=2000, max_file_bytes_of_owner=8)
    with serving(server_for(store, server_storage, limits=limits)) as url:
        scene = {**FILES, "scene": ("scene.mp4", bytes(1000))}
        answer = requests.post(f"{url}/v1/videos", data={"consent": CONSENT}, files=scene)
        assert answer.status_code == 200, answer.text
        refused = requests.post(f"{url}/v1/videos", data={"consent": CONSENT}, files=scene)
        assert refused.status_code == 429 and "delete" in error_of(refused)["message"]
        for _ in range(2):
            requests.delete(f"{url}/v1/videos/{answer.json()['id']}")
        assert requests.post(f"{url}/v1/videos", data={"consent": CONSENT}, files=scene).status_code == 200
        assert requests.post(f"{url}/v1/files", files={"file": ("a", b"12345")}).status_code == 200
        assert requests.post(f"{url}/v1/files", files={"file": ("b", b"12345")}).status_code == 429
        assert len(server_storage.names("files")) == 1, "a refused file is removed"


def test_owners_see_their_own_only(guarded: str) -> None:
    first, second = bearer("first-token"), bearer("second-token")
    video_id = post_video(guarded, first).json()["id"]
    file = requests.post(f"{guarded}/v1/files", files={"file": ("a", b"1")}, headers=first).json()["id"]
    row = dict.fromkeys(FILES, file) | {"consent": CONSENT}
    batch = requests.post(f"{guarded}/v1/batches", json={"rows": [row]}, headers=first).json()["id"]
    paths = [f"/v1/videos/{video_id}{end}" for end in ("", "/content", "/events", "/previews/0")]
    paths += [f"/v1/files/{file}", f"/v1/batches/{batch}", f"/v1/batches/{batch}/output"]
    for path in paths:
        assert requests.get(guarded + path, headers=second).status_code == 404, path
        assert requests.get(guarded + path).status_code == 401, path
    for path in (f"/v1/videos/{video_id}", f"/v1/files/{file}"):
        assert requests.delete(guarded + path, headers=second).status_code == 404
    assert requests.post(f"{guarded}/v1/batches/{batch}/cancel", headers=second).status_code == 404
    assert requests.post(f"{guarded}/v1/videos/{video_id}/remix", json={}, headers=second).status_code == 404
    assert requests.post(f"{guarded}/v1/videos", json=row, headers=second).status_code == 400
    for path in ("/v1/videos", "/v1/files", "/v1/batches"):
        assert requests.get(guarded + path, headers=second).json()["data"] == []
        assert len(requests.get(guarded + path, headers=first).json()["data"]) > 0


@pytest.mark.parametrize(
    "given", ["", "Bearer", "Bearer ", "Bearer first", "Basic first-token", "Bearer first-token2", "Bearer \xe9"]
)
def test_wrong_tokens(guarded: str, given: str) -> None:
    answer = requests.get(f"{guarded}/v1/videos", headers={"Authorization": given.encode("latin-1")})
    assert answer.status_code == 401 and answer.headers["WWW-Authenticate"] == "Bearer"
    assert error_of(answer)["type"] == "authentication_error"


def test_tokens_name_their_owner() -> None:
    assert owner_with_token(TOKENS, "second-token") == "second"
    assert owner_with_token(TOKENS, "second-token ") is None
    assert owner_with_token({}, "") is None


def test_the_page_has_a_session(guarded: str) -> None:
    session = requests.Session()
    assert session.get(f"{guarded}/v1/videos").status_code == 401
    assert session.post(f"{guarded}/v1/session", json={"token": "wrong"}).status_code == 401
    answer = session.post(f"{guarded}/v1/session", json={"token": "first-token"})
    assert answer.json() == {"object": "session", "owner": "first"}
    cookie = answer.headers["Set-Cookie"]
    assert "HttpOnly" in cookie and "SameSite=strict" in cookie and "first-token" not in cookie
    assert session.get(f"{guarded}/v1/videos").status_code == 200
    assert session.post(f"{guarded}/v1/videos", data={"consent": CONSENT}, files=FILES).status_code == 200
    other = {"Origin": "https://elsewhere.example"}
    answer = session.post(f"{guarded}/v1/videos", data={"consent": CONSENT}, files=FILES, headers=other)
    assert answer.status_code == 403 and error_of(answer)["code"] == "other_origin"
    assert session.delete(f"{guarded}/v1/session").status_code == 200
    assert session.get(f"{guarded}/v1/videos").status_code == 401


def test_a_server_without_tokens_serves_this_machine_only(url: str) -> None:
    """A page elsewhere may make a browser of this machine send requests, also under a name that leads here."""
    assert post_video(url, {"Origin": url}).status_code == 200
    assert post_video(url, {"Origin": "https://elsewhere.example"}).status_code == 403
    assert requests.get(f"{url}/v1/videos", headers={"Host": "elsewhere.example"}).status_code == 403
    assert requests.get(f"{url}/v1/videos", headers={"Host": "localhost:1234"}).status_code == 200


def test_health_and_metrics(store: JobStore, server_storage: Folder) -> None:
    problems = ["the face stage does not answer"]

    async def ready() -> list[str]:
        return problems

    async def metrics() -> str:
        return "more 1\n"

    server = server_for(store, server_storage, ready=ready, metrics=metrics, tokens=TOKENS)
    with serving(server) as url:
        assert requests.get(f"{url}/healthz").json()["status"] == "ok"
        answer = requests.get(f"{url}/readyz")
        assert answer.status_code == 503 and answer.json() == {"status": "not_ready", "problems": problems}
        problems.clear()
        assert requests.get(f"{url}/readyz").status_code == 200
        post_video(url, bearer("first-token"))
        text = requests.get(f"{url}/metrics").text
        assert 'tccp_videos{status="queued"} 1\n' in text and text.endswith("more 1\n")


def test_mistakes_of_the_server_are_not_told(store: JobStore, server_storage: Folder) -> None:
    async def find_heads(path: Path) -> Any:
        raise RuntimeError("a secret")

    with serving(server_for(store, server_storage, find_heads=find_heads)) as url:
        answer = requests.post(f"{url}/v1/heads", files={"scene": ("a", b"scene")})
        assert answer.status_code == 500 and "secret" not in answer.text
        assert error_of(answer)["type"] == "server_error"


def test_unknown_paths_and_methods(url: str) -> None:
    for path in ("/nothing", "/v1/videos/x", "/v1/files/x%00y", "/v1/batches/%0a", "/v1/videos/video_x/content"):
        answer = requests.get(url + path)
        assert answer.status_code == 404, path
        error_of(answer)
    answer = requests.put(f"{url}/v1/videos")
    assert answer.status_code == 405 and "POST" in answer.headers["Allow"]
    error_of(answer)


def test_heads(url: str) -> None:
    answer = requests.post(f"{url}/v1/heads", files={"scene": ("a.mp4", b"scene")})
    assert answer.json()["heads"] == [{"box": [1.0, 2.0, 30.0, 40.0]}] and answer.json()["width"] == 64
    assert answer.json()["frame"].startswith("data:image/jpeg;base64,/9g")
    file = requests.post(f"{url}/v1/files", files={"file": ("a", b"scene")}).json()["id"]
    assert requests.post(f"{url}/v1/heads", json={"scene": file}).status_code == 200
    answer = requests.post(f"{url}/v1/heads", files={"scene": ("a.mp4", b"poem")})
    assert answer.status_code == 400 and tempfile.gettempdir() not in answer.text
    for given in ({}, {"scene": "file_x"}, {"scene": 3}, {"scene": file, "more": 1}):
        assert requests.post(f"{url}/v1/heads", json=given).status_code == 400


def test_the_page_is_served_where_it_is(store: JobStore, server_storage: Folder, tmp_path: Path) -> None:
    page = tmp_path / "page"
    page.mkdir()
    (page / "index.html").write_text("<p>the page")
    (page / "app.js").write_text("1")
    with serving(server_for(store, server_storage, ready=always_ready), page=page) as url:
        answer = requests.get(url)
        assert answer.text == "<p>the page" and "default-src 'self'" in answer.headers["Content-Security-Policy"]
        assert requests.get(f"{url}/page/app.js").text == "1"
        assert requests.get(f"{url}/page/../jobs.db").status_code == 404
        assert requests.get(f"{url}/docs").status_code == 200
    with serving(server_for(store, server_storage), page=tmp_path / "none") as url:
        assert requests.get(url).status_code == 404
