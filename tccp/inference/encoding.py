"""Encodes pictures to latents and decodes them, in batches, and builds the inputs of networks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from tccp.config import Settings
from tccp.diffusion.chains import FrameInputs
from tccp.inference.conditioning import control_kinds, latent_kind, picture_of, zero_if_hidden
from tccp.models.autoencoder import PictureAutoencoder, to_bytes, to_model
from tccp.models.variants import ControlKind, PictureKind, Variant

BATCH = 64
"""Largest number of pictures per evaluation of the auto-encoder."""


class Encoder:
    """Encodes uint8 pictures of consecutive frames with the auto-encoder of a pipeline."""

    def __init__(self, autoencoder: PictureAutoencoder, settings: Settings):
        self.autoencoder = autoencoder
        self.settings = settings

    @property
    def device(self) -> torch.device:
        return self.autoencoder.mean.device

    def tensor(self, pictures: UInt8[np.ndarray, "*n h w 3"] | UInt8[Tensor, "*n h w 3"]) -> Float[Tensor, "*n 3 h w"]:
        """Converts pictures to the networks' format: -1..1, on the pipeline's device."""
        if isinstance(pictures, np.ndarray):
            pictures = torch.from_numpy(np.ascontiguousarray(pictures))
        return to_model(pictures.to(self.device))

    def encode(
        self,
        pictures: UInt8[np.ndarray, "f s s 3"] | UInt8[Tensor, "f s s 3"],
        kind: PictureKind | ControlKind,
    ) -> Float[Tensor, "f c h w"]:
        """Normalised latents of these pictures, in single precision."""
        with torch.inference_mode():
            parts = [
                self.autoencoder.encode(self.tensor(pictures[start : start + BATCH]).unsqueeze(2), latent_kind(kind))
                for start in range(0, len(pictures), BATCH)
            ]
            latents = torch.cat(parts).squeeze(2)
        return latents.clone()  # cloned outside inference mode: an ordinary tensor

    def decode(self, latents: Float[Tensor, "f c h w"], kind: PictureKind) -> UInt8[np.ndarray, "f s s 3"]:
        """Pictures of these latents, rounded to bytes; the inverse of `encode`."""
        with torch.inference_mode():
            parts = [
                to_bytes(self.autoencoder.decode(part.unsqueeze(2), kind).squeeze(2)) for part in latents.split(BATCH)
            ]
            return torch.cat(parts).cpu().numpy()

    def control(
        self,
        row: Variant,
        fields: Mapping[str, Any],
        known: Mapping[ControlKind, Float[Tensor, "f c h w"]] | None = None,
    ) -> Float[Tensor, "f c2 h w"]:
        """The control latents of a variant's network.

        fields: as for `picture_of`. known: latents by kind to use instead of encoding pictures, such as those
        that stage 1 generated.
        """
        parts = []
        for kind in control_kinds(row, self.settings):
            latents = None if known is None else known.get(kind)
            latents = self.encode(picture_of(kind, fields), kind) if latents is None else latents
            parts.append(zero_if_hidden(kind, latents, self.settings))
        return torch.cat(parts, dim=1)

    def inputs(
        self,
        row: Variant,
        fields: Mapping[str, Any],
        mel: Float[np.ndarray, "f 80 16"] | None = None,
        lips: UInt8[np.ndarray, "f l l 3"] | None = None,
        known: Mapping[ControlKind, Float[Tensor, "f c h w"]] | None = None,
    ) -> list[FrameInputs]:
        """The inputs of a variant's network, frame by frame. fields, known: as for `control`.

        mel: audio windows. lips: lip references. A network without such a condition ignores them.
        """
        control = self.control(row, fields, known)
        audio = [None] * len(control) if mel is None else torch.from_numpy(mel).to(self.device).unbind()
        pictures = [None] * len(control) if lips is None else self.tensor(lips).unbind()
        return [FrameInputs(*frame) for frame in zip(control.unbind(), audio, pictures, strict=True)]
