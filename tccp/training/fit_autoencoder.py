"""Trains the auto-encoder on faces, landmark pictures and masked scenes of a clip table."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from tccp.clips.clip_table import ClipTable
from tccp.clips.windows import view
from tccp.config import AutoencoderSettings, Settings, TrainingSettings
from tccp.errors import TccpError
from tccp.inference.conditioning import picture_of
from tccp.models.autoencoder import STATISTICS_FILE, PictureAutoencoder, to_model
from tccp.models.variants import PICTURE_KINDS, PictureKind
from tccp.seeds import rng_seed
from tccp.training.averaged_weights import AveragedWeights
from tccp.training.engine import Engine, TorchEngine, with_weights
from tccp.training.loop import FitResult, SettingKeys, fit
from tccp.training.precision import arithmetic
from tccp.training.run_folder import Run, TransientRun
from tccp.training.set_aside import readable
from tccp.training.window_files import PictureBatch, TablePictures

logger = logging.getLogger("tccp.training")

STATISTICS_CLIPS = 64
STATISTICS_FRAMES = 8


def autoencoder_training(settings: Settings) -> TrainingSettings:
    """The training loop's settings for the auto-encoder.

    Batch size, number of steps and learning rate are the auto-encoder's own; the rest is as for the networks.
    """
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
    """A source of pictures to train an auto-encoder."""

    def batch(self, step: int, rank: int, num_ranks: int) -> PictureBatch:
        """The rank's share of the pictures of step k. Streaming sources require consecutive steps."""


class ReconstructionLoss(nn.Module):
    """The module that an engine trains: mean squared error plus the KL term of latent diffusion, which bounds latents.

    The error is squared, not absolute: thin landmark strokes rarely cover a given pixel, so its median is black, and an
    absolute error learns black pictures for a long time.
    """

    def __init__(self, autoencoder: PictureAutoencoder, settings: AutoencoderSettings):
        super().__init__()
        self.autoencoder = autoencoder
        self.settings = settings

    def forward(self, pictures: Float[Tensor, "n 3 h w"], noise: Float[Tensor, "n c hl wl"]) -> Float[Tensor, ""]:
        """The loss of pictures in [-1, 1]. noise: standard normal, samples the posterior."""
        with arithmetic(self.settings.precision, pictures.device.type):
            posterior = self.autoencoder.posterior(pictures)
            restored = self.autoencoder.reconstruct(posterior.mean + posterior.std * noise)
            error = ((restored.float() - pictures) ** 2).mean()
            return error + self.settings.kl_weight * posterior.kl().mean() / pictures[0].numel()


class AutoencoderLoss:
    """The loss of one rank's micro-batch, `loss_of(step, micro)` of the training loop."""

    def __init__(
        self,
        autoencoder: PictureAutoencoder,
        settings: Settings,
        pictures: Pictures,
        rank: int = 0,
        num_ranks: int = 1,
    ):
        self.module = ReconstructionLoss(autoencoder, settings.autoencoder)
        self.forward: Callable[..., Any] = self.module  # replaced by the engine's forward
        self.settings = settings
        self.pictures = pictures
        self.device = autoencoder.mean.device
        side = settings.picture_px // autoencoder.downsampling
        self.latent_shape = (autoencoder.latent_channels, side, side)
        self.rank, self.num_ranks = rank, num_ranks
        self.waited_s = 0.0

    def __call__(self, step: int, micro: int) -> Tensor:
        started = time.monotonic()
        batch = self.pictures.batch(step, self.rank, self.num_ranks)
        self.waited_s += time.monotonic() - started
        noise = []
        for number in batch.numbers:  # seeded by the picture's number: the same on any number of ranks
            generator = torch.Generator().manual_seed(rng_seed(self.settings.seed, "posterior", int(number)))
            noise.append(torch.randn(self.latent_shape, generator=generator))
        pictures = to_model(torch.from_numpy(batch.pictures)).to(self.device)
        return self.forward(pictures, torch.stack(noise).to(self.device))


def _statistics_batches(table: ClipTable, settings: Settings, kind: PictureKind) -> Iterator[Float[Tensor, "n 3 h w"]]:
    rng = np.random.default_rng(rng_seed(settings.seed, "latent statistics"))
    chosen = rng.permutation(len(table))[:STATISTICS_CLIPS]

    def pictures(clip_id: str) -> Float[Tensor, "n 3 h w"]:
        clip = table[clip_id]
        frames = np.linspace(0, clip.num_frames - 1, STATISTICS_FRAMES).astype(int)
        found = [picture_of(kind, vars(view(clip, settings, 0, settings.seed, int(i), 1)))[0] for i in frames]
        return to_model(torch.from_numpy(np.stack(found)))

    yield from readable((table.ids[index] for index in sorted(chosen)), pictures)


def fit_latent_statistics(autoencoder: PictureAutoencoder, table: ClipTable, settings: Settings) -> None:
    """Sets mean and standard deviation of the latents of each kind of picture, from up to 512 pictures per kind."""
    autoencoder.fit_statistics({kind: _statistics_batches(table, settings, kind) for kind in PICTURE_KINDS})


def _check_shape(autoencoder: PictureAutoencoder, settings: Settings, folder: Path) -> None:
    for name in ("downsampling", "latent_channels"):
        found, wanted = getattr(autoencoder, name), getattr(settings.autoencoder, name)
        if found != wanted:
            raise TccpError(
                f"the auto-encoder {folder} has {name} {found}, the settings {wanted}: give another folder, or "
                f"--set autoencoder.{name}={found}"
            )


def new_autoencoder(settings: Settings) -> PictureAutoencoder:
    """An untrained auto-encoder. The same seed gives the same weights."""
    torch.manual_seed(rng_seed(settings.seed, "init", "autoencoder"))
    return PictureAutoencoder.from_settings(settings.autoencoder)


def pretrained_autoencoder(settings: Settings, folder: Path, *, any_decoder: bool = False) -> PictureAutoencoder:
    """Loads a diffusers folder.

    Raises TccpError if downsampling or latent channels differ from the settings, or, unless `any_decoder`, the decoder.
    """
    autoencoder = PictureAutoencoder.load(folder)
    _check_shape(autoencoder, settings, folder)
    if needs_decoder(settings, autoencoder) and not any_decoder:
        raise TccpError(
            f"autoencoder.decoder_folded_levels is {autoencoder.decoder_folded_levels} in {folder} and "
            f"{settings.autoencoder.decoder_folded_levels} here: `tccp train autoencoder` can train another decoder, "
            "this job cannot; give the same value"
        )
    return autoencoder


def needs_decoder(settings: Settings, autoencoder: PictureAutoencoder) -> bool:
    """Whether the settings ask for another decoder than that of an existing auto-encoder."""
    return autoencoder.decoder_folded_levels != settings.autoencoder.decoder_folded_levels


def with_new_decoder(settings: Settings, autoencoder: PictureAutoencoder) -> PictureAutoencoder:
    """A copy with the decoder of the settings, to be trained. Its encoder is frozen, so that latents stay the same.

    Raises TccpError if the decoder would keep no level.
    """
    torch.manual_seed(rng_seed(settings.seed, "init", "decoder"))
    try:
        result = autoencoder.with_folded_decoder(settings.autoencoder.decoder_folded_levels)
    except ValueError as error:
        raise TccpError(f"{error} in the given auto-encoder: lower autoencoder.decoder_folded_levels") from None
    result.vae.encoder.requires_grad_(False)
    result.vae.quant_conv.requires_grad_(False)
    return result


def fit_autoencoder(
    settings: Settings,
    pictures: Pictures,
    run: Run | None,
    *,
    start: PictureAutoencoder | None = None,
    device: torch.device | str = "cpu",
    stop_at: int | None = None,
    engine_of: Callable[[nn.Module, TrainingSettings], Engine] = TorchEngine,
) -> tuple[PictureAutoencoder | None, FitResult]:
    """Trains an auto-encoder and returns it with its EMA weights, on the CPU. Ranks above 0 get None in its place.

    start: the auto-encoder to train, in place of a new one; its frozen parameters stay as they are.
    Call `fit_latent_statistics` on a new one before use.
    """
    run = run or TransientRun()
    training = autoencoder_training(settings)
    autoencoder = start if start is not None else new_autoencoder(settings)
    trained = copy.deepcopy(autoencoder)  # now, because an engine may split the parameters among the ranks
    losses = AutoencoderLoss(autoencoder.to(device), settings, pictures, run.rank, run.num_ranks)
    engine = engine_of(losses.module, training)
    losses.forward = engine.forward
    ema = AveragedWeights(engine.local_parameters(), decay=training.ema_decay)
    result = fit(
        engine,
        losses,
        training,
        seed=settings.seed,
        ema=ema,
        run=run,
        title="autoencoder",
        keys=SettingKeys(learning_rate="autoencoder.learning_rate"),
        stop_at=stop_at,
        waited_s=lambda: losses.waited_s,
    )
    weights = engine.gather(ema.weights)
    return (with_weights(trained, weights).requires_grad_() if run.rank == 0 else None), result


def train_autoencoder(
    settings: Settings,
    table: ClipTable,
    run: Run | None,
    *,
    pretrained: Path | None = None,
    device: torch.device | str = "cpu",
    stop_at: int | None = None,
) -> tuple[PictureAutoencoder, FitResult]:
    """Trains an auto-encoder in one process and fits its latent statistics to this data.

    pretrained: a diffusers folder to use in place of a trained auto-encoder. If the settings ask for another decoder,
      one is trained to its encoder. Then stored statistics stay, because networks may have been trained with them.
    """
    source = TablePictures(table, settings)
    if pretrained is None:
        trained, result = fit_autoencoder(settings, source, run, device=device, stop_at=stop_at)
    else:
        trained, result = pretrained_autoencoder(settings, pretrained, any_decoder=True).eval(), FitResult([])
        if needs_decoder(settings, trained):
            logger.info("training a decoder to the encoder of %s", pretrained)
            start = with_new_decoder(settings, trained)
            trained, result = fit_autoencoder(settings, source, run, start=start, device=device, stop_at=stop_at)
            if trained is not None and (pretrained / STATISTICS_FILE).exists():
                return trained.to(device), result
    assert trained is not None
    fit_latent_statistics(trained.to(device), table, settings)
    return trained, result
