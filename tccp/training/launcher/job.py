"""What the driver hands to the ranks: the component to train, its resources, and where results are kept.

Ray Train's controller also imports this module, so nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tccp.clips.lip_table import LipFiles
from tccp.config import DeepSpeedSettings, Settings
from tccp.files import Folder
from tccp.training.launcher.film_order import FilmWindows
from tccp.training.window_files import LatentFiles

Latents = Literal["ahead", "in-step"]
"""ahead: Ray Data's workers encode all clips into storage before training; in-step: ranks encode what they read."""

AUTOENCODER = "autoencoder"


@dataclass(frozen=True)
class Allocation:
    """The resources of a training on a cluster, and its limits."""

    workers: int  # ranks
    use_gpu: bool
    cpus_per_worker: float
    readers: int  # Ray Data workers that read for each rank
    parallel: DeepSpeedSettings = field(default_factory=DeepSpeedSettings)
    timeout_s: float = 1800.0  # of every operation in which ranks wait for each other
    max_failures: int = 8
    compiled: bool = False
    keep: int = 2  # checkpoints
    keep_best: bool = False
    validate_every: int = 0  # steps; 0: never


@dataclass(frozen=True)
class ComponentJob:
    """The training of one component, as every rank receives it. It is pickled, so it stays small."""

    component: str
    settings: Settings
    table: str | None  # clip table; None where windows come straight from film
    pipeline: Folder  # components trained before
    run: Folder
    allocation: Allocation
    launch_id: str  # of this call of the command: a user's mistake ends all of its attempts
    latents: Latents = "ahead"
    files: LatentFiles | None = None  # with latents ahead
    lips: LipFiles | None = None  # with latents in step
    films: FilmWindows | None = None  # where windows come straight from film
    control_from: Folder | None = None
    tracking_uri: str | None = None
    tracking_run: str | None = None
