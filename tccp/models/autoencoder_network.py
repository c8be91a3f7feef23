"""The convolutional auto-encoder of latent diffusion (Rombach et al. 2022), as diffusers' AutoencoderKL.

Names of parameters, files and random initialisation are those of diffusers, so its folders can be used. Only the form
in use is here: residual blocks, and attention in the middle if it is asked for. The light decoder is our own: diffusers
cannot read a folder that has one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import pad, pixel_shuffle, silu

from tccp.models.layers import ResnetBlock, Upsample, attend
from tccp.models.pretrained import Pretrained, with_config

_EPSILON = 1e-6
_LEAST_PIXEL_CHANNELS = 16
_PIXEL_BLOCKS = 2
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # before diffusers 0.16
_SUPPORTED = {
    "down_block_types": "DownEncoderBlock2D",
    "up_block_types": "UpDecoderBlock2D",
    "act_fn": "silu",
    "use_quant_conv": True,
    "use_post_quant_conv": True,
}


@dataclass(frozen=True)
class Posterior:
    """The normal distribution of latents, given pictures."""

    parameters: Float[Tensor, "n c2 h w"]

    @property
    def mean(self) -> Float[Tensor, "n c h w"]:
        return self.parameters.chunk(2, dim=1)[0]

    @cached_property
    def log_variance(self) -> Float[Tensor, "n c h w"]:
        return self.parameters.chunk(2, dim=1)[1].clamp(-30.0, 20.0)

    @property
    def std(self) -> Float[Tensor, "n c h w"]:
        return torch.exp(0.5 * self.log_variance)

    def kl(self) -> Float[Tensor, " n"]:
        """Kullback-Leibler divergence from the standard normal distribution, summed over each picture's latents."""
        terms = self.mean**2 + self.log_variance.exp() - 1.0 - self.log_variance
        return 0.5 * terms.sum(dim=(1, 2, 3))


class _Attention(nn.Module):
    """Attention of all positions to each other, with one head."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=_EPSILON)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels), nn.Dropout(0.0)])

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        y = self.group_norm(x).flatten(2).transpose(1, 2)
        query, key, value = (layer(y).unsqueeze(1) for layer in (self.to_q, self.to_k, self.to_v))
        y = self.to_out[0](attend(query, key, value).squeeze(1))
        return x + y.transpose(1, 2).unflatten(2, x.shape[2:])


class _Middle(nn.Module):
    def __init__(self, channels: int, groups: int, attention: bool):
        super().__init__()
        first = ResnetBlock(channels, channels, None, 0.0, groups)
        self.attentions = nn.ModuleList([_Attention(channels, groups)] if attention else [])
        self.resnets = nn.ModuleList([first, ResnetBlock(channels, channels, None, 0.0, groups)])

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class _Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h2 w2"]:
        return self.conv(pad(x, (0, 1, 0, 1)))


class _Level(nn.Module):
    """Residual blocks of one width, with `samplers` after them, under the name that diffusers gives those."""

    def __init__(self, in_channels: int, channels: int, blocks: int, groups: int, samplers: str, last: bool):
        super().__init__()
        widths = [in_channels, *[channels] * (blocks - 1)]
        self.resnets = nn.ModuleList([ResnetBlock(width, channels, None, 0.0, groups) for width in widths])
        make = {"downsamplers": _Downsample, "upsamplers": Upsample}[samplers]
        self.samplers = samplers
        if not last:
            self.add_module(samplers, nn.ModuleList([make(channels)]))

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c2 h2 w2"]:
        for block in self.resnets:
            x = block(x)
        for sampler in getattr(self, self.samplers, ()):
            x = sampler(x)
        return x


class _Encoder(nn.Module):
    def __init__(self, in_channels: int, latent_channels: int, widths: Sequence[int], *shape: Any):
        super().__init__()
        blocks, groups, attention = shape
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        befores = [widths[0], *widths[:-1]]
        self.down_blocks = nn.ModuleList(
            _Level(before, width, blocks, groups, "downsamplers", level == len(widths) - 1)
            for level, (before, width) in enumerate(zip(befores, widths, strict=True))
        )
        self.mid_block = _Middle(widths[-1], groups, attention)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=_EPSILON)
        self.conv_out = nn.Conv2d(widths[-1], 2 * latent_channels, 3, padding=1)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c2 h2 w2"]:
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return self.conv_out(silu(self.conv_norm_out(self.mid_block(x))))


class _Decoder(nn.Module):
    """folded: number of finest levels that are left out.

    In their place, `conv_out` draws patches of 2^folded pixels with a few channels each, and narrow residual blocks
    make the picture of them. Without those, thin strokes blur (docs/what_did_not_work.md).
    """

    def __init__(self, out_channels: int, latent_channels: int, widths: Sequence[int], folded: int, *shape: Any):
        super().__init__()
        blocks, groups, attention = shape
        finest, widths = widths[0], widths[::-1][: len(widths) - folded]
        self.patch = 2**folded
        self.conv_in = nn.Conv2d(latent_channels, widths[0], 3, padding=1)
        self.mid_block = _Middle(widths[0], groups, attention)
        befores = [widths[0], *widths[:-1]]
        self.up_blocks = nn.ModuleList(
            _Level(before, width, blocks + 1, groups, "upsamplers", level == len(widths) - 1)
            for level, (before, width) in enumerate(zip(befores, widths, strict=True))
        )
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=_EPSILON)
        drawn = max(_LEAST_PIXEL_CHANNELS, finest // 4, out_channels) if folded else out_channels
        self.conv_out = nn.Conv2d(widths[-1], drawn * self.patch**2, 3, padding=1)
        self.pixels = None
        if folded:
            narrow = [ResnetBlock(drawn, drawn, None, 0.0, math.gcd(groups, drawn)) for _ in range(_PIXEL_BLOCKS)]
            self.pixels = nn.Sequential(*narrow, nn.SiLU(), nn.Conv2d(drawn, out_channels, 3, padding=1))

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c2 h2 w2"]:
        x = self.mid_block(self.conv_in(x))
        for level in self.up_blocks:
            x = level(x)
        x = self.conv_out(silu(self.conv_norm_out(x)))
        return x if self.pixels is None else self.pixels(pixel_shuffle(x, self.patch))


class AutoencoderNetwork(Pretrained):
    """`encode` gives the posterior of raw latents, `decode` the pictures of raw latents. See the module."""

    class_name = "AutoencoderKL"

    @with_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        block_out_channels: Sequence[int] = (64,),
        layers_per_block: int = 1,
        latent_channels: int = 4,
        norm_num_groups: int = 32,
        mid_block_add_attention: bool = True,
        down_block_types: Sequence[str] = (),
        up_block_types: Sequence[str] = (),
        decoder_folded_levels: int = 0,
    ):
        super().__init__()
        levels = len(block_out_channels)
        if not 0 <= decoder_folded_levels < levels:
            raise ValueError(f"decoder_folded_levels is {decoder_folded_levels}, but there are {levels} levels")
        shape = layers_per_block, norm_num_groups, mid_block_add_attention
        self.encoder = _Encoder(in_channels, latent_channels, block_out_channels, *shape)
        self.decoder = _Decoder(out_channels, latent_channels, block_out_channels, decoder_folded_levels, *shape)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)

    @classmethod
    def adapt(cls, config: dict[str, Any], weights: dict[str, Tensor]) -> None:
        for key, supported in _SUPPORTED.items():
            given = config.pop(key, supported) if not key.endswith("_types") else config.get(key, supported)
            if {supported} != (set(given) if isinstance(given, list) else {given}):
                raise ValueError(f"{key} is {given}; only {supported} is supported")
        # What diffusers' pipelines use, not the network.
        for key in ("sample_size", "scaling_factor", "shift_factor", "latents_mean", "latents_std", "force_upcast"):
            config.pop(key, None)
        for name in list(weights):
            module, _, last = name.rpartition(".")
            before, _, part = module.rpartition(".")
            if part in _OLD_NAMES and ".attentions." in name:
                weights[f"{before}.{_OLD_NAMES[part]}.{last}"] = weights.pop(name)

    def stored_config(self) -> dict[str, Any]:
        """A full decoder is not mentioned: diffusers does not know the argument, and older files lack it."""
        config = super().stored_config()
        if not config["decoder_folded_levels"]:
            del config["decoder_folded_levels"]
        return config

    def with_folded_decoder(self, folded_levels: int) -> AutoencoderNetwork:
        """A copy with another number of folded levels. Parameters of equal name and shape keep their values.

        That is all of the encoder, and of the decoder all levels that both have. The rest is random.
        """
        network = AutoencoderNetwork(**{**self.config, "decoder_folded_levels": folded_levels})
        own, given = network.state_dict(), self.state_dict()
        kept = {name: value for name, value in given.items() if name in own and own[name].shape == value.shape}
        network.load_state_dict(own | kept)
        return network.to(self.device)

    def encode(self, pictures: Float[Tensor, "n c h w"]) -> Posterior:
        return Posterior(self.quant_conv(self.encoder(pictures)))

    def decode(self, raw: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c2 h2 w2"]:
        return self.decoder(self.post_quant_conv(raw))
