"""Figures of a network during its training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny

from tccp.config import override
from tccp.evaluation.figures import psnr
from tccp.evaluation.validation import (
    FRAME_STEP,
    FRAMES,
    SAMPLE_FILM,
    _face_sequence,
    new_frames,
    validate_network,
    validation_clips,
    with_network,
)
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


@pytest.mark.parametrize("window", [2, 4, 8, 16])
def test_the_fidelity_of_windows_is_measured_on_the_new_frames_of_the_chain(window: int) -> None:
    """A chain advances by window - 1 frames: the first frame of a window is the last one of the window before."""
    starts = [number * (window - 1) for number in range(5)]
    for number, start in enumerate(starts, 1):
        assert list(range(1000))[new_frames(number, window)] == list(range(start + 1, start + window))
    (clip,) = validation_clips(override(tiny.SETTINGS, {"window": window}), 1)
    assert len(clip.faces) == max(FRAMES, starts[-1] + window)


def test_psnr_window_5_is_that_of_window_5(weights: Path) -> None:
    pipeline = with_network(weights, "face_sequence", load_network(weights, "face_sequence"))
    (clip,) = validation_clips(tiny.SETTINGS, 1)
    figures, faces = _face_sequence(pipeline, [clip])
    for number, frames in ((1, slice(1, 4)), (5, slice(13, 16))):  # window = 4
        error = (faces[frames].astype(float) - clip.faces[frames]) ** 2
        assert figures[f"psnr_window_{number}"] == pytest.approx(psnr(faces[frames], clip.faces[frames]), abs=1e-9)
        assert figures[f"psnr_window_{number}"] == pytest.approx(10 * np.log10(255**2 / error.mean()), abs=0.5)
    assert figures["score"] == figures["psnr_window_5"]


def test_ablation_networks_are_not_validated(weights: Path) -> None:
    pipeline = with_network(weights, "one_stage_first", load_network(weights, "one_stage_first"))
    assert validate_network(pipeline, "one_stage_first", []) == {}
