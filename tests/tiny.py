"""What the tests of generation share: a pipeline too small to be of use, and calls of the commands."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import forked
import numpy as np

from tccp.config import override, toy
from tccp.inference.film import FilmRequest, FilmResult
from tccp.inference.frames import GeneratedFrame
from tccp.inference.manifest import MANIFEST
from tccp.inference.pipeline import Pipeline, generate_film
from tccp.media import VideoWriter, read_frames
from tccp.roundtable import identity_path

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = override(
    toy(),
    {
        "picture_px": 32,
        "window": 4,
        "autoencoder.latent_channels": 4,
        "autoencoder.patch": 4,
        "autoencoder.block_channels": (8, 8),
        "autoencoder.norm_groups": 4,
        "network.base_channels": 16,
        "network.channel_multipliers": (1, 2),
        "network.blocks_per_scale": 1,
        "network.condition_dim": 16,
        "network.time_embedding_dim": 16,
        "network.attention_head_dim": 16,
        "lips.size_px": 16,
        "lips.liplet_channels": 4,
        "sampling.steps": 2,
    },
)


def request_of(film: Path, weights: Path, out: Path, **changes: Any) -> FilmRequest:
    """A film of `tccp synth` generated anew, with its own sound, into its own scene; the quickest way there is."""
    given: dict[str, Any] = {
        "scene": film,
        "audio": film,
        "identity": identity_path(film),
        "weights": weights,
        "out": out,
        "identity_box": "whole",
        "lossless": True,
    }
    if not {"mask", "box", "detector"} & changes.keys():
        given["truth"] = True
    return FilmRequest(**(given | changes))


def generated(film: Path, weights: Path, out: Path, **changes: Any) -> tuple[FilmResult, list[GeneratedFrame]]:
    """The result, and every generated frame. The film is at `out`.

    Films with the same weights share a loaded pipeline, since loading one takes longer than generating a short film.
    """
    frames: list[GeneratedFrame] = []
    pipeline = None if changes.keys() & {"preset", "lip_weights", "device"} else _loaded(weights)
    result = generate_film(request_of(film, weights, out, **changes), pipeline=pipeline, on_frame=frames.append)
    return result, frames


def _loaded(weights: Path) -> Pipeline:
    return _loaded_once(weights, (weights / MANIFEST).read_bytes())


@functools.lru_cache(maxsize=4)
def _loaded_once(weights: Path, manifest: bytes) -> Pipeline:
    return Pipeline.from_pretrained(weights, variants=())  # networks are loaded when a film needs them


def pictures(path: Path) -> np.ndarray:
    return np.stack(list(read_frames(path)))


def write_film(path: Path, frames: np.ndarray, sound: np.ndarray | Path | None = None) -> Path:
    """A lossless film."""
    with VideoWriter(path, frames.shape[2], frames.shape[1], sound, lossless=True) as film:
        for frame in frames:
            film.write(frame)
    return path


COMMANDS = forked.Server(
    ["tccp.cli", "tccp.inference.pipeline", "tccp.evaluation.runner", "tccp.faces", "preprocessing.run"]
)
"""What the commands import."""


def tccp(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """`tccp` in a process of its own, forked from one that has done the imports."""
    command = ["-m", "tccp.cli", *arguments]
    return COMMANDS.run(command, cwd=ROOT, environment=os.environ | environment, timeout=300)


def tccp_from_scratch(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """`tccp` exactly as a user starts it: a new interpreter, all imports."""
    command = [sys.executable, "-m", "tccp.cli", *map(str, arguments)]
    env = os.environ | environment
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)


def write_track(path: Path, boxes: list[list[float] | None], cuts: list[int]) -> Path:
    path.write_text(json.dumps({"boxes": boxes, "cuts": cuts}))
    return path
