"""Engines compute the updates of the training loop: plain torch in one process, or DeepSpeed in many."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
import torch.distributed
from torch import Tensor, nn

from tccp.config import DeepSpeedSettings, TrainingSettings
from tccp.errors import TccpError

_Module = TypeVar("_Module", bound=nn.Module)
OPTIMISER_FILE = "optimizer.pt"
DEEPSPEED_TAG = "deepspeed"
LAYOUT_FILE = "layout.json"


@runtime_checkable
class Engine(Protocol):
    """A micro-batch calls `backward(loss)`, then `step()`. The optimiser updates at every `accumulation`-th step.

    All ranks must call all methods equally often and in the same order.
    """

    module: nn.Module
    forward: Callable[..., Any]  # call it instead of `module`
    grad_norm: float  # of the last update, before clipping
    learning_rate: float  # of the last update

    def backward(self, loss: Tensor) -> None: ...

    def step(self) -> bool:
        """Ends a micro-batch; returns whether it updated the parameters.

        Raises FloatingPointError if the norm of the gradient is not finite.
        """

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...

    def local_parameters(self) -> list[nn.Parameter]:
        """This rank's share of each parameter of the module: the whole parameter, or a flat part of it."""

    def gather(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Joins tensors shaped like `local_parameters` to whole ones on rank 0's CPU; other ranks get empty tensors."""

    def shard(self, wholes: Sequence[Tensor]) -> list[Tensor]:
        """This rank's parts of whole tensors; the inverse of `gather`."""


def learning_rate_factor(settings: TrainingSettings) -> Callable[[int], float]:
    """Multiplier of the learning rate for update k = 0, 1, ...: warm-up, then constant or linear decay to zero."""

    def factor(update: int) -> float:
        warm = min(1.0, (update + 1) / settings.warmup_steps) if settings.warmup_steps else 1.0
        if settings.schedule == "constant":
            return warm
        remaining = (settings.max_steps - update) / max(1, settings.max_steps - settings.warmup_steps)
        return max(0.0, min(warm, remaining))

    return factor


def _adam(module: nn.Module, settings: TrainingSettings) -> torch.optim.Adam:
    """Adam with the settings of Table 3; frozen parameters get no state."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    # Fused: one call updates a parameter, in place of a dozen.
    return torch.optim.Adam(trainable, lr=settings.learning_rate, betas=settings.adam_betas, fused=True)


def _finite(norm: float) -> float:
    if not math.isfinite(norm):
        raise FloatingPointError(f"the gradient's norm is {norm}")
    return norm


def save_tensors(state: dict[str, Any], path: Path) -> None:
    """`torch.save` into a file that Python opened: torch's own error would not say that the disk is full."""
    with path.open("wb") as file:
        torch.save(state, file)


class TorchEngine:
    """Plain torch in one process."""

    def __init__(self, module: nn.Module, settings: TrainingSettings):
        self.module = module
        self.forward: Callable[..., Any] = module
        self.settings = settings
        self.optimizer = _adam(module, settings)
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
        trained = self.optimizer.param_groups[0]["params"]
        self.grad_norm = _finite(float(torch.nn.utils.clip_grad_norm_(trained, limit)))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return True

    def save(self, folder: Path) -> None:
        state = {
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "micro_steps": self.micro_steps,
        }
        save_tensors(state, folder / OPTIMISER_FILE)

    def load(self, folder: Path) -> None:
        # To the CPU first: the checkpoint may have been written on a GPU that this machine lacks.
        state = torch.load(folder / OPTIMISER_FILE, weights_only=True, map_location="cpu")
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.micro_steps = state["micro_steps"]

    def local_parameters(self) -> list[nn.Parameter]:
        return list(self.module.parameters())

    def gather(self, parts: Sequence[Tensor]) -> list[Tensor]:
        return [part.detach().cpu() for part in parts]

    def shard(self, wholes: Sequence[Tensor]) -> list[Tensor]:
        return list(wholes)


OURS = {
    "train_batch_size": "training.batch_size",
    "train_micro_batch_size_per_gpu": "training.accumulation",
    "gradient_accumulation_steps": "training.accumulation",
    "gradient_clipping": "training.gradient_clip",
    "optimizer": "training.learning_rate and training.adam_betas",
    "scheduler": "training.schedule and training.warmup_steps",
    "fp16": "training.precision",
    "bf16": "training.precision",
    "amp": "training.precision",
    "zero_optimization.stage": "zero_stage",
    "zero_optimization.offload_optimizer": "offload",
    "zero_optimization.offload_param": "offload",
}
"""DeepSpeed settings that are computed from our settings (named on the right), and therefore cannot be given."""


def deepspeed_config(
    training: TrainingSettings, parallel: DeepSpeedSettings, num_ranks: int, num_parameters: int
) -> dict[str, Any]:
    """DeepSpeed's configuration for these settings; entries of `parallel.config` override it, key by key.

    Weights stay in single precision, and the module itself applies reduced precision (autocast), so that every ZeRO
    stage gives the same numbers as plain torch. Raises TccpError if the batch size is not divisible, or if
    `parallel.config` has a key of `OURS`.
    """
    nested = parallel.config.get("zero_optimization")
    given = [*parallel.config, *(f"zero_optimization.{key}" for key in (nested if isinstance(nested, dict) else ()))]
    for key in given:
        if key in OURS:
            raise TccpError(f"DeepSpeed's setting {key} follows from {OURS[key]}: give that, and leave {key} out")
    parts = training.accumulation * num_ranks
    if training.batch_size % parts:
        raise TccpError(
            f"training.batch_size {training.batch_size} cannot be divided among {num_ranks} workers x "
            f"{training.accumulation} micro-batches: make it a multiple of {parts}, or change the number of workers"
        )
    stage = parallel.stage(num_ranks)
    bucket = max(1, min(500_000_000, num_parameters))  # DeepSpeed allocates full buckets even for small networks
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    if parallel.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if parallel.offload == "parameters":
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    derived = {
        "train_batch_size": training.batch_size,
        "train_micro_batch_size_per_gpu": training.batch_size // parts,
        "gradient_accumulation_steps": training.accumulation,
        "gradient_clipping": training.gradient_clip or 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's Adam is used; DeepSpeed would first compile its own
    }
    return _merged(derived, parallel.config)


def _merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _merged(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged


def _import_deepspeed() -> Any:
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    try:
        with _without_mlflow():
            import deepspeed
            import deepspeed.ops
    except ImportError:
        raise TccpError("this training needs DeepSpeed: pip install -c constraints.txt -e '.[train]'") from None
    deepspeed.utils.logger.setLevel("WARNING")
    if not torch.cuda.is_available():
        # Without this, DeepSpeed spends half a minute compiling a faster all-reduce for the ranks of one machine.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


@contextmanager
def _without_mlflow() -> Iterator[None]:
    """Hides MLflow from imports. DeepSpeed's autotuner imports it if it can, which costs each rank 4 CPU seconds."""
    if "mlflow" in sys.modules:
        yield
        return
    sys.modules["mlflow"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["mlflow"]


class DeepSpeedEngine:
    """DeepSpeed with ZeRO stages 0 to 3 on the ranks of torch's process group.

    Its checkpoints are DeepSpeed's own. They contain pickles: load them from trusted storage only.
    """

    def __init__(
        self,
        module: nn.Module,
        training: TrainingSettings,
        parallel: DeepSpeedSettings,
        resume_from: Path | None = None,
    ):
        """resume_from: the checkpoint to load later. DeepSpeed must know now if another number of ranks wrote it."""
        deepspeed = _import_deepspeed()
        device = next(module.parameters()).device
        deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo")
        self.training = training
        self.rank, self.num_ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.stage = parallel.stage(self.num_ranks)
        self.wholes = [tuple(p.shape) for p in module.parameters()]
        config = deepspeed_config(training, parallel, self.num_ranks, sum(p.numel() for p in module.parameters()))
        self.universal = resume_from is not None and self._written_by_others(resume_from)
        if self.universal:
            config["checkpoint"] = {"load_universal": True}
        optimizer = _adam(module, training)
        self.engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
        self.module = module
        self.forward: Callable[..., Any] = self.engine
        self.factor = learning_rate_factor(training)
        self.micro_steps = 0
        self.grad_norm = 0.0
        self.learning_rate = 0.0

    def _written_by_others(self, folder: Path) -> bool:
        layout = json.loads((folder / LAYOUT_FILE).read_text())
        if layout["zero_stage"] != self.stage and {layout["zero_stage"], self.stage} != {1, 2}:
            raise TccpError(
                f"the checkpoint was written by ZeRO stage {layout['zero_stage']} and cannot be resumed by stage "
                f"{self.stage}: give --zero-stage {layout['zero_stage']}"
            )
        return self.stage > 0 and layout["num_ranks"] != self.num_ranks

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)

    def step(self) -> bool:
        self.micro_steps += 1
        updates = self.micro_steps % self.training.accumulation == 0
        if updates:
            update = self.micro_steps // self.training.accumulation - 1
            self.learning_rate = self.training.learning_rate * self.factor(update)
            for group in self.engine.optimizer.param_groups:
                group["lr"] = self.learning_rate
            if self.stage == 0:
                grads = [p.grad for p in self.module.parameters() if p.grad is not None]
                self.grad_norm = _finite(float(torch.nn.utils.get_total_norm(grads)))
        self.engine.step()
        if updates and self.stage:
            self.grad_norm = _finite(float(self.engine.get_global_grad_norm()))
        return updates

    def save(self, folder: Path) -> None:
        self.engine.save_checkpoint(str(folder), tag=DEEPSPEED_TAG, client_state={"micro_steps": self.micro_steps})
        if self.rank == 0:
            layout = {"zero_stage": self.stage, "num_ranks": self.num_ranks}
            (folder / LAYOUT_FILE).write_text(json.dumps(layout) + "\n")

    def load(self, folder: Path) -> None:
        if self.universal:
            with _universal(folder) as (place, tag):
                _, state = self.engine.load_checkpoint(str(place), tag=tag)
        else:
            _, state = self.engine.load_checkpoint(str(folder), tag=DEEPSPEED_TAG)
        self.micro_steps = state["micro_steps"]

    def local_parameters(self) -> list[nn.Parameter]:
        parameters: list[Any] = list(self.module.parameters())
        if self.stage < 3:
            return parameters
        return [nn.Parameter(p.ds_tensor.data, requires_grad=p.requires_grad) for p in parameters]

    def gather(self, parts: Sequence[Tensor]) -> list[Tensor]:
        if self.stage < 3:
            return [part.detach().cpu() if self.rank == 0 else torch.empty(0) for part in parts]
        wholes = []
        for part, shape in zip(parts, self.wholes, strict=True):
            mine = part.detach().to(self.engine.device).contiguous()
            pieces = [torch.empty_like(mine) for _ in range(self.num_ranks)]
            torch.distributed.all_gather(pieces, mine)
            whole = torch.cat(pieces)[: math.prod(shape)].view(shape).cpu()
            wholes.append(whole if self.rank == 0 else torch.empty(0))
        return wholes

    def shard(self, wholes: Sequence[Tensor]) -> list[Tensor]:
        if self.stage < 3:
            return list(wholes)
        parts = []
        for whole, held in zip(wholes, self.local_parameters(), strict=True):
            size = held.numel()
            part = torch.zeros_like(held, requires_grad=False)  # the parts of the last ranks are padded
            mine = whole.flatten()[self.rank * size : (self.rank + 1) * size]
            part[: mine.numel()] = mine.to(part)
            parts.append(part)
        return parts


def with_weights(module: _Module, weights: Sequence[Tensor]) -> _Module:
    """Sets the parameters of a module, in order, and returns it in evaluation mode."""
    with torch.no_grad():
        for parameter, value in zip(module.parameters(), weights, strict=True):
            parameter.copy_(value)
    return module.eval()


@contextmanager
def _universal(folder: Path) -> Iterator[tuple[Path, str]]:
    """Converts a DeepSpeed checkpoint so that any number of ranks can load it; gives its folder and tag.

    Local rank 0 of each machine converts it.
    """
    from deepspeed.checkpoint.ds_to_universal import main as convert

    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    name = hashlib.blake2b(f"{folder} {os.environ.get('MASTER_PORT')}".encode(), digest_size=8).hexdigest()
    place, tag = Path(tempfile.gettempdir()) / f"tccp-universal-{name}", "universal"
    if local_rank == 0:
        shutil.rmtree(place, ignore_errors=True)
        options = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            convert(
                Namespace(
                    input_folder=str(folder / DEEPSPEED_TAG),
                    output_folder=str(place / tag),
                    inject_missing_state=True,
                    **options,
                )
            )
    torch.distributed.barrier()
    try:
        yield place, tag
    finally:
        torch.distributed.barrier()
        if local_rank == 0:
            shutil.rmtree(place, ignore_errors=True)
