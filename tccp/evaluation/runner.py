"""`tccp evaluate roundtable`: distributes the work to processes and combines their results into one record.

The grouping of clips into shards depends only on the number of clips. The number of processes therefore affects the run
time but not the figures.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from jaxtyping import Float

from tccp.config import git_commit
from tccp.errors import TccpError
from tccp.evaluation.benchmark_clips import (
    COUNTERFACTUAL_FRAMES,
    DRIFT_FRAMES,
    HELD_OUT_FRAMES,
    clip_seeds,
    counterfactual_seeds,
)
from tccp.evaluation.face_probe import CANDIDATES, top1
from tccp.evaluation.figures import Drift, corr_loss, frechet_distance
from tccp.evaluation.methods import ABLATIONS, Models
from tccp.evaluation.predictors import fit_cues
from tccp.evaluation.score_table import POOLED_RESAMPLES, RESAMPLES, TARGETS, Pooled, compare, summarise
from tccp.evaluation.sheet import choose_clips, write_sheet
from tccp.evaluation.worker import (
    DRIFT_WINDOWS,
    HeldOutResult,
    ReferenceResult,
    Worker,
    counterfactual_work,
    drift_work,
    held_out_work,
    reference_work,
)
from tccp.files import check_outputs, check_writable
from tccp.inference.manifest import pipeline_files, read_manifest, read_settings
from tccp.models.variants import VARIANTS
from tccp.processes import end_with_parent, forking_context
from tccp.progress import progress

_SHARD_CLIPS, _DRIFT_SHARD_CLIPS, _COUNTERFACTUAL_SHARD_CLIPS = 16, 6, 4
_POLL_S = 0.5


@dataclass(frozen=True)
class Extent:
    """Size of the benchmark: numbers of clips per purpose (`benchmark_clips.Purpose`), and frames per clip."""

    clips: int = 128
    drift: int = 12
    counterfactual: int = 32
    prior: int = 600
    frames: int = HELD_OUT_FRAMES
    drift_frames: int = DRIFT_FRAMES

    def __post_init__(self) -> None:
        if self.clips < 2:
            raise TccpError(f"--clips {self.clips} is too small: give at least 2, for the wrong-clip control")


FULL = Extent()
QUICK = Extent(clips=12, drift=3, counterfactual=8, prior=120, drift_frames=71)
"""A tenth of the clips, and chains of ten windows instead of fifty."""


def evaluate_roundtable(
    weights: Path,
    ablations: Path | None = None,
    extent: Extent = FULL,
    *,
    jobs: int = 1,
    sheet: Path | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Measures a pipeline folder on RoundTable clips unseen in training. Returns the record that `--json` prints.

    ablations: folder with pipelines no_lip/, one_stage/ and context_blind/, which hold only the components that differ.
    Rows without networks are null, and `missing` gives the reason. jobs: processes of one thread each. sheet: path of a
    PNG of five clips.
    Raises TccpError if weights are missing or do not match, a number is out of range, or the `evaluate` extra is
    missing.
    """
    if jobs < 1:
        raise TccpError(f"--jobs {jobs} is too small: give at least 1")
    if sheet is not None:
        kept = [] if ablations is None else [pipeline_files(ablations / name) for name in ABLATIONS]
        read = {"--weights": pipeline_files(weights), "--ablations": itertools.chain.from_iterable(kept)}
        check_outputs({"--sheet": sheet}, read)
        check_writable("--sheet", sheet)
    if absent := [name for name in ("skimage", "sklearn") if importlib.util.find_spec(name) is None]:
        raise TccpError(f"{absent[0]} is not installed: pip install -c constraints.txt -e '.[evaluate]'")
    started, commit = time.monotonic(), git_commit()
    models = Models.load(weights, ablations, device)
    with progress() as bar:
        task = bar.add_task("evaluating", total=round(_all_work(models, extent)))
        with _work(models, (weights, ablations, device), jobs, lambda done: bar.advance(task, float(done))) as work:
            drift = work.submit(
                Worker.drift, _shards(clip_seeds("drift", extent.drift), _DRIFT_SHARD_CLIPS), extent.drift_frames
            )
            counterfactual_shards = _shards(counterfactual_seeds(extent.counterfactual), _COUNTERFACTUAL_SHARD_CLIPS)
            counterfactual = work.submit(Worker.counterfactual, counterfactual_shards)
            reference_shards = _shards(clip_seeds("reference", extent.clips), _SHARD_CLIPS)
            reference = work.submit(Worker.reference, reference_shards, extent.frames)
            forests = fit_cues(extent.prior, extent.frames, work.poll)
            numbered = _shards(list(enumerate(clip_seeds("held_out", extent.clips))), _SHARD_CLIPS)
            on_sheet = choose_clips(extent.clips) if sheet else []
            held_out = work.submit(Worker.held_out, numbered, extent.frames, forests, on_sheet)
            measured = Measurements(*(work.collect(part) for part in (held_out, reference, drift, counterfactual)))
    if sheet is not None:
        write_sheet(sheet, [clip.sheet for clip in measured.held_out if clip.sheet is not None])
    samples, pooled = measured.samples(), measured.pooled()
    rows, differences = summarise(samples, pooled), compare(samples, pooled)
    return {
        "benchmark": "roundtable",
        "clips": extent.clips,
        "frames": extent.frames,
        "seconds": round(time.monotonic() - started, 1),
        "git_commit": commit,
        "weights": _weights_summary(weights),
        "ablations": {name: _weights_summary(ablations / name) for name in models.ablations} if ablations else {},
        "counts": {
            "drift_clips": extent.drift,
            "drift_frames": extent.drift_frames,
            "counterfactual_clips": sum(map(len, counterfactual_shards)),
            "counterfactual_frames": COUNTERFACTUAL_FRAMES,
            "reference_clips": extent.clips,
            "prior_clips": extent.prior,
            "identity_candidates": min(CANDIDATES, 2 * extent.clips),
            "resamples": RESAMPLES,
            "resamples_pooled": POOLED_RESAMPLES,
            "jobs": jobs,
        },
        "rows": rows,
        "differences": differences,
        "targets": [target.record(rows, differences) for target in TARGETS],
        "missing": dict(models.missing),
    }


def _weights_summary(folder: Path) -> dict[str, Any]:
    """Identifies a pipeline in the record: its main settings, and the provenance of each component."""
    manifest = read_manifest(folder)
    keys = ("git_commit", "steps", "seconds", "seed", "clips")
    components = {
        name: {key: component["provenance"][key] for key in keys if key in component.get("provenance", {})}
        for name, component in manifest["components"].items()
    }
    settings = {key: manifest["settings"].get(key) for key in ("preset", "picture_px", "window")}
    all_settings = read_settings(folder)
    trained = [name for name in VARIANTS if name in components]
    settings["sampling"] = {name: all_settings.for_variant(name).sampling.model_dump(mode="json") for name in trained}
    return {"folder": folder.resolve().name, "settings": settings, "components": components}


def _all_work(models: Models, extent: Extent) -> float:
    """The total for the progress bar, in the unit of `Worker.on_work`."""
    return (
        extent.clips * extent.frames * (held_out_work(models) + reference_work())
        + extent.drift * extent.drift_frames * drift_work(models)
        + extent.counterfactual * counterfactual_work(models)
    )


def _shards(items: Sequence[Any], size: int) -> list[list[Any]]:
    """Splits items, in order, into shards of nearly equal length, at most `size`.

    Makes at least two shards from four or more items, so that two processes can share the work. No shard has a single
    item unless it is the only item: the wrong-clip control needs another clip in its shard.
    """
    count = max(math.ceil(len(items) / size), min(2, len(items) // 2), 1)
    edges = np.linspace(0, len(items), count + 1).round().astype(int)
    return [list(items[a:b]) for a, b in itertools.pairwise(edges) if b > a]


@dataclass(frozen=True)
class Measurements:
    """The results of all processes, in the order of the clips."""

    held_out: list[HeldOutResult]
    reference: list[ReferenceResult]
    drift: list[dict[str, Drift]]
    counterfactual: list[dict[str, dict[str, float]]]

    def samples(self) -> dict[str, dict[str, Float[np.ndarray, " n"]]]:
        """Figures per clip: row -> figure -> one value per clip."""
        samples: dict[str, dict[str, np.ndarray]] = {}
        per_clip: list[list[dict[str, dict[str, float]]]] = [
            [{row: result.figures for row, result in clip.rows.items()} for clip in self.held_out],
            [{row: drift.figures for row, drift in clip.items()} for clip in self.drift],
            self.counterfactual,
        ]
        for clips in filter(None, per_clip):
            for row, figures in clips[0].items():
                for name in figures:
                    samples.setdefault(row, {})[name] = np.array([clip[row][name] for clip in clips], np.float64)
        for row in self._rows_with_faces():
            samples.setdefault(row, {})["identity_top1"] = self._identity_top1(row)
        return samples

    def _rows_with_faces(self) -> list[str]:
        return [row for row, result in self.held_out[0].rows.items() if result.identity is not None]

    def _identity_top1(self, row: str) -> Float[np.ndarray, " n"]:
        """Share of frames, per clip, in which the probe identifies the talker among 16 candidates.

        Candidates: the clip's talker, then those of the following clips, then those of reference clips.
        """
        people = np.stack([clip.identity for clip in self.held_out])
        others = [clip.identity for clip in self.reference]
        shares = []
        for k, clip in enumerate(self.held_out):
            candidates = np.stack([*np.roll(people, -k, axis=0), *others])[:CANDIDATES]
            identity = clip.rows[row].identity
            assert identity is not None
            shares.append(top1(identity, candidates, 0))
        return np.array(shares)

    def pooled(self) -> dict[str, dict[str, Pooled]]:
        """Figures over all clips together: Frechet distances, and the loss of correlation in long chains."""
        pooled: dict[str, dict[str, Pooled]] = {}
        reference = np.concatenate([clip.features for clip in self.reference])
        for row in self._rows_with_faces():
            results = [clip.rows[row] for clip in self.held_out]
            features = np.stack([result.features for result in results if result.features is not None])

            def distance(clips: np.ndarray, features: np.ndarray = features) -> float:
                return frechet_distance(features[clips].reshape(-1, features.shape[-1]), reference)

            pooled[row] = {"frechet": Pooled.of(len(features), distance)}
        for row in self.drift[0] if self.drift else ():
            drifts = [clip[row] for clip in self.drift]
            for k in DRIFT_WINDOWS:
                for ending in ("", "_face"):
                    openings = [drift.mouth_face[k] if ending else drift.mouth[k] for drift in drifts]

                    def loss(clips: np.ndarray, openings: Sequence[np.ndarray] = openings) -> float:
                        return corr_loss([openings[clip] for clip in clips])

                    pooled.setdefault(row, {})[f"drift_{k}_corr{ending}"] = Pooled.of(len(drifts), loss)
        return pooled


# -- processes --------------------------------------------------------------------------------------------------------


class _ThisProcess(Executor):
    """An executor that runs every task immediately, in this process."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


@dataclass(frozen=True)
class _Work:
    """Submits shards to the executor's processes, which report the work they have done through `queue`."""

    executor: Executor
    queue: SimpleQueue[float]
    on_work: Callable[[float], object]

    def submit(self, task: Callable[..., list[Any]], shards: Sequence[Any], *arguments: Any) -> list[Future[list[Any]]]:
        return [self.executor.submit(_perform, task, shard, *arguments) for shard in shards]

    def poll(self) -> None:
        while not self.queue.empty():
            self.on_work(self.queue.get())

    def collect(self, submitted: Sequence[Future[list[Any]]]) -> list[Any]:
        """Waits for all shards and returns their results in order. Re-raises an error of any process."""
        pending = set(submitted)
        while pending:
            done, pending = wait(pending, _POLL_S, FIRST_EXCEPTION)
            self.poll()
            for future in done:
                future.result()
        return [result for future in submitted for result in future.result()]


@contextmanager
def _work(
    models: Models, arguments: tuple[Path, Path | None, str], jobs: int, on_work: Callable[[float], object]
) -> Iterator[_Work]:
    context = forking_context(__name__)
    queue = context.SimpleQueue()
    if jobs == 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as in the processes of a pool: more threads would round sums differently
        _process.worker = Worker(models, on_work)
        try:
            yield _Work(_ThisProcess(), queue, on_work)
        finally:
            _process.worker = None
            torch.set_num_threads(threads)
        return
    with ProcessPoolExecutor(jobs, context, _start_process, (queue, *arguments)) as pool:
        try:
            yield _Work(pool, queue, on_work)
        except BrokenProcessPool:
            raise TccpError("an evaluation process was killed, perhaps because memory ran out: "
                            f"give fewer than --jobs {jobs}") from None  # fmt: skip
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


class _Process:
    worker: Worker | None = None


_process = _Process()
"""The worker of this process, set when the process starts."""


def _start_process(queue: SimpleQueue[float], weights: Path, ablations: Path | None, device: str) -> None:
    end_with_parent()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    _process.worker = Worker(Models.load(weights, ablations, device), queue.put)


def _perform(task: Callable[..., list[Any]], shard: Any, *arguments: Any) -> list[Any]:
    assert _process.worker is not None
    return task(_process.worker, shard, *arguments)
