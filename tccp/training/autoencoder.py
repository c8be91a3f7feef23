"""Training the auto-encoder on faces, landmark images and masked scenes of a clip table."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from diffusers.training_utils import EMAModel
from jaxtyping import Float
from torch import Tensor

from tccp.clip import ClipTable
from tccp.config import Settings, TccpError, TrainingSettings
from tccp.data import rng_seed, view
from tccp.models.autoencoder import PictureAutoencoder, to_model
from tccp.training.engine import TorchEngine
from tccp.training.latents import PICTURES
from tccp.training.loop import FitResult, RunFolder, fit
from tccp.variants import PictureKind

FRAMES_PER_CLIP = 4
"""Frames a step takes of each clip it reads: fewer clips are decoded for the same number of pictures."""
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


def step_pictures(table: ClipTable, settings: Settings, step: int) -> Float[Tensor, "n 3 h w"]:
    """The pictures of step k, a pure function of (seed, k): half faces, a quarter landmark images, a quarter scenes."""
    rng = np.random.default_rng(rng_seed(settings.seed, "autoencoder", step))
    count = settings.autoencoder.batch_size
    kinds = ["face", "landmark_pictures", "face", "masked_scene"]
    pictures: list[np.ndarray] = []
    while len(pictures) < count:
        clip = table[table.ids[int(rng.integers(len(table)))]]
        draw = int(rng.integers(settings.headbox.draws))
        for frame in rng.integers(clip.num_frames, size=FRAMES_PER_CLIP):
            seen = view(clip, settings, draw, settings.seed, int(frame), 1)
            pictures.append(getattr(seen, kinds[len(pictures) % 4])[0])
    return to_model(torch.from_numpy(np.stack(pictures[:count])))


def reconstruction_loss(
    autoencoder: PictureAutoencoder, pictures: Float[Tensor, "n 3 h w"], kl_weight: float
) -> Tensor:
    """Mean squared error of the reconstruction, and the KL term of latent diffusion that keeps latents bounded.

    Squared, not absolute: the median of a pixel that a thin landmark stroke rarely covers is black, and for a long time
    an absolute error learns just that.
    """
    posterior = autoencoder.posterior(pictures)
    error = ((autoencoder.reconstruct(posterior.sample()).float() - pictures) ** 2).mean()
    return error + kl_weight * posterior.kl().mean() / pictures[0].numel()


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


def train_autoencoder(
    settings: Settings,
    table: ClipTable,
    run: RunFolder | None,
    *,
    pretrained: Path | None = None,
    device: torch.device | str = "cpu",
    stop_at: int | None = None,
) -> tuple[PictureAutoencoder, FitResult]:
    """Trains an auto-encoder, or takes a diffusers folder as it is, and fits the latent statistics to this data."""
    if pretrained is not None:
        autoencoder = PictureAutoencoder.load(pretrained).to(device)
        _check_shape(autoencoder, settings, pretrained)
        result = FitResult([])
    else:
        torch.manual_seed(rng_seed(settings.seed, "init", "autoencoder"))
        autoencoder = PictureAutoencoder.from_settings(settings.autoencoder).to(device)
        training = autoencoder_training(settings)
        ema = EMAModel(autoencoder.parameters(), decay=training.ema_decay)

        def loss_of(step: int, _micro: int) -> Tensor:
            pictures = step_pictures(table, settings, step).to(device)
            reduced = settings.autoencoder.precision == "bf16"
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=reduced):
                return reconstruction_loss(autoencoder, pictures, settings.autoencoder.kl_weight)

        engine = TorchEngine(autoencoder, training)
        result = fit(
            engine, loss_of, training, seed=settings.seed, ema=ema, run=run, title="autoencoder", stop_at=stop_at
        )
        ema.copy_to(autoencoder.parameters())
    autoencoder.eval()
    fit_latent_statistics(autoencoder, table, settings)
    return autoencoder, result
