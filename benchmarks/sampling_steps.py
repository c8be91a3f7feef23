"""How few sampling steps each network needs: `python benchmarks/sampling_steps.py OUT.json --weights toy`.

Samples the held-out clips with one network's solver, number of steps, spacing of the steps or guidance changed; the
other networks sample as their pipeline does. A figure is worse if it is farther from the truth's than the far end of
the 95% interval with 12 steps. Trials that are in OUT.json are not run again, so the run can be stopped and started.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tccp.config import Settings, VariantName, override
from tccp.evaluation.benchmark_clips import HELD_OUT_FRAMES, EvaluationClip, clip_seeds, in_mid_speech, make_clip
from tccp.evaluation.figures import ClipOutput, clip_figures
from tccp.evaluation.methods import METHODS, Models, Shard, other_index
from tccp.evaluation.score_table import interval
from tccp.files import atomic_path
from tccp.inference.pipeline_source import component_names, pipeline_folder
from tccp.models.variants import TWO_STAGE, VARIANTS
from tccp.progress import progress

BATCH = 16
ORDER: tuple[VariantName, ...] = ("landmark_sequence", "face_sequence", "landmark_first", "face_first")
Change = dict[str, Any]
REFERENCE = "12 steps"
"""The sampling of the packaged weights before this benchmark."""


def changes(temperature: float) -> dict[str, Change]:
    """The trials of a network with this temperature, by name."""
    named: dict[str, Change] = {REFERENCE: {"steps": 12}}
    for steps in (6, 4, 3, 2):
        named[f"{steps} steps"] = {"steps": steps}
    for steps, power in ((4, 0.7), (4, 1.4)):
        named[f"{steps} steps, power {power:g}"] = {"steps": steps, "time_power": power}
    named["4 steps, half the temperature"] = {"steps": 4, "temperature": temperature / 2}
    named["ddim, 4 steps"] = {"solver": "ddim", "steps": 4}
    change = {"steps": 4, "guidance_scale": 1.5, "guidance_interval": [0.3, 0.8]}
    named["4 steps, guidance 1.5 in 0.3 to 0.8"] = change
    return named


class _Clips:
    """The clips of one process."""

    def __init__(self, weights: Path, seeds: list[int]):
        torch.set_num_threads(1)
        self.models = Models.load(weights, None)
        settings = self.models.pipeline.settings
        self.clips = [make_clip(seed, HELD_OUT_FRAMES, settings) for seed in seeds]
        self.parts = [Shard(self.models, self.clips[i : i + BATCH]) for i in range(0, len(self.clips), BATCH)]
        self.others: list[EvaluationClip] = []
        for part in self.parts:
            count = len(part.clips)
            self.others += [in_mid_speech(part.clips[other_index(i, count)]) for i in range(count)]
            part.scene_latents, part.surround_latents, part.true_landmark_latents  # noqa: B018  (every trial uses them)
        self.truths = [output for part in self.parts for output in part.true_outputs()]

    def truth(self) -> list[dict[str, float]]:
        return self._figures(self.truths)

    def figures(self, variant: VariantName, settings: Settings) -> list[dict[str, float]]:
        pipeline = dataclasses.replace(self.models.pipeline, settings=settings)
        models = dataclasses.replace(self.models, pipeline=pipeline)
        outputs: list[ClipOutput] = []
        for part in self.parts:
            trial = Shard(models, part.clips)
            kept = ("scene_latents", "surround_latents", "true_landmark_latents")
            trial.__dict__.update({name: part.__dict__[name] for name in kept})
            if VARIANTS[variant].generates == "landmark":
                outputs += [ClipOutput(points=trial.read_points(latents)) for latents in trial.landmark_latents]
            else:
                outputs += trial.outputs(METHODS["two_stage_truth"].make(trial))
        return self._figures(outputs)

    def _figures(self, outputs: list[ClipOutput]) -> list[dict[str, float]]:
        given = zip(self.clips, outputs, self.truths, self.others, strict=True)
        return [clip_figures(clip, output, truth, other) for clip, output, truth, other in given]


class _Process:
    clips: _Clips


def _start(weights: Path, seeds: list[int]) -> None:
    _Process.clips = _Clips(weights, seeds)


def _truth() -> list[dict[str, float]]:
    return _Process.clips.truth()


def _figures(variant: VariantName, settings: Settings) -> list[dict[str, float]]:
    return _Process.clips.figures(variant, settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path)
    parser.add_argument("--weights", default="toy")
    parser.add_argument("--clips", type=int, default=128)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", nargs="*", choices=ORDER, default=ORDER)
    given = parser.parse_args()
    record: dict[str, Any] = json.loads(given.out.read_text()) if given.out.exists() else {"clips": given.clips}
    weights = Path(pipeline_folder(given.weights, component_names(TWO_STAGE)))
    settings = Models.load(weights, None).pipeline.settings
    seeds = clip_seeds("held_out", given.clips)
    start = partial(ProcessPoolExecutor, 1, get_context("spawn"), _start)
    pools = [start((weights, seeds[i :: given.jobs])) for i in range(given.jobs)]

    def table(task: Any, *arguments: Any) -> dict[str, Any]:
        parts = [pool.submit(task, *arguments) for pool in pools]
        rows = [row for part in parts for row in part.result()]
        return {name: interval(np.array([row[name] for row in rows])) for name in rows[0]}

    def note() -> None:
        with atomic_path(given.out) as part:
            part.write_text(json.dumps(record, indent=1) + "\n")

    if "truth" not in record:
        record["truth"] = table(_truth)
        note()
    with progress() as bar:
        for variant in given.only:
            trials = changes(settings.for_variant(variant).sampling.temperature)
            rows = record.setdefault(variant, {})
            task = bar.add_task(variant, total=len(trials))
            for name, change in trials.items():
                if name not in rows:
                    rows[name] = _row(table, variant, settings, change, record["truth"], rows.get(REFERENCE))
                    note()
                bar.advance(task)
    for pool in pools:
        pool.shutdown()


def _row(
    table: Any, variant: VariantName, settings: Settings, change: Change, truth: Any, reference: Any
) -> dict[str, Any]:
    own = settings.variant_overrides.get(variant, {})
    sampling = {f"sampling.{key}": value for key, value in change.items()}
    began = time.monotonic()
    figures = table(_figures, variant, override(settings, {f"variant_overrides.{variant}": {**own, **sampling}}))
    row: dict[str, Any] = {"change": change, "seconds": round(time.monotonic() - began, 1)}
    if reference is not None:
        row["worse"] = sorted(
            name for name in figures if _worse(figures[name], reference["figures"][name], truth[name])
        )
    row["figures"] = figures if reference is None else {k: v and v["mean"] for k, v in figures.items()}
    return row


def _worse(cell: Any, reference: Any, truth: Any) -> bool:
    """Whether a mean is farther from the truth's than the reference's interval reaches."""
    if cell is None or reference is None or truth is None or reference["low"] is None:
        return False
    far = max(abs(reference["low"] - truth["mean"]), abs(reference["high"] - truth["mean"]))
    return abs(cell["mean"] - truth["mean"]) > far


if __name__ == "__main__":
    main()
