"""Runs a network from a recording of its operations, without Python between them.

A small network spends a third of its time in Python, and Python runs in one thread at a time. A recording gives the
same numbers bit for bit, and two threads with one each do not wait for each other.
"""

from __future__ import annotations

import threading
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tccp.models.conditions import Conditions
from tccp.models.layers import join_weights
from tccp.models.mvcontrolnet import MVControlNet, Prepared
from tccp.models.pretrained import Config

EAGER_CALLS = 24
"""Evaluations of one shape before it is recorded, which takes as long as some twenty of them (toy)."""


class TracedNetwork:
    """A network in evaluation mode for sampling. On a CPU, shapes that are used often are recorded.

    It must not be trained or changed from then on. Threads may share it.
    """

    def __init__(self, network: MVControlNet):
        self.network = network.requires_grad_(False)  # a recording holds the weights as constants
        join_weights(network)
        self._recordings: dict[torch.Size, Callable[..., Tensor]] = {}
        self._calls: Counter[torch.Size] = Counter()
        self._lock = threading.Lock()

    @property
    def config(self) -> Config:
        return self.network.config

    @property
    def dtype(self) -> torch.dtype:
        return self.network.dtype

    def prepare(self, conditions: Conditions, control_latents: Tensor | None, num_frames: int) -> Prepared:
        return self.network.prepare(conditions, control_latents, num_frames)

    def __call__(
        self, noisy_latents: Float[Tensor, "b c f h w"], t: Int[Tensor, "b f"], prepared: Prepared
    ) -> Float[Tensor, "b c f h w"]:
        """Like MVControlNet."""
        shape = noisy_latents.shape
        if shape not in self._recordings and not self._is_due(noisy_latents):
            return self.network(noisy_latents, t, prepared)
        tensors: list[Tensor] = []
        structure = _flattened(prepared, tensors)
        with torch.jit.optimized_execution(False):  # optimising takes longer than it saves
            if shape not in self._recordings:

                def evaluate(latents: Tensor, times: Tensor, *parts: Tensor) -> Tensor:
                    return self.network(latents, times, _restored(structure, list(parts)))

                given = noisy_latents, t, *tensors
                with warnings.catch_warnings():  # of Python values that depend on the shape only
                    warnings.simplefilter("ignore", torch.jit.TracerWarning)
                    self._recordings[shape] = torch.jit.trace(evaluate, given, check_trace=False)
            return self._recordings[shape](noisy_latents, t, *tensors)

    def _is_due(self, latents: Tensor) -> bool:
        if latents.device.type != "cpu":
            return False
        with self._lock:
            self._calls[latents.shape] += 1
            return self._calls[latents.shape] > EAGER_CALLS


def _flattened(value: Any, tensors: list[Tensor]) -> Any:
    """Appends the tensors in a structure to `tensors`; returns the structure with their places."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return len(tensors) - 1
    if isinstance(value, Prepared):
        return {name: _flattened(part, tensors) for name, part in vars(value).items()}
    return None if value is None else type(value)(_flattened(part, tensors) for part in value)


def _restored(structure: Any, tensors: list[Tensor]) -> Any:
    if isinstance(structure, int):
        return tensors[structure]
    if isinstance(structure, dict):
        return Prepared(**{name: _restored(part, tensors) for name, part in structure.items()})
    return None if structure is None else type(structure)(_restored(part, tensors) for part in structure)
