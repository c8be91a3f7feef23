"""What runs on every training worker: one rank's part in the training of a component."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tccp.clips.clip_table import ClipTable
from tccp.config import Settings, TrainingSettings, VariantName
from tccp.errors import TccpError
from tccp.files import storage_retries, sync_tree
from tccp.inference.pipeline_folder import load_autoencoder, load_network
from tccp.models.autoencoder import PictureAutoencoder
from tccp.models.mvcontrolnet import MVControlNet
from tccp.models.variants import FIRST_OF
from tccp.training.checkpoint_files import PROGRESS_FILE, write_contents
from tccp.training.engine import DeepSpeedEngine, Engine, with_weights
from tccp.training.fit_autoencoder import autoencoder_training, fit_autoencoder
from tccp.training.fit_variant import needs_first, train_variant
from tccp.training.latent_cache import Unplanned, Windows
from tccp.training.launcher.checkpoint_record import copy_record
from tccp.training.launcher.film_order import FilmOrder
from tccp.training.launcher.ingest import PictureReader, Reader, WindowReader, micro_batches
from tccp.training.launcher.job import AUTOENCODER, ComponentJob
from tccp.training.launcher.sizing import readers_now
from tccp.training.launcher.streams import FilmStream, StreamedPictures, StreamedWindows
from tccp.training.loop import FitResult, NonFiniteLoss
from tccp.training.run_folder import METRICS_FILE, append_metrics, cut_metrics
from tccp.training.tracking import Tracker
from tccp.training.window_files import PictureFiles

EXPORT = "export"
MISTAKE = "mistake-{rank}.json"
UNVALIDATED_SCORE = -1e30
"""Score of a checkpoint that was not validated. It is finite, because Ray writes scores as JSON."""
RESULT = "result.json"
PREEMPTION_CHECK_S = 2.0
"""Seconds between ranks' questions whether a machine will be taken away soon. Ray itself looks every five seconds."""

Validate = Callable[[ComponentJob, int, MVControlNet, Path], Mapping[str, float]]
"""validate(job, step, network, folder): returns measurements, and writes pictures or films to the folder."""


class RayRun:
    """`tccp.training.run_folder.Run` on a rank of Ray Train. Checkpoints are uploaded while training continues."""

    def __init__(self, job: ComponentJob, device: torch.device):
        import ray.train

        context = ray.train.get_context()
        self.rank, self.num_ranks = context.get_world_rank(), context.get_world_size()
        self.job, self.device = job, device
        self._open = ExitStack()
        self._folder = Path(self._open.enter_context(tempfile.TemporaryDirectory(prefix="tccp-run-")))
        self._start = self._downloaded(ray.train.get_checkpoint())
        self._latest = None if self._start is None else _steps(self._start)
        self._preempted = False
        self.windows_set_aside = 0
        self._check_preemption, self._checked_at = False, 0.0
        self.tracker: Tracker | None = None
        if self.rank == 0 and job.tracking_uri and job.tracking_run:
            self.tracker = Tracker(job.tracking_uri, job.tracking_run)

    def _downloaded(self, checkpoint: Any) -> Path | None:
        return None if checkpoint is None else Path(self._open.enter_context(checkpoint.as_directory()))

    def close(self) -> None:
        self._open.close()

    @property
    def metrics(self) -> Path:
        return self._folder / METRICS_FILE

    def newest(self) -> Path | None:
        return self._start

    def latest(self) -> int | None:
        return self._latest

    @contextmanager
    def saving(self, step: int, metrics: Mapping[str, float | int]) -> Iterator[Path]:
        import ray.train

        folder = Path(tempfile.mkdtemp(prefix="tccp-checkpoint-"))  # Ray removes it after the upload
        try:
            yield folder
            if self.rank == 0:
                if self.metrics.exists():
                    shutil.copyfile(self.metrics, folder / METRICS_FILE)
                copy_record(self.job.run)
            write_contents(folder, self.rank, self.num_ranks)
            mode = ray.train.CheckpointUploadMode
            # Each attempt uses its own name, so that files of an attempt that died are never mixed in.
            ray.train.report(
                {"steps": step, **({"score": UNVALIDATED_SCORE} if self.job.allocation.keep_best else {}), **metrics},
                checkpoint=ray.train.Checkpoint.from_directory(folder),
                checkpoint_dir_name=f"step-{step:07d}-{uuid.uuid4().hex[:6]}",
                checkpoint_upload_mode=mode.SYNC if self._preempted else mode.ASYNC,
                delete_local_checkpoint_after_upload=True,
                checkpoint_upload_fn=None if self.job.run.local is None else self._copied_to_disk,
            )
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self._latest = step
        if self.tracker:
            # `record` has noted the loss already.
            self.tracker.metrics(step, {name: value for name, value in metrics.items() if name != "loss"})

    def _copied_to_disk(self, checkpoint: Any, name: str) -> Any:
        """Copies a checkpoint into a run's folder on this machine, and waits until the disk has it. Ray would not."""
        import ray.train

        copy = ray.train.get_context().get_storage().persist_current_checkpoint(checkpoint, name)
        sync_tree(Path(copy.path))
        return copy

    def wait_for_checkpoints(self) -> None:
        """Returns when all checkpoints are uploaded and in Ray's record."""
        import ray.train

        ray.train.get_all_reported_checkpoints(ray.train.CheckpointConsistencyMode.COMMITTED)

    def asked_to_save(self) -> bool:
        import ray.train

        if not self._check_preemption:
            return False
        self._checked_at = time.monotonic()
        notice = ray.train.get_preemption_info()  # all ranks wait for each other in it
        first, self._preempted = notice is not None and not self._preempted, notice is not None
        return first

    def mean(self, value: Tensor) -> float:
        # Rank 0 sends along whether it is time to check for preemption, so that all ranks check at the same steps.
        due = float(self.rank == 0 and time.monotonic() - self._checked_at >= PREEMPTION_CHECK_S)
        shared = torch.stack([value.to(self.device), torch.tensor(due, device=self.device)]) / self.num_ranks
        torch.distributed.all_reduce(shared)
        self._check_preemption = bool(shared[1] > 0)
        return float(shared[0])

    def record(self, values: Mapping[str, float | int]) -> None:
        if self.rank == 0:
            append_metrics(self.metrics, values)
            if self.tracker:
                self.tracker.metrics(int(values["step"]), self._figures(values))

    def _figures(self, values: Mapping[str, float | int]) -> dict[str, float | int]:
        figures = {name: value for name, value in values.items() if name not in ("step", "seconds")}
        if self.job.allocation.use_gpu:
            figures["gpu_hours"] = values["seconds"] * self.num_ranks / 3600
        return figures

    def cut_metrics_after(self, done: int) -> None:
        if self.rank == 0 and self._start is not None and (self._start / METRICS_FILE).exists():
            shutil.copyfile(self._start / METRICS_FILE, self.metrics)
            cut_metrics(self.metrics, done)


def _steps(checkpoint: Path) -> int:
    return int(json.loads((checkpoint / PROGRESS_FILE).read_text())["steps"])


def train(job: ComponentJob, validate: Validate | None) -> None:
    """One rank's part, from the newest checkpoint if there is one.

    A user's mistake would happen again at every attempt, so it is recorded, and the next attempt ends at once. After a
    loss that is not finite all ranks return, because Ray completes pending uploads of checkpoints only then. Any other
    error, StorageError among them, ends the attempt, and Ray Train starts the next one.
    """
    if mistake_of(job) is not None:
        return
    try:
        _train(job, validate)
    except TccpError as error:
        import ray.train

        rank = ray.train.get_context().get_world_rank()
        record = {"launch": job.launch_id, "message": str(error)}
        job.run.write(MISTAKE.format(rank=rank), (json.dumps(record) + "\n").encode())
        if not isinstance(error, NonFiniteLoss):
            raise


def mistake_of(job: ComponentJob) -> str | None:
    """The mistake that ended this launch of the training, if one did; if ranks recorded several, all of them."""
    records = []
    for rank in range(job.allocation.workers):
        if job.run.exists(MISTAKE.format(rank=rank)):
            records.append(json.loads(job.run.read(MISTAKE.format(rank=rank))))
    found = [str(record["message"]) for record in records if record["launch"] == job.launch_id]
    return "; ".join(dict.fromkeys(found)) or None


def _train(job: ComponentJob, validate: Validate | None) -> None:
    warnings.simplefilter("ignore", FutureWarning)  # of other packages; users cannot act on them
    # Else each rank logs each of its checkpoints and streams. Some of Ray Train's loggers are named by their files.
    for name in (
        "aiobotocore",
        "botocore",
        "ray.train",
        *(name for name in logging.root.manager.loggerDict if "/ray/train/" in name),
    ):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    device = _device(job)
    run = RayRun(job, device)
    try:
        started = 0 if run.newest() is None else _steps(run.newest())  # type: ignore[arg-type]
        if job.component == AUTOENCODER:
            autoencoder, result = fit_autoencoder(
                job.settings, _pictures(job, run, started), run, device=device, engine_of=_engine_of(job, run)
            )
            write = autoencoder.save if autoencoder is not None else None
        else:
            network, result = _train_variant(job, run, started, device, validate)
            write = network.save_pretrained if network is not None else None
        if write is not None:
            run.wait_for_checkpoints()  # else a resume after a loss in between would find a result without them
            _publish(job, run, write, result)
    finally:
        run.close()


def _device(job: ComponentJob) -> torch.device:
    if job.allocation.use_gpu:
        import ray.train.torch

        return ray.train.torch.get_device()
    torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
    return torch.device("cpu")


def _engine_of(job: ComponentJob, run: RayRun) -> Callable[[nn.Module, TrainingSettings], Engine]:
    def engine(module: nn.Module, training: TrainingSettings) -> Engine:
        return DeepSpeedEngine(module, training, job.allocation.parallel, resume_from=run.newest())

    return engine


def _stream(job: ComponentJob, reader: Reader, training: TrainingSettings, run: RayRun, started: int) -> Iterator[Any]:
    rows = training.batch_size // (training.accumulation * run.num_ranks)
    steps = range(started, training.max_steps)
    return micro_batches(reader, steps, rows, readers_now(job.allocation), job.allocation.timeout_s)


def _pictures(job: ComponentJob, run: RayRun, started: int) -> StreamedPictures:
    assert job.table is not None
    reader = PictureReader(job.table, job.settings, run.rank, run.num_ranks)
    training = autoencoder_training(job.settings)
    return StreamedPictures(_stream(job, reader, training, run, started), training.batch_size)


def _train_variant(
    job: ComponentJob, run: RayRun, started: int, device: torch.device, validate: Validate | None
) -> tuple[MVControlNet | None, FitResult]:
    name: VariantName = job.component  # type: ignore[assignment]
    settings = job.settings
    first = start_from = encoder = None
    if needs_first(name, settings):
        with job.pipeline.as_local() as place:
            first = load_network(place, FIRST_OF[name], device)
    if job.control_from is not None:
        with job.control_from.as_local() as place:
            start_from = load_network(place, name)
    if job.latents == "in-step":
        with job.pipeline.as_local() as place:
            encoder = load_autoencoder(place, device)
    windows = _windows(job, run, name, started, encoder)
    network, result = train_variant(
        name,
        settings,
        windows,
        run,
        first=first,
        start_from=start_from,
        device=device,
        engine_of=_engine_of(job, run),
        validate=_validation(job, run, settings, name, validate, started)
        if validate and job.allocation.validate_every
        else None,
        compiled=job.allocation.compiled,
    )
    own = windows.windows_set_aside if isinstance(windows, StreamedWindows) else 0
    run.windows_set_aside = round(run.mean(torch.tensor(float(own))) * run.num_ranks)
    return network, result


def _windows(
    job: ComponentJob, run: RayRun, name: VariantName, started: int, encoder: PictureAutoencoder | None
) -> Windows | Unplanned:
    settings, timeout_s = job.settings, job.allocation.timeout_s
    if job.films is not None:
        assert encoder is not None
        return FilmStream(_film_order(job, run, name, started), run.rank, settings, encoder, timeout_s)
    assert job.table is not None
    files = job.files or PictureFiles(settings, job.table, job.lips)
    reader = WindowReader(job.table, name, settings, files, run.rank, run.num_ranks)
    with ClipTable(job.table) as table:
        lengths = dict(table.num_frames)
    stream = _stream(job, reader, settings.for_variant(name).training, run, started)
    return StreamedWindows(stream, lengths, settings, encoder)


def _film_order(job: ComponentJob, run: RayRun, name: VariantName, started: int) -> Any:
    """The actor that all ranks take windows from. Rank 0 owns it, so it ends when the ranks end."""
    import ray
    from ray.train.collective import broadcast_from_rank_zero

    order = None
    if run.rank == 0:
        actor = ray.remote(FilmOrder).options(num_cpus=0, max_concurrency=run.num_ranks + 1)
        order = actor.remote(job.films, job.settings, name, run.num_ranks, started, job.run)
    return broadcast_from_rank_zero(order)


def validation_due(step: int, before: int, every: int, last: int) -> bool:
    """Whether to validate at the checkpoint at `step`: the last one, and the first after every `every` steps.

    before: step of the previous checkpoint.
    """
    return step == last or step // every > before // every


def _validation(
    job: ComponentJob, run: RayRun, settings: Settings, name: VariantName, validate: Validate, started: int
) -> Callable[[int, list[Tensor]], Mapping[str, float]]:
    every, last = job.allocation.validate_every, settings.for_variant(name).training.max_steps
    before = started  # step of the previous checkpoint

    def measured(step: int, weights: list[Tensor]) -> Mapping[str, float]:
        nonlocal before
        before, previous = step, before
        if not validation_due(step, previous, every, last):
            return {}
        with tempfile.TemporaryDirectory(prefix="tccp-validation-") as place:
            network = with_weights(MVControlNet.from_settings(settings, name), weights)
            figures = validate(job, step, network, Path(place))
            for path in sorted(Path(place).iterdir()):
                if run.tracker:
                    run.tracker.artifact(path, f"validation/step-{step:07d}")
            return figures

    return measured


def _publish(job: ComponentJob, run: RayRun, write: Callable[[Path], object], result: FitResult) -> None:
    """Writes the trained network to the run's folder, and last the record, which says that the rest is complete."""
    with tempfile.TemporaryDirectory(prefix="tccp-export-") as place:
        write(Path(place))
        job.run.upload(Path(place), EXPORT)
    if run.metrics.exists():
        job.run.write(METRICS_FILE, run.metrics.read_bytes())
    last = result.losses[-50:]
    record = {
        "seconds": result.seconds,
        "last_losses": float(f"{sum(last) / len(last):.5g}") if last else None,
        "workers": run.num_ranks,
        "storage_retries": storage_retries(),  # of rank 0
        "windows_set_aside": run.windows_set_aside,  # of all ranks, since the last start
        "ended": time.time(),
    }
    job.run.write(RESULT, (json.dumps(record) + "\n").encode())
