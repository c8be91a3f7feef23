"""A worker of benchmarks/speed.py: measures networks of the published shapes of peers, with random weights.

The shapes are those of the peers' published configurations (musetalk.json, LatentSync's stage2.yaml, sd-vae-ft-mse, and
the tensors of Wav2Lip's checkpoints); the classes are diffusers' and, for Wav2Lip, this project's own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, UNetMotionModel
from speed_workers import cpu_seconds, serve
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tccp.models.wav2lip import SIZE_PX, Wav2Lip

PICTURE_PX = 256
LATENT_PX = PICTURE_PX // 8
AUDIO = (50, 384)  # tokens a frame and their width: Whisper-tiny, five layers of ten positions
WINDOW = 16  # frames that LatentSync generates together
STEPS = 20  # LatentSync's default
TINY = (32, 32, 32, 32)
"""Widths for tests, in place of the published ones."""

SD_WIDTHS = (320, 640, 1280, 1280)
VAE_WIDTHS = (128, 256, 512, 512)


def _vae(tiny: bool) -> AutoencoderKL:
    """Stable Diffusion's auto-encoder, as sd-vae-ft-mse."""
    return AutoencoderKL(
        block_out_channels=TINY if tiny else VAE_WIDTHS,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=PICTURE_PX,
    )


def _musetalk(tiny: bool) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=64,
        in_channels=8,
        out_channels=4,
        block_out_channels=TINY if tiny else SD_WIDTHS,
        down_block_types=(*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
        up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
        layers_per_block=2,
        attention_head_dim=8,  # diffusers takes it as the number of heads, as for Stable Diffusion 1
        cross_attention_dim=AUDIO[1],
    )


def _latentsync(tiny: bool) -> UNetMotionModel:
    return UNetMotionModel(
        sample_size=64,
        in_channels=13,
        out_channels=4,
        block_out_channels=TINY if tiny else SD_WIDTHS,
        down_block_types=(*("CrossAttnDownBlockMotion",) * 3, "DownBlockMotion"),
        up_block_types=("UpBlockMotion", *("CrossAttnUpBlockMotion",) * 3),
        layers_per_block=2,
        num_attention_heads=8,
        motion_num_attention_heads=8,
        motion_max_seq_length=24,
        use_motion_mid_block=False,
        cross_attention_dim=AUDIO[1],
    )


def _inputs(peer: str) -> tuple[torch.Tensor, ...]:
    if peer == "wav2lip":
        return torch.randn(1, 1, 80, 16), torch.rand(1, 6, SIZE_PX, SIZE_PX)
    if peer == "musetalk":
        return torch.randn(1, 8, LATENT_PX, LATENT_PX), torch.tensor(0), torch.randn(1, *AUDIO)
    return torch.randn(1, 13, WINDOW, LATENT_PX, LATENT_PX), torch.tensor(500), torch.randn(WINDOW, *AUDIO)


def _built(make: Callable[[bool], nn.Module], tiny: bool) -> nn.Module:
    torch.manual_seed(0)
    return make(tiny).eval().requires_grad_(False)


@functools.cache
def _cheap(peer: str, tiny: bool) -> nn.Module:
    """The networks that stay in memory between jobs. LatentSync's takes 5 GB."""
    return _built({"wav2lip": lambda _: Wav2Lip(), "musetalk": _musetalk, "vae": _vae}[peer], tiny)


@torch.inference_mode()
def network(peer: str, tiny: bool) -> dict[str, float]:
    """CPU time and operations of one evaluation of a peer's network; its frames and its parameters."""
    model = _built(_latentsync, tiny) if peer == "latentsync" else _cheap(peer, tiny)
    given = _inputs(peer)
    if peer != "latentsync":
        model(*given)  # the first evaluation chooses kernels
    return {
        "evaluation_ms": 1000 * cpu_seconds(lambda: model(*given)),
        "frames": WINDOW if peer == "latentsync" else 1,
        "million_parameters": sum(one.numel() for one in model.parameters()) / 1e6,
    }


@torch.inference_mode()
def autoencoder(tiny: bool) -> dict[str, float]:
    """CPU time per picture of the auto-encoder that MuseTalk and LatentSync share."""
    vae = _cheap("vae", tiny)
    pictures = torch.randn(1, 3, PICTURE_PX, PICTURE_PX)
    latents = torch.randn(1, 4, LATENT_PX, LATENT_PX)
    return {
        "encode_ms": 1000 * cpu_seconds(lambda: vae.encode(pictures)),
        "decode_ms": 1000 * cpu_seconds(lambda: vae.decode(latents)),
    }


@torch.no_grad()
def gflop(tiny: bool) -> dict[str, float]:
    """Operations of one evaluation of each network, and of the auto-encoder for one picture."""
    found = {}
    with torch.device("meta"):
        vae = _vae(tiny).eval()
        calls: dict[str, Callable[[], Any]] = {
            "encode": lambda: vae.encode(torch.empty(1, 3, PICTURE_PX, PICTURE_PX)),
            "decode": lambda: vae.decode(torch.empty(1, 4, LATENT_PX, LATENT_PX)),
        }
        for peer, model in (("wav2lip", Wav2Lip()), ("musetalk", _musetalk(tiny)), ("latentsync", _latentsync(tiny))):
            calls[peer] = functools.partial(model.eval(), *_inputs(peer))
        for name, call in calls.items():
            with FlopCounterMode(display=False) as counter:
                call()
            found[name] = counter.get_total_flops() / 1e9
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve({"network": network, "autoencoder": autoencoder, "gflop": gflop})
