"""The loaded components of a pipeline folder: settings, auto-encoder, networks and lip source."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from tccp.config import Settings
from tccp.diffusion.chains import Stage
from tccp.diffusion.sampling import Network
from tccp.diffusion.schedule import NoiseSchedule
from tccp.errors import TccpError
from tccp.inference.encoding import Encoder
from tccp.inference.manifest import read_settings
from tccp.inference.pipeline_folder import check_network, load_autoencoder, load_network, verified
from tccp.models.autoencoder import PictureAutoencoder
from tccp.models.lip_sources import LipSource, open_lip_source
from tccp.models.mvcontrolnet import MVControlNet
from tccp.models.traced import TracedNetwork
from tccp.models.variants import FIRST_OF, TWO_STAGE, VariantName


@dataclass(frozen=True)
class Components:
    """The loaded parts of a pipeline. All networks are on one device and in evaluation mode."""

    settings: Settings
    autoencoder: PictureAutoencoder
    networks: Mapping[VariantName, MVControlNet]
    lips: LipSource | None
    device: torch.device
    _traced: dict[VariantName, TracedNetwork] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def encoder(self) -> Encoder:
        return Encoder(self.autoencoder, self.settings)

    def _network(self, name: VariantName, traced: bool) -> Network:
        if not traced:
            return self.networks[name]
        if name not in self._traced:
            self._traced[name] = TracedNetwork(self.networks[name])
        return self._traced[name]

    def stage(self, sequence: VariantName, traced: bool = False) -> Stage:
        """The chain of the first-frame network and then the network `sequence`.

        traced: networks that are evaluated often are recorded (`tccp.models.traced`); they must not change any more.
        """
        first = FIRST_OF[sequence]
        settings, first_settings = self.settings.for_variant(sequence), self.settings.for_variant(first)
        schedule = NoiseSchedule.from_settings(settings.diffusion)
        networks = self._network(first, traced), self._network(sequence, traced)
        return Stage(*networks, schedule, first_settings.sampling, settings.sampling)


def load_components(
    folder: Path,
    variants: Iterable[VariantName] = TWO_STAGE,
    *,
    preset: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    lip_weights: Path | None = None,
) -> Components:
    """Loads a local pipeline folder and checks every file against the manifest.

    preset: raise TccpError if the folder's weights are of another preset. dtype: weights and arithmetic of the networks
    and the auto-encoder; the latents between them and the lip source stay in single precision. lip_weights: replace the
    folder's lip weights.
    Raises TccpError for a folder that is missing, incomplete or damaged.
    """
    settings = read_settings(folder)
    if preset is not None and settings.preset != preset:
        raise TccpError(
            f"{folder} holds weights of preset {settings.preset!r}, not {preset!r}: "
            f"give the weights of {preset!r}, or --preset {settings.preset}"
        )
    autoencoder = load_autoencoder(folder, device, dtype)
    lips = None
    if settings.lips.source != "none":
        lips = open_lip_source(settings.lips, lip_weights or verified(folder, "lips"), device)
    networks = {name: load_network(folder, name, device, dtype) for name in variants}
    for name, network in networks.items():
        check_network(folder, settings, name, network)
    return Components(settings, autoencoder, networks, lips, torch.device(device))
