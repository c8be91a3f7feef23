"""The server on a real Ray Serve: jobs through replicas that are killed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jobs
import numpy as np
import psutil
import pytest
import tiny

from tccp.files import Folder
from tccp.serving.server_settings import ServerSettings
from tccp.serving.store import Job, JobStore

pytest.importorskip("ray.serve")
pytest_plugins = ["tiny_fixtures"]
pytestmark = [pytest.mark.cluster, pytest.mark.slow]


@pytest.fixture(scope="module")
def settings(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> ServerSettings:
    storage = tmp_path_factory.mktemp("serve") / "storage"
    given = ServerSettings(storage=str(storage), weights={"default": str(weights)}, device="cpu", batch=1, lease_s=2)
    return given.pinned()


@pytest.fixture(scope="module")
def server(settings: ServerSettings) -> Iterator[ServerSettings]:
    """The application without its ingress, on a Ray of its own."""
    from ray import serve

    from tccp.cluster import ray_cluster
    from tccp.serving.deployments import parts

    with ray_cluster(extra="serve", worker_logs=False):
        _, conductor = parts(settings)
        serve.run(conductor, name="tccp", route_prefix=None)
        yield settings
        serve.shutdown()


def ended(store: JobStore, made: list[Job], timeout_s: float) -> list[Job]:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        now = [job for one in made if (job := store.get(one.id)) is not None]
        if all(job.status not in ("queued", "in_progress") for job in now):
            return now
        time.sleep(0.2)
    raise AssertionError([(job.status, job.stage, job.error_message) for job in now])


def kill_a_replica(rng: np.random.Generator) -> str:
    """Kills the process of a replica, as a lack of memory does."""
    replicas: dict[str, psutil.Process] = {}
    deadline = time.monotonic() + 60
    while not replicas and time.monotonic() < deadline:
        for one in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                name = " ".join(one.cmdline())
                if name.startswith("ray::ServeReplica:tccp:"):
                    replicas[name] = one
    name = sorted(replicas)[int(rng.integers(len(replicas)))]
    replicas[name].kill()
    return name


def film_of(settings: ServerSettings, job: Job) -> Any:
    assert job.status == "completed" and job.result is not None, (job.status, job.error_code, job.error_message)
    local = Folder(settings.storage).local
    assert local is not None
    return tiny.pictures(local / job.result["folder"] / "film.mp4")


def test_every_job_ends_once_and_right_while_replicas_die(
    server: ServerSettings, film: Path, weights: Path, tmp_path: Path
) -> None:
    store, storage = JobStore(server.store_url), Folder(server.storage)
    track = jobs.track_file(film, tmp_path, (12,))
    version = server.versions["default"]
    made = [jobs.add(store, jobs.new_job(film, track, storage, version, seed=seed % 3)) for seed in range(10)]
    rng = np.random.default_rng(0)
    killed = []
    for _ in range(3):
        time.sleep(3)
        killed.append(kill_a_replica(rng))
    found = ended(store, made, 900)
    for number, job in enumerate(found):
        out = tmp_path / f"{number % 3}.mp4"
        if not out.exists():
            tiny.generated(film, weights, out, box=str(track), batch=1, seed=number % 3)
        np.testing.assert_array_equal(film_of(server, job), tiny.pictures(out), err_msg=str(killed))
        assert job.windows_done >= job.windows
    store.close()
