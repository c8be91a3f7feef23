"""Formats numbers and names for readers; `escaped` and `isolated` give HTML."""

from __future__ import annotations

import html

from tccp.config import FPS


def escaped(text: object) -> str:
    """Text escaped for HTML elements and attributes; file names are untrusted input."""
    return html.escape(str(text), quote=True)


def isolated(text: str) -> str:
    """Text from outside as HTML, isolated: right-to-left text in it does not reorder the text around it."""
    return f"<bdi>{escaped(text)}</bdi>"


def duration(seconds: float) -> str:
    """A duration with three significant digits at most: 42.0 s, 12.3 min, 4.56 h, 123 h."""
    for unit, length, limit in (("s", 1, 60), ("min", 60, 3600), ("h", 3600, float("inf"))):
        if seconds < limit:
            value = seconds / length
            return (
                f"{value:.2f} {unit}"
                if value < 10
                else f"{value:.1f} {unit}"
                if value < 100
                else f"{value:,.0f} {unit}"
            )
    raise AssertionError(f"{seconds} is not a duration")


def film_time(frames: int) -> str:
    """The duration of so many frames of film."""
    return duration(frames / FPS)


def percent(share: float) -> str:
    """Whole percents; a share near 0 or 1 gets more digits, so that only 0 shows as "0 %" and only 1 as "100 %"."""
    if 0 < share < 0.005:
        return "<0.1 %" if share < 0.0005 else f"{100 * share:.1f} %"
    if 0.995 < share < 1:
        return ">99.9 %" if share > 0.9995 else f"{100 * share:.1f} %"
    return f"{100 * share:.0f} %"


def number(value: float) -> str:
    """Three significant digits, without trailing zeros; values below 0.0001 show as 0."""
    text = f"{value:.3g}" if abs(value) >= 1e-4 else "0"
    return f"{value:,.0f}" if "e" in text and abs(value) >= 1 else text.replace("-", "−")


def size(count: int) -> str:
    """A number of bytes in MiB or GiB."""
    return f"{count / 2**20:,.0f} MiB" if count < 2**30 else f"{count / 2**30:.1f} GiB"


def plural(count: int, word: str) -> str:
    """The count with its noun: 1 film, 2 films."""
    return f"{count:,} {word}{'' if count == 1 else 's'}"
