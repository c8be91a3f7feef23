"""The space-time U-Net of both branches of MVControlNet (paper section 4.3, Figure 3).

Frames are folded into the batch, `(b f) c h w`; only the two temporal layers unfold them. What does not change over the
steps of a window, keys and values of the conditions and their pooled embedding, is computed beforehand
(`keys_values`, `TimeEmbedding.of_conditions`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import silu

from tccp.models.layers import (
    CrossAttention,
    Downsample,
    FeedForward,
    FrameConv,
    GroupNorm,
    KeysValues,
    ResnetBlock,
    SelfAttention,
    TimeMlp,
    Upsample,
    as_picture,
    as_tokens,
    frame_positions,
    time_sinusoids,
)

M = TypeVar("M", bound=nn.Module)


def zero_module(module: M) -> M:
    """Sets all parameters of `module` to zero, so that its output starts at zero."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class TemporalConv(nn.Module):
    """Residual 1D convolution over the frames at each position. It starts as the identity."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = GroupNorm(groups, channels)
        self.conv = zero_module(FrameConv(channels))

    def forward(self, x: Float[Tensor, "bf c h w"], num_frames: int) -> Float[Tensor, "bf c h w"]:
        y = as_tokens(silu(self.norm(x))).unflatten(0, (-1, num_frames))
        return x + as_picture(self.conv(y).flatten(0, 1), x.shape[2])


class SpaceTimeTransformer(nn.Module):
    """Spatial self-attention, temporal self-attention, frame-by-frame cross-attention (Eq. 7), feed-forward."""

    def __init__(self, channels: int, condition_dim: int, head_dim: int, dropout: float):
        super().__init__()
        heads = max(1, channels // head_dim)
        self.norm_space = nn.LayerNorm(channels)
        self.space = SelfAttention(channels, heads, dropout)
        self.norm_time = nn.LayerNorm(channels)
        self.time = SelfAttention(channels, heads, dropout)
        self.norm_cross = nn.LayerNorm(channels)
        self.cross = CrossAttention(channels, condition_dim, heads, dropout)
        self.norm_feed = nn.LayerNorm(channels)
        self.feed = FeedForward(channels, dropout)

    def forward(
        self, x: Float[Tensor, "bf c h w"], conditions: KeysValues, num_frames: int
    ) -> Float[Tensor, "bf c h w"]:
        height = x.shape[2]
        x = as_tokens(x)
        x = x + self.space(self.norm_space(x))
        x = x + self.attend_over_time(x, num_frames)
        x = x + self.cross_attend(x, conditions)
        x = x + self.feed(self.norm_feed(x))
        return as_picture(x, height)

    def attend_over_time(self, x: Float[Tensor, "bf p c"], num_frames: int) -> Float[Tensor, "bf p c"]:
        """Each position attends to itself in the other frames of its window."""
        positions, channels = x.shape[1:]
        y = self.norm_time(x).unflatten(0, (-1, num_frames))
        y = y + frame_positions(num_frames, int(channels), x.device, x.dtype)[:, None]
        # Without a copy, one window would be multiplied position by position, which takes more than twice as long.
        y = self.time(y.transpose(1, 2).flatten(0, 1).contiguous())
        return y.unflatten(0, (-1, positions)).transpose(1, 2).flatten(0, 1)

    def cross_attend(self, x: Float[Tensor, "bf p c"], conditions: KeysValues) -> Float[Tensor, "bf p c"]:
        """Frame i attends to the tokens of frame i only, because frames are part of the batch."""
        return self.cross(self.norm_cross(x), conditions)


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
        self.resnet = ResnetBlock(in_channels, channels, time_dim, dropout, groups)
        self.temporal_conv = TemporalConv(channels, groups)
        self.transformer = SpaceTimeTransformer(channels, condition_dim, head_dim, dropout)
        self.gradient_checkpointing = False

    def keys_values(self, tokens: Float[Tensor, "bf n d"]) -> KeysValues:
        """What `forward` needs of the condition tokens."""
        return self.transformer.cross.keys_values(tokens)

    def forward(self, x: Tensor, time: Tensor, conditions: KeysValues, num_frames: int) -> Tensor:
        """time: the activated time embedding."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            given = x, time, conditions, num_frames
            return torch.utils.checkpoint.checkpoint(self._forward, *given, use_reentrant=False)
        return self._forward(x, time, conditions, num_frames)

    def _forward(self, x: Tensor, time: Tensor, conditions: KeysValues, num_frames: int) -> Tensor:
        x = self.temporal_conv(self.resnet(x, time), num_frames)
        return self.transformer(x, conditions, num_frames)


class TimeEmbedding(nn.Module):
    """Embeds the diffusion time of each frame by sinusoids and an MLP. With pooled_dim, it adds pooled conditions."""

    def __init__(self, dim: int, pooled_dim: int | None):
        super().__init__()
        self.dim = dim
        self.mlp = TimeMlp(dim)
        self.pooled = None
        if pooled_dim is not None:
            self.pooled = nn.Sequential(nn.Linear(pooled_dim, dim), nn.SiLU(), nn.Linear(dim, dim))

    def of_conditions(self, pooled: Float[Tensor, "bf k"]) -> Float[Tensor, "bf d"] | None:
        """What `forward` adds for the conditions."""
        return None if self.pooled is None else self.pooled(pooled)

    def forward(self, t: Int[Tensor, " bf"], of_conditions: Float[Tensor, "bf d"] | None) -> Float[Tensor, "bf d"]:
        embedding = self.mlp(time_sinusoids(t, self.dim).to(self.mlp.linear_1.weight.dtype))
        return embedding if of_conditions is None else embedding + of_conditions


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
                self.downs.append(Downsample(channels))
        self.middle = BasicBlock(channels, channels, *block)

    def keys_values(self, tokens: Float[Tensor, "bf n d"]) -> list[KeysValues]:
        """Block by block."""
        return [block.keys_values(tokens) for block in self.modules() if isinstance(block, BasicBlock)]

    def forward(
        self,
        x: Tensor,
        t: Int[Tensor, " bf"],
        conditions: list[KeysValues],
        of_conditions: Tensor | None,
        num_frames: int,
        added: Tensor | None = None,
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """The skips (two per scale), the middle's output and the activated time embedding.

        conditions: of `keys_values`. of_conditions: of `TimeEmbedding`. added: joins the encoded input.
        """
        time = silu(self.time(t, of_conditions))
        of_block = iter(conditions)
        x = self.conv_in(x)
        if added is not None:
            x = x + added
        skips = []
        for level, blocks in enumerate(self.scales):
            for block in blocks.children():
                x = block(x, time, next(of_block), num_frames)
                skips.append(x)
            if level < len(self.downs):
                x = self.downs[level](x)
        return skips, self.middle(x, time, next(of_block), num_frames), time


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
                self.ups.append(Upsample(channels))
        self.norm_out = GroupNorm(groups, base_channels)
        self.conv_out = nn.Conv2d(base_channels, out_channels, 3, padding=1)

    def keys_values(self, tokens: Float[Tensor, "bf n d"]) -> list[KeysValues]:
        """Block by block."""
        return [block.keys_values(tokens) for block in self.modules() if isinstance(block, BasicBlock)]

    def forward(
        self, x: Tensor, skips: list[Tensor], time: Tensor, conditions: list[KeysValues], num_frames: int
    ) -> Tensor:
        """time: activated. conditions: of `keys_values`."""
        pending: Iterator[Tensor] = reversed(skips)
        of_block = iter(conditions)
        for level, blocks in enumerate(self.scales):
            for block in blocks.children():
                x = block(torch.cat([x, next(pending)], dim=1), time, next(of_block), num_frames)
            if level < len(self.ups):
                x = self.ups[level](x)
        return self.conv_out(silu(self.norm_out(x)))
