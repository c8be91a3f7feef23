"""The driver: it trains components one after the other, each on the whole cluster, into a pipeline folder in storage.

<storage>/runs/<name>/<component>/    checkpoints, settings, metrics, result
<storage>/runs/<name>/pipeline/       components that have been trained or copied so far
<storage>/latents, <storage>/lips     shared by all runs on the same clips and auto-encoder
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from tccp.clips.clip_table import ClipTable
from tccp.clips.lip_table import LIPS
from tccp.cluster import max_resources, num_nodes, ray_cluster, worker_errors
from tccp.config import Settings, VariantName, settings_to_json
from tccp.errors import TccpError
from tccp.files import Folder, check_shared
from tccp.inference.conditioning import training_conditions
from tccp.inference.manifest import COMPONENTS, MANIFEST, TOY_WEIGHTS, check_settings, has_component
from tccp.inference.pipeline_folder import export, restore_replaced, save_component
from tccp.models.autoencoder import PictureAutoencoder
from tccp.models.variants import FIRST_OF, VARIANTS
from tccp.progress import progress
from tccp.training.fit_autoencoder import fit_latent_statistics, pretrained_autoencoder
from tccp.training.fit_variant import needs_first
from tccp.training.latent_cache import LatentCache
from tccp.training.launcher.checkpoint_record import newest_step, remove_unfinished
from tccp.training.launcher.encode import ClipEncoder, encoded
from tccp.training.launcher.job import AUTOENCODER, Allocation, ComponentJob, Latents
from tccp.training.launcher.rank import EXPORT, Validate
from tccp.training.launcher.request import NO_TRACKING, RUN_RECORD, Request, check_fit, check_request, resumed_parallel
from tccp.training.launcher.reuse import has_matching_settings, reusable_components
from tccp.training.launcher.sizing import allocate
from tccp.training.launcher.tracked_run import run_id_of, start_tracking
from tccp.training.launcher.worker_group import fit_on_cluster, repeat_after_outages
from tccp.training.lip_folds import LipPlace, lip_place, liplet_folder, open_lip_sources, train_liplets_once
from tccp.training.recipe import recipe
from tccp.training.run_folder import SETTINGS_FILE, changes_of, run_record, take_settings
from tccp.training.set_aside import say_set_aside
from tccp.training.tracking import Tracker, tracking_place

logger = logging.getLogger("tccp.training")

PIPELINE = "pipeline"
NEWEST = "newest"
"""Alias of the registered pipeline's version that was trained last; MLflow reserves `latest`."""

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class LaunchResult:
    """What a launch has done.

    pipeline: path or URL. trained, reused: components that were trained and copied; those that existed are in neither.
    """

    pipeline: str
    trained: tuple[str, ...]
    reused: tuple[str, ...]
    workers: int


def launch(
    request: Request, validate: Validate | None = None, note: Callable[[str], None] = logger.info
) -> LaunchResult:
    """Trains the requested components, and those that they need, on a Ray cluster.

    The cluster is that of RAY_ADDRESS or of the job, else a new one on this machine. validate: measures networks during
    training; it is pickled and runs on rank 0. note: called with lines that say what is done.
    Raises TccpError for a user's mistake, before any training if that can be known; StorageError if the storage fails
    for longer than all attempts take. The same request with `resume` continues.
    """
    check_request(request)
    with ray_cluster():
        allocation = allocate(
            max_resources(),
            workers=request.workers,
            device=request.device,
            parallel=resumed_parallel(request),
            readers=request.readers,
            timeout_s=request.timeout_s,
            max_failures=request.max_failures,
            compiled=request.compiled,
            keep=request.keep,
            keep_best=request.keep_best,
            validate_every=request.validate_every,
        )
        check_fit(request, allocation)
        with ExitStack() as stack:
            return _Launch(request, allocation, validate, note, stack).run()


class _Launch:
    def __init__(
        self,
        request: Request,
        allocation: Allocation,
        validate: Validate | None,
        note: Callable[[str], None],
        stack: ExitStack,
    ):
        self.request, self.allocation, self.validate, self.note = request, allocation, validate, note
        self.id = uuid.uuid4().hex
        self.settings = request.settings
        self.folder = request.folder
        self.place = request.table() if request.table else None
        if self.place is not None:
            check_shared("clip table", Folder(self.place), num_nodes())
        self._table = stack.enter_context(ClipTable(self.place)) if self.place else None
        ids = self._table.ids if self._table else []
        self.data_hash = hashlib.blake2b(" ".join(ids).encode(), digest_size=8).hexdigest()
        self.tracking: str | None = None
        if request.tracking != NO_TRACKING:
            self.tracking = tracking_place(request.tracking, request.storage, num_nodes())
        self.remote = Folder(self.folder.path(PIPELINE))
        self.pipeline = stack.enter_context(self.remote.as_local(writable=True))
        restore_replaced(self.pipeline)
        self.reused: list[str] = []
        self.trained: list[str] = []

    @property
    def _zero_stage(self) -> int:
        return self.allocation.parallel.stage(self.allocation.workers)

    @property
    def table(self) -> ClipTable:
        if self._table is None:
            raise TccpError(
                "auto-encoder and lips cannot be trained straight from film: name a pipeline that has them (--stage1, "
                "--autoencoder), or preprocess the films and give --data"
            )
        return self._table

    @property
    def table_place(self) -> str:
        assert self.table and self.place
        return self.place

    def run(self) -> LaunchResult:
        check_settings(self.pipeline, self.settings)
        groups = recipe(self.settings, self._needed())
        if not self.folder.exists(RUN_RECORD):  # not earlier: a request that was refused may be repeated
            record = {**json.loads(run_record()), "zero_stage": self._zero_stage}
            self.folder.write(RUN_RECORD, (json.dumps(record, indent=1) + "\n").encode())
        for group in groups:
            # In this order, because sequence networks are validated on frames of their first-frame networks.
            for name in sorted(group, key=COMPONENTS.index):
                self._train(name)
        if self.request.register_as:
            self._register(self.request.register_as)
        return LaunchResult(str(self.remote), tuple(self.trained), tuple(self.reused), self.allocation.workers)

    def _needed(self) -> list[str]:
        """Components to train: the requested ones, and those that they need and that cannot be copied."""
        asked = [name for name in self.request.components if not has_component(self.pipeline, name)]
        self._reuse(asked)
        networks = [name for name in asked if name in VARIANTS]
        needed = [AUTOENCODER]
        if any("lips" in training_conditions(VARIANTS[name], self.settings) for name in networks):
            needed.append(LIPS)
        needed += [FIRST_OF[name] for name in networks if needs_first(name, self.settings)]
        missing = [name for name in needed if name not in asked and not has_component(self.pipeline, name)]
        if LIPS in needed and LIPS not in self._present() and self.settings.lips.source == "wav2lip":
            open_lip_sources(self.settings.lips, self.request.lip_weights, "cpu")  # raises now, not after days
        if missing:
            self.note(f"missing, so trained first: {', '.join(missing)}")
        return [*missing, *asked]

    def _reuse(self, asked: Sequence[str]) -> None:
        """Copies components that are missing and not requested from other pipelines, such as the packaged weights."""
        request = self.request
        for folder in (*request.require_from, *request.reuse_from):
            with folder.as_local() as place:
                if folder in request.require_from:
                    check_settings(place, self.settings)
                elif not has_matching_settings(place, self.settings):
                    continue
                names = reusable_components(place, self.pipeline, self.settings, asked)
                if names:
                    export(place, self.pipeline, names)
                    self._push()
                    self.reused += names
                    self.note(f"copied from {_name_of(folder)}: {', '.join(names)}")

    def _present(self) -> list[str]:
        return [name for name in COMPONENTS if has_component(self.pipeline, name)]

    def _push(self, *names: str) -> None:
        """Uploads components of the pipeline (default: all), and last its manifest, if the storage is at a URL."""
        if self.remote.local is not None:
            return
        folders = (path.name for path in self.pipeline.iterdir() if path.is_dir() and not path.name.startswith("."))
        for name in names or sorted(folders):
            self.remote.upload(self.pipeline / name, name)
        self.remote.write(MANIFEST, (self.pipeline / MANIFEST).read_bytes())

    def _tried(self, action: Callable[[], _Result]) -> _Result:
        return repeat_after_outages(action, self.allocation.max_failures)

    def _train(self, name: str) -> None:
        if name == LIPS:
            self._tried(self._train_lips)
        elif name == AUTOENCODER:
            self._train_autoencoder()
        else:
            self._train_variant(name)  # type: ignore[arg-type]
        self._tried(lambda: self._push(name))
        self.trained.append(name)
        self.note(f"trained {name}: {self.remote}")

    def _job(self, name: str, **more: Any) -> ComponentJob:
        run = Folder(self.folder.path(name))
        if run.exists(SETTINGS_FILE):
            remove_unfinished(run)  # before the step is noted at which a change begins
            take_settings(run, self.folder, self.settings, name, newest_step(run))
        else:
            run.write(SETTINGS_FILE, settings_to_json(self.settings).encode())
        latents: Latents = self.request.latents if self.place else "in-step"
        where = (self.place, self.remote, run)
        return ComponentJob(name, self.settings, *where, self.allocation, self.id, latents, **more)

    def _fit(self, job: ComponentJob, validate: Validate | None) -> dict[str, Any]:
        tracked = None
        if self.tracking is not None:
            uri = self.tracking
            footage = self._footage()
            tracked = self._tried(lambda: start_tracking(uri, self.request, job, self._zero_stage, footage))
        return fit_on_cluster(job, validate, tracked)

    def _train_autoencoder(self) -> None:
        if self.request.pretrained_autoencoder is not None:
            pretrained = pretrained_autoencoder(self.settings, self.request.pretrained_autoencoder)
            self._tried(lambda: self._save_autoencoder(pretrained, {"steps": 0}))
            return
        job = self._tried(lambda: self._job(AUTOENCODER))
        record = {"steps": self.settings.autoencoder.max_steps, **self._fit(job, None)}

        def save() -> None:
            with job.run.as_local(EXPORT) as place:
                self._save_autoencoder(PictureAutoencoder.load(place), record)

        self._tried(save)

    def _save_autoencoder(self, autoencoder: PictureAutoencoder, record: dict[str, Any]) -> None:
        fit_latent_statistics(autoencoder.to("cpu").eval(), self.table, self.settings)
        self._save(AUTOENCODER, autoencoder.save, record)

    def _train_lips(self) -> None:
        lips = self.settings.lips
        if lips.source == "liplet":
            name = liplet_folder(self.data_hash, self.settings.seed, lips)
            place = LipPlace(lips, Folder(self.request.storage.path(name)), to_train=True)
            seconds = self._liplets(place)
            record: dict[str, Any] = {"steps": lips.liplet_steps, "seconds": round(seconds, 1)}
        else:
            found = lip_place(
                self.settings, self.pipeline, self.data_hash, self.request.storage, self.request.lip_weights
            )
            if found is None:
                raise TccpError("lips.source is none: there is no lip source to train")
            place, record = found, {"steps": 0}
        self._save(LIPS, place.open().for_new_footage.save, record)

    def _liplets(self, place: LipPlace) -> float:
        import ray

        gpus = 1 if self.allocation.use_gpu else 0
        task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=3)(_liplet_task)
        with worker_errors():
            return float(ray.get(task.remote(self.table_place, self.settings, place, gpus)))

    def _train_variant(self, name: VariantName) -> None:
        job = self._tried(lambda: self._variant_job(name))
        job = replace(job, control_from=self.request.control_from)
        if self.validate and self.allocation.validate_every and FIRST_OF.get(name, AUTOENCODER) not in self._present():
            self.note(f"{name} is not validated: it needs frames of {FIRST_OF[name]}, which does not exist yet")
        record = {
            "steps": self.settings.for_variant(name).training.max_steps,
            **self._fit(job, self.validate),
        }

        def save() -> None:
            with job.run.as_local(EXPORT) as place:
                self._save(name, lambda target: shutil.copytree(place, target, dirs_exist_ok=True), record)

        self._tried(save)

    def _variant_job(self, name: VariantName) -> ComponentJob:
        """The job of a variant, once the latents and lips that it reads from storage are complete."""
        if self.request.films is not None:
            held = self.allocation.workers * self.allocation.cpus_per_worker
            return self._job(name, films=self.request.films(name, self.pipeline, held))
        cache = self._encoder(name).cache("cpu")
        ahead = self.request.latents == "ahead"
        if ahead or cache.lips is not None:
            self._encode(cache, name, lips_alone=not ahead)
        return self._job(name, files=cache.files if ahead else None, lips=cache.files.lips)

    def _encoder(self, name: VariantName) -> ClipEncoder:
        lips = None
        if "lips" in training_conditions(VARIANTS[name], self.settings):
            lips = lip_place(
                self.settings, self.pipeline, self.data_hash, self.request.storage, self.request.lip_weights
            )
            if lips is not None and lips.to_train:
                self._liplets(lips)
            elif lips is not None and lips.folder.local is not None and self.remote.local is None:
                # Other machines do not have the driver's copy.
                lips = replace(lips, folder=self.remote, in_pipeline=True)
        return ClipEncoder(self.request.storage, self.table_place, self.settings, self.remote, lips, name)

    def _encode(self, cache: LatentCache, name: VariantName, lips_alone: bool) -> None:
        """Encodes the clips that are missing, on the whole cluster: no rank is at work now."""
        missing = cache.missing_clips(lips_alone)
        if not missing:
            return
        with progress() as bar, worker_errors():
            task = bar.add_task("encoding clips", total=len(missing))
            for clip in encoded(self._encoder(name), missing, lips_alone, self.allocation):
                if clip["damage"] is not None:
                    say_set_aside(f"clip {clip['clip_id']}", clip["damage"])
                bar.advance(task)

    def _save(self, name: str, write: Any, record: dict[str, Any]) -> None:
        provenance = {
            **record,
            **self._footage(),
            "seed": self.settings.seed,
            "device": "cuda" if self.allocation.use_gpu else "cpu",
            "zero_stage": self._zero_stage,
            "machine": f"{platform.system()} {platform.machine()}, torch {torch.__version__}, Ray",
            "command": self.request.command,
            **({"changes": changes} if (changes := changes_of(self.folder, name)) else {}),
        }
        save_component(self.pipeline, name, self.settings, write, provenance)

    def _footage(self) -> dict[str, object]:
        if self._table is None:
            return {"footage": "straight from film"}
        frames = sum(self._table.num_frames.values())
        return {"clips": len(self._table), "frames": frames, "data_hash": self.data_hash}

    def _register(self, model: str) -> None:
        """Registers the whole pipeline with MLflow, under the run of the last requested component that has one."""
        for name in reversed(self.request.components):
            run_id = run_id_of(Folder(self.folder.path(name)))
            if self.tracking is not None and run_id is not None:
                done = Tracker(self.tracking, run_id).register(self.pipeline, model, NEWEST)
                text = f"registered with MLflow as {model}, alias {NEWEST}"
                self.note(text if done else f"not {text}: MLflow refused it; the pipeline is complete: {self.remote}")
                return
        self.note(f"not registered with MLflow as {model}: it has no run of {' or '.join(self.request.components)}")


def _name_of(folder: Folder) -> str:
    return "the packaged weights" if folder.local == TOY_WEIGHTS else str(folder)


def _liplet_task(table: str, settings: Settings, place: LipPlace, gpus: int) -> float:
    with ClipTable(table, keep=64) as opened, _uploaded(place.folder) as out:
        return train_liplets_once(opened, settings, out, "cuda" if gpus else "cpu")


@contextmanager
def _uploaded(folder: Folder) -> Iterator[Path]:
    """A folder of this machine with the content of a folder anywhere; what is written to it is uploaded afterwards."""
    with folder.as_local(writable=True) as place:
        yield place
        if folder.local is None:
            folder.upload(place, "")
