"""Caches are keyed by the versions of the code that fills them. If a figure here changes, raise that version."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from preprocessing import plan as plans
from ray_jobs import train_command
from tccp import headbox, landmarks
from tccp.clips import windows
from tccp.clips.clip_table import ClipTable, write_table
from tccp.files import Folder
from tccp.media import mel
from tccp.models import lip_sources
from tccp.models.autoencoder import PictureAutoencoder
from tccp.models.lip_sources import LipletSource
from tccp.models.liplet import Liplet
from tccp.training import latent_cache, lip_folds
from tccp.training.lip_folds import liplet_folder

pytest_plugins = ["tiny_fixtures"]


def test_landmark_drawing_of_this_version() -> None:
    points = landmarks.MEAN_FACE[None, :, :2]
    points = (points - points.min()) / (points.max() - points.min()) * 0.8 + 0.1
    drawn = landmarks.draw(points.astype(np.float32), 64)
    digest = hashlib.blake2b(drawn.tobytes(), digest_size=8).hexdigest()
    assert (landmarks.DRAWING_VERSION, digest) == (1, "8bc1f0b6fffc961e"), "raise DRAWING_VERSION"


def test_surround_of_this_version() -> None:
    y, x = np.mgrid[:32, :32]
    scene = np.stack([8 * x, 8 * y, 4 * (x + y)], -1).astype(np.uint8)[None]
    box = np.array([[8, 10, 24, 26]], np.float32)
    found = headbox.surround(headbox.mask_scene(scene, box), box)[0].reshape(2, 16, 2, 16, 3).mean((1, 3))
    expected = [
        [[86.199, 102.199, 94.199], [161.801, 102.199, 132.0]],
        [[86.199, 177.801, 132.0], [161.801, 177.801, 169.801]],
    ]
    assert headbox.SURROUND_VERSION == 1
    np.testing.assert_allclose(found, expected, atol=0.1, err_msg="raise SURROUND_VERSION")


def test_mel_of_this_version() -> None:
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    found = mel.mel_windows(tone.astype(np.float32), 3, 2).reshape(2, 8, 10, 16).mean((2, 3))
    assert mel.MEL_VERSION == 1
    np.testing.assert_allclose(found, [[-3.4345, -2.952, *[-4.0] * 6]] * 2, atol=1e-3, err_msg="raise MEL_VERSION")


@pytest.mark.parametrize("name", ["view", "drawing", "mel", "surround"])
def test_latents_are_keyed_by_the_versions_of_what_draws_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    torch.manual_seed(0)
    autoencoder = PictureAutoencoder.from_settings(tiny.SETTINGS.autoencoder)

    write_table([], tmp_path / "clips.parquet")
    table = ClipTable(tmp_path)

    def place() -> str:
        return latent_cache.LatentCache(tmp_path, table, tiny.SETTINGS, autoencoder, None).folder.place

    before = place()
    assert place() == before
    assert windows.VIEW_VERSIONS == {
        "view": windows.VIEW_VERSION,
        "drawing": landmarks.DRAWING_VERSION,
        "mel": mel.MEL_VERSION,
    }
    if name == "surround":
        monkeypatch.setattr(latent_cache, "SURROUND_VERSION", 99)
    else:
        monkeypatch.setitem(windows.VIEW_VERSIONS, name, 99)
    assert place() != before


@pytest.mark.parametrize("name", ["LIPS_VERSION", "MEL_VERSION"])
def test_rendered_lips_are_keyed_by_the_versions_of_what_renders_them(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    torch.manual_seed(0)
    network = Liplet(16, 4)
    before = LipletSource(network).hash
    assert LipletSource(network).hash == before
    monkeypatch.setattr(lip_sources, name, 99)
    assert LipletSource(network).hash != before


@pytest.mark.parametrize("name", ["LIPLET_VERSION", "MEL_VERSION"])
def test_liplets_are_keyed_by_the_versions_of_what_trains_them(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    before = liplet_folder("ab", 0, tiny.SETTINGS.lips)
    monkeypatch.setattr(lip_folds, name, 99)
    assert liplet_folder("ab", 0, tiny.SETTINGS.lips) != before


def test_other_pictures_of_a_clip_give_it_another_id(monkeypatch: pytest.MonkeyPatch) -> None:
    """Latents are kept under the clip's id, which depends on the plan's provenance."""
    plan = plans.make_plan(64, "truth")
    before = plan.provenance
    monkeypatch.setattr(plans, "RENDER_VERSION", plans.RENDER_VERSION + 1)
    assert plan.provenance != before


def test_drawn_films_and_their_clips_are_keyed_by_their_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clips of an earlier version of the drawing or of preprocessing are not taken for today's."""
    from tccp import roundtable

    def places() -> tuple[str, str]:
        films, table = train_command.roundtable_places(plans.make_plan(32, "truth").part_key, Folder(tmp_path))
        return str(films), table

    first = places()
    monkeypatch.setattr(roundtable, "FILMS_VERSION", 99)
    second = places()
    monkeypatch.setattr(plans, "SELECT_VERSION", 99)
    third = places()
    assert first[0] != second[0] == third[0]
    assert len({first[1], second[1], third[1]}) == 3
