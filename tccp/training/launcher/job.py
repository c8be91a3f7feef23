"""What is to be trained, how it is spread, and where it is kept: what the driver hands to the ranks.

Ray Train's controller imports this module too: nothing here needs torch.
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
"""ahead: encoded before training, by Ray Data's workers, and kept; in-step: by each rank, as it needs them."""

AUTOENCODER = "autoencoder"


@dataclass(frozen=True)
class Spread:
    """How a training is spread over a cluster."""

    workers: int  # ranks
    use_gpu: bool
    cpus_per_worker: float
    readers: int  # Ray Data workers that read for each rank
    parallel: DeepSpeedSettings = field(default_factory=DeepSpeedSettings)
    timeout_s: float = 1800.0  # of everything that ranks wait for each other in
    max_failures: int = 8
    compiled: bool = False
    keep: int = 2
    keep_best: bool = False
    validate_every: int = 0  # steps; 0: never


@dataclass(frozen=True)
class ComponentJob:
    """The training of one component, as every rank sees it. Small: it travels."""

    component: str
    settings: Settings
    table: str | None  # clip table; None where windows come straight from film
    pipeline: Folder  # with what was trained before
    run: Folder
    spread: Spread
    launch_id: str  # of this call of the command, in which a mistake ends all attempts
    latents: Latents = "ahead"
    files: LatentFiles | None = None  # with latents ahead
    lips: LipFiles | None = None  # with latents in step
    films: FilmWindows | None = None  # where windows come straight from film
    control_from: Folder | None = None
    tracking_uri: str | None = None
    tracking_run: str | None = None
