"""DeepSpeed's engine on ranks without Ray gives plain torch's numbers, for any number of ranks and ZeRO stage."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import trainings

from tccp.clips.clip_table import ClipTable
from tccp.config import DeepSpeedSettings, Settings, load_settings
from tccp.errors import TccpError
from tccp.models.autoencoder import PictureAutoencoder
from tccp.training.averaged_weights import AveragedWeights
from tccp.training.engine import TorchEngine, deepspeed_config
from tccp.training.fit_variant import VariantLoss, new_network
from tccp.training.latent_cache import LatentCache
from tccp.training.loop import fit

pytestmark = pytest.mark.slow
STEPS = 50
SMALL = [
    *trainings.OVERRIDES,
    f"training.max_steps={STEPS}",
    "network.blocks_per_scale=1",
    "network.dropout=0",
    "training.accumulation=2",
    "training.gradient_clip=0.3",
]


@pytest.fixture(scope="module")
def given(training_data: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Latents of four clips, and the arguments that ranks need to read them."""
    folder = tmp_path_factory.mktemp("data")
    data, untrained = training_data
    found = {"overrides": SMALL, "data": str(data), "autoencoder": str(untrained / "autoencoder")}
    cache_of(load_settings("toy", SMALL), found, folder).build()
    return {**found, "storage": str(folder)}


def cache_of(settings: Settings, given: dict[str, Any], storage: Path) -> LatentCache:
    autoencoder = PictureAutoencoder.load(Path(given["autoencoder"])).eval()
    return LatentCache(storage, ClipTable(given["data"]), settings, autoencoder, None, [ranks.NAME])


def plain(given: dict[str, Any], steps: int) -> tuple[list[float], list[float]]:
    """Losses, and sums of the moving averages' absolute values, of plain torch in one process."""
    settings = load_settings("toy", SMALL)
    model = new_network(ranks.NAME, settings)
    losses = VariantLoss(model, ranks.NAME, settings, cache_of(settings, given, Path(given["storage"])))
    ema = AveragedWeights(losses.module.parameters(), decay=settings.training.ema_decay)
    engine = TorchEngine(losses.module, settings.training)
    result = fit(engine, losses, settings.training, seed=settings.seed, ema=ema, stop_at=steps)
    return result.losses, [float(w.double().abs().sum()) for w in ema.weights]


def worst(found: list[float], expected: list[float]) -> float:
    assert len(found) == len(expected)
    return max(abs(a - b) / abs(b) if b else abs(a) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("steps", [12, pytest.param(STEPS, marks=pytest.mark.soak)])
def test_two_ranks_of_every_zero_stage_train_as_plain_torch_does(
    given: dict[str, Any], tmp_path: Path, steps: int
) -> None:
    arguments = {**given, "stages": [0, 1, 2, 3], "runs": str(tmp_path), "stop_at": steps}
    results = ranks.together(2, arguments, tmp_path / "out.json")
    losses, averages = plain(given, steps)
    assert len(set(losses)) == steps
    for stage in "0123":
        error = worst(results[stage]["losses"], losses)
        print(f"ZeRO {stage}: losses within {error:.1e} of plain torch over {steps} steps")
        assert error < 1e-4
        assert worst(results[stage]["ema"], averages) < 1e-3
    assert [round(results[stage]["held"], 1) for stage in "0123"] == [1, 1, 1, 0.5]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((1, 2), (1, 1)),
        pytest.param((3, 2), (3, 1), marks=pytest.mark.soak),
        pytest.param((1, 2), (2, 2), marks=pytest.mark.soak),
    ],
)
def test_a_training_resumes_with_another_number_of_ranks_or_another_stage(
    given: dict[str, Any],
    tmp_path: Path,
    before: tuple[int, int],
    after: tuple[int, int],
) -> None:
    losses: list[float] = []
    for number, (stage, num_ranks) in enumerate((before, after), 1):
        arguments = {**given, "stages": [stage], "runs": str(tmp_path), "stop_at": 10 * number}
        losses += ranks.together(num_ranks, arguments, tmp_path / f"{number}.json")[str(stage)]["losses"]
        if before[0] != after[0] and number == 1:
            shutil.copytree(tmp_path / str(before[0]), tmp_path / str(after[0]))
    assert worst(losses, plain(given, 20)[0]) < 1e-4


def test_a_stage_that_cannot_read_a_checkpoint_names_one_that_can(given: dict[str, Any], tmp_path: Path) -> None:
    arguments = {**given, "stages": [0], "runs": str(tmp_path), "stop_at": 2}
    ranks.together(1, arguments, tmp_path / "out.json")
    shutil.copytree(tmp_path / "0", tmp_path / "3")
    with pytest.raises(
        AssertionError, match=r"written by ZeRO stage 0 and cannot be resumed by stage 3: give --zero-stage 0"
    ):
        ranks.together(1, {**arguments, "stages": [3]}, tmp_path / "out.json")


def test_all_ranks_stop_together_at_a_loss_that_is_nan_and_name_its_windows(
    given: dict[str, Any], tmp_path: Path
) -> None:
    overrides = [*SMALL, "training.checkpoint_every=2"]
    arguments = {**given, "overrides": overrides, "stages": [2], "runs": str(tmp_path), "break_at": 5}
    error = ranks.together(2, arguments, tmp_path / "out.json")["2"]["error"]
    assert "the loss is nan at step 5; it trained on" in error
    assert "the checkpoint at step 4 is kept" in error
    assert error.count(":") >= 8  # the windows of both ranks


def test_deepspeeds_settings_follow_from_ours_and_can_be_extended() -> None:
    training = load_settings("paper", ["training.accumulation=4", "training.gradient_clip=2"]).training
    given = DeepSpeedSettings(
        zero_stage=3,
        offload="parameters",
        config={"zero_optimization": {"sub_group_size": 7}, "wall_clock_breakdown": 1},
    )
    config = deepspeed_config(training, given, num_ranks=8, num_parameters=1000)
    assert (config["train_batch_size"], config["train_micro_batch_size_per_gpu"]) == (192, 6)
    assert config["gradient_accumulation_steps"] == 4
    assert config["gradient_clipping"] == 2
    zero = config["zero_optimization"]
    assert (zero["stage"], zero["sub_group_size"], zero["reduce_bucket_size"]) == (3, 7, 1000)
    assert zero["offload_param"]["device"] == zero["offload_optimizer"]["device"] == "cpu"
    assert config["wall_clock_breakdown"] == 1
    with pytest.raises(
        TccpError, match="192 cannot be divided among 5 workers x 4 micro-batches: make it a multiple of 20"
    ):
        deepspeed_config(training, given, num_ranks=5, num_parameters=1000)
    for config, ours in (
        ({"train_batch_size": 8}, "training.batch_size"),
        ({"zero_optimization": {"stage": 3}}, "zero_stage"),
        ({"bf16": {"enabled": True}}, "training.precision"),
    ):
        with pytest.raises(TccpError, match=f"follows from {ours}: give that"):
            deepspeed_config(training, DeepSpeedSettings(config=config), num_ranks=1, num_parameters=1000)
    with pytest.raises(ValueError, match="offload=parameters needs zero_stage 3"):
        DeepSpeedSettings(zero_stage=2, offload="parameters")


def test_deepspeed_does_not_compile_its_all_reduce() -> None:
    """Depends on a private name of DeepSpeed's. Without it the start on CPUs takes half a minute more."""
    import deepspeed.ops

    assert "deepspeed_shm_comm" in deepspeed.ops.__compatible_ops__
    assert os.environ.get("DS_ACCELERATOR", "cpu") in ("cpu", "cuda")
    assert torch.distributed.is_available()
