"""Weights are taken from where they were said to be, and come into place only whole and right."""

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
    """Hands out CONTENT under any name but `missing`; how well, is for the test to say."""

    ranges = True  # answers Range requests
    breaks_after: int | None = None  # bytes of a response, after which the connection is closed
    length = True  # says how long the file is
    content = CONTENT
    failures = 0  # of the next requests, with status 503

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[tuple[str, str | None]] = []  # path and Range header of each request

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.server.asked.append((self.path, asked))
        if self.server.failures:
            self.server.failures -= 1
            return self.send_error(503)
        if "missing" in self.path:
            return self.send_error(404)
        content, start = self.server.content, 0
        if asked is not None and self.server.ranges:
            start = int(str(re.fullmatch(r"bytes=(\d+)-", asked)[1]))  # type: ignore[index]
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
    """No weights of this machine, no proxy between the test and its own server, and one attempt at a download."""
    monkeypatch.delenv("TCCP_WEIGHTS", raising=False)
    monkeypatch.delenv("TCCP_WEIGHTS_URL", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("TCCP_STORAGE_RETRY_S", "0")


def part_of(storage: Path) -> Path:
    return storage / "weights" / ".small.bin.part"


# ---- the table


def test_the_table_is_complete_and_consistent() -> None:
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


def test_the_shared_files_are_the_published_ones(shared_weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TCCP_WEIGHTS", str(shared_weights))
    present = [record for record in weights.listing() if record["path"]]
    assert {record["name"] for record in present} == {"mediapipe", "light-asd", "silero-vad"}
    assert all(record["state"] == "verified" for record in present)
    assert all(Path(record["path"]).stat().st_size == record["size_bytes"] for record in present)


def test_face_alignment_asks_for_the_files_of_the_table() -> None:
    """What the package would download: another release of it may need other files."""
    api = pytest.importorskip("face_alignment.api")
    detector = pytest.importorskip("face_alignment.detection.sfd.sfd_detector")
    assert api.models_urls["2DFAN-4"] == WEIGHTS["fan"].url
    assert detector.models_urls["s3fd"] == WEIGHTS["s3fd"].url


# ---- looking for a file


def test_order_of_places(storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    override, given = tmp_path / "override", tmp_path / "given"
    for folder in (storage / "weights", override, given):
        folder.mkdir()
        (folder / "small.bin").write_bytes(b"x")
    assert weights.find(SMALL) == storage / "weights" / "small.bin"
    monkeypatch.setenv("TCCP_WEIGHTS", str(override))
    assert weights.find(SMALL) == override / "small.bin"
    assert weights.find(SMALL, given) == weights.find(SMALL, given / "small.bin") == given / "small.bin"
    # What the override lacks is absent: an offline machine's set of files is not completed from elsewhere.
    (override / "small.bin").unlink()
    assert weights.available(SMALL) is None
    with pytest.raises(TccpError, match=r"override/small\.bin"):
        weights.find(SMALL)


def test_other_names_of_a_file(tmp_path: Path) -> None:
    other = tmp_path / "little.bin"
    other.write_bytes(b"x")
    assert weights.find(SMALL, tmp_path) == other
    (tmp_path / "small.bin").write_bytes(b"x")
    assert weights.find(SMALL, tmp_path) == tmp_path / "small.bin"
    own = tmp_path / "my_own_training"
    own.write_bytes(b"x")
    assert weights.find(SMALL, own) == own


@pytest.mark.parametrize("name", WEIGHTS)
def test_what_is_absent_is_said_in_one_line_with_the_way_out(name: str, storage: Path) -> None:
    with pytest.raises(TccpError) as caught:
        weights.find(name)
    said = str(caught.value)
    assert "\n" not in said
    assert str(storage / "weights" / WEIGHTS[name].file) in said
    assert f"tccp weights fetch {name}" in said and "TCCP_WEIGHTS" in said
    assert weights.available(name) is None


def test_given_places_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(TccpError, match=re.escape(f"at {tmp_path / 'none' / 'small.bin'}:")):
        weights.find(SMALL, tmp_path / "none")
    with pytest.raises(TccpError, match=re.escape(f"at {tmp_path / 'none.bin'}:")):
        weights.find(SMALL, tmp_path / "none.bin")


def test_unknown_names_are_refused_with_the_list() -> None:
    for call in (weights.find, weights.available, weights.fetch):
        with pytest.raises(TccpError, match=r"unknown weights 'vgg'.*mediapipe.*wav2lip"):
            call("vgg")


def test_the_key_is_of_the_content(tmp_path: Path) -> None:
    file = tmp_path / "a.bin"
    file.write_bytes(b"one")
    assert weights.weights_key(file) == hashlib.sha256(b"one").hexdigest()
    os.utime(file, ns=(0, 0))
    assert weights.weights_key(file) == hashlib.sha256(b"one").hexdigest()
    file.write_bytes(b"two")  # as long
    os.utime(file, ns=(0, 1))
    assert weights.weights_key(file) == hashlib.sha256(b"two").hexdigest()


def test_the_listing_tells_the_published_file_from_another(storage: Path) -> None:
    (storage / "weights").mkdir()
    (storage / "weights" / "silero_vad.onnx").write_bytes(b"my own")
    records = {record["name"]: record for record in weights.listing()}
    assert records["silero-vad"]["state"] == "differs"
    assert records["sface"]["state"] == "absent" and records["sface"]["path"] is None


def test_table_and_records_as_text(storage: Path) -> None:
    (storage / "weights").mkdir()
    (storage / "weights" / "silero_vad.onnx").write_bytes(b"my own")
    records = weights.listing()
    assert json.loads(json.dumps(records)) == records
    lines = weights.text_table(records).splitlines()
    assert [line.split()[0] for line in lines] == list(WEIGHTS)
    assert any("differs" in line and str(storage) in line for line in lines)
    assert any(line.split()[:2] == ["wav2lip", "absent"] and "research" in line for line in lines)


# ---- fetching


def test_a_fetched_file_is_there_and_is_not_fetched_twice(server: Server, storage: Path) -> None:
    first = weights.fetch(SMALL, f"{server.url}/x.bin")
    assert first.path == storage / "weights" / "small.bin" == weights.find(SMALL)
    assert first.path.read_bytes() == CONTENT
    assert first.verified and first.downloaded
    assert json.loads(json.dumps(first.to_json()))["path"] == str(first.path)
    again = weights.fetch(SMALL, f"{server.url}/x.bin")
    assert again.path == first.path and again.verified and not again.downloaded
    assert len(server.asked) == 1
    assert [path.name for path in first.path.parent.iterdir()] == ["small.bin"]


def test_mirror_override_and_target_folder(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TCCP_WEIGHTS_URL", f"{server.url}/mirror/")
    monkeypatch.setenv("TCCP_WEIGHTS", str(tmp_path / "override"))
    assert weights.fetch(SMALL).path == tmp_path / "override" / "small.bin"
    assert weights.fetch(SMALL, f"{server.url}/own.bin", tmp_path / "to").path == tmp_path / "to" / "small.bin"
    assert [path for path, _ in server.asked] == ["/mirror/small.bin", "/own.bin"]


def test_from_a_file(tmp_path: Path) -> None:
    source = tmp_path / "source.bin"
    source.write_bytes(CONTENT)
    assert weights.fetch(SMALL, source.as_uri()).path.read_bytes() == CONTENT
    with pytest.raises(TccpError, match=r"none\.bin"):
        weights.fetch(SMALL, (tmp_path / "none.bin").as_uri(), tmp_path / "to")


def test_an_interrupted_transfer_is_not_present_and_goes_on(server: Server, storage: Path) -> None:
    server.breaks_after = 300_000
    for tried in (300_000, 600_000):
        with pytest.raises(
            StorageError, match=rf"broke off after {tried} of 900000 bytes .*give the same command again"
        ):
            weights.fetch(SMALL, f"{server.url}/x.bin")
        assert weights.available(SMALL) is None
        assert part_of(storage).stat().st_size == tried
    server.breaks_after = None
    assert weights.fetch(SMALL, f"{server.url}/x.bin").path.read_bytes() == CONTENT
    assert [asked for _, asked in server.asked] == [None, "bytes=300000-", "bytes=600000-"]
    assert not part_of(storage).exists()


def test_a_broken_transfer_goes_on_by_itself(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as more arrives in each attempt, although there are more attempts than the time limit alone allows."""
    monkeypatch.setenv("TCCP_STORAGE_RETRY_S", "0.01")
    server.breaks_after, server.failures = 200_000, 1
    assert weights.fetch(SMALL, f"{server.url}/x.bin").path.read_bytes() == CONTENT
    assert [asked for _, asked in server.asked] == [None, None, *(f"bytes={n}00000-" for n in (2, 4, 6, 8))]


def test_a_server_without_ranges_starts_anew(server: Server) -> None:
    server.breaks_after, server.ranges = 300_000, False
    with pytest.raises(StorageError, match="broke off"):
        weights.fetch(SMALL, f"{server.url}/x.bin")
    server.breaks_after = None
    assert weights.fetch(SMALL, f"{server.url}/x.bin").path.read_bytes() == CONTENT


def test_a_transfer_cut_off_in_silence_is_noticed_by_its_size(server: Server) -> None:
    server.breaks_after, server.length = 300_000, False
    with pytest.raises(StorageError, match="broke off after 300000 of 900000"):
        weights.fetch(SMALL, f"{server.url}/x.bin")
    assert weights.available(SMALL) is None


@pytest.mark.parametrize("left", [len(CONTENT), len(CONTENT) + 5])
def test_a_try_that_ended_before_the_check_is_checked_now(server: Server, storage: Path, left: int) -> None:
    """Killed between the last byte and the renaming; or left by something else, too long."""
    part_of(storage).parent.mkdir()
    part_of(storage).write_bytes((CONTENT + b"12345")[:left])
    assert weights.fetch(SMALL, f"{server.url}/x.bin").path.read_bytes() == CONTENT
    assert len(server.asked) == (left > len(CONTENT))


def test_a_start_beyond_the_servers_file_starts_anew(server: Server, storage: Path) -> None:
    part_of(storage).parent.mkdir()
    part_of(storage).write_bytes(CONTENT + b"12345")
    assert weights.fetch(replace(SMALL, size_bytes=None), f"{server.url}/x.bin").path.read_bytes() == CONTENT
    assert [asked for _, asked in server.asked] == ["bytes=900005-", None]


def test_a_wrong_hash_leaves_nothing(server: Server, storage: Path) -> None:
    server.content = CONTENT[:-1] + bytes([CONTENT[-1] ^ 1])
    with pytest.raises(TccpError, match=f"not the published file.*not {SMALL.sha256}"):
        weights.fetch(SMALL, f"{server.url}/x.bin")
    assert list((storage / "weights").iterdir()) == []
    # Nor does a beginning that was wrong poison the next try for longer than one more.
    part_of(storage).write_bytes(b"wrong")
    server.content = CONTENT
    with pytest.raises(TccpError, match="not the published file"):
        weights.fetch(SMALL, f"{server.url}/x.bin")
    assert weights.fetch(SMALL, f"{server.url}/x.bin").verified


@pytest.mark.parametrize("length", [True, False])
@pytest.mark.parametrize("content", [b"<html>log in</html>", CONTENT * 2])
def test_a_page_in_place_of_the_file_is_refused(server: Server, storage: Path, length: bool, content: bytes) -> None:
    server.content, server.length = content, length
    with pytest.raises((TccpError, StorageError), match=r"offers|sends more|broke off"):
        weights.fetch(SMALL, f"{server.url}/x.bin")
    assert weights.available(SMALL) is None
    server.content = CONTENT
    if part_of(storage).exists():  # a page shorter than the file, of unknown length, looks like a beginning of it
        with pytest.raises(TccpError, match="not the published file"):
            weights.fetch(SMALL, f"{server.url}/x.bin")
    assert weights.fetch(SMALL, f"{server.url}/x.bin").verified


def test_a_file_without_a_known_hash_is_taken_and_called_unverified(server: Server, storage: Path) -> None:
    unknown = replace(SMALL, sha256=None, size_bytes=None)
    server.breaks_after = 300_000
    with pytest.raises(StorageError, match="broke off after 300000 of 900000"):
        weights.fetch(unknown, f"{server.url}/x.bin")
    assert not part_of(storage).exists()  # nothing could vouch for what two servers sent
    server.breaks_after = None
    fetched = weights.fetch(unknown, f"{server.url}/x.bin")
    assert not fetched.verified
    assert "NOT verified" in str(fetched) and str(SMALL.sha256) in str(fetched)
    assert "NOT verified" in str(weights.fetch(unknown, f"{server.url}/x.bin"))
    assert [asked for _, asked in server.asked] == [None, None]


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("{}/missing.bin", "404 Not Found; try another source with --url, or TCCP_WEIGHTS_URL"),
        ("http://127.0.0.1:9/x.bin", "Connection refused (1 attempt); check network and storage"),
        ("http://127.0.0.1:port/x.bin", "port"),
        ("weights/x.bin", "begins with http://, https:// or file://"),
        ("ftp://127.0.0.1/x.bin", "begins with http://, https:// or file://"),
    ],
)
def test_addresses_that_give_nothing(server: Server, storage: Path, url: str, says: str) -> None:
    with pytest.raises((TccpError, StorageError)) as caught:
        weights.fetch(SMALL, url.format(server.url))
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert list((storage / "weights").iterdir()) == []


def test_a_file_of_the_users_own_is_not_replaced(server: Server, storage: Path) -> None:
    (storage / "weights").mkdir()
    own = storage / "weights" / "little.bin"
    own.write_bytes(b"my own")
    with pytest.raises(TccpError, match="exists, but is not the published file"):
        weights.fetch(SMALL, f"{server.url}/x.bin")
    assert own.read_bytes() == b"my own"
    assert server.asked == []


def test_two_at_once_do_not_write_into_one_another(server: Server, storage: Path) -> None:
    part_of(storage).parent.mkdir()
    with part_of(storage).open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(TccpError, match="fetched by another process"):
            weights.fetch(SMALL, f"{server.url}/x.bin")
    assert weights.fetch(SMALL, f"{server.url}/x.bin").verified


def test_a_place_that_cannot_be_written_is_said(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(TccpError, match=r"cannot write .*file/small\.bin: (Not a directory|File exists)"):
        weights.fetch(SMALL, f"{server.url}/x.bin", tmp_path / "file")
