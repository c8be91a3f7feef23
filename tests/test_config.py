"""Settings: the paper's values, overrides, JSON, and refusal of unknown keys and invalid values."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tccp import config
from tccp.config import PRESETS, Settings, VariantName, load_settings, override
from tccp.errors import TccpError

# Table 3 of the paper, and Wav2Lip's size for its lip reference; repeated here on purpose.
TABLE_3 = {
    "network.base_channels": 128,
    "network.channel_multipliers": (1, 2, 4),
    "network.blocks_per_scale": 2,
    "network.condition_dim": 128,
    "network.attention_head_dim": 64,
    "network.time_embedding_dim": 128,
    "network.dropout": 0.1,
    "network.pooled_conditions": False,
    "network.first_frame_channels": False,
    "autoencoder.downsampling": 16,
    "autoencoder.latent_channels": 16,
    "diffusion.num_train_timesteps": 1000,
    "diffusion.beta_start": 1e-4,
    "diffusion.beta_end": 0.02,
    "diffusion.prediction": "epsilon",
    "diffusion.zero_terminal_snr": False,
    "sampling.solver": "ddpm",
    "sampling.steps": 1000,
    "window": 8,
    "picture_px": 256,
    "lips.source": "wav2lip",
    "lips.size_px": 96,
    "training.batch_size": 192,
    "training.max_steps": 150_000,
    "training.learning_rate": 2e-4,
    "training.ema_decay": 0.9999,
    "training.initial_frame_noise": 0.0,
    "training.timestep_shift": 1.0,
    "training.precision": "fp32",
    "network.control_embedding": (),
    "context": "scene",
    "sampling.temperature": 1.0,
}


def value_at(settings: Settings, key: str) -> object:
    value: object = settings
    for part in key.split("."):
        value = getattr(value, part)
    return value


@pytest.mark.parametrize("key", TABLE_3)
@pytest.mark.parametrize("variant", get_args(VariantName))
def test_paper_preset_matches_table_3_for_every_variant(key: str, variant: VariantName) -> None:
    assert value_at(config.paper().for_variant(variant), key) == TABLE_3[key]


def test_frame_rate_and_sample_rate_agree() -> None:
    assert (config.FPS, config.SAMPLE_RATE_HZ, config.SAMPLES_PER_FRAME) == (25, 16_000, 640)
    assert config.FPS * config.SAMPLES_PER_FRAME == config.SAMPLE_RATE_HZ


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_have_their_name_and_round_trip_through_json(preset: str) -> None:
    settings = load_settings(preset)
    assert settings.preset == preset
    assert config.settings_from_json(config.settings_to_json(settings)) == settings


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("variant", get_args(VariantName))
def test_variant_overrides_are_applied_and_removed(preset: str, variant: VariantName) -> None:
    settings = load_settings(preset)
    own = settings.for_variant(variant)
    for key, value in settings.variant_overrides.get(variant, {}).items():
        found = value_at(own, key)
        assert (list(found) if isinstance(found, tuple) else found) == value  # overrides are JSON, which has no tuples
    assert own.variant_overrides == {}
    assert own.for_variant(variant) == own


def test_settings_and_their_groups_are_frozen() -> None:
    settings = load_settings("toy")
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        settings.seed = 1
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        settings.training.batch_size = 1


@pytest.mark.parametrize(
    ("item", "key", "value"),
    [
        ("training.max_steps=100", "training.max_steps", 100),
        ("training.learning_rate=1e-5", "training.learning_rate", 1e-5),
        ("training.gradient_clip=null", "training.gradient_clip", None),
        ("training.schedule=constant", "training.schedule", "constant"),
        ("network.pooled_conditions=false", "network.pooled_conditions", False),
        ("network.channel_multipliers=[1, 2]", "network.channel_multipliers", (1, 2)),
        (" seed = 7", "seed", 7),
        ('sampling={"steps": 5}', "sampling.steps", 5),
    ],
)
def test_command_line_override_changes_only_its_key(item: str, key: str, value: object) -> None:
    before, after = load_settings("toy"), load_settings("toy", [item])
    assert value_at(after, key) == value
    assert value_at(before, key) != value
    own = {
        variant: {other: found for other, found in values.items() if other != key}
        for variant, values in before.variant_overrides.items()
    }
    expected = before.model_copy(update={"variant_overrides": own})
    assert override(after, {key: value_at(before, key)}) == expected, "the override changed another key"


def test_later_overrides_win() -> None:
    assert load_settings("toy", ["seed=1", "seed=2"]).seed == 2


def test_variant_override_affects_one_variant_and_keeps_its_preset_overrides() -> None:
    settings = load_settings("toy", ["variant_overrides.face_sequence.training.max_steps=9"])
    assert settings.for_variant("face_sequence").training.max_steps == 9
    assert settings.for_variant("face_sequence").network.first_frame_channels
    assert settings.for_variant("face_first") == load_settings("toy").for_variant("face_first")


@pytest.mark.parametrize("items", [["training.max_steps=9"], ['training={"max_steps": 9}']])
def test_general_override_applies_to_variants_without_their_own_override(items: list[str]) -> None:
    assert load_settings("toy").for_variant("face_sequence").training.max_steps != 9
    settings = load_settings("toy", [*items, "variant_overrides.face_first.training.max_steps=5"])
    steps = {variant: settings.for_variant(variant).training.max_steps for variant in get_args(VariantName)}
    assert steps == dict.fromkeys(steps, 9) | {"face_first": 5}
    assert settings.for_variant("face_first").training.batch_size == 64  # the preset's override is kept


@pytest.mark.parametrize(
    ("preset", "items", "expected_parts"),
    [
        ("tiny", [], ["'tiny'", "paper", "toy"]),
        ("toy", ["training.max_step=5"], ["'training.max_step'", "did you mean training.max_steps?"]),
        ("toy", ["zzz=5"], ["'zzz'", "tccp/config/settings.py lists all settings"]),
        ("toy", ["max_steps=5"], ["'max_steps'; did you mean autoencoder.max_steps or training.max_steps?"]),
        ("toy", ["lips.steps=5"], ["'lips.steps'; did you mean"]),
        ("toy", ["temperature=1"], ["did you mean sampling.temperature?"]),
        ("toy", ["training.learning_rate=1e400"], ["training.learning_rate", "finite"]),
        ("toy", ["seed=" + "[" * 100_000], ["seed", "integer"]),
        ("toy", ["picture_px=" + "9" * 300], ["picture_px", "4096"]),
        ("toy", ["training.max_steps=1" + "0" * 30], ["training.max_steps", "1000000000"]),
        ("toy", ["training.max_steps.more=5"], ["'training.max_steps.more'"]),
        ("toy", ["training.max_steps"], ["'training.max_steps'", "key=value"]),
        ("toy", ["training.max_steps=0"], ["training.max_steps", "greater than 0", "given: 0"]),
        ("toy", ["training.max_steps=many"], ["training.max_steps", "integer", "given: many"]),
        ("toy", ["training=5"], ["training", "given: 5"]),
        ("toy", ['training={"bogus": 5}'], ["training.bogus"]),
        ("toy", ["training.accumulation=3"], ["accumulation 3 does not divide batch_size 16"]),
        ("toy", ["training.adam_betas=[0.9, 1.5]"], ["training.adam_betas", "less than 1"]),
        ("toy", ["training.learning_rate=Infinity"], ["training.learning_rate", "finite"]),
        ("toy", ["headbox.jitter_size=NaN"], ["headbox.jitter_size", "finite"]),
        ("toy", ["network.dropout=1.5"], ["network.dropout", "less than 1"]),
        ("toy", ["picture_px=100"], ["picture_px 100 is not a multiple of 32"]),
        ("toy", ["autoencoder.downsampling=16"], ["2 levels", "downsample by 8", "16"]),
        ("toy", ["autoencoder.decoder_folded_levels=2"], ["decoder_folded_levels 2", "2 levels", "at most 1"]),
        ("paper", ["autoencoder.decoder_folded_levels=-1"], ["autoencoder.decoder_folded_levels", "-1"]),
        ("toy", ["diffusion.prediction=epsilon"], ["zero_terminal_snr needs prediction=v"]),
        ("toy", ["diffusion.beta_start=0.5"], ["beta_start 0.5", "beta_end 0.02"]),
        ("toy", ["sampling.solver=euler"], ["sampling.solver", "'ddpm'", "given: euler"]),
        ("toy", ["variant_overrides.lips.seed=1"], ["variant_overrides.lips", "'face_first'"]),
        (
            "toy",
            ["variant_overrides.face_first.training.max_step=1"],
            ["face_first", "did you mean training.max_steps?"],
        ),
        ("toy", ["variant_overrides.face_first.training.max_steps=0"], ["face_first", "greater than 0"]),
        ("toy", ["preset=paper"], ["preset", "cannot be overridden", "--preset"]),
    ],
)
def test_invalid_settings_give_a_one_line_error_that_names_them(
    preset: str, items: list[str], expected_parts: list[str]
) -> None:
    with pytest.raises(TccpError) as caught:
        load_settings(preset, items)
    message = str(caught.value)
    assert "\n" not in message
    assert "Value error" not in message, "pydantic's own message"
    for part in expected_parts:
        assert part in message


@pytest.mark.parametrize("text", ["{", "[]", '{"bogus": 1}', '{"training": {"bogus": 1}}', '{"seed": -1}', ""])
def test_json_that_is_not_settings_is_refused(text: str) -> None:
    with pytest.raises(TccpError) as caught:
        config.settings_from_json(text)
    assert "\n" not in str(caught.value)


@given(
    seed=st.integers(0, 2**63),
    learning_rate=st.floats(1e-12, 1e3),
    betas=st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
    clip=st.none() | st.floats(1e-6, 1e6),
)
def test_settings_round_trip_exactly_through_json(
    seed: int, learning_rate: float, betas: tuple[float, float], clip: float | None
) -> None:
    values = {
        "seed": seed,
        "training.learning_rate": learning_rate,
        "training.adam_betas": betas,
        "training.gradient_clip": clip,
    }
    settings = override(load_settings("toy"), values)
    assert config.settings_from_json(config.settings_to_json(settings)) == settings


def test_override_does_not_modify_the_given_settings() -> None:
    settings = load_settings("toy")
    override(settings, {"variant_overrides.face_first.training.max_steps": 3, "sampling.steps": 1})
    assert settings == load_settings("toy")


def test_storage_root_is_the_argument_then_the_environment_then_home(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TCCP_STORAGE", "~/mine")
    assert config.storage_root(tmp_path / "given") == tmp_path / "given"
    assert config.storage_root() == tmp_path / "home" / "mine"
    monkeypatch.setenv("TCCP_STORAGE", "")
    assert config.storage_root() == tmp_path / "home" / ".tccp"
    monkeypatch.delenv("TCCP_STORAGE")
    assert config.storage_root() == tmp_path / "home" / ".tccp"


@pytest.mark.parametrize("url", ["s3://bucket/tccp", Path("s3://bucket/tccp")])
def test_url_as_storage_root_is_refused(url: str | Path) -> None:
    with pytest.raises(TccpError, match=r"s3:.*is a URL"):
        config.storage_root(url)


def output_of(command: list[str], folder: Path) -> str:
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


def test_git_commit_reports_the_commit_and_local_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "tccp"
    package.mkdir()
    source = Path(config.__file__).parent
    shutil.copytree(source, package / "config", ignore=shutil.ignore_patterns("__pycache__"))
    for module in ("__init__.py", "clock.py", "errors.py", "strict_json.py", "threads.py"):
        shutil.copy(source.parent / module, package)
    print_commit = [sys.executable, "-c", "import tccp.config; print(tccp.config.git_commit())"]
    assert output_of(print_commit, tmp_path) == "unknown"

    for name in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{name}_NAME", "test")
        monkeypatch.setenv(f"GIT_{name}_EMAIL", "test@example.invalid")

    (tmp_path / ".gitignore").write_text("__pycache__/\n")
    for command in (["git", "init"], ["git", "add", "."], ["git", "commit", "-m", "a start"]):
        output_of(command, tmp_path)
    head = output_of(["git", "rev-parse", "HEAD"], tmp_path)
    assert output_of(print_commit, tmp_path) == head
    (package / "errors.py").write_text((package / "errors.py").read_text() + "# changed\n")
    assert output_of(print_commit, tmp_path) == head + "+changes"
