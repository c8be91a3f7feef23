"""The layers of the video U-Net, with the parameter names of diffusers' layers, and without their general cases.

All of them take and return the memory format `channels_last`: then a picture's positions are a sequence of tokens
without a copy, and back.
"""

from __future__ import annotations

import functools
import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import gelu, group_norm, interpolate, linear, pad, scaled_dot_product_attention, silu

KeysValues = tuple[Float[Tensor, "_ _ _ _"], Float[Tensor, "_ _ _ _"]]
"""Keys and values of tokens: b, heads, tokens, channels of a head. Blocks differ in heads and channels."""


def as_tokens(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b p c"]:
    """The positions of pictures as tokens."""
    return x.flatten(2).transpose(1, 2)


def as_picture(x: Float[Tensor, "b p c"], height: int) -> Float[Tensor, "b c h w"]:
    """Inverse of `as_tokens`."""
    return x.transpose(1, 2).unflatten(2, (height, -1))


def _is_bf16_on_cpu(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and x.device.type == "cpu"


def attend(
    query: Float[Tensor, "b heads n e"], keys: Float[Tensor, "b heads m e"], values: Float[Tensor, "b heads m e"]
) -> Float[Tensor, "b heads n e"]:
    """Attention of every head, with all tokens."""
    if not _is_bf16_on_cpu(query):
        return scaled_dot_product_attention(query, keys, values)
    # PyTorch's fused attention for CPUs is slow in bf16, most of all its backward pass, and exact in single precision.
    with torch.autocast("cpu", enabled=False):
        return scaled_dot_product_attention(query.float(), keys.float(), values.float()).bfloat16()


class GroupNorm(nn.GroupNorm):
    """Group normalisation, on a CPU always in single precision: in bf16 it takes twice the time."""

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        if not _is_bf16_on_cpu(x):
            return super().forward(x)
        return group_norm(x.float(), self.num_groups, self.weight.float(), self.bias.float(), self.eps).bfloat16()


class Attention(nn.Module):
    """Multi-head attention of tokens to themselves, or to the keys and values of other tokens."""

    def __init__(self, channels: int, heads: int, dropout: float, source_channels: int | None = None):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(source_channels or channels, channels, bias=False)
        self.to_v = nn.Linear(source_channels or channels, channels, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels), nn.Dropout(dropout)])

    def keys_values(self, tokens: Float[Tensor, "b n d"]) -> KeysValues:
        return self._split(self.to_k(tokens)), self._split(self.to_v(tokens))

    def forward(self, x: Float[Tensor, "b n c"], given: KeysValues | None = None) -> Float[Tensor, "b n c"]:
        if given is not None:
            query, (keys, values) = self._split(self.to_q(x)), given
        elif torch.is_grad_enabled():
            query, (keys, values) = self._split(self.to_q(x)), self.keys_values(x)
        else:  # one product of matrices instead of three
            weight = torch.cat([self.to_q.weight, self.to_k.weight, self.to_v.weight])
            query, keys, values = map(self._split, linear(x, weight).chunk(3, dim=-1))
        y = attend(query, keys, values)
        projection, dropout = self.to_out
        return dropout(projection(y.transpose(1, 2).flatten(2)))

    def _split(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b heads n e"]:
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)


class _Gate(nn.Module):
    """GEGLU (Shazeer 2020)."""

    def __init__(self, channels: int, inner: int):
        super().__init__()
        self.proj = nn.Linear(channels, 2 * inner)

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n i"]:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * gelu(gate.contiguous())  # element by element, half a row at a time would take twice the time


class FeedForward(nn.Module):
    """Two linear layers with a gate between them."""

    def __init__(self, channels: int, dropout: float):
        super().__init__()
        self.net = nn.Sequential(_Gate(channels, 4 * channels), nn.Dropout(dropout), nn.Linear(4 * channels, channels))

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        return self.net(x)


class Pointwise(nn.Conv2d):
    """A convolution of one pixel, as a product of matrices, which is faster for small pictures."""

    def __init__(self, in_channels: int, channels: int):
        super().__init__(in_channels, channels, 1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h w"]:
        return linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class FrameConv(nn.Conv2d):
    """A convolution over three frames at each position, as a product of matrices."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, (3, 1), padding=(1, 0))

    def forward(self, x: Float[Tensor, "b f p c"]) -> Float[Tensor, "b f p c"]:
        frames = x.shape[1]
        x = pad(x, (0, 0, 0, 0, 1, 1))
        x = torch.cat([x[:, start : start + frames] for start in range(3)], dim=-1)
        return linear(x, self.weight.squeeze(-1).transpose(1, 2).flatten(1), self.bias)


class ResnetBlock(nn.Module):
    """Two convolutions with a shortcut around them, and the time embedding between them if there is a `time_dim`."""

    def __init__(self, in_channels: int, channels: int, time_dim: int | None, dropout: float, groups: int):
        super().__init__()
        self.norm1 = GroupNorm(groups, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.time_emb_proj = None if time_dim is None else nn.Linear(time_dim, channels)
        self.norm2 = GroupNorm(groups, channels, eps=1e-6)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_shortcut = Pointwise(in_channels, channels) if in_channels != channels else None

    def forward(
        self, x: Float[Tensor, "b c h w"], time: Float[Tensor, "b d"] | None = None
    ) -> Float[Tensor, "b c2 h w"]:
        """time: the activated time embedding."""
        y = self.conv1(silu(self.norm1(x)))
        if self.time_emb_proj is not None:
            y = y + self.time_emb_proj(time)[:, :, None, None]
        y = self.conv2(self.dropout(silu(self.norm2(y))))
        return y + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Downsample(nn.Module):
    """Halves the picture by a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        return self.conv(x)


class Upsample(nn.Module):
    """Doubles the picture by repetition, then convolves it."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        return self.conv(interpolate(x, scale_factor=2.0, mode="nearest"))


class TimeMlp(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.linear_1 = nn.Linear(dim, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
        return self.linear_2(silu(self.linear_1(x)))


def time_sinusoids(t: Int[Tensor, " b"], dim: int) -> Float[Tensor, "b d"]:
    """Sinusoids of diffusion times: cosines, then sines (Ho et al. 2020)."""
    exponent = -math.log(10_000) * torch.arange(dim // 2, dtype=torch.float32, device=t.device) / (dim // 2)
    angles = t[:, None].float() * torch.exp(exponent)[None, :]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


@functools.lru_cache(maxsize=256)
def frame_positions(num_frames: int, channels: int, device: torch.device, dtype: torch.dtype) -> Float[Tensor, "f c"]:
    """Sinusoidal position embeddings of the frames in a window."""
    with torch.inference_mode(False):  # training may use it too
        frequencies = torch.exp(-math.log(100.0) * torch.arange(channels // 2, device=device) / (channels // 2))
        angles = torch.arange(num_frames, device=device)[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=-1).to(dtype)
