"""The films of a list on a Ray cluster: actors that hold the networks take films one batch after the other."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from tccp.cluster import data_settings, dataset, num_nodes, ray_cluster, worker_errors
from tccp.errors import TccpError
from tccp.files import Folder, check_shared
from tccp.inference.film import FilmRequest
from tccp.inference.film_generation import FilmOutcome, check_requests


class _Maker:
    """An actor: the networks, loaded once."""

    def __init__(self, weights: str, device: str, lip_weights: Path | None, batch: int):
        from tccp.inference.pipeline import Pipeline

        self._pipeline = Pipeline.from_pretrained(weights, device=device, lip_weights=lip_weights)
        self._batch = batch

    def __call__(self, rows: pa.Table) -> pa.Table:
        from tccp.inference.pipeline import generate_films

        requests = [pickle.loads(content) for content in rows["request"].to_pylist()]
        by_out = {request.out: request for request in requests}
        outcomes = []
        for outcome in generate_films(requests, pipeline=self._pipeline, batch=self._batch):
            own = by_out[outcome.request.out]  # as it was given, before the pipeline's options were filled in
            outcomes.append(pickle.dumps(FilmOutcome(own, outcome.result, outcome.error)))
        return pa.table({"outcome": pa.array(outcomes, pa.binary())})


def generate_films_on_ray(
    requests: Sequence[FilmRequest],
    out: Path | str,
    *,
    weights: str,
    device: str = "auto",
    lip_weights: Path | None = None,
    batch: int = 4,
    workers: int | None = None,
) -> Iterator[FilmOutcome]:
    """As `tccp.generate_films`, on the cluster of RAY_ADDRESS or on a new Ray of this machine.

    out: folder of the films; on several machines a file:// URL, which says that all of them share it. workers: actors;
    None: one for each GPU, or with CPUs one for each two of them. A film is the same as that of `tccp generate` with
    `batch` 1, and up to rounding with others. Films of an actor that dies are made again by another one.
    Raises TccpError if two requests write the same file, or if the machines do not share the folder.
    """
    check_requests(requests)
    with ray_cluster(dashboard=False, worker_logs=False, extra="serve"):
        import ray
        import ray.data

        check_shared("--out", Folder(str(out)), num_nodes())
        resources = ray.cluster_resources()
        gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
        on_gpu = gpus > 0 if device == "auto" else device != "cpu"
        if on_gpu and not gpus:
            raise TccpError(f"--device {device}: the cluster has no GPU; give --device cpu")
        size = workers or (gpus if on_gpu else max(1, cpus // 2))
        size = min(size, max(1, -(-len(requests) // batch)))
        rows = pa.table({"request": pa.array([pickle.dumps(request) for request in requests], pa.binary())})
        with data_settings(in_order=False), worker_errors():
            made = dataset(rows).map_batches(
                _Maker,
                fn_constructor_args=(weights, "cuda" if on_gpu else "cpu", lip_weights, batch),
                compute=ray.data.ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=1),
                num_cpus=0.5,
                num_gpus=1 if on_gpu else 0,
                batch_size=batch,
                batch_format="pyarrow",
            )
            for row in made.iter_rows():
                yield _outcome(row)


def _outcome(row: dict[str, Any]) -> FilmOutcome:
    outcome: FilmOutcome = pickle.loads(row["outcome"])
    return outcome
