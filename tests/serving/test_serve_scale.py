"""benchmarks/serve_scale.py: the simulation against closed forms, and against the sampler that it imitates."""

from __future__ import annotations

import random
import statistics
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks.serve_scale import (
    Batch,
    Costs,
    Demand,
    Fleet,
    Policy,
    Simulation,
    StageCosts,
    TraceJob,
    nodes_for,
    percentile,
    play,
    sizing,
    sizing_table,
    step_times,
    windows_of,
)
from tccp.config import DiffusionSettings, SamplingSettings
from tccp.diffusion.batching import Sampler
from tccp.diffusion.sampling import start_window
from tccp.diffusion.schedule import NoiseSchedule
from tccp.models.conditions import Conditions
from tccp.serving.batch_limit import StepCurve
from tccp.serving.job_folder import Shot
from tccp.serving.scheduling import QUANTUM

FREE = StageCosts([0.0] * 9, [0.0] * 9)
ALONE = Policy(limit=1, slots=10**6, chains=1, poll_s=0.0)
"""No batching, and no queue but that of the loop."""


def rows_take(seconds: float, limit: int = 8) -> StageCosts:
    """Every evaluation takes as long, whatever its rows."""
    return StageCosts([seconds] * (limit + 1), [seconds] * (limit + 1))


def one_window(arrival_s: float, steps: int = 1, owner: int = 0) -> TraceJob:
    return TraceJob(arrival_s, owner, (1,), steps)


def arrivals(count: int, rate_s: float, steps: tuple[int, ...]) -> list[TraceJob]:
    rng, now, jobs = random.Random(5), 0.0, []
    for _ in range(count):
        now += rng.expovariate(rate_s)
        jobs.append(one_window(now, rng.choice(steps)))
    return jobs


@pytest.mark.parametrize("steps", [(1,), (1, 5)])
@pytest.mark.parametrize("load", [0.3, 0.7])
def test_the_mean_wait_is_that_of_one_server(steps: tuple[int, ...], load: float) -> None:
    """Pollaczek and Khinchine: rate E[S^2] / (2 (1 - load)); M/D/1 if all windows take as long."""
    times = [0.1 * count for count in steps]
    rate = load / statistics.mean(times)
    costs = Costs((FREE, rows_take(0.1)), shared_device=False)
    outcome = Simulation(costs, ALONE).run(arrivals(60_000, rate, steps))
    wait = statistics.mean(outcome.latencies_s) - statistics.mean(times)
    second_moment = statistics.mean(time * time for time in times)
    assert wait == pytest.approx(rate * second_moment / (2 * (1 - load)), rel=0.06)
    assert outcome.summary()["utilisation"] == pytest.approx(load, rel=0.03)


@pytest.mark.parametrize(("landmark_s", "face_s"), [(1.0, 3.0), (3.0, 1.0), (2.0, 2.0)])
def test_stages_of_a_shot_work_one_after_the_other(landmark_s: float, face_s: float) -> None:
    windows = 9
    costs = Costs((rows_take(landmark_s), rows_take(face_s)), shared_device=False)
    job = TraceJob(0.0, 0, (1 + 7 * (windows - 1),), 1)
    pipelined = Simulation(costs, ALONE).run([job])
    assert pipelined.latencies_s == [pytest.approx(landmark_s + face_s + (windows - 1) * max(landmark_s, face_s))]
    shared = Simulation(replace(costs, shared_device=True), ALONE).run([job])
    assert shared.latencies_s == [pytest.approx(windows * (landmark_s + face_s))]
    gap = Costs((rows_take(landmark_s), replace(rows_take(face_s), gap_s=0.5)), shared_device=False)
    assert Simulation(gap, ALONE).run([job]).latencies_s[0] > pipelined.latencies_s[0]


def test_windows_share_evaluations_up_to_the_limit() -> None:
    costs = Costs((FREE, StageCosts([1.0 + rows for rows in range(9)], [0.0] * 9)), shared_device=False)
    eight = [one_window(0.25) for _ in range(8)]

    def latencies(limit: int, jobs: list[TraceJob]) -> list[float]:
        # All are claimed at 0.5 s.
        found = Simulation(costs, replace(ALONE, limit=limit, poll_s=0.5)).run(jobs).latencies_s
        return [latency - 0.25 for latency in found]

    assert latencies(8, eight) == [9.0] * 8
    assert latencies(4, eight) == [5.0] * 4 + [10.0] * 4
    assert latencies(8, [replace(job, guided=True) for job in eight]) == [9.0] * 4 + [18.0] * 4


def test_batches_are_those_of_the_sampler() -> None:
    """The same windows run in each evaluation, for random owners, steps, guidance, limits and moments of arrival."""
    schedule = NoiseSchedule.from_settings(DiffusionSettings(prediction="v", zero_terminal_snr=True))
    control = torch.zeros(1, 1, 1, 1)
    nothing = Conditions(identity=torch.zeros(1, 3, 1, 1))

    class Window:
        def __init__(self, number: int, owner: int, left: int, rows: int):
            self.number, self.owner, self.left, self.rows = number, owner, left, rows

    def denoiser(latents: Tensor, t: Tensor, conditions: Conditions, control: Tensor) -> Tensor:
        return latents

    rng = random.Random(0)
    for continuous in (True, False):
        for _ in range(10):
            limit = rng.randrange(1, 6)
            sampler = Sampler(denoiser, schedule, limit, continuous)
            batch = Batch(limit, continuous, lambda window: window.owner)
            numbers: dict[object, int] = {}
            for turn in range(40):
                for _ in range(rng.randrange(3) if turn < 30 else 0):
                    owner, steps, rows = rng.randrange(3), rng.randrange(1, 5), rng.choice((1, 1, 2))
                    settings = SamplingSettings(steps=steps, guidance_scale=float(rows))
                    window = Window(len(numbers), owner, steps, rows)
                    batch.waiting.append(window)
                    numbers[sampler.submit(start_window(schedule, settings, nothing, control, None, 0), owner)] = (
                        window.number
                    )
                if not sampler.busy:
                    assert not batch.waiting and not batch.running
                    continue
                total = batch.join()
                in_batch = [window.number for window in batch.running]
                finished = [window.number for window in batch.step()]
                assert [numbers[job] for job in sampler.step()] == finished
                assert [numbers[job] for job in sampler.last] == in_batch
                assert total == sum(job.state.num_rows for job in sampler.last)


def test_step_times_are_those_of_the_curve() -> None:
    curve = StepCurve((1, 2, 8), (1.0, 1.5, 3.0))
    times = step_times(curve.rows, curve.seconds, 16)
    assert times[1:] == pytest.approx([curve.seconds_of(rows) for rows in range(1, 17)])


def test_windows_of_a_shot_are_those_of_the_server() -> None:
    for frames in range(1, 40):
        assert windows_of(TraceJob(0.0, 0, (frames,), 1)) == len(Shot(0, frames).windows(8))


@pytest.mark.parametrize(
    "fleet", [Fleet(3, failures_per_day=500.0, start_s=20.0), Fleet(1, most=6, failures_per_day=300.0, start_s=20.0)]
)
def test_all_jobs_end_whatever_nodes_do(fleet: Fleet) -> None:
    stage = StageCosts([0.02 + 0.01 * n for n in range(9)], [0.02 + 0.01 * n for n in range(9)], 0.01, 0.01, 0.02)
    demand = Demand(3000, two_shots=0.5, guided=0.3, owners=3)
    jobs = list(demand.jobs(43_000, 44_000, seed=3))
    outcome = Simulation(Costs((stage, stage), prepare_s=1.0, publish_s=2.0), Policy(slots=3), fleet).run(jobs)
    assert len(outcome.latencies_s) == len(jobs) > 1000
    assert min(outcome.latencies_s) > 3.0
    assert outcome.windows == sum(map(windows_of, jobs)), "each window counts once, also after failures"
    assert outcome.failures > 3 and outcome.repeated > 0
    assert outcome.most_nodes <= max(fleet.nodes, fleet.most or 0)
    assert outcome.most_nodes > 1


def test_an_owner_with_many_jobs_does_not_keep_others_from_their_first() -> None:
    frames = 1 + 7 * 9  # 10 windows
    costs = Costs((FREE, rows_take(1.0)), shared_device=False)
    jobs = [TraceJob(0.0, 1, (frames,), 1) for _ in range(30)] + [TraceJob(5.0, 2, (frames,), 1)]
    latencies = Simulation(costs, replace(ALONE, slots=1)).run(jobs).latencies_s
    assert max(latencies) >= 300.0
    assert latencies[-1] <= 10.0 + 10.0 + 10.0, "at most the running job and one that was there before it"


def test_a_long_job_gives_way_after_its_quantum() -> None:
    costs = Costs((FREE, rows_take(1.0)), shared_device=False)
    long, short = TraceJob(0.0, 1, (1 + 7 * 199,), 1), TraceJob(1.0, 2, (1,), 1)
    waited = Simulation(costs, replace(ALONE, slots=1)).run([long, short]).latencies_s[1]
    # The quantum ends; what stage 1 has made ahead is used up; then it is the short one's turn.
    assert QUANTUM - 1 <= waited <= QUANTUM + 5


def test_sizing_finds_the_fewest_nodes() -> None:
    stage = StageCosts([0.5 + 0.25 * n for n in range(9)], [0.5 + 0.25 * n for n in range(9)])
    costs, policy, demand = Costs((stage, stage)), Policy(), Demand(300, clip_s=(1.0, 2.0))
    nodes = nodes_for(costs, policy, demand, Fleet(), 40.0, (11.5, 12.5))

    def p95_s(count: int) -> float:
        return percentile(sorted(play(costs, policy, demand, Fleet(count), (11.5, 12.5)).latencies_s), 95)

    assert p95_s(nodes) <= 40.0 < p95_s(nodes - 1) and nodes > 1
    with pytest.raises(ValueError, match="nodes do not end"):
        nodes_for(costs, policy, demand, Fleet(), 1.0, (11.9, 12.0))


def test_the_table_of_a_day() -> None:
    stage = StageCosts([0.05] * 9, [0.05] * 9)
    found = sizing(Costs((stage, stage)), Policy(), Demand(100, clip_s=(1.0,)), Fleet(start_s=10.0), 60.0, 2.0)
    fixed = found["days"]["fixed"]
    assert fixed["jobs"] == pytest.approx(2400, rel=0.1)
    assert fixed["node_hours"] == pytest.approx(24 * found["nodes"], rel=0.02)
    assert fixed["cost_per_1000_films"] == pytest.approx(1000 * 2.0 * fixed["node_hours"] / fixed["jobs"], rel=0.01)
    assert sizing_table([found]).count("\n") == 3
