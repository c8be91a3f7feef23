"""Folders, clip tables, latents and lips on S3, through short outages of the server."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow.fs
import pyarrow.parquet as pq
import pytest
import trainings
from object_storage import ObjectStorage, object_storage

from preprocessing.plan import make_plan
from preprocessing.run import preprocess
from tccp.clips.clip_table import ClipTable
from tccp.config import load_settings
from tccp.errors import DamagedData, StorageError, TccpError
from tccp.files import AccessError, Folder, remote_copy, storage_retries
from tccp.files.arrow import arrow_filesystem
from tccp.files.retry import RETRY_S
from tccp.inference.conditioning import training_conditions
from tccp.media import MediaError
from tccp.media.remote import local_copy
from tccp.models.autoencoder import PictureAutoencoder
from tccp.models.variants import VARIANTS
from tccp.training.latent_cache import LatentCache
from tccp.training.launcher.worker_group import repeat_after_outages
from tccp.training.lip_folds import LipPlace
from tccp.training.window_files import training_order

OUTAGE_S = 0.3
SETTINGS = load_settings("toy", [*trainings.OVERRIDES, "headbox.draws=1"])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStorage]:
    with object_storage(tmp_path_factory.mktemp("moto") / "log") as storage:
        yield storage


@pytest.fixture
def place(server: ObjectStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A URL for this test alone, with a cache of its own."""
    monkeypatch.setenv("TCCP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(RETRY_S, "30")
    return f"{server.url}/{tmp_path.name}"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return trainings.make_data(tmp_path_factory.mktemp("data"))


@contextlib.contextmanager
def outage(server: ObjectStorage, at: str) -> Iterator[None]:
    """Cause an outage at the first request that matches `at`; require that request and a successful retry."""
    retries = storage_retries()
    server.proxy.fail_at(at, OUTAGE_S)
    yield
    found = [request for request in server.proxy.outages if re.search(at, request)]
    assert len(found) == 1, f"{len(found)} outages at requests that match {at}"
    server.proxy.outages.remove(found[0])
    assert storage_retries() > retries


# Folders


def test_folder_on_s3_behaves_like_a_local_folder(place: str, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "deep" / "er").mkdir(parents=True)
    (tree / "one").write_bytes(b"1")
    (tree / "deep" / "er" / "two").write_bytes(bytes(range(256)) * 1000)
    seen = []
    for given in (tmp_path / "local", f"{place}/remote"):
        folder = Folder(given)
        assert (folder.exists(), folder.names(), folder.subfolders(), folder.tree()) == (False, set(), set(), [])
        folder.remove("nothing")
        folder.upload(tree, "up")
        folder.write(".hidden", b"")
        with folder.writing("up/three") as path:
            path.write_bytes(b"333")
        with folder.as_local("up") as copy, folder.open("up/deep/er/two") as file:
            file.seek(-6, os.SEEK_END)
            seen.append(
                (
                    *(folder.exists(name) for name in ("", "up", "up/one", "up/none", ".hidden")),
                    *(folder.names("up"), folder.subfolders("up"), folder.tree("up"), folder.names()),
                    *(folder.read("up/three"), file.read(), file.tell()),
                    sorted((path.relative_to(copy), path.read_bytes()) for path in copy.rglob("*") if path.is_file()),
                )
            )
        for name in ("up/none", "none/at/all"):
            with pytest.raises(FileNotFoundError):
                folder.read(name)
            with pytest.raises(FileNotFoundError):
                folder.open(name)
            with pytest.raises(FileNotFoundError):
                folder.copy(name, "copied")
        folder.copy("up/one", "copies/of/one")
        folder.remove("up")
        assert folder.read("copies/of/one") == b"1"
        folder.remove("copies")
        assert folder.tree() == [] and not folder.exists("up/one")
    assert seen[0] == seen[1]


OPERATIONS: dict[str, tuple[str, Callable[[Folder, Path], Any]]] = {
    "exists": ("^HEAD", lambda folder, here: folder.exists("a")),
    "names": ("^GET", lambda folder, here: folder.names()),
    "read": ("^GET", lambda folder, here: folder.read("a")),
    "write": ("^PUT", lambda folder, here: folder.write("b", b"b")),
    "copy": ("^PUT", lambda folder, here: folder.copy("a", "b")),
    "upload": ("^PUT", lambda folder, here: folder.upload(here, "c")),
    "remove": ("^POST", lambda folder, here: folder.remove("a")),
    "as_local": ("^GET .*/a", lambda folder, here: folder.as_local().__enter__()),
    "local_file": ("^GET .*/a", lambda folder, here: folder.local_file("a").__enter__().read_bytes()),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_survives_an_outage(
    server: ObjectStorage, place: str, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Folder(place)
    folder.write("a", b"a")
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "file").write_bytes(b"c")
    at, operation = OPERATIONS[name]
    with outage(server, at), caplog.at_level(logging.WARNING):
        operation(folder, tmp_path / "here")
    assert "storage: cannot" in caplog.text and "next attempt in" in caplog.text
    expected = {"write": ["a", "b"], "copy": ["a", "b"], "upload": ["a", "c/file"], "remove": []}
    assert folder.tree() == expected.get(name, ["a"])


def test_lasting_outage_is_a_storage_error(server: ObjectStorage, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Folder(place)
    folder.write("a", b"a")
    monkeypatch.setenv(RETRY_S, "0.3")
    server.proxy.away(1.0)
    with pytest.raises(StorageError, match=f"^cannot read {place}/a: .* attempts in .* give the same command again$"):
        folder.read("a")
    time.sleep(1.0)
    assert folder.read("a") == b"a"


def test_launcher_attempts_outlast_the_retries(
    server: ObjectStorage, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tccp.training.launcher import worker_group

    monkeypatch.setattr(worker_group, "STORAGE_PAUSE_S", 0.4)
    monkeypatch.setenv(RETRY_S, "0.1")
    folder = Folder(place)
    folder.write("a", b"a")
    server.proxy.away(2.0)
    with pytest.raises(StorageError):
        repeat_after_outages(lambda: folder.read("a"), 1)
    assert repeat_after_outages(lambda: folder.read("a"), 20) == b"a"


def test_hanging_storage_fails_after_the_configured_timeout(
    server: ObjectStorage, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    Folder(place).write("a", b"a")
    conf = {"s3": {"config_kwargs": {"read_timeout": 0.1}}}
    monkeypatch.setattr(fsspec.config, "conf", {**fsspec.config.conf, **conf})
    monkeypatch.setenv(RETRY_S, "0")
    s3fs.S3FileSystem.clear_instance_cache()
    server.proxy.hangs = True
    try:
        begun = time.monotonic()
        with pytest.raises(StorageError, match=r"[Tt]imeout"):
            Folder(place).read("a")
        assert time.monotonic() - begun < 15
    finally:
        server.proxy.hangs = False
        s3fs.S3FileSystem.clear_instance_cache()


def test_missing_bucket_is_a_user_error_and_is_not_created(server: ObjectStorage, place: str) -> None:
    nowhere = Folder("s3://tccp-misspelled/x")
    before = storage_retries()
    with pytest.raises(TccpError, match=r"^cannot write s3://tccp-misspelled/x/a: .*the bucket must exist$"):
        nowhere.write("a", b"")
    assert not nowhere.exists("a") and nowhere.names() == set()
    filesystem, path = arrow_filesystem(nowhere)
    filesystem.create_dir(path)
    assert not [one for one in server.proxy.requests if one.startswith("PUT /tccp-misspelled ")]
    assert storage_retries() == before


def test_missing_credentials_are_a_user_error(
    server: ObjectStorage, place: str, data: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for a part of a clip table, whose other errors mean that it is damaged."""
    import s3fs

    Folder(place).upload(data[0], "clips")
    table = ClipTable(f"{place}/clips")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", "/nonexistent")
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        with pytest.raises(AccessError, match=r"Unable to locate credentials; check the address, credentials"):
            Folder(place).read("a")
        table.folder = Folder(f"{place}/clips")
        with pytest.raises(AccessError, match=r"Unable to locate credentials"):
            table.rows(table.ids[:1])
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
        table.close()


# Arrow file systems, which Ray Train uses


def test_checkpoints_copied_through_arrow_survive_an_outage(server: ObjectStorage, place: str, tmp_path: Path) -> None:
    source = tmp_path / "checkpoint"
    (source / "deep").mkdir(parents=True)
    (source / "deep" / "weights").write_bytes(os.urandom(3_000_000))
    (source / "progress.json").write_text("{}")
    filesystem, root = arrow_filesystem(Folder(place))
    with outage(server, "^PUT .*weights"):
        pyarrow.fs.copy_files(str(source), f"{root}/step", destination_filesystem=filesystem)
    with outage(server, "^GET .*weights"):
        pyarrow.fs.copy_files(f"{root}/step", str(tmp_path / "copy"), source_filesystem=filesystem)
    for name in ("deep/weights", "progress.json"):
        assert (tmp_path / "copy" / name).read_bytes() == (source / name).read_bytes()
    with outage(server, "^HEAD .*step"):
        assert filesystem.get_file_info(f"{root}/step").type == pyarrow.fs.FileType.Directory
    with outage(server, "^GET .*list-type"):
        listed = filesystem.get_file_info(pyarrow.fs.FileSelector(f"{root}/step", recursive=True))
    assert {one.base_name for one in listed if one.is_file} == {"weights", "progress.json"}
    with filesystem.open_output_stream(f"{root}/record.json") as stream:
        stream.write(b"{")
        assert not Folder(place).exists("record.json")
        stream.write(b"}")
    assert Folder(place).read("record.json") == b"{}"
    with outage(server, "^POST"):
        filesystem.delete_dir(f"{root}/step")
    assert Folder(place).tree() == ["record.json"]


def test_stream_that_is_not_closed_leaves_no_file(place: str) -> None:
    filesystem, root = arrow_filesystem(Folder(place))
    stream = filesystem.open_output_stream(f"{root}/half")
    stream.write(b"half")
    del stream
    assert Folder(place).tree() == []


# The cache


def test_one_bounded_cache_serves_films_folders_and_single_files(
    server: ObjectStorage, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TCCP_CACHE_GB", "0.000035")
    folder, cache = Folder(place), tmp_path / "cache"
    for number in range(6):
        folder.write(f"files/{number}.bin", bytes([number]) * 10_000)

    def size() -> int:
        return sum(path.stat().st_size for path in cache.iterdir())

    with local_copy(folder.path("files/0.bin")) as film:
        assert film.parent == cache
    with folder.local_file("files/1.bin") as one:
        assert one.parent == cache and one.read_bytes() == b"\1" * 10_000
    assert size() == 20_000
    with folder.as_local("files") as files:
        assert sorted(path.read_bytes()[0] for path in files.iterdir()) == list(range(6))
        assert size() <= 35_000
    asked = len(server.proxy.requests)
    with folder.local_file("files/5.bin") as first, folder.local_file("files/5.bin") as second:
        assert first == second
    with folder.local_file("files/5.bin"):
        pass
    assert len(server.proxy.requests) - asked <= 2, "an immutable file was requested again"
    with folder.as_local("files", writable=True) as files:
        (files / "3.bin").write_bytes(b"changed in place")
    with folder.as_local("files") as files:
        assert (files / "3.bin").read_bytes() == b"\3" * 10_000, "a write to the copy changed the cache"
    monkeypatch.setenv("TCCP_CACHE_GB", "none")
    with pytest.raises(TccpError, match="TCCP_CACHE_GB=none: give a number"), folder.local_file("files/0.bin"):
        pass


def test_cache_of_many_files_is_not_listed_at_every_access(place: str, tmp_path: Path) -> None:
    Folder(place).write("a", b"a")
    (tmp_path / "cache").mkdir()
    for number in range(300):
        (tmp_path / "cache" / f"tccp-{number:032x}").write_bytes(b"x" * 10)

    def use() -> int:
        with remote_copy(f"{place}/a", max_bytes=2000, immutable=True):
            pass
        return len(list((tmp_path / "cache").iterdir()))

    assert use() == 200, "the first access makes room"
    (tmp_path / "cache" / f"tccp-{999:032x}").write_bytes(b"x" * 10)
    counts = [use() for _ in range(4)]
    assert counts[0] == 201 and counts[-1] == 200


# Preprocessing


@pytest.mark.slow
def test_preprocessing_to_s3_survives_outages_and_counts_them(
    server: ObjectStorage, place: str, data: tuple[Path, Path]
) -> None:
    plan = make_plan(SETTINGS.picture_px, "truth")
    films = f"{place}/films"
    Folder(films).upload(data[0].parent / "films", "")
    place = f"{place}/clips"
    with outage(server, "^GET .*/films/.*mp4"), outage(server, "^PUT .*/clips/.*parquet"):
        report = preprocess([films], place, plan)
    assert report.storage_retries > 0
    with outage(server, "^GET .*index.parquet"):
        remote = ClipTable(place)
    with ClipTable(data[0]) as local, remote:
        assert remote.ids == local.ids
        with outage(server, "^GET .*/clips/.*parquet"):
            assert remote.rows(remote.ids).equals(local.rows(local.ids))
        assert pq.read_table(data[0] / "index.parquet").equals(pq.read_table(Folder(place).open("index.parquet")))
    with outage(server, "^HEAD .*parquet"):
        again = preprocess([films], place, plan)
    assert "render" not in {step.name for step in again.steps} and again.clips == report.clips


def test_films_on_s3_survive_an_outage_or_count_as_unreadable(
    server: ObjectStorage, place: str, data: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    film = next((data[0].parent / "films").glob("*.mp4"))
    Folder(place).upload_file(film, "film.mp4")
    with outage(server, "^GET .*film.mp4"), local_copy(f"{place}/film.mp4") as copy:
        assert copy.read_bytes() == film.read_bytes()
    monkeypatch.setenv(RETRY_S, "0.1")
    server.proxy.away(1.0)
    with pytest.raises(MediaError, match=r"film.mp4: cannot be fetched: ") as caught, local_copy(f"{place}/film.mp4"):
        pass
    assert caught.value.reason == "unreadable" and isinstance(caught.value, DamagedData)
    time.sleep(1.0)


# Latents and lips


@pytest.mark.slow
def test_latents_and_lips_on_s3_survive_outages(
    server: ObjectStorage, place: str, data: tuple[Path, Path], tmp_path: Path
) -> None:
    clips, untrained = data
    autoencoder = PictureAutoencoder.load(untrained / "autoencoder").eval()
    lips = LipPlace(SETTINGS.lips, Folder(untrained / "lips")).open()
    name = "face_first"
    row, kinds = VARIANTS[name], training_conditions(VARIANTS[name], SETTINGS)
    assert "lips" in kinds
    columns = []
    for root in (Folder(tmp_path / "local"), Folder(place)):
        cache = LatentCache(root, ClipTable(clips), SETTINGS, autoencoder, lips, [name])
        with contextlib.ExitStack() as outages:
            if root.local is None:
                outages.enter_context(outage(server, "^PUT .*/latents/.*/.*face.safetensors"))
            first, *rest = cache.missing_clips()
            cache.build_clip(first)
        with contextlib.ExitStack() as outages:
            if root.local is None:
                outages.enter_context(outage(server, r"^PUT .*/lips/.*/.*\.npy"))
            for clip_id in rest:
                cache.build_clip(clip_id)
        assert cache.missing_clips() == []
        planned = training_order(cache.lengths, name, SETTINGS).step(0, 4)
        for at in (r"^GET .*/lips/.*\.npy", r"^GET .*/latents/.*\.safetensors"):
            with contextlib.ExitStack() as outages:
                if root.local is None:
                    for copy in (tmp_path / "cache").glob("*"):
                        copy.unlink()
                    outages.enter_context(outage(server, at))
                columns.append(cache.files.columns(planned, row, row.num_frames(SETTINGS.window), kinds))
    for found in columns[1:]:
        assert found.keys() == columns[0].keys()
        for key, values in columns[0].items():
            np.testing.assert_array_equal(found[key], values, err_msg=key)


def test_missing_or_damaged_lips_are_not_storage_failures(place: str, data: tuple[Path, Path], tmp_path: Path) -> None:
    lips = LipPlace(SETTINGS.lips, Folder(data[1] / "lips")).open()
    cache = LatentCache(
        Folder(place), ClipTable(data[0]), SETTINGS, PictureAutoencoder.from_settings(SETTINGS.autoencoder), lips
    )
    assert cache.lips is not None
    one, other = cache.table.ids[:2]
    before = storage_retries()
    with pytest.raises(TccpError, match=f"lips of clip {one}: .*render the lip table") as caught:
        cache.lips.read(one)
    assert not isinstance(caught.value, DamagedData)
    Folder(place).write(f"lips/{cache.lips.name(other)}", b"no array")
    with pytest.raises(DamagedData, match=r"\.npy is damaged .*; remove it and render"):
        cache.lips.read(other)
    assert storage_retries() == before
