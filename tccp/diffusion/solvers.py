"""Solvers of the reverse process as pure functions: DDPM (the paper's), DDIM and DPM-Solver++(2M).

A scheduler object of diffusers stores its step and history, so windows at different steps cannot share one. Here a plan
is a table of coefficients, and a step is `z' = a z + b x0 + c x0_before + d noise`. So any mix of windows and solvers
needs one evaluation of the network and four multiplications.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tccp.config import Solver
from tccp.diffusion.schedule import NoiseSchedule


@dataclass(frozen=True)
class SolverStep:
    """One step of a plan.

    t: diffusion time for the network. signal, sigma: sqrt(abar_t), sqrt(1 - abar_t).
    keep, data, history, noise: a, b, c and d above.
    """

    t: int
    signal: float
    sigma: float
    keep: float
    data: float
    history: float
    noise: float


SolverPlan = tuple[SolverStep, ...]


def timesteps(num_train_timesteps: int, steps: int, power: float = 1.0) -> list[int]:
    """`steps` times from T-1 down, spaced from the end ("trailing"), so that the first one is pure noise.

    power: 1 spaces them evenly; T (k / steps)^power - 1 puts more of them at the clean end (above 1) or at the noise
    end (below 1). Raises ValueError if steps is below 1 or above num_train_timesteps.
    """
    if not 1 <= steps <= num_train_timesteps:
        raise ValueError(f"steps is {steps}; it must be between 1 and {num_train_timesteps}")
    times: list[int] = []
    for k in range(steps, 0, -1):
        time = round(num_train_timesteps * (k / steps) ** power) - 1
        below = times[-1] - 1 if times else num_train_timesteps - 1
        times.append(max(min(time, below), k - 1))  # all differ also where the spacing is below one
    return times


def solver_plan(schedule: NoiseSchedule, solver: Solver, steps: int, power: float = 1.0) -> SolverPlan:
    """The coefficients of every step, in double precision. The last step ends at clean latents."""
    times = timesteps(schedule.num_train_timesteps, steps, power)
    abars = [float(schedule.alphas_cumprod[t]) for t in times] + [1.0]
    make = {"ddpm": _ddpm, "ddim": _ddim, "dpmpp": _dpmpp}[solver]
    plan = []
    for i, t in enumerate(times):
        keep, data, history, noise = make(abars, i)
        plan.append(SolverStep(t, math.sqrt(abars[i]), math.sqrt(1 - abars[i]), keep, data, history, noise))
    return tuple(plan)


def _ddpm(abars: list[float], i: int) -> tuple[float, float, float, float]:
    """Ancestral sampling with the fixed variance of the posterior (Eqs. 3, 4; Ho et al. 2020, Eqs. 6, 7)."""
    abar, after = abars[i], abars[i + 1]
    alpha = abar / after
    beta = 1 - alpha
    keep = math.sqrt(alpha) * (1 - after) / (1 - abar)
    data = math.sqrt(after) * beta / (1 - abar)
    variance = (1 - after) / (1 - abar) * beta
    return keep, data, 0.0, math.sqrt(max(variance, 0.0))


def _ddim(abars: list[float], i: int) -> tuple[float, float, float, float]:
    """Deterministic sampling (Song et al. 2020, Eq. 12 with sigma 0), with the noise expressed by z and x0."""
    abar, after = abars[i], abars[i + 1]
    keep = math.sqrt((1 - after) / (1 - abar))
    return keep, math.sqrt(after) - keep * math.sqrt(abar), 0.0, 0.0


def _dpmpp(abars: list[float], i: int) -> tuple[float, float, float, float]:
    """DPM-Solver++(2M) (Lu et al. 2022, Algorithm 2). First order if history or the log-SNR step is not finite."""
    keep, data, _, _ = _ddim(abars, i)  # its first-order step is DDIM's

    def log_snr(abar: float) -> float:
        if abar <= 0.0:
            return -math.inf
        return math.inf if abar >= 1.0 else 0.5 * math.log(abar / (1 - abar))

    if i == 0:
        return keep, data, 0.0, 0.0
    step, before = log_snr(abars[i + 1]) - log_snr(abars[i]), log_snr(abars[i]) - log_snr(abars[i - 1])
    if not (math.isfinite(step) and math.isfinite(before)):
        return keep, data, 0.0, 0.0
    weight = step / (2 * before)
    scale = math.sqrt(abars[i + 1]) * -math.expm1(-step)
    return keep, scale * (1 + weight), -scale * weight, 0.0
