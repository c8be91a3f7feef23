"""The retry policy: which file system errors are retried, which are user errors, and their messages."""

from __future__ import annotations

import errno
import json
import logging
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import fsspec
import pytest
from botocore.exceptions import ClientError, EndpointConnectionError, NoCredentialsError, ReadTimeoutError
from fsspec.implementations.memory import MemoryFileSystem
from s3fs.errors import translate_boto_error
from yarl import URL

from tccp.cli import one_line_errors
from tccp.errors import DamagedData, StorageError, TccpError
from tccp.files import AccessError, Folder, atomic_path, is_storage_failure, retried, storage_retries
from tccp.files.retry import RETRY_S
from tccp.media import MediaError


class FlakyFileSystem(MemoryFileSystem):
    """Raises the errors in `errors`, one per request, before it works."""

    protocol = "flaky"
    errors: list[Exception]

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("flaky://", "memory://"))

    def _fail(self) -> None:
        if FlakyFileSystem.errors:
            raise FlakyFileSystem.errors.pop(0)

    def info(self, path: str, **kwargs: object) -> dict[str, Any]:
        self._fail()
        return dict(super().info(path, **kwargs))

    def ls(self, path: str, detail: bool = True, **kwargs: object) -> list[Any]:
        self._fail()
        return list(super().ls(path, detail, **kwargs))

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: object) -> bytes:
        self._fail()
        return bytes(super().cat_file(path, start, end, **kwargs))

    def put_file(self, lpath: str, rpath: str, *args: object, **kwargs: object) -> None:
        self._fail()
        super().put_file(lpath, rpath)

    def get_file(self, rpath: str, lpath: str, *args: object, **kwargs: object) -> None:
        self._fail()
        Path(lpath).write_bytes(super().cat_file(rpath))


@pytest.fixture
def flaky(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[Exception]]:
    """The errors that flaky:// raises next; pauses between attempts are short."""
    monkeypatch.setenv(RETRY_S, "0.02")
    monkeypatch.setenv("TCCP_CACHE", str(tmp_path / "cache"))
    fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)
    FlakyFileSystem.errors = []
    yield FlakyFileSystem.errors
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


def client_error(code: str, status: int) -> Exception:
    """An S3 error as s3fs raises it."""
    answer = {"Error": {"Code": code, "Message": f"it says {code}"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return translate_boto_error(ClientError(answer, "PutObject"))  # type: ignore[arg-type]


def http_error(status: int) -> Exception:
    """An HTTP error as fsspec raises it."""
    info = aiohttp.RequestInfo(URL("http://host/x"), "GET", None)  # type: ignore[arg-type]
    error = FileNotFoundError("http://host/x")
    error.__cause__ = aiohttp.ClientResponseError(info, (), status=status)
    return error


def broken_connection() -> Exception:
    error = FileNotFoundError("http://host/x")
    error.__cause__ = aiohttp.ServerDisconnectedError()
    return error


class GoogleError(Exception):
    """Like gcsfs.retry.HttpError, which is not an OSError."""

    def __init__(self, code: int):
        super().__init__(f"google says {code}")
        self.code = code


TRANSIENT_ERRORS = [
    EndpointConnectionError(endpoint_url="http://host"),
    ReadTimeoutError(endpoint_url="http://host"),
    client_error("SlowDown", 503),
    client_error("InternalError", 500),
    client_error("BadDigest", 400),
    client_error("Unheard", 502),
    http_error(503),
    http_error(429),
    broken_connection(),
    aiohttp.ClientPayloadError(),
    GoogleError(503),
    TimeoutError(),
    ConnectionResetError(errno.ECONNRESET, "reset"),
    OSError(errno.EIO, "Input/output error"),
    OSError(errno.ESTALE, "Stale file handle"),
    json.JSONDecodeError("Expecting value", "<html>", 0),
    RuntimeError("a client's own error"),
]
USER_ERRORS = [
    client_error("AccessDenied", 403),
    client_error("InvalidAccessKeyId", 403),
    client_error("InvalidBucketName", 400),
    client_error("PermanentRedirect", 301),
    http_error(401),
    http_error(403),
    GoogleError(403),
    NoCredentialsError(),
    PermissionError(errno.EACCES, "Permission denied"),
    OSError(errno.EROFS, "Read-only file system"),
    ValueError("Bucket name invalid"),
]


def name_of(error: Exception) -> str:
    return f"{type(error).__name__} {error}"[:50]


@pytest.mark.parametrize("error", TRANSIENT_ERRORS, ids=name_of)
def test_storage_and_network_failures_are_retried_and_counted(
    flaky: list[Exception], error: Exception, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    folder = Folder("flaky://bucket/x")
    before = storage_retries()
    flaky.append(error)
    folder.write("a", b"content")
    flaky.append(error)
    assert folder.read("a") == b"content"
    flaky.append(error)
    assert folder.exists("a")
    flaky.append(error)
    assert folder.names() == {"a"}
    flaky.append(error)
    with folder.local_file("a") as copy:
        assert copy.read_bytes() == b"content"
    assert storage_retries() == before + 5 and not flaky
    assert caplog.text.count("storage: cannot write flaky://bucket/x/a (") == 1
    assert all(record.levelno == logging.WARNING for record in caplog.records)


@pytest.mark.parametrize("error", TRANSIENT_ERRORS, ids=name_of)
def test_lasting_failures_give_a_one_line_storage_error(flaky: list[Exception], error: Exception) -> None:
    flaky += [error] * 9
    with pytest.raises(StorageError, match=r"^cannot read flaky://bucket/a: .* \(2 attempts in 0 s\); check") as caught:
        Folder("flaky://bucket").read("a")
    assert "\n" not in str(caught.value) and not isinstance(caught.value, TccpError | OSError)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (type(again), str(again), again.reason) == (StorageError, str(caught.value), caught.value.reason)
    assert is_storage_failure(again)


@pytest.mark.parametrize("error", USER_ERRORS, ids=name_of)
def test_user_errors_are_not_retried(flaky: list[Exception], error: Exception) -> None:
    before = storage_retries()
    flaky.append(error)
    with pytest.raises(AccessError, match=r"^cannot write flaky://bucket/a: ") as caught:
        Folder("flaky://bucket").write("a", b"")
    assert isinstance(caught.value, TccpError) and "\n" not in str(caught.value)
    assert storage_retries() == before


@pytest.mark.parametrize(
    "error", [client_error("NoSuchKey", 404), http_error(404), http_error(410), FileNotFoundError()]
)
def test_missing_files_are_reported_as_missing(flaky: list[Exception], error: Exception) -> None:
    flaky.append(error)
    with pytest.raises(FileNotFoundError):
        Folder("flaky://bucket").read("a")
    flaky.append(error)
    assert not Folder("flaky://bucket").exists("a")
    flaky.append(error)
    assert Folder("flaky://bucket").names() == set()


def test_failure_is_not_reported_as_a_missing_file(flaky: list[Exception]) -> None:
    """fsspec's own `exists` returns False after any error; training would then start from scratch."""
    flaky += [TimeoutError()] * 9
    for ask in (Folder("flaky://bucket").exists, Folder("flaky://bucket").names, Folder("flaky://bucket").subfolders):
        with pytest.raises(StorageError):
            ask("a")


def test_full_disk_is_a_user_error(flaky: list[Exception]) -> None:
    flaky.append(OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(TccpError, match="the disk is full; make room"):
        Folder("flaky://bucket").write("a", b"")


def test_bugs_are_raised_unchanged(flaky: list[Exception]) -> None:
    flaky.append(AttributeError("a bug"))
    with pytest.raises(AttributeError, match="a bug"):
        Folder("flaky://bucket").read("a")


def test_messages_do_not_show_passwords_and_signed_queries(flaky: list[Exception]) -> None:
    flaky += [TimeoutError("at https://me:word@host/a?signature=word, of late")] * 2
    with pytest.raises(StorageError) as caught:
        Folder("flaky://me:word@bucket").read("a")
    assert "word" not in str(caught.value) and "https://host/a" in str(caught.value)


@pytest.mark.parametrize(("given", "attempts"), [("0", 1), ("0.01", 2), ("1", 3)])
def test_retry_time_is_configurable(monkeypatch: pytest.MonkeyPatch, given: str, attempts: int) -> None:
    monkeypatch.setenv(RETRY_S, given)
    calls = []

    def fail() -> None:
        calls.append(None)
        raise TimeoutError

    with pytest.raises(StorageError):
        retried("read it", fail)
    assert len(calls) == attempts


@pytest.mark.parametrize("given", ["-1", "soon", "inf", "nan"])
def test_invalid_retry_time_is_refused(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv(RETRY_S, given)
    with pytest.raises(TccpError, match=f"{RETRY_S}={given}: give a number of seconds"):
        retried("read it", lambda: None)


# Local folders


def test_local_folders_distinguish_user_errors_from_disk_failures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(RETRY_S, "0.01")
    (tmp_path / "file").write_text("")
    with pytest.raises(TccpError, match=r"cannot write .*: choose a folder|choose a folder that can be written"):
        Folder(tmp_path / "file").write("a", b"")
    with pytest.raises(TccpError, match="choose a folder that can be written"), atomic_path(tmp_path / "file" / "a"):
        pass
    with pytest.raises(StorageError, match=r"cannot write .*: Input/output error"), atomic_path(tmp_path / "a"):
        raise OSError(errno.EIO, "Input/output error")
    with pytest.raises(TccpError, match="the disk is full"), atomic_path(tmp_path / "a"):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(StorageError, match="its folder has disappeared"), atomic_path(tmp_path / "gone" / "a"):
        shutil.rmtree(tmp_path / "gone")
    with pytest.raises(ConnectionError, match="another's"), atomic_path(tmp_path / "a"):
        raise ConnectionError("another's")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# The command line


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (TccpError("a mistake"), 2, "tccp: error: a mistake"),
        (DamagedData("cut short"), 2, "tccp: error: cut short"),
        (MediaError("a.mp4", "corrupt", "is cut short"), 2, "tccp: error: a.mp4: is cut short"),
        (StorageError("cannot read\ns3://a"), 3, "tccp: error: cannot read s3://a"),
        (
            OSError(errno.EIO, "Input/output error", "/films/a"),
            3,
            "tccp: error: /films/a: Input/output error; check the disk",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "/a"),
            2,
            "tccp: error: /a: Permission denied; check the path",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_kind_of_error_is_one_line_with_its_exit_code(
    capsys: pytest.CaptureFixture[str], error: Exception, code: int, line: str
) -> None:
    with pytest.raises(SystemExit) as ended, one_line_errors():
        raise error
    assert ended.value.code == code
    (found,) = capsys.readouterr().err.splitlines()
    assert found.startswith(line)


def test_errors_and_files_import_no_heavy_package() -> None:
    code = (
        "import sys, tccp.errors, tccp.files; print({'fsspec', 'pyarrow', 'numpy', 'torch', 's3fs'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
