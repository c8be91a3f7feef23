"""Figures of a network during its training."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny

from tccp.evaluation.validation import FRAME_STEP, FRAMES, SAMPLE_FILM, validate_network, validation_clips, with_network
from tccp.inference.pipeline_folder import load_network
from tccp.models.variants import FIRST_OF, TWO_STAGE

pytest_plugins = ["tiny_fixtures"]


@pytest.mark.parametrize("name", TWO_STAGE)
def test_validation_is_reproducible_and_writes_a_sample_film(weights: Path, tmp_path: Path, name: str) -> None:
    pipeline = with_network(weights, name, load_network(weights, name))
    clips = validation_clips(tiny.SETTINGS, 1)
    figures = validate_network(pipeline, name, clips, tmp_path)
    assert "score" in figures
    assert figures == validate_network(pipeline, name, validation_clips(tiny.SETTINGS, 1))
    film = tiny.pictures(tmp_path / SAMPLE_FILM)
    frames = FRAMES if name in FIRST_OF else len(range(0, FRAMES, FRAME_STEP))
    assert film.shape == (frames, tiny.SETTINGS.picture_px, 2 * tiny.SETTINGS.picture_px, 3)


def test_ablation_networks_are_not_validated(weights: Path) -> None:
    pipeline = with_network(weights, "one_stage_first", load_network(weights, "one_stage_first"))
    assert validate_network(pipeline, "one_stage_first", []) == {}
