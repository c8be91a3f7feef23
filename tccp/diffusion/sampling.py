"""Sampling of windows (paper section 4.4).

The state of a window is a value. `advance(model, schedule, states)` advances windows at different steps, with different
solvers and guidance, in one evaluation of the network. The command line and the serving layer both use it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from tccp.config import SamplingSettings
from tccp.diffusion.schedule import CLEAN_TIME, NoiseSchedule
from tccp.diffusion.solvers import SolverPlan, solver_plan
from tccp.models.conditions import Conditions
from tccp.models.mvcontrolnet import MVControlNet, Prepared
from tccp.models.traced import TracedNetwork
from tccp.seeds import rng_seed

Denoiser = Callable[[Tensor, Tensor, Conditions, Tensor], Tensor]
"""(noisy latents, t per frame, conditions, control latents) -> prediction, in closed form: tests have some."""
Network = MVControlNet | TracedNetwork


_Row = tuple[Prepared, int]
"""A window in a prepared batch."""


@dataclass(frozen=True)
class _Place:
    """Where the constant part of a window's evaluation is (`MVControlNet.prepare`), after its first step.

    kept, dropped: with conditions and, for guidance, without.
    """

    kept: _Row
    dropped: _Row | None


@dataclass(frozen=True)
class WindowState:
    """The state of one window between noise and finished latents.

    latents: the current latents. If there is an `initial` frame, the first frame equals it bit for bit.
    step: the next step of `plan`. The window is finished when it is `len(plan)`.
    history: the last predicted clean latents (for DPM-Solver++); None before the first step.
    seed: of the window's noise. Step k uses the seed parts (seed, k), so a state can be stored, copied and resumed.
    guidance: the scale at each step. conditions: with batch size 1.
    """

    latents: Float[Tensor, "c f h w"]
    step: int
    history: Float[Tensor, "c f h w"] | None
    seed: int
    plan: SolverPlan
    guidance: tuple[float, ...]
    temperature: float
    conditions: Conditions
    control: Float[Tensor, "c2 f h w"]
    initial: Float[Tensor, "c h w"] | None
    place: _Place | None = field(default=None, compare=False, repr=False)

    @property
    def finished(self) -> bool:
        return self.step == len(self.plan)

    @property
    def num_rows(self) -> int:
        """Rows that it takes in a batch of the network: with guidance two."""
        return 1 + any(scale != 1.0 for scale in self.guidance)

    @property
    def guidance_scale(self) -> float:
        """That of the next step; 1: none."""
        return self.guidance[self.step]


def _noise(like: Tensor, seed: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(rng_seed("sampling", seed, step))
    return torch.randn(like.shape, generator=generator).to(like)


def _with_initial(latents: Tensor, initial: Tensor | None) -> Tensor:
    return latents if initial is None else torch.cat([initial.unsqueeze(1), latents[:, 1:]], dim=1)


def start_window(
    schedule: NoiseSchedule,
    settings: SamplingSettings,
    conditions: Conditions,
    control: Float[Tensor, "c2 f h w"],
    initial: Float[Tensor, "c h w"] | None,
    seed: int,
    channels: int | None = None,
) -> WindowState:
    """A window of noise for `advance`. channels: number of latent channels, if control has more of them."""
    plan = solver_plan(schedule, settings.solver, settings.steps, settings.time_power)
    latents = _with_initial(settings.temperature * _noise(control[:channels], seed, -1), initial)
    guidance = _guidance(plan, settings)
    return WindowState(latents, 0, None, seed, plan, guidance, settings.temperature, conditions, control, initial)


def _guidance(plan: SolverPlan, settings: SamplingSettings) -> tuple[float, ...]:
    """The guidance scale of every step: 1 outside the interval (Kynkaanniemi et al. 2024)."""
    low, high = settings.guidance_interval
    times = [(step.t + 1) / (plan[0].t + 1) for step in plan]
    return tuple(settings.guidance_scale if low <= time <= high else 1.0 for time in times)


@torch.no_grad()
def advance(model: Network | Denoiser, schedule: NoiseSchedule, states: Sequence[WindowState]) -> list[WindowState]:
    """Advances every state by one step, with one evaluation of the network for all of them.

    States may be at different steps of different plans. A state with guidance takes a second row in the batch, with its
    conditions dropped. Raises ValueError if a state is finished.
    """
    if not states:
        return []
    if any(state.finished for state in states):
        raise ValueError("a finished window cannot be advanced")
    steps = [state.plan[state.step] for state in states]
    predicted, places = _predict(model, states, [step.t for step in steps])

    def column(values: Iterable[float]) -> Tensor:
        # in double precision, so that coefficients of nearly equal size cancel exactly
        return torch.tensor(list(values), dtype=torch.float64, device=predicted.device).view(-1, 1, 1, 1, 1)

    z = torch.stack([state.latents for state in states]).double()
    signal, sigma = column(step.signal for step in steps), column(step.sigma for step in steps)
    clean = signal * z - sigma * predicted if schedule.prediction == "v" else (z - sigma * predicted) / signal
    before = torch.stack([state.history if state.history is not None else state.latents for state in states]).double()
    noise = torch.stack(
        [
            s.temperature * _noise(s.latents, s.seed, s.step) if step.noise else torch.zeros_like(s.latents)
            for s, step in zip(states, steps, strict=True)
        ]
    )
    after = (
        column(step.keep for step in steps) * z
        + column(step.data for step in steps) * clean
        + column(step.history for step in steps) * before
        + column(step.noise for step in steps) * noise
    )
    return [
        dataclasses.replace(
            state,
            latents=_with_initial(after[i].to(state.latents), state.initial),
            history=clean[i].to(state.latents),
            step=state.step + 1,
            place=places[i] if places else None,
        )
        for i, state in enumerate(states)
    ]


def _predict(
    model: Network | Denoiser, states: Sequence[WindowState], t: Sequence[int]
) -> tuple[Float[Tensor, "b c f h w"], list[_Place]]:
    """The network's prediction per state, in double precision, with guidance (Ho and Salimans 2022).

    Also returns the states' places; none for a `model` in closed form.
    """
    guided = [i for i, state in enumerate(states) if state.guidance_scale != 1.0]
    rows = [*range(len(states)), *guided]
    latents = torch.stack([states[i].latents for i in rows])
    times = torch.tensor([t[i] for i in rows], device=latents.device)[:, None].repeat(1, latents.shape[2])
    for row, i in enumerate(rows):
        if states[i].initial is not None:
            times[row, 0] = CLEAN_TIME
    dtype = getattr(model, "dtype", latents.dtype)  # states stay in single precision whatever the network computes in
    if isinstance(model, Network):
        places = _prepared(model, states)
        predicted = model(latents.to(dtype), times, _batch(places, guided, latents.shape[2])).double()
    else:
        places = []
        predicted = model(latents.to(dtype), times, *_inputs(states, guided, dtype)).double()
    out = predicted[: len(states)].clone()
    for row, i in enumerate(guided, start=len(states)):
        out[i] = predicted[row] + states[i].guidance_scale * (predicted[i] - predicted[row])
    return out, places


def _inputs(states: Sequence[WindowState], guided: Sequence[int], dtype: torch.dtype) -> tuple[Conditions, Tensor]:
    """Conditions and control latents of all states, then of the guided ones with their conditions dropped."""
    rows = [*states, *(states[i] for i in guided)]
    control = torch.stack([state.control for state in rows])
    dropped = torch.arange(len(rows), device=control.device) >= len(states)
    return Conditions.cat([state.conditions for state in rows]).drop(dropped).in_precision(dtype), control.to(dtype)


def _prepared(model: Network, states: Sequence[WindowState]) -> list[_Place]:
    """The places of all states. Those that have none yet are prepared together."""
    new = [state for state in states if state.place is None]
    made: Iterator[_Place] = iter(())
    if new:
        guided = [i for i, state in enumerate(new) if state.num_rows > 1]
        conditions, control = _inputs(new, guided, model.dtype)
        prepared = model.prepare(conditions, control, control.shape[2])
        dropped = {i: (prepared, row) for row, i in enumerate(guided, start=len(new))}
        made = (_Place((prepared, i), dropped.get(i)) for i in range(len(new)))
    return [next(made) if state.place is None else state.place for state in states]


def _batch(places: list[_Place], guided: Sequence[int], num_frames: int) -> Prepared:
    """Joins the constant parts of all windows, in the order of `_inputs`; replaces the places by those in the result.

    A batch that stays together is not copied.
    """
    dropped = [row for i in guided if (row := places[i].dropped) is not None]
    wanted = [*(place.kept for place in places), *dropped]
    whole, start = wanted[0]
    if all(part is whole and row == start + i for i, (part, row) in enumerate(wanted)):
        return whole.windows(start, start + len(wanted), num_frames)
    joined = Prepared.cat([part.windows(row, row + 1, num_frames) for part, row in wanted])
    places[:] = [_Place((joined, i), place.dropped) for i, place in enumerate(places)]
    for number, i in enumerate(guided, start=len(places)):
        places[i] = _Place(places[i].kept, (joined, number))
    return joined
