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


def _markdown(lines: list[list[str]]) -> str:
    """A table from its heading and its rows. All columns but the first hold numbers."""
    lines = [lines[0], [":--", *["--:"] * (len(lines[0]) - 1)], *lines[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


_PARTS_OF_A_FRAME = {
    "stage 1": "stage 1: networks and sampler",
    "stage 2": "stage 2: networks and sampler",
    "encode": "encode pictures",
    "decode": "decode heads",
    "paste": "paste heads",
    "masks, mel and lips": "mask scenes, mel windows, lip references",
    "read": "take frames from the decoder",
    "write": "hand frames to the encoder",
    "processes": "the decoder's process, the encoder's threads",
    "other": "everything else, with the start of a film",
}
_FRAMES_OF_PAPER = {
    "before": "TCCP before",
    "now": "TCCP now",
    "now_light_1": "TCCP now, light decoder (1 level folded)",
    "now_light_2": "TCCP now, light decoder (2 levels folded)",
    "wav2lip": "Wav2Lip (96 px)",
    "musetalk": "MuseTalk, film encoded in advance",
    "musetalk_encoding": "MuseTalk, encoding each frame",
    "latentsync": "LatentSync, 20 steps, no guidance",
    "latentsync_guided": "LatentSync, 20 steps, guidance",
}


def speed_tables(record: Mapping[str, Any]) -> str:
    """Markdown tables of the record of benchmarks/speed.py: one for each part that it holds."""
    shown = {
        "films": ("A film with the packaged weights: before / now with 12 steps as before / now with 2", _films),
        "stages": ("CPU time of a frame with the packaged weights, one thread", _parts),
        "networks": ("Evaluations of `face_sequence` (`toy`), one thread", _evaluations),
        "paper": ("CPU time of a frame at 256 px with random weights, one thread", _paper),
    }
    parts = [f"**{title}**\n\n{table(record[part])}" for part, (title, table) in shown.items() if part in record]
    return "\n\n".join(parts) + "\n"


def _films(rows: list[Mapping[str, Any]]) -> str:
    def cells(row: Mapping[str, Any], key: str, unit: str) -> str:
        shown = []
        for name in ("before", "now_same_steps", "now"):
            if name in row:
                limit = row[name].get("not_finished_after_s")
                shown.append(f"{row[name][key]:,.3g}" if limit is None else f"over {limit:g} s a film")
            else:
                shown.append("-")
        return f"{' / '.join(shown)} {unit}"

    columns = {
        "a further frame": ("wall_ms_per_frame", "ms"),
        "its CPU time": ("cpu_ms_per_frame", "ms"),
        "film of 8 frames, with the start": ("short_film_wall_s", "s"),
        "memory": ("peak_mib", "MiB"),
    }
    lines = [["cores", "busy processes beside it", *columns]]
    for row in rows:
        lines.append([str(row["cores"]), str(row["busy_processes"]), *(cells(row, *what) for what in columns.values())])
    return _markdown(lines)


def _parts(stages: Mapping[str, Any]) -> str:
    spent = stages["cpu_ms_per_frame"]
    rows = [[label, f"{spent.get(name, 0):.1f} ms"] for name, label in _PARTS_OF_A_FRAME.items()]
    return _markdown([["part", "CPU time"], *rows, ["all", f"{stages['total_cpu_ms_per_frame']:.1f} ms"]])


def _evaluations(networks: Mapping[str, Any]) -> str:
    lines = [
        ["", "windows at once", "CPU time", "share of the core's rate of matrix products", "the same with AVX2 alone"]
    ]
    for name, row in networks["evaluations"].items():
        tree, way, _, batch = name.split("_")
        label = tree if tree == "before" else f"{tree}, {way}"
        shares = [
            f"{100 * found[name]['share_of_matmul']:.0f}%"
            for found in (networks["evaluations"], networks["evaluations_avx2"])
        ]
        lines.append([label, batch, f"{row['evaluation_ms']:.1f} ms", *shares])
    step = networks["training_step_ms"]
    text = f"A training step takes {step['before']:,.0f} ms before and {step['now']:,.0f} ms now"
    return f"{_markdown(lines)}\n\n{text} ({step['times_as_fast']:g} times as fast)."


def _paper(paper: Mapping[str, Any]) -> str:
    lines = [["", "networks", "encode", "decode", "all", "now, as a share of it", "GFLOP"]]
    for name in (name for name in _FRAMES_OF_PAPER if name in paper["rows"]):
        row = paper["rows"][name]
        parts = [f"{row[part] / 1000:.2f} s" for part in ("networks_ms", "encode_ms", "decode_ms", "cpu_ms_per_frame")]
        share = 1.0 if name == "now" else paper["now_to"][name]
        lines.append([_FRAMES_OF_PAPER[name], *parts, f"{share:.2f}", f"{row['gflop_per_frame']:,.0f}"])
    return _markdown(lines)


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
    "speed.md": {"speed": speed_tables},
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
