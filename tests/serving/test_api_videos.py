"""`/v1/videos` over HTTP: asking, watching, fetching, deleting, remixing. Nothing is generated here."""

from __future__ import annotations

import json
import sqlite3
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import requests
from api_server import CONSENT, FILES, complete, error_of, post_video, server_for, serving
from object_storage import object_storage

from tccp.files import Folder
from tccp.serving.api import ServerLimits
from tccp.serving.job_folder import JobFolder
from tccp.serving.store import JobStore

pytest_plugins = ["api_fixtures"]
FILM = bytes(range(256)) * 4


def uploaded(url: str, content: bytes, name: str = "file.bin") -> str:
    answer = requests.post(f"{url}/v1/files", files={"file": (name, content)})
    assert answer.status_code == 200, answer.text
    return answer.json()["id"]


def test_a_form_becomes_a_job_with_its_files(url: str, store: JobStore, server_storage: Folder) -> None:
    answer = post_video(url, seed="7", person="[3, 4.5]", redraw="true", prompt="a note", model="")
    assert answer.status_code == 200, answer.text
    video = answer.json()
    assert video["status"] == "queued" and video["queue_position"] == 0 and video["seed"] == 7
    assert video["consent"] == CONSENT and video["prompt"] == "a note" and video["model"] == "default"
    job = store.get(video["id"])
    assert job is not None and job.weights == "0" * 16
    assert job.spec["person"] == [3.0, 4.5] and job.spec["redraw"] is True
    for role, (name, content) in FILES.items():
        assert server_storage.read(JobFolder(server_storage, job.id).input_name(role)) == content  # type: ignore[arg-type]
        assert job.inputs[role]["name"] == name and job.inputs[role]["bytes"] == len(content)


def test_json_names_files_that_were_uploaded(url: str, store: JobStore, server_storage: Folder) -> None:
    """A job owns copies: the files may be deleted then."""
    ids = {role: uploaded(url, content) for role, (_, content) in FILES.items()}
    answer = requests.post(f"{url}/v1/videos", json={**ids, "consent": CONSENT, "guidance_interval": [0.1, 0.5]})
    assert answer.status_code == 200, answer.text
    for file_id in ids.values():
        assert requests.delete(f"{url}/v1/files/{file_id}").json()["deleted"] is True
    folder = JobFolder(server_storage, answer.json()["id"])
    assert server_storage.read(folder.input_name("audio")) == b"sound"
    assert error_of(requests.post(f"{url}/v1/videos", json={**ids, "consent": CONSENT}))["code"] == "no_such_file"


def test_a_form_may_mix_files_and_ids_and_flatten_lists(url: str, store: JobStore) -> None:
    data: Any = [("consent", CONSENT), ("audio", uploaded(url, b"sound")), ("person[]", "1"), ("person[]", "2")]
    data += [("input_reference[file_id]", uploaded(url, b"scene"))]
    answer = requests.post(f"{url}/v1/videos", data=data, files={"identity": FILES["identity"]})
    assert answer.status_code == 200, answer.text
    job = store.get(answer.json()["id"])
    assert job is not None and job.spec["person"] == [1.0, 2.0] and sorted(job.inputs) == ["audio", "identity", "scene"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"consent": ""}, "consent"),
        ({"consent": "  ab"}, "consent"),
        ({"seed": "-1"}, "seed"),
        ({"seed": "many"}, "seed"),
        ({"solver": "magic"}, "solver"),
        ({"guidance_scale": "nan"}, "guidance_scale"),
        ({"seconds": "4"}, "seconds"),
        ({"size": "720x1280"}, "size"),
        ({"model": "sora-2"}, "model"),
        ({"box": "/etc/passwd"}, "box"),
        ({"box": "0,0,9,9", "person": "[1,2]"}, None),
        ({"person": "[1,2"}, None),
        ({"colour": "red"}, "colour"),
        ({"own[k][x]": "1"}, "own[k][x]"),
        ({"webhook_url": "https://example.org/"}, "webhook_url"),
        ({"prompt": "a\x00b"}, "prompt"),
        ({"mask": "file_of_somebody"}, "mask"),
    ],
)
def test_errors_name_the_field(url: str, server_storage: Folder, fields: dict[str, str], param: str | None) -> None:
    answer = post_video(url, **fields)
    assert answer.status_code == 400
    error = error_of(answer)
    assert error["param"] == param and error["type"] == "invalid_request_error"
    assert not server_storage.subfolders("jobs"), "nothing of a refused request is kept"


def test_files_that_are_missing_empty_or_double_are_refused(url: str) -> None:
    data = {"consent": CONSENT}
    without = {role: file for role, file in FILES.items() if role != "audio"}
    answer = requests.post(f"{url}/v1/videos", data=data, files=without)
    assert answer.status_code == 400 and error_of(answer)["param"] == "audio"
    answer = requests.post(f"{url}/v1/videos", data=data, files={**FILES, "audio": ("sound.wav", b"")})
    assert answer.status_code == 400 and error_of(answer)["code"] == "empty_file"
    answer = requests.post(f"{url}/v1/videos", data=data, files={**FILES, "input_reference": ("b", b"scene")})
    assert answer.status_code == 400 and "twice" in error_of(answer)["message"]
    answer = requests.post(f"{url}/v1/videos", data=data, files={**FILES, "seed": ("seed.txt", b"7")})
    assert answer.status_code == 400 and error_of(answer)["param"] == "seed"


@pytest.mark.parametrize(
    ("content_type", "body", "status"),
    [
        ("application/json", b"{", 400),
        ("application/json", b"[]", 400),
        ("application/json", b'{"seed": NaN}', 400),
        ("application/json", b'{"consent": "\\ud800abc"}', 400),
        ("application/json", b'{"consent": "\\u0000abc"}', 400),
        ("application/json", b"\xff\xfe\x00", 400),
        ("application/json", b"[" * 100_000, 400),
        ("multipart/form-data", b"abc", 400),
        ("multipart/form-data; boundary=x", b"abc", 400),
        ("multipart/form-data; boundary=x", b"--x\r\n\r\nabc\r\n--x--\r\n", 400),
        ("text/plain", b"abc", 415),
    ],
)
def test_bodies_that_cannot_be_read(url: str, content_type: str, body: bytes, status: int) -> None:
    answer = requests.post(f"{url}/v1/videos", data=body, headers={"Content-Type": content_type})
    assert answer.status_code == status, answer.text
    error_of(answer)


def test_the_same_request_with_the_same_key_gives_the_same_video(
    url: str, store: JobStore, server_storage: Folder
) -> None:
    key = {"Idempotency-Key": "once"}
    first = post_video(url, key).json()["id"]
    assert post_video(url, key).json()["id"] == first
    assert post_video(url).json()["id"] != first
    answer = post_video(url, key, seed="1")
    assert answer.status_code == 409 and error_of(answer)["code"] == "idempotency_key_reused"
    answer = requests.post(
        f"{url}/v1/videos", data={"consent": CONSENT}, files={**FILES, "audio": ("sound.wav", b"other")}, headers=key
    )
    assert answer.status_code == 409, "another file is another request"
    assert server_storage.subfolders("jobs") == {job.id for job in store.listed(None, 10)}, (
        "files of repeats are removed"
    )
    for _ in range(2):  # cancels it, and then removes it
        requests.delete(f"{url}/v1/videos/{first}")
    assert error_of(post_video(url, key))["code"] == "deleted"
    assert post_video(url, {"Idempotency-Key": "x" * 201}).status_code == 400


def test_requests_with_one_key_at_the_same_time_make_one_video(url: str, store: JobStore) -> None:
    ids: list[str] = []
    threads = [
        threading.Thread(target=lambda: ids.append(post_video(url, {"Idempotency-Key": "k"}).json()["id"]))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ids) == 6 and len(set(ids)) == 1 and len(store.listed(None, 10)) == 1


def test_lists_have_pages(url: str) -> None:
    ids = [post_video(url).json()["id"] for _ in range(5)]
    first = requests.get(f"{url}/v1/videos", params={"limit": 2}).json()
    assert [one["id"] for one in first["data"]] == ids[:-3:-1] and first["has_more"]
    assert first["first_id"] == ids[4] and first["last_id"] == ids[3]
    rest = requests.get(f"{url}/v1/videos", params={"limit": 3, "after": first["last_id"]}).json()
    assert [one["id"] for one in rest["data"]] == ids[2::-1] and not rest["has_more"]
    upwards = requests.get(f"{url}/v1/videos", params={"order": "asc", "limit": 1}).json()
    assert [one["id"] for one in upwards["data"]] == ids[:1]
    for params in ({"limit": "0"}, {"limit": "101"}, {"order": "up"}, {"after": "x"}):
        answer = requests.get(f"{url}/v1/videos", params=params)
        assert answer.status_code == 400 and error_of(answer)["param"] == next(iter(params))


def test_a_completed_video_and_its_files(url: str, store: JobStore, server_storage: Folder) -> None:
    video_id = post_video(url).json()["id"]
    content = f"{url}/v1/videos/{video_id}/content"
    answer = requests.get(content)
    assert answer.status_code == 409 and error_of(answer)["code"] == "not_completed"
    job = complete(store, server_storage, FILM)
    assert job.id == video_id
    video = requests.get(f"{url}/v1/videos/{video_id}").json()
    assert (video["status"], video["progress"], video["seconds"], video["size"]) == ("completed", 100, "4.0", "64x48")
    for params in ({}, {"variant": "video"}, {"variant": "film"}):
        answer = requests.get(content, params=params)
        assert answer.status_code == 200 and answer.content == FILM and answer.headers["Content-Type"] == "video/mp4"
    assert video["files"]["film.mp4"] == {"bytes": len(FILM), "sha256": answer.headers["ETag"].strip('"')}
    assert f'filename="{video_id}.mp4"' in answer.headers["Content-Disposition"]
    assert requests.get(content, headers={"If-None-Match": answer.headers["ETag"]}).status_code == 304
    head = requests.head(content)
    assert head.status_code == 200 and head.headers["Content-Length"] == str(len(FILM))
    assert requests.get(content, params={"variant": "report"}).json() == {}
    assert requests.get(content, params={"variant": "thumbnail"}).content == b"\xff\xd8 a frame"
    assert requests.get(content, params={"variant": "poem"}).status_code == 400
    assert requests.get(f"{url}/v1/videos/{video_id}/previews/0").headers["Content-Type"] == "image/jpeg"
    assert requests.get(f"{url}/v1/videos/{video_id}/previews/1").status_code == 404


@pytest.mark.parametrize(
    ("header", "status", "part"),
    [
        ("bytes=0-0", 206, FILM[:1]),
        ("bytes=10-19", 206, FILM[10:20]),
        ("bytes=1000-", 206, FILM[1000:]),
        ("bytes=-5", 206, FILM[-5:]),
        ("bytes=-5000", 206, FILM),
        ("bytes=1000-5000", 206, FILM[1000:]),
        ("bytes=1024-", 416, None),
        ("bytes=-0", 416, None),
        ("bytes=5-2", 200, FILM),
        ("bytes=0-1,4-5", 200, FILM),
        ("lines=1-2", 200, FILM),
        ("bytes=-", 200, FILM),
    ],
)
def test_ranges(
    url: str, store: JobStore, server_storage: Folder, header: str, status: int, part: bytes | None
) -> None:
    video_id = post_video(url).json()["id"]
    complete(store, server_storage, FILM)
    answer = requests.get(f"{url}/v1/videos/{video_id}/content", headers={"Range": header})
    assert answer.status_code == status
    if part is None:
        assert answer.headers["Content-Range"] == f"bytes */{len(FILM)}"
        error_of(answer)
        return
    assert answer.content == part
    if status == 206:
        first = FILM.index(part) if part != FILM else 0
        first = len(FILM) - len(part) if header.startswith("bytes=-") or header.startswith("bytes=1000") else first
        assert answer.headers["Content-Range"] == f"bytes {first}-{first + len(part) - 1}/{len(FILM)}"
    other = {"Range": header, "If-Range": '"another"'}
    assert requests.get(f"{url}/v1/videos/{video_id}/content", headers=other).content == FILM


def test_delete_cancels_what_runs_and_removes_what_has_ended(url: str, store: JobStore, server_storage: Folder) -> None:
    video_id = post_video(url).json()["id"]
    claim = store.claim("tester", 60.0, 5)
    assert claim is not None
    answer = requests.delete(f"{url}/v1/videos/{video_id}")
    assert answer.json() == {"id": video_id, "object": "video.deleted", "deleted": True, "status": "canceled"}
    assert not store.complete(claim, {}), "what completes after the answer is not shown"
    assert requests.get(f"{url}/v1/videos/{video_id}").json()["status"] == "canceled"
    assert requests.get(f"{url}/v1/videos/{video_id}/content").status_code == 409
    assert requests.delete(f"{url}/v1/videos/{video_id}").status_code == 200
    for path in ("", "/content", "/events", "/previews/0"):
        assert requests.get(f"{url}/v1/videos/{video_id}{path}").status_code == 404
    assert requests.get(f"{url}/v1/videos").json()["data"] == []
    assert not server_storage.tree("jobs") and requests.delete(f"{url}/v1/videos/{video_id}").status_code == 404


def test_a_completed_video_is_removed_with_its_film(url: str, store: JobStore, server_storage: Folder) -> None:
    video_id = post_video(url).json()["id"]
    complete(store, server_storage, FILM)
    assert requests.delete(f"{url}/v1/videos/{video_id}").json()["status"] == "completed"
    assert not server_storage.tree("films") and not server_storage.tree("jobs")
    assert store.removable() == []


def test_an_expired_video_is_gone(store: JobStore, server_storage: Folder) -> None:
    server = server_for(store, server_storage, limits=ServerLimits(keep_videos_s=1e-6))
    with serving(server) as url:
        video_id = post_video(url).json()["id"]
        complete(store, server_storage, FILM)
        assert store.expire() == 1
        assert requests.get(f"{url}/v1/videos/{video_id}").json()["status"] == "expired"
        for path in ("content", "previews/0"):
            answer = requests.get(f"{url}/v1/videos/{video_id}/{path}")
            assert answer.status_code == 410 and error_of(answer)["code"] == "expired"
        answer = requests.post(f"{url}/v1/videos/{video_id}/remix", json={"seed": 3})
        assert answer.status_code == 410


def test_a_remix_has_the_first_videos_inputs_and_options(url: str, store: JobStore, server_storage: Folder) -> None:
    first = post_video(url, seed="7", box="1,2,30,40", one_stage="true").json()["id"]
    landmarks = uploaded(url, b"{}\n", "landmarks.jsonl")
    answer = requests.post(f"{url}/v1/videos/{first}/remix", json={"landmarks": landmarks, "person": [3, 4]})
    assert answer.status_code == 200, answer.text
    video = answer.json()
    assert video["remixed_from_video_id"] == first and video["seed"] == 7 and video["consent"] == CONSENT
    job = store.get(video["id"])
    assert job is not None and job.spec["person"] == [3.0, 4.0]
    assert job.spec["box"] is None and job.spec["one_stage"] is False, "they do not go with what is given"
    folder = JobFolder(server_storage, job.id)
    assert server_storage.read(folder.input_name("landmarks")) == b"{}\n"
    assert server_storage.read(folder.input_name("scene")) == b"scene"
    form = {"landmarks": ("edited.jsonl", b"{ }\n")}
    other = requests.post(f"{url}/v1/videos/{first}/remix", files=form, data={"consent": "the person agreed"}).json()
    assert other["consent"] == "the person agreed"
    answer = requests.post(f"{url}/v1/videos/{first}/remix", json={"scene": landmarks})
    assert answer.status_code == 400 and error_of(answer)["param"] == "scene"
    assert requests.post(f"{url}/v1/videos/video_{'0' * 24}/remix", json={}).status_code == 404


def events(url: str, video_id: str, headers: dict[str, str] | None = None) -> list[tuple[str, int, dict[str, Any]]]:
    """All events until the stream ends."""
    answer = requests.get(f"{url}/v1/videos/{video_id}/events", headers=headers, stream=True)
    assert answer.headers["Content-Type"].startswith("text/event-stream")
    found = []
    for block in answer.content.decode().split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if "event" in lines:
            found.append((lines["event"], int(lines["id"]), json.loads(lines["data"])))
    return found


def test_events_show_every_change_and_how_it_ended(store: JobStore, server_storage: Folder) -> None:
    with serving(server_for(store, server_storage, limits=ServerLimits(poll_s=0.02))) as url:
        video_id = post_video(url).json()["id"]
        seen: list[Any] = []
        reader = threading.Thread(target=lambda: seen.extend(events(url, video_id)))
        reader.start()
        complete(store, server_storage, FILM)
        reader.join()
        assert [name for name, _, _ in seen][-2:] == ["video", "end"]
        assert seen[-2][2]["status"] == "completed" and seen[-1][2] == {"id": video_id, "status": "completed"}
        numbers = [number for _, number, _ in seen]
        assert numbers == sorted(set(numbers))
        again = events(url, video_id, {"Last-Event-ID": str(numbers[-1])})
        assert min(number for _, number, _ in again) > numbers[-1]


def test_events_end_in_time_and_when_the_store_fails(store: JobStore, server_storage: Folder, tmp_path: Path) -> None:
    with serving(server_for(store, server_storage, limits=ServerLimits(events_s=0.2, poll_s=0.02))) as url:
        video_id = post_video(url).json()["id"]
        assert [name for name, _, _ in events(url, video_id)] == ["video", "reconnect"]
    with serving(server_for(store, server_storage, limits=ServerLimits(poll_s=0.02))) as url:
        lines = requests.get(f"{url}/v1/videos/{video_id}/events", stream=True).iter_lines(chunk_size=1)
        while next(lines) != b"event: video":
            pass
        with closing(sqlite3.connect(tmp_path / "jobs.db")) as damaged:
            damaged.execute("ALTER TABLE jobs RENAME TO elsewhere")
        assert [line for line in lines if line.startswith(b"event")] == [b"event: error"], "it says that it failed"
        answer = requests.get(f"{url}/v1/videos")
        assert answer.status_code == 503 and error_of(answer)["type"] == "server_error"
        assert requests.get(f"{url}/healthz").status_code == 200


def test_a_storage_may_be_a_url(store: JobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TCCP_CACHE", str(tmp_path / "cache"))
    with object_storage(tmp_path / "log") as remote:
        kept = Folder(f"{remote.url}/server")
        with serving(server_for(store, kept)) as url:
            file = uploaded(url, b"scene")
            answer = requests.post(
                f"{url}/v1/videos",
                data={"consent": CONSENT, "scene": file},
                files={role: FILES[role] for role in ("audio", "identity")},
            )
            assert answer.status_code == 200, answer.text
            job = complete(store, kept, FILM)
            content = f"{url}/v1/videos/{job.id}/content"
            assert requests.get(content).content == FILM
            part = requests.get(content, headers={"Range": "bytes=10-19"})
            assert part.status_code == 206 and part.content == FILM[10:20]
            remix = requests.post(f"{url}/v1/videos/{job.id}/remix", json={"seed": 2}).json()
            assert kept.read(f"jobs/{remix['id']}/inputs/scene") == b"scene"
            assert requests.delete(f"{url}/v1/videos/{job.id}").status_code == 200
            assert requests.get(content).status_code == 404 and not kept.tree(f"films/{job.id}")
