"""Solvers compared with diffusers and with an exact denoiser; chains of windows."""

import dataclasses
import itertools
import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from tiny_networks import inputs, tiny

from tccp.config import DiffusionSettings, SamplingSettings
from tccp.diffusion.batching import run_windows
from tccp.diffusion.chains import FrameInputs, Stage
from tccp.diffusion.sampling import advance, start_window
from tccp.diffusion.schedule import NoiseSchedule
from tccp.diffusion.solvers import solver_plan, timesteps
from tccp.models.conditions import Conditions
from tccp.models.mvcontrolnet import MVControlNet
from tccp.models.variants import VARIANTS

MEAN, SPREAD = 0.7, 0.5
NOTHING = Conditions(audio=torch.zeros(1, 1, 80, 16))


def schedule_of(prediction="epsilon"):
    return NoiseSchedule.from_settings(DiffusionSettings(prediction=prediction, zero_terminal_snr=prediction == "v"))


class GaussianDenoiser:
    """The exact network for latents that are N(MEAN, SPREAD^2): E[noise | z_t] or E[v | z_t] in closed form."""

    def __init__(self, schedule):
        self.schedule = schedule

    def __call__(self, noisy, t, conditions, control):
        abar = self.schedule.alphas_cumprod[t][:, None, :, None, None]
        signal, sigma = abar.sqrt(), (1 - abar).sqrt()
        z = noisy.double()
        clean = MEAN + SPREAD**2 * signal / (signal**2 * SPREAD**2 + sigma**2) * (z - signal * MEAN)
        if self.schedule.prediction == "v":
            noise = sigma * (z - signal * MEAN) / (signal**2 * SPREAD**2 + sigma**2)
            return signal * noise - sigma * clean
        return (z - signal * clean) / sigma

    def exact_flow(self, z_start, abar_start, abar_end):
        """Solution of the probability flow ODE: (z - signal mean) / std is constant along it."""

        def moments(abar):
            return math.sqrt(abar) * MEAN, math.sqrt(abar * SPREAD**2 + 1 - abar)

        (m0, s0), (m1, s1) = moments(abar_start), moments(abar_end)
        return m1 + s1 * (z_start - m0) / s0


def window(schedule, solver, steps, seed=0, size=8, frames=1):
    settings = SamplingSettings(solver=solver, steps=steps)
    state = start_window(schedule, settings, NOTHING, torch.zeros(4, frames, size, size), None, seed)
    return dataclasses.replace(state, latents=state.latents.double(), control=state.control.double())


def flow_error(schedule, solver, steps, end=199):
    """Root mean square distance from the exact flow at time `end`, which every plan of 5 n steps passes through."""
    denoiser = GaussianDenoiser(schedule)
    state = window(schedule, solver, steps)
    start = state.latents
    while state.plan[state.step].t > end:
        (state,) = advance(denoiser, schedule, [state])
    assert state.plan[state.step].t == end
    exact = denoiser.exact_flow(start, float(schedule.alphas_cumprod[-1]), float(schedule.alphas_cumprod[end]))
    return float((state.latents - exact).square().mean().sqrt())


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize(("solver", "order"), [("ddim", 1), ("dpmpp", 2)])
def test_error_falls_with_steps_at_the_order_of_the_solver(solver, order, prediction):
    schedule = schedule_of(prediction)
    errors = [flow_error(schedule, solver, steps) for steps in (50, 100, 200)]
    measured = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    print(solver, prediction, errors, measured)
    assert all(rate > order - 0.35 for rate in measured)


def test_second_order_is_better_than_first():
    assert flow_error(schedule_of(), "dpmpp", 50) < flow_error(schedule_of(), "ddim", 50) / 5


def test_ddpm_converges_to_the_distribution_with_more_steps():
    """The mean is right at any number of steps; the error of the spread falls with more steps."""
    schedule = schedule_of()
    errors = []
    for steps in (10, 100, 1000):
        state = window(schedule, "ddpm", steps, size=64)
        latents = run_windows(GaussianDenoiser(schedule), schedule, [state])[0]
        assert abs(float(latents.mean()) - MEAN) < 0.02
        errors.append(abs(float(latents.std()) - SPREAD))
    assert errors[0] > errors[1]
    assert errors[2] < 0.01


@pytest.mark.parametrize("solver", ["ddim", "dpmpp", "ddpm"])
def test_temperature_scales_the_distance_to_the_mean(solver):
    """For a Gaussian all steps are linear, so a sample's distance from the mean is proportional to the temperature."""
    schedule = schedule_of("v")

    def sample(temperature):
        settings = SamplingSettings(solver=solver, steps=50, temperature=temperature)
        state = start_window(schedule, settings, NOTHING, torch.zeros(4, 1, 8, 8), None, 0)
        state = dataclasses.replace(state, latents=state.latents.double(), control=state.control.double())
        return run_windows(GaussianDenoiser(schedule), schedule, [state])[0]

    full, half, none = sample(1.0), sample(0.5), sample(0.0)
    assert float((none - MEAN).abs().max()) < 0.01
    assert full.std() > 0.3
    assert torch.allclose(half - none, (full - none) / 2, atol=1e-6)


@pytest.mark.parametrize("solver", ["ddim", "dpmpp"])
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_end_result_is_near_the_exact_flow(solver, prediction):
    schedule = schedule_of(prediction)
    denoiser = GaussianDenoiser(schedule)
    state = window(schedule, solver, 200)
    exact = denoiser.exact_flow(state.latents, float(schedule.alphas_cumprod[-1]), 1.0)
    assert float((run_windows(denoiser, schedule, [state])[0] - exact).abs().max()) < 0.03


@pytest.mark.parametrize("steps", [1, 7, 1000])
def test_timesteps_begin_at_full_noise_and_descend(steps):
    times = timesteps(1000, steps)
    assert times[0] == 999
    assert len(times) == steps
    assert all(a > b for a, b in itertools.pairwise(times))
    assert times == trailing_times_of_diffusers(steps)


def trailing_times_of_diffusers(steps):
    theirs = DDIMScheduler(timestep_spacing="trailing")
    theirs.set_timesteps(steps)
    return theirs.timesteps.tolist()


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("solver", ["ddim", "dpmpp"])
def test_deterministic_solvers_equal_diffusers(solver, prediction):
    schedule = schedule_of(prediction)
    common = {
        "beta_start": 1e-4,
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "prediction_type": "v_prediction" if prediction == "v" else "epsilon",
        "timestep_spacing": "trailing",
    }
    if solver == "ddim":
        theirs = DDIMScheduler(
            **common, clip_sample=False, rescale_betas_zero_snr=prediction == "v", set_alpha_to_one=True
        )
    else:
        theirs = DPMSolverMultistepScheduler(
            **common,
            rescale_betas_zero_snr=prediction == "v",
            final_sigmas_type="zero",
            use_lu_lambdas=False,
            solver_type="midpoint",
            euler_at_final=True,
        )
    steps = 20
    theirs.set_timesteps(steps)
    denoiser = GaussianDenoiser(schedule)
    state = window(schedule, solver, steps)
    expected = state.latents
    for t in theirs.timesteps:
        predicted = denoiser(expected[None], t.reshape(1, 1).long(), None, None)[0]
        expected = theirs.step(predicted, t, expected).prev_sample
    torch.testing.assert_close(run_windows(denoiser, schedule, [state])[0], expected.double(), rtol=0, atol=2e-3)


def test_ddpm_mean_and_variance_equal_diffusers():
    schedule = schedule_of()
    theirs = DDPMScheduler(
        beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False, variance_type="fixed_small"
    )
    plan = solver_plan(schedule, "ddpm", 1000)
    z, noise = torch.randn(4, 4, dtype=torch.float64), torch.randn(4, 4, dtype=torch.float64)
    for t in (999, 500, 1):
        step = plan[999 - t]
        clean = (z - step.sigma * noise) / step.signal
        mean = step.keep * z + step.data * clean
        assert step.t == t
        assert step.noise**2 == pytest.approx(float(theirs._get_variance(t)), rel=1e-3)
        torch.manual_seed(0)
        expected = theirs.step(noise, t, z).prev_sample
        torch.manual_seed(0)
        drawn = torch.randn(4, 4, dtype=torch.float64)
        torch.testing.assert_close(mean + step.noise * drawn, expected, rtol=1e-3, atol=1e-3)


def test_batched_windows_at_mixed_steps_equal_single_windows():
    """States with different steps and solvers advance in one batch exactly as they do alone."""
    schedule = schedule_of()
    denoiser = GaussianDenoiser(schedule)
    states = [
        window(schedule, solver, steps, seed)
        for seed, (solver, steps) in enumerate([("ddpm", 12), ("ddim", 5), ("dpmpp", 9), ("dpmpp", 20)])
    ]
    alone = [run_windows(denoiser, schedule, [state])[0] for state in states]
    finished = {}
    running = dict(enumerate(states[:1]))
    waiting = dict(enumerate(states[1:], start=1))
    while running or waiting:
        if waiting:  # one more window joins at every step
            i = min(waiting)
            running[i] = waiting.pop(i)
        moved = advance(denoiser, schedule, list(running.values()))
        running = dict(zip(running, moved, strict=True))
        for i in [i for i, state in running.items() if state.finished]:
            finished[i] = running.pop(i).latents
    for i, expected in enumerate(alone):
        assert torch.equal(finished[i], expected)


@pytest.fixture(scope="module")
def stage():
    torch.manual_seed(0)
    settings = tiny()
    networks = []
    for name in ("face_first", "face_sequence"):
        network = MVControlNet.from_settings(settings, name).eval()
        for zero in (network.control.zero_in, *network.control.zero_out):
            torch.nn.init.normal_(zero.weight, std=0.1)
        networks.append(network)
    sampling = SamplingSettings(solver="dpmpp", steps=3)
    return Stage(*networks, NoiseSchedule.from_settings(settings.diffusion), sampling, sampling)


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
def test_first_frame_stays_bit_equal_during_sampling(stage, guidance_scale):
    settings = tiny()
    latents, _, conditions, control = inputs(settings, VARIANTS["face_sequence"], batch=1)
    initial = torch.randn_like(latents[0, :, 0])
    sampling = SamplingSettings(solver="ddpm", steps=4, guidance_scale=guidance_scale)
    state = start_window(stage.schedule, sampling, conditions, control[0], initial, seed=1, channels=4)
    while not state.finished:
        (state,) = advance(stage.sequence, stage.schedule, [state])
        assert torch.equal(state.latents[:, 0], initial)
        assert not torch.equal(state.latents[:, 1], initial)


def test_guidance_extrapolates_from_dropped_to_given_conditions(stage):
    settings = tiny()
    _, _, conditions, control = inputs(settings, VARIANTS["face_first"], batch=1)

    def one_step(scale, dropped=False):
        sampling = SamplingSettings(solver="ddim", steps=4, guidance_scale=scale)
        given = conditions.drop(torch.tensor([dropped]))
        state = start_window(stage.schedule, sampling, given, control[0], None, seed=1, channels=4)
        if dropped:  # advance() decides what to drop, so call the network directly
            times = torch.full((1, 1), state.plan[0].t)
            with torch.no_grad():
                return stage.first(state.latents[None], times, given, control).double()[0]
        return advance(stage.first, stage.schedule, [state])[0].history.double()

    # at the first step of zero-terminal SNR the clean prediction is minus v
    with_conditions, without = one_step(1.0), -one_step(1.0, dropped=True)
    torch.testing.assert_close(one_step(3.0), without + 3 * (with_conditions - without), rtol=1e-4, atol=1e-5)


def test_advancing_a_finished_window_is_an_error():
    schedule = schedule_of()
    state = window(schedule, "ddim", 1)
    (state,) = advance(GaussianDenoiser(schedule), schedule, [state])
    with pytest.raises(ValueError, match="finished"):
        advance(GaussianDenoiser(schedule), schedule, [state])


def frames(count, seed=0):
    settings = tiny()
    torch.manual_seed(seed)
    side, lips = settings.latent_px, settings.lips.size_px
    return [FrameInputs(torch.randn(8, side, side), lips=torch.randn(3, lips, lips)) for _ in range(count)]


IDENTITY = torch.zeros(3, 32, 32)


def chained(stage, frames, seed):
    """Every frame of a chain."""
    return [latents for window in stage.chain(frames, IDENTITY, seed=seed) for latents in window.unbind(dim=1)]


@pytest.mark.parametrize("count", [0, 1, 2, 4, 5, 12])
def test_chain_yields_every_frame_once(stage, count):
    assert len(chained(stage, iter(frames(count)), 0)) == count


def test_chain_is_deterministic_and_causal_by_window(stage):
    """The same seed gives the same frames; later input does not change finished windows."""
    whole = chained(stage, frames(10), 5)
    again = chained(stage, frames(10), 5)
    shorter = chained(stage, frames(10)[:7], 5)
    other = chained(stage, frames(10), 6)
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(whole[:7], shorter, strict=True))
    assert not torch.equal(whole[0], other[0])


def test_first_frame_has_its_own_sampling_settings(stage):
    """At temperature 0 the seed has no effect: here that holds for the first frame and not for later ones."""
    still = dataclasses.replace(stage, first_settings=stage.settings.model_copy(update={"temperature": 0.0}))
    a, b = (chained(still, frames(4), seed) for seed in (5, 6))
    assert torch.equal(a[0], b[0])
    assert not torch.equal(a[1], b[1])


def test_windows_continue_from_unmodified_latents(stage):
    """The last latents of a window are, bit for bit, the initial frame of the next."""
    seen = []
    handle = stage.sequence.register_forward_pre_hook(lambda module, args: seen.append(args[0][0, :, 0].clone()))
    generated = chained(stage, frames(10), 0)
    handle.remove()
    steps = stage.settings.steps
    assert len(seen) == 3 * steps
    for number, index in enumerate((0, 3, 6)):
        assert all(torch.equal(initial, generated[index]) for initial in seen[number * steps : (number + 1) * steps])


def test_chain_reads_no_frames_beyond_its_window(stage):
    read = 0

    def counted():
        nonlocal read
        for frame in frames(20):
            read += 1
            yield frame

    chain = stage.chain(counted(), IDENTITY, seed=0)
    next(chain)
    assert read == 1
    next(chain)
    assert read == 4


def identities(count):
    torch.manual_seed(1)
    return list(torch.randn(count, 3, 32, 32))


@pytest.mark.parametrize("count", [1, 4, 10, 12])
@pytest.mark.parametrize("batch_size", [2, 16])
def test_batched_chains_equal_single_chains(stage, count, batch_size):
    clips, people, seeds = [frames(count, seed=i) for i in range(3)], identities(3), [5, 6, 5]
    together = stage.chain_batch(clips, people, seeds, batch_size)
    for clip, person, seed, latents in zip(clips, people, seeds, together, strict=True):
        alone = torch.cat(list(stage.chain(clip, person, seed)), dim=1)
        assert latents.shape == alone.shape
        torch.testing.assert_close(latents, alone, rtol=0, atol=1e-5)


def test_chain_batch_uses_the_full_batch_size(stage):
    sizes = []
    handle = stage.sequence.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    stage.chain_batch([frames(4, seed=i) for i in range(5)], identities(5), range(5), batch_size=2)
    handle.remove()
    assert sizes == [2, 2, 2, 2, 2, 2, 1, 1, 1]  # three steps each


@pytest.mark.parametrize("lengths", [(4, 5), (0, 0)])
def test_chain_batch_refuses_unequal_or_zero_lengths(stage, lengths):
    with pytest.raises(ValueError, match=str(lengths[1])):
        stage.chain_batch([frames(n) for n in lengths], identities(2), [0, 1])


def test_each_frame_is_sampled_independently(stage):
    """Frame 0 equals the chain's; every other frame has its own noise and does not depend on its neighbours."""
    clip, (person,) = frames(6), identities(1)
    alone = stage.each_frame(clip, person, seed=3, batch_size=4)
    assert alone.shape[1] == 6
    torch.testing.assert_close(alone[:, 0], next(stage.chain(clip, person, seed=3))[:, 0], rtol=0, atol=1e-5)
    swapped = stage.each_frame([clip[1], clip[0], *clip[2:]], person, seed=3)
    torch.testing.assert_close(swapped[:, 2:], alone[:, 2:], rtol=0, atol=1e-5)
    repeated = stage.each_frame([clip[0]] * 2, person, seed=3)
    assert (repeated[:, 0] - repeated[:, 1]).abs().mean() > 0.01
