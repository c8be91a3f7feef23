"""Reads JSON that others wrote: numbers that are not finite and deep nesting are errors like any other damage."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

MAX_DEPTH = 32
"""Most levels of lists and objects; files of this project have up to six."""


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises ValueError, with a reason in one line, for text that is not JSON, for NaN, Infinity and numbers beyond the
    range of a double such as 1e400, for integers of more than 300 digits, and for more than MAX_DEPTH levels.
    """
    try:
        value = json.loads(text, parse_constant=_refused_constant, parse_float=_finite, parse_int=_integer)
    except RecursionError:
        raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep") from None
    _check_depth(value)
    return value


def _refused_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number in JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:20]} is too large")
    return value


def _integer(text: str) -> int:
    if len(text) > 300:
        raise ValueError(f"the number {text[:20]}... is too large")
    return int(text)


def _check_depth(value: object) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        inner = [one for one in level if isinstance(one, dict | list)]
        if not inner:
            return
        level = [item for one in inner for item in (one.values() if isinstance(one, dict) else one)]
    raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")
