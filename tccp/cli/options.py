"""What the commands share: common options, and what is printed where."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import tyro

from tccp.errors import TccpError

Preset = Annotated[str, tyro.conf.arg(help="settings to start from: paper or toy")]
Overrides = Annotated[
    tuple[str, ...],
    tyro.conf.arg(name="set", metavar="KEY=VALUE", help="settings to change, e.g. training.max_steps=200"),
]
Json = Annotated[bool, tyro.conf.arg(help="print one JSON object on stdout, and nothing else there")]
Storage = Annotated[Path | None, tyro.conf.arg(help="where runs and caches live (default: TCCP_STORAGE, else ~/.tccp)")]
Device = Annotated[str, tyro.conf.arg(help="cpu, cuda or cuda:N; auto takes a GPU where there is one")]


def emit(as_json: bool, record: dict[str, Any], text: str) -> None:
    print(json.dumps(record, indent=2, allow_nan=False) if as_json else text)


def note(text: str) -> None:
    print(f"tccp: {text}", file=sys.stderr)


def device_of(name: str) -> str:
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
