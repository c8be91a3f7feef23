"""The layers of the video U-Net, with the parameter names of diffusers' layers, and without their general cases.

All of them take and return the memory format `channels_last`: then a picture's positions are a sequence of tokens
without a copy, and back.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import (
    conv_transpose2d,
    gelu,
    group_norm,
    interpolate,
    linear,
    pad,
    scaled_dot_product_attention,
    silu,
)

_CHANNELS_PER_POSITION = 12  # from how many on a convolution is faster as a product of matrices

KeysValues = tuple[Float[Tensor, "_ _ _ _"], Float[Tensor, "_ _ _ _"]]
"""Keys and values of tokens: b, heads, tokens, channels of a head. Blocks differ in heads and channels."""


def as_tokens(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b p c"]:
    """The positions of pictures as tokens."""
    return x.flatten(2).transpose(1, 2)


def as_picture(x: Float[Tensor, "b p c"], height: int) -> Float[Tensor, "b c h w"]:
    """Inverse of `as_tokens`."""
    return x.transpose(1, 2).unflatten(2, (height, -1))


def activated(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """SiLU, in place of `x` where no gradients are needed."""
    return silu(x, inplace=not torch.is_grad_enabled())


def added(x: Float[Tensor, "*shape"], y: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Sum, in place of `x` where no gradients are needed."""
    return x + y if torch.is_grad_enabled() else x.add_(y)


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


class JoinsWeights(nn.Module, ABC):
    """A layer that can make one matrix or kernel of its weights, and keep it (`join_weights`)."""

    joined: Tensor | None = None
    """What the layer keeps."""

    @abstractmethod
    def join(self) -> Tensor:
        """The matrix or kernel of the present weights."""

    def kept_or_joined(self) -> Tensor:
        return self.join() if self.joined is None else self.joined


def join_weights(network: nn.Module) -> None:
    """Lets the layers of a network keep what they make of their weights. These must not change or move any more."""
    for layer in network.modules():
        if isinstance(layer, JoinsWeights):
            layer.joined = layer.join().detach()


class Attention(nn.Module):
    """Multi-head attention: its layers, with the names of diffusers' attention."""

    def __init__(self, channels: int, source_channels: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(source_channels, channels, bias=False)
        self.to_v = nn.Linear(source_channels, channels, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels), nn.Dropout(dropout)])

    def split(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b heads n e"]:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def project(self, y: Float[Tensor, "b heads n e"]) -> Float[Tensor, "b n c"]:
        projection, dropout = self.to_out
        return dropout(projection(y.transpose(1, 2).flatten(2)))


class SelfAttention(Attention, JoinsWeights):
    """Attention of tokens to each other."""

    def __init__(self, channels: int, heads: int, dropout: float):
        super().__init__(channels, channels, heads, dropout)

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        parts = linear(x, self.kept_or_joined()).chunk(3, dim=-1)  # one product of matrices instead of three
        return self.project(attend(*map(self.split, parts)))

    def join(self) -> Tensor:
        return torch.cat([self.to_q.weight, self.to_k.weight, self.to_v.weight])


class CrossAttention(Attention):
    """Attention of tokens to other tokens, of which it takes the keys and values."""

    def __init__(self, channels: int, source_channels: int, heads: int, dropout: float):
        super().__init__(channels, source_channels, heads, dropout)

    def keys_values(self, tokens: Float[Tensor, "b n d"]) -> KeysValues:
        return self.split(self.to_k(tokens)), self.split(self.to_v(tokens))

    def forward(self, x: Float[Tensor, "b n c"], given: KeysValues) -> Float[Tensor, "b n c"]:
        return self.project(attend(self.split(self.to_q(x)), *given))


class _Gate(nn.Module):
    """GEGLU (Shazeer 2020)."""

    def __init__(self, channels: int, inner: int):
        super().__init__()
        self.proj = nn.Linear(channels, 2 * inner)

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n i"]:
        # One product for both would have to be copied: half a row at a time, `gelu` takes twice the time.
        (value, gate), (value_bias, gate_bias) = self.proj.weight.chunk(2), self.proj.bias.chunk(2)
        return linear(x, value, value_bias) * gelu(linear(x, gate, gate_bias))


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


class FrameConv(nn.Conv2d, JoinsWeights):
    """A convolution over three frames at each position, as a product of matrices."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, (3, 1), padding=(1, 0))

    def forward(self, x: Float[Tensor, "b f p c"]) -> Float[Tensor, "b f p c"]:
        frames = x.shape[1]
        x = pad(x, (0, 0, 0, 0, 1, 1))
        x = torch.cat([x[:, start : start + frames] for start in range(3)], dim=-1)
        return linear(x, self.kept_or_joined(), self.bias)

    def join(self) -> Tensor:
        return self.weight.squeeze(-1).transpose(1, 2).flatten(1)


class Conv(nn.Conv2d):
    """A convolution of three by three pixels.

    With few positions and many channels it is a product of matrices in sampling on a CPU, 1.5 times as fast there.
    """

    def __init__(self, in_channels: int, channels: int):
        super().__init__(in_channels, channels, 3, padding=1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h w"]:
        is_small = _CHANNELS_PER_POSITION * x.shape[2] * x.shape[3] <= x.shape[1]
        if not is_small or torch.is_grad_enabled() or x.device.type != "cpu":
            return super().forward(x)
        windows = pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1)).unfold(1, 3, 1).unfold(2, 3, 1)
        windows = windows.permute(0, 1, 2, 4, 5, 3).flatten(3)
        return linear(windows, self.weight.permute(0, 2, 3, 1).flatten(1), self.bias).permute(0, 3, 1, 2)


class ResnetBlock(nn.Module):
    """Two convolutions with a shortcut around them, and the time embedding between them if there is a `time_dim`."""

    def __init__(self, in_channels: int, channels: int, time_dim: int | None, dropout: float, groups: int):
        super().__init__()
        self.norm1 = GroupNorm(groups, in_channels, eps=1e-6)
        self.conv1 = Conv(in_channels, channels)
        self.time_emb_proj = None if time_dim is None else nn.Linear(time_dim, channels)
        self.norm2 = GroupNorm(groups, channels, eps=1e-6)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = Conv(channels, channels)
        self.conv_shortcut = Pointwise(in_channels, channels) if in_channels != channels else None

    def forward(
        self, x: Float[Tensor, "b c h w"], time: Float[Tensor, "b d"] | None = None
    ) -> Float[Tensor, "b c2 h w"]:
        """time: the activated time embedding."""
        y = self.conv1(activated(self.norm1(x)))
        if self.time_emb_proj is not None:
            y = y + self.time_emb_proj(time)[:, :, None, None]
        y = self.conv2(self.dropout(activated(self.norm2(y))))
        return added(y, x if self.conv_shortcut is None else self.conv_shortcut(x))


class Downsample(nn.Module):
    """Halves the picture by a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        return self.conv(x)


class Upsample(JoinsWeights):
    """Doubles the picture by repetition, then convolves it.

    With the joined kernel, one transposed convolution does both: it multiplies each pixel once where the convolution
    meets it repeatedly, 16 products for four pixels instead of 36.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        if self.joined is None:
            return self.conv(interpolate(x, scale_factor=2.0, mode="nearest"))
        return conv_transpose2d(x, self.joined, self.conv.bias, stride=2, padding=1)

    def join(self) -> Float[Tensor, "c c2 4 4"]:
        """What a pixel adds to the four by four around its copies: the kernel's sums over the two by two copies."""
        kernel = self.conv.weight.flip(2, 3).transpose(0, 1)
        kernel = torch.stack([pad(kernel, (x, 1 - x, y, 1 - y)) for x in range(2) for y in range(2)]).sum(dim=0)
        return kernel.contiguous(memory_format=torch.channels_last)


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
