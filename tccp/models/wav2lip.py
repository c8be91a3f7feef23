"""Wav2Lip's generator (Prajwal et al. 2020, arXiv 2008.10010), in the layout of the published checkpoints.

Only the layout comes from the authors' release: names and shapes of the tensors, strides and paddings, which the
checkpoints determine. A picture encoder and an audio encoder both end in a 512-vector. The decoder starts from the
audio vector and adds the picture encoder's outputs level by level. 36,298,035 parameters.
"""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tccp.models.checkpoint import load_published

SIZE_PX = 96
"""The picture size that the published weights were trained for."""


class ConvBlock(nn.Module):
    """Convolution (or transposed convolution), batch norm, ReLU; a residual block adds its input before the ReLU."""

    def __init__(self, conv: nn.Conv2d | nn.ConvTranspose2d, residual: bool = False) -> None:
        super().__init__()
        self.conv_block = nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels))
        self.residual = residual

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        y = self.conv_block(x)
        return torch.relu(y + x if self.residual else y)


def _conv(c_in: int, c_out: int, kernel: int, stride: int | tuple[int, int] = 1, padding: int = 0) -> ConvBlock:
    return ConvBlock(nn.Conv2d(c_in, c_out, kernel, stride, padding))


def _residuals(channels: int, count: int) -> list[ConvBlock]:
    return [ConvBlock(nn.Conv2d(channels, channels, 3, 1, 1), residual=True) for _ in range(count)]


def _down(c_in: int, c_out: int, residuals: int, stride: int | tuple[int, int] = 2) -> nn.Sequential:
    return nn.Sequential(_conv(c_in, c_out, 3, stride, 1), *_residuals(c_out, residuals))


def _up(c_in: int, c_out: int, residuals: int) -> nn.Sequential:
    conv = nn.ConvTranspose2d(c_in, c_out, 3, stride=2, padding=1, output_padding=1)
    return nn.Sequential(ConvBlock(conv), *_residuals(c_out, residuals))


class Wav2Lip(nn.Module):
    """The generator. Use it in `eval()` mode, because batch norm must use the stored statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.face_encoder_blocks = nn.ModuleList(
            [
                nn.Sequential(_conv(6, 16, 7, padding=3)),  # 96 px
                _down(16, 32, residuals=2),  # 48
                _down(32, 64, residuals=3),  # 24
                _down(64, 128, residuals=2),  # 12
                _down(128, 256, residuals=2),  # 6
                _down(256, 512, residuals=1),  # 3
                nn.Sequential(_conv(512, 512, 3), _conv(512, 512, 1)),  # 1
            ]
        )
        self.audio_encoder = nn.Sequential(
            *_down(1, 32, residuals=2, stride=1),  # 80 bands x 16 columns
            *_down(32, 64, residuals=2, stride=(3, 1)),  # 27 x 16
            *_down(64, 128, residuals=2, stride=3),  # 9 x 6
            *_down(128, 256, residuals=1, stride=(3, 2)),  # 3 x 3
            _conv(256, 512, 3),  # 1 x 1
            _conv(512, 512, 1),
        )
        # The input of each level but the first is the output of the level before, concatenated with the picture
        # encoder's output of the same size.
        self.face_decoder_blocks = nn.ModuleList(
            [
                nn.Sequential(_conv(512, 512, 1)),  # 1 px
                nn.Sequential(ConvBlock(nn.ConvTranspose2d(512 + 512, 512, 3)), *_residuals(512, 1)),  # 3
                _up(512 + 512, 512, residuals=2),  # 6
                _up(512 + 256, 384, residuals=2),  # 12
                _up(384 + 128, 256, residuals=2),  # 24
                _up(256 + 64, 128, residuals=2),  # 48
                _up(128 + 32, 64, residuals=2),  # 96
            ]
        )
        self.output_block = nn.Sequential(_conv(64 + 16, 32, 3, padding=1), nn.Conv2d(32, 3, 1), nn.Sigmoid())

    def forward(self, mel: Float[Tensor, "b 1 80 16"], faces: Float[Tensor, "b 6 96 96"]) -> Float[Tensor, "b 3 96 96"]:
        """The face with its mouth moved to the sound, BGR in 0..1.

        mel: Wav2Lip's own look-ahead window (`tccp.media.mel.wav2lip_windows`), in [-4, 4].
        faces: BGR in 0..1; channels 0-2 the target with its lower half black, 3-5 the reference picture.
        """
        features = []
        x = faces
        for block in self.face_encoder_blocks:
            x = block(x)
            features.append(x)
        x = self.audio_encoder(mel)
        for block, feature in zip(self.face_decoder_blocks, reversed(features), strict=True):
            x = torch.cat((block(x), feature), dim=1)
        return self.output_block(x)


def load_wav2lip(path: Path) -> Wav2Lip:
    """The 96 px generator with published weights. Raises TccpError like `load_published`."""
    advice = "give the published wav2lip.pth, or set lips.source"
    return load_published(path, Wav2Lip(), "Wav2Lip", advice)
