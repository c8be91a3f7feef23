"""Charts as inline SVG: frames by reason, histograms, time per step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from preprocessing.reasons import Group, explain
from preprocessing.report.formatting import escaped, number, percent
from preprocessing.report.record import Histogram, StepTime

_GROUPS: dict[Group, tuple[int, int]] = {"face": (26, 72), "speech": (268, 38), "cutting": (200, 62), "film": (215, 10)}
"""Hue and saturation of each group of reasons, in the order in which a bar shows them."""
_MOST_BARS = 40
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BASE = 320, 150, 8, 312, 16, 126


def reason_colours(counts: Mapping[str, int]) -> dict[str, str]:
    """A colour for every reason code: one hue per group, one shade per code.

    Codes are ordered by group, and within a group by count, largest first.
    """
    colours: dict[str, str] = {}
    for group, (hue, saturation) in _GROUPS.items():
        codes = sorted((c for c in counts if explain(c).group == group), key=lambda c: (-counts[c], c))
        for position, code in enumerate(codes):
            lightness = 40 + round(30 * position / max(len(codes) - 1, 3))
            colours[code] = f"hsl({hue} {saturation}% {lightness}%)"
    return colours


def share_bar(kept: int, left_out: Mapping[str, int]) -> str:
    """One bar of all frames: those in clips, then those left out, by reason."""
    colours = reason_colours(left_out)
    parts = [("in clips", kept, "var(--fill)")]
    parts += [(explain(code).title, left_out[code], colour) for code, colour in colours.items()]
    total, left = sum(count for _, count, _ in parts), 0.0
    elements = []
    for title, count, colour in parts:
        if not count:
            continue
        width = 100 * count / total
        label = f'<text x="8" y="29">{percent(count / total)}</text>' if width >= 7 else ""
        elements.append(
            f'<svg x="{left:.3f}%" width="{width:.3f}%" height="46"><title>{escaped(title)}: '
            f'{count:,} frames, {percent(count / total)}</title><rect width="100%" height="46" style="fill:{colour}" '
            f'stroke="var(--bg)" stroke-width="1"/>{label}</svg>'
        )
        left += width
    return f'<svg class="share" role="img" aria-label="Where the frames went">{"".join(elements)}</svg>'


def histogram(chart: Histogram) -> str:
    """Bars over the range of values that occur, with the median marked."""
    edges, counts = _trimmed(chart)
    most = max(*counts, 1)
    low, high = edges[0], edges[-1]

    def x(value: float) -> float:
        return _LEFT + (_RIGHT - _LEFT) * (value - low) / (high - low)

    elements = []
    for start, stop, count in zip(edges, edges[1:], counts, strict=False):
        height = (_BASE - _TOP) * count / most
        title = f"{number(start)} to {number(stop)} {chart.unit}: {count:,} clips"
        elements.append(
            f'<rect x="{x(start) + 0.5:.2f}" y="{_BASE - height:.2f}" width="{max(x(stop) - x(start) - 1, 0.5):.2f}" '
            f'height="{height:.2f}" style="fill:var(--bar)"><title>{escaped(title)}</title></rect>'
        )
    median = chart.quantile(0.5)
    assert median is not None, "a histogram needs at least one value"
    at = min(max(x(median), _LEFT), _RIGHT)
    elements.append(f'<path d="M{at:.2f} {_TOP - 4}V{_BASE}" style="stroke:var(--mark);stroke-width:2"/>')
    elements.append(f'<path d="M{_LEFT} {_BASE}H{_RIGHT}" style="stroke:var(--soft)"/>')
    for tick in _ticks(low, high):
        anchor = "start" if x(tick) < _LEFT + 8 else "end" if x(tick) > _RIGHT - 8 else "middle"
        elements.append(
            f'<path d="M{x(tick):.2f} {_BASE}v4" style="stroke:var(--soft)"/>'
            f'<text class="soft" x="{x(tick):.2f}" y="{_BASE + 18}" text-anchor="{anchor}">{number(tick)}</text>'
        )
    elements.append(f'<text class="soft" x="{_RIGHT}" y="11" text-anchor="end">{most:,}</text>')
    label = f"Histogram of {chart.name}, median {number(median)} {chart.unit}"
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escaped(label)}">{"".join(elements)}</svg>'


def _trimmed(chart: Histogram) -> tuple[list[float], list[int]]:
    """Edges and counts without the empty ends; neighbouring bins are merged to at most _MOST_BARS."""
    filled = [i for i, count in enumerate(chart.counts) if count] or [0, len(chart.counts) - 1]
    first, stop = max(filled[0] - 1, 0), min(filled[-1] + 2, len(chart.counts))
    step = math.ceil((stop - first) / _MOST_BARS)
    starts = range(first, stop, step)
    counts = [sum(chart.counts[start : min(start + step, stop)]) for start in starts]
    return [*(chart.edges[start] for start in starts), chart.edges[stop]], counts


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers between low and high."""
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.99)
    first = math.ceil(low / step - 1e-9)
    return [round(step * multiple, 10) for multiple in range(first, math.floor(high / step + 1e-9) + 1)]


def step_bars(steps: Sequence[StepTime]) -> str:
    """Table rows with the time of each step, longest first."""
    total = sum(step.seconds for step in steps) or 1.0
    rows = []
    for step in sorted(steps, key=lambda step: (-step.seconds, step.name)):
        share = step.seconds / total
        speed = f"{step.frames / step.seconds:,.0f}" if step.seconds > 0 and step.frames else "–"
        rows.append(
            f'<tr><td data-label="Step">{escaped(step.name)}</td>'
            f'<td data-label="Time" class="n">{step.seconds:,.1f} s</td>'
            f'<td data-label="Share"><span>{percent(share)}<span class="meter"><i style="width:{100 * share:.1f}%;'
            f'background:var(--bar)"></i></span></span></td>'
            f'<td data-label="Items" class="n">{step.items:,}</td>'
            f'<td data-label="Frames" class="n">{step.frames:,}</td>'
            f'<td data-label="Frames/s" class="n">{speed}</td></tr>'
        )
    return "".join(rows)
