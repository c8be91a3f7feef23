"""Where a training keeps checkpoints and metrics: one interface for a local folder and for the storage of a cluster."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from tccp.config import Settings, git_commit, settings_from_json, settings_to_json
from tccp.errors import TccpError
from tccp.files import atomic_path, translated_errors
from tccp.models.variants import FIRST_OF, VARIANTS

KEEP_CHECKPOINTS = 2
SETTINGS_FILE = "settings.json"
METRICS_FILE = "metrics.jsonl"


@runtime_checkable
class Run(Protocol):
    """A training, as one of its ranks sees it. All ranks call `saving`, `asked_to_save` and `mean` equally often."""

    @property
    def rank(self) -> int: ...

    @property
    def num_ranks(self) -> int: ...

    def newest(self) -> Path | None:
        """The folder of the newest complete checkpoint, to resume from. Called only before the first step."""

    def latest(self) -> int | None:
        """Number of steps of the newest checkpoint."""

    def saving(self, step: int, metrics: Mapping[str, float]) -> AbstractContextManager[Path]:
        """A folder for this rank's part of a checkpoint, which is complete once all ranks have left the context."""

    def asked_to_save(self) -> bool:
        """Whether the machine will be taken away soon, so that a checkpoint is needed now. True once per notice."""

    def mean(self, value: Tensor) -> float:
        """The mean of a value over all ranks; NaN if any rank's value is."""

    def record(self, values: Mapping[str, float | int]) -> None:
        """Notes the measurements of the step `values["step"]`."""

    def cut_metrics_after(self, done: int) -> None:
        """Drops the notes of steps after the first `done`, which run again. Called once, before the first step."""


class TransientRun:
    """A run of one process that keeps nothing."""

    rank, num_ranks = 0, 1

    def newest(self) -> Path | None:
        return None

    def latest(self) -> int | None:
        return None

    @contextmanager
    def saving(self, step: int, metrics: Mapping[str, float]) -> Iterator[Path]:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)

    def asked_to_save(self) -> bool:
        return False

    def mean(self, value: Tensor) -> float:
        return float(value)

    def record(self, values: Mapping[str, float | int]) -> None:
        pass

    def cut_metrics_after(self, done: int) -> None:
        pass


@contextmanager
def atomic_folder(final: Path) -> Iterator[Path]:
    """A temporary folder beside `final` that is renamed to `final` on success and removed after an error.

    Raises TccpError if the disk is full, StorageError if it fails.
    """
    with translated_errors(f"write {final}"):
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
    try:
        with translated_errors(f"write {final}"):
            yield temporary
            if final.exists():
                shutil.rmtree(final)
            os.replace(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@dataclass(frozen=True)
class RunFolder:
    """A run of one process in a folder: `settings.json`, `run.json`, `metrics.jsonl`, `checkpoints/step-N/`."""

    path: Path
    rank: int = 0
    num_ranks: int = 1

    @classmethod
    def open(cls, path: Path, settings: Settings, component: str, *, resume: bool) -> RunFolder:
        """Makes the folder for a training of `component`, or opens the existing one to resume.

        Raises TccpError if the folder holds a run and `resume` is False, or a run with other settings.
        """
        stored = path / SETTINGS_FILE
        if stored.exists():
            if not resume:
                raise TccpError(f"{path} holds a run already: give --resume to continue it, or other --weights")
            check_same_settings(settings_from_json(stored.read_text()), settings, component, str(path))
        else:
            path.mkdir(parents=True, exist_ok=True)
            (path / "run.json").write_text(run_record())
            with atomic_path(stored) as temporary:  # last, because its presence says that the run can be resumed
                temporary.write_text(settings_to_json(settings))
        return cls(path)

    @property
    def git_commit(self) -> str:
        """The commit that the run was started with."""
        return str(json.loads((self.path / "run.json").read_text())["git_commit"])

    def checkpoint(self, step: int) -> Path:
        return self.path / "checkpoints" / f"step-{step:07d}"

    def latest(self) -> int | None:
        """Number of steps done at the newest complete checkpoint."""
        found = sorted((self.path / "checkpoints").glob("step-*"))
        return int(found[-1].name.removeprefix("step-")) if found else None

    def newest(self) -> Path | None:
        latest = self.latest()
        return None if latest is None else self.checkpoint(latest)

    @contextmanager
    def saving(self, step: int, metrics: Mapping[str, float]) -> Iterator[Path]:
        with atomic_folder(self.checkpoint(step)) as folder:
            yield folder
        for old in sorted((self.path / "checkpoints").glob("step-*"))[:-KEEP_CHECKPOINTS]:
            shutil.rmtree(old)

    def asked_to_save(self) -> bool:
        return False

    def mean(self, value: Tensor) -> float:
        return float(value)

    def record(self, values: Mapping[str, float | int]) -> None:
        append_metrics(self.path / METRICS_FILE, values)

    def cut_metrics_after(self, done: int) -> None:
        cut_metrics(self.path / METRICS_FILE, done)


def run_record() -> str:
    """The commit and command that a run is started with, as JSON."""
    record = {"git_commit": git_commit(), "command": [Path(sys.argv[0]).name, *sys.argv[1:]]}
    return json.dumps(record, indent=2) + "\n"


def check_same_settings(then: Settings, now: Settings, component: str, place: str) -> None:
    """Raises TccpError naming the first setting that differs and that the training of the component depends on."""
    before, after = _deciding(then, component), _deciding(now, component)
    for key, value in after.items():
        if before[key] != value:
            raise TccpError(
                f"{place} was started with other settings ({SETTINGS_FILE} in it): {key} was "
                f"{json.dumps(before[key])[:200]} and is {json.dumps(value)[:200]} now; resume with the old value, or "
                "start another run"
            )


def _deciding(settings: Settings, component: str) -> dict[str, Any]:
    """Settings that the training of a component depends on, without those of other components and of sampling."""
    own = settings.for_variant(component) if component in VARIANTS else settings
    values: dict[str, Any] = json.loads(own.model_dump_json(exclude={"sampling", "variant_overrides"}))
    del values["network"]["gradient_checkpointing"]  # it changes memory use, not results
    if own.training.initial_frames in ("generated", "mix") and component in FIRST_OF:
        first = settings.for_variant(FIRST_OF[component])
        values["sampling"] = json.loads(first.sampling.model_dump_json())
    return values


def append_metrics(path: Path, values: Mapping[str, float | int]) -> None:
    with translated_errors(f"write {path}"), path.open("a") as file:
        file.write(json.dumps(dict(values)) + "\n")


def cut_metrics(path: Path, done: int) -> None:
    """Drops the metrics of all but the first `done` steps from a metrics file."""
    if path.exists():
        kept = [line for line in path.read_text().splitlines() if json.loads(line)["step"] < done]
        path.write_text("".join(line + "\n" for line in kept))
