"""The exponential moving average of weights, which becomes the trained network."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class AveragedWeights:
    """The average of parameters over the steps of a training, in their order.

    decay: at step n it is min(decay, n / (n + 9)), so that the first, random weights count little; the first step takes
    the parameters as they are.
    """

    def __init__(self, parameters: Iterable[Tensor], decay: float):
        self.decay = decay
        self.steps = 0
        self.weights = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def step(self, parameters: Iterable[Tensor]) -> None:
        """Takes the parameters after a step. Those that are not trained are copied."""
        self.steps += 1
        decay = min(self.decay, self.steps / (self.steps + 9)) if self.steps > 1 else 0.0
        pairs = list(zip(self.weights, parameters, strict=True))
        trained = [(weight, parameter) for weight, parameter in pairs if parameter.requires_grad]
        if trained:
            weights, given = map(list, zip(*trained, strict=True))
            torch._foreach_lerp_(weights, given, 1 - decay)
        for weight, parameter in pairs:
            if not parameter.requires_grad:
                weight.copy_(parameter)

    def to(self, device: torch.device) -> None:
        self.weights = [weight.to(device) for weight in self.weights]

    def state_dict(self) -> dict[str, Any]:
        return {"decay": self.decay, "optimization_step": self.steps, "shadow_params": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Also takes the state of diffusers' EMAModel, which earlier versions stored."""
        self.decay, self.steps = float(state["decay"]), int(state["optimization_step"])
        self.weights = [weight.detach().clone() for weight in state["shadow_params"]]
