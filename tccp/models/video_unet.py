"""The space-time U-Net of both branches of MVControlNet (paper section 4.3, Figure 3).

Frames are folded into the batch, `(b f) c h w`. Spatial layers are diffusers' own; only the two temporal layers unfold
the frames.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TypeVar

import torch
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.resnet import Downsample2D, ResnetBlock2D, Upsample2D
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def zero_module(module: M) -> M:
    """Sets all parameters of `module` to zero, so that its output starts at zero."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def frame_positions(num_frames: int, channels: int, like: Tensor) -> Float[Tensor, "f c"]:
    """Sinusoidal position embeddings of the frames in a window."""
    frequencies = torch.exp(-math.log(100.0) * torch.arange(channels // 2, device=like.device) / (channels // 2))
    angles = torch.arange(num_frames, device=like.device)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1).to(like.dtype)


class TemporalConv(nn.Module):
    """Residual 1D convolution over the frames at each position. It starts as the identity."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels)
        self.conv = zero_module(nn.Conv2d(channels, channels, (3, 1), padding=(1, 0)))

    def forward(self, x: Float[Tensor, "bf c h w"], num_frames: int) -> Float[Tensor, "bf c h w"]:
        y = rearrange(nn.functional.silu(self.norm(x)), "(b f) c h w -> b c f (h w)", f=num_frames)
        return x + rearrange(self.conv(y), "b c f (h w) -> (b f) c h w", h=x.shape[2])


class SpaceTimeTransformer(nn.Module):
    """Spatial self-attention, temporal self-attention, frame-by-frame cross-attention (Eq. 7), feed-forward."""

    def __init__(self, channels: int, condition_dim: int, head_dim: int, dropout: float):
        super().__init__()
        heads = max(1, channels // head_dim)
        shape = {"heads": heads, "dim_head": channels // heads, "dropout": dropout}
        self.norm_space = nn.LayerNorm(channels)
        self.space = Attention(channels, **shape)
        self.norm_time = nn.LayerNorm(channels)
        self.time = Attention(channels, **shape)
        self.norm_cross = nn.LayerNorm(channels)
        self.cross = Attention(channels, cross_attention_dim=condition_dim, **shape)
        self.norm_feed = nn.LayerNorm(channels)
        self.feed = FeedForward(channels, dropout=dropout)

    def forward(
        self, x: Float[Tensor, "bf c h w"], tokens: Float[Tensor, "bf n d"], num_frames: int
    ) -> Float[Tensor, "bf c h w"]:
        height, frames = x.shape[2], num_frames
        x = rearrange(x, "bf c h w -> bf (h w) c")
        x = x + self.space(self.norm_space(x))
        y = rearrange(self.norm_time(x), "(b f) p c -> (b p) f c", f=frames)
        y = self.time(y + frame_positions(frames, y.shape[-1], y))
        x = x + rearrange(y, "(b p) f c -> (b f) p c", p=x.shape[1])
        x = x + self.cross_attend(x, tokens)
        x = x + self.feed(self.norm_feed(x))
        return rearrange(x, "bf (h w) c -> bf c h w", h=height)

    def cross_attend(self, x: Float[Tensor, "bf p c"], tokens: Float[Tensor, "bf n d"]) -> Float[Tensor, "bf p c"]:
        """Frame i attends to the tokens of frame i only, because frames are part of the batch."""
        return self.cross(self.norm_cross(x), encoder_hidden_states=tokens)


class BasicBlock(nn.Module):
    """2D convolutions with the time embedding, 1D temporal convolution, attention (Figure 3b)."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        time_dim: int,
        condition_dim: int,
        head_dim: int,
        dropout: float,
        groups: int,
    ):
        super().__init__()
        self.resnet = ResnetBlock2D(
            in_channels=in_channels,
            out_channels=channels,
            temb_channels=time_dim,
            dropout=dropout,
            groups=groups,
            groups_out=groups,
        )
        self.temporal_conv = TemporalConv(channels, groups)
        self.transformer = SpaceTimeTransformer(channels, condition_dim, head_dim, dropout)
        self.gradient_checkpointing = False  # diffusers' enable_gradient_checkpointing() finds this attribute

    def forward(self, x: Tensor, time: Tensor, tokens: Tensor, num_frames: int) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return torch.utils.checkpoint.checkpoint(self._forward, x, time, tokens, num_frames, use_reentrant=False)
        return self._forward(x, time, tokens, num_frames)

    def _forward(self, x: Tensor, time: Tensor, tokens: Tensor, num_frames: int) -> Tensor:
        x = self.temporal_conv(self.resnet(x, time), num_frames)
        return self.transformer(x, tokens, num_frames)


class TimeEmbedding(nn.Module):
    """Embeds the diffusion time of each frame by sinusoids and an MLP. With pooled_dim, it adds pooled conditions."""

    def __init__(self, dim: int, pooled_dim: int | None):
        super().__init__()
        self.sinusoids = Timesteps(dim, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.mlp = TimestepEmbedding(dim, dim)
        self.pooled = None
        if pooled_dim is not None:
            self.pooled = nn.Sequential(nn.Linear(pooled_dim, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Int[Tensor, " bf"], pooled: Float[Tensor, "bf k"]) -> Float[Tensor, "bf d"]:
        embedding = self.mlp(self.sinusoids(t).to(pooled.dtype))
        return embedding if self.pooled is None else embedding + self.pooled(pooled)


class Encoder(nn.Module):
    """Time embedding, input convolution, downward path and middle. The control branch copies this part."""

    def __init__(
        self,
        in_channels: int,
        base_channels: int,
        multipliers: tuple[int, ...],
        blocks_per_scale: int,
        time_dim: int,
        condition_dim: int,
        head_dim: int,
        dropout: float,
        groups: int,
        pooled_dim: int | None,
    ):
        super().__init__()
        self.time = TimeEmbedding(time_dim, pooled_dim)
        self.conv_in = nn.Conv2d(in_channels, base_channels, 3, padding=1)
        self.scales = nn.ModuleList()
        self.downs = nn.ModuleList()
        self.skip_channels: list[int] = []  # of the skips in their order; the middle has as many as the last one
        channels = base_channels
        block = (time_dim, condition_dim, head_dim, dropout, groups)
        for level, multiplier in enumerate(multipliers):
            blocks = nn.ModuleList()
            for _ in range(blocks_per_scale):
                blocks.append(BasicBlock(channels, base_channels * multiplier, *block))
                channels = base_channels * multiplier
                self.skip_channels.append(channels)
            self.scales.append(blocks)
            if level < len(multipliers) - 1:
                self.downs.append(Downsample2D(channels, use_conv=True, name="op"))
        self.middle = BasicBlock(channels, channels, *block)

    def forward(
        self,
        x: Tensor,
        t: Int[Tensor, " bf"],
        tokens: Tensor,
        pooled: Tensor,
        num_frames: int,
        added: Tensor | None = None,
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """The skips (two per scale), the middle's output and the time embedding. added: joins the encoded input."""
        time = self.time(t, pooled)
        x = self.conv_in(x)
        if added is not None:
            x = x + added
        skips = []
        for level, blocks in enumerate(self.scales):
            for block in blocks.children():
                x = block(x, time, tokens, num_frames)
                skips.append(x)
            if level < len(self.downs):
                x = self.downs[level](x)
        return skips, self.middle(x, time, tokens, num_frames), time


class Decoder(nn.Module):
    """Upward path with skips, and output convolution."""

    def __init__(
        self,
        out_channels: int,
        base_channels: int,
        multipliers: tuple[int, ...],
        blocks_per_scale: int,
        time_dim: int,
        condition_dim: int,
        head_dim: int,
        dropout: float,
        groups: int,
    ):
        super().__init__()
        self.scales = nn.ModuleList()
        self.ups = nn.ModuleList()
        channels = base_channels * multipliers[-1]
        block = (time_dim, condition_dim, head_dim, dropout, groups)
        for level, multiplier in reversed(list(enumerate(multipliers))):
            width = base_channels * multiplier
            blocks = nn.ModuleList()
            for _ in range(blocks_per_scale):
                blocks.append(BasicBlock(channels + width, width, *block))
                channels = width
            self.scales.append(blocks)
            if level > 0:
                self.ups.append(Upsample2D(channels, use_conv=True))
        self.norm_out = nn.GroupNorm(groups, base_channels)
        self.conv_out = nn.Conv2d(base_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor, skips: list[Tensor], time: Tensor, tokens: Tensor, num_frames: int) -> Tensor:
        pending: Iterator[Tensor] = reversed(skips)
        for level, blocks in enumerate(self.scales):
            for block in blocks.children():
                x = block(torch.cat([x, next(pending)], dim=1), time, tokens, num_frames)
            if level < len(self.ups):
                x = self.ups[level](x)
        return self.conv_out(nn.functional.silu(self.norm_out(x)))
