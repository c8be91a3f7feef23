"""The forward process, the prediction target and the training loss (paper section 3 and Eq. 8)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tccp.config import DiffusionSettings
from tccp.models.conditions import Conditions
from tccp.models.mvcontrolnet import MVControlNet

CLEAN_TIME = 0
"""The network's diffusion time for a clean first frame."""


@dataclass(frozen=True)
class NoiseSchedule:
    """q(z_t | z_0) = N(sqrt(abar_t) z_0, (1 - abar_t) I), t = 0..T-1 (Eqs. 1, 2)."""

    alphas_cumprod: Float[Tensor, " T"]  # double precision
    prediction: Literal["epsilon", "v"]

    @classmethod
    def from_settings(cls, settings: DiffusionSettings) -> NoiseSchedule:
        betas = torch.linspace(
            settings.beta_start, settings.beta_end, settings.num_train_timesteps, dtype=torch.float64
        )
        alphas_cumprod = torch.cumprod(1 - betas, dim=0)
        if settings.zero_terminal_snr:  # Lin et al. 2024, Algorithm 1: shifts the last signal to zero, keeps the first
            signal = alphas_cumprod.sqrt()
            alphas_cumprod = ((signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])) ** 2
        return cls(alphas_cumprod, settings.prediction)

    @property
    def num_train_timesteps(self) -> int:
        return len(self.alphas_cumprod)

    def coefficients(self, t: Int[Tensor, "b f"]) -> tuple[Float[Tensor, "b 1 f 1 1"], Float[Tensor, "b 1 f 1 1"]]:
        """sqrt(abar_t) and sqrt(1 - abar_t), shaped to multiply latents."""
        abar = self.alphas_cumprod.to(t.device)[t][:, None, :, None, None]
        return abar.sqrt().float(), (1 - abar).sqrt().float()

    def add_noise(
        self, latents: Float[Tensor, "b c f h w"], noise: Float[Tensor, "b c f h w"], t: Int[Tensor, "b f"]
    ) -> Float[Tensor, "b c f h w"]:
        signal, sigma = self.coefficients(t)
        return signal * latents + sigma * noise

    def target(
        self, latents: Float[Tensor, "b c f h w"], noise: Float[Tensor, "b c f h w"], t: Int[Tensor, "b f"]
    ) -> Float[Tensor, "b c f h w"]:
        """The prediction target: the noise (Eq. 5), or v = sqrt(abar) eps - sqrt(1 - abar) z_0."""
        if self.prediction == "epsilon":
            return noise
        signal, sigma = self.coefficients(t)
        return signal * noise - sigma * latents

    def clean(
        self, noisy: Float[Tensor, "b c f h w"], predicted: Float[Tensor, "b c f h w"], t: Int[Tensor, "b f"]
    ) -> Float[Tensor, "b c f h w"]:
        """The clean latents that correspond to a prediction."""
        signal, sigma = self.coefficients(t)
        return signal * noisy - sigma * predicted if self.prediction == "v" else (noisy - sigma * predicted) / signal

    def noise(
        self, noisy: Float[Tensor, "b c f h w"], predicted: Float[Tensor, "b c f h w"], t: Int[Tensor, "b f"]
    ) -> Float[Tensor, "b c f h w"]:
        """The noise that corresponds to a prediction."""
        signal, sigma = self.coefficients(t)
        return sigma * noisy + signal * predicted if self.prediction == "v" else predicted


def window_loss(
    model: MVControlNet,
    schedule: NoiseSchedule,
    latents: Float[Tensor, "b c f h w"],
    noise: Float[Tensor, "b c f h w"],
    t: Int[Tensor, " b"],
    conditions: Conditions,
    control_latents: Float[Tensor, "b c2 f h w"] | None,
    initial: Float[Tensor, "b c h w"] | None = None,
    weight: Float[Tensor, "b f h w"] | None = None,
) -> Float[Tensor, " b"]:
    """Mean squared prediction error, one value per window (Eq. 6).

    latents: clean, normalised by the auto-encoder.
    t: diffusion time per window, 0..T-1.
    initial: the clean first frame that the window continues (Eq. 8). It gets no noise and time 0, and the loss leaves
        it out. None for windows that start from noise only (the first-frame variants).
    weight: of each latent in the mean, at least 0; None: all count alike. A window without weight has the loss 0.
    """
    num_frames = latents.shape[2]
    times = t[:, None].expand(-1, num_frames)
    noisy = schedule.add_noise(latents, noise, times)
    target = schedule.target(latents, noise, times)
    if initial is not None:
        times = torch.cat([torch.full_like(times[:, :1], CLEAN_TIME), times[:, 1:]], dim=1)
        noisy = torch.cat([initial.unsqueeze(2), noisy[:, :, 1:]], dim=2)
    predicted = model(noisy, times, conditions, control_latents)
    start = 0 if initial is None else 1
    error = (predicted[:, :, start:] - target[:, :, start:]) ** 2
    if weight is None:
        return error.mean(dim=(1, 2, 3, 4))
    counted = weight[:, start:]
    total = counted.sum(dim=(1, 2, 3))
    return (error.mean(dim=1) * counted).sum(dim=(1, 2, 3)) / torch.where(total > 0, total, 1)
