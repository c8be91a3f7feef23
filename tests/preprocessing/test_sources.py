"""Sources: folders, patterns, manifests and URLs give the same rows; local copies of URLs are complete or absent."""

from __future__ import annotations

import errno
import functools
import hashlib
import http.server
import importlib.util
import io
import json
import multiprocessing
import os
import pickle
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import av
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
from av.video import VideoStream
from fsspec.implementations.memory import MemoryFileSystem

from preprocessing.sources.finding import SOURCE_SCHEMA, VIDEO_SUFFIXES, files_left_out, find_sources
from preprocessing.sources.listing import list_sources
from preprocessing.spans import spans_from_table
from tccp.errors import StorageError, TccpError
from tccp.files.retry import RETRY_S
from tccp.media import MediaError, probe
from tccp.media.remote import content_hash, local_copy


def make_files(folder: Path, *names: str) -> Path:
    """Writes files that contain their own names; the product must not open them."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def names(table: pa.Table) -> list[str]:
    return table.column("source").to_pylist()


def paths(table: pa.Table) -> list[str]:
    return table.column("path").to_pylist()


def refusal(*given: str | Path) -> str:
    with pytest.raises(TccpError) as caught:
        find_sources(given)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    """The filesystem of memory:// URLs, empty."""
    fs = fsspec.filesystem("memory")
    yield fs
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


@pytest.fixture
def one_retry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Failed requests are retried once, without delay."""
    monkeypatch.setenv(RETRY_S, "0.01")


class Server(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; words in a file's name select faults."""

    def __init__(self, *args: object, requested: list[str], stall: threading.Event, **kwargs: object) -> None:
        self.requested, self.stall = requested, stall
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]

    def log_message(self, *args: object) -> None: ...

    def do_HEAD(self) -> None:
        if "forbidden" in self.path:
            self.send_error(403)
        else:
            super().do_HEAD()

    def do_GET(self) -> None:
        with suppress(ConnectionError):  # from a killed client
            self._answer()

    def _answer(self) -> None:
        self.requested.append(self.path)
        if "forbidden" in self.path:
            self.send_error(403)
        elif "vanishes" in self.path:
            self.send_error(404)
        elif "short" in self.path or ("hiccup" in self.path and self.requested.count(self.path) == 1):
            data = Path(self.translate_path(self.path)).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
        else:
            if "slow" in self.path:
                time.sleep(0.3)
            while "stalls" in self.path and self.stall.is_set():
                time.sleep(0.01)
            super().do_GET()


class Served:
    """A folder at a URL. requested: the paths of all GET requests. stall: while set, paths with 'stalls' hang."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.requested, self.stall = folder, list[str](), threading.Event()
        handler = functools.partial(Server, directory=str(folder), requested=self.requested, stall=self.stall)
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()

    def close(self) -> None:
        if self.thread.is_alive():
            self.server.shutdown()
            self.thread.join()
            self.server.server_close()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    (tmp_path / "served").mkdir()
    server = Served(tmp_path / "served")
    yield server
    server.close()


# Folders, files, patterns


def test_folder_lists_its_films_sorted_by_name(tmp_path: Path) -> None:
    films = make_files(
        tmp_path / "films", "b.mp4", "a.MOV", "deep/c.mkv", "deep.mp4", "notes.txt", "what?.mp4", ".x.mp4", ".y/z.mp4"
    )
    (films / "loop").symlink_to(films, target_is_directory=True)
    (films / "gone.mp4").symlink_to(films / "nowhere.mp4")
    (films / "link.mp4").symlink_to(films / "b.mp4")
    table = find_sources([films])
    assert table.schema == SOURCE_SCHEMA
    assert names(table) == ["a.MOV", "b.mp4", "deep/c.mkv", "deep.mp4", "link.mp4", "what?.mp4"]
    assert paths(table) == [str(films / name) for name in names(table)]
    assert table.column("speaker_x").null_count == table.column("person_picture").null_count == 6


def test_every_container_is_listed_and_other_files_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kinds = ["3gp", "flv", "f4v", "wmv", "asf", "mxf", "m2ts", "mts", "vob", "ogv", "nut", "mpe", "mp4", "mkv", "webm"]
    films = make_files(
        tmp_path / "films", *(f"film.{kind}" for kind in kinds), "a.srt", "deep/b.SRT", "c.wav", "README", "film.M2TS"
    )
    table = find_sources([films, f"{films}/**"])
    assert {Path(path).suffix[1:].lower() for path in paths(table)} == set(kinds)
    assert files_left_out(table) == {"": 1, ".srt": 2, ".wav": 1}
    with caplog.at_level("INFO", logger="preprocessing"):
        listing = list_sources([films])
    assert files_left_out(listing) == {"": 1, ".srt": 2, ".wav": 1}
    text = "4 files in the folders are no films and left out: 2 .srt, 1 without an ending, 1 .wav"
    assert [record.getMessage() for record in caplog.records] == [text]
    assert files_left_out(find_sources([films / "film.mp4", f"{films}/*.srt"])) == {}  # they were asked for


WRITTEN_AS = {  # FFmpeg's names of the containers, and a codec that each holds
    "mp4": ("mpeg4", (".mp4", ".m4v", ".mj2")),
    "mov": ("mpeg4", (".mov", ".qt")),
    "3gp": ("mpeg4", (".3gp", ".3gpp", ".3g2")),
    "f4v": ("libx264", (".f4v",)),
    "matroska": ("mpeg4", (".mkv", ".mk3d")),
    "webm": ("libvpx", (".webm",)),
    "avi": ("mpeg4", (".avi", ".divx")),
    "mpeg": ("mpeg2video", (".mpg", ".mpeg", ".mpe", ".m2p", ".ps")),
    "vob": ("mpeg2video", (".vob", ".vro")),
    "mpegts": ("mpeg2video", (".ts", ".mts", ".m2ts", ".m2t", ".tp", ".trp")),
    "flv": ("flv", (".flv",)),
    "asf": ("wmv2", (".asf", ".wmv")),
    "ogg": ("libvpx", (".ogv", ".ogm", ".ogx")),
    "mxf": ("mpeg2video", (".mxf",)),
    "nut": ("mpeg4", (".nut",)),
    "ivf": ("libvpx", (".ivf",)),
}


@pytest.mark.parametrize("kind", WRITTEN_AS)
def test_films_with_a_listed_ending_are_read(kind: str, tmp_path: Path) -> None:
    codec, suffixes = WRITTEN_AS[kind]
    content = io.BytesIO()
    with av.open(content, "w", format=kind) as container:
        stream = container.add_stream(codec, 25)
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        random = np.random.default_rng(0)  # transport streams of a few packets are not recognised
        for number in range(5):
            frame = av.VideoFrame.from_ndarray(random.integers(0, 256, (48, 64, 3), np.uint8), format="rgb24")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    for suffix in suffixes:
        path = tmp_path / f"film{suffix}"
        path.write_bytes(content.getvalue())
        assert paths(find_sources([tmp_path / f"*{suffix}"])) == [str(path)]
        assert probe(path).num_pictures == 5


def test_every_listed_ending_is_one_of_a_container_that_is_read() -> None:
    assert sorted(VIDEO_SUFFIXES) == sorted(suffix for _, suffixes in WRITTEN_AS.values() for suffix in suffixes)


def test_relative_paths_are_kept_or_resolved_against_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_files(tmp_path / "here", "films/a.mp4")
    monkeypatch.chdir(tmp_path / "here")
    assert paths(find_sources(["films"])) == paths(find_sources(["films/*.mp4", "./films/a.mp4"])) == ["films/a.mp4"]
    assert paths(find_sources(["."])) == paths(find_sources(["*/*.mp4"])) == ["films/a.mp4"]
    monkeypatch.chdir("/")
    assert paths(find_sources(["films"], base=tmp_path / "here")) == [str(tmp_path / "here/films/a.mp4")]


def test_named_files_are_listed_even_if_missing_or_of_unknown_type(tmp_path: Path) -> None:
    make_files(tmp_path, "notes.txt", "film [1].mp4")
    given = [tmp_path / "film [1].mp4", tmp_path / "notes.txt", tmp_path / "gone.mp4"]
    assert names(find_sources(given)) == ["film [1].mp4", "notes.txt", "gone.mp4"]


def test_patterns_match_films_or_the_given_file_ending(tmp_path: Path) -> None:
    make_files(tmp_path, "x/a.mp4", "x/y/b.mp4", "x/y/c.txt", "x/.h/d.mp4", "e.mp4", "x/f.MP4")

    def found(pattern: str) -> list[str]:
        return names(find_sources([f"{tmp_path}/{pattern}"]))

    assert found("x/*.mp4") == ["a.mp4"]
    assert found("x/**/*.mp4") == ["a.mp4", "y/b.mp4"]
    assert found("**/*.mp4") == ["e.mp4", "x/a.mp4", "x/y/b.mp4"]
    assert found("x/*") == ["a.mp4", "f.MP4"]
    assert found("x/**") == ["a.mp4", "f.MP4", "y/b.mp4"]
    assert found("*/y/?.[a-m]*") == ["x/y/b.mp4"]
    assert found("x/y/*.txt") == ["c.txt"]
    assert "matches no film" in refusal(f"{tmp_path}/*.mov")
    assert "not a valid pattern" in refusal(f"{tmp_path}/a**/b.mp4")
    assert "matches no film" in refusal(f"{tmp_path}/nowhere/*.mp4")


def test_pattern_expands_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_files(tmp_path, "films/a.mp4")
    monkeypatch.setenv("HOME", str(tmp_path))  # the shell does not expand a quoted ~
    assert paths(find_sources(["~/films/*.mp4"])) == [str(tmp_path / "films/a.mp4")]


def test_no_source_and_a_folder_without_films_are_refused(tmp_path: Path) -> None:
    assert "no source was given" in refusal()
    assert "contains no film (.mp4, .m4v," in refusal(make_files(tmp_path, "notes.txt"))


def test_unreadable_folder_is_refused_not_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_files(tmp_path, "a.mp4", "shut/b.mp4")
    scan = os.scandir

    def scandir(path: str) -> Iterator[os.DirEntry]:  # file modes do not restrict root
        if path.endswith("shut"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert "shut cannot be listed: Permission denied" in refusal(tmp_path)


def test_file_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.mp4")).touch()
    assert "not UTF-8: rename the file" in refusal(tmp_path)


def test_thousands_of_films_are_listed_quickly(tmp_path: Path) -> None:
    for folder in range(20):
        (tmp_path / f"{folder:02d}").mkdir()
        for i in range(250):
            os.mkfifo(tmp_path / f"{folder:02d}/{i:03d}.pipe")  # opening one blocks forever
            (tmp_path / f"{folder:02d}/{i:03d}.mp4").touch()
    begin = time.perf_counter()
    table = find_sources([tmp_path, f"{tmp_path}/**/*.mp4"])
    assert table.num_rows == 5000 and names(table) == sorted(names(table))
    assert time.process_time() - begin < 3


# Names


def test_duplicate_names_are_extended_by_the_folders_that_differ(tmp_path: Path) -> None:
    make_files(tmp_path, "x/cam/1.mp4", "x/cam/2.mp4", "y/cam/1.mp4", "1.mp4")
    given: list[str | Path] = [tmp_path / "x/cam", tmp_path / "y/cam", tmp_path / "1.mp4"]
    expected = {
        str(tmp_path / "x/cam/1.mp4"): "x/cam/1.mp4",
        str(tmp_path / "x/cam/2.mp4"): "2.mp4",
        str(tmp_path / "y/cam/1.mp4"): "y/cam/1.mp4",
        str(tmp_path / "1.mp4"): f"{tmp_path.name}/1.mp4",
    }
    for order in (given, list(reversed(given))):
        table = find_sources(order)
        assert dict(zip(paths(table), names(table), strict=True)) == expected


def test_duplicate_manifest_names_get_the_path_appended(tmp_path: Path) -> None:
    manifest = tmp_path / "m.csv"
    manifest.write_text("path,source\na/1.mp4,talk\nb/1.mp4,talk\nb/2.mp4,talk\nb/2.mp4,\n")
    assert names(find_sources([manifest])) == ["talk (a/1.mp4)", "talk (b/1.mp4)", "talk (2.mp4)"]


def test_film_given_twice_is_listed_once_with_merged_fields(tmp_path: Path) -> None:
    make_files(tmp_path, "a.mp4", "b.mp4")
    manifest = tmp_path / "m.csv"
    manifest.write_text("path,source,speaker_x,speaker_y\n./b.mp4,Bea,10,20\n")
    again = f"file://{tmp_path}/a.mp4"
    orders: list[list[str | Path]] = [[tmp_path, manifest, again, tmp_path], [tmp_path / "a.mp4", manifest, tmp_path]]
    for given in orders:
        table = find_sources(given)
        assert names(table) == ["a.mp4", "Bea"] and table.column("speaker_x").to_pylist() == [None, 10]
    (tmp_path / "other.csv").write_text("path,speaker_x,speaker_y\nb.mp4,11,20\n")
    assert "different speaker points, (10.0, 20.0) and (11.0, 20.0)" in refusal(manifest, tmp_path / "other.csv")


# Manifests


ROWS = [
    {"path": "films/a.mp4", "source": "A", "speaker_x": 1.5, "speaker_y": 2.0, "person": "pictures/ann.png"},
    {"path": "/far/b, the 2nd.mp4", "source": None, "speaker_x": None, "speaker_y": None, "person": "/far/bob.png"},
    {
        "path": "memory://bucket/c.mp4",
        "source": None,
        "speaker_x": 0,
        "speaker_y": 0,
        "person": "memory://bucket/c.png",
    },
    {"path": "../d.mp4", "source": None, "speaker_x": None, "speaker_y": None, "person": None},
    {"path": "file:///far/e.mp4", "source": None, "speaker_x": None, "speaker_y": None, "person": None},
]


def write_manifest(path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    if path.suffix == ".csv":
        pyarrow.csv.write_csv(table, path)
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        path.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n")


@pytest.mark.parametrize("name", ["m.csv", "m.parquet", "m.jsonl", "M.NDJSON"])
def test_every_manifest_format_gives_the_same_table(tmp_path: Path, name: str) -> None:
    write_manifest(tmp_path / name)
    table = find_sources([tmp_path / name])
    assert table.schema == SOURCE_SCHEMA
    base = str(tmp_path)
    assert table.to_pydict() == {
        "path": [
            f"{base}/films/a.mp4",
            "/far/b, the 2nd.mp4",
            "memory://bucket/c.mp4",
            f"{base}/../d.mp4",
            "/far/e.mp4",
        ],
        "source": ["A", "b, the 2nd.mp4", "c.mp4", "d.mp4", "e.mp4"],
        "speaker_x": [1.5, None, 0, None, None],
        "speaker_y": [2, None, 0, None, None],
        "person_picture": [f"{base}/pictures/ann.png", "/far/bob.png", "memory://bucket/c.png", None, None],
    }
    span = spans_from_table(table)[0]
    assert (span.source, span.speaker_x, span.person_picture) == ("A", 1.5, f"{base}/pictures/ann.png")
    assert find_sources([f"{tmp_path}/*{Path(name).suffix}"]).equals(table)  # as if the shell had expanded it


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("m.csv", "path,speakr_x\n", "line 1: unknown column 'speakr_x'; the columns are path, source, speaker_x"),
        ("m.csv", "source\nA\n", "line 1: the column path is missing"),
        ("m.csv", "path,path\n", "line 1: a column is given twice"),
        ("m.csv", "path\n", "lists no film"),
        ("m.csv", "", "line 1: the column path is missing"),
        ("m.csv", "path,source\na.mp4,A\n,B\n", "line 3: path is missing"),
        ("m.csv", "path\na.mp4,\n", "line 2: has 2 values for 1 columns"),
        ("m.csv", 'path,source\n"a\nb.mp4",A\n', "line 3: path is 'a\\nb.mp4', with control characters"),
        ("m.csv", 'path\n"a.mp4\n', "is not valid CSV"),
        ("m.csv", "path,speaker_x,speaker_y\na.mp4,left,3\n", "line 2: speaker_x is 'left'; give a position"),
        ("m.csv", "path,speaker_x,speaker_y\na.mp4,3,-1\n", "line 2: speaker_y is '-1'"),
        ("m.csv", "path,speaker_x,speaker_y\na.mp4,3,inf\n", "line 2: speaker_y is 'inf'"),
        ("m.csv", "path,speaker_x,speaker_y\na.mp4,3,\n", "line 2: speaker_x and speaker_y form a point"),
        ("m.jsonl", '{"path": "a.mp4"}\n\n{"path": 5}\n', "line 3: path is 5; it must be text"),
        ("m.jsonl", '{"path": "a.mp4", "speaker_x": true, "speaker_y": 1}\n', "line 1: speaker_x is True"),
        ("m.jsonl", '{"path": "a.mp4"}\n{"path": "b.mp4"\n', "line 2: is not valid JSON"),
        ("m.jsonl", '{"path": ' + "[" * 100_000, "line 1: is not valid JSON: it is nested more than"),
        (
            "m.jsonl",
            '{"path": "a.mp4", "speaker_x": 1e400, "speaker_y": 1}\n',
            "1e400 is too large",
        ),
        (
            "m.jsonl",
            '{"path": "a.mp4", "speaker_x": NaN, "speaker_y": 1}\n',
            "NaN is not a number in JSON",
        ),
        (
            "m.jsonl",
            '{"path": "a.mp4", "speaker_x": ' + "9" * 5000 + "}\n",
            "99999... is too large",
        ),
        ("m.jsonl", '["a.mp4"]\n', "line 1: is not a JSON object"),
        ("m.jsonl", '{"path": "a.mp4", "colour": "red"}\n', "line 1: unknown column 'colour'"),
        ("m.parquet", "no table", "is not a valid Parquet file"),
    ],
)
def test_invalid_manifest_gives_an_error_that_locates_the_fault(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    (tmp_path / name).write_text(text)
    assert message in refusal(tmp_path / name)


def test_manifests_accept_bom_crlf_and_nan_and_must_be_utf8(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_bytes(
        b"\xef\xbb\xbfpath,source,speaker_x,speaker_y\r\n\xc3\xa4.mp4\r\nb.mp4,,NaN,nan\r\n"
    )
    table = find_sources([tmp_path / "m.csv"])
    assert names(table) == ["ä.mp4", "b.mp4"] and table.column("speaker_x").null_count == 2
    (tmp_path / "latin.csv").write_bytes(b"path\n\xe4.mp4\n")
    assert "is not UTF-8 text" in refusal(tmp_path / "latin.csv")
    assert "cannot be read: No such file" in refusal(tmp_path / "gone.csv")


# URLs


def test_urls_can_name_folders_patterns_and_manifests(memory: fsspec.AbstractFileSystem) -> None:
    for name in ("b.mp4", "a.mp4", "deep/c.mkv", "notes.txt", ".x.mp4", ".y/z.mp4", "talks.v2/d.mp4"):
        memory.pipe_file(f"/bucket/films/{name}", b"film")
    memory.pipe_file("/bucket/lists/m.jsonl", b'{"path": "../films/b.mp4", "person": "bea.png"}\n')
    found = find_sources(["memory://bucket/films"])
    assert names(found) == ["a.mp4", "b.mp4", "deep/c.mkv", "talks.v2/d.mp4"]
    assert paths(found) == [f"memory://bucket/films/{name}" for name in names(found)]
    assert find_sources(["memory://bucket/films/"]).equals(found)
    assert find_sources(["memory://bucket/films/**"]).equals(found)
    assert names(find_sources(["memory://bucket/films/*.mp4"])) == ["a.mp4", "b.mp4"]
    assert names(find_sources(["memory://bucket/*/*.mp4"])) == ["films/a.mp4", "films/b.mp4"]
    assert paths(find_sources(["memory://*/films/?.mp4"])) == paths(found)[:2]
    assert names(find_sources(["memory://bucket/films/talks.v2"])) == ["d.mp4"]
    assert names(find_sources(["memory://bucket/films/notes.txt"])) == ["notes.txt"]
    (row,) = find_sources(["memory://bucket/lists/m.jsonl"]).to_pylist()
    assert (row["path"], row["source"]) == ("memory://bucket/films/b.mp4", "b.mp4")
    assert row["person_picture"] == "memory://bucket/lists/bea.png"
    assert "memory://bucket/none: there is nothing" in refusal("memory://bucket/none")
    assert "matches no film" in refusal("memory://bucket/films/*.mov")


def test_local_and_remote_films_of_one_name_get_distinct_names(
    tmp_path: Path, memory: fsspec.AbstractFileSystem
) -> None:
    films = make_files(tmp_path / "films", "a.mp4")
    memory.pipe_file("/bucket/films/a.mp4", b"film")
    table = find_sources([films, "memory://bucket/films"])
    assert names(table) == [f"{tmp_path.name}/films/a.mp4", "bucket/films/a.mp4"]


def test_films_on_a_web_server_are_listed(served: Served) -> None:
    make_files(served.folder, "films/a.mp4", "films/my film.mp4", "films/deep/c.mkv", "films/notes.txt")
    make_files(served.folder, "m.csv").joinpath("m.csv").write_text("path\nfilms/a.mp4\n")
    found = find_sources([f"{served.url}/films"])
    assert names(found) == ["a.mp4", "deep/c.mkv", "my film.mp4"]
    assert paths(found)[2] == f"{served.url}/films/my%20film.mp4"
    assert find_sources([f"{served.url}/films/"]).equals(found)
    assert names(find_sources([f"{served.url}/**/*.mp4"])) == ["films/a.mp4", "films/my film.mp4"]
    assert paths(find_sources([f"{served.url}/m.csv"])) == paths(found)[:1]
    requested = len(served.requested)
    signed = [f"{served.url}/films/a.mp4?key=secret{i}" for i in range(2)]
    table = find_sources(signed)
    assert paths(table) == signed and len(served.requested) == requested  # listing does not request the films
    assert all(name.startswith("127.0.0.1:") and "secret" not in name for name in names(table))
    assert len(set(names(table))) == 2


def test_unreachable_url_gives_a_one_line_error(served: Served, one_retry: None) -> None:
    make_files(served.folder, "forbidden/a.mp4")
    assert f"cannot list {served.url}/forbidden/: HTTP status 403; check" in refusal(f"{served.url}/forbidden/")
    assert f"{served.url}/gone.csv: there is nothing" in refusal(f"{served.url}/gone.csv?key=secret")
    served.close()
    with pytest.raises(StorageError) as caught:
        find_sources([f"{served.url.replace('//', '//user:secret@')}/films/"])
    text = str(caught.value)
    assert f"cannot list {served.url}/films/" in text and "2 attempts" in text and "check network" in text
    assert "secret" not in text and "\n" not in text


@pytest.mark.parametrize(("url", "package"), [("abfs://bucket/films", "adlfs"), ("gs://bucket/a.mp4", "gcsfs")])
def test_url_scheme_without_its_package_gives_an_error_naming_it(url: str, package: str) -> None:
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    text = refusal(url)
    assert text.startswith(f"{url}: a package is missing") and package in text


def test_unknown_and_chained_urls_are_refused() -> None:
    assert "Protocol not known: ftpx" in refusal("ftpx://host/a.mp4")
    assert "joins several addresses" in refusal("zip://a.mp4::memory://b.zip")


# Copies


DATA = bytes(range(256)) * 4


def cached(cache: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in cache.iterdir()}


def test_local_files_are_used_in_place(tmp_path: Path) -> None:
    make_files(tmp_path, "a.mp4")
    for given in (str(tmp_path / "a.mp4"), f"file://{tmp_path}/a.mp4"):
        with local_copy(given, tmp_path / "cache") as path:
            assert path == tmp_path / "a.mp4"
    assert not (tmp_path / "cache").exists()


def test_copy_is_reused_until_the_remote_object_changes(tmp_path: Path, memory: fsspec.AbstractFileSystem) -> None:
    cache = tmp_path / "deep/cache"
    memory.pipe_file("/bucket/a.mp4", DATA)
    with local_copy("memory://bucket/a.mp4", cache) as path:
        assert path.read_bytes() == DATA and path.suffix == ".mp4"
        assert content_hash(path) == hashlib.blake2b(DATA, digest_size=16).hexdigest()
        first = path, path.stat().st_ino
    with local_copy("memory://bucket/a.mp4", cache) as path, local_copy("memory://bucket/a.mp4", cache) as again:
        assert (path, path.stat().st_ino) == first and again == path
    memory.pipe_file("/bucket/a.mp4", DATA[::-1])  # same length
    with local_copy("memory://bucket/a.mp4", cache) as path:
        assert path != first[0] and path.read_bytes() == DATA[::-1]
    assert len(cached(cache)) == 2


def test_cache_folder_follows_the_environment(
    tmp_path: Path, memory: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.pipe_file("/a", DATA)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with local_copy("memory://a") as path:
        assert path.parent.parent == tmp_path and path.parent.stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("TCCP_CACHE", str(tmp_path / "mine"))
    with local_copy("memory://a") as path:
        assert path.parent == tmp_path / "mine"


def test_least_recently_used_copies_are_evicted(tmp_path: Path, memory: fsspec.AbstractFileSystem) -> None:
    cache = make_files(tmp_path / "cache", "someone's.mp4", "tccp-notes.txt")
    for name in "abcd":
        memory.pipe_file(f"/{name}.mp4", name.encode() * 100)

    def use(name: str) -> Path:
        with local_copy(f"memory://{name}.mp4", cache, max_bytes=250) as path:
            assert path.read_bytes() == name.encode() * 100
        return path

    a, b = use("a"), use("b")
    assert use("a") == a  # now b is the least recently used
    c = use("c")
    assert a.exists() and c.exists() and not b.exists()
    with local_copy("memory://a.mp4", cache, max_bytes=250) as held:
        d = use("d")
        assert not c.exists()
        b = use("b")
        assert held.exists() and b.exists() and not d.exists()  # a is the least recently used, but in use
    assert {path.name for path in (a, b)} | {"someone's.mp4", "tccp-notes.txt"} == set(cached(cache))


def test_film_larger_than_the_cache_is_usable_and_deleted_after_use(
    tmp_path: Path, memory: fsspec.AbstractFileSystem
) -> None:
    memory.pipe_file("/small.mp4", DATA[:10])
    memory.pipe_file("/large.mp4", DATA)
    with local_copy("memory://small.mp4", tmp_path, max_bytes=20) as small:
        pass
    with local_copy("memory://large.mp4", tmp_path, 20) as one:
        with local_copy("memory://large.mp4", tmp_path, 20) as other:
            assert one == other and other.read_bytes() == DATA
        assert one.exists()  # kept while in use
    assert cached(tmp_path) == {small.name: 10}


def test_leftovers_of_a_killed_download_are_removed(tmp_path: Path, memory: fsspec.AbstractFileSystem) -> None:
    memory.pipe_file("/a.mp4", DATA)
    with local_copy("memory://a.mp4", tmp_path) as path:
        pass
    for left in (path.with_suffix(".part"), tmp_path / f"tccp-{'0' * 32}.part"):
        left.write_bytes(DATA[:100])
    path.unlink()
    with local_copy("memory://a.mp4", tmp_path) as path:
        assert path.read_bytes() == DATA
    assert list(cached(tmp_path)) == [path.name]


def failure(url: str, cache: Path) -> MediaError:
    with pytest.raises(MediaError) as caught, local_copy(url, cache):
        pass
    assert url.partition("?")[0] in str(caught.value) and "\n" not in str(caught.value)
    assert pickle.loads(pickle.dumps(caught.value)).reason == caught.value.reason
    assert not cache.exists() or not cached(cache)
    return caught.value


def test_incomplete_download_gives_an_error_and_no_file(
    tmp_path: Path, served: Served, memory: fsspec.AbstractFileSystem, one_retry: None
) -> None:
    cache = tmp_path / "cache"
    for name in ("short.mp4", "vanishes.mp4", "forbidden.mp4", "hiccup.mp4"):
        (served.folder / name).write_bytes(DATA)
    assert failure(f"{served.url}/none.mp4?key=secret", cache).reason == "missing"
    assert failure(f"{served.url}/vanishes.mp4", cache).reason == "missing"  # deleted between HEAD and GET
    assert failure("memory://none.mp4", cache).reason == "missing"
    assert failure(f"{served.url}/short.mp4", cache).reason == "unreadable"
    assert served.requested.count("/short.mp4") == 2
    forbidden = failure(f"{served.url}/forbidden.mp4", cache)
    assert forbidden.reason == "unreadable" and "HTTP status 403" in str(forbidden)
    memory.pipe_file("/folder/a.mp4", DATA)
    assert failure("memory://folder", cache).reason == "not_a_file"
    with local_copy(f"{served.url}/hiccup.mp4", cache) as path:  # one failure is retried
        assert path.read_bytes() == DATA
    path.unlink()
    served.close()
    assert failure(f"{served.url}/short.mp4", cache).reason == "unreadable"


class ShortMemory(MemoryFileSystem):
    """Reports a size ten bytes larger than the content."""

    protocol = "shortmemory"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("shortmemory://", "memory://"))

    def info(self, path: str, **kwargs: object) -> dict[str, object]:
        return super().info(path, **kwargs) | {"size": len(DATA) + 10}


def test_silent_short_read_is_detected(tmp_path: Path, memory: fsspec.AbstractFileSystem, one_retry: None) -> None:
    fsspec.register_implementation("shortmemory", ShortMemory, clobber=True)
    memory.pipe_file("/a.mp4", DATA)
    assert "a.mp4: cannot be fetched: only 1024 of 1034 bytes arrived" in str(
        failure("shortmemory://a.mp4", tmp_path / "cache")
    )


def test_unwritable_cache_is_not_a_media_error(tmp_path: Path, memory: fsspec.AbstractFileSystem) -> None:
    memory.pipe_file("/a.mp4", DATA)
    (tmp_path / "file").touch()
    with pytest.raises(TccpError) as caught, local_copy("memory://a.mp4", tmp_path / "file"):
        pass
    assert f"cache {tmp_path}/file: File exists; make room there, or set TCCP_CACHE" in str(caught.value)
    assert not isinstance(caught.value, MediaError)


def test_error_raised_by_the_caller_passes_through(tmp_path: Path, memory: fsspec.AbstractFileSystem) -> None:
    memory.pipe_file("/a.mp4", DATA)
    with pytest.raises(FileNotFoundError, match="mine"), local_copy("memory://a.mp4", tmp_path, max_bytes=1):
        raise FileNotFoundError("mine")
    assert not cached(tmp_path)


def fetch(urls: list[str], cache: Path, max_bytes: int, wrong: multiprocessing.Queue) -> None:
    """Runs in its own process; reports each film that is incomplete while in use."""
    for url in urls:
        with local_copy(url, cache, max_bytes) as path:
            expected = url.rpartition("/")[2].encode() * 100
            for _ in range(3):
                if path.read_bytes() != expected:
                    wrong.put(url)
                time.sleep(0.003)


def in_processes(*work: list[str], cache: Path, max_bytes: int) -> list[str]:
    context = multiprocessing.get_context("spawn")
    wrong = context.Queue()
    processes = [context.Process(target=fetch, args=(urls, cache, max_bytes, wrong)) for urls in work]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    return [wrong.get() for _ in range(wrong.qsize())]


def test_concurrent_processes_fetch_one_film_once(tmp_path: Path, served: Served) -> None:
    (served.folder / "slow.mp4").write_bytes(b"slow.mp4" * 100)
    assert not in_processes(*[[f"{served.url}/slow.mp4"]] * 3, cache=tmp_path / "cache", max_bytes=10**6)
    assert served.requested.count("/slow.mp4") == 1 and len(cached(tmp_path / "cache")) == 1


def test_concurrent_eviction_never_removes_a_film_in_use(tmp_path: Path, served: Served) -> None:
    films = [f"{i:03d}.mp4" for i in range(12)]  # 700 bytes each, and room for two
    for name in films:
        (served.folder / name).write_bytes(name.encode() * 100)
    urls = [f"{served.url}/{name}" for name in films]
    orders = [urls * 2, urls[::-1] * 2, urls[::2] * 4]
    assert not in_processes(*orders, cache=tmp_path / "cache", max_bytes=1500)
    assert sum(cached(tmp_path / "cache").values()) <= 1500


def test_killed_process_leaves_no_lock_and_no_partial_copy(tmp_path: Path, served: Served) -> None:
    """Another process gets the lock and fetches the whole file."""
    (served.folder / "stalls.mp4").write_bytes(b"stalls.mp4" * 100)
    served.stall.set()
    context = multiprocessing.get_context("spawn")
    arguments = ([f"{served.url}/stalls.mp4"], tmp_path / "cache", 10**6, context.Queue())
    process = context.Process(target=fetch, args=arguments)
    process.start()
    while "/stalls.mp4" not in served.requested:
        assert process.is_alive()
        time.sleep(0.01)
    assert [name[-5:] for name in cached(tmp_path / "cache")] == [".part"]
    process.kill()
    process.join()
    served.stall.clear()
    with local_copy(f"{served.url}/stalls.mp4", tmp_path / "cache") as path:
        assert path.read_bytes() == b"stalls.mp4" * 100
    assert list(cached(tmp_path / "cache")) == [path.name]
