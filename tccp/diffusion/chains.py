"""Chains of windows that continue each other, and the networks of a stage (paper sections 4.2 and 4.4)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor

from tccp.config import SamplingSettings
from tccp.diffusion.batching import run_windows
from tccp.diffusion.sampling import Network, WindowState, start_window
from tccp.diffusion.schedule import NoiseSchedule
from tccp.models.conditions import Conditions
from tccp.models.variants import ONE_PER_WINDOW
from tccp.seeds import rng_seed


@dataclass(frozen=True)
class FrameInputs:
    """The inputs of a stage for one frame: control latents, and a field for each condition that has one per frame."""

    control: Float[Tensor, "c2 h w"]
    audio: Float[Tensor, "80 16"] | None = None
    lips: Float[Tensor, "3 s s"] | None = None


@dataclass(frozen=True)
class Window:
    """A window of a chain, and the network that samples it."""

    model: Network
    schedule: NoiseSchedule
    state: WindowState


def run_round(
    windows: Sequence[Window], limit: int = 16, check: Callable[[], object] = lambda: None
) -> list[Float[Tensor, "c f h w"]]:
    """Runs all steps of windows of different chains of one stage; those of one network share its evaluations.

    limit: of rows in an evaluation. check: called before each; it may raise.
    """
    by_model: dict[int, list[int]] = {}
    for number, window in enumerate(windows):
        by_model.setdefault(id(window.model), []).append(number)
    latents: dict[int, Tensor] = {}
    for numbers in by_model.values():
        first = windows[numbers[0]]
        results = run_windows(first.model, first.schedule, [windows[i].state for i in numbers], limit, check)
        latents.update(zip(numbers, results, strict=True))
    return [latents[number] for number in range(len(windows))]


@dataclass(frozen=True)
class Stage:
    """The two networks that generate one kind of picture: one the first frame, one the windows that continue it."""

    first: Network
    sequence: Network
    schedule: NoiseSchedule
    first_settings: SamplingSettings
    settings: SamplingSettings

    def new_window(
        self, model: Network, frames: Sequence[FrameInputs], identity: Tensor, initial: Tensor | None, seed: int
    ) -> Window:
        """A window of noise. initial: latents of the frame that it continues, its first one; None for a first frame."""
        settings = self.first_settings if initial is None else self.settings
        inputs = {"identity": identity[None]}
        for kind in model.config.condition_kinds:
            if kind not in ONE_PER_WINDOW:
                inputs[kind] = torch.stack([getattr(frame, kind) for frame in frames])[None]
        conditions = Conditions(**{kind: inputs[kind] for kind in model.config.condition_kinds})
        control = torch.stack([frame.control for frame in frames], dim=1)
        channels = model.config.latent_channels
        state = start_window(self.schedule, settings, conditions, control, initial, seed, channels)
        return Window(model, self.schedule, state)

    def chain(
        self,
        frames: Iterable[FrameInputs],
        identity: Float[Tensor, "3 h w"],
        seed: int,
        check: Callable[[], object] = lambda: None,
    ) -> Iterator[Float[Tensor, "c f h w"]]:
        """Latents of one chain, window by window: the new frames of each window as it finishes.

        Memory use does not grow with the number of frames. check: called before each step; it may raise to stop.
        """
        chain, source = Chain(self, identity, seed), iter(frames)
        while new := list(islice(source, chain.room)):
            (latents,) = run_round([chain.window(new)], check=check)
            yield chain.finish(latents)

    def chain_batch(
        self,
        frames: Sequence[Sequence[FrameInputs]],
        identities: Sequence[Float[Tensor, "3 s s"]],
        seeds: Sequence[int],
        batch_size: int = 16,
        on_frames: Callable[[int], object] | None = None,
    ) -> list[Float[Tensor, "c f h w"]]:
        """The result of `chain` for every clip. Generates all clips in parallel, up to `batch_size` windows at once.

        on_frames: called after each window with the number of new frames of all clips together.
        Raises ValueError if a clip is empty or the clips differ in number of frames.
        """
        if len({len(clip) for clip in frames}) > 1 or not all(frames):
            raise ValueError(f"clips of {sorted({len(clip) for clip in frames})} frames: all must have one length")
        chains = [Chain(self, *clip) for clip in zip(identities, seeds, strict=True)]
        parts: list[list[Tensor]] = [[] for _ in chains]
        sources = [iter(clip) for clip in frames]
        while any(new := [list(islice(source, chain.room)) for chain, source in zip(chains, sources, strict=True)]):
            windows = [chain.window(given) for chain, given in zip(chains, new, strict=True)]
            for chain, part, latents in zip(chains, parts, run_round(windows, batch_size), strict=True):
                part.append(chain.finish(latents))
            if on_frames is not None:
                on_frames(sum(map(len, new)))
        return [torch.cat(part, dim=1) for part in parts]

    def each_frame(
        self,
        frames: Sequence[FrameInputs],
        identity: Float[Tensor, "3 s s"],
        seed: int,
        batch_size: int = 64,
    ) -> Float[Tensor, "c f h w"]:
        """Generates every frame separately with the first-frame network, each from its own noise.

        This is the ablation without the temporal network. Frame 0 equals that of `chain`.
        """
        windows = [
            self.new_window(self.first, [frame], identity, None, rng_seed(seed, position))
            for position, frame in enumerate(frames)
        ]
        return torch.cat(run_round(windows, batch_size), dim=1)


@dataclass(frozen=True)
class ChainState:
    """Where a chain goes on. position: of its last frame. inputs, latents: of that frame."""

    position: int
    inputs: FrameInputs
    latents: Float[Tensor, "c h w"]


class Chain:
    """The windows of one uninterrupted chain of a stage, one after the other.

    The first-frame network generates frame 0, alone; each window continues from the last frame before it and adds up to
    `window - 1` frames. That frame's latents are passed on unchanged, never decoded. Call `window` and `finish` in
    turns.
    """

    def __init__(self, stage: Stage, identity: Float[Tensor, "3 h w"], seed: int, state: ChainState | None = None):
        """state: of the same chain, made earlier, to go on from there."""
        self._stage = stage
        self._identity = identity
        self._seed = seed
        self.state = state
        """None before the first frame."""
        self._new: list[FrameInputs] = []

    @property
    def room(self) -> int:
        """The most frames that the next window can add."""
        return 1 if self.state is None else self._stage.sequence.config.num_frames - 1

    def window(self, new: Sequence[FrameInputs]) -> Window:
        """The window that adds these frames. Where they do not fill it, the last inputs are repeated.

        Raises ValueError if there are none, or more than `room`.
        """
        if not 0 < len(new) <= self.room:
            raise ValueError(f"{len(new)} frames for a window: give 1 to {self.room}")
        self._new = list(new)
        if self.state is None:
            seed = rng_seed(self._seed, 0)
            return self._stage.new_window(self._stage.first, self._new, self._identity, None, seed)
        frames = [self.state.inputs, *new, *[new[-1]] * (self.room - len(new))]
        seed = rng_seed(self._seed, self.state.position + len(new))
        return self._stage.new_window(self._stage.sequence, frames, self._identity, self.state.latents, seed)

    def finish(self, latents: Float[Tensor, "c f h w"]) -> Float[Tensor, "c new h w"]:
        """Takes the latents of the last `window`, and returns those of its new frames."""
        start, position = (0, 0) if self.state is None else (1, self.state.position + len(self._new))
        new = latents[:, start : start + len(self._new)]
        self.state = ChainState(position, self._new[-1], new[:, -1])
        return new
