"""Options that several commands share, and output helpers. `tccp` and the jobs in ray_jobs/ both use this module."""

from __future__ import annotations

import functools
import itertools
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from tccp.config import Settings, load_settings
from tccp.errors import TccpError

Preset = Annotated[str, tyro.conf.arg(help="settings to start from: paper or toy")]
Overrides = Annotated[
    tuple[tuple[str, ...], ...],
    tyro.conf.UseAppendAction,
    tyro.conf.arg(
        name="set",
        metavar="KEY=VALUE [KEY=VALUE ...]",
        help="settings to change, e.g. --set training.learning_rate=1e-4 picture_px=128; a later value replaces an "
        "earlier one",
    ),
]
"""Settings to change. One item per `--set` on the command line; `--set a=1 b=2` equals `--set a=1 --set b=2`."""
MaxSteps = Annotated[
    int | None,
    tyro.conf.arg(
        help="optimiser steps of each network, instead of the preset's; short for --set training.max_steps=N "
        "autoencoder.max_steps=N"
    ),
]
Backend = Annotated[
    Literal["mediapipe", "fan", "truth"],
    tyro.conf.arg(
        help="source of the landmarks: mediapipe, fan (face-alignment), or truth (the truth files of RoundTable films)"
    ),
]
Resume = Annotated[bool, tyro.conf.arg(help="continue an interrupted run from its last checkpoint")]
LipWeights = Annotated[Path | None, tyro.conf.arg(help="the published Wav2Lip checkpoint, for lips.source=wav2lip")]
Json = Annotated[bool, tyro.conf.arg(help="print one JSON object on stdout, and nothing else there")]
Storage = Annotated[Path | None, tyro.conf.arg(help="folder for runs and caches (default: TCCP_STORAGE, else ~/.tccp)")]
Device = Annotated[str, tyro.conf.arg(help="cpu, cuda or cuda:N; auto uses a GPU if there is one")]


def deferred(command: Callable[..., None]) -> Callable[..., Callable[[], None]]:
    """The command with the same signature and help, but calling it returns the call instead of making it.

    It separates parsing from running: tyro calls what it parses for.
    """

    @functools.wraps(command)
    def bind(*arguments: Any, **options: Any) -> Callable[[], None]:
        return functools.partial(command, *arguments, **options)

    return bind


def flat(overrides: tuple[tuple[str, ...], ...]) -> list[str]:
    """All `key=value` items of all `--set`, in order."""
    return list(itertools.chain.from_iterable(overrides))


def settings_of(preset: str, overrides: tuple[tuple[str, ...], ...] = (), max_steps: int | None = None) -> Settings:
    """The settings that --preset, --set and --max-steps describe. --max-steps wins over --set.

    Raises TccpError for an unknown preset, an unknown key, and a value that is not allowed.
    """
    given = flat(overrides)
    if max_steps is not None:
        given += [f"training.max_steps={max_steps}", f"autoencoder.max_steps={max_steps}"]
    return load_settings(preset, given)


def emit(as_json: bool, record: dict[str, Any], text: str) -> None:
    """Prints a command's result on stdout, as JSON or as text."""
    print(json.dumps(record, indent=2, allow_nan=False) if as_json else text)


def note(text: str) -> None:
    """Prints a line on stderr."""
    print(f"tccp: {text}", file=sys.stderr)


def device_of(name: str) -> str:
    """The torch device for --device. Raises TccpError for other names and for a GPU that is not there."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise TccpError(f"--device {name}: give auto, cpu, cuda or cuda:N")
    found = torch.cuda.device_count()
    if name != "cpu" and int(name.partition(":")[2] or 0) >= found:
        raise TccpError(
            f"--device {name}: {found or 'no'} CUDA devices here; use --device {'cuda:0' if found else 'cpu'}"
        )
    return name
