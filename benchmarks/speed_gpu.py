"""Speed of generation on a GPU: `python benchmarks/speed_gpu.py --out FILE.json`, in at most eight minutes.

The paper preset at 256 px with random weights, 2 x 20 steps: one stream, and a batch of streams whose windows are
generated together; in bf16 and fp32; as it is, and with torch.compile (`MVControlNet.compile_blocks`). Cases that no
longer fit into the time are listed as not measured.

A window of a stream gives 7 new frames. Measured is all that generation does for it with tensors: encode the masked
scenes, both stages with their samplers, decode the faces, copy them to the CPU. Finding faces, sound, lip references,
pasting, reading and writing films are not included.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from tccp.config import Settings, override, paper
from tccp.diffusion.batching import run_windows
from tccp.diffusion.sampling import start_window
from tccp.diffusion.schedule import NoiseSchedule
from tccp.inference.encoding import Encoder
from tccp.inference.pipeline_folder import load_network, write_untrained
from tccp.models.autoencoder import PictureAutoencoder
from tccp.models.conditions import Conditions
from tccp.models.mvcontrolnet import MVControlNet

STEPS = 20
TINY = {
    "picture_px": 64,
    "autoencoder.block_channels": [32] * 5,
    "network.base_channels": 32,
    "network.attention_head_dim": 32,
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
REPEATS = 3
MATMULS = 8


@dataclass
class Windows:
    """The networks in one precision, and windows of several streams."""

    settings: Settings
    landmark: MVControlNet
    face: MVControlNet
    encoder: Encoder

    def generate(self, streams: int) -> np.ndarray:
        """The faces of one window of each stream, of random inputs: (streams x 7) s s 3."""
        frames, side, device = self.settings.window, self.settings.picture_px, self.encoder.device
        new = streams * (frames - 1)
        scenes = np.random.default_rng(0).integers(0, 256, (new, side, side, 3), dtype=np.uint8)
        encoded = self.encoder.encode(scenes, "scene").unflatten(0, (streams, frames - 1))
        control = torch.cat([encoded[:, :1], encoded], dim=1).transpose(1, 2)  # the last frame before, and the new ones
        audio = torch.randn(streams, frames, 80, 16, device=device)
        landmarks = self._stage(self.landmark, control, {"audio": audio})
        lip_px = self.face.config.lip_px
        lips = torch.randn(streams, frames, 3, lip_px, lip_px, device=device)
        identity = torch.randn(streams, 3, side, side, device=device)
        faces = self._stage(self.face, landmarks, {"lips": lips, "identity": identity})
        return self.encoder.decode(faces[:, :, 1:].transpose(1, 2).flatten(0, 1), "face")

    def _stage(self, network: MVControlNet, control: torch.Tensor, conditions: dict[str, torch.Tensor]) -> torch.Tensor:
        schedule = NoiseSchedule.from_settings(self.settings.diffusion)
        states = [
            start_window(
                schedule,
                self.settings.sampling,
                Conditions(**{kind: given[i : i + 1] for kind, given in conditions.items()}),
                control[i],
                control[i, :, 0],
                seed=i,
                channels=network.config.latent_channels,
            )
            for i in range(len(control))
        ]
        return torch.stack(run_windows(network, schedule, states, limit=len(states)))


def load(settings: Settings, device: torch.device, dtype: torch.dtype) -> Windows:
    """Random networks, loaded as a pipeline loads them."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_untrained(folder, settings, ("landmark_sequence", "face_sequence"))
        networks = (load_network(folder, name, device, dtype) for name in ("landmark_sequence", "face_sequence"))
        landmark, face = networks
        autoencoder = PictureAutoencoder.load(folder / "autoencoder", dtype).to(device).eval()
    return Windows(settings, landmark, face, Encoder(autoencoder, settings))


def seconds(call: Any, device: torch.device, repeats: int) -> float:
    """Mean time of a call. The device has finished before and after."""
    synchronize(device)
    began = time.monotonic()
    for _ in range(repeats):
        call()
    synchronize(device)
    return (time.monotonic() - began) / repeats


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matmul_tflops(device: torch.device, dtype: torch.dtype, side: int) -> float:
    """The rate of matrix products. In fp32, torch's default precision (no TF32 on CUDA)."""
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    seconds(lambda: a @ b, device, 1)
    return 2 * side**3 / seconds(lambda: a @ b, device, MATMULS) / 1e12


def measure(windows: Windows, streams: int, peak_tflops: float, gflop: float) -> dict[str, Any]:
    """One case. gflop: operations per frame."""
    device = windows.encoder.device
    new = windows.settings.window - 1
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    first_s = seconds(lambda: windows.generate(streams), device, 1)  # chooses kernels, or compiles
    window_s = seconds(lambda: windows.generate(streams), device, REPEATS)
    rate = streams * new / window_s
    return {
        "frames_per_second": round(rate, 2),
        "first_window_s": round(first_s, 2),
        "window_s": round(window_s, 4),
        "peak_memory_mib": round(torch.cuda.max_memory_allocated(device) / 2**20) if device.type == "cuda" else None,
        "share_of_matmul": round(rate * gflop / 1000 / peak_tflops, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--streams", type=int, default=16, help="streams in the batch")
    parser.add_argument("--minutes", type=float, default=7.0, help="no case starts later than this")
    parser.add_argument("--only", nargs="*", metavar="CASE", help="cases to measure, such as bf16_eager_1")
    parser.add_argument("--tiny", action="store_true", help="tiny networks and matrices, for tests")
    given = parser.parse_args()
    began = time.monotonic()
    device = torch.device(given.device)
    changes: dict[str, Any] = {"sampling.solver": "dpmpp", "sampling.steps": 2 if given.tiny else STEPS}
    settings = override(paper(), changes | (TINY if given.tiny else {}))
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "torch": torch.__version__,
        "preset": "paper",
        "picture_px": settings.picture_px,
        "steps": [settings.sampling.steps] * 2,
        "matmul_tflops": {},
        "cases": {},
        "not_measured": [],
    }
    ways = [(compiled, streams) for compiled in (False, True) for streams in (1, given.streams)]
    for precision, dtype in DTYPES.items():
        cases = {f"{precision}_{'compiled' if way[0] else 'eager'}_{way[1]}": way for way in ways}
        wanted = {name: way for name, way in cases.items() if given.only is None or name in given.only}
        result["not_measured"] += [name for name in cases if name not in wanted]
        if not wanted:
            continue
        windows = load(settings, device, dtype)
        peak = matmul_tflops(device, dtype, 256 if given.tiny else 8192)
        result["matmul_tflops"][precision] = round(peak, 3)
        if "gflop_per_frame" not in result:
            with FlopCounterMode(display=False) as counter:
                windows.generate(1)
            result["gflop_per_frame"] = round(counter.get_total_flops() / 1e9 / (settings.window - 1), 1)
        for name, (compiled, streams) in wanted.items():
            if time.monotonic() - began > 60 * given.minutes:
                result["not_measured"].append(name)
                continue
            if compiled:
                windows.landmark.compile_blocks()
                windows.face.compile_blocks()
            result["cases"][name] = measure(windows, streams, peak, result["gflop_per_frame"])
            print(name, result["cases"][name], file=sys.stderr, flush=True)
            if given.out is not None:
                given.out.write_text(json.dumps(result, indent=2) + "\n")
        del windows
    result["took_s"] = round(time.monotonic() - began)
    text = json.dumps(result, indent=2) + "\n"
    if given.out is not None:
        given.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
