"""Puts the tables of docs/roundtable.json and docs/toy_recipe.json into README: `python benchmarks/readme_tables.py`"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from tccp.evaluation.report import markdown_table

ROOT = Path(__file__).resolve().parent.parent
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
"""Figures of a trial that go into the table."""


def recipe_table(record: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """A table in Markdown for each network of benchmarks/toy_recipe.py, a line per trial."""
    parts = []
    for variant, trials in record.items():
        kept = [name for name in trials["toy"] if name in _LABELS]
        lines = [[f"**{variant}**", *(_LABELS[name] for name in kept)], [":--", *["--:"] * len(kept)]]
        lines += [[trial, *(f"{figures[name]:#.3g}" for name in kept)] for trial, figures in trials.items()]
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(parts) + "\n"


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text()
    for place, table in {"roundtable": markdown_table, "toy_recipe": recipe_table}.items():
        text = _replaced(text, place, table(json.loads((ROOT / "docs" / f"{place}.json").read_text())))
    readme.write_text(text)


def _replaced(text: str, place: str, table: str) -> str:
    marks = re.compile(rf"(<!-- {place} -->\n).*?(<!-- /{place} -->)", re.DOTALL)
    text, found = marks.subn(lambda match: f"{match[1]}\n{table}\n{match[2]}", text)
    assert found == 1, f"README has no place for {place}"
    return text


if __name__ == "__main__":
    main()
