"""A worker of benchmarks/speed.py: measures the networks of the tree on PYTHONPATH, with random weights.

It must run in earlier commits too: names that have moved since are tried in both places.
"""

from __future__ import annotations

import functools
import inspect
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from speed_workers import cpu_seconds, serve
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tccp.config import PRESETS, Settings, override
from tccp.models.autoencoder import PictureAutoencoder
from tccp.models.conditions import Conditions
from tccp.models.mvcontrolnet import MVControlNet

try:
    from tccp.inference.pipeline_folder import load_network, write_untrained
except ImportError:
    from tccp.pipeline import load_network, write_untrained  # type: ignore[import-not-found,no-redef]
try:
    from tccp.inference.pipeline_folder import load_autoencoder
    from tccp.models.layers import join_weights
except ImportError:

    def load_autoencoder(folder: Path) -> PictureAutoencoder:
        return PictureAutoencoder.load(folder / "autoencoder").eval()

    def join_weights(network: torch.nn.Module) -> None:
        pass


MATMUL = 2048
"""Side of the matrices whose product measures the core's rate."""


@functools.cache
def _settings(preset: str, changes: str) -> Settings:
    """changes: dotted settings to change, as the JSON text of a mapping."""
    return override(PRESETS[preset](), json.loads(changes))  # type: ignore[index]


@functools.cache
def _network(preset: str, changes: str, variant: str) -> MVControlNet:
    """A network as a command loads and samples with it."""
    with tempfile.TemporaryDirectory() as folder:
        write_untrained(Path(folder), _settings(preset, changes), (variant,))  # type: ignore[arg-type]
        network = load_network(Path(folder), variant)  # type: ignore[arg-type]
    join_weights(network)
    return network


@functools.cache
def _autoencoder(preset: str, changes: str) -> PictureAutoencoder:
    with tempfile.TemporaryDirectory() as folder:
        write_untrained(Path(folder), _settings(preset, changes), ())
        return load_autoencoder(Path(folder))


@functools.cache
def _matrices(side: int) -> tuple[Tensor, Tensor]:
    return torch.randn(side, side), torch.randn(side, side)


def matmul_gflops(side: int = MATMUL) -> float:
    """The core's rate of fp32 matrix products, in GFLOP per second of CPU time."""
    a, b = _matrices(side)
    return 2 * side**3 / cpu_seconds(lambda: a @ b, 3) / 1e9


def _inputs(network: MVControlNet, batch: int) -> tuple[Tensor, Tensor, Conditions, Tensor]:
    """Random inputs of a network on its window: noisy latents, times, conditions, control latents."""
    config = network.config
    side, frames = config.latent_px, config.num_frames
    conditions = {
        "audio": torch.randn(batch, frames, 80, 16),
        "identity": torch.randn(batch, 3, config.picture_px, config.picture_px),
        "lips": torch.randn(batch, frames, 3, config.lip_px, config.lip_px),
    }
    return (
        torch.randn(batch, config.latent_channels, frames, side, side),
        torch.full((batch, frames), 500),
        Conditions(**{kind: conditions[kind] for kind in config.condition_kinds}),
        torch.randn(batch, network.control_channels, frames, side, side),
    )


def _gflop(call: Any) -> float:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() / 1e9


@torch.no_grad()
def evaluation(
    preset: str, changes: str, variant: str, batch: int = 1, recorded: bool = False, repeats: int = 1
) -> dict[str, float]:
    """One evaluation as sampling makes it at each step.

    recorded: from a recording (`tccp.models.traced`), as generation does after the first evaluations. Returns the CPU
    time, the operations, and the higher of the rates of matrix products before and after. prepare_ms: what is computed
    once for a window; earlier commits compute it in each evaluation.
    """
    network = _network(preset, changes, variant)
    latents, times, conditions, control = _inputs(network, batch)
    prepare_s = 0.0
    if hasattr(network, "prepare"):
        frames = latents.shape[2]
        prepare_s = cpu_seconds(lambda: network.prepare(conditions, control, frames), repeats)
        given: tuple[Any, ...] = (network.prepare(conditions, control, frames),)
    else:
        given = (conditions, control)
    gflop = _gflop(lambda: network(latents, times, *given))
    called: Any = network
    if recorded:
        called = _recording(preset, changes, variant)
        called(latents, times, *given)
    rate = matmul_gflops()
    seconds = cpu_seconds(lambda: called(latents, times, *given), repeats)
    rate = max(rate, matmul_gflops())
    return {
        "evaluation_ms": 1000 * seconds,
        "prepare_ms": 1000 * prepare_s,
        "gflop": gflop,
        "matmul_gflops": rate,
        "share_of_matmul": gflop / seconds / rate,
    }


@functools.cache
def _recording(preset: str, changes: str, variant: str) -> Any:
    from tccp.models import traced

    traced.EAGER_CALLS = 0  # records a shape when it first occurs, not after many evaluations
    return traced.TracedNetwork(_network(preset, changes, variant))


@torch.inference_mode()
def autoencoder(preset: str, changes: str, encode: bool = True) -> dict[str, float]:
    """CPU time per frame of encoding and decoding as many frames as generation does at once.

    encode: measure encoding, too. decoded_pictures: how many pictures generation decodes per frame; earlier commits
    decode landmark pictures, too.
    """
    model = _autoencoder(preset, changes)
    settings = _settings(preset, changes)
    frames, side = settings.window - 1, settings.picture_px
    pictures = torch.randn(frames, 3, 1, side, side)
    latents = torch.randn(frames, model.latent_channels, 1, settings.latent_px, settings.latent_px)
    decodes_one_by_one, decoded_pictures = False, 1
    try:
        from tccp.inference.generation import Generator
    except ImportError:
        decodes_one_by_one, decoded_pictures = True, 2
    else:
        decoded_pictures += "read_landmarks" not in inspect.signature(Generator).parameters
    parts = latents[:1] if decodes_one_by_one else latents
    encoding = {"encode_ms": 1000 * cpu_seconds(lambda: model.encode(pictures, "scene")) / frames} if encode else {}
    return encoding | {
        "decode_ms": 1000 * cpu_seconds(lambda: model.decode(parts, "face")) / len(parts),
        "decoded_pictures": decoded_pictures,
    }


@torch.inference_mode()
def autoencoder_gflop(preset: str, changes: str) -> dict[str, float]:
    """Operations for one picture."""
    settings = _settings(preset, changes)
    with torch.device("meta"):
        model = PictureAutoencoder.from_settings(settings.autoencoder).eval()
        join_weights(model.vae)
        pictures = torch.empty(1, 3, 1, settings.picture_px, settings.picture_px)
        latents = torch.empty(1, model.latent_channels, 1, settings.latent_px, settings.latent_px)
        return {
            "encode_gflop": _gflop(lambda: model.encode(pictures, "scene")),
            "decode_gflop": _gflop(lambda: model.decode(latents, "face")),
        }


def training_step(preset: str, changes: str, variant: str, repeats: int = 1) -> dict[str, float]:
    """CPU time of a training step: loss, gradients, clipping, Adam, average of weights. With true initial frames.

    Reading latents and sampling noise are not included.
    """
    step = _trainer(preset, changes, variant)
    step()
    return {"step_ms": 1000 * cpu_seconds(step, repeats)}


@functools.cache
def _trainer(preset: str, changes: str, variant: str) -> Any:
    from tccp.training.engine import TorchEngine

    average: Any
    try:
        from tccp.diffusion.schedule import NoiseSchedule
        from tccp.training.averaged_weights import AveragedWeights as average
        from tccp.training.fit_variant import WindowLoss
    except ImportError:
        from diffusers.training_utils import EMAModel as average

        from tccp.diffusion import NoiseSchedule  # type: ignore[attr-defined,no-redef]
        from tccp.training.variant import WindowLoss  # type: ignore[import-not-found,no-redef]

    settings = _settings(preset, changes).for_variant(variant)  # type: ignore[arg-type]
    torch.manual_seed(0)
    network = MVControlNet.from_settings(settings, variant).train()  # type: ignore[arg-type]
    module = WindowLoss(network, NoiseSchedule.from_settings(settings.diffusion), settings.training.precision)
    engine = TorchEngine(module, settings.training)
    ema = average(engine.local_parameters(), decay=settings.training.ema_decay)
    batch = settings.training.batch_size
    latents, times, conditions, control = _inputs(network, batch)
    given = (latents, torch.randn_like(latents), times[:, 0], conditions, control, latents[:, :, 0])

    def step() -> None:
        engine.backward(engine.forward(*given).mean())
        engine.step()
        ema.step(engine.local_parameters())

    return step


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve(
        {
            "evaluation": evaluation,
            "autoencoder": autoencoder,
            "autoencoder_gflop": autoencoder_gflop,
            "training_step": training_step,
        }
    )
