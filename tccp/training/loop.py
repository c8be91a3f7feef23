"""The training loop: steps, EMA, checkpoints, metrics and progress. It knows neither Ray nor DeepSpeed nor the model.

A run is a folder: `settings.json`, `run.json` (commit, command), `metrics.jsonl`, `checkpoints/step-N/`. Everything
random about step k is seeded by (seed, k) or by window ids, so a run that was cut and resumed is the same run, bit
for bit.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor

from tccp.clip import atomic_path
from tccp.config import (
    Settings,
    TccpError,
    TrainingSettings,
    git_commit,
    settings_from_json,
    settings_to_json,
)
from tccp.data import rng_seed
from tccp.progress import progress
from tccp.training.engine import Engine
from tccp.variants import FIRST_OF, VARIANTS

KEEP_CHECKPOINTS = 2
EMA_FILE = "ema.pt"
SPENT_FILE = "spent.json"
SETTINGS_FILE = "settings.json"


class NonFiniteLoss(TccpError):
    """The loss, or its gradient, is not a number any more; the last good checkpoint stays."""


@contextmanager
def atomic_folder(final: Path) -> Iterator[Path]:
    """A temporary folder beside `final` that takes its name when the block succeeds and vanishes when it does not."""
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
    try:
        yield temporary
        if final.exists():
            shutil.rmtree(final)
        os.replace(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@dataclass(frozen=True)
class RunFolder:
    path: Path

    @classmethod
    def open(cls, path: Path, settings: Settings, component: str, *, resume: bool) -> RunFolder:
        """Makes the folder for a training of `component`, or takes it up again.

        Raises TccpError if it holds a run and `resume` is off, or a run whose training had other settings.
        """
        stored = path / SETTINGS_FILE
        if stored.exists():
            if not resume:
                raise TccpError(f"{path} holds a run already: give --resume to go on with it, or other --weights")
            then, now = (_deciding(one, component) for one in (settings_from_json(stored.read_text()), settings))
            for key, value in now.items():
                if then[key] != value:
                    raise TccpError(
                        f"{path} was started with other settings ({stored}): {key} was {json.dumps(then[key])[:200]} "
                        f"and is {json.dumps(value)[:200]} now; resume with what it was, or give other --weights"
                    )
        else:
            path.mkdir(parents=True, exist_ok=True)
            record = {"git_commit": git_commit(), "command": [Path(sys.argv[0]).name, *sys.argv[1:]]}
            (path / "run.json").write_text(json.dumps(record, indent=2) + "\n")
            with atomic_path(stored) as temporary:  # comes last: where it is, the run can be resumed
                temporary.write_text(settings_to_json(settings))
        return cls(path)

    @property
    def git_commit(self) -> str:
        """With which it was started."""
        return str(json.loads((self.path / "run.json").read_text())["git_commit"])

    def checkpoint(self, step: int) -> Path:
        return self.path / "checkpoints" / f"step-{step:07d}"

    def latest(self) -> int | None:
        """Number of finished steps of the newest complete checkpoint."""
        found = sorted((self.path / "checkpoints").glob("step-*"))
        return int(found[-1].name.removeprefix("step-")) if found else None

    def prune(self) -> None:
        for old in sorted((self.path / "checkpoints").glob("step-*"))[:-KEEP_CHECKPOINTS]:
            shutil.rmtree(old)


def _deciding(settings: Settings, component: str) -> dict[str, Any]:
    """Settings that the training of a component depends on: not those of others, nor how it will be sampled."""
    own = settings.for_variant(component) if component in VARIANTS else settings
    values: dict[str, Any] = json.loads(own.model_dump_json(exclude={"sampling", "variant_overrides"}))
    if own.training.initial_frames in ("generated", "mix") and component in FIRST_OF:
        first = settings.for_variant(FIRST_OF[component])
        values["sampling"] = json.loads(first.sampling.model_dump_json())
    return values


@dataclass(frozen=True)
class FitResult:
    """losses: one value per step that was run here. seconds: wall clock of the whole run, earlier calls included."""

    losses: list[float] = field(repr=False)
    seconds: float = 0.0
    steps: int = 0


def fit(
    engine: Engine,
    loss_of: Callable[[int, int], Tensor],
    settings: TrainingSettings,
    *,
    seed: int,
    ema: EMAModel,
    run: RunFolder | None = None,
    title: str = "training",
    stop_at: int | None = None,
    describe_step: Callable[[int], Sequence[str]] | None = None,
) -> FitResult:
    """Trains from the newest checkpoint of `run`, or from the start, to `settings.max_steps`.

    loss_of(step, micro): the loss of one micro-batch, a pure function of its arguments and the module's parameters.
    stop_at: ends the call early, after a checkpoint, as an interruption would; the learning rate still heads for
        max_steps.
    describe_step: what step k trained on, for the error message when its loss is not finite.
    Raises NonFiniteLoss; nothing of that step is kept.
    """
    device = next(engine.module.parameters()).device
    done = (run.latest() if run else None) or 0
    spent = 0.0
    if run and done:
        spent = json.loads((run.checkpoint(done) / SPENT_FILE).read_text())["seconds"]
        engine.load(run.checkpoint(done))
        ema.load_state_dict(torch.load(run.checkpoint(done) / EMA_FILE, weights_only=True))
        ema.to(device)
        _truncate_metrics(run.path / "metrics.jsonl", done)
    last = min(settings.max_steps, stop_at or settings.max_steps)
    losses: list[float] = []
    started = time.monotonic() - spent
    engine.module.train()
    with progress() as bar:
        task = bar.add_task(title, total=settings.max_steps, completed=done)
        for step in range(done, last):
            torch.manual_seed(rng_seed(seed, "step", step))  # dropout
            loss = 0.0
            for micro in range(settings.accumulation):
                value = loss_of(step, micro)
                loss += value.item() / settings.accumulation
                if not math.isfinite(loss):
                    raise NonFiniteLoss(_diverged(f"the loss is {loss}", step, run, describe_step))
                engine.backward(value)
                try:
                    updated = engine.step()
                except FloatingPointError as error:
                    raise NonFiniteLoss(_diverged(str(error), step, run, describe_step)) from None
            if updated:
                ema.step(engine.module.parameters())
            losses.append(loss)
            bar.update(task, completed=step + 1, description=f"{title}  loss {loss:.4f}")
            if run and (step % settings.log_every == 0 or step + 1 == last):
                _append_metrics(run, step, loss, engine, time.monotonic() - started)
            if run and ((step + 1) % settings.checkpoint_every == 0 or step + 1 == last):
                with atomic_folder(run.checkpoint(step + 1)) as folder:
                    engine.save(folder)
                    torch.save(ema.state_dict(), folder / EMA_FILE)
                    (folder / SPENT_FILE).write_text(json.dumps({"seconds": time.monotonic() - started}) + "\n")
                run.prune()
    return FitResult(losses, time.monotonic() - started, len(losses))


def _diverged(what: str, step: int, run: RunFolder | None, describe: Callable[[int], Sequence[str]] | None) -> str:
    trained_on = f"; it trained on {', '.join(describe(step))}" if describe else ""
    latest = run.latest() if run else None
    kept = f"the checkpoint at step {latest} is kept" if latest else "no checkpoint yet"
    return (
        f"{what} at step {step}{trained_on}; {kept}; train anew with a lower training.learning_rate or with "
        "training.gradient_clip"
    )


def _append_metrics(run: RunFolder, step: int, loss: float, engine: Engine, seconds: float) -> None:
    record = {
        "step": step,
        "loss": loss,
        "grad_norm": engine.grad_norm,
        "learning_rate": engine.learning_rate,
        "seconds": round(seconds, 3),
    }
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")


def _truncate_metrics(path: Path, done: int) -> None:
    """Drops what was logged after the checkpoint that is resumed from: those steps are run again."""
    if path.exists():
        kept = [line for line in path.read_text().splitlines() if json.loads(line)["step"] < done]
        path.write_text("".join(line + "\n" for line in kept))
