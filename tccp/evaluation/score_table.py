"""Aggregates figures per clip into the table: means with intervals, differences between rows, and targets.

A row of the table is a method of `tccp.evaluation.methods`, a baseline of `tccp.evaluation.predictors`, or the truth.
The output is JSON or text.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Integer
from rich.console import Console
from rich.table import Table

RESAMPLES, POOLED_RESAMPLES = 1000, 100
"""Numbers of bootstrap resamples over clips: for means, and for pooled figures, which are slower to compute."""
_SEED = 0
OURS = "two_stage_generated"
COMPARED = ("one_stage", "per_frame", "no_lip", "context_blind", "mask_body", "audio_shuffled", "two_stage_truth")
"""Rows that `differences` compares with OURS."""

ROW_NAMES = (
    "truth", "reconstruction", "two_stage_truth", "two_stage_generated", "no_lip", "one_stage", "per_frame",
    "context_blind", "mask_only", "mask_body", "audio_shuffled", "mean",
)  # fmt: skip
FIGURE_NAMES = (
    "mouth_corr_landmarks", "mouth_corr_face", "width_corr_landmarks", "amplitude_ratio", "lag_frames", "silent_motion",
    "wrong_clip_corr", "yaw_mae_deg_landmarks", "yaw_mae_deg_face", "side_accuracy", "listener_slope", "landmark_nme",
    "identity_top1", "frechet", "psnr", "ssim", "seam", "consistency_gap", "flicker_gap", "drift_10", "drift_50",
    "width_corr_face", "amplitude_ratio_face", "lag_frames_face", "silent_motion_face", "wrong_clip_corr_face",
    "side_accuracy_face", "listener_slope_face", "nod_stress_corr", "head_motion_ratio", "head_motion_ratio_face",
    "blink_rate_gap", "unread_landmarks",
    *(f"drift_{k}{of}" for k in (10, 50) for of in ("_corr", "_corr_face", "_yaw_deg", "_yaw_deg_face", "_colour")),
)  # fmt: skip
"""Figures of the record, in its order. A figure that is undefined for a row is null."""

Samples = Mapping[str, Mapping[str, Float[np.ndarray, " n"]]]
"""Row -> figure -> one value per clip, NaN where undefined. All rows have the same clips in the same order."""
PooledSamples = Mapping[str, Mapping[str, "Pooled"]]
"""Row -> figure computed over all clips together."""
Cell = dict[str, float | None]
"""mean, and the low and high ends of its 95% interval (null if only one clip has a value)."""


def resamples(count: int, times: int) -> Integer[np.ndarray, "times count"]:
    """Indices of clips sampled with replacement. All rows and figures get the same samples, which pairs differences."""
    return np.random.default_rng(_SEED).integers(count, size=(times, count))


def _number(value: float) -> float:
    return float(f"{value:.5g}") if abs(value) > 1e-9 else 0.0


def _cell(mean: float, low: float, high: float) -> Cell | None:
    if not math.isfinite(mean):
        return None
    known = math.isfinite(low) and math.isfinite(high)
    return {"mean": _number(mean), "low": _number(low) if known else None, "high": _number(high) if known else None}


def interval(values: Float[np.ndarray, " n"]) -> Cell | None:
    """Mean over the finite values, with its 95% percentile bootstrap interval; None without a finite value."""
    values = values[np.isfinite(values)]
    if len(values) == 0:
        return None
    if len(values) == 1:
        return _cell(float(values[0]), math.nan, math.nan)
    means = values[resamples(len(values), RESAMPLES)].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return _cell(float(values.mean()), float(low), float(high))


@dataclass(frozen=True)
class Pooled:
    """A figure computed over all clips together, and over each bootstrap resample."""

    value: float
    resampled: Float[np.ndarray, " times"]

    @classmethod
    def of(cls, count: int, statistic: Callable[[Integer[np.ndarray, " n"]], float]) -> Pooled:
        """statistic: computes the figure over the clips with these indices, 0..count - 1."""
        samples = resamples(count, POOLED_RESAMPLES if count > 1 else 0)
        return cls(statistic(np.arange(count)), np.array([statistic(clips) for clips in samples], np.float64))

    def cell(self, minus: Pooled | None = None) -> Cell | None:
        """The value, or its difference from `minus`, with an interval of 1.96 bootstrap standard errors on either side.

        Percentiles would be biased: a resample repeats clips, which alone shifts such figures.
        """
        value = self.value - (minus.value if minus else 0)
        resampled = self.resampled - (minus.resampled if minus else 0)
        resampled = resampled[np.isfinite(resampled)]
        half_width = 1.96 * float(resampled.std()) if len(resampled) > 1 else math.nan
        return _cell(value, value - half_width, value + half_width)


def summarise(samples: Samples, pooled: PooledSamples) -> dict[str, dict[str, Cell | None]]:
    """rows[NAME][FIGURE] for all rows and figures; None where there is no value."""
    rows: dict[str, dict[str, Cell | None]] = {}
    for row in ROW_NAMES:
        cells: dict[str, Cell | None] = dict.fromkeys(FIGURE_NAMES)
        cells |= {name: interval(values) for name, values in samples.get(row, {}).items()}
        cells |= {name: figure.cell() for name, figure in pooled.get(row, {}).items()}
        rows[row] = cells
    return rows


def compare(samples: Samples, pooled: PooledSamples) -> dict[str, dict[str, Cell]]:
    """differences["two_stage_generated - NAME"][FIGURE], paired over clips, for every figure that both rows have."""
    differences: dict[str, dict[str, Cell]] = {}
    for other in COMPARED:
        if not {OURS, other} <= samples.keys():
            continue
        ours, theirs = samples[OURS], samples[other]
        cells = {name: interval(ours[name] - theirs[name]) for name in ours.keys() & theirs.keys()}
        all_ours, all_theirs = pooled.get(OURS, {}), pooled.get(other, {})
        cells |= {name: all_ours[name].cell(all_theirs[name]) for name in all_ours.keys() & all_theirs.keys()}
        defined = {name: cell for name, cell in cells.items() if cell is not None}
        differences[f"{OURS} - {other}"] = {name: defined[name] for name in FIGURE_NAMES if name in defined}
    return differences


@dataclass(frozen=True)
class Target:
    """A value that two_stage_generated should reach.

    kind: `at least`, `at most` and `within` (absolute value) test the mean. `surely within` tests both ends of the
    interval, for figures whose mean can be near 0 by chance. `below` tests that the interval of the difference from
    the row `bound` is below 0.
    """

    figure: str
    kind: Literal["at least", "at most", "within", "surely within", "below"]
    bound: float | str

    def record(self, rows: Mapping[str, Any], differences: Mapping[str, Any]) -> dict[str, Any]:
        """The target's entry in the record. found: the mean; for `below`, the difference. met: None if not measured."""
        name = f"{self.figure} {self.kind} {self.bound}"
        if isinstance(self.bound, str):
            cell = differences.get(f"{OURS} - {self.bound}", {}).get(self.figure)
            found = None if cell is None else cell["mean"]
            met = None if cell is None or cell["high"] is None else cell["high"] < 0
            return {"target": name, "found": found, "met": met}
        cell = rows[OURS][self.figure]
        if cell is None:
            return {"target": name, "found": None, "met": None}
        met = {
            "at least": cell["mean"] >= self.bound,
            "at most": cell["mean"] <= self.bound,
            "within": abs(cell["mean"]) <= self.bound,
            "surely within": max(abs(end) for end in cell.values() if end is not None) <= self.bound,
        }[self.kind]
        return {"target": name, "found": cell["mean"], "met": met}


TARGETS = (
    Target("mouth_corr_landmarks", "at least", 0.95),
    Target("mouth_corr_face", "at least", 0.85),
    Target("wrong_clip_corr", "within", 0.1),
    Target("lag_frames", "surely within", 0.5),
    Target("yaw_mae_deg_landmarks", "at most", 8.0),
    Target("yaw_mae_deg_landmarks", "below", "mask_body"),
    Target("yaw_mae_deg_landmarks", "below", "context_blind"),
    Target("listener_slope", "at least", 0.7),
    Target("identity_top1", "at least", 0.95),
    Target("drift_10_corr", "at most", 0.05),
    Target("drift_10_yaw_deg", "at most", 1.5),
    Target("drift_10", "at most", 1.0),
    Target("drift_10_colour", "at most", 2.0),
)


# -- as text ----------------------------------------------------------------------------------------------------------

_TABLES: dict[str, dict[str, str]] = {
    "sync": {
        "mouth_corr_landmarks": "mouth, landmarks",
        "mouth_corr_face": "mouth, face",
        "width_corr_landmarks": "width, landmarks",
        "amplitude_ratio": "amplitude",
        "lag_frames": "lag, frames",
        "silent_motion": "motion in silence",
        "wrong_clip_corr": "wrong clip",
    },
    "coherence": {
        "yaw_mae_deg_landmarks": "yaw error, landmarks, deg",
        "yaw_mae_deg_face": "yaw error, face, deg",
        "side_accuracy": "right side",
        "listener_slope": "listener slope",
        "nod_stress_corr": "nod with stress",
        "head_motion_ratio": "head motion",
        "blink_rate_gap": "blinks, gap per s",
    },
    "fidelity": {
        "landmark_nme": "landmark error",
        "identity_top1": "right person of 16",
        "frechet": "Frechet",
        "psnr": "PSNR, dB",
        "ssim": "SSIM",
        "seam": "seam",
        "consistency_gap": "consistency gap",
        "flicker_gap": "flicker gap",
    },
    "drift": {
        "drift_10": "PSNR lost by 10, dB",
        "drift_10_corr": "mouth lost by 10",
        "drift_10_yaw_deg": "yaw lost by 10, deg",
        "drift_10_colour": "colour by 10, %",
        "drift_50": "PSNR lost by 50, dB",
        "drift_50_corr": "mouth lost by 50",
        "drift_50_yaw_deg": "yaw lost by 50, deg",
        "drift_50_colour": "colour by 50, %",
    },
}


def _text(cell: Cell | None) -> str:
    if cell is None or cell["mean"] is None:
        return ""
    mean = f"{cell['mean']:.3g}"
    if cell["low"] is None or cell["high"] is None:
        return mean
    return f"{mean} ± {(cell['high'] - cell['low']) / 2:.2g}"


def _lines(record: Mapping[str, Any], columns: Sequence[str]) -> list[list[str]]:
    """One line of cells per row; rows without a value in any of the columns are left out."""
    lines = [[row, *(_text(record["rows"][row][column]) for column in columns)] for row in record["rows"]]
    return [line for line in lines if any(line[1:])]


def _targets_line(record: Mapping[str, Any]) -> str:
    targets = record["targets"]
    missed = [f"{item['target']} (is {item['found']})" for item in targets if item["met"] is False]
    unknown = [item["target"] for item in targets if item["met"] is None]
    met = sum(item["met"] is True for item in targets)
    parts = [f"targets: {met} of {len(targets)} met"]
    parts += [f"not met: {'; '.join(missed)}"] if missed else []
    parts += [f"not measured: {'; '.join(unknown)}"] if unknown else []
    return ". ".join(parts)


def _notes(record: Mapping[str, Any]) -> list[str]:
    return [f"no row {row}: {why}" for row, why in record["missing"].items()] + [_targets_line(record)]


def text_table(record: Mapping[str, Any], width: int = 160) -> str:
    """The tables as plain text; a cell is the mean ± half the width of its 95% interval. width: in characters."""
    console = Console(file=io.StringIO(), width=width, color_system=None)
    for title, columns in _TABLES.items():
        lines = _lines(record, list(columns))
        if not lines:
            continue
        clips = record["counts"]["drift_clips"] if title == "drift" else record["clips"]
        table = Table(title=f"{title}, {clips} clips", title_justify="left")
        table.add_column("row", no_wrap=True)
        for label in columns.values():
            table.add_column(label, justify="right")
        for line in lines:
            table.add_row(*line)
        console.print(table)
    assert isinstance(console.file, io.StringIO)
    tables = [line.rstrip() for line in console.file.getvalue().splitlines()]
    return "\n".join([*tables, *_notes(record)])


def markdown_table(record: Mapping[str, Any]) -> str:
    """The tables in Markdown, with cells as in `text_table`."""
    parts = []
    for title, columns in _TABLES.items():
        lines = _lines(record, list(columns))
        if lines:
            head = [f"**{title}**", *columns.values()]
            rule = [":--", *["--:"] * len(columns)]
            parts.append("\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *lines)))
    return "\n\n".join([*parts, "  \n".join(_notes(record))]) + "\n"
