"""Cost and quality of light decoders: `python benchmarks/light_decoder.py OUT.json --storage S`.

cost: the decoder of `paper` at 256 px as commands use it, with 0 to 2 folded levels in turns, in one thread.

quality: small auto-encoders of the structure of `paper` for 64 px, trained on rendered RoundTable pictures and judged
on held-out clips: from scratch, or from the finished `full` with its encoder frozen. All take the same pictures in the
same order. Differences are between the same clips. Trials that are in OUT.json are not run again, and an interrupted
one goes on from its checkpoint in S. It takes about half an hour of one core; `--only` divides the work.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch.utils.flop_counter import FlopCounterMode

from tccp.config import Settings, override, paper, toy
from tccp.evaluation.benchmark_clips import MID_SPEECH_FRAME, clip_seeds, make_clip
from tccp.evaluation.figures import psnr
from tccp.evaluation.score_table import interval
from tccp.files import atomic_folder, atomic_path
from tccp.inference.conditioning import landmark_pictures
from tccp.models.autoencoder import PictureAutoencoder, to_bytes, to_model
from tccp.models.layers import join_weights
from tccp.progress import progress
from tccp.seeds import rng_seed
from tccp.training.fit_autoencoder import fit_autoencoder, with_new_decoder
from tccp.training.run_folder import RunFolder
from tccp.training.window_files import PictureBatch

FOLDED = (0, 1, 2)
TURNS = {1: 5, 8: 1}
"""Number of timings by number of frames."""
KINDS = ("face", "landmark", "scene")
CLIPS, HELD_OUT, FRAMES = 600, 64, 6
BATCH = 8
SHAPE: dict[str, Any] = {
    "downsampling": 8,
    "latent_channels": 16,
    "patch": 1,
    "block_channels": (16, 16, 32, 64),
    "layers_per_block": 2,
    "norm_groups": 8,
    "mid_attention": True,
    "precision": "fp32",
    "batch_size": BATCH,
    "learning_rate": 2e-3,
}
"""The latents of `toy` and the structure of `paper`, with an eighth of its channels and one level less."""
TRIALS: dict[str, tuple[int, int, bool]] = {
    "full": (0, 2400, False),
    "light": (2, 2400, False),
    "full, trained on": (0, 500, True),
    "light, fitted": (2, 1000, True),
}
"""Number of folded levels, steps, and whether only a decoder is trained, to the encoder of `full`."""
Kinds = dict[str, UInt8[np.ndarray, "n s s 3"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path, help="JSON file; results are added")
    parser.add_argument("--storage", type=Path, required=True, help="folder for rendered pictures and trainings")
    parser.add_argument("--only", nargs="+", choices=["cost", *TRIALS], default=["cost", *TRIALS])
    given = parser.parse_args()
    torch.set_num_threads(1)
    if "cost" in given.only and "cost" not in _read(given.out):
        _write(given.out, {"cost": cost()})
    for trial in (name for name in TRIALS if name in given.only):
        if trial not in _read(given.out).get("quality", {}):
            train(trial, given.storage)
    if not _weights(given.storage, "full").exists():
        return  # another process trains it, and a later call will measure
    for trial in (name for name in TRIALS if name in given.only):
        rows = _read(given.out).get("quality", {})
        if trial not in rows:
            _write(given.out, {"quality": {**rows, trial: measure(trial, given.storage)}})


def _read(path: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return record


def _write(out: Path, more: dict[str, Any]) -> None:
    record = {**_read(out), **more}  # read again, because another process may have written
    with atomic_path(out) as path:
        path.write_text(json.dumps(record, indent=1) + "\n")


def cost() -> dict[str, Any]:
    """Parameters, operations and CPU time of the decoders of `paper`."""
    settings = paper()
    side = settings.latent_px
    rows: list[dict[str, Any]] = []
    decoders = []
    for folded in FOLDED:
        own = override(settings, {"autoencoder.decoder_folded_levels": folded}).autoencoder
        with torch.device("meta"):
            counted = PictureAutoencoder.from_settings(own)
            join_weights(counted.vae)
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                counted.reconstruct(torch.empty(1, own.latent_channels, side, side))
        parameters = sum(p.numel() for p in counted.vae.decoder.parameters())
        rows.append({"folded_levels": folded, "parameters": parameters, "gflop_per_frame": _gflop(counter)})
        decoder = PictureAutoencoder.from_settings(own).eval()
        decoder.vae.to_channels_last()
        join_weights(decoder.vae)
        decoders.append(decoder)
    for frames, turns in TURNS.items():
        raw = torch.randn(frames, settings.autoencoder.latent_channels, side, side)
        times: list[list[float]] = [[] for _ in decoders]
        for _ in range(turns):
            for decoder, found in zip(decoders, times, strict=True):
                with torch.no_grad():
                    began = time.process_time()
                    decoder.reconstruct(raw)
                    found.append(time.process_time() - began)
        for row, found in zip(rows, times, strict=True):
            row[f"cpu_s_{frames}_frames"] = round(statistics.median(found), 2)
    for row in rows:
        for key in ("gflop_per_frame", *(f"cpu_s_{frames}_frames" for frames in TURNS)):
            row[f"times_cheaper_{key}"] = round(rows[0][key] / row[key], 2)
    return {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "threads": 1, "turns": TURNS, "rows": rows}


def _gflop(counter: FlopCounterMode) -> float:
    return round(counter.get_total_flops() / 1e9, 1)


def settings_of(trial: str) -> Settings:
    folded, steps, _ = TRIALS[trial]
    own = {**SHAPE, "decoder_folded_levels": folded, "max_steps": steps}
    changes = {f"autoencoder.{key}": value for key, value in own.items()}
    return override(toy(), {**changes, "variant_overrides": {}})


def _weights(storage: Path, trial: str) -> Path:
    return storage / trial.replace(", ", "_").replace(" ", "_") / "weights"


def train(trial: str, storage: Path) -> None:
    """Trains one auto-encoder, unless its weights are in the storage."""
    settings, weights = settings_of(trial), _weights(storage, trial)
    if weights.exists():
        return
    start = with_new_decoder(settings, PictureAutoencoder.load(_weights(storage, "full"))) if TRIALS[trial][2] else None
    run = RunFolder.open(weights.parent, settings, "autoencoder", resume=True)
    autoencoder, _ = fit_autoencoder(settings, Rendered(settings, storage), run, start=start)
    assert autoencoder is not None
    with atomic_folder(weights) as folder:
        autoencoder.save(folder)


def measure(trial: str, storage: Path) -> dict[str, Any]:
    """What an auto-encoder restores, and how much less than `full`."""
    settings, (folded, steps, fits) = settings_of(trial), TRIALS[trial]
    autoencoder, full = (PictureAutoencoder.load(_weights(storage, name)) for name in (trial, "full"))
    row: dict[str, Any] = {"folded_levels": folded, "only_the_decoder": fits, "seed": settings.seed}
    row["steps"] = steps
    for kind, pictures in rendered(settings, storage, "held_out", HELD_OUT).items():
        found = _psnr(autoencoder, pictures)
        row[kind] = {"psnr_db": interval(found), "less_than_full_db": interval(_psnr(full, pictures) - found)}
    return row


@torch.no_grad()
def _psnr(autoencoder: PictureAutoencoder, pictures: UInt8[np.ndarray, "n s s 3"]) -> Float[np.ndarray, " clips"]:
    """Of each clip."""
    values = []
    for start in range(0, len(pictures), FRAMES):
        clip = pictures[start : start + FRAMES]
        restored = autoencoder.reconstruct(autoencoder.posterior(to_model(torch.from_numpy(clip))).mean)
        values.append(psnr(to_bytes(restored).numpy(), clip))
    return np.array(values)


class Rendered:
    """Pictures to train on, mixed as in `tccp train`: half faces, a quarter landmark pictures, a quarter scenes."""

    def __init__(self, settings: Settings, storage: Path):
        self.seed, self.pictures = settings.seed, rendered(settings, storage, "prior", CLIPS)

    def batch(self, step: int, rank: int = 0, num_ranks: int = 1) -> PictureBatch:
        rng = np.random.default_rng(rng_seed(self.seed, "autoencoder", step))
        kinds = ("face", "landmark", "face", "scene")
        chosen = rng.integers(len(self.pictures["face"]), size=BATCH)
        pictures = [self.pictures[kinds[place % 4]][index] for place, index in enumerate(chosen)]
        return PictureBatch(np.stack(pictures), np.arange(BATCH) + step * BATCH)


def rendered(settings: Settings, storage: Path, purpose: Any, clips: int) -> Kinds:
    """FRAMES frames of each of these clips, by kind of picture. Rendered once."""
    place = storage / f"{purpose}-{clips}.npz"
    if not place.exists():
        storage.mkdir(parents=True, exist_ok=True)
        found: dict[str, list[np.ndarray]] = {kind: [] for kind in KINDS}
        with progress() as bar:
            task = bar.add_task(f"rendering {purpose}", total=clips)
            for seed in clip_seeds(purpose, clips):
                clip = make_clip(seed, FRAMES, settings, MID_SPEECH_FRAME)
                drawn = landmark_pictures(clip.points, settings.picture_px)
                for kind, pictures in zip(KINDS, (clip.faces, drawn, clip.masked_scenes), strict=True):
                    found[kind].append(pictures)
                bar.advance(task)
        with atomic_path(place) as path, path.open("wb") as file:
            np.savez(file, allow_pickle=False, **{kind: np.concatenate(pictures) for kind, pictures in found.items()})
    with np.load(place) as file:
        return {kind: file[kind] for kind in KINDS}


if __name__ == "__main__":
    main()
