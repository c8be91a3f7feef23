"""Simulates the server over many nodes: `python benchmarks/serve_scale.py --costs COSTS.json` tells how many it needs.

Jobs arrive over a day. They are claimed in the store's order (`tccp.serving.scheduling`), take slots, give way after
their quantum, and run shots at once as `tccp.serving.conductor` does; windows go to stage loops that batch as
`tccp.diffusion.batching` does. What an evaluation and the rest of a window take is given, as benchmarks/serve.py has
measured it. Nodes fail, start and are added and removed. `--check` compares the simulation with that benchmark's runs.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import math
import random
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tccp.serving.scheduling import first_turn, gives_way

WINDOW = 8
"""Frames of a window, of which one is the last one of the window before."""
LANDMARK, FACE = 0, 1
KINDS = ("landmark", "face")
_AHEAD = 2  # as in tccp.serving.conductor
DAY_S = 86_400.0


# Jobs


@dataclass(frozen=True)
class TraceJob:
    """A job of a trace. shots: frames of each shot. steps: of each window. guided: with guidance, so two rows."""

    arrival_s: float
    owner: int
    shots: tuple[int, ...]
    steps: int
    guided: bool = False


def shot_windows(frames: int) -> int:
    """Windows of a shot: the first frame, and then `WINDOW - 1` frames each."""
    return 1 + math.ceil((frames - 1) / (WINDOW - 1))


def windows_of(job: TraceJob) -> int:
    return sum(shot_windows(frames) for frames in job.shots)


def poisson_trace(count: int, rate_s: float, seed: int) -> list[TraceJob]:
    """Jobs of 0.6 to 3.4 s in one or two shots, most of them with few steps, a fifth of them with guidance."""
    rng = random.Random(seed)
    now, jobs = 0.0, []
    for _ in range(count):
        now += rng.expovariate(rate_s)
        shots = tuple(rng.choice((15, 22, 29, 43)) for _ in range(rng.choice((1, 1, 2))))
        steps = rng.choices((2, 4, 8), (6, 3, 1))[0]
        jobs.append(TraceJob(now, rng.randrange(4), shots, steps, rng.random() < 0.2))
    return jobs


@dataclass(frozen=True)
class Demand:
    """Jobs of a day. swing: how far the rate of arrivals goes above and below its mean, in one wave that peaks at noon.

    clip_s: lengths of films, equally frequent. two_shots: share of jobs with a cut in the middle.
    """

    jobs_per_hour: float = 10_000
    swing: float = 0.6
    clip_s: tuple[float, ...] = (2, 4, 6)
    two_shots: float = 0.25
    steps: int = 2
    guided: float = 0.0
    owners: int = 500

    def rate_s(self, at_s: float) -> float:
        return self.jobs_per_hour / 3600 * (1 - self.swing * math.cos(2 * math.pi * at_s / DAY_S))

    def jobs(self, begin_s: float, end_s: float, seed: int) -> Iterator[TraceJob]:
        """Poisson arrivals, by thinning."""
        rng = random.Random(seed)
        most = self.jobs_per_hour / 3600 * (1 + self.swing)
        now = begin_s
        while (now := now + rng.expovariate(most)) < end_s:
            if rng.random() * most > self.rate_s(now):
                continue
            frames = round(25 * rng.choice(self.clip_s))
            half = frames // 2
            shots = (half, frames - half) if rng.random() < self.two_shots else (frames,)
            yield TraceJob(now, rng.randrange(self.owners), shots, self.steps, rng.random() < self.guided)


# What things take


def step_times(rows: Sequence[int], seconds: Sequence[float], limit: int) -> list[float]:
    """Seconds of an evaluation of 0, 1, ... `limit` rows, as `tccp.serving.batch_limit.StepCurve.seconds_of`."""
    pairs = list(zip(rows, seconds, strict=True))

    def of(count: int) -> float:
        if count <= pairs[0][0]:
            return pairs[0][1]
        for (low, low_s), (high, high_s) in itertools.pairwise(pairs):
            if count <= high:
                return low_s + (high_s - low_s) * (count - low) / (high - low)
        return pairs[-1][1] * count / pairs[-1][0]

    return [of(count) for count in range(limit + 1)]


@dataclass(frozen=True)
class StageCosts:
    """Seconds of a stage's loop. first, sequence: of an evaluation by its number of rows.

    begin_s, finish_s: of a window's inputs and of its pictures, which the loop makes one after the other. gap_s: from
    the end of a window until the next one of its chain arrives.
    """

    first: Sequence[float]
    sequence: Sequence[float]
    begin_s: float = 0.0
    finish_s: float = 0.0
    gap_s: float = 0.0


@dataclass(frozen=True)
class Costs:
    """shared_device: both stages of a node use one device, one at a time. prepare_s, publish_s: of a job, before and
    after its windows; other machines do that, and it never waits.
    """

    stages: tuple[StageCosts, StageCosts]
    shared_device: bool = True
    prepare_s: float = 0.0
    publish_s: float = 0.0


@dataclass(frozen=True)
class Policy:
    """limit: rows in an evaluation. continuous: windows join at any step. slots: jobs at once for every node.

    chains: shots of a job at once. poll_s: how often free slots look for a job.
    """

    limit: int = 8
    continuous: bool = True
    slots: int = 8
    chains: int = 2
    poll_s: float = 0.25


@dataclass(frozen=True)
class Fleet:
    """Nodes. nodes: at the start, and the least there are. most: the most; None: always the same number.

    jobs_each: where their number changes, a node is wanted for so many jobs that wait or run.
    failures_per_day: of a node. retry_s: until its windows are called again elsewhere. start_s: of a node, after a
    failure and when one is added. up_after_s, down_after_s: how long more or fewer nodes must be wanted.
    """

    nodes: int = 1
    most: int | None = None
    jobs_each: float = 4.0
    failures_per_day: float = 0.0
    retry_s: float = 1.0
    start_s: float = 120.0
    up_after_s: float = 30.0
    down_after_s: float = 600.0


# The simulation


class _Job:
    __slots__ = ("chains", "claimed", "ended_s", "given", "giving_way", "number", "open", "rows", "since", "turn")

    def __init__(self, number: int, given: TraceJob):
        self.number, self.given = number, given
        self.chains = [_Chain(self, shot_windows(frames)) for frames in given.shots]
        self.rows = 2 if given.guided else 1
        self.turn = 0.0  # virtual time
        self.since = 0  # windows since it was claimed
        self.open = 0  # chains that run
        self.claimed = self.giving_way = False
        self.ended_s = -1.0


class _Chain:
    """A shot. done: windows that each stage has made. busy: whether it has one of them."""

    __slots__ = ("busy", "done", "job", "started", "windows")

    def __init__(self, job: _Job, windows: int):
        self.job, self.windows = job, windows
        self.done, self.busy = [0, 0], [False, False]
        self.started = False


class _Window:
    __slots__ = ("chain", "left", "rows", "stage")

    def __init__(self, chain: _Chain, stage: int):
        self.chain, self.stage = chain, stage
        self.left, self.rows = chain.job.given.steps, chain.job.rows


class Batch:
    """As `tccp.diffusion.batching.Sampler`: windows have `left` steps and `rows`; `owner_of` tells whose they are."""

    __slots__ = ("_continuous", "_limit", "_owner_of", "running", "waiting")

    def __init__(self, limit: int, continuous: bool, owner_of: Callable[[Any], object]):
        self._limit, self._continuous, self._owner_of = limit, continuous, owner_of
        self.waiting: deque[Any] = deque()
        self.running: list[Any] = []

    def join(self) -> int:
        """Lets windows join; returns the rows of the next evaluation."""
        running, waiting, owner_of = self.running, self.waiting, self._owner_of
        total = sum([window.rows for window in running])
        if not waiting or (running and not self._continuous):
            return total
        rows: dict[object, int] = {}
        for window in running:
            owner = owner_of(window)
            rows[owner] = rows.get(owner, 0) + window.rows
        while waiting:
            best, fewest = 0, math.inf
            for i, window in enumerate(waiting):
                own = rows.get(owner_of(window), 0)
                if own < fewest:
                    best, fewest = i, own
                    if not own:
                        break
            window = waiting[best]
            if total + window.rows > self._limit and running:
                break
            del waiting[best]
            running.append(window)
            owner = owner_of(window)
            rows[owner] = rows.get(owner, 0) + window.rows
            total += window.rows
        return total

    def step(self) -> list[Any]:
        """Advances all running windows; returns those that are finished."""
        finished = []
        for window in self.running:
            window.left -= 1
            if not window.left:
                finished.append(window)
        if finished:
            self.running = [window for window in self.running if window.left]
        return finished


class _Loop:
    """A stage's loop on a node. first, sequence: its two networks."""

    __slots__ = ("busy", "finished", "first", "load", "new", "node", "sequence", "stage")

    def __init__(self, node: _Node, stage: int, policy: Policy):
        self.node, self.stage = node, stage
        self.first = Batch(policy.limit, policy.continuous, _job_of)
        self.sequence = Batch(policy.limit, policy.continuous, _job_of)
        self.new: list[_Window] = []
        self.finished: list[_Window] = []  # in the turn under way
        self.load = 0
        self.busy = False

    def windows(self) -> list[_Window]:
        found = [*self.new, *self.finished]
        for batch in (self.first, self.sequence):
            found += [*batch.running, *batch.waiting]
        return found


def _job_of(window: _Window) -> _Job:
    return window.chain.job


class _Node:
    __slots__ = ("alive", "draining", "loops", "since_s")

    def __init__(self, policy: Policy, now: float):
        self.loops = (_Loop(self, LANDMARK, policy), _Loop(self, FACE, policy))
        self.alive, self.draining = True, False
        self.since_s = now


@dataclass
class Outcome:
    """latencies_s: of each job, in the order of arrival. waited_s: until it was claimed first, in that order.

    windows_in_time: those until `until_s`. busy_s: of loops, so up to twice `node_s` where each has its own device.
    node_s: of all nodes, also while they start. repeated: windows that were lost with a node and made again.
    """

    latencies_s: list[float] = field(default_factory=list)
    windows: int = 0
    windows_in_time: int = 0
    until_s: float = 0.0
    evaluations: int = 0
    rows: int = 0
    busy_s: float = 0.0
    node_s: float = 0.0
    most_nodes: int = 0
    failures: int = 0
    repeated: int = 0
    waited_s: list[float] = field(default_factory=list)

    @property
    def windows_s(self) -> float:
        """Windows per second until `until_s`."""
        return self.windows_in_time / self.until_s if self.until_s else 0.0

    def summary(self, price_per_hour: float = 0.0) -> dict[str, float]:
        latencies = sorted(self.latencies_s)
        hours = self.node_s / 3600
        return {
            "jobs": len(latencies),
            "p50_s": round(percentile(latencies, 50), 2),
            "p95_s": round(percentile(latencies, 95), 2),
            "utilisation": round(self.busy_s / self.node_s, 3) if self.node_s else 0.0,
            "rows_per_evaluation": round(self.rows / max(1, self.evaluations), 2),
            "node_hours": round(hours, 2),
            "most_nodes": self.most_nodes,
            "failures": self.failures,
            "windows_made_twice": self.repeated,
            "cost_per_1000_films": round(1000 * price_per_hour * hours / max(1, len(latencies)), 3),
        }


def percentile(ordered: Sequence[float], percent: float) -> float:
    """By linear interpolation. ordered: ascending, not empty."""
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


class Simulation:
    """Plays jobs until all have ended: `run`."""

    def __init__(self, costs: Costs, policy: Policy = Policy(), fleet: Fleet = Fleet(), seed: int = 0):
        self._costs, self._policy, self._fleet = costs, policy, fleet
        self._rng = random.Random(seed)
        self._events: list[tuple[float, int, Callable[[Any], None], Any]] = []
        self._count = 0
        self.now = 0.0
        self._nodes: list[_Node] = []
        self._leaving: list[_Node] = []
        self._starting = 0
        self._parked: list[_Window] = []
        self._queue: list[tuple[float, int, _Job]] = []
        self._queued_of: dict[int, int] = {}
        self._turn = 0.0  # the virtual time of the job that was chosen last
        self._working = 0
        self._tick_due = False
        self._wanted_since: tuple[int, float] | None = None
        self._jobs: list[_Job] = []
        self._ended = 0
        self._more = True
        self._until = math.inf
        self._last_window = 0.0
        self.outcome = Outcome()

    def run(self, jobs: Iterable[TraceJob], until_s: float | None = None) -> Outcome:
        """jobs: by arrival. until_s: of `Outcome.windows_s`; None: of the last window."""
        self._until = math.inf if until_s is None else until_s
        self._source = iter(jobs)
        first = next(self._source, None)
        if first is None:
            return self.outcome
        self.now = first.arrival_s
        for _ in range(self._fleet.nodes):
            self._add_node()
        self._at(first.arrival_s, self._arrive, first)
        if self._fleet.most is not None:
            self._at(self.now + 5.0, self._scale, None)
        events, pop = self._events, heapq.heappop
        while self._more or self._ended < len(self._jobs):
            self.now, _, function, given = pop(events)
            function(given)
        outcome = self.outcome
        outcome.node_s += sum(self.now - node.since_s for node in (*self._nodes, *self._leaving))
        outcome.until_s = self._last_window if until_s is None else until_s
        outcome.latencies_s = [job.ended_s - job.given.arrival_s for job in self._jobs]
        return outcome

    def _at(self, when: float, function: Callable[[Any], None], given: Any) -> None:
        self._count += 1
        heapq.heappush(self._events, (when, self._count, function, given))

    # Jobs: as JobStore and Conductor

    def _arrive(self, given: TraceJob) -> None:
        job = _Job(len(self._jobs), given)
        self._jobs.append(job)
        waiting = self._queued_of.get(given.owner, 0)
        job.turn = first_turn(self._turn, waiting)
        self._queued_of[given.owner] = waiting + 1
        heapq.heappush(self._queue, (job.turn, job.number, job))
        self._look()
        following = next(self._source, None)
        if following is None:
            self._more = False
        else:
            self._at(following.arrival_s, self._arrive, following)

    def _look(self) -> None:
        """Lets free slots look for a job when their time comes."""
        if self._tick_due or not self._queue or self._working >= self._slots():
            return
        self._tick_due = True
        poll = self._policy.poll_s
        self._at(math.ceil(self.now / poll) * poll if poll else self.now, self._claim, None)

    def _slots(self) -> int:
        return self._policy.slots * max(1, len(self._nodes))

    def _claim(self, _: object) -> None:
        self._tick_due = False
        while self._queue and self._working < self._slots():
            turn, _, job = heapq.heappop(self._queue)
            self._turn = max(self._turn, turn)
            self._working += 1
            job.since, job.giving_way = 0, False
            if job.claimed:
                self._generate(job)
                continue
            job.claimed = True
            self._queued_of[job.given.owner] -= 1
            self.outcome.waited_s.append(self.now - job.given.arrival_s)
            self._at(self.now + self._costs.prepare_s, self._generate, job)

    def _generate(self, job: _Job) -> None:
        for chain in job.chains:
            if chain.done[FACE] < chain.windows:
                chain.started = False
        self._next_chains(job)

    def _next_chains(self, job: _Job) -> None:
        """Starts shots while the job may have more at once."""
        for chain in job.chains:
            if job.open >= self._policy.chains or job.giving_way:
                break
            if not chain.started and chain.done[FACE] < chain.windows:
                chain.started = True
                job.open += 1
                self._next_windows(chain)
        if not job.open:
            self._job_pauses(job)

    def _job_pauses(self, job: _Job) -> None:
        if all(chain.done[FACE] == chain.windows for chain in job.chains):
            self._at(self.now + self._costs.publish_s, self._complete, job)
            return
        self._working -= 1
        heapq.heappush(self._queue, (job.turn, job.number, job))
        self._look()

    def _complete(self, job: _Job) -> None:
        job.ended_s = self.now
        job.chains = []
        self._ended += 1
        self._working -= 1
        self._look()

    def _next_windows(self, chain: _Chain) -> None:
        """Submits what the chain may do next; stage 1 is up to `_AHEAD` windows ahead of what stage 2 has taken."""
        done, busy = chain.done, chain.busy
        if not busy[FACE] and done[FACE] < done[LANDMARK]:
            busy[FACE] = True
            self._submit(_Window(chain, FACE))
        ahead = done[LANDMARK] - done[FACE] - busy[FACE]
        if not busy[LANDMARK] and ahead <= _AHEAD and done[LANDMARK] < chain.windows and not chain.job.giving_way:
            busy[LANDMARK] = True
            self._submit(_Window(chain, LANDMARK))
        if not (busy[FACE] or busy[LANDMARK]):  # all made, or it gives way
            chain.job.open -= 1
            self._next_chains(chain.job)

    def _made(self, windows: list[_Window]) -> None:
        """Windows whose chain goes on now."""
        for window in windows:
            chain, job, stage = window.chain, window.chain.job, window.stage
            chain.busy[stage] = False
            chain.done[stage] += 1
            if stage == FACE:
                self.outcome.windows += 1
                job.turn += 1
                job.since += 1
                next_turn = self._queue[0][0] if self._queue else None
                job.giving_way = job.giving_way or gives_way(job.turn, next_turn, job.since)
            self._next_windows(chain)

    # Windows: as WindowLoop

    def _submit(self, window: _Window) -> None:
        """Sends a window to the less loaded of two replicas of its stage, as Ray Serve does."""
        nodes = self._nodes
        if not nodes:
            self._parked.append(window)
            return
        loop = nodes[0].loops[window.stage]
        if len(nodes) > 1:
            rng = self._rng.random
            loop = nodes[int(rng() * len(nodes))].loops[window.stage]
            other = nodes[int(rng() * len(nodes))].loops[window.stage]
            if other.load < loop.load:
                loop = other
        loop.new.append(window)
        loop.load += 1
        self._wake(loop)

    def _wake(self, loop: _Loop) -> None:
        if loop.busy or not loop.load:
            return
        if self._costs.shared_device and loop.node.loops[1 - loop.stage].busy:
            return
        loop.busy = True
        self._at(self.now, self._turn_of, loop)  # other windows of this moment join the same turn

    def _turn_of(self, loop: _Loop) -> None:
        """One turn of a loop: it takes new windows, and evaluates each of its networks that has some."""
        if not loop.node.alive:
            return
        costs = self._costs.stages[loop.stage]
        took = costs.begin_s * len(loop.new)
        for window in loop.new:
            chain = window.chain
            (loop.sequence if chain.done[loop.stage] else loop.first).waiting.append(window)
        loop.new.clear()
        finished = loop.finished = []
        outcome = self.outcome
        for batch, seconds in ((loop.first, costs.first), (loop.sequence, costs.sequence)):
            if batch.running or batch.waiting:
                rows = batch.join()
                took += seconds[rows] if rows < len(seconds) else seconds[-1] * rows / (len(seconds) - 1)
                finished += batch.step()
                outcome.evaluations += 1
                outcome.rows += rows
        took += costs.finish_s * len(finished)
        self._at(self.now + took, self._turn_ends, (loop, took))

    def _turn_ends(self, given: tuple[_Loop, float]) -> None:
        loop, took = given
        node, finished = loop.node, loop.finished
        if not node.alive:  # it died meanwhile: what it had not handed on is made again
            return
        loop.busy, loop.finished = False, []
        self.outcome.busy_s += took
        if finished:
            loop.load -= len(finished)
            self._last_window = self.now
            if loop.stage == FACE and self.now <= self._until:
                self.outcome.windows_in_time += len(finished)
            self._hand_on(loop.stage, finished)
        other = node.loops[1 - loop.stage]
        if self._costs.shared_device and other.load and not (loop.busy or other.busy):
            other.busy = True  # the stages take turns
            self._turn_of(other)
        elif loop.load and not loop.busy and not (self._costs.shared_device and other.busy):
            loop.busy = True
            self._turn_of(loop)
        if node.draining and not any(one.load for one in node.loops):
            self._remove(node)

    def _hand_on(self, stage: int, finished: list[_Window]) -> None:
        gap = self._costs.stages[stage].gap_s
        if gap:
            self._at(self.now + gap, self._made, finished)
        else:
            self._made(finished)

    # Nodes

    def _add_node(self) -> None:
        node = _Node(self._policy, self.now)
        self._nodes.append(node)
        self.outcome.most_nodes = max(self.outcome.most_nodes, len(self._nodes))
        if self._fleet.failures_per_day:
            self._at(self.now + self._rng.expovariate(self._fleet.failures_per_day / DAY_S), self._fail, node)
        parked, self._parked = self._parked, []
        for window in parked:
            self._submit(window)
        self._look()

    def _start(self, _: object) -> None:
        self._starting -= 1
        self._add_node()

    def _start_later(self) -> None:
        self._starting += 1
        self.outcome.node_s += self._fleet.start_s  # it is paid for while it starts
        self._at(self.now + self._fleet.start_s, self._start, None)

    def _fail(self, node: _Node) -> None:
        if not node.alive:
            return
        self.outcome.failures += 1
        windows = [window for loop in node.loops for window in loop.windows()]
        replaced = not node.draining
        self._remove(node)
        self.outcome.repeated += len(windows)
        for window in windows:
            window.left = window.chain.job.given.steps
        self._at(self.now + self._fleet.retry_s, self._again, windows)
        if replaced:
            self._start_later()

    def _again(self, windows: list[_Window]) -> None:
        for window in windows:
            self._submit(window)

    def _remove(self, node: _Node) -> None:
        node.alive = False
        (self._leaving if node.draining else self._nodes).remove(node)
        self.outcome.node_s += self.now - node.since_s

    def _scale(self, _: object) -> None:
        """Compares the number of nodes with the one that is wanted for the jobs."""
        fleet = self._fleet
        assert fleet.most is not None
        jobs = self._working + len(self._queue)
        wanted = min(fleet.most, max(fleet.nodes, math.ceil(jobs / fleet.jobs_each)))
        have = len(self._nodes) + self._starting
        direction = (wanted > have) - (wanted < have)
        if direction == 0:
            self._wanted_since = None
        else:
            if self._wanted_since is None or self._wanted_since[0] != direction:
                self._wanted_since = direction, self.now
            if self.now - self._wanted_since[1] >= (fleet.up_after_s if direction > 0 else fleet.down_after_s):
                self._wanted_since = None
                for _ in range(wanted - have):
                    self._start_later()
                for node in sorted(self._nodes, key=lambda one: sum(loop.load for loop in one.loops))[: have - wanted]:
                    self._drain(node)
        if self._more or self._ended < len(self._jobs):
            self._at(self.now + 5.0, self._scale, None)

    def _drain(self, node: _Node) -> None:
        """Takes a node out of the choice; it ends when its windows have."""
        if len(self._nodes) == 1:
            return
        node.draining = True
        self._nodes.remove(node)
        self._leaving.append(node)
        if not any(loop.load for loop in node.loops):
            self._remove(node)


# Sizing


def example_costs(limit: int) -> Costs:
    """An example, measured nowhere: evaluations of 20 ms and 5 ms for each row, 10 ms before and after each window."""
    times = [0.020 + 0.005 * rows for rows in range(limit + 1)]
    stage = StageCosts(times, times, begin_s=0.010, finish_s=0.010, gap_s=0.020)
    return Costs((stage, stage), shared_device=True, prepare_s=3.0, publish_s=3.0)


def costs_of(record: Mapping[str, Any], limit: int, policy: str = "continuous") -> Costs:
    """From the JSON of benchmarks/serve.py: from its calibration, where it has one; else evaluations alone.

    A CPU node has a core for each stage; a GPU is shared.
    """
    networks = record["networks"]
    shared = not networks["device"].startswith("cpu")
    run = record.get("calibration", {}).get(policy)
    stages = []
    for kind in KINDS:
        times = {}
        for part in ("first", "sequence"):
            curve = networks[f"{kind}_{part}"]
            rows, seconds = curve["rows"], curve["seconds"]
            if run is not None and f"{kind}_{part}" in run["steps"]:
                # With the preparation of windows and the other stage beside it. Sizes that are rare tell little.
                measured = run["steps"][f"{kind}_{part}"].items()
                seen = sorted((int(size), mean) for size, (mean, count) in measured if count > 3)
                rows, seconds = zip(*seen, strict=True) if seen else (rows, seconds)
            times[part] = step_times(rows, seconds, limit)
        rest = {name: 0.0 if run is None else run["costs"][f"{kind}_{name}"] for name in ("begin", "finish", "gap")}
        stages.append(StageCosts(times["first"], times["sequence"], rest["begin"], rest["finish"], rest["gap"]))
    return Costs((stages[0], stages[1]), shared)


def busy_s(costs: Costs, policy: Policy, job: TraceJob) -> float:
    """Seconds of a node for a job where every evaluation is full: of both stages, or of the slower one."""
    rows = 2 if job.guided else 1
    each = []
    for stage in costs.stages:
        shares = [stage.first[policy.limit] / policy.limit, stage.sequence[policy.limit] / policy.limit]
        windows, shots = windows_of(job), len(job.shots)
        evaluations = job.steps * rows * (shots * shares[0] + (windows - shots) * shares[1])
        each.append(evaluations + windows * (stage.begin_s + stage.finish_s))
    return sum(each) if costs.shared_device else max(each)


def play(costs: Costs, policy: Policy, demand: Demand, fleet: Fleet, hours: tuple[float, float] = (0, 24)) -> Outcome:
    """Simulates these hours of a day. The jobs are the same for all fleets."""
    return Simulation(costs, policy, fleet).run(demand.jobs(3600 * hours[0], 3600 * hours[1], seed=0))


def nodes_for(
    costs: Costs,
    policy: Policy,
    demand: Demand,
    fleet: Fleet,
    target_p95_s: float,
    hours: tuple[float, float] = (11.0, 13.0),
) -> int:
    """The fewest nodes, within 2 %, with which 95 % of the jobs of these hours end within the target.

    Raises ValueError if no number of nodes reaches it.
    """

    def p95_s(nodes: int) -> float:
        found = play(costs, policy, demand, replace(fleet, nodes=nodes, most=None), hours).summary()["p95_s"]
        print(f"{nodes} nodes: p95 {found} s", file=sys.stderr, flush=True)
        return found

    sample = list(demand.jobs(3600 * hours[0], 3600 * hours[1], seed=0))
    work = sum(busy_s(costs, policy, job) for job in sample)
    low, high = 0, max(1, math.ceil(1.05 * work / (3600 * (hours[1] - hours[0]))))
    for _ in range(20):
        if p95_s(high) <= target_p95_s:
            break
        low, high = high, math.ceil(1.25 * high)
    else:
        raise ValueError(f"{low} nodes do not end 95 % of these jobs within {target_p95_s} s, nor do fewer")
    while high - low > max(1, high // 50):
        middle = (low + high) // 2
        if p95_s(middle) > target_p95_s:
            low = middle
        else:
            high = middle
    return high


def sizing(
    costs: Costs, policy: Policy, demand: Demand, fleet: Fleet, target_p95_s: float, price_per_hour: float
) -> dict[str, Any]:
    """How many nodes a day needs: always the same number, and with as many as are wanted at each time."""
    nodes = nodes_for(costs, policy, demand, fleet, target_p95_s)
    fleets = {
        "fixed": replace(fleet, nodes=nodes, most=None),
        "autoscaled": replace(fleet, nodes=max(1, nodes // 4), most=math.ceil(1.25 * nodes)),
    }
    days = {name: play(costs, policy, demand, one).summary(price_per_hour) for name, one in fleets.items()}
    return {
        "demand": asdict(demand),
        "policy": asdict(policy),
        "fleet": asdict(fleet),
        "target_p95_s": target_p95_s,
        "price_per_hour": price_per_hour,
        "nodes": nodes,
        "days": days,
    }


# Comparison with runs


def check(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Plays the traces of a record of benchmarks/serve.py, with the costs that its calibration has measured."""
    rows = []
    for part in record["loads"]:
        trace = [TraceJob(**{**job, "shots": tuple(job["shots"])}) for job in part["trace"]]
        for name, measured in part["policies"].items():
            limit = 1 if name == "none" else record["limit"]
            policy = Policy(limit, continuous=name != "request level", slots=record["slots"])
            costs = costs_of(record, max(2, limit), name)
            outcome = Simulation(costs, policy).run(trace, trace[-1].arrival_s)
            simulated = {"windows_s": round(outcome.windows_s, 3), **outcome.summary()}
            row: dict[str, Any] = {"load": part["load"], "policy": name}
            for figure in ("windows_s", "p50_s", "p95_s", "rows_per_evaluation"):
                row[figure] = {"measured": measured[figure], "simulated": simulated[figure]}
                row[figure]["off_percent"] = round(100 * (simulated[figure] / measured[figure] - 1), 1)
            rows.append(row)
    return rows


def check_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| load | batching | windows/s: measured | simulated | p50, s: measured | simulated | p95, s: measured "
        "| simulated |",
        "|--:|:--|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        cells = [str(row["load"]), row["policy"]]
        for figure in ("windows_s", "p50_s", "p95_s"):
            one = row[figure]
            cells += [f"{one['measured']:.2f}", f"{one['simulated']:.2f} ({one['off_percent']:+.0f} %)"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def sizing_table(parts: Sequence[Mapping[str, Any]]) -> str:
    """Markdown. parts: results of `sizing`."""
    lines = [
        "| jobs an hour | p95 wanted, s | nodes | | p50, s | p95, s | busy | node hours | cost of 1,000 films |",
        "|--:|--:|--:|:--|--:|--:|--:|--:|--:|",
    ]
    for part in parts:
        for name, day in part["days"].items():
            lines.append(
                f"| {part['demand']['jobs_per_hour']:,.0f} | {part['target_p95_s']:g} | {day['most_nodes']} | {name} "
                f"| {day['p50_s']:.1f} | {day['p95_s']:.1f} | {100 * day['utilisation']:.0f} % "
                f"| {day['node_hours']:,.0f} | {day['cost_per_1000_films']:.2f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    costs = parser.add_mutually_exclusive_group(required=True)
    costs.add_argument("--costs", type=Path, help="JSON of benchmarks/serve.py, also with --measure-only")
    costs.add_argument("--example", action="store_true", help="an example curve that nobody has measured")
    costs.add_argument("--check", nargs="?", type=Path, const="", help="compare with a record, or with a run made now")
    parser.add_argument("--out", type=Path, help="where the JSON is written")
    parser.add_argument("--jobs-per-hour", type=float, nargs="+", default=[10_000.0])
    parser.add_argument("--target-p95", type=float, default=60.0, help="seconds")
    parser.add_argument("--price", type=float, default=1.0, help="of an hour of a node, in any currency")
    parser.add_argument("--clip-s", type=float, nargs="+", default=[2.0, 4.0, 6.0], help="lengths of films")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--guided", type=float, default=0.0, help="share of jobs with guidance")
    parser.add_argument("--limit", type=int, default=8, help="rows in one evaluation")
    parser.add_argument("--slots", type=int, default=8, help="jobs at once for each node")
    parser.add_argument("--failures-per-day", type=float, default=0.5, help="of a node")
    parser.add_argument("--start-s", type=float, default=120.0, help="seconds until a new node works")
    given = parser.parse_args()
    found: Any
    if given.check is not None:
        found = check(json.loads(_record(given.check).read_text(encoding="utf-8")))
        text = check_table(found)
    else:
        policy = Policy(given.limit, slots=given.slots)
        fleet = Fleet(failures_per_day=given.failures_per_day, start_s=given.start_s)
        limit = given.limit
        measured = example_costs(limit) if given.example else costs_of(json.loads(given.costs.read_text()), limit)
        found = []
        for rate in given.jobs_per_hour:
            demand = Demand(rate, clip_s=tuple(given.clip_s), steps=given.steps, guided=given.guided)
            began = time.process_time()
            found.append(sizing(measured, policy, demand, fleet, given.target_p95, given.price))
            print(f"simulated in {time.process_time() - began:.0f} s of CPU time", file=sys.stderr)
        text = sizing_table(found)
    if given.out:
        given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(text)


def _record(given: Path) -> Path:
    if given.name:
        return given
    made = Path("serve.json").absolute()
    subprocess.run([sys.executable, str(Path(__file__).with_name("serve.py")), "--out", str(made)], check=True)
    return made


if __name__ == "__main__":
    main()
