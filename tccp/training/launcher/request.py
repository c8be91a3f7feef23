"""What a user asks of a training on a cluster, and what is refused before it begins."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tccp.cluster import num_nodes
from tccp.config import DeepSpeedSettings, Settings, VariantName
from tccp.errors import TccpError
from tccp.files import Folder
from tccp.models.variants import VARIANTS
from tccp.training.engine import deepspeed_config
from tccp.training.fit_autoencoder import autoencoder_training
from tccp.training.launcher.film_order import FilmWindows
from tccp.training.launcher.job import AUTOENCODER, Latents, Spread
from tccp.training.launcher.sizing import check_shared, check_storage
from tccp.training.recipe import COMPONENTS

RUNS = "runs"
RUN_RECORD = "run.json"
NO_TRACKING = "none"


@dataclass(frozen=True)
class Request:
    """A training as a user asks for it.

    components: what to train; what they need is trained before them, unless it is there or can be taken over.
    table: gives the place of the clip table, which it may make; called once Ray runs and all else has been checked.
    films: in place of a table, gives the windows of a variant straight from film; it is told the variant, the pipeline,
        and how many of the cluster's CPUs the ranks take.
    take_from: pipeline folders that lend what they have of what is needed, if their settings fit; the first that has
        it. must_take: raises if they do not fit.
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
    take_from: tuple[Folder, ...] = ()
    must_take: tuple[Folder, ...] = ()
    control_from: Folder | None = None
    pretrained_autoencoder: Path | None = None
    lip_weights: Path | None = None
    tracking: str | None = None
    register_as: str | None = None
    command: str | None = None
    films: Callable[[VariantName, Path, float], FilmWindows] | None = None

    @property
    def folder(self) -> Folder:
        """Of the run."""
        return Folder(self.storage.path(f"{RUNS}/{self.name}"))


def check_request(request: Request) -> None:
    """Raises TccpError for what is wrong whatever the cluster."""
    for name in request.components:
        if name not in COMPONENTS:
            raise TccpError(f"unknown component {name!r}: choose of {', '.join(COMPONENTS)}")
    if request.keep < 1:
        raise TccpError(f"--keep {request.keep}: give at least 1")
    if request.keep_best and not request.validate_every:
        raise TccpError("--keep-best goes by what validation measures: give --validate-every, too")
    if request.register_as and request.tracking == NO_TRACKING:
        raise TccpError("--register takes the pipeline to MLflow: leave --mlflow none out, or give its address")
    if not request.name or "/" in request.name or request.name.startswith("."):
        raise TccpError(f"--name {request.name!r}: give a name without / that does not begin with a dot")
    check_storage(request.storage)
    if request.folder.exists(RUN_RECORD) and not request.resume:
        raise TccpError(f"{request.folder} holds a run already: give --resume to go on with it, or another --name")


def check_fit(request: Request, spread: Spread) -> None:
    """Raises TccpError for what cannot be done on this cluster. Ray must be running."""
    check_shared("storage", request.storage, num_nodes())
    for name in request.components:
        if name == AUTOENCODER and request.pretrained_autoencoder is None:
            deepspeed_config(autoencoder_training(request.settings), spread.parallel, spread.workers, 1)
        if name in VARIANTS:
            deepspeed_config(request.settings.for_variant(name).training, spread.parallel, spread.workers, 1)
    if request.compiled and spread.parallel.stage(spread.workers) == 3:
        raise TccpError("--compile does not go with ZeRO stage 3, which takes the network apart: give stage 2 or less")


def resumed_parallel(request: Request) -> DeepSpeedSettings:
    """A ZeRO stage that is not given is that of the run that is resumed: others cannot all take its checkpoints up."""
    parallel = request.parallel
    if parallel.zero_stage is None and request.resume and request.folder.exists(RUN_RECORD):
        stage = json.loads(request.folder.read(RUN_RECORD)).get("zero_stage")
        try:
            parallel = DeepSpeedSettings(**{**parallel.model_dump(), "zero_stage": stage})
        except ValueError:
            raise TccpError(
                f"--offload {parallel.offload} does not go with ZeRO stage {stage}, in which {request.folder} was begun"
            ) from None
    return parallel
