"""How many rows share an evaluation: from the measured time of one over the size of its batch.

A measurement takes some seconds, and is kept in the storage for every version of the weights, device, number of threads
and version of the code that it depends on.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import tccp.models
from tccp.diffusion.sampling import Network
from tccp.files import Folder
from tccp.inference.components import Components
from tccp.models.conditions import Conditions
from tccp.models.mvcontrolnet import MVControlNet
from tccp.models.traced import EAGER_CALLS
from tccp.serving.work import StageKind

SIZES = (1, 2, 4, 8, 16, 32)
SLACK = 0.05
REPEATS = 5
_FOLDER = "step_curves"


@dataclass(frozen=True)
class StepCurve:
    """Seconds of one evaluation by its number of rows. rows: ascending."""

    rows: tuple[int, ...]
    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.rows or len(self.rows) != len(self.seconds) or min(self.seconds) <= 0 or self.rows[0] < 1:
            raise ValueError(f"rows {self.rows} take {self.seconds} s: give as many positive times as sizes")
        if any(after <= before for before, after in itertools.pairwise(self.rows)):
            raise ValueError(f"sizes {self.rows}: give them in ascending order")

    def seconds_of(self, rows: int) -> float:
        """Of any number of rows: linear between the measured ones; beyond them, each row takes what it takes there."""
        if rows <= self.rows[0]:
            return self.seconds[0]
        for (low, low_s), (high, high_s) in itertools.pairwise(zip(self.rows, self.seconds, strict=True)):
            if rows <= high:
                return low_s + (high_s - low_s) * (rows - low) / (high - low)
        return self.seconds[-1] * rows / self.rows[-1]


def limit_of(curve: StepCurve, longest_step_s: float, slack: float = SLACK) -> int:
    """The smallest measured size that makes rows nearly as fast as the fastest one.

    longest_step_s: what an evaluation may take; sizes that take longer are left out, except the smallest one.
    slack: by how much fewer rows a second it may make.
    """
    pairs = list(zip(curve.rows, curve.seconds, strict=True))
    allowed = [pair for pair in pairs if pair[1] <= longest_step_s] or pairs[:1]
    fastest = max(rows / seconds for rows, seconds in allowed)
    return next(rows for rows, seconds in allowed if rows / seconds >= (1 - slack) * fastest)


def growing(measure: Callable[[int], float], sizes: Sequence[int] = SIZES) -> StepCurve:
    """Measures sizes until the time of a row no longer falls, or memory ends. measure: seconds of so many rows.

    The first size at which it does not fall is kept: the curve shows why it ends there.
    Raises torch.OutOfMemoryError if there is not even room for the first size.
    """
    rows: list[int] = []
    seconds: list[float] = []
    for size in sizes:
        try:
            took = measure(size)
        except RuntimeError as error:
            if not rows or not _is_out_of_memory(error):
                raise
            break
        least = min((s / n for n, s in zip(rows, seconds, strict=True)), default=float("inf"))
        rows.append(size)
        seconds.append(took)
        if took / size >= least:
            break
    return StepCurve(tuple(rows), tuple(seconds))


def measure_steps(components: Components, kind: StageKind, sizes: Sequence[int] = SIZES) -> StepCurve:
    """Measures evaluations of the sequence network of a stage, as sampling makes them.

    On a CPU the network is recorded for these sizes meanwhile (`tccp.models.traced`), so that the first films do not
    wait for that.
    """
    network = components.stage("landmark_sequence" if kind == "landmark" else "face_sequence", traced=True).sequence
    return growing(functools.partial(step_seconds, network, components.device), sizes)


@torch.no_grad()
def step_seconds(
    network: Network, device: torch.device, rows: int, untimed: int = EAGER_CALLS + 2, repeats: int = REPEATS
) -> float:
    """Median seconds of an evaluation of so many rows. untimed: evaluations before, of which the last is recorded."""
    latents, times, conditions, control = _inputs(network, rows, device)
    prepared = network.prepare(conditions, control, latents.shape[2])
    taken = []
    for call in range(untimed + repeats):
        _wait(device)
        start = time.perf_counter()
        network(latents, times, prepared)
        _wait(device)
        if call >= untimed:
            taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def _inputs(
    network: Network, rows: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, Conditions, torch.Tensor]:
    """Noisy latents, times, conditions and control latents of as many full windows."""
    config, dtype = network.config, network.dtype
    side, frames = config.latent_px, config.num_frames
    plain = network if isinstance(network, MVControlNet) else network.network
    shapes = {
        "audio": (frames, 80, 16),
        "identity": (3, config.picture_px, config.picture_px),
        "lips": (frames, 3, config.lip_px, config.lip_px),
    }

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(rows, *shape, device=device, dtype=dtype)

    conditions = Conditions(**{kind: noise(*shapes[kind]) for kind in config.condition_kinds})
    latents = noise(config.latent_channels, frames, side, side)
    times = torch.full((rows, frames), 500, device=device)
    return latents, times, conditions, noise(plain.control_channels, frames, side, side)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _is_out_of_memory(error: Exception) -> bool:
    """Also on a CPU, whose allocator raises a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def kept_steps(
    components: Components, kind: StageKind, weights: str, storage: Folder, sizes: Sequence[int] = SIZES
) -> StepCurve:
    """The curve from the storage, or a new measurement, which is kept there. weights: their version."""
    key = {
        "kind": kind,
        "weights": weights,
        "device": device_name(components.device),
        "threads": torch.get_num_threads(),
        "code": _code_version(),
        "sizes": list(sizes),
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    name = f"{_FOLDER}/{weights}/{kind}-{digest}.json"
    try:
        return curve_of(storage.read(name))
    except (FileNotFoundError, ValueError):  # there is none yet, or it is damaged
        curve = measure_steps(components, kind, sizes)
        storage.write(name, json.dumps({**key, **asdict(curve)}, indent=1).encode())
        return curve


def curve_of(content: bytes | str) -> StepCurve:
    """A curve from its JSON, which may say more. Raises ValueError if it is none."""
    try:
        record = json.loads(content)
        return StepCurve(tuple(map(int, record["rows"])), tuple(map(float, record["seconds"])))
    except (KeyError, TypeError) as error:
        raise ValueError(f"no step curve: {error!r}") from None


def device_name(device: torch.device) -> str:
    """The name of a GPU; of a CPU, its kind and cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {platform.machine()} {_processor()}".strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


@functools.cache
def _code_version() -> str:
    """Of the networks' code and of torch."""
    digest = hashlib.sha256(torch.__version__.encode())
    for path in sorted(Path(*tccp.models.__path__).glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
