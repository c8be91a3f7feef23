"""Trains pipeline folders from clip tables with the functions of `tccp train`."""

import hashlib
import json
import os
import subprocess
import sys
import time
from multiprocessing import active_children, get_context
from pathlib import Path

import pytest
import torch
from tiny_networks import WITH_DENOISED, small

from preprocessing.plan import make_plan
from preprocessing.run import preprocess
from tccp.errors import TccpError
from tccp.inference.components import load_components
from tccp.inference.manifest import MANIFEST, read_manifest
from tccp.inference.pipeline_folder import export, write_untrained
from tccp.models.variants import TWO_STAGE
from tccp.processes import in_processes
from tccp.roundtable import write_clips
from tccp.training.recipe import Trainer, recipe

SHORT = {
    "autoencoder.max_steps": 2,
    "training.max_steps": 2,
    "training.batch_size": 2,
    "headbox.draws": 1,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    write_clips(folder / "films", 2, 0.8, seed=5, width=128, height=96)
    preprocess([folder / "films"], folder / "clips", make_plan(small().picture_px, "truth"))
    return folder / "clips"


def files_of(weights):
    return {
        str(path.relative_to(weights)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(weights.rglob("*.safetensors"))
    }


def test_components_come_after_those_they_need():
    settings = small()
    assert recipe(settings)[0] == ("autoencoder", "lips")
    assert set(recipe(settings)[1]) == set(TWO_STAGE)
    generated = recipe(small(**{"training.initial_frames": "generated"}))
    assert generated[1:] == (("landmark_first", "face_first"), ("landmark_sequence", "face_sequence"))
    assert recipe(small(**{"training.start_from_first": True})) == generated
    assert recipe(small(**{"lips.source": "none"}))[0] == ("autoencoder",)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [pytest.param({}, id="plain"), pytest.param(WITH_DENOISED, id="denoised initial frames", marks=pytest.mark.soak)],
)
def test_parallel_training_gives_the_same_weights(data, tmp_path, changes):
    settings = small(**SHORT, **changes)
    one = Trainer(data, tmp_path / "one", settings, tmp_path / "storage1")
    assert set(one.train_missing()) == {"autoencoder", "lips", *TWO_STAGE}
    assert one.missing() == ()
    assert one.train_missing() == ()
    two = Trainer(data, tmp_path / "two", settings, tmp_path / "storage2")
    two.train_missing(jobs=2)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    assert len(files_of(tmp_path / "one")) == 6
    manifest = json.loads((tmp_path / "two" / MANIFEST).read_text())
    for component in manifest["components"].values():
        assert component["provenance"]["clips"] == 2
        assert component["provenance"]["git_commit"]
        assert component["provenance"]["machine"]
        assert component["provenance"]["steps"] == 2
        assert component["provenance"]["core_minutes"] >= 0
    pipeline = load_components(tmp_path / "two")
    assert not any(torch.isnan(p).any() for network in pipeline.networks.values() for p in network.parameters())


def test_networks_train_on_the_lips_of_their_pipeline(data, tmp_path):
    """For any footage, because generation uses the lips of the pipeline."""
    write_clips(tmp_path / "films", 2, 0.8, seed=6, width=128, height=96)
    preprocess([tmp_path / "films"], tmp_path / "clips", make_plan(small().picture_px, "truth"))
    settings, weights = small(**SHORT, **{"lips.liplet_steps": 2}), tmp_path / "w"
    Trainer(data, weights, settings, tmp_path / "storage").train(["autoencoder", "lips"])

    def sources(clips, storage):
        return Trainer(clips, weights, settings, tmp_path / storage).cache_for(["face_first"]).lips.sources

    lips = load_components(weights, ()).lips
    known, other = sources(data, "storage"), sources(tmp_path / "clips", "storage")
    assert known.hash == other.hash
    assert known.for_new_footage.hash == lips.hash
    elsewhere = sources(tmp_path / "clips", "elsewhere")
    assert [source.hash for source in elsewhere.sources] == [lips.hash]


def test_an_existing_run_is_resumed_only_on_request(data, tmp_path):
    settings = small(**SHORT)
    folder = tmp_path / "storage"
    Trainer(data, tmp_path / "w", settings, folder).train(["autoencoder"])
    again = Trainer(data, tmp_path / "w", settings, folder)
    with pytest.raises(TccpError, match="--resume"):
        again.train(["autoencoder"])
    Trainer(data, tmp_path / "w", settings, folder, resume=True).train(["autoencoder"])


def test_a_damaged_component_is_exported_again_when_its_training_is_resumed(data, tmp_path, caplog):
    """As after an interrupted replacement of an earlier version: files are gone, and the manifest names them."""
    settings, weights = small(**SHORT), tmp_path / "w"
    Trainer(data, weights, settings, tmp_path / "storage").train(["autoencoder"])
    before = files_of(weights)
    for path in weights.rglob("*.safetensors"):
        path.unlink()
    assert "autoencoder" not in Trainer(data, weights, settings, tmp_path / "storage").missing()
    resumed = Trainer(data, weights, settings, tmp_path / "storage", resume=True)
    assert resumed.missing()[0] == "autoencoder"
    assert "autoencoder is made again" in caplog.text
    lower = small(**SHORT, **{"autoencoder.learning_rate": 1e-5})
    Trainer(data, weights, lower, tmp_path / "storage", resume=True).train(["autoencoder"])
    assert files_of(weights) == before
    provenance = json.loads((weights / MANIFEST).read_text())["components"]["autoencoder"]["provenance"]
    assert provenance["changes"][0]["settings"]["autoencoder.learning_rate"]["is"] == 1e-5


def test_a_light_decoder_takes_the_place_of_a_full_one_in_a_copy_of_a_pipeline(data, tmp_path):
    settings, weights, light = small(**SHORT), tmp_path / "w", tmp_path / "light"
    write_untrained(weights, settings, ("face_first",))
    export(weights, light, ("autoencoder", "lips", "face_first"))
    trainer = Trainer(
        data,
        light,
        small(**SHORT, **{"autoencoder.decoder_folded_levels": 1}),
        tmp_path / "storage",
        pretrained_autoencoder=weights / "autoencoder",
    )
    trainer.train(["autoencoder"])
    pipelines = [load_components(folder, ("face_first",)) for folder in (weights, light)]
    assert [pipeline.autoencoder.decoder_folded_levels for pipeline in pipelines] == [0, 1]
    pictures = torch.rand(1, 3, 1, settings.picture_px, settings.picture_px) * 2 - 1
    before, after = (pipeline.autoencoder.encode(pictures, "face") for pipeline in pipelines)
    assert torch.equal(before, after)
    assert read_manifest(light)["components"]["autoencoder"]["provenance"]["steps"] == 2
    decoded = pipelines[1].autoencoder.decode(after, "face")
    assert decoded.shape == pictures.shape


def test_unknown_components_and_weights_of_other_settings_are_refused(data, tmp_path):
    settings = small(**SHORT)
    trainer = Trainer(data, tmp_path / "w", settings, tmp_path / "storage")
    with pytest.raises(TccpError, match="unknown component 'face'"):
        trainer.train(["face"])
    trainer.train(["autoencoder"])
    with pytest.raises(TccpError, match="holds weights of other settings"):
        Trainer(data, tmp_path / "w", small(**SHORT, window=5), tmp_path / "storage")
    longer, wider = {"training.max_steps": 9}, {"network.first_frame_channels": True}
    Trainer(data, tmp_path / "w", small(**SHORT, **{"variant_overrides.face_first": longer}), tmp_path / "storage")
    sparing = {"network.gradient_checkpointing": True, "network.dropout": 0.2}
    Trainer(data, tmp_path / "w", small(**SHORT, **sparing), tmp_path / "storage")
    Trainer(data, tmp_path / "w", small(**SHORT, **{"variant_overrides.face_first": sparing}), tmp_path / "storage")
    with pytest.raises(TccpError, match=r"of other settings: network\.base_channels is \d+ there and 48 here"):
        Trainer(data, tmp_path / "w", small(**SHORT, **{"network.base_channels": 48}), tmp_path / "storage")
    with pytest.raises(TccpError, match=r"holds weights of other settings: variant_overrides\.face_first"):
        Trainer(data, tmp_path / "w", small(**SHORT, **{"variant_overrides.face_first": wider}), tmp_path / "storage")


def test_a_run_with_other_settings_names_them_all_and_both_ways_on(data, tmp_path):
    folder = tmp_path / "storage"
    Trainer(data, tmp_path / "w", small(**SHORT), folder).train(["autoencoder"])
    changed = small(**SHORT | {"autoencoder.max_steps": 3, "training.ema_decay": 0.5})
    for resume in (False, True):
        with pytest.raises(TccpError) as caught:
            Trainer(data, tmp_path / "w", changed, folder, resume=resume).train(["autoencoder"])
        text = str(caught.value)
        assert "autoencoder.max_steps was 2 and is 3 now" in text
        assert "training.ema_decay was 0.9" in text and "and is 0.5 now" in text
        assert "--resume with the old values" in text and "--restart" in text
    Trainer(data, tmp_path / "w", changed, folder, restart=True).train(["autoencoder"])
    assert read_manifest(tmp_path / "w")["components"]["autoencoder"]["provenance"]["steps"] == 3
    with pytest.raises(TccpError, match="--resume continues a run and --restart removes it"):
        Trainer(data, tmp_path / "w", changed, folder, resume=True, restart=True)


_WAITING = """
import sys, time
from pathlib import Path
from tccp.training.recipe import _in_processes

def wait(path):
    import os
    path.write_text(str(os.getpid()))
    time.sleep(300)

if __name__ == "__main__":
    _in_processes(2, wait, [(Path(name),) for name in sys.argv[1:]])
"""


def test_training_processes_end_with_the_process_that_started_them(tmp_path):
    """Even if that process is killed, because orphans would overwrite checkpoints of the next run."""
    script = tmp_path / "waiting.py"
    script.write_text(_WAITING)
    marks = [tmp_path / "one", tmp_path / "two"]
    parent = subprocess.Popen([sys.executable, script, *marks])
    try:
        _until(lambda: all(mark.exists() and mark.read_text() for mark in marks))
    finally:
        parent.kill()
        parent.wait()
    for mark in marks:
        _until(lambda mark=mark: not _runs(int(mark.read_text())))


def test_an_error_ends_the_other_processes_at_once_and_no_other_child(tmp_path):
    context = get_context("fork")
    sibling = context.Process(target=time.sleep, args=(300,))  # of another part of the same program
    sibling.start()
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    started = time.monotonic()
    try:
        calls = [(tmp_path / "one", True), (tmp_path / "two", False), (tmp_path / "three", False)]
        with pytest.raises(TccpError, match="the loss is nan"):
            in_processes(context, 2, _wait_or_fail, calls, int)
        assert not _runs(int((tmp_path / "two").read_text()))
        assert not (tmp_path / "three").exists()
        assert sibling.is_alive() and other.poll() is None
        assert time.monotonic() - started < 30
    finally:
        sibling.terminate()
        sibling.join()
        other.kill()
        other.wait()


def _wait_or_fail(path, fails):
    path.write_text(str(os.getpid()))
    while fails and not path.with_name("two").exists():
        time.sleep(0.01)
    if fails:
        raise TccpError("the loss is nan")
    time.sleep(300)


def test_a_training_process_that_is_killed_is_an_error():
    context = get_context("fork")
    with pytest.raises(RuntimeError, match=r"a process ended with status -9 and without a result"):
        in_processes(context, 2, os.kill, [(0, 0)], lambda: os.kill(os.getpid(), 9))
    with pytest.raises(TccpError, match="jobs is 0"):
        in_processes(context, 1, _refuse, [("jobs is 0",)], int)
    assert not active_children()


def _refuse(message):
    raise TccpError(message)


def _until(condition, seconds=60):
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, f"the condition was still false after {seconds} s"
        time.sleep(0.1)


def _runs(pid):
    """Whether a process runs; a zombie, which no init process collects in a container, does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
