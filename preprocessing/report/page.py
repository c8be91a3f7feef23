"""The report of a preprocessing run as one self-contained HTML page."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from preprocessing.report.assets import SCRIPT, STYLE
from preprocessing.report.record import RunReport
from preprocessing.report.sections import (
    films,
    footer,
    frames_by_reason,
    headline,
    histograms,
    set_aside,
    settings,
    time_per_step,
    tracks,
)
from tccp.files import atomic_path

_SECTIONS: Sequence[Callable[[RunReport], str]] = (
    headline,
    frames_by_reason,
    films,
    set_aside,
    histograms,
    tracks,
    time_per_step,
    settings,
    footer,
)


def page_html(report: RunReport) -> str:
    """The page as HTML. It needs no network; without scripts, only sorting and searching are missing.

    File names, messages and settings are escaped, and the page's Content-Security-Policy allows only its own script.
    """
    script_hash = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{script_hash}'"
    body = "\n".join(part for part in (section(report) for section in _SECTIONS) if part)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Preprocessing report</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def write_page(report: RunReport, out: str | Path) -> None:
    """Writes the page atomically. Raises TccpError if it cannot be written."""
    with atomic_path(Path(out)) as temporary:
        temporary.write_text(page_html(report), encoding="utf-8")
