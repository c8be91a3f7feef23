"""Weights: the order of lookup, and downloads that appear only when complete and verified."""

from __future__ import annotations

import fcntl
import hashlib
import http.server
import json
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tccp import weights
from tccp.errors import StorageError, TccpError
from tccp.weights import WEIGHTS, Weight

CONTENT = np.random.default_rng(0).bytes(900_000)
SMALL = Weight(
    "small", "small.bin", "small", "tests", "http://127.0.0.1:9/small.bin", "MIT", "dev",
    hashlib.sha256(CONTENT).hexdigest(), len(CONTENT), other_names=("little.bin",),
)  # fmt: skip


class Server(http.server.ThreadingHTTPServer):
    """Serves `content` at any path without `missing`; tests set its faults."""

    ranges = True  # supports Range requests
    breaks_after: int | None = None  # closes the connection after so many bytes of a response
    length = True  # sends Content-Length
    content = CONTENT
    failures = 0  # answers so many of the next requests with status 503
    answers: int | None = None  # answers so many of the next requests, and then all with status 503

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[tuple[str, str | None]] = []  # path and Range header of each request

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        range_header = self.headers.get("Range")
        self.server.requests.append((self.path, range_header))
        if self.server.answers is not None:
            if self.server.answers == 0:
                return self.send_error(503)
            self.server.answers -= 1
        if self.server.failures:
            self.server.failures -= 1
            return self.send_error(503)
        if "missing" in self.path:
            return self.send_error(404)
        content, start = self.server.content, 0
        if range_header is not None and self.server.ranges:
            start = int(str(re.fullmatch(r"bytes=(\d+)-", range_header)[1]))  # type: ignore[index]
            if start >= len(content):
                return self.send_error(416)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        if self.server.length:
            self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        stop = len(content) if self.server.breaks_after is None else start + self.server.breaks_after
        self.wfile.write(content[start:stop])
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch, storage: Path) -> None:
    """No TCCP_WEIGHTS variables, no proxy between the test and its server, one attempt at a download."""
    monkeypatch.delenv("TCCP_WEIGHTS", raising=False)
    monkeypatch.delenv("TCCP_WEIGHTS_URL", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("TCCP_STORAGE_RETRY_S", "0")


def part_of(storage: Path) -> Path:
    return storage / "weights" / ".small.bin.part"


# ---- the table


def test_table_is_complete_and_consistent() -> None:
    assert set(WEIGHTS) == {"mediapipe", "light-asd", "silero-vad", "syncnet", "s3fd", "fan", "sface", "wav2lip"}
    for name, weight in WEIGHTS.items():
        assert weight.name == name
        assert weight.url.startswith("https://")
        assert weight.licence and weight.purpose and weight.extra in ("preprocess", "train")
        assert weight.sha256 is None or re.fullmatch(r"[0-9a-f]{64}", weight.sha256)
        # Names in torch.hub's form carry the first digits of the hash.
        if digits := re.search(r"-([0-9a-f]{8,})\.", weight.file):
            assert str(weight.sha256).startswith(digits[1])
    assert len({file for weight in WEIGHTS.values() for file in weight.names}) == len(WEIGHTS) + 2


def test_shared_files_are_the_published_ones(shared_weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TCCP_WEIGHTS", str(shared_weights))
    present = [record for record in weights.listing() if record["path"]]
    assert {record["name"] for record in present} == {"mediapipe", "light-asd", "silero-vad"}
    assert all(record["state"] == "verified" for record in present)
    assert all(Path(record["path"]).stat().st_size == record["size_bytes"] for record in present)


def test_face_alignment_downloads_the_files_in_the_table() -> None:
    """Another release of the package may need other files."""
    api = pytest.importorskip("face_alignment.api")
    detector = pytest.importorskip("face_alignment.detection.sfd.sfd_detector")
    assert api.models_urls["2DFAN-4"] == WEIGHTS["fan"].url
    assert detector.models_urls["s3fd"] == WEIGHTS["s3fd"].url


# ---- finding a file


def test_lookup_order_of_folders(storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    override, given = tmp_path / "override", tmp_path / "given"
    for folder in (storage / "weights", override, given):
        folder.mkdir()
        (folder / "small.bin").write_bytes(b"x")
    assert weights.find(SMALL) == storage / "weights" / "small.bin"
    monkeypatch.setenv("TCCP_WEIGHTS", str(override))
    assert weights.find(SMALL) == override / "small.bin"
    assert weights.find(SMALL, given) == weights.find(SMALL, given / "small.bin") == given / "small.bin"
    # Files that the override folder lacks are missing: other folders do not complete an offline machine's set.
    (override / "small.bin").unlink()
    assert weights.available(SMALL) is None
    with pytest.raises(TccpError, match=r"override/small\.bin"):
        weights.find(SMALL)


def test_alternative_file_names_are_found(tmp_path: Path) -> None:
    other = tmp_path / "little.bin"
    other.write_bytes(b"x")
    assert weights.find(SMALL, tmp_path) == other
    (tmp_path / "small.bin").write_bytes(b"x")
    assert weights.find(SMALL, tmp_path) == tmp_path / "small.bin"
    own = tmp_path / "my_own_training"
    own.write_bytes(b"x")
    assert weights.find(SMALL, own) == own


@pytest.mark.parametrize("name", WEIGHTS)
def test_missing_weights_give_a_one_line_error_with_the_fix(name: str, storage: Path) -> None:
    with pytest.raises(TccpError) as caught:
        weights.find(name)
    message = str(caught.value)
    assert "\n" not in message
    assert str(storage / "weights" / WEIGHTS[name].file) in message
    assert f"tccp weights fetch {name}" in message and "TCCP_WEIGHTS" in message
    assert weights.available(name) is None


def test_missing_given_path_is_named_in_the_error(tmp_path: Path) -> None:
    with pytest.raises(TccpError, match=re.escape(f"at {tmp_path / 'none' / 'small.bin'} (")):
        weights.find(SMALL, tmp_path / "none")
    with pytest.raises(TccpError, match=re.escape(f"at {tmp_path / 'none.bin'} (")):
        weights.find(SMALL, tmp_path / "none.bin")


def test_unknown_names_are_refused_with_the_list_of_names() -> None:
    for call in (weights.find, weights.available, weights.fetch):
        with pytest.raises(TccpError, match=r"unknown weights 'vgg'.*mediapipe.*wav2lip"):
            call("vgg")


def test_weights_key_depends_only_on_the_content(tmp_path: Path) -> None:
    file = tmp_path / "a.bin"
    file.write_bytes(b"one")
    assert weights.weights_key(file) == hashlib.sha256(b"one").hexdigest()
    os.utime(file, ns=(0, 0))
    assert weights.weights_key(file) == hashlib.sha256(b"one").hexdigest()
    file.write_bytes(b"two")  # same length
    os.utime(file, ns=(0, 1))
    assert weights.weights_key(file) == hashlib.sha256(b"two").hexdigest()


def test_listing_marks_files_that_differ_from_the_published_ones(storage: Path) -> None:
    (storage / "weights").mkdir()
    (storage / "weights" / "silero_vad.onnx").write_bytes(b"my own")
    records = {record["name"]: record for record in weights.listing()}
    assert records["silero-vad"]["state"] == "differs"
    assert records["sface"]["state"] == "absent" and records["sface"]["path"] is None


def test_listing_as_json_and_text(storage: Path) -> None:
    (storage / "weights").mkdir()
    (storage / "weights" / "silero_vad.onnx").write_bytes(b"my own")
    records = weights.listing()
    assert json.loads(json.dumps(records)) == records
    lines = weights.text_table(records).splitlines()
    assert [line.split()[0] for line in lines] == list(WEIGHTS)
    assert any("differs" in line and str(storage) in line for line in lines)
    assert any(line.split()[:2] == ["wav2lip", "absent"] and "research" in line for line in lines)


# ---- fetching


def test_fetched_file_is_found_and_not_fetched_again(server: Server, storage: Path) -> None:
    first = weights.fetch(SMALL, f"{server.url}/x.bin")
    assert first.path == storage / "weights" / "small.bin" == weights.find(SMALL)
    assert first.path.read_bytes() == CONTENT
    assert first.verified and first.downloaded
    assert json.loads(json.dumps(first.to_json()))["path"] == str(first.path)
    again = weights.fetch(SMALL, f"{server.url}/x.bin")
    assert again.path == first.path and again.verified and not again.downloaded
    assert len(server.requests) == 1
    assert [path.name for path in first.path.parent.iterdir()] == ["small.bin"]


def test_fetch_uses_mirror_override_and_target_folder(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TCCP_WEIGHTS_URL", f"{server.url}/mirror/")
    monkeypatch.setenv("TCCP_WEIGHTS", str(tmp_path / "override"))
    assert weights.fetch(SMALL).path == tmp_path / "override" / "small.bin"
    assert weights.fetch(SMALL, f"{server.url}/own.bin", tmp_path / "to").path == tmp_path / "to" / "small.bin"
    assert [path for path, _ in server.requests] == ["/mirror/small.bin", "/own.bin"]


def test_fetch_from_a_file_url(tmp_path: Path) -> None:
    source = tmp_path / "source.bin"
    source.write_bytes(CONTENT)
    assert weights.fetch(SMALL, source.as_uri()).path.read_bytes() == CONTENT
    with pytest.raises(TccpError, match=r"none\.bin"):
        weights.fetch(SMALL, (tmp_path / "none.bin").as_uri(), tmp_path / "to")


def test_interrupted_download_is_not_used_and_resumes(server: Server, storage: Path) -> None:
    server.breaks_after = 300_000
    for received in (300_000, 600_000):
        server.answers = 1
        with pytest.raises(StorageError, match=r"503 Service Unavailable .*give the same command again"):
            weights.fetch(SMALL, f"{server.url}/x.bin")
        assert weights.available(SMALL) is None
        assert part_of(storage).stat().st_size == received
    server.breaks_after = server.answers = None
    server.requests.clear()
    assert weights.fetch(SMALL, f"{server.url}/x.bin").path.read_bytes() == CONTENT
    assert [asked for _, asked in server.requests] == ["bytes=600000-"]
    assert not part_of(storage).exists()


def test_broken_download_resumes_automatically(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attempts continue beyond the time limit as long as each of them receives more data."""
    monkeypatch.setenv("TCCP_STORAGE_RETRY_S", "0.01")
    server.breaks_after, server.failures = 200_000, 1
    assert weights.fetch(SMALL, f"{server.url}/x.bin").path.read_bytes() == CONTENT
    assert [asked for _, asked in server.requests] == [None, None, *(f"bytes={n}00000-" for n in (2, 4, 6, 8))]


def test_download_restarts_if_the_server_has_no_ranges(server: Server) -> None:
    server.breaks_after, server.ranges = 300_000, False
    with pytest.raises(StorageError, match="broke off"):
        weights.fetch(SMALL, f"{server.url}/x.bin")
    server.breaks_after = None
    assert weights.fetch(SMALL, f"{server.url}/x.bin").path.read_bytes() == CONTENT


def test_truncated_download_without_length_is_detected_by_its_size(server: Server) -> None:
    server.breaks_after, server.length, server.ranges = 300_000, False, False
    with pytest.raises(StorageError, match="broke off after 300000 of 900000"):
        weights.fetch(SMALL, f"{server.url}/x.bin")
    assert weights.available(SMALL) is None


@pytest.mark.parametrize("left", [len(CONTENT), len(CONTENT) + 5])
def test_complete_or_oversized_part_file_is_checked_first(server: Server, storage: Path, left: int) -> None:
    """The part file is complete, as after a kill before the rename, or too long."""
    part_of(storage).parent.mkdir()
    part_of(storage).write_bytes((CONTENT + b"12345")[:left])
    assert weights.fetch(SMALL, f"{server.url}/x.bin").path.read_bytes() == CONTENT
    assert len(server.requests) == (left > len(CONTENT))


def test_part_file_longer_than_the_servers_file_restarts_the_download(server: Server, storage: Path) -> None:
    part_of(storage).parent.mkdir()
    part_of(storage).write_bytes(CONTENT + b"12345")
    assert weights.fetch(replace(SMALL, size_bytes=None), f"{server.url}/x.bin").path.read_bytes() == CONTENT
    assert [asked for _, asked in server.requests] == ["bytes=900005-", None]


def test_download_with_a_wrong_hash_is_deleted(server: Server, storage: Path) -> None:
    server.content = CONTENT[:-1] + bytes([CONTENT[-1] ^ 1])
    with pytest.raises(TccpError, match=f"not the published file.*not {SMALL.sha256}"):
        weights.fetch(SMALL, f"{server.url}/x.bin")
    assert list((storage / "weights").iterdir()) == []
    # A wrong part file makes only one download fail.
    part_of(storage).write_bytes(b"wrong")
    server.content = CONTENT
    with pytest.raises(TccpError, match="not the published file"):
        weights.fetch(SMALL, f"{server.url}/x.bin")
    assert weights.fetch(SMALL, f"{server.url}/x.bin").verified


@pytest.mark.parametrize("length", [True, False])
@pytest.mark.parametrize("content", [b"<html>log in</html>", CONTENT * 2])
def test_web_page_instead_of_the_file_is_refused(server: Server, storage: Path, length: bool, content: bytes) -> None:
    server.content, server.length = content, length
    with pytest.raises((TccpError, StorageError), match=r"offers|sends more|broke off"):
        weights.fetch(SMALL, f"{server.url}/x.bin")
    assert weights.available(SMALL) is None
    server.content = CONTENT
    if part_of(storage).exists():  # a short page of unknown length looks like the start of the file
        with pytest.raises(TccpError, match="not the published file"):
            weights.fetch(SMALL, f"{server.url}/x.bin")
    assert weights.fetch(SMALL, f"{server.url}/x.bin").verified


def test_file_without_a_known_hash_is_accepted_as_unverified(server: Server, storage: Path) -> None:
    unknown = replace(SMALL, sha256=None, size_bytes=None)
    server.breaks_after = 300_000
    with pytest.raises(StorageError, match="broke off after 300000 of 900000"):
        weights.fetch(unknown, f"{server.url}/x.bin")
    assert not part_of(storage).exists()  # without a hash, parts from two servers cannot be verified
    server.breaks_after = None
    fetched = weights.fetch(unknown, f"{server.url}/x.bin")
    assert not fetched.verified
    assert "NOT verified" in str(fetched) and str(SMALL.sha256) in str(fetched)
    assert "NOT verified" in str(weights.fetch(unknown, f"{server.url}/x.bin"))
    assert [asked for _, asked in server.requests] == [None, None]


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("{}/missing.bin", "404 Not Found; try another source with --url, or TCCP_WEIGHTS_URL"),
        ("http://127.0.0.1:9/x.bin", "Connection refused (1 attempt); check network and storage"),
        ("http://127.0.0.1:port/x.bin", "port"),
        ("weights/x.bin", "begins with http://, https:// or file://"),
        ("ftp://127.0.0.1/x.bin", "begins with http://, https:// or file://"),
    ],
)
def test_unusable_urls_give_a_one_line_error(server: Server, storage: Path, url: str, expected: str) -> None:
    with pytest.raises((TccpError, StorageError)) as caught:
        weights.fetch(SMALL, url.format(server.url))
    assert expected in str(caught.value) and "\n" not in str(caught.value)
    assert list((storage / "weights").iterdir()) == []


def test_users_own_file_is_not_replaced(server: Server, storage: Path) -> None:
    (storage / "weights").mkdir()
    own = storage / "weights" / "little.bin"
    own.write_bytes(b"my own")
    with pytest.raises(TccpError, match="exists, but is not the published file"):
        weights.fetch(SMALL, f"{server.url}/x.bin")
    assert own.read_bytes() == b"my own"
    assert server.requests == []


def test_concurrent_fetch_of_the_same_file_is_refused(server: Server, storage: Path) -> None:
    part_of(storage).parent.mkdir()
    with part_of(storage).open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(TccpError, match="fetched by another process"):
            weights.fetch(SMALL, f"{server.url}/x.bin")
    assert weights.fetch(SMALL, f"{server.url}/x.bin").verified


def test_unwritable_target_is_named_in_the_error(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(TccpError, match=r"cannot write .*file/small\.bin: (Not a directory|File exists)"):
        weights.fetch(SMALL, f"{server.url}/x.bin", tmp_path / "file")
