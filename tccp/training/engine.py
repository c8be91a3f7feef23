"""The seam between the training loop and what computes the update: plain torch, or others behind the same methods."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from tccp.config import TrainingSettings

OPTIMISER_FILE = "optimizer.pt"


@runtime_checkable
class Engine(Protocol):
    """One micro-batch is `backward(loss)` then `step()`; the optimiser moves at every `accumulation`-th step."""

    module: nn.Module
    grad_norm: float  # of the last update, before clipping
    learning_rate: float  # of the last update

    def backward(self, loss: Tensor) -> None: ...

    def step(self) -> bool:
        """Moves on by one micro-batch; True if the parameters were updated."""

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...


def learning_rate_factor(settings: TrainingSettings) -> Callable[[int], float]:
    """Multiplier of the learning rate for update k = 0, 1, ...: warm-up, then constant or linearly down to zero."""

    def factor(update: int) -> float:
        warm = min(1.0, (update + 1) / settings.warmup_steps) if settings.warmup_steps else 1.0
        if settings.schedule == "constant":
            return warm
        remaining = (settings.max_steps - update) / max(1, settings.max_steps - settings.warmup_steps)
        return max(0.0, min(warm, remaining))

    return factor


class TorchEngine:
    """Plain torch in one process. Adam, as in Table 3; frozen parameters get no optimiser state."""

    def __init__(self, module: nn.Module, settings: TrainingSettings):
        self.module = module
        self.settings = settings
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(self.parameters, lr=settings.learning_rate, betas=settings.adam_betas)
        self.factor = learning_rate_factor(settings)
        self.micro_steps = 0
        self.grad_norm = 0.0
        self.learning_rate = 0.0

    def backward(self, loss: Tensor) -> None:
        (loss / self.settings.accumulation).backward()

    def step(self) -> bool:
        self.micro_steps += 1
        if self.micro_steps % self.settings.accumulation:
            return False
        update = self.micro_steps // self.settings.accumulation - 1
        self.learning_rate = self.settings.learning_rate * self.factor(update)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        limit = self.settings.gradient_clip or float("inf")
        self.grad_norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, limit))
        if not math.isfinite(self.grad_norm):
            raise FloatingPointError(f"the gradient's norm is {self.grad_norm}")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return True

    def save(self, folder: Path) -> None:
        state = {
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "micro_steps": self.micro_steps,
        }
        torch.save(state, folder / OPTIMISER_FILE)

    def load(self, folder: Path) -> None:
        state = torch.load(folder / OPTIMISER_FILE, weights_only=True)
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.micro_steps = state["micro_steps"]
