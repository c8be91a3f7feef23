"""The toy preset at its smallest, and random inputs for its networks."""

import torch

from tccp.config import override, toy
from tccp.models.conditions import Conditions
from tccp.models.variants import Variant

TINY = {
    "network.base_channels": 16,
    "network.channel_multipliers": (1, 2),
    "network.condition_dim": 16,
    "network.time_embedding_dim": 16,
    "network.attention_head_dim": 16,
    "picture_px": 32,
    "lips.size_px": 16,
    "window": 4,
    "autoencoder.latent_channels": 4,
}


def tiny(**overrides):
    return override(toy(), TINY | overrides)


def inputs(settings, row: Variant, batch=2, seed=0):
    """Random latents, times, conditions and control for a variant."""
    torch.manual_seed(seed)
    frames = row.num_frames(settings.window)
    shape = (batch, settings.autoencoder.latent_channels, frames, settings.latent_px, settings.latent_px)
    kinds = row.conditions
    size, lips = settings.picture_px, settings.lips.size_px
    conditions = Conditions(
        audio=torch.randn(batch, frames, 80, 16) if "audio" in kinds else None,
        identity=torch.randn(batch, 3, size, size) if "identity" in kinds else None,
        lips=torch.randn(batch, frames, 3, lips, lips) if "lips" in kinds else None,
    )
    latents, t = torch.randn(shape), torch.randint(1000, (batch, frames))
    surround = settings.surround and row.generates == "face"
    return latents, t, conditions, torch.randn(batch, shape[1] * (2 if surround else 1), *shape[2:])


SMALL = {
    "network.blocks_per_scale": 1,
    "autoencoder.block_channels": (8, 16),
    "autoencoder.norm_groups": 4,
    "autoencoder.batch_size": 4,
    "lips.liplet_steps": 2,
    "lips.liplet_channels": 8,
    "training.batch_size": 4,
    "training.warmup_steps": 2,
    "training.precision": "fp32",
    "training.initial_frames": "truth",
    "training.start_from_first": False,
    "training.log_every": 1,
}


def small(**overrides):
    plain = tiny().model_copy(update={"variant_overrides": {}})  # `override` adds to them, it removes none
    return override(plain, SMALL | overrides)


WITH_DENOISED = {"training.initial_frames": "denoised", "training.start_from_first": True, "training.precision": "bf16"}
