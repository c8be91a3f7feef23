"""MVControlNet: a video diffusion branch and a control branch that copies its encoder and middle (section 4.3)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from tccp.config import Settings
from tccp.models.conditions import ConditionEncoders, Conditions
from tccp.models.variants import VARIANTS, ConditionKind, VariantName
from tccp.models.video_unet import Decoder, Encoder, zero_module


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
        self.zero_in = zero_module(nn.Conv2d(base_channels, base_channels, 1))
        widths = encoder.skip_channels
        self.zero_out = nn.ModuleList([zero_module(nn.Conv2d(c, c, 1)) for c in [*widths, widths[-1]]])

    def forward(
        self, x: Tensor, t: Tensor, tokens: Tensor, pooled: Tensor, num_frames: int, control: Tensor
    ) -> list[Tensor]:
        """The tensors to add to the video branch's skips and, as the last one, to its middle."""
        added = self.zero_in(self.embed(control))
        skips, middle, _ = self.encoder(x, t, tokens, pooled, num_frames, added=added)
        return [zero(y) for zero, y in zip(self.zero_out, [*skips, middle], strict=True)]


class MVControlNet(ModelMixin, ConfigMixin):
    """`model(noisy_latents, t, conditions, control_latents)` predicts the noise (or v, depending on its training).

    One class serves all variants: its conditions are a setting. With `first_frame_channels`, the window's first frame,
    which is clean in sequence variants, is repeated in additional channels of every frame. With `surround`, the control
    branch also takes the colours around the head box.
    """

    _supports_gradient_checkpointing = True
    _repeated_blocks = ("BasicBlock",)  # for compile_repeated_blocks

    @register_to_config
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
        self.control.encoder.load_state_dict(self.video.encoder.state_dict())

    @property
    def control_channels(self) -> int:
        """Channels of the control latents."""
        return self.config.latent_channels * (2 if self.config.surround else 1)

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
        if settings.for_variant(variant).network.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        return model

    def forward(
        self,
        noisy_latents: Float[Tensor, "b c f h w"],
        t: Int[Tensor, "b f"],
        conditions: Conditions,
        control_latents: Float[Tensor, "b c2 f h w"] | None,
    ) -> Float[Tensor, "b c f h w"]:
        """The prediction for every frame.

        t: diffusion time per frame, 0..num_train_timesteps-1; 0 for a clean first frame.
        control_latents: the video-based condition, of the same shape as the input; with `surround` it has twice as many
        channels (`tccp.headbox.surround`). None runs the video branch without the control branch.
        Raises ValueError if shapes disagree with each other or with the network.
        """
        self._check(noisy_latents, t, control_latents)
        num_frames = noisy_latents.shape[2]
        tokens, pooled = self.conditions(conditions, num_frames)
        tokens, pooled, times = tokens.flatten(0, 1), pooled.flatten(0, 1), t.flatten()
        x = noisy_latents
        if self.config.first_frame_channels:
            x = torch.cat([x, x[:, :, :1].expand_as(x)], dim=1)
        x = rearrange(x, "b c f h w -> (b f) c h w")

        skips, middle, time = self.video.encoder(x, times, tokens, pooled, num_frames)
        if control_latents is not None:
            control = rearrange(control_latents, "b c f h w -> (b f) c h w")
            *added, added_middle = self.control(x, times, tokens, pooled, num_frames, control)
            skips = [skip + extra for skip, extra in zip(skips, added, strict=True)]
            middle = middle + added_middle
        out = self.video.decoder(middle, skips, time, tokens, num_frames)
        return rearrange(out, "(b f) c h w -> b c f h w", f=num_frames)

    def _check(self, latents: Tensor, t: Tensor, control: Tensor | None) -> None:
        channels, side = self.config.latent_channels, self.config.latent_px
        if latents.shape[1] != channels or latents.shape[3:] != (side, side):
            raise ValueError(
                f"latents are {tuple(latents.shape)}; this network takes (b, {channels}, f, {side}, {side})"
            )
        if t.shape != (latents.shape[0], latents.shape[2]):
            raise ValueError(
                f"t is {tuple(t.shape)}; it needs one time per frame, {latents.shape[0], latents.shape[2]}"
            )
        needed = (latents.shape[0], self.control_channels, *latents.shape[2:])
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

    def compile_blocks(self) -> None:
        """Compiles the blocks with torch.compile. Compiling the whole network would take many times as long."""
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)  # one per shape
        self.compile_repeated_blocks(dynamic=False)

    def freeze_video_branch(self) -> None:
        """Trains only the control branch from now on: "the video diffusion branch can be reused" (section 4.3)."""
        self.video.requires_grad_(False)
        self.conditions.requires_grad_(False)
