"""The packaged weights and the demo that uses them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from tiny import tccp as command

from tccp.cli import demo_run as demo
from tccp.cli.demo_run import run_demo
from tccp.inference.manifest import TOY_WEIGHTS, read_manifest, read_settings, weights_folder
from tccp.inference.pipeline_folder import verified
from tccp.media import probe, read_metadata
from tccp.models.variants import TWO_STAGE

COMPONENTS = {"autoencoder", "lips", *TWO_STAGE}


@pytest.fixture(scope="module")
def short_demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A demo of two seconds."""
    out = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "SCENE_SECONDS", 2.0)
        record = run_demo(out, tmp_path_factory.mktemp("storage"))
    return out, record


def test_packaged_pipeline_is_complete_small_and_has_provenance() -> None:
    components = read_manifest(TOY_WEIGHTS)["components"]
    assert set(components) == COMPONENTS
    for name, entry in components.items():
        verified(TOY_WEIGHTS, name)
        provenance = entry["provenance"]
        for key in ("git_commit", "command", "seed", "steps", "core_minutes", "machine", "clips", "frames"):
            assert provenance[key] is not None, (name, key)
    files = [path for path in TOY_WEIGHTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 60e6
    assert max(path.stat().st_size for path in files) <= 50e6
    for path in TOY_WEIGHTS.rglob("*.safetensors"):
        with safe_open(path, framework="numpy") as file:
            assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"F16"}  # noqa: SIM118
    assert read_settings(TOY_WEIGHTS).preset == "toy"


def test_demo_uses_packaged_weights_and_follows_the_sound(short_demo: tuple[Path, dict[str, Any]]) -> None:
    """The limits are much looser than the benchmark's results, because this is one short film."""
    _, record = short_demo
    assert record["weights"] == "packaged"
    assert set(record["seconds"]) == {"generate", "pictures"}
    figures = record["against_truth"]
    assert figures["mouth_corr_landmarks"] > 0.85
    assert abs(figures["wrong_clip_mouth_corr"]) < figures["mouth_corr_landmarks"] - 0.3
    assert figures["yaw_mae_deg_landmarks"] < 20
    assert figures["psnr_face"] > 15


def test_demo_writes_film_sheet_preview_and_figures(short_demo: tuple[Path, dict[str, Any]]) -> None:
    out, record = short_demo
    names = {"demo.mp4", "demo.png", "demo.webp", "demo.json", "generated.mp4", "landmarks.jsonl"}
    assert {path.name for path in out.iterdir()} == names
    for name in ("demo.mp4", "generated.mp4"):
        film = probe(out / name)
        assert film.num_frames == 50
        assert film.has_audio
        assert "AI-generated" in json.dumps(read_metadata(out / name))
    assert json.loads((out / "demo.json").read_text()) == json.loads(json.dumps(record))
    with Image.open(out / "demo.webp") as preview:
        assert preview.n_frames == 25  # type: ignore[attr-defined]
        assert preview.info["loop"] == 0
        first = np.array(preview.convert("RGB")).astype(int)
        preview.seek(12)
        assert np.abs(np.array(preview.convert("RGB")).astype(int) - first).mean() > 1


def test_toy_means_the_packaged_weights_unless_a_folder_has_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert weights_folder(Path("toy")) == TOY_WEIGHTS
    assert weights_folder(Path("other")) == Path("other")
    (tmp_path / "toy").mkdir()
    assert weights_folder(Path("toy")) == Path("toy")


def test_export_on_the_command_line(tmp_path: Path) -> None:
    exported = command("export", TOY_WEIGHTS, tmp_path / "out", "--components", "lips", "autoencoder", "--json")
    assert exported.returncode == 0, exported.stderr
    done = json.loads(exported.stdout)
    assert done["components"] == ["autoencoder", "lips"]
    assert 0 < done["megabytes"] < 20
    by_name = command("export", "toy", tmp_path / "toy", "--components", "lips", "--json")
    assert by_name.returncode == 0, by_name.stderr
    assert (tmp_path / "toy" / "lips" / "config.json").read_bytes() == (TOY_WEIGHTS / "lips/config.json").read_bytes()
    refused = command("export", TOY_WEIGHTS, tmp_path / "out", "--components", "lip")
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "has no lip (it has autoencoder" in refused.stderr
