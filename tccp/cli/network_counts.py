"""Counts a preset's parameters, and the floating-point operations of one network evaluation on one window."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from tccp.config import Settings
from tccp.models.conditions import Conditions
from tccp.models.mvcontrolnet import MVControlNet
from tccp.models.variants import VARIANTS


def describe(settings: Settings) -> list[dict[str, Any]]:
    """One row per variant. The real modules are built on torch's meta device: exact counts without memory."""
    rows = []
    for name, row in VARIANTS.items():
        resolved = settings.for_variant(name)
        frames, side = row.num_frames(resolved.window), resolved.latent_px
        with torch.device("meta"):
            model = MVControlNet.from_settings(settings, name).eval()
            latents = torch.empty(1, resolved.autoencoder.latent_channels, frames, side, side)
            lips = resolved.lips.size_px
            conditions = Conditions(
                audio=torch.empty(1, frames, 80, 16),
                identity=torch.empty(1, 3, resolved.picture_px, resolved.picture_px),
                lips=torch.empty(1, frames, 3, lips, lips),
            )
            times = torch.zeros(1, frames, dtype=torch.long)
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                model(latents, times, conditions, torch.empty(1, model.control_channels, frames, side, side))
        rows.append(
            {
                "variant": name,
                "params": sum(p.numel() for p in model.parameters()),
                "control_params": sum(p.numel() for p in model.control.parameters()),
                "gflop_per_window": round(counter.get_total_flops() / 1e9, 3),
                "frames": frames,
                "latents": [resolved.autoencoder.latent_channels, side, side],
            }
        )
    return rows
