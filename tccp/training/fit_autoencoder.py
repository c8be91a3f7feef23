"""Training the auto-encoder on faces, landmark images and masked scenes of a clip table."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from diffusers.training_utils import EMAModel
from jaxtyping import Float
from torch import Tensor, nn

from tccp.clips.clip_table import ClipTable
from tccp.clips.windows import view
from tccp.config import AutoencoderSettings, Settings, TrainingSettings
from tccp.errors import TccpError
from tccp.models.autoencoder import PictureAutoencoder, to_model
from tccp.models.variants import PictureKind
from tccp.seeds import rng_seed
from tccp.training.engine import Engine, TorchEngine, with_weights
from tccp.training.loop import FitResult, fit
from tccp.training.precision import arithmetic
from tccp.training.run_folder import Run, TransientRun
from tccp.training.window_files import PICTURES, PictureBatch, TablePictures

STATISTICS_CLIPS = 64
STATISTICS_FRAMES = 8


def autoencoder_training(settings: Settings) -> TrainingSettings:
    """The loop's settings for the auto-encoder: its own batch, steps and rate; the rest as for the networks."""
    own = settings.autoencoder
    return settings.training.model_copy(
        update={
            "batch_size": own.batch_size,
            "max_steps": own.max_steps,
            "learning_rate": own.learning_rate,
            "accumulation": 1,
        }
    )


@runtime_checkable
class Pictures(Protocol):
    """Where an auto-encoder's pictures come from."""

    def batch(self, step: int, rank: int, num_ranks: int) -> PictureBatch:
        """A rank's part of the pictures of step k. Sources that stream hand out one step after the other."""


class ReconstructionLoss(nn.Module):
    """The module that an engine trains: mean squared error, and the KL term of latent diffusion that bounds latents.

    Squared, not absolute: the median of a pixel that a thin landmark stroke rarely covers is black, and for a long time
    an absolute error learns just that.
    """

    def __init__(self, autoencoder: PictureAutoencoder, settings: AutoencoderSettings):
        super().__init__()
        self.autoencoder = autoencoder
        self.settings = settings

    def forward(self, pictures: Float[Tensor, "n 3 h w"], noise: Float[Tensor, "n c hl wl"]) -> Float[Tensor, ""]:
        """Of pictures in [-1, 1]; noise is what the posterior is sampled with."""
        with arithmetic(self.settings.precision, pictures.device.type):
            posterior = self.autoencoder.posterior(pictures)
            restored = self.autoencoder.reconstruct(posterior.mean + posterior.std * noise)
            error = ((restored.float() - pictures) ** 2).mean()
            return error + self.settings.kl_weight * posterior.kl().mean() / pictures[0].numel()


class AutoencoderLoss:
    """`loss_of(step, micro)` for the training loop, of one rank."""

    def __init__(
        self,
        autoencoder: PictureAutoencoder,
        settings: Settings,
        pictures: Pictures,
        rank: int = 0,
        num_ranks: int = 1,
    ):
        self.module = ReconstructionLoss(autoencoder, settings.autoencoder)
        self.forward: Callable[..., Any] = self.module  # or the engine's
        self.settings = settings
        self.pictures = pictures
        self.device = autoencoder.mean.device
        side = settings.picture_px // autoencoder.downsampling
        self.latent_shape = (autoencoder.latent_channels, side, side)
        self.rank, self.num_ranks = rank, num_ranks
        self.waited_s = 0.0

    def __call__(self, step: int, micro: int) -> Tensor:
        asked = time.monotonic()
        batch = self.pictures.batch(step, self.rank, self.num_ranks)
        self.waited_s += time.monotonic() - asked
        noise = []
        for number in batch.numbers:  # of each picture by its number, so that it is the same on any number of ranks
            generator = torch.Generator().manual_seed(rng_seed(self.settings.seed, "posterior", int(number)))
            noise.append(torch.randn(self.latent_shape, generator=generator))
        pictures = to_model(torch.from_numpy(batch.pictures)).to(self.device)
        return self.forward(pictures, torch.stack(noise).to(self.device))


def _statistics_batches(table: ClipTable, settings: Settings, kind: PictureKind) -> Iterator[Float[Tensor, "n 3 h w"]]:
    rng = np.random.default_rng(rng_seed(settings.seed, "latent statistics"))
    chosen = rng.permutation(len(table))[:STATISTICS_CLIPS]
    for index in sorted(chosen):
        clip = table[table.ids[index]]
        frames = np.linspace(0, clip.num_frames - 1, STATISTICS_FRAMES).astype(int)
        seen = [getattr(view(clip, settings, 0, settings.seed, int(i), 1), PICTURES[kind])[0] for i in frames]
        yield to_model(torch.from_numpy(np.stack(seen)))


def fit_latent_statistics(autoencoder: PictureAutoencoder, table: ClipTable, settings: Settings) -> None:
    """Mean and spread of each kind's latents, from up to 512 pictures each."""
    autoencoder.fit_statistics({kind: _statistics_batches(table, settings, kind) for kind in PICTURES})


def _check_shape(autoencoder: PictureAutoencoder, settings: Settings, folder: Path) -> None:
    for name in ("downsampling", "latent_channels"):
        found, asked = getattr(autoencoder, name), getattr(settings.autoencoder, name)
        if found != asked:
            raise TccpError(
                f"the auto-encoder {folder} has {name} {found}, the settings {asked}: give another folder, or "
                f"--set autoencoder.{name}={found}"
            )


def new_autoencoder(settings: Settings) -> PictureAutoencoder:
    """The auto-encoder as its training starts, the same for the same seed."""
    torch.manual_seed(rng_seed(settings.seed, "init", "autoencoder"))
    return PictureAutoencoder.from_settings(settings.autoencoder)


def pretrained_autoencoder(settings: Settings, folder: Path) -> PictureAutoencoder:
    """A diffusers folder as it is. Raises TccpError if its shape is not that of the settings."""
    autoencoder = PictureAutoencoder.load(folder)
    _check_shape(autoencoder, settings, folder)
    return autoencoder


def fit_autoencoder(
    settings: Settings,
    pictures: Pictures,
    run: Run | None,
    *,
    device: torch.device | str = "cpu",
    stop_at: int | None = None,
    engine_of: Callable[[nn.Module, TrainingSettings], Engine] = TorchEngine,
) -> tuple[PictureAutoencoder | None, FitResult]:
    """Trains an auto-encoder, and returns it with its EMA weights, on the CPU; on ranks above 0 of many, None.

    Its latent statistics are still to be fitted (`fit_latent_statistics`).
    """
    run = run or TransientRun()
    training = autoencoder_training(settings)
    losses = AutoencoderLoss(new_autoencoder(settings).to(device), settings, pictures, run.rank, run.num_ranks)
    engine = engine_of(losses.module, training)
    losses.forward = engine.forward
    ema = EMAModel(engine.local_parameters(), decay=training.ema_decay, foreach=True)
    result = fit(
        engine,
        losses,
        training,
        seed=settings.seed,
        ema=ema,
        run=run,
        title="autoencoder",
        stop_at=stop_at,
        waited_s=lambda: losses.waited_s,
    )
    weights = engine.gather(ema.shadow_params)
    return (with_weights(new_autoencoder(settings), weights) if run.rank == 0 else None), result


def train_autoencoder(
    settings: Settings,
    table: ClipTable,
    run: Run | None,
    *,
    pretrained: Path | None = None,
    device: torch.device | str = "cpu",
    stop_at: int | None = None,
) -> tuple[PictureAutoencoder, FitResult]:
    """In one process: trains an auto-encoder, or takes one as it is, and fits the latent statistics to this data."""
    if pretrained is not None:
        autoencoder: PictureAutoencoder | None = pretrained_autoencoder(settings, pretrained).eval()
        result = FitResult([])
    else:
        source = TablePictures(table, settings)
        autoencoder, result = fit_autoencoder(settings, source, run, device=device, stop_at=stop_at)
    assert autoencoder is not None
    fit_latent_statistics(autoencoder.to(device), table, settings)
    return autoencoder, result
