"""The library as its users call it: one pipeline, many films, from wherever its weights lie."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import trainings

import tccp
from tccp.files import Folder
from tccp.inference.manifest import MANIFEST, read_manifest
from tccp.models.variants import TWO_STAGE
from tccp.roundtable import identity_path

pytest_plugins = ["tiny_fixtures"]


def options_of(film: Path) -> dict[str, Any]:
    return {"scene": film, "audio": film, "identity": identity_path(film), "truth": True, "identity_box": "whole"}


@pytest.fixture(scope="module")
def expected(film: Path, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """The pictures of the film that `tccp generate` writes."""
    from tccp.cli import main

    out = tmp_path_factory.mktemp("expected") / "out.mp4"
    command = ["generate", "--scene", film, "--audio", film, "--identity", identity_path(film), "--weights", weights]
    main([*map(str, command), "--out", str(out), "--truth", "--identity-box", "whole", "--lossless", "--device", "cpu"])
    return tiny.pictures(out)


def test_importing_it_imports_nothing_heavy() -> None:
    code = (
        "import sys, tccp; print([m for m in ('torch', 'numpy', 'diffusers', 'pydantic', 'ray') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
    for name in tccp.__all__:
        assert getattr(tccp, name) is not None
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        tccp.nothing_of_the_kind  # noqa: B018


def test_one_pipeline_makes_many_films_without_loading_again(
    film: Path, weights: Path, expected: np.ndarray, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The folder is gone after loading, so nothing can be read from it again; the frames are those of the command."""
    shutil.copytree(weights, tmp_path / "weights")
    pipeline = tccp.Pipeline.from_pretrained(tmp_path / "weights")
    shutil.rmtree(tmp_path / "weights")
    for _ in range(2):
        frames = list(pipeline.generate(**options_of(film)))
        assert np.array_equal(np.stack([frame.picture for frame in frames]), expected)
    request = tccp.FilmRequest(**options_of(film), out=tmp_path / "film.mp4", lossless=True)
    result = tccp.generate_film(request, pipeline=pipeline)
    assert (result.frames, result.generated) == (len(expected), len(expected))
    assert np.array_equal(tiny.pictures(tmp_path / "film.mp4"), expected)
    assert capfd.readouterr() == ("", "")


def test_progress_comes_through_the_callback(film: Path, weights: Path) -> None:
    pipeline = tccp.Pipeline.from_pretrained(str(weights))
    events: list[tccp.ProgressEvent] = []
    frames = list(pipeline.generate(**options_of(film), on_progress=events.append, steps=1))
    last = events[-1]
    assert (last.description, last.done, last.total, last.ended) == ("generating", len(frames), len(frames), True)
    assert [event.done for event in events if event.description == "generating" and not event.ended] == list(
        range(len(frames) + 1)
    )


def test_networks_are_loaded_when_they_are_needed(film: Path, weights: Path) -> None:
    pipeline = tccp.Pipeline.from_pretrained(weights)
    assert set(pipeline.networks) == set(TWO_STAGE)
    frames = list(pipeline.generate(**options_of(film), one_stage=True, steps=1))
    assert all(frame.face is not None and frame.points is None for frame in frames)
    assert {"one_stage_first", "one_stage_sequence"} < set(pipeline.networks)


def test_precision_is_that_which_is_asked_for(film: Path, weights: Path) -> None:
    """In bfloat16 networks differ by their rounding, not by what they are shown."""
    exact, rough = (tccp.Pipeline.from_pretrained(weights, dtype=dtype) for dtype in ("float32", torch.bfloat16))
    assert {p.dtype for p in rough.networks["face_first"].parameters()} == {torch.bfloat16}
    assert rough.autoencoder.vae.dtype == torch.bfloat16
    request = {**options_of(film), "steps": 1}
    faces = [
        np.stack([f.face for f in pipeline.generate(**request) if f.face is not None]).astype(int)
        for pipeline in (exact, rough)
    ]
    assert 0 < np.abs(faces[0] - faces[1]).mean() < 4


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("nowhere", {}, "no pipeline at nowhere"),
        ("toy", {"dtype": "float8"}, "dtype float8: give one of float32, bfloat16, float16"),
        ("toy", {"device": "abacus"}, "device abacus: give cpu, cuda"),
        ("toy", {"preset": "paper"}, "not 'paper'"),
        ("memory://tccp-tests/nowhere", {}, "no pipeline at memory://tccp-tests/nowhere"),
    ],
)
def test_what_cannot_be_loaded_is_said_in_one_line(source: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(tccp.TccpError, match=message) as error:
        tccp.Pipeline.from_pretrained(source, **options)
    assert "\n" not in str(error.value)


def test_an_option_that_does_not_exist_is_refused(film: Path, weights: Path) -> None:
    pipeline = tccp.Pipeline.from_pretrained(weights, variants=())
    with pytest.raises(TypeError, match="stepps"):
        next(pipeline.generate(**options_of(film), stepps=3))
    with pytest.raises(tccp.TccpError, match="takes no lossless, out: give loading options to"):
        next(pipeline.generate(**options_of(film), out="film.mp4", lossless=True))


# From elsewhere


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TCCP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_pipeline_at_a_url_is_copied_once_and_checked(weights: Path, cache: Path) -> None:
    url = "memory://tccp-tests/pipeline"
    Folder(url).upload(weights, "")
    pipeline = tccp.Pipeline.from_pretrained(url, variants=("face_first",))
    assert set(pipeline.networks) == {"face_first"}
    copied = {path.relative_to(cache): path.stat().st_mtime_ns for path in cache.rglob("*.safetensors")}
    assert {path.parent.name for path in copied} == {"autoencoder", "lips", "face_first"}, "only what is asked for"
    tccp.Pipeline.from_pretrained(url, variants=("face_first",))
    assert copied == {path.relative_to(cache): path.stat().st_mtime_ns for path in cache.rglob("*.safetensors")}
    (damaged,) = cache.rglob("face_first/*.safetensors")
    damaged.write_bytes(b"not the weights")
    tccp.Pipeline.from_pretrained(url, variants=("face_first",))  # a damaged copy is fetched again
    manifest = json.loads(Folder(url).read(MANIFEST))
    manifest["components"]["face_first"]["files"] = {"../../../escaped": "0" * 64}
    Folder(url).write(MANIFEST, json.dumps(manifest).encode())
    with pytest.raises(tccp.TccpError, match="outside the pipeline"):
        tccp.Pipeline.from_pretrained(url, variants=("face_first",))


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """asked: the paths of all GET requests. failures: the number of next requests that are answered with status 503."""

    asked: list[str] = field(default_factory=list)
    failures: int = 0


@pytest.fixture
def hub(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A local endpoint that serves one model repository as the Hugging Face Hub does."""
    hub = Hub()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(False)

        def do_GET(self) -> None:
            hub.asked.append(self.path)
            self._answer(True)

        def _answer(self, with_body: bool) -> None:
            prefix = "/someone/pipeline/resolve/main/"
            path = weights / self.path.removeprefix(prefix)
            if hub.failures:
                hub.failures -= 1
                self.send_response(503)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            if not self.path.startswith(prefix) or not path.is_file():
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound" if self.path.startswith(prefix) else "RepoNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            content = path.read_bytes()
            self.send_response(200)
            self.send_header("ETag", f'"{abs(hash((self.path, content))):x}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if with_body:
                self.wfile.write(content)

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_a_hub_that_cannot_be_reached_is_asked_again_and_is_a_storage_failure(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{trainings.free_port()}")
    monkeypatch.setenv("TCCP_STORAGE_RETRY_S", "0.1")
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the Hub's own library pauses for 23 s in each attempt
    with pytest.raises(
        tccp.StorageError, match=r"cannot fetch manifest\.json .*: the Hub cannot be reached \(\d+ attempts"
    ):
        tccp.Pipeline.from_pretrained("someone/pipeline")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(tccp.TccpError, match="HF_HUB_OFFLINE forbids to fetch it"):
        tccp.Pipeline.from_pretrained("someone/pipeline")


def test_a_hub_that_fails_once_is_asked_again(hub: Hub) -> None:
    hub.failures = 1
    assert set(tccp.Pipeline.from_pretrained("someone/pipeline", variants=("face_first",)).networks) == {"face_first"}
    assert hub.failures == 0


def test_copies_of_pipelines_are_within_the_bound_of_the_cache(
    weights: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those in use stay in any case."""
    held: dict[Path, int] = {}
    monkeypatch.setattr("tccp.files.cache._held_folders", held)
    in_cache = []
    for number in range(3):
        url = f"memory://tccp-tests/pipeline{number}"
        Folder(url).upload(weights, "")
        tccp.Pipeline.from_pretrained(url, variants=("face_first",))
        in_cache.append({path.name for path in cache.iterdir()})
        if number == 0:  # from now on there is room for one and a half
            size = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
            monkeypatch.setenv("TCCP_CACHE_GB", str(1.5 * size / 1e9))
        if number == 1:  # as when a process ends
            os.close(held.pop(cache / next(iter(in_cache[0]))))
    first, second = in_cache[0], in_cache[1] - in_cache[0]
    assert in_cache[1] == first | second, "both are in use"
    assert second < in_cache[2] and len(in_cache[2]) == 2 and not first & in_cache[2]
    os.close(held.pop(cache / next(iter(second))))
    tccp.Pipeline.from_pretrained("memory://tccp-tests/pipeline0", variants=("face_first",))
    assert not second & {path.name for path in cache.iterdir()}


def test_a_pipeline_on_the_hub_is_fetched_by_its_id(hub: Hub, film: Path, weights: Path) -> None:
    pipeline = tccp.Pipeline.from_pretrained("someone/pipeline")
    named = {
        f"{name}/{file}"
        for name in ("autoencoder", "lips", *TWO_STAGE)
        for file in read_manifest(weights)["components"][name]["files"]
    }
    assert {path.removeprefix("/someone/pipeline/resolve/main/") for path in hub.asked} == {*named, MANIFEST}
    here = tccp.Pipeline.from_pretrained(weights)
    request = {**options_of(film), "steps": 1}
    for ours, theirs in zip(here.generate(**request), pipeline.generate(**request), strict=True):
        assert np.array_equal(ours.picture, theirs.picture)
    with pytest.raises(tccp.TccpError, match="someone/else"):
        tccp.Pipeline.from_pretrained("someone/else")
