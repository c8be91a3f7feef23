"""Changes settings by dotted keys, from the command line or from code, and converts them to and from JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from tccp.config.presets import PRESETS
from tccp.config.settings import Settings, override, validated
from tccp.errors import TccpError
from tccp.strict_json import parse_json


def load_settings(preset: str = "toy", overrides: Sequence[str] = ()) -> Settings:
    """A preset with `key=value` overrides from the command line. A value that is valid JSON is parsed as JSON.

    An override holds for all variants and also replaces the preset's values for single variants. To change one variant
    only, use variant_overrides.NAME.KEY.
    Raises TccpError for unknown presets and keys, and for invalid values.
    """
    if preset not in PRESETS:
        raise TccpError(f"unknown preset {preset!r}: choose one of {', '.join(PRESETS)}")
    return changed(PRESETS[preset](), overrides)


def changed(settings: Settings, overrides: Sequence[str]) -> Settings:
    """Applies `key=value` overrides to settings, like `load_settings`."""
    values: dict[str, Any] = {}
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals:
            raise TccpError(f"override {item!r} does not have the form key=value, e.g. training.max_steps=100")
        try:
            values[key.strip()] = parse_json(text)
        except ValueError:
            values[key.strip()] = text
    given = {inner for key, value in values.items() for inner in (key, *_inner_keys(key, value))}
    kept = {
        variant: {key: value for key, value in overrides.items() if key not in given}
        for variant, overrides in settings.variant_overrides.items()
    }
    return override(settings.model_copy(update={"variant_overrides": kept}), values)


def _inner_keys(key: str, value: object) -> Iterable[str]:
    return [f"{key}.{name}" for name in value] if isinstance(value, dict) else []


def settings_to_json(settings: Settings) -> str:
    return settings.model_dump_json(indent=2) + "\n"


def settings_from_json(text: str) -> Settings:
    """Inverse of `settings_to_json`. Raises TccpError for unknown keys and invalid values."""
    try:
        tree = parse_json(text)
    except ValueError as error:
        raise TccpError(f"settings are not JSON: {error}") from None
    return validated(tree)
