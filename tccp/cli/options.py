"""Options that several commands share, and output helpers. `tccp` and the jobs in ray_jobs/ both use this module."""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
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
        "autoencoder.max_steps=N lips.liplet_steps=N"
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
        given += [f"{key}={max_steps}" for key in ("training.max_steps", *_OWN_STEPS.values())]
    return load_settings(preset, given)


_OWN_STEPS = {"autoencoder": "autoencoder.max_steps", "lips": "lips.liplet_steps"}
"""Components that have a setting of their own for the number of steps."""


def unshortened(
    components: Iterable[str], overrides: tuple[tuple[str, ...], ...], max_steps: int | None, settings: Settings
) -> str | None:
    """Says which of these components `--set training.max_steps` does not apply to, and how to change them, too."""
    given = {item.partition("=")[0].strip() for item in flat(overrides)}
    if "training.max_steps" not in given or max_steps is not None:
        return None
    steps = {"autoencoder": settings.autoencoder.max_steps, "lips": settings.lips.liplet_steps}
    own = {name: key for name, key in _OWN_STEPS.items() if name in components and key not in given}
    if settings.lips.source != "liplet":
        own.pop("lips", None)
    if not own:
        return None
    kept = " and ".join(f"{name} trains {steps[name]:,} steps ({key})" for name, key in own.items())
    return f"training.max_steps is of the networks only: {kept}; --max-steps N applies to every component"


def emit(as_json: bool, record: dict[str, Any], text: str) -> None:
    """Prints a command's result on stdout, as JSON or as text."""
    print(json.dumps(record, indent=2, allow_nan=False) if as_json else text)


def note(text: str) -> None:
    """Prints a line on stderr."""
    print(f"tccp: {text}", file=sys.stderr)


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Surrounds imports of large packages. The garbage collector would look through their many objects again and again.

    They all stay, so it need not look at them later either.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def check_device(name: str) -> None:
    """Raises TccpError as `device_of`. Imports torch, which takes seconds, only if the name is that of a GPU."""
    if name not in ("auto", "cpu"):
        device_of(name)


def device_of(name: str) -> str:
    """The torch device for --device. Raises TccpError for other names and for a GPU that is not there."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise TccpError(f"--device {name}: give auto, cpu, cuda or cuda:N")
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    found = torch.cuda.device_count()
    if name != "cpu" and int(name.partition(":")[2] or 0) >= found:
        raise TccpError(
            f"--device {name}: {found or 'no'} CUDA devices here; use --device {'cuda:0' if found else 'cpu'}"
        )
    return name
