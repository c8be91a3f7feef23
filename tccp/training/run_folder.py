"""Where a training keeps checkpoints and metrics: one interface for a local folder and for the storage of a cluster."""

from __future__ import annotations

import json
import logging
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
from tccp.files import Folder, atomic_folder, sync, translated_errors, write_atomic
from tccp.models.variants import FIRST_OF, VARIANTS
from tccp.training.checkpoint_files import damage_of, write_contents

logger = logging.getLogger("tccp.training")

KEEP_CHECKPOINTS = 2
SETTINGS_FILE = "settings.json"
RUN_RECORD = "run.json"
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


@dataclass(frozen=True)
class RunFolder:
    """A run of one process in a folder: `settings.json`, `run.json`, `metrics.jsonl`, `checkpoints/step-N/`."""

    path: Path
    rank: int = 0
    num_ranks: int = 1

    @classmethod
    def open(cls, path: Path, settings: Settings, component: str, *, resume: bool) -> RunFolder:
        """Makes the folder for a training of `component`, or opens the existing one to resume.

        A changed learning rate or gradient clip is noted in `run.json` (`changes_since`).
        Raises TccpError if the folder holds a run and `resume` is False, or a run with other settings.
        """
        run = cls(path)
        if not cls.check(path, settings, component, resume=resume):
            write_atomic(path / RUN_RECORD, run_record().encode())
            # Last, because its presence says that the run can be resumed.
            write_atomic(path / SETTINGS_FILE, settings_to_json(settings).encode())
            return run
        take_settings(Folder(path), Folder(path), settings, component, run.latest() or 0)
        return run

    @staticmethod
    def check(path: Path, settings: Settings, component: str, *, resume: bool) -> bool:
        """Whether the folder holds a run. Raises TccpError as `open`, and changes nothing."""
        if not (path / SETTINGS_FILE).exists():
            return False
        changes_since(stored_settings(Folder(path)), settings, component, str(path), WAYS_ON)
        if not resume:
            raise TccpError(
                f"{path} holds a run already: give --resume to continue it, or --restart to remove it and begin anew"
            )
        return True

    @property
    def git_commit(self) -> str:
        """The commit that the run was started with."""
        return str(read_record(Folder(self.path)).get("git_commit", "unknown"))

    @property
    def changes(self) -> list[dict[str, Any]]:
        """The changes of settings with which the run was resumed, oldest first."""
        return changes_of(Folder(self.path))

    def checkpoint(self, step: int) -> Path:
        return self.path / "checkpoints" / f"step-{step:07d}"

    def _checkpoints(self) -> list[Path]:
        """All checkpoints, damaged ones too, oldest first."""
        return sorted((self.path / "checkpoints").glob("step-*"), key=_step_of)

    def latest(self) -> int | None:
        """Number of steps done at the newest checkpoint that is not damaged."""
        newest, _ = self._undamaged()
        return None if newest is None else _step_of(newest)

    def newest(self) -> Path | None:
        """The newest checkpoint that is not damaged. Newer ones, which are, are named in the log."""
        newest, damaged = self._undamaged()
        for name, problem in damaged.items():
            taken = "its beginning" if newest is None else newest.name
            logger.warning(
                "%s is damaged (%s): training goes on from %s", self.path / "checkpoints" / name, problem, taken
            )
        return newest

    def _undamaged(self) -> tuple[Path | None, dict[str, str]]:
        damaged: dict[str, str] = {}
        for path in reversed(self._checkpoints()):
            problem = damage_of(Folder(path.parent), path.name)
            if problem is None:
                return path, damaged
            damaged[path.name] = problem
        return None, damaged

    @contextmanager
    def saving(self, step: int, metrics: Mapping[str, float]) -> Iterator[Path]:
        if (self.path / METRICS_FILE).exists():
            sync(self.path / METRICS_FILE)
        with atomic_folder(self.checkpoint(step)) as folder:
            yield folder
            write_contents(folder)
        until_now = [path for path in self._checkpoints() if _step_of(path) <= step]
        for path in self._checkpoints():  # those of later steps were damaged, and training has begun before them
            if path not in until_now[-KEEP_CHECKPOINTS:]:
                shutil.rmtree(path)

    def asked_to_save(self) -> bool:
        return False

    def mean(self, value: Tensor) -> float:
        return float(value)

    def record(self, values: Mapping[str, float | int]) -> None:
        append_metrics(self.path / METRICS_FILE, values)

    def cut_metrics_after(self, done: int) -> None:
        cut_metrics(self.path / METRICS_FILE, done)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def run_record() -> str:
    """The commit and command that a run is started with, as JSON."""
    record = {"git_commit": git_commit(), "command": _command()}
    return json.dumps(record, indent=2) + "\n"


def _command() -> list[str]:
    return [Path(sys.argv[0]).name, *sys.argv[1:]]


def read_record(folder: Folder) -> dict[str, Any]:
    """`run.json` of a run; empty if it is missing or damaged, because no training depends on it."""
    try:
        record = json.loads(folder.read(RUN_RECORD))
    except (FileNotFoundError, ValueError):
        logger.warning(
            "%s is missing or damaged: the commit that the run began with is unknown", folder.path(RUN_RECORD)
        )
        return {}
    return record if isinstance(record, dict) else {}


def stored_settings(run: Folder) -> Settings:
    """The settings of the run in a folder. Raises TccpError, which names the file, if they are damaged."""
    try:
        return settings_from_json(run.read(SETTINGS_FILE).decode())
    except (TccpError, UnicodeDecodeError) as error:
        raise TccpError(
            f"{run.path(SETTINGS_FILE)} is damaged ({error}): restore it, or remove the folder {run} to train anew"
        ) from None


RESUMED_WITH = {
    "autoencoder": ("autoencoder.learning_rate", "training.gradient_clip"),
    "variant": ("training.learning_rate", "training.gradient_clip"),
}
"""Settings that may change when a training is resumed, the way on after a loss that is not finite."""
_NOT_OF_AUTOENCODER = ("variant_overrides", "window", "context", "surround", "network", "diffusion", "lips", "sampling")
_OWN_OF_AUTOENCODER = ("batch_size", "max_steps", "learning_rate", "accumulation")


WAYS_ON = "give --resume with the old values to continue it, or --restart to remove it and begin anew"
"""The advice of `tccp train` if a run was started with other settings."""


def changes_since(
    then: Settings,
    now: Settings,
    component: str,
    place: str,
    ways_on: str = "resume with the old values, or start another run",
) -> dict[str, dict[str, Any]]:
    """The changed settings among RESUMED_WITH: `was` and `is` by key.

    Raises TccpError naming all others that have changed and that the training of the component depends on; its message
    ends with `ways_on`.
    """
    before, after = _deciding(then, component), _deciding(now, component)
    allowed = RESUMED_WITH["variant" if component in VARIANTS else "autoencoder"]
    different = [key for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key)]
    refused = [key for key in different if key not in allowed]
    if refused:
        values = ", ".join(
            f"{key} was {json.dumps(before.get(key))} and is {json.dumps(after.get(key))} now" for key in refused
        )
        raise TccpError(f"{place} was started with other settings ({SETTINGS_FILE} in it): {values}; {ways_on}")
    return {key: {"was": before.get(key), "is": after.get(key)} for key in different}


def take_settings(run: Folder, record_in: Folder, settings: Settings, component: str, step: int) -> None:
    """Makes these the settings of a run that is resumed at `step`, and notes what has changed in `run.json`.

    record_in: the folder of `run.json`. Raises TccpError as `changes_since`.
    """
    changes = changes_since(stored_settings(run), settings, component, str(run))
    if not changes:
        return
    change = {"component": component, "at_step": step, "settings": changes, "git_commit": git_commit()}
    logger.info("%s goes on from step %d with %s", component, step, _in_words(changes))
    record = read_record(record_in)
    record["changes"] = [*record.get("changes", []), {**change, "command": _command()}]
    record_in.write(RUN_RECORD, (json.dumps(record, indent=2) + "\n").encode())
    run.write(SETTINGS_FILE, settings_to_json(settings).encode())


def changes_of(record_in: Folder, component: str | None = None) -> list[dict[str, Any]]:
    """The changes that `take_settings` has noted, oldest first; those of one component, or all."""
    changes: list[dict[str, Any]] = read_record(record_in).get("changes", [])
    return [change for change in changes if component in (None, change["component"])]


def _in_words(changes: Mapping[str, Mapping[str, Any]]) -> str:
    return ", ".join(f"{key} {json.dumps(one['is'])} (was {json.dumps(one['was'])})" for key, one in changes.items())


def _deciding(settings: Settings, component: str) -> dict[str, Any]:
    """Settings that the training of a component depends on, without those of other components, by dotted key."""
    if component in VARIANTS:
        own = settings.for_variant(component)
        values: dict[str, Any] = json.loads(own.model_dump_json(exclude={"sampling", "variant_overrides"}))
        del values["network"]["gradient_checkpointing"]  # it changes memory use, not results
        del values["autoencoder"]["learning_rate"]
        if own.training.initial_frames in ("generated", "mix") and component in FIRST_OF:
            first = settings.for_variant(FIRST_OF[component])
            values["sampling"] = json.loads(first.sampling.model_dump_json())
        return _leaves(values)
    values = json.loads(settings.model_dump_json(exclude=set(_NOT_OF_AUTOENCODER)))
    for key in _OWN_OF_AUTOENCODER:  # see `autoencoder_training`
        del values["training"][key]
    return _leaves(values)


def _leaves(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in values.items():
        leaves |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return leaves


def append_metrics(path: Path, values: Mapping[str, float | int]) -> None:
    with translated_errors(f"write {path}"), path.open("a") as file:
        file.write(json.dumps(dict(values)) + "\n")


def cut_metrics(path: Path, done: int) -> None:
    """Drops the metrics of all but the first `done` steps from a metrics file.

    A line that is not whole, because the machine stopped or the disk was full, is dropped too, and the log says so.
    """
    if not path.exists():
        return
    kept, damaged = [], 0
    for line in path.read_bytes().splitlines():
        try:
            step = int(json.loads(line)["step"])
        except (ValueError, TypeError, KeyError):
            damaged += 1
            continue
        if step < done:
            kept.append(line + b"\n")
    if damaged:
        logger.warning("%s: %d lines that are not whole are left out", path, damaged)
    write_atomic(path, b"".join(kept))
