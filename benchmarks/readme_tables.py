"""Puts the tables of docs/roundtable.json into README: `python benchmarks/readme_tables.py`."""

from __future__ import annotations

import json
import re
from pathlib import Path

from tccp.evaluation.report import markdown_table

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    table = markdown_table(json.loads((ROOT / "docs" / "roundtable.json").read_text()))
    readme = ROOT / "README.md"
    text, found = re.subn(
        r"(<!-- roundtable -->\n).*?(<!-- /roundtable -->)",
        lambda match: f"{match[1]}\n{table}\n{match[2]}",
        readme.read_text(),
        flags=re.DOTALL,
    )
    assert found == 1, "README has no place for the tables"
    readme.write_text(text)


if __name__ == "__main__":
    main()
