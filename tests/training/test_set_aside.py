"""Damaged data in training: another item takes its place, the same one at every reading, and it is said and counted."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from tiny_networks import small

from tccp.clips.clip_table import ClipTable, write_table
from tccp.clips.order import PlannedWindow, WindowId
from tccp.config import Settings, override
from tccp.errors import DamagedData
from tccp.files import Folder
from tccp.inference.conditioning import training_conditions
from tccp.models.autoencoder import PictureAutoencoder
from tccp.models.variants import VARIANTS
from tccp.training import set_aside
from tccp.training.fit_autoencoder import fit_latent_statistics, train_autoencoder
from tccp.training.fit_variant import train_variant
from tccp.training.latent_cache import LatentCache
from tccp.training.launcher.ingest import WindowReader
from tccp.training.launcher.streams import StreamedWindows
from tccp.training.lip_folds import open_lip_sources, train_liplets
from tccp.training.run_folder import RunFolder
from tccp.training.window_files import (
    SET_ASIDE,
    PictureFiles,
    TablePictures,
    latent_name,
    micro_batch,
    training_order,
)

NAME = "face_sequence"
SETTINGS = override(small(), {"training.max_steps": 4, "training.checkpoint_every": 2})


@pytest.fixture(autouse=True)
def _nothing_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(set_aside, "_said", set())
    caplog.set_level(logging.WARNING, "tccp")


def with_damage(table: ClipTable, column: str, clip_ids: list[str], out: Path) -> Path:
    """A copy of a table in which stills of these clips are no pictures."""
    rows = []
    for clip_id in table.ids:
        row = table.rows([clip_id])
        if clip_id in clip_ids:
            index = row.schema.get_field_index(column)
            stills = [b"no picture" for _ in row.column(column)[0].as_py()]
            row = row.set_column(index, row.schema.field(column), pa.array([stills], row.schema.field(column).type))
        rows.append(row)
    write_table(rows, out / "clips.parquet")
    return out


@pytest.fixture(scope="module")
def table(training_data: tuple[Path, Path]) -> ClipTable:
    return ClipTable(training_data[0])


@pytest.fixture(params=["scene", "face", "identity"])
def damaged(request: pytest.FixtureRequest, table: ClipTable, tmp_path: Path) -> ClipTable:
    """The table; one of its four clips does not decode."""
    return ClipTable(with_damage(table, request.param, table.ids[1:2], tmp_path))


def cache_of(table: ClipTable, root: Path, settings: Settings = SETTINGS) -> LatentCache:
    torch.manual_seed(0)
    autoencoder = PictureAutoencoder.from_settings(settings.autoencoder).eval()
    fit_latent_statistics(autoencoder, table, settings)
    lips = open_lip_sources(settings.lips, train_liplets(table, settings, root / "liplets", seed=0))
    cache = LatentCache(root, table, settings, autoencoder, lips, [NAME])
    cache.build()
    return cache


def test_a_training_goes_on_without_a_damaged_clip(
    damaged: ClipTable, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """All of it: statistics, liplets, latents, lips and the windows of the steps; also after a stop."""
    cache = cache_of(damaged, tmp_path / "storage")
    bad = damaged.ids[1]
    assert not any(name.startswith(bad) for name in cache.folder.names())
    losses = []
    for name, stops in (("whole", [None]), ("cut", [2, None])):
        losses.append([])
        for resume, stop_at in enumerate(stops):
            run = RunFolder.open(tmp_path / name, SETTINGS, NAME, resume=bool(resume))
            losses[-1] += train_variant(NAME, SETTINGS, cache, run, stop_at=stop_at)[1].losses
    assert losses[0] == losses[1] and len(losses[0]) == 4
    assert cache.windows_set_aside > 0
    said = [record.getMessage() for record in caplog.records if "is set aside" in record.getMessage()]
    assert len(said) == 1 and said[0].startswith(f"clip {bad} is set aside: ")


def test_ranks_take_the_same_windows_in_place_of_damaged_ones(damaged: ClipTable, tmp_path: Path) -> None:
    """Encoded ahead or in the step, for any number of ranks; other windows are not changed."""
    cache = cache_of(damaged, tmp_path / "storage")
    row, training = VARIANTS[NAME], SETTINGS.for_variant(NAME).training
    order = training_order(cache.lengths, NAME, SETTINGS)
    planned = order.step(0, training.batch_size)
    bad = [window.id.clip_id == damaged.ids[1] for window in planned]
    assert any(bad) and not all(bad)
    kinds = training_conditions(row, SETTINGS)
    ahead = cache.files.columns(planned, row, SETTINGS.window, kinds, lambda: order.ids)
    assert ahead[SET_ASIDE].tolist() == bad
    good = [window for window, is_bad in zip(planned, bad, strict=True) if not is_bad]
    plain = cache.files.columns(good, row, SETTINGS.window, kinds)
    for name, values in plain.items():
        np.testing.assert_array_equal(ahead[name][~np.array(bad)], values)
    place = str(damaged.folder)
    for files in (cache.files, PictureFiles(SETTINGS, place, cache.files.lips)):
        whole = files.columns(planned, row, SETTINGS.window, kinds, lambda: order.ids)
        for num_ranks in (1, 2):
            readers = [WindowReader(place, NAME, SETTINGS, files, rank, num_ranks) for rank in range(num_ranks)]
            read = [list(reader.read(0)) for reader in readers]
            for name, values in whole.items():
                together = np.concatenate([micro[name] for micros in read for micro in micros])
                np.testing.assert_array_equal(together, values)
    streamed = StreamedWindows(WindowReader(place, NAME, SETTINGS, cache.files, 0, 1).read(0), cache.lengths, SETTINGS)
    batch = streamed.batch(micro_batch(order, training, 0, 0), row, SETTINGS.window)
    assert torch.equal(batch.latents, cache.batch(planned, row, SETTINGS.window).latents)
    assert streamed.windows_set_aside == cache.windows_set_aside == sum(bad)


def test_a_damaged_or_missing_file_of_latents_costs_only_its_windows(table: ClipTable, tmp_path: Path) -> None:
    cache = cache_of(table, tmp_path)
    windows = [PlannedWindow(0, WindowId(clip_id, 2)) for clip_id in table.ids]
    row = VARIANTS[NAME]
    before = cache.batch(windows, row, SETTINGS.window)
    for draw in range(SETTINGS.headbox.draws):
        cache.folder.write(latent_name(table.ids[0], draw, "face"), b"cut short")
        cache.folder.remove(latent_name(table.ids[2], draw, "inputs"))
    after = cache.batch(windows, row, SETTINGS.window)
    same = [torch.equal(a, b) for a, b in zip(before.latents, after.latents, strict=True)]
    assert same == [False, True, False, True] and cache.windows_set_aside == 2
    cache.build()
    assert not torch.equal(cache.batch(windows, row, SETTINGS.window).latents[0], before.latents[0]), "it is there"
    assert torch.equal(cache.batch(windows, row, SETTINGS.window).latents[2], before.latents[2]), "encoded again"


def test_the_auto_encoder_trains_without_a_damaged_clip(damaged: ClipTable) -> None:
    settings = override(SETTINGS, {"autoencoder.max_steps": 3})
    autoencoder, result = train_autoencoder(settings, damaged, None)
    assert len(result.losses) == 3 and np.isfinite(result.losses).all()
    pictures = [TablePictures(damaged, settings).batch(step).pictures for step in range(4)]
    again = [TablePictures(damaged, settings).batch(step).pictures for step in range(4)]
    np.testing.assert_array_equal(np.stack(pictures), np.stack(again))
    assert bool((autoencoder.std > 0).all())


def test_data_of_which_nothing_can_be_read_ends_the_training(table: ClipTable, tmp_path: Path) -> None:
    broken = ClipTable(with_damage(table, "face", table.ids, tmp_path))
    with pytest.raises(DamagedData, match=r"does not decode.*; 20 others tried in its place cannot be read either"):
        TablePictures(broken, SETTINGS).batch(0)
    files = PictureFiles(SETTINGS, str(broken.folder), None)
    order = training_order(broken.num_frames, NAME, SETTINGS)
    with pytest.raises(DamagedData, match="20 others"):
        files.columns(order.step(0, 2), VARIANTS[NAME], SETTINGS.window, ["audio"], lambda: order.ids)


def test_a_part_of_a_table_that_was_cut_short_is_damaged_data(table: ClipTable, tmp_path: Path) -> None:
    Folder(tmp_path).upload(Path(str(table.folder)), "")
    with ClipTable(tmp_path) as copy:
        part, _ = copy._location[copy.ids[0]]
        (tmp_path / part).write_bytes((tmp_path / part).read_bytes()[:-100])
        with pytest.raises(DamagedData, match=rf"row 0 of .*{part} cannot be read \(.*\): preprocess"):
            copy.rows(copy.ids[:1])
    (tmp_path / part).unlink()
    with ClipTable(tmp_path) as copy, pytest.raises(DamagedData, match="preprocess the footage again"):
        copy.rows(copy.ids[:1])
