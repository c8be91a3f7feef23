"""Measures what each setting of the toy preset gains.

`python benchmarks/toy_recipe.py DATA WEIGHTS OUT.json --storage S` trains one network at a time for a few hundred
steps, with one setting as in the preset `paper`; everything else is as in WEIGHTS. Held-out clips judge it, next to the
unchanged recipe at the same number of steps and to another seed, which shows the effect of chance. Networks that are in
OUT.json are not trained again, so the run can be stopped and started. It takes two hours of one core; `--only` divides
the work.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from tccp.config import Settings, VariantName, override
from tccp.evaluation.benchmark_clips import EvaluationClip, clip_seeds, make_clip
from tccp.evaluation.validation import validate_network, with_network
from tccp.files import atomic_path
from tccp.inference.manifest import read_settings
from tccp.inference.pipeline_folder import load_network
from tccp.models.variants import FIRST_OF
from tccp.training.fit_variant import train_variant
from tccp.training.recipe import Trainer

PLAIN_RATE = {"training.learning_rate": 2e-4, "training.schedule": "constant", "training.warmup_steps": 0}
NOISE_PREDICTION = {"diffusion.prediction": "epsilon", "diffusion.zero_terminal_snr": False}
DENOISED = {"training.initial_frames": "denoised"}
"""As the preset was when these trials were made."""
TRIALS: dict[VariantName, dict[str, dict[str, Any]]] = {
    "landmark_first": {
        "toy": {},
        "another seed": {"seed": 1},
        "prediction=epsilon": NOISE_PREDICTION,
        "learning_rate=2e-4, constant": PLAIN_RATE,
        "gradient_clip=none": {"training.gradient_clip": None},
        "ema_decay=0.9999": {"training.ema_decay": 0.9999},
        "pooled_conditions=off": {"network.pooled_conditions": False},
        "timestep_shift=1": {"training.timestep_shift": 1.0},
        "control_embedding=()": {"network.control_embedding": []},
        "condition_dropout=0": {"training.condition_dropout": 0.0},
        "dropout=0.1": {"network.dropout": 0.1},
    },
    "landmark_sequence": {
        "toy": {},
        "initial_frames=denoised": DENOISED,
        "initial_frames=denoised, another seed": {**DENOISED, "seed": 1},
    },
    "face_first": {"toy": {}, "another seed": {"seed": 1}, "surround=off": {"surround": False}},
    "face_sequence": {
        "toy": {},
        "initial_frames=denoised": DENOISED,
        "initial_frames=denoised, another seed": {**DENOISED, "seed": 1},
        "initial_frames=denoised, start_from_first=off": {**DENOISED, "training.start_from_first": False},
        "initial_frames=denoised, first_frame_channels=off": {**DENOISED, "network.first_frame_channels": False},
        "initial_frames=denoised, initial_frame_noise=0": {**DENOISED, "training.initial_frame_noise": 0.0},
    },
}
STEPS: dict[VariantName, int] = {
    "landmark_first": 600,
    "landmark_sequence": 500,
    "face_first": 500,
    "face_sequence": 500,
}
CLIPS, FRAMES = 32, 36
EVERY = 5  # frames of a clip that a first-frame network makes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("data", type=Path, help="clip table on which WEIGHTS were trained")
    parser.add_argument("weights", type=Path, help="complete pipeline folder of the toy preset")
    parser.add_argument("out", type=Path, help="JSON file; results are added")
    parser.add_argument("--storage", type=Path, required=True, help="storage of the training of WEIGHTS (for latents)")
    parser.add_argument("--only", choices=list(TRIALS), nargs="+", default=list(TRIALS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    settings = read_settings(arguments.weights)
    clips = [make_clip(seed, FRAMES, settings) for seed in clip_seeds("held_out", CLIPS)]
    for variant in arguments.only:
        for name, change in TRIALS[variant].items():
            done = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
            if name in done.get(variant, {}):
                continue
            figures = trial(variant, changed(settings, variant, change), arguments, clips)
            done = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}  # another process may write
            done.setdefault(variant, {})[name] = figures
            with atomic_path(arguments.out) as path:
                path.write_text(json.dumps(done, indent=1) + "\n")
            print(variant, name, figures, flush=True)


def changed(settings: Settings, variant: VariantName, change: dict[str, Any]) -> Settings:
    """The change, for this variant only and with the short schedule. `surround` and `seed` change for all variants."""
    whole: dict[str, Any] = {name: change[name] for name in ("surround", "seed") if name in change}
    change = {name: value for name, value in change.items() if name not in whole}
    overrides = {**settings.variant_overrides.get(variant, {}), **change, "training.max_steps": STEPS[variant]}
    return override(settings, {f"variant_overrides.{variant}": overrides, **whole})


def trial(
    variant: VariantName, settings: Settings, arguments: argparse.Namespace, clips: list[EvaluationClip]
) -> dict[str, float]:
    usual = read_settings(arguments.weights)
    trainer = Trainer(arguments.data, arguments.weights, usual, arguments.storage, resume=True)
    cache = trainer.cache_for([variant])
    cache.build()
    cache.settings = settings
    companions = (FIRST_OF[variant],) if variant in FIRST_OF else ()
    first = load_network(arguments.weights, companions[0]) if companions else None
    network, _ = train_variant(variant, settings, cache, None, first=first)
    assert network is not None
    pipeline = dataclasses.replace(with_network(arguments.weights, variant, network), settings=settings)
    figures = validate_network(pipeline, variant, clips)
    return {name: value for name, value in figures.items() if name != "score"}


if __name__ == "__main__":
    main()
