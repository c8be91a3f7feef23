"""From figures per clip to the table: means with intervals, differences between rows, targets; as JSON and as text."""

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
"""Bootstrap resamples over clips: of means; of figures of all clips together, each computed anew, so there are fewer of
them."""
_SEED = 0
OURS = "two_stage_generated"
COMPARED = ("one_stage", "per_frame", "no_lip", "context_blind", "mask_body", "audio_shuffled", "two_stage_truth")
"""Rows that `differences` holds OURS against."""

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
"""Figures of the record, in its order. A row has null where a figure has no meaning."""

Samples = Mapping[str, Mapping[str, Float[np.ndarray, " n"]]]
"""Row -> figure -> one value per clip, NaN where the clip says nothing. Clips are the same, in the same order, in all
rows."""
PooledSamples = Mapping[str, Mapping[str, "Pooled"]]
"""Row -> figure that is no mean over clips."""
Cell = dict[str, float | None]
"""mean, and low and high of its 95% interval (null where there is but one clip)."""


def resamples(count: int, times: int) -> Integer[np.ndarray, "times count"]:
    """Clips drawn with replacement, the same ones for every row and figure: differences are paired."""
    return np.random.default_rng(_SEED).integers(count, size=(times, count))


def _number(value: float) -> float:
    return float(f"{value:.5g}") if abs(value) > 1e-9 else 0.0


def _cell(mean: float, low: float, high: float) -> Cell | None:
    if not math.isfinite(mean):
        return None
    known = math.isfinite(low) and math.isfinite(high)
    return {"mean": _number(mean), "low": _number(low) if known else None, "high": _number(high) if known else None}


def interval(values: Float[np.ndarray, " n"]) -> Cell | None:
    """Mean over the clips that have a value, with its percentile bootstrap interval; None where none has."""
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
    """A figure of all clips together, and of resampled ones."""

    value: float
    resampled: Float[np.ndarray, " times"]

    @classmethod
    def of(cls, count: int, statistic: Callable[[Integer[np.ndarray, " n"]], float]) -> Pooled:
        """statistic: of the clips with these indices, out of `count`."""
        drawn = resamples(count, POOLED_RESAMPLES if count > 1 else 0)
        return cls(statistic(np.arange(count)), np.array([statistic(clips) for clips in drawn], np.float64))

    def cell(self, minus: Pooled | None = None) -> Cell | None:
        """Two standard errors around the value: resampling repeats clips, which by itself moves such figures."""
        value = self.value - (minus.value if minus else 0)
        spread = self.resampled - (minus.resampled if minus else 0)
        spread = spread[np.isfinite(spread)]
        reach = 1.96 * float(spread.std()) if len(spread) > 1 else math.nan
        return _cell(value, value - reach, value + reach)


def summarise(samples: Samples, pooled: PooledSamples) -> dict[str, dict[str, Cell | None]]:
    """rows[NAME][FIGURE], every row with every figure."""
    rows: dict[str, dict[str, Cell | None]] = {}
    for row in ROW_NAMES:
        cells: dict[str, Cell | None] = dict.fromkeys(FIGURE_NAMES)
        cells |= {name: interval(values) for name, values in samples.get(row, {}).items()}
        cells |= {name: figure.cell() for name, figure in pooled.get(row, {}).items()}
        rows[row] = cells
    return rows


def compare(samples: Samples, pooled: PooledSamples) -> dict[str, dict[str, Cell]]:
    """differences["two_stage_generated - NAME"][FIGURE], paired over clips, for every figure that both rows have."""
    found: dict[str, dict[str, Cell]] = {}
    for other in COMPARED:
        if not {OURS, other} <= samples.keys():
            continue
        ours, theirs = samples[OURS], samples[other]
        cells = {name: interval(ours[name] - theirs[name]) for name in ours.keys() & theirs.keys()}
        all_ours, all_theirs = pooled.get(OURS, {}), pooled.get(other, {})
        cells |= {name: all_ours[name].cell(all_theirs[name]) for name in all_ours.keys() & all_theirs.keys()}
        kept = {name: cell for name, cell in cells.items() if cell is not None}
        found[f"{OURS} - {other}"] = {name: kept[name] for name in FIGURE_NAMES if name in kept}
    return found


@dataclass(frozen=True)
class Target:
    """What two_stage_generated is to reach.

    `surely within`: its whole interval, of a figure that chance alone would bring near 0. `below`: a row that its
    interval has to stay below.
    """

    figure: str
    kind: Literal["at least", "at most", "within", "surely within", "below"]
    bound: float | str

    def record(self, rows: Mapping[str, Any], differences: Mapping[str, Any]) -> dict[str, Any]:
        """found: the mean; for `below`, the difference. met: null where nothing was measured."""
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
    """A line per row that has any of the columns."""
    lines = [[row, *(_text(record["rows"][row][column]) for column in columns)] for row in record["rows"]]
    return [line for line in lines if any(line[1:])]


def _targets_line(record: Mapping[str, Any]) -> str:
    targets = record["targets"]
    open_ones = [f"{item['target']} (is {item['found']})" for item in targets if item["met"] is False]
    unknown = [item["target"] for item in targets if item["met"] is None]
    met = sum(item["met"] is True for item in targets)
    parts = [f"targets: {met} of {len(targets)} met"]
    parts += [f"not met: {'; '.join(open_ones)}"] if open_ones else []
    parts += [f"not measured: {'; '.join(unknown)}"] if unknown else []
    return ". ".join(parts)


def _notes(record: Mapping[str, Any]) -> list[str]:
    return [f"no row {row}: {why}" for row, why in record["missing"].items()] + [_targets_line(record)]


def text_table(record: Mapping[str, Any], width: int = 160) -> str:
    """The tables as plain text: mean, and half the width of its 95% interval."""
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
    """The tables in Markdown."""
    parts = []
    for title, columns in _TABLES.items():
        lines = _lines(record, list(columns))
        if lines:
            head = ["row", *columns.values()]
            rule = [":--", *["--:"] * len(columns)]
            parts.append("\n".join(f"| {' | '.join(line)} |" for line in ([f"**{title}**", *head[1:]], rule, *lines)))
    return "\n\n".join([*parts, "  \n".join(_notes(record))]) + "\n"
