"""A training as a user requests it, and the checks before it begins."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tccp.cluster import num_nodes
from tccp.config import DeepSpeedSettings, Settings, VariantName
from tccp.errors import TccpError
from tccp.files import Folder, check_shared
from tccp.inference.manifest import COMPONENTS
from tccp.models.variants import VARIANTS
from tccp.training.engine import deepspeed_config
from tccp.training.fit_autoencoder import autoencoder_training
from tccp.training.launcher.film_order import FilmWindows
from tccp.training.launcher.job import AUTOENCODER, Allocation, Latents

RUNS = "runs"
RUN_RECORD = "run.json"
NO_TRACKING = "none"
WRITE_TEST = ".tccp"
"""An empty file that is written to the storage before anything else: it raises if the storage cannot be written."""


@dataclass(frozen=True)
class Request:
    """A training as a user requests it.

    components: what to train. Components that they need are trained before them, unless they exist or can be reused.
    table: returns the place of the clip table, which it may make; called when Ray runs and all else has been checked.
    films: in place of a table, returns the windows of a variant straight from film; called with the variant, the
        pipeline, and the number of the cluster's CPUs that the ranks take.
    reuse_from: pipeline folders whose components are copied if their settings match, the first that has one.
    require_from: likewise, but settings that do not match are an error.
    """

    components: tuple[str, ...]
    settings: Settings
    table: Callable[[], str] | None
    storage: Folder
    name: str
    resume: bool = False
    workers: int | None = None
    device: str = "auto"
    parallel: DeepSpeedSettings = field(default_factory=DeepSpeedSettings)
    latents: Latents = "ahead"
    readers: int | None = None
    compiled: bool = False
    timeout_s: float = 1800.0
    max_failures: int = 8
    keep: int = 2
    keep_best: bool = False
    validate_every: int = 0
    reuse_from: tuple[Folder, ...] = ()
    require_from: tuple[Folder, ...] = ()
    control_from: Folder | None = None
    pretrained_autoencoder: Path | None = None
    lip_weights: Path | None = None
    tracking: str | None = None
    register_as: str | None = None
    command: str | None = None
    films: Callable[[VariantName, Path, float], FilmWindows] | None = None

    @property
    def folder(self) -> Folder:
        """The run's folder."""
        return Folder(self.storage.path(f"{RUNS}/{self.name}"))


def check_request(request: Request) -> None:
    """Raises TccpError for mistakes that do not depend on the cluster, StorageError if the storage fails."""
    for name in request.components:
        if name not in COMPONENTS:
            raise TccpError(f"unknown component {name!r}: choose from {', '.join(COMPONENTS)}")
    if request.keep < 1:
        raise TccpError(f"--keep {request.keep}: give at least 1")
    if request.keep_best and not request.validate_every:
        raise TccpError("--keep-best ranks checkpoints by validation: give --validate-every, too")
    if request.register_as and request.tracking == NO_TRACKING:
        raise TccpError("--register needs MLflow: leave out --mlflow none, or give the address of a server")
    if not request.name or "/" in request.name or request.name.startswith("."):
        raise TccpError(f"--name {request.name!r}: give a name without / that does not begin with a dot")
    request.storage.write(WRITE_TEST, b"")
    if request.folder.exists(RUN_RECORD) and not request.resume:
        raise TccpError(f"{request.folder} holds a run already: give --resume to continue it, or another --name")


def check_fit(request: Request, allocation: Allocation) -> None:
    """Raises TccpError if the request does not fit this cluster. Ray must be running."""
    check_shared("storage", request.storage, num_nodes())
    if request.control_from is not None:  # the ranks read it
        check_shared("--control-from", request.control_from, num_nodes())
    for name in request.components:
        if name == AUTOENCODER and request.pretrained_autoencoder is None:
            deepspeed_config(autoencoder_training(request.settings), allocation.parallel, allocation.workers, 1)
        if name in VARIANTS:
            deepspeed_config(request.settings.for_variant(name).training, allocation.parallel, allocation.workers, 1)
    if request.compiled and allocation.parallel.stage(allocation.workers) == 3:
        raise TccpError("--compile does not work with ZeRO stage 3, which divides the network: give stage 2 or less")


def resumed_parallel(request: Request) -> DeepSpeedSettings:
    """The DeepSpeed settings. A stage that is not given is that of the resumed run, whose checkpoints it must read.

    Raises TccpError if the run's stage and the given settings exclude each other.
    """
    parallel = request.parallel
    if parallel.zero_stage is None and request.resume and request.folder.exists(RUN_RECORD):
        stage = json.loads(request.folder.read(RUN_RECORD)).get("zero_stage")
        try:
            parallel = DeepSpeedSettings(**{**parallel.model_dump(), "zero_stage": stage})
        except ValueError:
            raise TccpError(
                f"--offload {parallel.offload} does not work with ZeRO stage {stage}, with which {request.folder} began"
            ) from None
    return parallel
