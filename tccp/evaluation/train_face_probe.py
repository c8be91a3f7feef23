"""`python -m tccp.evaluation.train_face_probe`: trains the face probe and prints its accuracy."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import tyro

from tccp.evaluation.face_probe import (
    PROBE_FILE,
    held_out_clips,
    load_probe,
    measure,
    render_samples,
    save_probe,
    train_probe,
)
from tccp.models.autoencoder import PictureAutoencoder


def main(
    out: Path = PROBE_FILE,
    people: int = 1200,
    frames: int = 12,
    steps: int = 1400,
    seed: int = 0,
    clips: int = 64,
    autoencoder: Path | None = None,
) -> None:
    """Train the probe and print its accuracy on held-out clips as JSON.

    Args:
        out: file for the weights.
        people: number of people rendered for training.
        frames: faces per person, at most 50.
        steps: training steps, 192 pictures each.
        seed: of weights and batches.
        clips: number of held-out clips, at least 16.
        autoencoder: folder of an auto-encoder at 64 px, to measure on its decoded pictures too.
    """
    samples = render_samples(people, frames, on_person=_reporter("people rendered", 100))
    probe = train_probe(samples, steps, seed, _reporter("step", 50))
    settings = {"people": people, "frames": frames, "steps": steps, "seed": seed}
    save_probe(probe, out, {name: str(value) for name, value in settings.items()})
    probe, held_out = load_probe(out), held_out_clips(clips)
    accuracy = {"truth": measure(probe, held_out)}
    if autoencoder is not None:
        accuracy["reconstruction"] = measure(probe, held_out, PictureAutoencoder.load(autoencoder).eval())
    print(json.dumps(settings | accuracy, indent=2))


def _reporter(label: str, every: int) -> Callable[..., None]:
    """A callback that prints progress to standard error after every `every` steps."""

    def report(done: int, loss: float | None = None) -> None:
        if done % every == 0:
            suffix = "" if loss is None else f": loss {loss:.3f}"
            print(f"{label} {done}{suffix}", file=sys.stderr, flush=True)

    return report


if __name__ == "__main__":
    tyro.cli(main)
