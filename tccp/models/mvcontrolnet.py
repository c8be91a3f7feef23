"""MVControlNet: a video diffusion branch and a control branch that copies its encoder and middle (section 4.3)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tccp.config import Settings
from tccp.models.conditions import ConditionEncoders, Conditions
from tccp.models.layers import KeysValues, Pointwise
from tccp.models.pretrained import Pretrained, with_config
from tccp.models.variants import VARIANTS, ConditionKind, VariantName
from tccp.models.video_unet import BasicBlock, Decoder, Encoder, zero_module


class VideoBranch(nn.Module):
    """The video diffusion U-Net."""

    def __init__(self, encoder: Encoder, decoder: Decoder):
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder


class ControlBranch(nn.Module):
    """An encoder and middle like the video branch's, with zero convolutions at the control input and at the outputs."""

    def __init__(self, encoder: Encoder, control_channels: int, embedding: Sequence[int], base_channels: int):
        super().__init__()
        self.encoder = encoder
        widths = [control_channels, *(embedding or (base_channels,)), base_channels]
        self.embed = nn.Sequential()
        for before, after in pairwise(widths):
            self.embed.extend([nn.Conv2d(before, after, 3, padding=1), nn.SiLU()])
        self.zero_in = zero_module(Pointwise(base_channels, base_channels))
        widths = encoder.skip_channels
        self.zero_out = nn.ModuleList(zero_module(Pointwise(c, c)) for c in [*widths, widths[-1]])

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        conditions: list[KeysValues],
        of_conditions: Tensor | None,
        num_frames: int,
        added: Tensor,
    ) -> list[Tensor]:
        """The tensors to add to the video branch's skips and, as the last one, to its middle.

        added: the embedded control latents, `zero_in(embed(control))`.
        """
        skips, middle, _ = self.encoder(x, t, conditions, of_conditions, num_frames, added=added)
        return [zero(y) for zero, y in zip(self.zero_out, [*skips, middle], strict=True)]


@dataclass(frozen=True)
class Prepared:
    """What the network computes once for a window and uses at every step. Made by `MVControlNet.prepare`.

    Keys and values of the conditions, block by block, and what the time embeddings add for them; with a control branch,
    its own ones and the embedded control latents. The first dimension of all tensors is (b f).
    """

    video: list[KeysValues]
    decoder: list[KeysValues]
    video_time: Tensor | None
    control: list[KeysValues] | None = None
    control_time: Tensor | None = None
    control_embedded: Tensor | None = None

    @staticmethod
    def cat(parts: Sequence[Prepared]) -> Prepared:
        """Joins windows along the batch."""
        names = [field.name for field in fields(Prepared)]
        return Prepared(**{name: _joined([getattr(part, name) for part in parts]) for name in names})

    def num_windows(self, num_frames: int) -> int:
        return len(self.decoder[0][0]) // num_frames

    def windows(self, start: int, stop: int, num_frames: int) -> Prepared:
        """Windows `start` to `stop - 1` of a batch, without copying them."""
        own = slice(start * num_frames, stop * num_frames)
        return Prepared(**{field.name: _part(getattr(self, field.name), own) for field in fields(Prepared)})


def _part(value: Any, own: slice) -> Any:
    if value is None or isinstance(value, Tensor):
        return None if value is None else value[own]
    return type(value)(_part(part, own) for part in value)


def _joined(values: Sequence[Any]) -> Any:
    first = values[0]
    if first is None:
        return None
    if isinstance(first, Tensor):
        return torch.cat(list(values))
    return type(first)(_joined(parts) for parts in zip(*values, strict=True))


class MVControlNet(Pretrained):
    """`model(noisy_latents, t, conditions, control_latents)` predicts the noise (or v, depending on its training).

    One class serves all variants: its conditions are a setting. With `first_frame_channels`, the window's first frame,
    which is clean in sequence variants, is repeated in additional channels of every frame. With `surround`, the control
    branch also takes the colours around the head box.
    """

    @with_config
    def __init__(
        self,
        condition_kinds: Sequence[ConditionKind] = ("audio", "identity"),
        num_frames: int = 8,
        latent_channels: int = 16,
        latent_px: int = 16,
        picture_px: int = 256,
        lip_px: int = 96,
        base_channels: int = 128,
        channel_multipliers: Sequence[int] = (1, 2, 4),
        blocks_per_scale: int = 2,
        attention_head_dim: int = 64,
        condition_dim: int = 128,
        time_embedding_dim: int = 128,
        dropout: float = 0.1,
        norm_groups: int = 32,
        pooled_conditions: bool = False,
        first_frame_channels: bool = False,
        control_embedding: Sequence[int] = (),
        surround: bool = False,
    ):
        super().__init__()
        self.conditions = ConditionEncoders(condition_kinds, condition_dim, picture_px, lip_px)
        in_channels = latent_channels * (2 if first_frame_channels else 1)
        shape = (
            base_channels,
            tuple(channel_multipliers),
            blocks_per_scale,
            time_embedding_dim,
            condition_dim,
            attention_head_dim,
            dropout,
            norm_groups,
        )
        pooled_dim = condition_dim * len(condition_kinds) if pooled_conditions else None
        self.video = VideoBranch(Encoder(in_channels, *shape, pooled_dim), Decoder(latent_channels, *shape))
        self.control = ControlBranch(
            Encoder(in_channels, *shape, pooled_dim), self.control_channels, control_embedding, base_channels
        )

    @property
    def control_channels(self) -> int:
        """Channels of the control latents."""
        return self.config.latent_channels * (2 if self.config.surround else 1)

    def blocks(self) -> Iterator[BasicBlock]:
        """The blocks of both branches."""
        return (module for module in self.modules() if isinstance(module, BasicBlock))

    @staticmethod
    def arguments_of(settings: Settings, variant: VariantName) -> dict[str, Any]:
        """The arguments that the settings give the network of `variant`."""
        row, resolved = VARIANTS[variant], settings.for_variant(variant)
        network = resolved.network
        return {
            "condition_kinds": row.conditions_with(resolved.lips.source),
            "num_frames": row.num_frames(resolved.window),
            "latent_channels": resolved.autoencoder.latent_channels,
            "latent_px": resolved.latent_px,
            "picture_px": resolved.picture_px,
            "lip_px": resolved.lips.size_px,
            "base_channels": network.base_channels,
            "channel_multipliers": network.channel_multipliers,
            "blocks_per_scale": network.blocks_per_scale,
            "attention_head_dim": network.attention_head_dim,
            "condition_dim": network.condition_dim,
            "time_embedding_dim": network.time_embedding_dim,
            "dropout": network.dropout,
            "norm_groups": network.norm_groups,
            "pooled_conditions": network.pooled_conditions,
            "first_frame_channels": network.first_frame_channels and row.continues,
            "control_embedding": network.control_embedding,
            "surround": "surround" in row.control_with(resolved.surround),
        }

    @classmethod
    def from_settings(cls, settings: Settings, variant: VariantName) -> MVControlNet:
        """A new network for `variant`. The caller determines its random weights (`torch.manual_seed`)."""
        model = cls(**cls.arguments_of(settings, variant))
        model.control.encoder.load_state_dict(model.video.encoder.state_dict())
        if settings.for_variant(variant).network.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        return model

    def forward(
        self,
        noisy_latents: Float[Tensor, "b c f h w"],
        t: Int[Tensor, "b f"],
        conditions: Conditions | Prepared,
        control_latents: Float[Tensor, "b c2 f h w"] | None = None,
    ) -> Float[Tensor, "b c f h w"]:
        """The prediction for every frame.

        t: diffusion time per frame, 0..num_train_timesteps-1; 0 for a clean first frame.
        conditions, control_latents: as for `prepare`; or the result of `prepare` alone, which saves its work.
        Raises ValueError if shapes disagree with each other or with the network.
        """
        self._check(noisy_latents, t)
        num_frames, times = int(noisy_latents.shape[2]), t.flatten()  # a constant in recordings too
        if isinstance(conditions, Conditions):
            conditions = self.prepare(conditions, control_latents, num_frames)
        x = noisy_latents
        if self.config.first_frame_channels:
            x = torch.cat([x, x[:, :, :1].expand_as(x)], dim=1)
        x = _frames(x)
        skips, middle, time = self.video.encoder(x, times, conditions.video, conditions.video_time, num_frames)
        if conditions.control is not None:
            *added, added_middle = self.control(
                x, times, conditions.control, conditions.control_time, num_frames, conditions.control_embedded
            )
            skips = [skip + extra for skip, extra in zip(skips, added, strict=True)]
            middle = middle + added_middle
        out = self.video.decoder(middle, skips, time, conditions.decoder, num_frames)
        return out.unflatten(0, (-1, num_frames)).transpose(1, 2)

    def prepare(
        self, conditions: Conditions, control_latents: Float[Tensor, "b c2 f h w"] | None, num_frames: int
    ) -> Prepared:
        """The part of `forward` that is the same at every step of a window.

        control_latents: the video-based condition, of the same shape as the input; with `surround` it has twice as many
        channels (`tccp.headbox.surround`). None runs the video branch without the control branch.
        Raises ValueError if shapes disagree with each other or with the network.
        """
        tokens, pooled = self.conditions(conditions, num_frames)
        self._check_control(len(tokens), control_latents, num_frames)
        tokens, pooled = tokens.flatten(0, 1), pooled.flatten(0, 1)
        encoder = self.video.encoder
        video = encoder.keys_values(tokens), self.video.decoder.keys_values(tokens), encoder.time.of_conditions(pooled)
        if control_latents is None:
            return Prepared(*video)
        embedded = self.control.zero_in(self.control.embed(_frames(control_latents)))
        encoder = self.control.encoder
        return Prepared(*video, encoder.keys_values(tokens), encoder.time.of_conditions(pooled), embedded)

    def _check(self, latents: Tensor, t: Tensor) -> None:
        if torch.jit.is_tracing():  # `tccp.models.traced` has evaluated these shapes before
            return
        channels, side = self.config.latent_channels, self.config.latent_px
        if latents.shape[1] != channels or latents.shape[3:] != (side, side):
            raise ValueError(
                f"latents are {tuple(latents.shape)}; this network takes (b, {channels}, f, {side}, {side})"
            )
        if t.shape != (latents.shape[0], latents.shape[2]):
            raise ValueError(
                f"t is {tuple(t.shape)}; it needs one time per frame, {latents.shape[0], latents.shape[2]}"
            )

    def _check_control(self, batch: int, control: Tensor | None, num_frames: int) -> None:
        side = self.config.latent_px
        needed = (batch, self.control_channels, num_frames, side, side)
        if control is not None and control.shape != needed:
            raise ValueError(
                f"control latents are {tuple(control.shape)}; this network takes {needed} with such latents"
            )

    def start_control_from(self, source: MVControlNet) -> None:
        """Takes video branch and condition encoders from `source`, and copies encoder and middle to the control branch.

        Resets the zero convolutions. Raises ValueError if the two networks differ in shape.
        """
        try:
            self.video.load_state_dict(source.video.state_dict())
            self.conditions.load_state_dict(source.conditions.state_dict())
        except RuntimeError as error:
            raise ValueError(f"the source network has another shape: {str(error).splitlines()[1].strip()}") from None
        self.control.encoder.load_state_dict(self.video.encoder.state_dict())
        for zero in (self.control.zero_in, *self.control.zero_out):
            zero_module(zero)

    def start_from_first(self, first: MVControlNet) -> None:
        """Starts from the weights of the first-frame variant of the same stage, so that only motion must be learned.

        Leaves out encoders of conditions that only the first-frame variant has. Weights of input channels that only
        this network has (`first_frame_channels`) start at zero. Raises ValueError if the two differ otherwise.
        """
        mine, theirs = self.state_dict(), first.state_dict()
        taken = {name: value for name, value in theirs.items() if name in mine or not name.startswith("conditions.")}
        dim, kinds = self.config.condition_dim, list(first.config.condition_kinds)
        for branch in ("video", "control"):
            name = f"{branch}.encoder.conv_in.weight"
            taken[name] = torch.zeros_like(mine[name])
            channels = min(mine[name].shape[1], theirs[name].shape[1])
            taken[name][:, :channels] = theirs[name][:, :channels]
            name = f"{branch}.encoder.time.pooled.0.weight"  # its inputs are the kinds' tokens, concatenated
            if name in mine and name in theirs:
                starts = [kinds.index(kind) * dim for kind in self.config.condition_kinds]
                taken[name] = torch.cat([theirs[name][:, at : at + dim] for at in starts], dim=1)
        try:
            self.load_state_dict(taken)
        except RuntimeError as error:
            reason = str(error).splitlines()[1].strip()
            raise ValueError(f"the first-frame network has another shape: {reason}") from None

    def enable_gradient_checkpointing(self) -> None:
        """Trains with less memory: activations inside the blocks are computed again."""
        for block in self.blocks():
            block.gradient_checkpointing = True

    def compile_blocks(self) -> None:
        """Compiles the blocks with torch.compile. Compiling the whole network would take many times as long."""
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)  # one per shape
        for block in self.blocks():
            block.compile(dynamic=False)

    def freeze_video_branch(self) -> None:
        """Trains only the control branch from now on: "the video diffusion branch can be reused" (section 4.3)."""
        self.video.requires_grad_(False)
        self.conditions.requires_grad_(False)


def _frames(latents: Float[Tensor, "b c f h w"]) -> Float[Tensor, "bf c h w"]:
    return latents.transpose(1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)
