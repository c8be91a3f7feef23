"""Runs of True, and correlation, compared with their definitions."""

from __future__ import annotations

import math
from itertools import groupby, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tccp.progress import duration_text
from tccp.sequences import correlation, true_runs


def test_true_runs_of_examples() -> None:
    assert true_runs(np.array([1, 1, 0, 0, 1, 0, 1], bool)) == [(0, 2), (4, 5), (6, 7)]
    assert true_runs(np.array([1, 1, 0, 0, 1, 0, 1], bool), max_gap=1) == [(0, 2), (4, 7)]
    assert true_runs(np.zeros(3, bool)) == [] and true_runs(np.ones(0, bool)) == []
    assert true_runs(np.ones(3, bool)) == [(0, 3)]


@given(st.lists(st.booleans(), max_size=60))
def test_true_runs_match_groupby(values: list[bool]) -> None:
    expected, start = [], 0
    for value, group in groupby(values):
        stop = start + len(list(group))
        expected += [(start, stop)] if value else []
        start = stop
    assert true_runs(np.array(values, bool)) == expected


@given(st.lists(st.booleans(), max_size=60), st.integers(0, 5))
def test_true_runs_join_only_across_short_gaps(values: list[bool], max_gap: int) -> None:
    runs = true_runs(np.array(values, bool), max_gap)
    inside = {i for start, stop in runs for i in range(start, stop)}
    assert {i for i, value in enumerate(values) if value} <= inside
    text = "".join("x" if value else "." for value in values)
    for start, stop in runs:
        assert text[start] == text[stop - 1] == "x"
        assert "." * (max_gap + 1) not in text[start:stop]
    for (_, stop), (start, _) in pairwise(runs):
        assert start - stop > max_gap


@given(st.integers(0, 10**6), st.integers(3, 200))
def test_correlation_matches_numpy(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(5, 2, (2, count))
    b += rng.normal() * a
    assert correlation(a, b) == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-12)
    holes = rng.random((2, count)) < 0.3
    known = ~holes.any(0)
    result = correlation(np.where(holes[0], np.nan, a), np.where(holes[1], np.inf, b))
    if known.sum() < 3:
        assert math.isnan(result)
    else:
        assert result == pytest.approx(np.corrcoef(a[known], b[known])[0, 1], abs=1e-12)


def test_correlation_is_undefined_without_variation_or_samples() -> None:
    rising = np.arange(5.0)
    assert correlation(rising, -rising) == pytest.approx(-1)
    assert correlation(rising, rising.astype(np.float32)) == pytest.approx(1)
    assert math.isnan(correlation(rising, np.ones(5))) and math.isnan(correlation(np.zeros(5), rising))
    assert math.isnan(correlation(rising[:2], rising[:2])) and math.isnan(correlation(rising[:0], rising[:0]))


def test_durations_are_given_in_the_unit_that_people_would_use() -> None:
    texts = {0: "0 s", 0.004: "0.004 s", 3.14: "3.1 s", 15: "15 s", 119: "119 s", 120: "2 min", 255: "4.2 min"}
    texts |= {7100: "118 min", 7200: "2 h", 12_345: "3.4 h", 3e6: "833 h"}
    assert {seconds: duration_text(seconds) for seconds in texts} == texts
