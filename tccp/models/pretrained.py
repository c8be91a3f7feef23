"""Networks that are saved with the arguments of their constructor, in diffusers' file format.

A folder has `config.json` and `diffusion_pytorch_model.safetensors`. diffusers reads the folders that are written here,
and the other way round. Its own base class is not used, because importing it takes as long as importing torch.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tccp.strict_json import parse_json

CONFIG_FILE, WEIGHTS_FILE = "config.json", "diffusion_pytorch_model.safetensors"
Network = TypeVar("Network", bound="Pretrained")


class Config(Mapping[str, Any]):
    """The arguments of a network's constructor, as items and as attributes."""

    def __init__(self, arguments: Mapping[str, Any]):
        self.__dict__.update(arguments)

    def __getitem__(self, name: str) -> Any:
        return self.__dict__[name]

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"this network has no argument {name!r}")

    def __iter__(self) -> Iterator[str]:
        return iter(self.__dict__)

    def __len__(self) -> int:
        return len(self.__dict__)


_RANDOM_FILLS = nn.init.kaiming_uniform_, nn.init.uniform_, nn.init.normal_, Tensor.uniform_, Tensor.normal_


class _Uninitialised(TorchFunctionMode):
    """Creates modules without random weights. Building them on the meta device would import torch's compiler."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _RANDOM_FILLS:
            return args[0] if args else kwargs["tensor"]
        return (torch.empty if func is torch.randn else func)(*args, **kwargs)


def with_config(init: Callable[..., None]) -> Callable[..., None]:
    """Decorates the constructor of a `Pretrained`: stores its arguments, with the defaults, as `config`."""
    signature = inspect.signature(init)

    @functools.wraps(init)
    def initialise(self: Pretrained, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        self.config = Config(dict(list(bound.arguments.items())[1:]))  # before the body, which may use it
        init(self, *args, **kwargs)

    return initialise


class Pretrained(nn.Module):
    """Base class of networks that are saved and loaded. Decorate the constructor with `with_config`."""

    class_name: ClassVar[str | None] = None
    """The name of the class in `config.json`; None: its own."""
    config: Config

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @classmethod
    def adapt(cls, config: dict[str, Any], weights: dict[str, Tensor]) -> None:
        """Changes what the files hold to what the constructor takes, in place. Raises ValueError if it cannot."""

    def to_channels_last(self: Network) -> Network:
        """Stores the weights of 2D convolutions in the memory format that is fastest here."""
        for parameter in self.parameters():
            if parameter.dim() == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        return self

    def stored_config(self) -> dict[str, Any]:
        """The arguments of the constructor as `config.json` holds them."""
        return dict(self.config)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the network. The folder is created."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        config = {"_class_name": self.class_name or type(self).__name__, **self.stored_config()}
        (Path(folder) / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        weights = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        save_file(weights, Path(folder) / WEIGHTS_FILE, metadata={"format": "pt"})

    @classmethod
    def from_pretrained(cls: type[Network], folder: str | Path, dtype: torch.dtype = torch.float32) -> Network:
        """Loads a network from a local folder, in evaluation mode.

        Raises OSError if a file is missing, and ValueError if the folder holds another network or is damaged.
        """
        config = parse_json((Path(folder) / CONFIG_FILE).read_bytes())
        name = cls.class_name or cls.__name__
        if not isinstance(config, dict) or config.get("_class_name", name) != name:
            raise ValueError(f"{CONFIG_FILE} is not that of {name}")
        try:
            weights = load_file(Path(folder) / WEIGHTS_FILE)
        except SafetensorError as error:
            raise ValueError(f"{WEIGHTS_FILE} is damaged: {error}") from None
        arguments = {key: value for key, value in config.items() if not key.startswith("_")}
        cls.adapt(arguments, weights)
        try:
            with _Uninitialised():
                network = cls(**arguments)
        except (KeyError, RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:  # of impossible arguments
            raise ValueError(f"{CONFIG_FILE}: {type(error).__name__}: {' '.join(str(error).split())}") from None
        # Copies: the file's own memory would change or vanish with the file.
        copies = {name: value.to(dtype, copy=True) for name, value in weights.items()}
        try:
            network.load_state_dict(copies, assign=True)
        except RuntimeError as error:
            raise ValueError(" ".join(str(error).split())) from None
        return network.eval()
