"""Cost estimates from a sample: exact for measured films, wide ranges for small samples, deterministic."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from preprocessing.report.estimate import Estimate, Range, SampleResult, SourceSize, choose_sample, estimate
from tccp.errors import TccpError


def film(name: str, film_s: float, rate: float = 1.0, bytes_per_s: int = 1000) -> SampleResult:
    """A film with half its length in clips; each second costs 2 `rate` CPU seconds and 1.5 `rate` wall seconds."""
    return SampleResult(
        source=name,
        file_bytes=round(film_s * bytes_per_s),
        film_s=film_s,
        clip_s=film_s / 2,
        bytes_written=round(film_s * 500),
        cpu_s={"look": 1.5 * film_s * rate, "render": 0.5 * film_s * rate},
        wall_s=1.5 * film_s * rate,
    )


def listed(films: Sequence[SampleResult], probed: bool = False) -> list[SourceSize]:
    return [SourceSize(item.source, item.file_bytes, item.film_s if probed else None) for item in films]


def bounds(value: Range) -> list[float]:
    assert value.low is not None and value.high is not None
    return [value.low, value.estimate, value.high]


def population(count: int, seed: int) -> list[SampleResult]:
    """Films with the spread of lengths, bit rates and costs of a mixed collection."""
    rng = np.random.default_rng(seed)
    return [
        film(str(i), float(np.exp(rng.normal(5, 1))), float(np.exp(rng.normal(0, 0.5))), int(rng.integers(500, 4000)))
        for i in range(count)
    ]


def test_uniform_films_scale_linearly() -> None:
    films = [film(f"{i}.mp4", 60.0 * (1 + i % 3)) for i in range(60)]  # two hours of film
    result = estimate(films[:9], listed(films), workers=4, price_per_cpu_hour=0.5)
    assert result.film_h.estimate == pytest.approx(2)
    assert result.clip_h.estimate == pytest.approx(1)
    assert result.storage_bytes.estimate == pytest.approx(7200 * 500)
    assert result.cpu_h.estimate == pytest.approx(4)
    assert {step: hours.estimate for step, hours in result.cpu_h_by_step.items()} == pytest.approx(
        {"look": 3, "render": 1}
    )
    assert result.wall_h.estimate == pytest.approx(3 / 4)
    assert result.cost is not None and result.cost.estimate == pytest.approx(2)
    assert bounds(result.cpu_h) == pytest.approx([4] * 3)
    assert (result.sampled, result.sources, result.notes) == (9, 60, [])


def test_fully_measured_collection_has_zero_width_ranges() -> None:
    films = population(5, seed=0)
    result = estimate(films, listed(films), workers=1)
    total = sum(item.film_s for item in films) / 3600
    assert bounds(result.film_h) == pytest.approx([total] * 3)
    assert result.cpu_h.low == result.cpu_h.estimate == result.cpu_h.high and result.cost is None


def test_known_lengths_are_used_instead_of_file_sizes() -> None:
    films = [film("a", 60.0, bytes_per_s=10), film("b", 60.0, bytes_per_s=1000), film("c", 600.0, bytes_per_s=1)]
    known = estimate(films[:2], listed(films, probed=True), workers=1).film_h
    assert bounds(known) == pytest.approx([0.2] * 3)
    guessed = estimate(films[:2], listed(films), workers=1).film_h
    low, middle, high = bounds(guessed)
    assert low < middle < high


def test_ranges_contain_the_truth_at_about_the_stated_rate() -> None:
    films = population(200, seed=1)
    listing = listed(films)
    truth = sum(sum(item.cpu_s.values()) for item in films) / 3600
    for count in (3, 12):
        held, widths = [], []
        for seed in range(60):
            chosen = [films[int(item.source)] for item in choose_sample(listing, count, seed)]
            result = estimate(chosen, listing, workers=1).cpu_h
            low, middle, high = bounds(result)
            held.append(low <= truth <= high)
            widths.append(high / middle - 1)
        assert 0.65 < np.mean(held) < 0.95, count
        assert np.median(widths) < (4 if count == 3 else 0.8)  # narrow enough to be useful


def test_tiny_samples_give_a_note_and_open_or_wide_ranges() -> None:
    films = population(50, seed=2)
    one = estimate(films[:1], listed(films), workers=1)
    assert (one.cpu_h.low, one.cpu_h.high) == (None, None) and "One film was measured" in one.notes[0]
    assert "unknown" in one.to_text()
    few = estimate(films[:2], listed(films), workers=1)
    assert "Only 2 films" in few.notes[0]
    assert bounds(few.cpu_h)[0] >= sum(sum(item.cpu_s.values()) for item in films[:2]) / 3600  # already measured


def test_unusable_films_cost_time_and_give_no_clips() -> None:
    bad = SampleResult("bad.mp4", 1000, 0.0, 0.0, 0, {"look": 36.0}, 36.0)
    films = [bad, *[film(f"{i}", 100.0) for i in range(3)]]
    result = estimate([bad], [*listed(films), SourceSize("x.mp4", 1000)], workers=1)
    assert result.film_h.estimate == result.clip_h.estimate == 0
    assert result.cpu_h.estimate == pytest.approx((1 + 300 + 1) * 36 / 3600)  # scaled by bytes: the length is unknown
    assert "No film of the sample gave a clip" in result.notes[1]
    mixed = estimate(films[:3], [*listed(films), SourceSize("web.mp4", None)], workers=1)
    assert mixed.film_h.estimate > 0 and np.all(np.isfinite(bounds(mixed.cpu_h)))
    assert "1 films have an unknown size" in mixed.notes[-1]


def test_estimate_as_json_and_as_a_text_table() -> None:
    films = population(30, seed=3)
    result = estimate(films[:10], listed(films), workers=2, price_per_cpu_hour=0.04)
    again = json.loads(result.to_json())
    ranges = {key: Range(**again[key]) for key in ("film_h", "clip_h", "storage_bytes", "cpu_h", "wall_h", "cost")}
    by_step = {step: Range(**value) for step, value in again["cpu_h_by_step"].items()}
    assert Estimate(**again | ranges | {"cpu_h_by_step": by_step}) == result
    assert estimate(films[:10], listed(films), workers=2, price_per_cpu_hour=0.04).to_json() == result.to_json()
    lines = result.to_text().splitlines()
    assert len({len(line) for line in lines}) == 1 and "80% range" in lines[0]
    assert [line.split("  ")[0].strip() for line in lines[1:4]] == ["film in", "clips out", "storage, GB"]
    assert "wall-clock time, 2 workers" in result.to_text() and lines[-1].startswith("cost")


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=40), st.integers(1, 50), st.integers(0, 5), st.randoms())
def test_sample_spans_all_sizes_and_ignores_listing_order(
    sizes: list[int], count: int, seed: int, random: object
) -> None:
    listing = [SourceSize(f"{i}.mp4", size) for i, size in enumerate(sizes)]
    chosen = choose_sample(listing, count, seed)
    assert len({item.source for item in chosen}) == min(count, len(listing))
    shuffled = list(listing)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert choose_sample(shuffled, count, seed) == chosen
    by_size = sorted(listing, key=lambda item: (item.file_bytes, item.source))
    place = {item.source: i for i, item in enumerate(by_size)}
    for i, item in enumerate(chosen):
        assert i * len(by_size) // len(chosen) <= place[item.source] < (i + 1) * len(by_size) // len(chosen)


def test_invalid_arguments_are_refused() -> None:
    films = [film("a", 60.0)]
    with pytest.raises(TccpError, match="a sample of 0 films is too small: give at least 1"):
        choose_sample(listed(films), 0)
    with pytest.raises(TccpError, match="at least one measured film"):
        estimate([], listed(films), workers=1)
    with pytest.raises(TccpError, match="workers 0: give at least 1"):
        estimate(films, listed(films), workers=0)
    assert choose_sample([], 3) == []
