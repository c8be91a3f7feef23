"""Loads published checkpoints into our networks. Reads only tensors from them, never other pickled objects."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tccp.errors import TccpError

_Network = TypeVar("_Network", bound=nn.Module)
_COUNTER = "num_batches_tracked"


def load_published(path: Path, network: _Network, name: str, give: str) -> _Network:
    """Loads a checkpoint into `network` and returns it in eval mode on the CPU.

    path: a `.safetensors` file or a pickled state dict, alone or under the key `state_dict`. A `module.` prefix from
    data-parallel training is removed. Batch counters may be missing: eval mode does not read them, and files from
    before PyTorch 0.4.1 lack them.
    name, give: the network's name and advice on which file to give, for error messages.
    Raises TccpError if the file is missing, unreadable, or has another layout than the network.
    """
    what = f"{name} weights {path}"
    if not path.is_file():
        raise TccpError(f"{what}: no such file; {give}")
    try:
        checkpoint = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except Exception as error:  # the unpickler may raise any exception for bytes that are not a pickle
        raise TccpError(
            f"{what}: not a readable state dict ({type(error).__name__}); a TorchScript archive or a pickle of other "
            f"objects than tensors is not accepted, {give}"
        ) from None
    state = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, Mapping) else None
    if not isinstance(state, Mapping) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise TccpError(f"{what}: holds no state dict; {give}")
    own = network.state_dict()
    counters = {key: tensor for key, tensor in own.items() if key.endswith(_COUNTER)}
    given = counters | {key.removeprefix("module."): tensor for key, tensor in state.items()}
    if difference := _difference(own, given):
        raise TccpError(f"{what}: {difference}; these are not the weights of {name} (another model's?), {give}")
    network.load_state_dict(given)
    return network.eval()


def _difference(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str | None:
    if missing := [key for key in wanted if key not in given]:
        return f"{len(missing)} tensors are missing, e.g. {missing[0]}"
    if unknown := [key for key in given if key not in wanted]:
        return f"{len(unknown)} unknown tensors, e.g. {unknown[0]}"
    for key, tensor in wanted.items():
        if given[key].shape != tensor.shape:
            return f"{key} has shape {tuple(given[key].shape)}, not {tuple(tensor.shape)}"
    return None
