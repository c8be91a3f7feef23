"""Latent-based conditions: one encoder per kind makes tokens, which are concatenated per frame (paper section 4.3)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tccp.models.variants import ConditionKind


@dataclass(frozen=True)
class Conditions:
    """Inputs of the condition encoders. To add a kind of condition, add a field here and an encoder below.

    audio: Wav2Lip mel, 16 columns centred on each frame, in [-4, 4].
    identity: a picture of the person, in [-1, 1]; one per window, used for all its frames.
    lips: lip reference, in [-1, 1].
    dropped: True for windows whose conditions are replaced by the learned null tokens (guidance).
    """

    audio: Float[Tensor, "b f 80 16"] | None = None
    identity: Float[Tensor, "b 3 h w"] | None = None
    lips: Float[Tensor, "b f 3 s s"] | None = None
    dropped: Bool[Tensor, " b"] | None = None

    @property
    def batch_size(self) -> int:
        return next(len(value) for value in vars(self).values() if value is not None)

    def drop(self, dropped: Bool[Tensor, " b"]) -> Conditions:
        return dataclasses.replace(self, dropped=dropped)

    def to(self, device: torch.device | str) -> Conditions:
        return Conditions(**{k: None if v is None else v.to(device) for k, v in vars(self).items()})

    def in_precision(self, dtype: torch.dtype) -> Conditions:
        """All numbers but `dropped` in another floating-point type."""
        return Conditions(
            **{k: v.to(dtype) if v is not None and v.is_floating_point() else v for k, v in vars(self).items()}
        )

    def __getitem__(self, index: slice) -> Conditions:
        return Conditions(**{k: None if v is None else v[index] for k, v in vars(self).items()})

    @staticmethod
    def cat(parts: Sequence[Conditions]) -> Conditions:
        """Joins windows along the batch. Raises ValueError if the parts have different kinds of conditions."""
        joined: dict[str, Tensor | None] = {}
        for name in get_args(ConditionKind):
            values = [getattr(part, name) for part in parts]
            if any(value is None for value in values):
                if not all(value is None for value in values):
                    raise ValueError(f"some windows have the condition {name!r} and some do not")
                joined[name] = None
            else:
                joined[name] = torch.cat(values)
        dropped = [
            torch.zeros(part.batch_size, dtype=torch.bool) if part.dropped is None else part.dropped for part in parts
        ]
        return Conditions(**joined, dropped=torch.cat(dropped))


def _downsampling(in_channels: int, out_channels: int, stride: int | tuple[int, int]) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1), nn.GroupNorm(8, out_channels), nn.SiLU()
    )


class AudioEncoder(nn.Module):
    """Mel window -> one token per 4 columns (50 ms)."""

    num_tokens = 4

    def __init__(self, dim: int):
        super().__init__()
        self.layers = nn.Sequential(
            _downsampling(1, dim // 2, (2, 1)),
            _downsampling(dim // 2, dim // 2, (2, 2)),
            _downsampling(dim // 2, dim, (2, 1)),
            _downsampling(dim, dim, (2, 2)),
            nn.Conv2d(dim, dim, (5, 1)),
        )

    def forward(self, mel: Float[Tensor, "n 80 16"]) -> Float[Tensor, "n tokens d"]:
        return self.layers(mel.unsqueeze(1) / 4).squeeze(2).transpose(1, 2)


class PictureEncoder(nn.Module):
    """Square picture -> a grid of at most 6 x 6 tokens."""

    def __init__(self, dim: int, size_px: int):
        super().__init__()
        layers: list[nn.Module] = []
        channels, side = 3, size_px
        while side > 6:
            width = min(dim, max(16, dim // 4) * 2 ** len(layers))
            layers.append(_downsampling(channels, width, 2))
            channels, side = width, (side + 1) // 2
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels, dim, 1))
        self.num_tokens = side * side

    def forward(self, pictures: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n tokens d"]:
        return self.layers(pictures).flatten(2).transpose(1, 2)


class ConditionEncoders(nn.Module):
    """The encoders of a variant's conditions, with learned null tokens that replace dropped conditions."""

    def __init__(self, kinds: Sequence[ConditionKind], dim: int, picture_px: int, lip_px: int):
        super().__init__()
        makers: dict[str, Callable[[], AudioEncoder | PictureEncoder]] = {
            "audio": lambda: AudioEncoder(dim),
            "identity": lambda: PictureEncoder(dim, picture_px),
            "lips": lambda: PictureEncoder(dim, lip_px),
        }
        encoders: dict[str, AudioEncoder | PictureEncoder] = {kind: makers[kind]() for kind in kinds}
        self.encoders = nn.ModuleDict(encoders)
        self.num_tokens = sum(encoder.num_tokens for encoder in encoders.values())
        self.null = nn.ParameterDict()
        self.position = nn.ParameterDict()  # distinguishes the tokens of one kind, and the kinds
        for kind, encoder in encoders.items():
            shape = (encoder.num_tokens, dim)
            self.null[kind] = nn.Parameter(torch.zeros(shape))
            self.position[kind] = nn.Parameter(torch.randn(shape) * 0.1)

    def forward(
        self, conditions: Conditions, num_frames: int
    ) -> tuple[Float[Tensor, "b f n d"], Float[Tensor, "b f kinds_d"]]:
        """Tokens per frame, and the mean token of each kind, concatenated.

        Raises ValueError if a condition is missing or has another number of frames.
        """
        tokens, pooled = [], []
        for kind, encoder in self.encoders.items():
            value = getattr(conditions, kind)
            if value is None:
                raise ValueError(f"the condition {kind!r} is missing; this network takes {', '.join(self.encoders)}")
            if kind == "identity":
                encoded = encoder(value).unsqueeze(1).expand(-1, num_frames, -1, -1)
            elif value.shape[1] != num_frames:
                raise ValueError(f"the condition {kind!r} has {value.shape[1]} frames; the window has {num_frames}")
            else:
                encoded = encoder(value.flatten(0, 1)).unflatten(0, (-1, num_frames))
            if conditions.dropped is not None:
                encoded = torch.where(conditions.dropped[:, None, None, None], self.null[kind], encoded)
            tokens.append(encoded + self.position[kind])
            pooled.append(encoded.mean(dim=2))
        return torch.cat(tokens, dim=2), torch.cat(pooled, dim=-1)
