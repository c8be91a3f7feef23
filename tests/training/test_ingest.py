"""The windows that ranks receive: those of the plan, for any number of ranks and every source, mostly without Ray."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trainings

from tccp.clips.clip_table import ClipTable
from tccp.clips.order import PlannedWindow
from tccp.clips.windows import windows
from tccp.config import load_settings, override
from tccp.errors import TccpError
from tccp.files import Folder
from tccp.inference.conditioning import training_conditions
from tccp.models.autoencoder import PictureAutoencoder
from tccp.models.variants import VARIANTS
from tccp.training.fit_variant import VariantLoss, new_network
from tccp.training.latent_cache import LatentCache, TrainingBatch, encode_columns, to_batch
from tccp.training.launcher import ingest
from tccp.training.launcher.film_order import RECORD, FilmOrder
from tccp.training.launcher.ingest import PictureReader, WindowReader
from tccp.training.launcher.job import Allocation
from tccp.training.launcher.sizing import readers_now
from tccp.training.launcher.streams import StreamedPictures, StreamedWindows
from tccp.training.window_files import PictureFiles, TablePictures, micro_batch, training_order

SETTINGS = load_settings("toy", [*trainings.OVERRIDES, "training.accumulation=2", "lips.source=none"])
NAME = "face_sequence"


@pytest.fixture(scope="module")
def cache(training_data: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> LatentCache:
    folder = tmp_path_factory.mktemp("data")
    data, untrained = training_data
    autoencoder = PictureAutoencoder.load(untrained / "autoencoder").eval()
    cache = LatentCache(folder, ClipTable(data), SETTINGS, autoencoder, None, [NAME])
    cache.build()
    return cache


def table_of(cache: LatentCache) -> str:
    return str(cache.table.folder)


def reader(cache: LatentCache, rank: int = 0, num_ranks: int = 1) -> WindowReader:
    return WindowReader(table_of(cache), NAME, SETTINGS, cache.files, rank, num_ranks)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_ranks_together_read_the_windows_of_the_plan(cache: LatentCache, num_ranks: int) -> None:
    order = training_order(cache.lengths, NAME, SETTINGS)
    row, training = VARIANTS[NAME], SETTINGS.for_variant(NAME).training
    for step in (0, 7):
        read = [list(reader(cache, rank, num_ranks).read(step)) for rank in range(num_ranks)]
        assert [len(micros) for micros in read] == [2] * num_ranks
        together = {name: np.concatenate([m[name] for micros in read for m in micros]) for name in read[0][0]}
        planned = order.step(step, training.batch_size)
        whole = cache.files.columns(planned, row, SETTINGS.window, training_conditions(row, SETTINGS))
        for name, values in whole.items():
            np.testing.assert_array_equal(together[name], values, err_msg=name)
        assert together["start"].tolist() == [window.id.start_frame for window in planned]


def test_windows_other_than_the_plans_are_refused(cache: LatentCache) -> None:
    row = VARIANTS[NAME]
    order = training_order(cache.lengths, NAME, SETTINGS)
    planned = micro_batch(order, SETTINGS.for_variant(NAME).training, 3, 0)
    right = StreamedWindows(reader(cache).read(3), cache.lengths, SETTINGS)
    batch = right.batch(planned, row, SETTINGS.window)
    assert torch.equal(batch.latents, cache.batch(planned, row, SETTINGS.window).latents)
    wrong = StreamedWindows(reader(cache).read(4), cache.lengths, SETTINGS)
    with pytest.raises(RuntimeError, match=r"Ray Data gave .* where the plan has"):
        wrong.batch(planned, row, SETTINGS.window)


@pytest.mark.parametrize("context", ["scene", "none"])
def test_latents_encoded_in_the_step_equal_those_encoded_ahead(cache: LatentCache, context: str) -> None:
    settings = SETTINGS.model_copy(update={"context": context})
    for name in ("face_sequence", "landmark_first"):
        row = VARIANTS[name]
        frames, kinds = row.num_frames(settings.window), training_conditions(row, settings)
        ahead = LatentCache(
            Path(cache.folder.place).parent.parent, cache.table, settings, cache.autoencoder, None, [name]
        )
        ahead.build()
        planned = training_order(cache.lengths, name, settings).step(5, 4)
        expected = ahead.files.columns(planned, row, frames, kinds)
        pictures = PictureFiles(settings, table_of(cache), None).columns(planned, row, frames, kinds)
        found = encode_columns(pictures, cache.autoencoder, row, settings)
        assert found.keys() == expected.keys()
        for key, values in expected.items():
            assert found[key].dtype == values.dtype
            np.testing.assert_allclose(found[key].astype(float), values.astype(float), rtol=0, atol=4e-3, err_msg=key)
        assert to_batch(found).latents.shape == to_batch(expected).latents.shape


@pytest.mark.parametrize("name", ["face_sequence", "landmark_sequence"])
def test_bridged_frames_and_what_lies_beyond_the_picture_do_not_count_in_the_loss(
    cache: LatentCache, name: Any
) -> None:
    """The loss of a real batch does not change with the targets there, and changes with the others."""
    row = VARIANTS[name]
    losses = VariantLoss(new_network(name, SETTINGS).eval(), name, SETTINGS, cache)
    planned = training_order(cache.lengths, name, SETTINGS).step(0, 2)
    batch = cache.batch(planned, row, row.num_frames(SETTINGS.window))
    assert batch.target_weight(row.generates) is None  # nothing is bridged, and no box leaves the picture
    assert batch.known is not None and batch.inside is not None
    known, inside = batch.known.clone(), batch.inside.clone()
    known[0, 1], inside[1, :, 0] = False, 0.5
    marked = dataclasses.replace(batch, known=known, inside=inside)
    weight = marked.target_weight(row.generates)
    assert weight is not None
    half = batch.latents.shape[-1] // 2
    assert (weight[0, 1] == 0).all() and (weight[0, [0, 2]] == 1).all()
    assert (weight[1, :, :, :half] == (0 if row.generates == "face" else 1)).all()
    assert (weight[1, :, :, half:] == 1).all()
    ones = dataclasses.replace(batch, known=None, inside=None)
    assert torch.equal(losses.loss(planned, ones), losses.loss(planned, batch))

    def target(change: torch.Tensor) -> torch.Tensor:
        return _error_with(losses, planned, marked, change)

    nothing = torch.zeros_like(batch.latents)
    unseen, seen = nothing.clone(), nothing.clone()
    unseen[(weight == 0)[:, None].expand_as(unseen)] = 5
    seen[:, :, -1, :, -1] = 5
    assert torch.equal(target(nothing), target(unseen))
    assert (target(nothing) != target(seen)).all()


def _error_with(
    losses: VariantLoss, planned: Sequence[PlannedWindow], batch: TrainingBatch, change: torch.Tensor
) -> torch.Tensor:
    """The loss if the network's output is changed by so much."""
    handle = losses.module.network.register_forward_hook(lambda module, args, output: output + change)
    with torch.no_grad():
        found = losses.loss(planned, batch)
    handle.remove()
    return found


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_ranks_together_read_the_auto_encoders_pictures(cache: LatentCache, num_ranks: int) -> None:
    whole = TablePictures(cache.table, SETTINGS).batch(6)
    count = SETTINGS.autoencoder.batch_size
    parts = []
    for rank in range(num_ranks):
        rows = PictureReader(table_of(cache), SETTINGS, rank, num_ranks).read(6)
        parts.append(StreamedPictures(rows, count).batch(6, rank, num_ranks))
    np.testing.assert_array_equal(np.concatenate([part.pictures for part in parts]), whole.pictures)
    assert np.concatenate([part.numbers for part in parts]).tolist() == list(range(6 * count, 7 * count))


def test_waiting_for_windows_ends_after_the_timeout() -> None:
    end = threading.Event()

    def slow() -> Iterator[int]:
        yield 1
        end.wait(20)

    items = ingest._in_time(slow, 0.3)
    assert next(items) == 1
    with pytest.raises(TimeoutError, match="has the cluster CPUs left"):
        next(items)
    end.set()

    def broken() -> Iterator[int]:
        yield 1
        raise KeyError("of the reading")

    items = ingest._in_time(broken, 5.0)
    assert next(items) == 1
    with pytest.raises(KeyError, match="of the reading"):
        next(items)
    assert list(ingest._in_time(lambda: [1, 2, 3], 5.0)) == [1, 2, 3]


def film_windows_of(cache: LatentCache) -> Any:
    """Windows as films give them, from a table."""

    def rows(epoch: int) -> Iterator[dict[str, np.ndarray]]:
        for clip_id in cache.table.ids:
            columns = windows(cache.table.rows([clip_id]), SETTINGS, SETTINGS.window, 3, jitters=(epoch % 2,))
            for row in range(len(columns["start_frame"])):
                yield {name: values[row] for name, values in columns.items()}

    return rows


def taken(cache: LatentCache, num_ranks: int, start: int, steps: int, run: Path) -> list[list[tuple[int, int, int]]]:
    """Windows of each step, over all ranks in order, as (epoch, clip, start)."""
    found = []
    with closing(FilmOrder(film_windows_of(cache), SETTINGS, NAME, num_ranks, start, Folder(run))) as order:
        steps_of_all = [[order.take(rank) for rank in range(num_ranks) for _ in range(2)] for _ in range(steps)]
    for parts in steps_of_all:
        found.append(
            [
                one
                for part in parts
                for one in zip(*(part[name].tolist() for name in ("epoch", "clip", "start")), strict=True)
            ]
        )
    return found


def test_windows_from_film_have_one_order_for_any_number_of_ranks_and_after_a_stop(
    cache: LatentCache, tmp_path: Path
) -> None:
    alone = taken(cache, 1, 0, 12, tmp_path / "one")
    assert alone == taken(cache, 2, 0, 12, tmp_path / "two")
    assert (tmp_path / "one" / RECORD).exists()  # it has passed the end of an epoch
    assert len({epoch for step in alone for epoch, _, _ in step}) >= 2
    listed = sum(1 for _ in film_windows_of(cache)(0))
    flat = [window for step in alone for window in step]
    assert sorted(flat[:listed]) == sorted(set(flat[:listed])), "each window once an epoch"
    assert [start for _, _, start in flat[:listed]] != sorted(start for _, _, start in flat[:listed])
    for known in ("one", "new"):  # with the length of an epoch known, and not
        assert taken(cache, 2, 9, 3, tmp_path / known) == alone[9:]


def test_an_error_in_reading_films_reaches_the_ranks(tmp_path: Path) -> None:
    def none(epoch: int) -> Iterator[dict[str, np.ndarray]]:
        yield from ()

    order = FilmOrder(none, SETTINGS, NAME, 2, 0, Folder(tmp_path))
    for rank in range(2):
        with pytest.raises(TccpError, match="the films give no training windows"):
            order.take(rank)


@pytest.mark.cluster
@pytest.mark.slow
def test_windows_are_read_although_no_whole_cpu_is_free(ray_with_two_cpus: Any, cache: LatentCache) -> None:
    """Ranks and their readers may hold all the rest: a task that asks for a whole CPU would never run."""
    ray = ray_with_two_cpus
    holder = ray.remote(threading.Event).options(num_cpus=1.7).remote()
    try:
        ray.get(holder.is_set.remote())
        stream = ingest.micro_batches(reader(cache), range(5, 8), 4, readers=3, timeout_s=60.0)
        found = [item["start"].tolist() for item in stream]
        ranks = Allocation(workers=1, use_gpu=False, cpus_per_worker=1.5, readers=3)  # made for more machines
        assert (readers_now(ranks), readers_now(replace(ranks, workers=3))) == (2, 1)
        other = override(SETTINGS, {"picture_px": 64})
        wrong = PictureReader(table_of(cache), other, 0, 1)
        with pytest.raises(TccpError) as refused:
            next(ingest.micro_batches(wrong, range(1), 4, readers=1, timeout_s=60.0))
        assert "\n" not in str(refused.value), "errors of workers look like those of this process"
    finally:
        ray.kill(holder)
    assert found == [item["start"].tolist() for step in range(5, 8) for item in reader(cache).read(step)]
