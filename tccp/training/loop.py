"""The training loop: steps, EMA, checkpoints, metrics and progress. It does not depend on Ray, DeepSpeed or the model.

All random numbers of step k are seeded by (seed, k) or by window ids, so an interrupted and resumed run gives bit for
bit the same result as an uninterrupted one.
"""

from __future__ import annotations

import json
import math
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from tccp.config import TrainingSettings
from tccp.errors import TccpError
from tccp.progress import progress
from tccp.seeds import rng_seed
from tccp.training.averaged_weights import AveragedWeights
from tccp.training.checkpoint_files import EMA_FILE, PROGRESS_FILE
from tccp.training.engine import Engine, save_tensors
from tccp.training.run_folder import Run, TransientRun


@dataclass(frozen=True)
class SettingKeys:
    """The keys of the settings of one component that keep a training from diverging."""

    learning_rate: str = "training.learning_rate"
    gradient_clip: str = "training.gradient_clip"

    def way_on(self, settings: TrainingSettings) -> str:
        """What to do after a loss that is not finite."""
        rate, clip = settings.learning_rate, settings.gradient_clip
        now = "off" if clip is None else f"{clip!r}"
        return (
            f"go on with --resume and a lower {self.learning_rate} (it is {rate!r}), such as --set "
            f"{self.learning_rate}={rate / 3:.2g}, or a lower {self.gradient_clip} (it is {now})"
        )


class NonFiniteLoss(TccpError):
    """The loss or the norm of its gradient is NaN or infinite. The last good checkpoint is kept."""


@dataclass(frozen=True)
class FitResult:
    """The result of one call of `fit`.

    losses: one value per step of this call. seconds: wall-clock time of the whole run, including earlier calls.
    steps: number of steps of this call.
    """

    losses: list[float] = field(repr=False)
    seconds: float = 0.0
    steps: int = 0


def fit(
    engine: Engine,
    loss_of: Callable[[int, int], Tensor],
    settings: TrainingSettings,
    *,
    seed: int,
    ema: AveragedWeights,
    run: Run | None = None,
    title: str = "training",
    stop_at: int | None = None,
    describe_step: Callable[[int], Sequence[str]] | None = None,
    waited_s: Callable[[], float] = lambda: 0.0,
    keys: SettingKeys = SettingKeys(),
    validate: Callable[[int, list[Tensor]], Mapping[str, float]] | None = None,
) -> FitResult:
    """Trains from the newest checkpoint of `run`, or from the start, to `settings.max_steps`.

    loss_of(step, micro): this rank's loss of one micro-batch, a pure function of its arguments and the module's
        parameters. The step's loss is the mean over micro-batches and ranks.
    ema: moving averages of `engine.local_parameters()`.
    stop_at: ends the call after this many steps, with a checkpoint. The learning-rate schedule still runs to
        max_steps.
    describe_step: names what step k trained on, for the error message if its loss is not finite.
    waited_s: gives the total time spent waiting for data, in seconds, for the metrics.
    keys: of the settings that can end a divergence, for the error message.
    validate(step, weights): called on rank 0 before each checkpoint with the moving averages. The checkpoint's metrics
        include the values it returns.
    Raises NonFiniteLoss on all ranks; nothing of that step is kept.
    """
    run = run or TransientRun()
    done, seconds_before = _resume(engine, ema, run.newest())
    run.cut_metrics_after(done)
    last = min(settings.max_steps, stop_at or settings.max_steps)
    losses: list[float] = []

    def diverged(problem: str, step: int) -> str:
        trained_on = f"; it trained on {', '.join(describe_step(step))}" if describe_step else ""
        latest = run.latest()
        kept = f"the checkpoint at step {latest} is kept" if latest else "no checkpoint yet"
        return f"{problem} at step {step}{trained_on}; {kept}; {keys.way_on(settings)}"

    started = time.monotonic() - seconds_before
    meter = _Meter(settings.batch_size, waited_s)
    engine.module.train()
    with progress(shown=run.rank == 0) as bar:
        task = bar.add_task(title, total=settings.max_steps, completed=done)
        for step in range(done, last):
            torch.manual_seed(rng_seed(seed, "step", step, *([run.rank] if run.rank else [])))  # dropout
            total, loss = torch.zeros(()), math.nan
            for micro in range(settings.accumulation):
                value = loss_of(step, micro)
                engine.backward(value)
                total = total + value.detach() / settings.accumulation
                if micro + 1 == settings.accumulation:
                    loss = run.mean(total)
                    if not math.isfinite(loss):
                        raise NonFiniteLoss(diverged(f"the loss is {loss}", step))
                try:
                    engine.step()
                except FloatingPointError as error:
                    raise NonFiniteLoss(diverged(str(error), step)) from None
            ema.step(engine.local_parameters())
            losses.append(loss)
            ends = step + 1 == last
            bar.update(task, completed=step + 1, description=f"{title}  loss {loss:.4g}")
            if step % settings.log_every == 0 or ends:
                seconds = round(time.monotonic() - started, 3)
                figures = {"loss": loss, "grad_norm": engine.grad_norm, "learning_rate": engine.learning_rate}
                run.record({"step": step, **figures, "seconds": seconds, **meter.read(step + 1)})
            if run.asked_to_save() or (step + 1) % settings.checkpoint_every == 0 or ends:
                weights = engine.gather(ema.weights)
                measured = dict(validate(step + 1, weights)) if validate and run.rank == 0 else {}
                with run.saving(step + 1, {"loss": loss, **measured}) as folder:
                    engine.save(folder)
                    if run.rank == 0:
                        save_tensors({**ema.state_dict(), "shadow_params": weights}, folder / EMA_FILE)
                        record = {"steps": step + 1, "seconds": time.monotonic() - started}
                        (folder / PROGRESS_FILE).write_text(json.dumps(record) + "\n")
    return FitResult(losses, time.monotonic() - started, len(losses))


def _resume(engine: Engine, ema: AveragedWeights, checkpoint: Path | None) -> tuple[int, float]:
    """Restores the engine and the EMA from a checkpoint; returns the steps done and the seconds they took."""
    if checkpoint is None:
        return 0, 0.0
    engine.load(checkpoint)
    state = torch.load(checkpoint / EMA_FILE, weights_only=True, map_location="cpu")
    ema.load_state_dict({**state, "shadow_params": engine.shard(state["shadow_params"])})
    ema.to(engine.local_parameters()[0].device)
    record = json.loads((checkpoint / PROGRESS_FILE).read_text())
    return record["steps"], record["seconds"]


class _Meter:
    """Measures speed and use of the machine between two readings."""

    def __init__(self, batch_size: int, waited_s: Callable[[], float]):
        self.batch_size, self.waited_s = batch_size, waited_s
        self.steps: int | None = None
        self.wall, self.cpu, self.waited = time.monotonic(), time.process_time(), waited_s()

    def read(self, steps: int) -> dict[str, float]:
        """Returns the metrics since the last reading.

        windows_per_s: of all ranks. data_wait, cpu_use: of this rank, as shares of the time. memory_mib,
        gpu_memory_mib: peaks of this rank. gpu_use: 0..1.
        """
        wall, cpu, waited = time.monotonic(), time.process_time(), self.waited_s()
        elapsed = max(wall - self.wall, 1e-9)
        values = {"data_wait": (waited - self.waited) / elapsed, "cpu_use": (cpu - self.cpu) / elapsed}
        if self.steps is not None:  # the first reading includes set-up and compilation
            values["windows_per_s"] = (steps - self.steps) * self.batch_size / elapsed
        values["memory_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        if torch.cuda.is_available():
            values["gpu_memory_mib"] = torch.cuda.max_memory_allocated() / 2**20
            values |= _gpu_use()
        self.steps, self.wall, self.cpu, self.waited = steps, wall, cpu, waited
        return {name: round(value, 4) for name, value in values.items()}


def _gpu_use() -> dict[str, float]:
    try:
        return {"gpu_use": torch.cuda.utilization() / 100}
    except Exception:  # NVIDIA's management library is not always installed
        return {}
