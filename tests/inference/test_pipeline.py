"""Pipeline folders: writing, reading, replacing and exporting components."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from tccp.config import FPS, override
from tccp.errors import TccpError
from tccp.files import Folder
from tccp.inference.components import load_components
from tccp.inference.manifest import check_settings, has_component, read_manifest, read_settings
from tccp.inference.pipeline import Pipeline
from tccp.inference.pipeline_folder import (
    export,
    load_network,
    restore_replaced,
    same_component,
    save_component,
    verified,
    write_untrained,
)
from tccp.models.mvcontrolnet import MVControlNet
from tccp.models.variants import TWO_STAGE, VARIANTS
from tccp.training.lip_folds import LipPlace, lip_place

pytest_plugins = ["tiny_fixtures"]


def test_a_written_pipeline_is_read_back_unchanged(weights: Path) -> None:
    pipeline = load_components(weights, VARIANTS)
    assert pipeline.settings == tiny.SETTINGS
    assert set(pipeline.networks) == set(VARIANTS)
    assert pipeline.lips is not None
    assert pipeline.lips.size_px == tiny.SETTINGS.lips.size_px
    for name, network in pipeline.networks.items():
        assert not network.training
        assert network.config.num_frames == VARIANTS[name].num_frames(tiny.SETTINGS.window)


def test_only_the_given_networks_are_loaded(weights: Path) -> None:
    assert set(load_components(weights).networks) == set(TWO_STAGE)
    assert set(load_components(weights, ("face_first",)).networks) == {"face_first"}


def test_the_same_seed_writes_the_same_weights(tmp_path: Path) -> None:
    files = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_untrained(tmp_path / name, override(tiny.SETTINGS, {"seed": seed}), ("face_first",))
        components = read_manifest(tmp_path / name)["components"]
        files.append({component: entry["files"] for component, entry in components.items()})
    assert files[0] == files[1]
    assert files[0]["face_first"] != files[2]["face_first"]


def test_the_folder_holds_no_pickles_and_the_manifest_lists_all_files(weights: Path) -> None:
    manifest = read_manifest(weights)
    listed = {f"{name}/{file}" for name, entry in manifest["components"].items() for file in entry["files"]}
    there = {path.relative_to(weights).as_posix() for path in weights.rglob("*") if path.is_file()}
    assert there == listed | {"manifest.json"}
    assert {Path(file).suffix for file in there} == {".json", ".safetensors"}
    assert all(entry["provenance"]["git_commit"] for entry in manifest["components"].values())
    assert read_settings(weights) == tiny.SETTINGS


def test_files_that_the_manifest_does_not_name_are_refused(weights: Path, tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    shutil.copytree(weights, folder)
    (folder / "README.md").write_text("beside the components, as repositories have it")
    load_components(folder)
    more = folder / "face_first" / "pytorch_model.bin"
    more.write_bytes(b"a pickle, perhaps")
    with pytest.raises(TccpError, match=rf"{re.escape(str(more))} is not in manifest\.json: remove it"):
        load_components(folder)
    more.unlink()
    load_components(folder)


def test_other_users_may_read_the_folder(weights: Path) -> None:
    for path in (weights, *weights.rglob("*")):
        assert path.stat().st_mode & 0o044 == 0o044, path


def test_a_component_is_replaced_as_a_whole(weights: Path, tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    shutil.copytree(weights, folder)
    torch.manual_seed(9)
    network = MVControlNet.from_settings(tiny.SETTINGS, "face_first")
    (folder / "face_first" / "leftover.txt").write_text("of an older version")
    save_component(folder, "face_first", tiny.SETTINGS, network.save_pretrained, {"steps": 7})
    assert read_manifest(folder)["components"]["face_first"]["provenance"]["steps"] == 7
    loaded = load_network(folder, "face_first")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), network.parameters(), strict=True))
    assert not (folder / "face_first" / "leftover.txt").exists()
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_a_component_that_fails_changes_nothing(weights: Path, tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    shutil.copytree(weights, folder)
    before = (folder / "manifest.json").read_bytes()

    def fail(path: Path) -> None:
        (path / "half.safetensors").write_bytes(b"half")
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        save_component(folder, "face_first", tiny.SETTINGS, fail, {})
    assert (folder / "manifest.json").read_bytes() == before
    assert {path.name for path in folder.iterdir()} == {path.name for path in weights.iterdir()}
    verified(folder, "face_first")


@pytest.fixture
def replaced(weights: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A pipeline, and the same one in which face_first has been replaced by another network."""
    before, after = tmp_path / "before", tmp_path / "after"
    shutil.copytree(weights, before)
    shutil.copytree(weights, after)
    network = MVControlNet.from_settings(tiny.SETTINGS, "face_first")
    save_component(after, "face_first", tiny.SETTINGS, network.save_pretrained, {"steps": 7})
    return before, after


INTERRUPTED = {
    "the former one is aside": (False, False, True),
    "the new one is in place": (True, False, True),
    "the manifest names the new one": (True, True, True),
    "before there was a former one": (True, False, False),
}


@pytest.mark.parametrize("at", INTERRUPTED)
def test_an_interrupted_replacement_leaves_the_former_or_the_new_component(
    replaced: tuple[Path, Path], tmp_path: Path, at: str
) -> None:
    before, after = replaced
    is_new, is_named, has_former = INTERRUPTED[at]
    folder = tmp_path / "interrupted"
    shutil.copytree(before, folder)
    (folder / "face_first").rename(folder / ".face_first.replaced")
    if is_new:
        shutil.copytree(after / "face_first", folder / "face_first")
    if is_named:
        shutil.copy(after / "manifest.json", folder / "manifest.json")
    if not has_former:
        shutil.rmtree(folder / ".face_first.replaced")
    if not is_named:
        with pytest.raises(
            TccpError, match="was interrupted; .* with --resume" if has_former else "retrain face_first"
        ):
            verified(folder, "face_first")
    restore_replaced(folder)
    if has_former:
        load_network(folder, "face_first")
        expected = (after if is_named else before) / "face_first" / "config.json"
        assert (folder / "face_first" / "config.json").read_bytes() == expected.read_bytes()
    save_component(
        folder,
        "face_first",
        tiny.SETTINGS,
        lambda path: shutil.copytree(after / "face_first", path, dirs_exist_ok=True),
        {"steps": 8},
    )
    verified(folder, "face_first")
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_what_a_killed_process_left_of_a_component_is_removed_unless_one_is_at_work(
    weights: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "weights"
    shutil.copytree(weights, folder)
    for name in (".face_first.new-dead", ".face_first.new-live", ".face_sequence.new-other"):
        (folder / name).mkdir()
    held = os.open(folder / ".face_first.new-live", os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_SH)
        network = MVControlNet.from_settings(tiny.SETTINGS, "face_first")
        save_component(folder, "face_first", tiny.SETTINGS, network.save_pretrained, {})
    finally:
        os.close(held)
    left = {path.name for path in folder.iterdir() if path.name.startswith(".")}
    assert left == {".face_first.new-live", ".face_sequence.new-other"}


@pytest.mark.parametrize("component", ["autoencoder", "lips", "face_first"])
@pytest.mark.parametrize(
    "added",
    ["diffusion_pytorch_model.safetensors.index.json", "diffusion_pytorch_model.fp16.safetensors", "sub/x.json"],
)
def test_an_added_index_or_shard_is_refused_by_every_loader(
    weights: Path, tmp_path: Path, component: str, added: str
) -> None:
    """Of whole pipelines and of single components, at a path, at a URL, and as the lips of a training."""
    folder = tmp_path / "weights"
    shutil.copytree(weights, folder)
    (folder / component / added).parent.mkdir(exist_ok=True)
    (folder / component / added).write_text("{}")
    loaders: list[Callable[[], object]] = [
        lambda: verified(folder, component),
        lambda: load_components(folder, ("face_first",)),
        lambda: export(folder, tmp_path / "out", (component,)),
        lambda: same_component(weights, folder, component),
        lambda: Pipeline.from_pretrained(f"file://{folder}", variants=("face_first",)),
    ]
    if component == "lips":
        loaders += [lambda: LipPlace(tiny.SETTINGS.lips, Folder(folder), in_pipeline=True).open()]
        loaders += [lambda: lip_place(tiny.SETTINGS, folder, "of other data", Folder(tmp_path)).open()]  # type: ignore
    if component == "face_first":
        loaders += [lambda: load_network(folder, "face_first")]
    for load in loaders:
        with pytest.raises(TccpError, match=r"is not in manifest\.json: remove it"):
            load()


def test_lips_of_a_remote_pipeline_are_compared_with_its_manifest(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training's workers on other machines open them there."""
    monkeypatch.setenv("TCCP_CACHE", str(tmp_path / "cache"))
    remote = Folder("memory://tccp-tests/pipeline")
    remote.upload(weights, "")
    place = LipPlace(tiny.SETTINGS.lips, remote, in_pipeline=True)
    assert place.open().hash == LipPlace(tiny.SETTINGS.lips, Folder(weights), in_pipeline=True).open().hash
    remote.write("lips/diffusion_pytorch_model.safetensors.index.json", b"{}")
    assert len(place.open().sources) == 1, "what the manifest does not name is not fetched"
    remote.write("lips/config.json", b"{}")
    monkeypatch.setenv("TCCP_CACHE", str(tmp_path / "another cache"))
    with pytest.raises(TccpError, match="not the file of the manifest"):
        LipPlace(tiny.SETTINGS.lips, Folder(remote.place), in_pipeline=True).open()
    remote.remove("")


@pytest.mark.parametrize("name", ["../face_sequence/config.json", "/etc/hostname", "diffusion_pytorch_model.bin", "x"])
def test_a_manifest_that_names_pickles_or_files_elsewhere_is_refused(weights: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "weights"
    shutil.copytree(weights, folder)
    manifest = read_manifest(folder)
    manifest["components"]["face_first"]["files"][name] = "0" * 64
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(TccpError, match=r"a component has only \.json and \.safetensors files below its own folder"):
        load_network(folder, "face_first")


def test_components_of_other_settings_are_refused(weights: Path) -> None:
    for change, name in {"picture_px": 64, "window": 8, "network.condition_dim": 32, "lips.source": "none"}.items():
        other = override(tiny.SETTINGS, {change: name})
        with pytest.raises(TccpError, match=f"weights of other settings: {re.escape(change)} is"):
            check_settings(weights, other)
    # Settings that do not change the networks' shapes may differ, such as steps and seed.
    check_settings(weights, override(tiny.SETTINGS, {"training.max_steps": 9, "seed": 5, "sampling.steps": 3}))
    check_settings(weights, override(tiny.SETTINGS, {"network.gradient_checkpointing": True, "network.dropout": 0.3}))


def test_has_component(weights: Path, tmp_path: Path) -> None:
    assert has_component(weights, "face_first")
    assert not has_component(weights, "face_second")
    assert not has_component(tmp_path, "face_first")


def test_another_preset_is_refused(weights: Path) -> None:
    assert load_components(weights, (), preset="toy").settings.preset == "toy"
    with pytest.raises(TccpError, match=r"holds weights of preset 'toy', not 'paper': .* --preset toy"):
        load_components(weights, (), preset="paper")


def test_settings_of_a_variant_reach_its_stage(tmp_path: Path) -> None:
    own = {
        "variant_overrides.face_sequence": {"sampling.steps": 5},
        "variant_overrides.face_first": {"sampling.temperature": 0.3},
    }
    settings = override(tiny.SETTINGS, own)
    write_untrained(tmp_path, settings, ("face_first", "face_sequence", "landmark_first", "landmark_sequence"))
    pipeline = load_components(tmp_path)
    assert pipeline.stage("face_sequence").settings.steps == 5
    assert pipeline.stage("face_sequence").settings.temperature == settings.sampling.temperature
    assert pipeline.stage("face_sequence").first_settings.temperature == 0.3
    assert pipeline.stage("face_sequence").first_settings.steps == settings.sampling.steps
    assert pipeline.stage("landmark_sequence").settings.steps == settings.sampling.steps


def test_the_command_line_overrides_the_settings_of_variants(film: Path, tmp_path: Path) -> None:
    from tccp.inference.film import with_sampling

    own = override(tiny.SETTINGS, {"variant_overrides.face_sequence": {"sampling.steps": 5}})
    write_untrained(tmp_path, own, TWO_STAGE)
    pipeline = load_components(tmp_path)
    request = tiny.request_of(film, tmp_path, tmp_path / "out.mp4", steps=3)
    overridden = dataclasses.replace(pipeline, settings=with_sampling(pipeline.settings, request))
    assert overridden.stage("face_sequence").settings.steps == overridden.stage("landmark_sequence").settings.steps == 3
    unchanged = tiny.request_of(film, tmp_path, tmp_path / "x.mp4")
    assert with_sampling(pipeline.settings, unchanged) == pipeline.settings


def test_a_pipeline_without_lips(film: Path, tmp_path: Path) -> None:
    """The ablation of section 5.5 generates without a lip source."""
    settings = override(tiny.SETTINGS, {"lips.source": "none"})
    write_untrained(tmp_path / "weights", settings)
    assert load_components(tmp_path / "weights").lips is None
    result, frames = tiny.generated(film, tmp_path / "weights", tmp_path / "out.mp4", steps=1)
    assert result.generated == len(frames) == FPS
    assert all(np.isfinite(frame.face).all() for frame in frames)


def test_unknown_settings_in_a_manifest_are_named_with_their_file(weights: Path, tmp_path: Path) -> None:
    manifest = json.loads((weights / "manifest.json").read_text())
    manifest["settings"]["window"] = -1
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(TccpError, match=r"manifest\.json: setting window"):
        read_settings(tmp_path)


def _save_one(folder: Path, name: str) -> None:
    save_component(folder, name, tiny.SETTINGS, lambda path: (path / "a.json").write_text(name), {})


def test_components_saved_side_by_side_are_all_in_the_manifest(tmp_path: Path) -> None:
    """Every thread opens the folder itself, so threads wait for the lock as processes do."""
    names = [f"component_{i}" for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: _save_one(tmp_path, name), names))
    assert sorted(read_manifest(tmp_path)["components"]) == names
    assert {path.name for path in tmp_path.iterdir()} == {*names, "manifest.json"}


def test_an_export_in_half_precision_is_about_half_the_size(weights: Path, tmp_path: Path) -> None:
    names = ("autoencoder", "lips", "face_first")
    export(weights, tmp_path / "out", names, half=True, machine="a test")
    sizes = [
        sum(p.stat().st_size for name in names for p in (f / name).rglob("*.safetensors"))
        for f in (weights, tmp_path / "out")
    ]
    assert sizes[1] < 0.6 * sizes[0]
    before, after = (load_components(folder, ("face_first",)) for folder in (weights, tmp_path / "out"))
    for one, other in (
        (before.networks["face_first"], after.networks["face_first"]),
        (before.autoencoder, after.autoencoder),
        (before.lips.network, after.lips.network),  # type: ignore[union-attr]
    ):
        for a, b in zip(one.parameters(), other.parameters(), strict=True):
            assert b.dtype == torch.float32
            assert torch.equal(a.half().float(), b)
    old, new = (read_manifest(f)["components"]["face_first"]["provenance"] for f in (weights, tmp_path / "out"))
    assert new == {**old, "precision": "fp16", "machine": "a test"}


def test_an_export_can_change_sampling_settings_only(weights: Path, tmp_path: Path) -> None:
    """An export of a pipeline without a lip source has none either."""
    given = ["sampling.steps=3", "variant_overrides.face_first.sampling.temperature=0.4"]
    assert export(weights, tmp_path / "out", sampling=given) == ("autoencoder", "lips", *TWO_STAGE)
    stage = load_components(tmp_path / "out").stage("face_sequence")
    assert (stage.settings.steps, stage.first_settings.steps) == (3, 3)
    assert (stage.settings.temperature, stage.first_settings.temperature) == (tiny.SETTINGS.sampling.temperature, 0.4)
    with pytest.raises(TccpError, match="--set seed=3"):
        export(weights, tmp_path / "other", sampling=["seed=3"])
    write_untrained(tmp_path / "mute", override(tiny.SETTINGS, {"lips.source": "none"}), TWO_STAGE)
    assert export(tmp_path / "mute", tmp_path / "mute2") == ("autoencoder", *TWO_STAGE)


def test_an_export_copies_files_unchanged_and_refuses_damaged_ones(weights: Path, tmp_path: Path) -> None:
    export(weights, tmp_path / "out", ("face_first",))
    assert read_manifest(tmp_path / "out")["components"] == {
        "face_first": read_manifest(weights)["components"]["face_first"]
    }
    broken = tmp_path / "broken"
    shutil.copytree(weights, broken)
    (broken / "face_first" / "config.json").write_text("{}")
    with pytest.raises(TccpError, match="not the file of the manifest"):
        export(broken, tmp_path / "other", ("face_first",))
    with pytest.raises(TccpError, match="has no one"):
        export(weights, tmp_path / "other", ("one",))
    assert not (tmp_path / "other").exists()
