"""The driver: components one after the other, each a training on the cluster, into a pipeline folder in storage.

<storage>/runs/<name>/<component>/    checkpoints, settings, metrics, what it came to
<storage>/runs/<name>/pipeline/       what has been trained, and taken over, so far
<storage>/latents, <storage>/lips     shared by all runs on the same clips and auto-encoder
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tccp.clips.clip_table import ClipTable
from tccp.clips.lip_table import LIPS
from tccp.cluster import connected, could_have, num_nodes
from tccp.config import Settings, VariantName, settings_from_json, settings_to_json
from tccp.errors import TccpError
from tccp.files import Folder
from tccp.inference.conditioning import training_conditions
from tccp.inference.pipeline_folder import MANIFEST, TOY_WEIGHTS, check_settings, export, has_component, save_component
from tccp.models.autoencoder import PictureAutoencoder
from tccp.models.variants import FIRST_OF, VARIANTS
from tccp.progress import progress
from tccp.training.fit_autoencoder import fit_latent_statistics, pretrained_autoencoder
from tccp.training.fit_variant import needs_first
from tccp.training.latent_cache import LatentCache
from tccp.training.launcher.encode import ClipEncoder, encoded
from tccp.training.launcher.inherited import fits, lendable
from tccp.training.launcher.job import AUTOENCODER, ComponentJob, Latents, Spread
from tccp.training.launcher.rank import EXPORT, RESULT, Validate
from tccp.training.launcher.remote_errors import unwrapped
from tccp.training.launcher.request import NO_TRACKING, RUN_RECORD, Request, check_fit, check_request, resumed_parallel
from tccp.training.launcher.sizing import check_shared, spread_over
from tccp.training.launcher.worker_group import fit_on_cluster
from tccp.training.lip_folds import LipPlace, lip_place, liplet_folder, open_lip_sources, train_liplets_once
from tccp.training.recipe import COMPONENTS, recipe
from tccp.training.run_folder import SETTINGS_FILE, check_same_settings, run_record
from tccp.training.tracking import Tracker, tracking_place

PIPELINE = "pipeline"
TRACKING = "mlflow.json"
NEWEST = "newest"
"""Alias of the version of a registered pipeline that was trained last; MLflow keeps `latest` to itself."""


@dataclass(frozen=True)
class Launched:
    """pipeline: where it is. trained, taken: names of components; those that were there already are in neither."""

    pipeline: str
    trained: tuple[str, ...]
    taken: tuple[str, ...]
    workers: int


def launch(request: Request, validate: Validate | None = None, note: Callable[[str], None] = print) -> Launched:
    """Trains what is asked for, and what it needs, on the cluster of RAY_ADDRESS or of the job, else on this machine.

    validate: measures networks in the midst of training; it travels to rank 0. note: is told what is done, in lines.
    Raises TccpError for a user's mistake, before anything is trained wherever that can be known.
    """
    check_request(request)
    with connected():
        spread = spread_over(
            could_have(),
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
        check_fit(request, spread)
        with ExitStack() as stack:
            return _Launch(request, spread, validate, note, stack).run()


class _Launch:
    def __init__(
        self, request: Request, spread: Spread, validate: Validate | None, note: Callable[[str], None], stack: ExitStack
    ):
        self.request, self.spread, self.validate, self.note = request, spread, validate, note
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
        self.pipeline = stack.enter_context(self.remote.here())  # of a URL, a copy
        self.taken: list[str] = []
        self.trained: list[str] = []

    @property
    def _zero_stage(self) -> int:
        return self.spread.parallel.stage(self.spread.workers)

    @property
    def table(self) -> ClipTable:
        if self._table is None:
            raise TccpError(
                "auto-encoder and lips are trained on a clip table, not straight from film: take over a pipeline that "
                "has them (--stage1, --autoencoder), or preprocess the films and give --data"
            )
        return self._table

    @property
    def table_place(self) -> str:
        assert self.table and self.place
        return self.place

    def run(self) -> Launched:
        check_settings(self.pipeline, self.settings)
        groups = recipe(self.settings, self._needed())
        if not self.folder.exists(RUN_RECORD):  # what was refused is no run, and may be given again
            record = {**json.loads(run_record()), "zero_stage": self._zero_stage}
            self.folder.write(RUN_RECORD, (json.dumps(record, indent=1) + "\n").encode())
        for group in groups:
            for name in sorted(
                group, key=COMPONENTS.index
            ):  # sequence networks are validated on the first ones' frames
                self._train(name)
        if self.request.register_as:
            self._register(self.request.register_as)
        return Launched(str(self.remote), tuple(self.trained), tuple(self.taken), self.spread.workers)

    def _needed(self) -> list[str]:
        """What is to be trained: what is asked for, and what that needs and nobody lends; the rest is taken over."""
        asked = [name for name in self.request.components if not has_component(self.pipeline, name)]
        self._take_over(asked)
        networks = [name for name in asked if name in VARIANTS]
        needed = [AUTOENCODER]
        if any("lips" in training_conditions(VARIANTS[name], self.settings) for name in networks):
            needed.append(LIPS)
        needed += [FIRST_OF[name] for name in networks if needs_first(name, self.settings)]
        missing = [name for name in needed if name not in asked and not has_component(self.pipeline, name)]
        if LIPS in needed and LIPS not in self._there() and self.settings.lips.source == "wav2lip":
            open_lip_sources(self.settings.lips, self.request.lip_weights, "cpu")  # raises now, not after days
        if missing:
            self.note(f"not there, so trained first: {', '.join(missing)}")
        return [*missing, *asked]

    def _take_over(self, asked: Sequence[str]) -> None:
        """Copies what others have, the packaged weights among them, of all that is not there and not asked for."""
        request = self.request
        for folder in (*request.must_take, *request.take_from):
            with folder.here() as place:
                if folder in request.must_take:
                    check_settings(place, self.settings)
                elif not fits(place, self.settings):
                    continue
                names = lendable(place, self.pipeline, self.settings, asked)
                if names:
                    export(place, self.pipeline, names)
                    self._push()
                    self.taken += names
                    self.note(f"taken over from {_shown(folder)}: {', '.join(names)}")

    def _there(self) -> list[str]:
        return [name for name in COMPONENTS if has_component(self.pipeline, name)]

    def _push(self, *names: str) -> None:
        """Components of the pipeline, and last its manifest, to storage; all of them by default."""
        if self.remote.local is not None:
            return
        for name in names or sorted(path.name for path in self.pipeline.iterdir() if path.is_dir()):
            self.remote.upload(self.pipeline / name, name)
        self.remote.write(MANIFEST, (self.pipeline / MANIFEST).read_bytes())

    def _train(self, name: str) -> None:
        if name == LIPS:
            self._train_lips()
        elif name == AUTOENCODER:
            self._train_autoencoder()
        else:
            self._train_variant(name)  # type: ignore[arg-type]
        self._push(name)
        self.trained.append(name)
        self.note(f"trained {name}: {self.remote}")

    def _job(self, name: str, **more: Any) -> ComponentJob:
        run = Folder(self.folder.path(name))
        if run.exists(SETTINGS_FILE):
            then = settings_from_json(run.read(SETTINGS_FILE).decode())
            check_same_settings(then, self.settings, name, str(run))
        else:
            run.write(SETTINGS_FILE, settings_to_json(self.settings).encode())
        latents: Latents = self.request.latents if self.place else "in-step"
        return ComponentJob(name, self.settings, self.place, self.remote, run, self.spread, self.id, latents, **more)

    def _train_autoencoder(self) -> None:
        device = torch.device("cpu")
        if self.request.pretrained_autoencoder is not None:
            autoencoder = pretrained_autoencoder(self.settings, self.request.pretrained_autoencoder)
            record: dict[str, Any] = {"steps": 0}
        else:
            job = self._job(AUTOENCODER)
            record = {"steps": self.settings.autoencoder.max_steps, **fit_on_cluster(job, None, self._tracked(job))}
            with job.run.here(EXPORT) as place:
                autoencoder = PictureAutoencoder.load(place)
        fit_latent_statistics(autoencoder.to(device).eval(), self.table, self.settings)
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

        gpus = 1 if self.spread.use_gpu else 0
        task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=3)(_liplet_task)
        with unwrapped():
            return float(ray.get(task.remote(self.table_place, self.settings, place, gpus)))

    def _train_variant(self, name: VariantName) -> None:
        if self.request.films is not None:
            held = self.spread.workers * self.spread.cpus_per_worker
            self._train_on(name, self._job(name, films=self.request.films(name, self.pipeline, held)))
            return
        cache = self._cache(name)
        if self.request.latents == "ahead":
            self._encode(cache, name)
        elif cache.lips is not None:
            self._encode(cache, name, lips_alone=True)
        job = self._job(
            name,
            files=cache.files if self.request.latents == "ahead" else None,
            lips=cache.files.lips,
        )
        self._train_on(name, job)

    def _train_on(self, name: VariantName, job: ComponentJob) -> None:
        job = replace(job, control_from=self.request.control_from)
        if self.validate and self.spread.validate_every and FIRST_OF.get(name, AUTOENCODER) not in self._there():
            self.note(f"{name} is not validated: it continues from frames of {FIRST_OF[name]}, which is not there")
        record = {
            "steps": self.settings.for_variant(name).training.max_steps,
            **fit_on_cluster(job, self.validate, self._tracked(job)),
        }
        with job.run.here(EXPORT) as place:
            self._save(name, lambda target: shutil.copytree(place, target, dirs_exist_ok=True), record)

    def _encoder(self, name: VariantName) -> ClipEncoder:
        lips = None
        if "lips" in training_conditions(VARIANTS[name], self.settings):
            lips = lip_place(
                self.settings, self.pipeline, self.data_hash, self.request.storage, self.request.lip_weights
            )
            if lips is not None and lips.to_train:
                self._liplets(lips)
            elif lips is not None and lips.folder.local is not None and self.remote.local is None:
                lips = replace(lips, folder=Folder(self.remote.path(LIPS)))  # not the driver's own copy
        return ClipEncoder(self.request.storage, self.table_place, self.settings, self.remote, lips, name)

    def _cache(self, name: VariantName) -> LatentCache:
        return self._encoder(name).cache("cpu")

    def _encode(self, cache: LatentCache, name: VariantName, lips_alone: bool = False) -> None:
        """Encodes what is not there yet, on all of the cluster: no rank is at work now."""
        missing = cache.missing_clips(lips_alone)
        if not missing:
            return
        with progress() as bar, unwrapped():
            task = bar.add_task("encoding clips", total=len(missing))
            for _ in encoded(self._encoder(name), missing, lips_alone, self.spread):
                bar.advance(task)

    def _save(self, name: str, write: Any, record: dict[str, Any]) -> None:
        provenance = {
            **record,
            **self._footage(),
            "seed": self.settings.seed,
            "device": "cuda" if self.spread.use_gpu else "cpu",
            "zero_stage": self._zero_stage,
            "machine": f"{platform.system()} {platform.machine()}, torch {torch.__version__}, Ray",
            "command": self.request.command,
        }
        save_component(self.pipeline, name, self.settings, write, provenance)

    def _tracked(self, job: ComponentJob) -> tuple[str, str] | None:
        """URI and id of the MLflow run of a component's training: the one it had, where it is resumed."""
        if self.tracking is None:
            return None
        run_id = json.loads(job.run.read(TRACKING))["run_id"] if job.run.exists(TRACKING) else None
        if job.run.exists(RESULT):
            return None if run_id is None else (self.tracking, run_id)
        own = self.settings.for_variant(job.component) if job.component in VARIANTS else self.settings
        params = {
            "component": job.component,
            "preset": own.preset,
            "workers": self.spread.workers,
            "device": "cuda" if self.spread.use_gpu else "cpu",
            **_flat({"deepspeed": {**self.spread.parallel.model_dump(), "zero_stage": self._zero_stage}}),
            **_flat(own.model_dump(include={"seed", "picture_px", "window", "training", "network", "diffusion"})),
            **self._footage(),
        }
        local = self.request.storage.local
        artifacts = None if local is None else (local.absolute() / "mlflow-artifacts").as_uri()
        name = f"{self.request.name}/{job.component}"
        tracker = Tracker.start(self.tracking, name, params, artifacts, run_id)
        if run_id is None:
            job.run.write(TRACKING, json.dumps({"run_id": tracker.run_id, "uri": self.tracking}).encode())
        return self.tracking, tracker.run_id

    def _footage(self) -> dict[str, object]:
        if self._table is None:
            return {"footage": "straight from film"}
        frames = sum(self._table.num_frames.values())
        return {"clips": len(self._table), "frames": frames, "data_hash": self.data_hash}

    def _register(self, model: str) -> None:
        """The whole pipeline, with the MLflow run of what was asked for last."""
        for name in reversed(self.request.components):
            run = Folder(self.folder.path(name))
            if self.tracking is not None and run.exists(TRACKING):
                tracker = Tracker(self.tracking, json.loads(run.read(TRACKING))["run_id"])
                done = tracker.register(self.pipeline, model, NEWEST)
                told = f"registered with MLflow as {model}, alias {NEWEST}"
                self.note(told if done else f"not {told}: MLflow did not take it; the pipeline is whole: {self.remote}")
                return
        self.note(f"not registered with MLflow as {model}: it has no run of {' or '.join(self.request.components)}")


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _shown(folder: Folder) -> str:
    return "the packaged weights" if folder.local == TOY_WEIGHTS else str(folder)


def _liplet_task(table: str, settings: Settings, place: LipPlace, gpus: int) -> float:
    with ClipTable(table, keep=64) as opened, _written(place.folder) as out:
        return train_liplets_once(opened, settings, out, "cuda" if gpus else "cpu")


@contextmanager
def _written(folder: Folder) -> Iterator[Path]:
    """A folder of this machine for what lies, and will lie, in a folder anywhere."""
    with folder.here() as place:
        yield place
        if folder.local is None:
            folder.upload(place, "")
