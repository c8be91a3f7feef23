"""Files, batches and webhooks over HTTP."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import requests
from api_server import CONSENT, FILES, complete, error_of, post_video, server_for, serving

from tccp.errors import TccpError
from tccp.files import Folder
from tccp.serving.api import ServerLimits
from tccp.serving.store import JobStore
from tccp.serving.webhooks import WebhookRules, deliver_forever, is_public, key_of_secret, wait_s

pytest_plugins = ["api_fixtures"]
SECRET = "whsec_" + base64.b64encode(b"a secret of 24 bytes....").decode()


def upload(url: str, content: bytes, name: str = "a.bin") -> str:
    return requests.post(f"{url}/v1/files", files={"file": (name, content)}).json()["id"]


@pytest.fixture
def row(url: str) -> dict[str, Any]:
    """A row that can be used."""
    return {"consent": CONSENT, **{role: upload(url, content) for role, (_, content) in FILES.items()}}


def output(url: str, batch_id: str) -> list[dict[str, Any]]:
    answer = requests.get(f"{url}/v1/batches/{batch_id}/output")
    assert answer.headers["Content-Type"] == "application/jsonl"
    return [json.loads(line) for line in answer.text.splitlines()]


def test_files(url: str, server_storage: Folder) -> None:
    answer = requests.post(f"{url}/v1/files", files={"file": ("../ä\\b.mp4", b"123")}, data={"purpose": "vision"})
    file = answer.json()
    assert (file["object"], file["bytes"], file["filename"], file["purpose"]) == ("file", 3, "b.mp4", "vision")
    assert file["expires_at"] > file["created_at"]
    assert requests.get(f"{url}/v1/files/{file['id']}").json() == file
    assert server_storage.read(f"files/{file['id']}") == b"123"
    others = [upload(url, b"1") for _ in range(2)]
    listed = requests.get(f"{url}/v1/files", params={"limit": 2}).json()
    assert [one["id"] for one in listed["data"]] == others[::-1] and listed["has_more"]
    rest = requests.get(f"{url}/v1/files", params={"after": listed["last_id"]}).json()
    assert [one["id"] for one in rest["data"]] == [file["id"]] and not rest["has_more"]
    assert requests.delete(f"{url}/v1/files/{file['id']}").json()["deleted"] is True
    assert requests.get(f"{url}/v1/files/{file['id']}").status_code == 404
    assert requests.delete(f"{url}/v1/files/{file['id']}").status_code == 404
    assert not server_storage.exists(f"files/{file['id']}")
    for files, data in (({}, {"file": "text"}), ({"file": ("a", b"")}, {}), ({"file": ("a", b"1")}, {"x": "1"})):
        assert requests.post(f"{url}/v1/files", files=files or None, data=data).status_code in (400, 415)


def test_a_batch_goes_on_without_rows_that_are_refused(
    url: str, row: dict[str, Any], store: JobStore, server_storage: Folder
) -> None:
    rows = [{**row, "custom_id": "a"}, {**row, "seed": -1, "custom_id": "b"}, "no row", {**row, "seed": 2}]
    answer = requests.post(f"{url}/v1/batches", json={"rows": rows})
    assert answer.status_code == 200, answer.text
    batch = answer.json()
    assert batch["rows"] == 4 and batch["counts"] == {"queued": 2, "refused": 2} and batch["status"] == "in_progress"
    job = complete(store, server_storage, b"film")
    results = output(url, batch["id"])
    assert [one["custom_id"] for one in results] == ["a", "b", None, None]
    assert [one["status"] for one in results] == ["completed", "refused", "refused", "queued"]
    assert results[0]["video_id"] == job.id and requests.get(url + results[0]["content_url"]).content == b"film"
    assert results[1]["error"]["message"].startswith("seed: ") and results[3]["content_url"] is None
    assert requests.get(f"{url}/v1/videos/{job.id}").json()["batch_id"] == batch["id"]
    canceled = requests.post(f"{url}/v1/batches/{batch['id']}/cancel").json()
    assert canceled["counts"] == {"completed": 1, "refused": 2, "canceled": 1} and canceled["status"] == "completed"
    assert requests.get(f"{url}/v1/batches/{batch['id']}").json() == canceled
    assert requests.get(f"{url}/v1/batches").json()["data"] == [canceled]
    requests.delete(f"{url}/v1/videos/{job.id}")
    assert output(url, batch["id"])[0]["status"] == "deleted"


def test_a_batch_may_be_a_file_of_lines(url: str, row: dict[str, Any]) -> None:
    lines = json.dumps(row) + "\n\n{broken\n" + json.dumps({**row, "seed": 1})
    batch = requests.post(f"{url}/v1/batches", json={"input_file_id": upload(url, lines.encode())}).json()
    assert batch["counts"] == {"queued": 2, "refused": 1}
    assert [one["status"] for one in output(url, batch["id"])] == ["queued", "refused", "queued"]


def test_a_batch_that_was_cut_off_goes_on(url: str, row: dict[str, Any], store: JobStore) -> None:
    body, key = {"rows": [{**row, "seed": seed} for seed in range(3)]}, {"Idempotency-Key": "night"}
    first = requests.post(f"{url}/v1/batches", json=body, headers=key).json()
    store.set_batch_rows(first["id"], [{**one, "error": None} for one in store.batch(first["id"], "local")["rows"]])  # type: ignore[index]
    again = requests.post(f"{url}/v1/batches", json=body, headers=key).json()
    assert again == first and len(store.listed(None, 10)) == 3
    body["rows"][0]["seed"] = 9
    assert requests.post(f"{url}/v1/batches", json=body, headers=key).status_code == 409


def test_batches_that_cannot_be_read(store: JobStore, server_storage: Folder) -> None:
    with serving(server_for(store, server_storage, limits=ServerLimits(max_batch_rows=2, max_jobs_of_owner=1))) as url:
        for body in ({}, {"rows": []}, {"rows": 3}, {"rows": [1, 2, 3]}, {"rows": [1], "x": 1}, {"input_file_id": 3}):
            answer = requests.post(f"{url}/v1/batches", json=body)
            assert answer.status_code == 400, body
            error_of(answer)
        ids = {role: upload(url, b"1") for role in FILES}
        rows = [{**ids, "consent": CONSENT}] * 2
        counts = requests.post(f"{url}/v1/batches", json={"rows": rows}).json()["counts"]
        assert counts == {"queued": 1, "refused": 1}, "a row for which there is no room is refused"


class Receiver(BaseHTTPRequestHandler):
    """Keeps what it gets; answers with the statuses that are set, then 200."""

    got: list[tuple[dict[str, str], bytes]]
    answers: list[int]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.got.append(({name.lower(): value for name, value in self.headers.items()}, body))
        self.send_response(self.answers.pop(0) if self.answers else 200)
        self.send_header("Location", "/elsewhere")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def receiving(*answers: int) -> Iterator[tuple[str, list[tuple[dict[str, str], bytes]]]]:
    got: list[tuple[dict[str, str], bytes]] = []
    handler = type("Handler", (Receiver,), {"got": got, "answers": list(answers)})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/hook", got
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def ended_job(store: JobStore, storage: Folder, hook: str) -> str:
    with serving(server_for(store, storage, webhook_secret=SECRET)) as url:
        answer = post_video(url, webhook_url=hook)
        assert answer.status_code == 200, answer.text
        complete(store, storage, b"film")
        return answer.json()["id"]


async def deliver_until(store: JobStore, rules: WebhookRules, done: Any) -> None:
    """Delivers until `done` says so."""
    task = asyncio.create_task(deliver_forever(store, SECRET, rules))
    try:
        async with asyncio.timeout(60):
            while not await asyncio.to_thread(done):
                assert not task.done(), task.result()
                await asyncio.sleep(0.01)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def attempts(store: JobStore) -> list[tuple[int, str | None, bool]]:
    """Attempts, last error, and whether it was delivered, of all events."""
    with store._transaction(writes=False) as db:
        rows = db.exec_driver_sql("SELECT attempts, last_error, delivered_at FROM deliveries").all()
    return [(row[0], row[1], row[2] is not None) for row in rows]


def test_a_webhook_tells_how_a_video_ended(store: JobStore, server_storage: Folder) -> None:
    """It is signed, and the same event is sent again until it is taken. Redirects are not followed."""
    with receiving(500, 302) as (hook, got):
        video_id = ended_job(store, server_storage, hook)
        rules = WebhookRules(poll_s=0.01, allow_loopback=True)

        def due_at_once() -> bool:
            with store._transaction() as db:
                db.exec_driver_sql("UPDATE deliveries SET next_at = 0 WHERE last_error IS NOT NULL")
            return attempts(store)[0][2]

        asyncio.run(deliver_until(store, rules, due_at_once))
        assert len(got) == 3
    assert len({headers["webhook-id"] for headers, _ in got}) == 1 and len({body for _, body in got}) == 1
    headers, body = got[0]
    event = json.loads(body)
    assert event["type"] == "video.completed" and event["data"] == {"id": video_id}
    assert event["id"] == headers["webhook-id"] and event["id"].startswith("evt_")
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    expected = base64.b64encode(hmac.new(b"a secret of 24 bytes....", signed, hashlib.sha256).digest()).decode()
    assert headers["webhook-signature"] == f"v1,{expected}"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "0.0.0.0", "169.254.169.254", "10.0.0.1"])
def test_a_webhook_reaches_public_addresses_only(store: JobStore, server_storage: Folder, host: str) -> None:
    with receiving() as (hook, got):
        ended_job(store, server_storage, hook.replace("127.0.0.1", host))
        rules = WebhookRules(poll_s=0.01)
        asyncio.run(deliver_until(store, rules, lambda: attempts(store)[0][1] is not None))
        assert got == []
    ((count, error, delivered),) = attempts(store)
    assert count == 1 and not delivered and "public internet" in (error or "")


def test_public_addresses() -> None:
    for address in ("8.8.8.8", "2606:4700::1111"):
        assert is_public(address)
    private = "127.0.0.1 10.1.2.3 192.168.0.1 172.16.0.1 169.254.169.254 100.64.0.1 0.0.0.0 224.0.0.1 255.255.255.255"
    private += " ::1 :: fe80::1%eth0 fc00::1 ff02::1 ::ffff:127.0.0.1 2002:7f00:1:: 64:ff9b::a00:1 localhost"
    for address in private.split():
        assert not is_public(address), address


def test_pauses_between_attempts_grow_for_a_day() -> None:
    age, pauses = 0.0, []
    while (pause := wait_s(len(pauses) + 1, age)) is not None:
        pauses.append(pause)
        age += pause
    assert pauses == sorted(pauses) and 80_000 < age <= 86_400 and 8 < len(pauses) < 20


def test_secrets() -> None:
    assert key_of_secret(SECRET) == b"a secret of 24 bytes...."
    assert key_of_secret("sixteen letters!") == b"sixteen letters!"
    for secret in ("short", "whsec_???", "whsec_"):
        with pytest.raises(TccpError):
            key_of_secret(secret)


@pytest.mark.parametrize(
    "hook", ["ftp://example.org", "http://", "example.org", "http://u:p@example.org/", "http://a:99999/", "http://ä/"]
)
def test_webhooks_that_cannot_be_used(store: JobStore, server_storage: Folder, hook: str) -> None:
    with serving(server_for(store, server_storage, webhook_secret=SECRET)) as url:
        answer = post_video(url, webhook_url=hook)
        assert answer.status_code == 400 and error_of(answer)["param"] == "webhook_url"
