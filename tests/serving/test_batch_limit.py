"""The batch limit from the measured time of evaluations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tccp.diffusion.sampling import Network
from tccp.files import Folder
from tccp.inference.components import load_components
from tccp.serving.batch_limit import SIZES, StepCurve, curve_of, growing, kept_steps, limit_of

pytest_plugins = ["tiny_fixtures"]


def affine(fixed: float, row: float, sizes: tuple[int, ...] = SIZES) -> StepCurve:
    return StepCurve(sizes, tuple(fixed + row * size for size in sizes))


def test_the_limit_is_the_smallest_size_within_the_slack() -> None:
    # Rows a second of fixed + row * n are n / (fixed + row * n): 1/2, 2/3, 4/5, 8/9, 16/17, 32/33.
    curve = affine(1.0, 1.0)
    assert limit_of(curve, 1e9, slack=0.0) == 32
    assert limit_of(curve, 1e9, slack=0.05) == 16  # 16/17 is 0.971 of 32/33; 8/9 is 0.917
    assert limit_of(curve, 1e9, slack=0.10) == 8
    assert limit_of(affine(0.0, 1.0), 1e9) == 1, "where a batch gains nothing, none is made"
    assert limit_of(affine(1.0, 0.0), 1e9) == 32


def test_no_step_takes_longer_than_allowed_unless_every_size_does() -> None:
    curve = affine(1.0, 1.0)
    assert limit_of(curve, 9.0) == 8
    assert limit_of(curve, 8.9) == 4
    assert limit_of(curve, 0.1) == 1


def test_seconds_between_and_beyond_the_measured_sizes() -> None:
    curve = affine(1.0, 0.5)
    assert [curve.seconds_of(rows) for rows in (1, 3, 5, 32)] == [1.5, 2.5, 3.5, 17.0]
    assert curve.seconds_of(64) == 34.0, "at the rate of the last size"
    assert curve.seconds_of(0) == 1.5


def test_measuring_ends_where_the_time_of_a_row_no_longer_falls() -> None:
    tried = []

    def measure(rows: int) -> float:
        tried.append(rows)
        return max(4.0, float(rows))

    assert growing(measure) == StepCurve((1, 2, 4, 8), (4.0, 4.0, 4.0, 8.0))
    assert tried == [1, 2, 4, 8]


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA"), RuntimeError("DefaultCPUAllocator: can't allocate memory: ...")]
)
def test_measuring_ends_with_the_memory(error: Exception) -> None:
    def measure(rows: int) -> float:
        if rows > 4:
            raise error
        return 1.0

    assert growing(measure).rows == (1, 2, 4)
    with pytest.raises(type(error)):
        growing(measure, (8,))


def test_other_errors_are_not_taken_for_the_end_of_memory() -> None:
    def measure(rows: int) -> float:
        if rows > 1:
            raise RuntimeError("a bug")
        return 1.0

    with pytest.raises(RuntimeError, match="a bug"):
        growing(measure)


def test_a_curve_must_be_one() -> None:
    for rows, seconds in (((), ()), ((1, 2), (1.0,)), ((2, 1), (1.0, 1.0)), ((1,), (0.0,)), ((0,), (1.0,))):
        with pytest.raises(ValueError, match=r"sizes|positive"):
            StepCurve(rows, seconds)
    for text in ("{}", "[]", "nothing", '{"rows": [1], "seconds": null}'):
        with pytest.raises(ValueError):  # noqa: PT011
            curve_of(text)


@pytest.mark.parametrize("kind", ["landmark", "face"])
def test_a_network_is_measured_once_for_each_place_and_recorded_meanwhile(
    weights: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    components, storage = load_components(weights), Folder(tmp_path)
    curve = kept_steps(components, kind, "v1", storage, (1, 2))
    assert curve.rows == (1, 2) and all(0 < seconds < 60 for seconds in curve.seconds)
    (name,) = storage.names("step_curves/v1")
    record = json.loads(storage.read(f"step_curves/v1/{name}"))
    assert record["kind"] == kind and record["weights"] == "v1" and record["threads"] == torch.get_num_threads()
    network: Network = components.stage(f"{kind}_sequence", traced=True).sequence
    assert sorted(shape[0] for shape in network._recordings) == [1, 2]

    kept = StepCurve((1, 2), (7.0, 8.0))
    storage.write(f"step_curves/v1/{name}", json.dumps({"rows": kept.rows, "seconds": kept.seconds}).encode())
    assert kept_steps(components, kind, "v1", storage, (1, 2)) == kept, "it is not measured again"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert kept_steps(components, kind, "v1", storage, (1, 2)) != kept, "other threads take other times"
    monkeypatch.undo()
    storage.write(f"step_curves/v1/{name}", b"{")
    assert kept_steps(components, kind, "v1", storage, (1, 2)) != kept, "a damaged file is replaced"
