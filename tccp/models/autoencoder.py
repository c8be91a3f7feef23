"""The auto-encoder of latent diffusion, with the normalisation of latents.

Latents of landmark pictures, faces and masked scenes have different means and deviations, so each kind of picture is
normalised by its own statistics per channel. Outside this module latents are always normalised.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from tccp.config import AutoencoderSettings
from tccp.errors import TccpError
from tccp.models.autoencoder_network import AutoencoderNetwork, Posterior
from tccp.models.variants import PICTURE_KINDS, PictureKind
from tccp.strict_json import parse_json

STATISTICS_FILE = "latent_statistics.json"
INITIAL_LOG_VARIANCE = -6.0


def to_model(pictures: UInt8[Tensor, "*n h w 3"]) -> Float[Tensor, "*n 3 h w"]:
    """Converts pictures from bytes to the models' range [-1, 1]."""
    return pictures.movedim(-1, -3).float() / 127.5 - 1


def to_bytes(pictures: Float[Tensor, "*n 3 h w"]) -> UInt8[Tensor, "*n h w 3"]:
    """Inverse of `to_model`. Rounds, and clips values outside [-1, 1]."""
    return ((pictures.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).movedim(-3, -1)


def _unfolded(pictures: Float[Tensor, "bf c h w"], num_frames: int) -> Float[Tensor, "b c f h w"]:
    return pictures.unflatten(0, (-1, num_frames)).transpose(1, 2)


class PictureAutoencoder(nn.Module):
    """Converts pictures `b 3 f h w` in [-1, 1] to normalised latents `b c f h w` and back, frame by frame.

    If the network takes more than 3 channels, patches of pixels are folded into channels, because convolutions at full
    resolution take most of the time of a small auto-encoder.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, vae: AutoencoderNetwork):
        super().__init__()
        self.vae = vae
        channels = vae.config.latent_channels
        self.register_buffer("mean", torch.zeros(len(PICTURE_KINDS), channels))
        self.register_buffer("std", torch.ones(len(PICTURE_KINDS), channels))

    @classmethod
    def from_settings(cls, settings: AutoencoderSettings) -> PictureAutoencoder:
        levels = len(settings.block_channels)
        vae = AutoencoderNetwork(
            in_channels=3 * settings.patch**2,
            out_channels=3 * settings.patch**2,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=settings.block_channels,
            layers_per_block=settings.layers_per_block,
            latent_channels=settings.latent_channels,
            norm_num_groups=settings.norm_groups,
            mid_block_add_attention=settings.mid_attention,
            decoder_folded_levels=settings.decoder_folded_levels,
        )
        # The posterior starts narrow. With the default deviation of 1, the decoder would spend most of a short training
        # on learning to separate latents from their own noise.
        assert vae.quant_conv.bias is not None
        torch.nn.init.constant_(vae.quant_conv.bias[settings.latent_channels :], INITIAL_LOG_VARIANCE)
        return cls(vae)

    @property
    def downsampling(self) -> int:
        return self.patch * 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def patch(self) -> int:
        return math.isqrt(self.vae.config.in_channels // 3)

    @property
    def latent_channels(self) -> int:
        return self.vae.config.latent_channels

    @property
    def decoder_folded_levels(self) -> int:
        return self.vae.config.decoder_folded_levels

    def with_folded_decoder(self, folded_levels: int) -> PictureAutoencoder:
        """A copy with the same encoder and statistics, whose decoder folds another number of levels.

        Levels that both decoders have keep their weights; the rest is random.
        Raises ValueError if the decoder would keep no level.
        """
        autoencoder = PictureAutoencoder(self.vae.with_folded_decoder(folded_levels)).to(self.mean.device)
        autoencoder.mean.copy_(self.mean)
        autoencoder.std.copy_(self.std)
        return autoencoder

    def _scale(self, kind: PictureKind) -> tuple[Tensor, Tensor]:
        row = PICTURE_KINDS.index(kind)
        return self.mean[row].view(1, -1, 1, 1, 1), self.std[row].view(1, -1, 1, 1, 1)

    def posterior(self, pictures: Float[Tensor, "n 3 h w"]) -> Posterior:
        """Distribution of the raw latents of single pictures."""
        return self.vae.encode(nn.functional.pixel_unshuffle(pictures.to(self.vae.dtype), self.patch))

    def reconstruct(self, raw: Float[Tensor, "n c hl wl"]) -> Float[Tensor, "n 3 h w"]:
        """Pictures from raw latents."""
        return nn.functional.pixel_shuffle(self.vae.decode(raw.to(self.vae.dtype)), self.patch)

    def encode(self, pictures: Float[Tensor, "b 3 f h w"], kind: PictureKind) -> Float[Tensor, "b c f hl wl"]:
        """Mean of the posterior, normalised for its kind."""
        mean, std = self._scale(kind)
        raw = self.posterior(pictures.transpose(1, 2).flatten(0, 1)).mean.to(mean.dtype)
        return (_unfolded(raw, pictures.shape[2]) - mean) / std

    def decode(self, latents: Float[Tensor, "b c f hl wl"], kind: PictureKind) -> Float[Tensor, "b 3 f h w"]:
        mean, std = self._scale(kind)
        pictures = self.reconstruct((latents * std + mean).transpose(1, 2).flatten(0, 1)).to(mean.dtype)
        return _unfolded(pictures, latents.shape[2])

    @torch.no_grad()
    def fit_statistics(self, pictures: Mapping[PictureKind, Iterable[Float[Tensor, "n 3 h w"]]]) -> None:
        """Sets the mean and deviation of each kind per channel from batches of pictures, in one pass over them.

        Raises TccpError if a kind has no pictures.
        """
        for kind, batches in pictures.items():
            count = 0
            total = squares = torch.zeros_like(self.mean[0], dtype=torch.float64)
            for batch in batches:
                raw = self.posterior(batch.to(self.mean.device)).mean.double()
                values = raw.transpose(0, 1).flatten(1)
                count += values.shape[1]
                total, squares = total + values.sum(dim=1), squares + (values**2).sum(dim=1)
            if not count:
                raise TccpError(f"no pictures of kind {kind!r} to fit latent statistics on")
            mean = total / count
            row = PICTURE_KINDS.index(kind)
            self.mean[row] = mean
            self.std[row] = (squares / count - mean**2).clamp_min(1e-8).sqrt()

    def save(self, folder: Path) -> None:
        """Writes a diffusers AutoencoderKL folder with one additional file, the latent statistics."""
        self.vae.save_pretrained(folder)
        statistics = {
            kind: {"mean": self.mean[row].tolist(), "std": self.std[row].tolist()}
            for row, kind in enumerate(PICTURE_KINDS)
        }
        (folder / STATISTICS_FILE).write_text(json.dumps(statistics, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype = torch.float32) -> PictureAutoencoder:
        """Loads a folder that `save` wrote, or any AutoencoderKL folder. Without statistics, fit them before use.

        Raises TccpError if it is no such folder.
        """
        try:
            autoencoder = cls(AutoencoderNetwork.from_pretrained(folder, dtype))
        except (OSError, ValueError) as error:
            raise TccpError(f"{folder} is not a diffusers AutoencoderKL folder: {str(error).splitlines()[0]}") from None
        path = folder / STATISTICS_FILE
        if path.exists():
            try:
                statistics = parse_json(path.read_bytes())
                for row, kind in enumerate(PICTURE_KINDS):
                    autoencoder.mean[row] = torch.tensor(statistics[kind]["mean"], dtype=torch.float32)
                    autoencoder.std[row] = torch.tensor(statistics[kind]["std"], dtype=torch.float32)
            except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
                reason = str(error).splitlines()[0]
                raise TccpError(
                    f"{path} is damaged ({type(error).__name__}: {reason}): copy the folder again"
                ) from None
        return autoencoder
