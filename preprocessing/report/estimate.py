"""What a run would take and give, from a sample of its films: film and clips, storage, time and cost, with ranges."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from jaxtyping import Float64
from scipy.special import ndtri, stdtrit

from tccp.errors import TccpError

COVERAGE = 0.8
"""Share of all samples whose ranges hold the truth, as far as films vary like those of the sample."""
_DRAWS = 1000
_FEW = 8  # fewer films than this, and a reader is warned


@dataclass(frozen=True)
class SampleResult:
    """What one film took and gave, measured. A film that could not be used has film_s and clip_s 0.

    wall_s: with one worker that did nothing else. cpu_s: seconds of processor time by step.
    """

    source: str
    file_bytes: int
    film_s: float
    clip_s: float
    bytes_written: int
    cpu_s: Mapping[str, float]
    wall_s: float


@dataclass(frozen=True)
class SourceSize:
    """One film of the run. file_bytes: None if its address does not tell. film_s: None if it was not probed."""

    source: str
    file_bytes: int | None
    film_s: float | None = None


@dataclass(frozen=True)
class Range:
    """low, high: None where the sample cannot say, being of one film."""

    estimate: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Estimate:
    """sampled, sources: number of films. wall_h: with `workers` that are always busy. cost: None without a price."""

    sampled: int
    sources: int
    workers: int
    coverage: float
    film_h: Range
    clip_h: Range
    storage_bytes: Range
    cpu_h: Range
    cpu_h_by_step: dict[str, Range]
    wall_h: Range
    cost: Range | None
    notes: list[str]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    def to_text(self) -> str:
        """A table for people, and what to keep in mind."""
        rows = [
            ("film in, hours", self.film_h, 1.0),
            ("clips out, hours", self.clip_h, 1.0),
            ("storage, GB", self.storage_bytes, 1e9),
            ("CPU hours", self.cpu_h, 1.0),
            *((f"  {step}", hours, 1.0) for step, hours in self.cpu_h_by_step.items()),
            (f"wall-clock hours, {self.workers} worker{'s' * (self.workers != 1)}", self.wall_h, 1.0),
        ]
        if self.cost is not None:
            rows.append(("cost", self.cost, 1.0))
        width = max(len(name) for name, _, _ in rows)
        lines = [f"{'':{width}}  {'estimate':>10}  {f'{self.coverage:.0%} range':>23}"]
        for name, value, unit in rows:
            low, high = (None if bound is None else bound / unit for bound in (value.low, value.high))
            between = "unknown" if low is None or high is None else f"{_figure(low)} to {_figure(high)}"
            lines.append(f"{name:{width}}  {_figure(value.estimate / unit):>10}  {between:>23}")
        return "\n".join([*lines, *self.notes])


def _figure(value: float) -> str:
    """Three significant digits: more would promise too much."""
    places = 2 if value == 0 else min(max(2 - math.floor(math.log10(value)), 0), 6)
    return f"{float(f'{value:.3g}'):,.{places}f}"


def choose_sample(listing: Sequence[SourceSize], count: int, seed: int = 0) -> list[SourceSize]:
    """`count` films, one at random from each of as many groups of about equal number and like file size.

    The same for the same films in whatever order. All of them if there are no more. Raises TccpError below one.
    """
    if count < 1:
        raise TccpError(f"a sample of {count} films says nothing; give at least 1")
    by_size = sorted(listing, key=lambda item: (item.file_bytes or 0, item.source))
    rng = np.random.default_rng(seed)
    total, groups = len(by_size), min(count, len(by_size))
    return [by_size[rng.integers(i * total // groups, (i + 1) * total // groups)] for i in range(groups)]


def estimate(
    sample: Sequence[SampleResult],
    listing: Sequence[SourceSize],
    workers: int,
    price_per_cpu_hour: float | None = None,
) -> Estimate:
    """The whole listing, from a sample of it: what was measured, and for the other films their share by length.

    A film that was not probed is taken to have as many seconds per byte as the sample had. Ranges come from drawing the
    sample anew (bootstrap, fixed seed); they shrink to nothing when all of the listing was measured. wall_h supposes as
    many cores for each worker as the sample had. cost: CPU hours by their price.
    Raises TccpError without a sample, or for fewer than one worker.
    """
    if not sample:
        raise TccpError("an estimate needs at least one film that was measured")
    if workers < 1:
        raise TccpError(f"{workers} workers do nothing; give at least 1")
    steps = list(dict.fromkeys(step for item in sample for step in item.cpu_s))
    figures = np.stack([_figures(item, steps) for item in sample])
    listed = {item.source for item in listing}
    measured = {item.source for item in sample}
    rest = [item for item in listing if item.source not in measured]
    done = figures[[item.source in listed for item in sample]].sum(0)

    count = len(sample)
    again = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), _DRAWS).astype(np.float64)
    totals = done + _of_rest(figures, np.ones((1, count)), rest)[0]
    low, high = np.quantile(done + _of_rest(figures, again, rest), [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2], axis=0)
    wider = _widening(count, len(rest))
    low = np.maximum(totals - wider * np.maximum(totals - low, 0), done)
    high = totals + wider * np.maximum(high - totals, 0)
    high[_CLIP] = min(high[_CLIP], high[_FILM])

    def ranged(column: int, per: float) -> Range:
        unknown = count == 1 and bool(rest)
        bounds = (None, None) if unknown else (float(low[column] / per), float(high[column] / per))
        return Range(float(totals[column] / per), *bounds)

    return Estimate(
        sampled=count,
        sources=len(listed),
        workers=workers,
        coverage=COVERAGE,
        film_h=ranged(_FILM, 3600.0),
        clip_h=ranged(_CLIP, 3600.0),
        storage_bytes=ranged(_STORED, 1.0),
        cpu_h=ranged(_CPU, 3600.0),
        cpu_h_by_step={step: ranged(_CPU + 1 + i, 3600.0) for i, step in enumerate(steps)},
        wall_h=ranged(_WALL, 3600.0 * workers),
        cost=None if price_per_cpu_hour is None else _times(ranged(_CPU, 3600.0), price_per_cpu_hour),
        notes=_notes(sample, rest),
    )


_BYTES, _FILM, _CLIP, _STORED, _WALL, _CPU = range(6)  # columns of the figures; those after _CPU are its steps


def _figures(item: SampleResult, steps: Sequence[str]) -> Float64[np.ndarray, " k"]:
    cpu_s = [item.cpu_s.get(step, 0.0) for step in steps]
    values = [item.file_bytes, item.film_s, item.clip_s, item.bytes_written, item.wall_s, sum(cpu_s), *cpu_s]
    return np.array(values, np.float64)


def _of_rest(
    figures: Float64[np.ndarray, "n k"], draws: Float64[np.ndarray, "d n"], rest: Sequence[SourceSize]
) -> Float64[np.ndarray, "d k"]:
    """What the films that were not measured come to, for each draw; draws: how often each film of the sample counts."""
    sums = draws @ figures
    told = [item.file_bytes for item in rest if item.file_bytes is not None]
    usual = np.mean(told) if told else figures[:, _BYTES].mean()  # for films that do not tell their size
    sizes = np.array([usual if item.file_bytes is None else item.file_bytes for item in rest], np.float64)
    probed = np.array([item.film_s is not None for item in rest], bool)
    film_per_byte = sums[:, _FILM] / np.maximum(sums[:, _BYTES], 1)
    film = sum(item.film_s or 0 for item in rest) + sizes[~probed].sum() * film_per_byte
    # A draw of unusable films only takes its time by bytes: it has no length to go by.
    by_length = film / np.where(sums[:, _FILM] > 0, sums[:, _FILM], 1)
    by_bytes = sizes.sum() / np.maximum(sums[:, _BYTES], 1)
    totals = sums * np.where(sums[:, _FILM] > 0, by_length, by_bytes)[:, None]
    totals[:, _FILM] = film
    return totals


def _widening(sampled: int, rest: int) -> float:
    """By how much a bootstrap's range is too narrow for few films, and for foretelling few.

    It lacks sqrt(n / (n - 1)) and the ratio of Student's to the normal quantile; and a sum over m films varies by
    itself, as 1 + n / m to 1 of the variance that not knowing the mean gives it.
    """
    if sampled < 2 or rest == 0:
        return 1.0
    quantile = (1 + COVERAGE) / 2
    student = stdtrit(sampled - 1, quantile) / ndtri(quantile)
    return float(student * np.sqrt(sampled / (sampled - 1) * (1 + sampled / rest)))


def _times(value: Range, factor: float) -> Range:
    low, high = (None if bound is None else bound * factor for bound in (value.low, value.high))
    return Range(value.estimate * factor, low, high)


def _notes(sample: Sequence[SampleResult], rest: Sequence[SourceSize]) -> list[str]:
    notes = []
    if rest and len(sample) == 1:
        notes.append("One film was measured: how much films differ is unknown.")
    elif rest and len(sample) < _FEW:
        notes.append(f"Only {len(sample)} films were measured: the ranges are rough, and rare kinds of film unseen.")
    if not any(item.clip_s for item in sample):
        notes.append("No film of the sample gave a clip; films that do take longer and more storage than said here.")
    if untold := sum(item.file_bytes is None and item.film_s is None for item in rest):
        notes.append(f"{untold} films do not tell their size: they count as the mean of the others.")
    return notes
