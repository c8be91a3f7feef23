"""Estimates the results of a run from a sample of its films: film, clips, storage, time and cost, with ranges."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from jaxtyping import Float64
from scipy.special import ndtri, stdtrit

from tccp.errors import TccpError
from tccp.progress import duration_text

COVERAGE = 0.8
"""Share of samples whose range contains the true value, if all films vary like those of the sample."""
_RESAMPLES = 1000
_FEW_FILMS = 8  # below it, a note warns that the ranges are rough


@dataclass(frozen=True)
class SampleResult:
    """Measurements of one film. A film that could not be used has film_s and clip_s 0.

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
    """One film of the run. file_bytes: None if its server does not state it. film_s: None if it was not probed."""

    source: str
    file_bytes: int | None
    film_s: float | None = None


@dataclass(frozen=True)
class Range:
    """An estimate with its range. low, high: None if the sample has one film only."""

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
        """A table for the terminal, with notes below it."""
        rows: list[tuple[str, Range, Callable[[float], str]]] = [
            ("film in", self.film_h, _hours),
            ("clips out", self.clip_h, _hours),
            ("storage, GB", self.storage_bytes, lambda value: _figure(value / 1e9)),
            ("CPU time", self.cpu_h, _hours),
            *((f"  {step}", hours, _hours) for step, hours in self.cpu_h_by_step.items()),
            (f"wall-clock time, {self.workers} worker{'s' * (self.workers != 1)}", self.wall_h, _hours),
        ]
        if self.cost is not None:
            rows.append(("cost", self.cost, _figure))
        width = max(len(name) for name, _, _ in rows)
        lines = [f"{'':{width}}  {'estimate':>10}  {f'{self.coverage:.0%} range':>23}"]
        for name, value, text in rows:
            known = value.low is not None and value.high is not None
            between = f"{text(value.low)} to {text(value.high)}" if known else "unknown"  # type: ignore[arg-type]
            lines.append(f"{name:{width}}  {text(value.estimate):>10}  {between:>23}")
        return "\n".join([*lines, *self.notes])


def _hours(value: float) -> str:
    return duration_text(value * 3600)


def _figure(value: float) -> str:
    """A number with three significant digits, which is about as precise as the estimates are."""
    decimals = 2 if value == 0 else min(max(2 - math.floor(math.log10(value)), 0), 6)
    return f"{float(f'{value:.3g}'):,.{decimals}f}"


def choose_sample(listing: Sequence[SourceSize], count: int, seed: int = 0) -> list[SourceSize]:
    """`count` films: one at random from each of `count` equally large groups of films of similar file size.

    The choice does not depend on the order of the listing. If there are at most `count` films, all are chosen.
    Raises TccpError if count is below 1.
    """
    if count < 1:
        raise TccpError(f"a sample of {count} films is too small: give at least 1")
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
    """Totals for the whole listing: the measured films, plus the others in proportion to their length.

    A film that was not probed is assumed to have as many seconds per byte as the sample. Ranges come from a bootstrap
    with a fixed seed; they have zero width if the whole listing was measured. wall_h assumes that each worker has as
    many cores as the sample had. cost: CPU hours times their price.
    Raises TccpError if the sample is empty, or for fewer than one worker.
    """
    if not sample:
        raise TccpError("the sample is empty: an estimate needs at least one measured film")
    if workers < 1:
        raise TccpError(f"workers {workers}: give at least 1")
    steps = list(dict.fromkeys(step for item in sample for step in item.cpu_s))
    figures = np.stack([_figures(item, steps) for item in sample])
    listed = {item.source for item in listing}
    measured = {item.source for item in sample}
    rest = [item for item in listing if item.source not in measured]
    done = figures[[item.source in listed for item in sample]].sum(0)

    count = len(sample)
    resamples = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), _RESAMPLES).astype(np.float64)
    totals = done + _extrapolated(figures, np.ones((1, count)), rest)[0]
    low, high = np.quantile(
        done + _extrapolated(figures, resamples, rest), [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2], axis=0
    )
    factor = _range_factor(count, len(rest))
    low = np.maximum(totals - factor * np.maximum(totals - low, 0), done)
    high = totals + factor * np.maximum(high - totals, 0)
    high[_CLIP] = min(high[_CLIP], high[_FILM])

    def range_of(column: int, per: float) -> Range:
        unknown = count == 1 and bool(rest)
        bounds = (None, None) if unknown else (float(low[column] / per), float(high[column] / per))
        return Range(float(totals[column] / per), *bounds)

    return Estimate(
        sampled=count,
        sources=len(listed),
        workers=workers,
        coverage=COVERAGE,
        film_h=range_of(_FILM, 3600.0),
        clip_h=range_of(_CLIP, 3600.0),
        storage_bytes=range_of(_STORED, 1.0),
        cpu_h=range_of(_CPU, 3600.0),
        cpu_h_by_step={step: range_of(_CPU + 1 + i, 3600.0) for i, step in enumerate(steps)},
        wall_h=range_of(_WALL, 3600.0 * workers),
        cost=None if price_per_cpu_hour is None else _times(range_of(_CPU, 3600.0), price_per_cpu_hour),
        notes=_notes(sample, rest),
    )


_BYTES, _FILM, _CLIP, _STORED, _WALL, _CPU = range(6)  # columns of the figures; the columns after _CPU are the steps


def _figures(item: SampleResult, steps: Sequence[str]) -> Float64[np.ndarray, " k"]:
    cpu_s = [item.cpu_s.get(step, 0.0) for step in steps]
    values = [item.file_bytes, item.film_s, item.clip_s, item.bytes_written, item.wall_s, sum(cpu_s), *cpu_s]
    return np.array(values, np.float64)


def _extrapolated(
    figures: Float64[np.ndarray, "n k"], resamples: Float64[np.ndarray, "r n"], rest: Sequence[SourceSize]
) -> Float64[np.ndarray, "r k"]:
    """Totals of the films that were not measured, for each resample.

    resamples: how often each of the n films of the sample counts.
    """
    sums = resamples @ figures
    known_sizes = [item.file_bytes for item in rest if item.file_bytes is not None]
    usual = np.mean(known_sizes) if known_sizes else figures[:, _BYTES].mean()  # for films of unknown size
    sizes = np.array([usual if item.file_bytes is None else item.file_bytes for item in rest], np.float64)
    probed = np.array([item.film_s is not None for item in rest], bool)
    film_per_byte = sums[:, _FILM] / np.maximum(sums[:, _BYTES], 1)
    film = sum(item.film_s or 0 for item in rest) + sizes[~probed].sum() * film_per_byte
    # A resample of unusable films only has no length: its time is scaled by bytes.
    by_length = film / np.where(sums[:, _FILM] > 0, sums[:, _FILM], 1)
    by_bytes = sizes.sum() / np.maximum(sums[:, _BYTES], 1)
    totals = sums * np.where(sums[:, _FILM] > 0, by_length, by_bytes)[:, None]
    totals[:, _FILM] = film
    return totals


def _range_factor(sampled: int, rest: int) -> float:
    """Factor by which a bootstrap's range is widened, for a sample of n films and a rest of m films.

    For small n, the bootstrap lacks the factor sqrt(n / (n - 1)) and the ratio of Student's quantile to the normal one.
    It also lacks the variance of the m films themselves, which multiplies the variance by 1 + n / m.
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
    elif rest and len(sample) < _FEW_FILMS:
        notes.append(
            f"Only {len(sample)} films were measured: the ranges are rough, and rare kinds of film may be missing."
        )
    if not any(item.clip_s for item in sample):
        notes.append(
            "No film of the sample gave a clip; films that give clips take more time and storage than estimated here."
        )
    if unknown := sum(item.file_bytes is None and item.film_s is None for item in rest):
        notes.append(f"{unknown} films have an unknown size: the mean of the others is used for them.")
    return notes
