"""Numbers and names as people read them, safe inside HTML."""

from __future__ import annotations

import html

from tccp.config import FPS


def escaped(text: object) -> str:
    """Any text inside HTML, elements and attributes alike; file names are hostile input."""
    return html.escape(str(text), quote=True)


def named(text: str) -> str:
    """A file name: its own writing direction must not turn what stands around it."""
    return f"<bdi>{escaped(text)}</bdi>"


def duration(seconds: float) -> str:
    """Three figures at most: 42.0 s, 12.3 min, 4.56 h, 123 h."""
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
    raise AssertionError(f"{seconds} is no duration")


def of_frames(frames: int) -> str:
    return duration(frames / FPS)


def percent(share: float) -> str:
    """Whole percents, but what is there is never nothing and what is missing never all."""
    if 0 < share < 0.005:
        return "<0.1 %" if share < 0.0005 else f"{100 * share:.1f} %"
    if 0.995 < share < 1:
        return ">99.9 %" if share > 0.9995 else f"{100 * share:.1f} %"
    return f"{100 * share:.0f} %"


def number(value: float) -> str:
    """Three significant figures, without trailing zeros; what is nearly nothing is nothing."""
    text = f"{value:.3g}" if abs(value) >= 1e-4 else "0"
    return f"{value:,.0f}" if "e" in text and abs(value) >= 1 else text.replace("-", "−")


def size(count: int) -> str:
    """Bytes in binary units."""
    return f"{count / 2**20:,.0f} MiB" if count < 2**30 else f"{count / 2**30:.1f} GiB"


def plural(count: int, word: str) -> str:
    return f"{count:,} {word}{'' if count == 1 else 's'}"
