"""Continuous batching: windows that join, leave and are cancelled at any step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tccp.config import DiffusionSettings, SamplingSettings
from tccp.diffusion.batching import Sampler, run_windows
from tccp.diffusion.sampling import WindowState, start_window
from tccp.diffusion.schedule import NoiseSchedule
from tccp.models.conditions import Conditions

SCHEDULE = NoiseSchedule.from_settings(DiffusionSettings(prediction="v", zero_terminal_snr=True))


class Denoiser:
    """A network in closed form, which notes the size of each batch. Rows do not depend on each other."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.fails = False

    def __call__(self, latents: Tensor, t: Tensor, conditions: Conditions, control: Tensor) -> Tensor:
        if self.fails:
            raise RuntimeError("out of memory")
        self.sizes.append(len(latents))
        return 0.3 * latents + 0.01 * control * t[:, None, :, None, None] / 1000


def window(seed: int, steps: int = 4, guidance: float = 1.0) -> WindowState:
    settings = SamplingSettings(solver="dpmpp", steps=steps, guidance_scale=guidance)
    control = torch.full((4, 2, 3, 3), float(seed))
    return start_window(SCHEDULE, settings, Conditions(identity=torch.zeros(1, 3, 8, 8)), control, None, seed)


def alone(state: WindowState) -> Tensor:
    return run_windows(Denoiser(), SCHEDULE, [state])[0]


def test_windows_join_when_there_is_room_and_leave_when_they_are_done() -> None:
    """Three windows with room for two: the third joins in the middle of the first, when the second has ended."""
    denoiser = Denoiser()
    sampler = Sampler(denoiser, SCHEDULE, limit=2)
    states = [window(0, steps=5), window(1, steps=2), window(2, steps=4)]
    jobs = [sampler.submit(state) for state in states]
    finished = []
    while sampler.busy:
        finished.append([jobs.index(job) for job in sampler.step()])
    assert finished == [[], [1], [], [], [0], [2]]
    assert denoiser.sizes == [2, 2, 2, 2, 2, 1]
    for job, state in zip(jobs, states, strict=True):
        torch.testing.assert_close(job.state.latents, alone(state), rtol=0, atol=1e-6)


def test_a_cancelled_window_is_in_no_further_evaluation() -> None:
    denoiser = Denoiser()
    sampler = Sampler(denoiser, SCHEDULE, limit=2)
    first, second, third = (sampler.submit(window(seed)) for seed in range(3))
    sampler.step()
    assert sampler.cancel(first) and sampler.cancel(third)
    while sampler.busy:
        sampler.step()
    assert denoiser.sizes == [2, 1, 1, 1]
    assert first.state.step == 1 and third.state.step == 0
    assert second.state.finished and not sampler.cancel(second)


def test_a_window_cancelled_during_its_last_evaluation_does_not_finish() -> None:
    class Cancelling(Denoiser):
        def __call__(self, latents: Tensor, t: Tensor, conditions: Conditions, control: Tensor) -> Tensor:
            assert sampler.cancel(job)
            return super().__call__(latents, t, conditions, control)

    sampler = Sampler(Cancelling(), SCHEDULE, limit=2)
    job = sampler.submit(window(0, steps=1))
    assert sampler.step() == []
    assert not sampler.busy and not job.state.finished


def test_guidance_takes_two_rows_and_runs_alone_where_the_limit_is_one() -> None:
    denoiser = Denoiser()
    states = [window(0, guidance=2.0), window(1), window(2)]
    for limit, sizes in ((3, [3] * 4 + [1] * 4), (1, [2] * 4 + [1] * 8)):
        denoiser.sizes = []
        together = run_windows(denoiser, SCHEDULE, states, limit)
        assert denoiser.sizes == sizes
        for state, latents in zip(states, together, strict=True):
            torch.testing.assert_close(latents, alone(state), rtol=0, atol=1e-6)


def test_guidance_acts_in_its_interval_only() -> None:
    """Outside of it, no second row is evaluated, and the prediction is that without guidance."""
    settings = SamplingSettings(solver="ddim", steps=4, guidance_scale=2.0, guidance_interval=(0.4, 0.8))
    control = torch.ones(4, 2, 3, 3)
    state = start_window(SCHEDULE, settings, Conditions(identity=torch.zeros(1, 3, 8, 8)), control, None, 0)
    assert state.guidance == (1.0, 2.0, 2.0, 1.0)  # at times 1, 0.75, 0.5 and 0.25
    denoiser = Denoiser()
    run_windows(denoiser, SCHEDULE, [state])
    assert denoiser.sizes == [1, 2, 2, 1]


def test_an_evaluation_that_fails_leaves_the_windows_where_they_are() -> None:
    denoiser = Denoiser()
    sampler = Sampler(denoiser, SCHEDULE, limit=2)
    job = sampler.submit(state := window(0))
    sampler.step()
    denoiser.fails = True
    with pytest.raises(RuntimeError):
        sampler.step()
    denoiser.fails = False
    while sampler.busy:
        sampler.step()
    assert torch.equal(job.state.latents, alone(state))


def test_a_limit_without_room_is_an_error() -> None:
    with pytest.raises(ValueError, match="limit of 0"):
        Sampler(Denoiser(), SCHEDULE, limit=0)


def finished_in_order(sampler: Sampler) -> list[list[object]]:
    """Owners of the windows that each step finishes."""
    finished = []
    while sampler.busy:
        finished.append([job.owner for job in sampler.step()])
    return finished


def test_owners_take_turns() -> None:
    """The owner that has fewest rows running is next; of one owner, the window that waits longest."""
    sampler = Sampler(Denoiser(), SCHEDULE, limit=2)
    jobs = [sampler.submit(window(seed, steps=2), "many") for seed in range(4)]
    jobs += [sampler.submit(window(9, steps=2), "one")]
    ended: list[int] = []
    while sampler.busy:
        ended += [jobs.index(job) for job in sampler.step()]
    assert ended == [0, 4, 1, 2, 3]


def test_rows_count_for_turns_and_not_windows() -> None:
    """A window with guidance takes two rows: its owner has had its turn for longer."""
    sampler = Sampler(Denoiser(), SCHEDULE, limit=4)
    for owner, guidance in (("guided", 2.0), ("plain", 1.0), ("guided", 2.0), ("plain", 1.0), ("plain", 1.0)):
        sampler.submit(window(0, guidance=guidance), owner)
    sampler.step()
    assert [job.owner for job in sampler.last] == ["guided", "plain", "plain"]


def test_a_window_with_two_rows_is_not_overtaken_for_ever() -> None:
    """There is room for one row again and again, and windows with one row keep coming."""
    sampler = Sampler(Denoiser(), SCHEDULE, limit=2)
    sampler.submit(window(0, steps=3), "a")
    sampler.submit(window(1, steps=2), "b")
    guided = sampler.submit(window(2, steps=2, guidance=2.0), "guided")
    for number in range(6):
        sampler.submit(window(3, steps=2), f"late {number}")
        sampler.step()
    assert guided.state.finished


def test_a_lower_limit_holds_from_the_next_evaluation_and_loses_no_step() -> None:
    for continuous in (True, False):
        denoiser = Denoiser()
        sampler = Sampler(denoiser, SCHEDULE, limit=4, continuous=continuous)
        states = [window(seed, steps=3) for seed in range(4)]
        jobs = [sampler.submit(state, seed) for seed, state in enumerate(states)]
        sampler.step()
        sampler.limit = 2
        while sampler.busy:
            sampler.step()
        assert denoiser.sizes == [4, 2, 2, 2, 2], "windows keep their step while they wait"
        for job, state in zip(jobs, states, strict=True):
            torch.testing.assert_close(job.state.latents, alone(state), rtol=0, atol=1e-6)


def test_a_limit_below_a_window_runs_it_alone() -> None:
    denoiser = Denoiser()
    sampler = Sampler(denoiser, SCHEDULE, limit=4)
    for seed in range(2):
        sampler.submit(window(seed, steps=2, guidance=2.0), seed)
    sampler.step()
    sampler.limit = 1
    assert finished_in_order(sampler) == [[0], [1]]
    assert denoiser.sizes == [4, 2, 2]


def test_without_continuous_batching_windows_begin_and_finish_together() -> None:
    denoiser = Denoiser()
    sampler = Sampler(denoiser, SCHEDULE, limit=2, continuous=False)
    for seed, steps in enumerate((3, 1, 2, 1)):
        sampler.submit(window(seed, steps=steps), seed)
    assert finished_in_order(sampler) == [[1], [], [0], [3], [2]]
    assert denoiser.sizes == [2, 1, 1, 2, 1], "a place that is free stays free"


def test_all_windows_of_an_owner_are_cancelled() -> None:
    denoiser = Denoiser()
    sampler = Sampler(denoiser, SCHEDULE, limit=3)
    ended = sampler.submit(window(0, steps=1), "gone")
    own = [sampler.submit(window(seed), "gone") for seed in (1, 2)]
    other = sampler.submit(window(3), "stays")
    sampler.step()
    assert ended.state.finished
    assert sampler.cancel_all("unknown") == []
    assert set(sampler.cancel_all("gone")) == set(own), "not what has finished"
    assert all(job.cancelled for job in own) and not ended.cancelled
    assert finished_in_order(sampler)[-1] == ["stays"]
    assert other.state.finished and not any(job.state.finished for job in own)
    assert set(denoiser.sizes[1:]) == {1}
    assert sampler.cancel_all("gone") == []
