"""Writes the measured tables into the pages of docs/: `python benchmarks/docs_tables.py`.

A page marks the place of a table with `<!-- NAME -->` and `<!-- /NAME -->`; docs/NAME.json holds the figures.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tccp.evaluation.score_table import markdown_table

DOCS = Path(__file__).resolve().parent.parent / "docs"
_LABELS = {
    "mouth_corr": "mouth",
    "mouth_corr_face": "mouth",
    "yaw_mae_deg": "yaw error, deg",
    "side_accuracy": "right side",
    "psnr": "PSNR, dB",
    "psnr_window_1": "PSNR, dB, window 1",
    "psnr_window_5": "window 5",
    "colour_off_percent": "colour off, %",
}
"""The figures of a trial that the table shows, with their headings."""


def recipe_table(record: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Markdown tables of the record of benchmarks/toy_recipe.py: one per network, one line per trial."""
    parts = []
    for variant, trials in record.items():
        kept = [name for name in trials["toy"] if name in _LABELS]
        lines = [[f"**{variant}**", *(_LABELS[name] for name in kept)], [":--", *["--:"] * len(kept)]]
        lines += [[trial, *(f"{figures[name]:#.3g}" for name in kept)] for trial, figures in trials.items()]
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(parts) + "\n"


_RUNS = {
    "plain_torch": "plain torch, one process",
    "plain_torch_compiled": "the same, with torch.compile",
    "ray_1_worker": "Ray and DeepSpeed, 1 worker",
    "ray_1_worker_zero_1": "the same, ZeRO 1",
    "ray_1_worker_checkpointing": "the same without ZeRO, gradient checkpointing",
    "ray_1_worker_compiled": "the same without ZeRO, torch.compile",
    "ray_1_worker_in_step": "the same without ZeRO, latents in step",
    "ray_1_worker_offload_optimizer": "ZeRO 1, optimiser in the CPU's memory",
    "ray_1_worker_offload_parameters": "ZeRO 3, optimiser and parameters in the CPU's memory",
    **{f"ray_2_workers_zero_{stage}": f"2 workers, ZeRO {stage}" for stage in range(4)},
}


def training_table(record: Mapping[str, Any]) -> str:
    """A Markdown table of the record of benchmarks/training.py: one line per run."""
    lines = [
        ["", "seconds per step", "windows per second", "waiting for data", "peak memory per worker"],
        [":--", *["--:"] * 4],
    ]
    runs = {name: record["runs"][name] for name in _RUNS if name in record["runs"]}
    used = any("utilisation" in run for run in runs.values())
    if used:
        lines[0].append("of the GPU's peak")
        lines[1].append("--:")
    for name, run in runs.items():
        figures = [f"{run['step_s']:.2f}", f"{run['clips_s']:.0f}", f"{100 * run['data_wait']:.1f}%"]
        figures += [f"{run['memory_mib']:,.0f} MiB", *([f"{100 * run['utilisation']:.1f}%"] if used else [])]
        lines.append([_RUNS[name], *figures])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def light_decoder_table(record: Mapping[str, Any]) -> str:
    """Markdown tables of the record of benchmarks/light_decoder.py: cost of each decoder, quality of each trial."""
    rows = record["cost"]["rows"]
    names = {"gflop_per_frame": "GFLOP per frame", "cpu_s_1_frames": "CPU s, 1 frame", "cpu_s_8_frames": "8 frames"}
    kept = [key for key in names if key in rows[0]]
    lines = [["folded levels", "parameters", *(names[key] for key in kept)]]
    for row in rows:
        cells = [str(row["folded_levels"]), f"{row['parameters'] / 1e6:.1f} million"]
        for key in kept:
            times = row[f"times_cheaper_{key}"]
            cells.append(f"{row[key]:,.3g}" + (f" (÷ {times:.1f})" if row["folded_levels"] else ""))
        lines.append(cells)
    cost = [lines[0], ["--:"] * len(lines[0]), *lines[1:]]
    quality = [
        ["auto-encoder", "steps", "faces, dB", "less than `full`", "landmark pictures, dB", "less than `full`"],
        [":--", *["--:"] * 5],
    ]
    for name, trial in record.get("quality", {}).items():
        cells = [name, str(trial["steps"])]
        for kind in ("face", "landmark"):
            less = trial[kind]["less_than_full_db"]
            cells.append(f"{trial[kind]['psnr_db']['mean']:.2f}")
            cells.append("" if name == "full" else f"{less['mean']:.2f} ({less['low']:.2f} to {less['high']:.2f})")
        quality.append(cells)
    tables = [cost, *([quality] if "quality" in record else [])]
    return "\n\n".join("\n".join(f"| {' | '.join(line)} |" for line in table) for table in tables) + "\n"


TABLES: dict[str, dict[str, Callable[[Any], str]]] = {
    "benchmark.md": {"roundtable": markdown_table},
    "settings.md": {"toy_recipe": recipe_table, "light_decoder": light_decoder_table},
    "cluster.md": {"training": training_table, "training_gpu": training_table},
}
"""By page of docs/: the tables in it, by the name of the record."""


def rendered(page: str) -> str:
    """The text of a page, with the tables of the records that are in docs/ now."""
    text = (DOCS / page).read_text()
    for name, table in TABLES[page].items():
        text = _replaced(text, page, name, table(json.loads((DOCS / f"{name}.json").read_text())))
    return text


def _replaced(text: str, page: str, name: str, table: str) -> str:
    marks = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    text, found = marks.subn(lambda match: f"{match[1]}\n{table}\n{match[2]}", text)
    assert found == 1, f"docs/{page} has {found} places for the table {name}"
    return text


def main() -> None:
    for page in TABLES:
        (DOCS / page).write_text(rendered(page))


if __name__ == "__main__":
    main()
