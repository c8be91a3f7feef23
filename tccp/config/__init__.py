"""Typed settings, presets and the places that a run uses. All other modules build on this package.

Settings are frozen pydantic models that reject unknown keys by name. A preset is a function. `paper()` is Table 3 of
the paper, unchanged; where the paper gives no value, the comment names the source of ours.
"""

from tccp.clock import FPS, SAMPLE_RATE_HZ, SAMPLES_PER_FRAME
from tccp.config.environment import git_commit, storage_root
from tccp.config.overrides import changed, load_settings, override, settings_from_json, settings_to_json
from tccp.config.presets import PRESETS, paper, toy
from tccp.config.settings import (
    AutoencoderSettings,
    DeepSpeedSettings,
    DiffusionSettings,
    HeadBoxSettings,
    LipSettings,
    LipSource,
    NetworkSettings,
    PresetName,
    SamplingSettings,
    Settings,
    Solver,
    TrainingSettings,
    VariantName,
)

__all__ = [
    "FPS",
    "PRESETS",
    "SAMPLES_PER_FRAME",
    "SAMPLE_RATE_HZ",
    "AutoencoderSettings",
    "DeepSpeedSettings",
    "DiffusionSettings",
    "HeadBoxSettings",
    "LipSettings",
    "LipSource",
    "NetworkSettings",
    "PresetName",
    "SamplingSettings",
    "Settings",
    "Solver",
    "TrainingSettings",
    "VariantName",
    "changed",
    "git_commit",
    "load_settings",
    "override",
    "paper",
    "settings_from_json",
    "settings_to_json",
    "storage_root",
    "toy",
]
