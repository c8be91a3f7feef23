"""JSON that others wrote: numbers that are not finite and deep nesting are errors of one kind."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tccp.strict_json import MAX_DEPTH, parse_json


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**200), 2**200) | st.floats(allow_nan=False, allow_infinity=False),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=10,
    )
)
def test_ordinary_json_is_read_as_python_reads_it(value: Any) -> None:
    text = json.dumps(value)
    assert parse_json(text) == parse_json(text.encode()) == json.loads(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[NaN]", "NaN is not a number in JSON"),
        ('{"a": -Infinity}', "-Infinity is not a number"),
        ("[1e400]", "1e400 is too large"),
        ("1" * 400, "1{20}... is too large"),
        ("9" * 5000, "too large"),
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), f"more than {MAX_DEPTH} levels"),
        ("[" * 200_000, "levels deep"),
        ('{"a":' * 200_000, "levels deep"),
        ("[1,", "Expecting value"),
        (b"\xff\xfe\xff", "codec|decode"),
    ],
)
def test_what_no_file_should_hold_is_a_value_error_in_one_line(text: str | bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        parse_json(text)
    assert "\n" not in str(caught.value)


def test_the_deepest_allowed_nesting_is_read() -> None:
    text = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert parse_json(text) == json.loads(text)
