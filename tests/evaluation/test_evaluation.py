"""`tccp evaluate roundtable`: clips, rows compared with `tccp generate`, statistics, and a tiny complete run."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import tiny
import torch
from sklearn.dummy import DummyRegressor

from tccp import headbox
from tccp.config import FPS, Settings, VariantName, override
from tccp.errors import TccpError
from tccp.evaluation import benchmark_clips
from tccp.evaluation.benchmark_clips import EvaluationClip, clip_seeds, counterfactual_seeds, in_mid_speech, make_clip
from tccp.evaluation.face_probe import FaceProbe
from tccp.evaluation.figures import CLIP_FIGURES
from tccp.evaluation.methods import METHODS, Models, Shard, audio_shuffled, one_stage, per_frame, two_stage_generated
from tccp.evaluation.predictors import CUES, cue_features, cue_figures, mean_face
from tccp.evaluation.runner import QUICK, Extent, Measurements, evaluate_roundtable
from tccp.evaluation.score_table import (
    COMPARED,
    FIGURE_NAMES,
    OURS,
    RESAMPLES,
    ROW_NAMES,
    Pooled,
    Target,
    compare,
    interval,
    markdown_table,
    summarise,
    text_table,
)
from tccp.evaluation.sheet import choose_clips, render_sheet, sheet_clip
from tccp.evaluation.worker import (
    HeldOutResult,
    ReferenceResult,
    RowResult,
    Worker,
    counterfactual_work,
    drift_work,
    held_out_work,
    reference_work,
)
from tccp.inference.components import load_components
from tccp.inference.frames import SceneFrame
from tccp.inference.generation import Generator
from tccp.inference.pipeline_folder import export, write_untrained
from tccp.landmarks import head_pose
from tccp.media import open_audio, write_audio_wav
from tccp.media.mel import mel_windows
from tccp.models.variants import TWO_STAGE
from tccp.roundtable import synthesise

pytest_plugins = ["tiny_fixtures"]
FRAMES = 6  # a first frame, and windows of 3 and 2 new ones


# Clips


def test_seeds_of_different_purposes_do_not_overlap() -> None:
    """No two purposes share a clip, and none shares a person with the training films."""
    by_purpose = [clip_seeds(purpose, 300) for purpose in ("held_out", "reference", "prior", "drift", "counterfactual")]
    assert len({seed for seeds in by_purpose for seed in seeds}) == 5 * 300
    assert clip_seeds("held_out", 7) == by_purpose[0][:7]
    people = {int(np.random.default_rng([seed, 0]).integers(2**31)) for seeds in by_purpose for seed in seeds}
    for seed in (1, *range(1001, 1025), *range(1101, 1149), *range(1201, 1345)):  # as `write_clips` draws them
        trained = np.random.SeedSequence([seed, 2]).generate_state(512, np.uint32)
        assert people.isdisjoint(trained.tolist())


@pytest.fixture(scope="module")
def clips() -> tuple[EvaluationClip, ...]:
    return tuple(make_clip(seed, FRAMES, tiny.SETTINGS, width=128, height=96) for seed in (11, 12))


def test_clip_matches_the_synthesised_scene(clips: tuple[EvaluationClip, ...]) -> None:
    clip = clips[0]
    drawn = synthesise(11, (FRAMES + 5) / FPS, width=128, height=96)
    assert np.array_equal(clip.scenes[3], drawn.render(3))
    assert clip.num_frames == clip.truth.num_frames == len(clip.mel) == FRAMES
    x0, y0, x1, y1 = clip.truth.head_box[3]
    assert np.allclose(clip.points[3] * (x1 - x0) + (x0, y0), drawn.landmarks_px[3], atol=1e-3)
    inside = clip.scenes[3, int(y0) : int(y1), int(x0) : int(x1)].mean(axis=(0, 1))
    assert np.allclose(clip.faces[3].mean(axis=(0, 1)), inside, atol=3)
    fitted = headbox.SceneFit(128, 96, 32).fit(drawn.render(3))
    x0, y0, x1, y1 = clip.fitted_boxes[3]
    masked = np.zeros((32, 32), bool)
    masked[int(y0) : math.ceil(y1), int(x0) : math.ceil(x1)] = True
    assert (clip.masked_scenes[3][masked] == 127).all()
    assert np.array_equal(clip.masked_scenes[3][~masked], fitted[~masked])
    assert clip.identity.shape == (32, 32, 3)


def test_clip_with_a_later_start_equals_the_end_of_the_whole_clip(clips: tuple[EvaluationClip, ...]) -> None:
    """Frames, landmarks and sound equal those of the whole clip from that frame on."""
    whole, part = clips[0], make_clip(11, FRAMES - 4, tiny.SETTINGS, start=4, width=128, height=96)
    assert part.num_frames == part.truth.num_frames == FRAMES - 4
    assert np.array_equal(part.scenes[1], whole.scenes[5])
    assert np.array_equal(part.truth.mouth_opening, whole.truth.mouth_opening[4:])
    assert np.allclose(part.points, whole.points[4:], atol=1e-6)
    assert np.array_equal(part.audio, whole.audio[4 * 640 :])


def test_last_frame_has_true_sound_in_its_mel_window(clips: tuple[EvaluationClip, ...]) -> None:
    """Sound that is appended to the clip's does not change its mel windows."""
    clip = clips[0]
    noise = np.random.default_rng(0).uniform(-1, 1, 16000).astype(np.float32)
    assert np.array_equal(mel_windows(np.concatenate([clip.audio, noise]), 0, FRAMES), clip.mel)
    cut = mel_windows(np.concatenate([clip.audio[: FRAMES * 640], noise]), 0, FRAMES)
    assert not np.array_equal(cut, clip.mel)


def test_events_fall_within_the_evaluated_frames() -> None:
    kinds = set()
    for seed in clip_seeds("held_out", 16):
        clip = synthesise(seed, (benchmark_clips.HELD_OUT_FRAMES + 5) / FPS)
        kinds.add(clip.kind)
        assert all(0.3 < at_s < 1.2 for at_s in clip.event_s)
        assert len(clip.event_s) == (0 if clip.kind == "still" else 1)
        if clip.kind == "change":
            assert len(make_clip(seed, 1, tiny.SETTINGS).truth.event_s) == 0
    assert kinds == {"still", "change", "move"}


def test_wrong_clip_starts_in_mid_speech(clips: tuple[EvaluationClip, ...]) -> None:
    """It is an excerpt of the same length from later in its own clip."""
    other = in_mid_speech(clips[1])
    assert other.truth.num_frames == FRAMES
    assert other.truth.person_seed == clips[1].truth.person_seed
    assert clips[1].truth.mouth_opening[0] == 0
    longer = synthesise(12, (50 + 2 * FRAMES + 5) / FPS, width=128, height=96)
    assert np.array_equal(other.truth.mouth_opening, longer.mouth_opening[50 : 50 + FRAMES])


def test_counterfactual_listener_can_be_moved() -> None:
    (seed,) = counterfactual_seeds(1)
    left, right = (make_clip(seed, 2, tiny.SETTINGS, listener_deg=at).truth for at in (-50.0, 50.0))
    assert left.yaw_deg.mean() < -30
    assert right.yaw_deg.mean() > 30
    assert np.array_equal(left.head_box, right.head_box)


# Rows


@pytest.fixture(scope="module")
def models(weights: Path) -> Models:
    """The same untrained networks everywhere; the context-blind pipeline only lacks the scene."""
    pipeline = load_components(weights, TWO_STAGE)
    single = load_components(weights, ("one_stage_first", "one_stage_sequence"))
    blind = dataclasses.replace(pipeline, settings=override(pipeline.settings, {"context": "none"}))
    torch.manual_seed(0)
    ablations = {"no_lip": pipeline, "one_stage": single, "context_blind": blind}
    return Models(pipeline, ablations, {}, FaceProbe().eval())


def test_reported_work_equals_the_announced_work(models: Models) -> None:
    done: list[float] = []
    worker = Worker(models, done.append)
    for announced, work in (
        (held_out_work(models) * 2 * 9, lambda: worker.held_out([(0, 11), (1, 12)], 9, {}, [])),
        (drift_work(models) * 16, lambda: worker.drift([11], 16)),
        (counterfactual_work(models), lambda: worker.counterfactual(counterfactual_seeds(1))),
        (reference_work() * 9, lambda: worker.reference([11], 9)),
    ):
        done.clear()
        work()
        assert sum(done) == pytest.approx(announced)
        assert max(done) <= max(announced / 4, 1)


@pytest.fixture(scope="module")
def shard(models: Models, clips: tuple[EvaluationClip, ...]) -> Shard:
    return Shard(models, clips)


@pytest.mark.parametrize("row", ["two_stage_generated", "one_stage"])
def test_rows_equal_the_output_of_generate(
    models: Models, clips: tuple[EvaluationClip, ...], tmp_path: Path, row: str
) -> None:
    """Faces, landmarks and scenes equal those of a film generated with the clip's seed, up to batch rounding."""
    clip = clips[1]
    write_audio_wav(tmp_path / "sound.wav", clip.audio)
    frames = [SceneFrame(i, clip.scenes[i], clip.truth.head_box[i], i == 0) for i in range(FRAMES)]
    pipeline = models.ablations["one_stage"] if row == "one_stage" else models.pipeline
    with open_audio(tmp_path / "sound.wav") as sound:
        heard = dataclasses.replace(clip, audio=sound.samples[:], mel=mel_windows(sound, 0, FRAMES))
        generator = Generator(pipeline, sound, clip.identity, clip.truth.seed, one_stage=row == "one_stage")
        generated = list(generator.frames(frames))
    both = Shard(models, (clips[0], heard))
    output = both.outputs(METHODS[row].make(both))[1]
    assert output.faces is not None and output.scenes is not None
    for i, frame in enumerate(generated):
        assert frame.face is not None
        assert np.abs(output.faces[i].astype(int) - frame.face).max() <= 1
        assert np.abs(output.scenes[i].astype(int) - frame.picture).max() <= 2
    if row == "one_stage":
        assert output.points is None
    else:
        assert output.points is not None
        for points, frame in zip(output.points, generated, strict=True):
            assert np.isnan(points).all() or np.allclose(points, frame.points, atol=0.02)


def test_truth_row_reproduces_the_clip(shard: Shard) -> None:
    for clip, output in zip(shard.clips, shard.true_outputs(), strict=True):
        assert output.points is not None
        assert np.abs(output.points - clip.points).mean() < 0.02
        assert np.array_equal(output.faces, clip.faces)  # type: ignore[arg-type]
        assert np.array_equal(output.scenes, clip.scenes)  # type: ignore[arg-type]


def test_audio_shuffled_row_changes_only_the_sound(models: Models, clips: tuple[EvaluationClip, ...]) -> None:
    a, b = clips
    alike = Shard(models, (a, dataclasses.replace(b, audio=a.audio, mel=a.mel)))
    for ours, shuffled in zip(two_stage_generated(alike).face_latents, audio_shuffled(alike).face_latents, strict=True):
        assert torch.equal(ours, shuffled)
    apart = Shard(models, clips)
    assert not torch.equal(two_stage_generated(apart).face_latents[0], audio_shuffled(apart).face_latents[0])


def test_context_blind_row_does_not_depend_on_the_scene(models: Models, clips: tuple[EvaluationClip, ...]) -> None:
    a, b = clips
    seen = Shard(models, (a, b))
    elsewhere = Shard(models, (dataclasses.replace(a, masked_scenes=b.masked_scenes), b))
    blind, sees = models.ablations["context_blind"], models.pipeline
    assert torch.equal(seen.stage_one(blind, (a, b))[0], elsewhere.stage_one(blind, (a, b))[0])
    assert not torch.equal(seen.stage_one(sees, (a, b))[0], elsewhere.stage_one(sees, (a, b))[0])


def test_per_frame_row_starts_like_the_chain(shard: Shard) -> None:
    ours, alone = two_stage_generated(shard).face_latents, per_frame(shard).face_latents
    for chained, frames in zip(ours, alone, strict=True):
        torch.testing.assert_close(chained[:, 0], frames[:, 0], rtol=0, atol=1e-4)
        assert not torch.equal(chained[:, 1], frames[:, 1])
    assert one_stage(shard).landmark_latents is None


def test_only_requested_frames_are_read(shard: Shard) -> None:
    latents = shard.true_landmark_latents[0]
    whole, part = shard.read_points(latents), shard.read_points(latents, [2, 4])
    assert np.array_equal(part[[2, 4]], whole[[2, 4]], equal_nan=True)
    assert np.isnan(np.delete(part, [2, 4], axis=0)).all()


def ablation(folder: Path, *variants: VariantName, **changes: Any) -> None:
    settings: Settings = override(tiny.SETTINGS, changes)
    write_untrained(folder, settings, variants)


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("no_lip", {}, "lips.source=none"),
        ("context_blind", {}, "context=none"),
        ("no_lip", {"lips.source": "none", "window": 5}, "window"),
        ("no_lip", {"lips.source": "none", "seed": 3}, "another autoencoder"),
        ("context_blind", {"context": "none", "lips.liplet_steps": 3}, "differs from .* in lips"),
        ("one_stage", {}, "one_stage_first"),
    ],
)
def test_incompatible_ablations_are_refused(
    weights: Path, tmp_path: Path, name: str, changes: dict[str, Any], expected: str
) -> None:
    ablation(tmp_path / name, **changes)
    with pytest.raises(TccpError, match=expected):
        Models.load(weights, tmp_path)


def test_missing_ablations_are_listed(weights: Path, tmp_path: Path) -> None:
    ablation(tmp_path / "no_lip", "face_first", "face_sequence", **{"lips.source": "none"})
    models = Models.load(weights, tmp_path)
    assert set(models.ablations) == {"no_lip"}
    assert set(models.missing) == {"one_stage", "context_blind"}
    assert models.ablations["no_lip"].lips is None
    export(weights, tmp_path / "half", ("autoencoder", "lips", *TWO_STAGE), half=True)  # as the packaged weights are
    assert set(Models.load(tmp_path / "half", tmp_path).ablations) == {"no_lip"}
    with pytest.raises(TccpError, match="not a folder"):
        Models.load(weights, tmp_path / "nowhere")


# Predictors


def test_cues_do_not_depend_on_head_yaw_or_mouth() -> None:
    clip = synthesise(3, 0.4)
    turned = clip.with_head(yaw_deg=-clip.yaw_deg, mouth_opening=clip.mouth_opening[::-1].copy())
    for cue in CUES:
        assert np.array_equal(cue_features(cue, clip), cue_features(cue, turned))
    assert cue_features("mask_body", clip).shape[1] > cue_features("mask_only", clip).shape[1]


def test_predictor_figures_match_a_direct_computation(clips: tuple[EvaluationClip, ...]) -> None:
    clip = clips[0]
    features = cue_features("mask_only", clip.truth)
    ahead = DummyRegressor(strategy="constant", constant=5.0).fit(features, np.zeros(FRAMES))
    expected = np.abs(head_pose(clip.points).yaw_deg - 5).mean()
    assert cue_figures("mask_only", ahead, clip)["yaw_mae_deg_landmarks"] == pytest.approx(expected, rel=1e-5)


def test_mean_face_is_frontal_and_inside_the_crop() -> None:
    mean = mean_face(32)
    assert abs(float(head_pose(mean.points[None]).yaw_deg[0])) < 15
    assert 0.2 < mean.points[:, 0].min() < mean.points[:, 0].max() < 0.8
    assert mean.face.std() > 10


# Report


def test_intervals_match_scipys_bootstrap() -> None:
    values = np.random.default_rng(1).normal(2, 1, 60)
    cell = interval(np.append(values, np.nan))
    assert cell is not None
    theirs = scipy.stats.bootstrap((values,), np.mean, n_resamples=20 * RESAMPLES, method="percentile", rng=2)
    assert cell["mean"] == pytest.approx(values.mean(), rel=1e-4)
    assert cell["low"] == pytest.approx(theirs.confidence_interval.low, abs=0.04)
    assert cell["high"] == pytest.approx(theirs.confidence_interval.high, abs=0.04)
    assert interval(np.array([np.nan])) is None
    assert interval(np.array([3.0])) == {"mean": 3.0, "low": None, "high": None}


def test_pooled_intervals_match_the_standard_error() -> None:
    values = np.random.default_rng(1).normal(0, 1, 80)
    ours = Pooled.of(80, lambda clips: float(values[clips].mean()))
    theirs = Pooled.of(80, lambda clips: float(values[clips].mean() - 1))
    cell = ours.cell()
    assert cell is not None and cell["high"] is not None and cell["low"] is not None
    assert cell["high"] - cell["low"] == pytest.approx(2 * 1.96 * values.std() / np.sqrt(80), rel=0.2)
    assert ours.cell(minus=theirs) == {"mean": 1.0, "low": 1.0, "high": 1.0}  # paired: the same clips are drawn


def test_differences_are_paired() -> None:
    """If the difference is equal in all clips, its interval has zero width, even if the clips themselves differ."""
    values = np.random.default_rng(0).normal(size=20)
    samples = {OURS: {"psnr": values, "ssim": values}, "one_stage": {"psnr": values - 0.5}}
    found = compare(samples, {})[f"{OURS} - one_stage"]
    assert found == {"psnr": {"mean": 0.5, "low": 0.5, "high": 0.5}}
    assert compare({"one_stage": samples["one_stage"]}, {}) == {}


def test_targets_are_met_missed_or_undecided() -> None:
    samples = {
        OURS: {
            "psnr": np.full(9, 20.0),
            "ssim": np.linspace(-1, 1, 9),
            "yaw_mae_deg_landmarks": np.full(9, 5.0),
        },
        "mask_body": {"yaw_mae_deg_landmarks": np.full(9, 20.0)},
    }
    rows, differences = summarise(samples, {}), compare(samples, {})

    def met(*target: Any) -> bool | None:
        return Target(*target).record(rows, differences)["met"]

    assert met("psnr", "at least", 20.0) is True
    assert met("psnr", "at least", 20.1) is False
    assert met("psnr", "at most", 19.0) is False
    assert met("psnr", "within", 21.0) is True
    assert met("ssim", "within", 0.1) is True
    assert met("ssim", "surely within", 0.1) is False
    assert met("ssim", "surely within", 2.0) is True
    assert met("seam", "at least", 0.0) is None
    assert met("yaw_mae_deg_landmarks", "below", "mask_body") is True
    assert met("yaw_mae_deg_landmarks", "below", "context_blind") is None


def test_every_figure_of_a_clip_is_in_the_table() -> None:
    assert set(CLIP_FIGURES) <= set(FIGURE_NAMES)
    assert len(set(FIGURE_NAMES)) == len(FIGURE_NAMES)
    assert set(METHODS) <= set(ROW_NAMES)
    assert set(COMPARED) <= set(ROW_NAMES)


def test_identity_is_ranked_among_sixteen_people() -> None:
    """Candidates are the talker, the talkers of the next clips, then others; a row with the next talker scores 0."""
    people = np.eye(20, dtype=np.float32)
    features = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    held_out = []
    for k in range(3):
        shown = {"right": people[[k] * 3], "next": people[[(k + 1) % 3] * 3]}
        rows = {row: RowResult({}, identity, features) for row, identity in shown.items()}
        held_out.append(HeldOutResult(rows, people[k]))
    found = Measurements(held_out, [ReferenceResult(people[3 + k], features) for k in range(3)], [], [])
    samples = found.samples()
    assert samples["right"]["identity_top1"].tolist() == [1, 1, 1]
    assert samples["next"]["identity_top1"].tolist() == [0, 0, 0]
    assert found.pooled()["right"]["frechet"].value == pytest.approx(0, abs=1e-3)


# Sheet


def test_the_sheet_shows_five_clips(shard: Shard) -> None:
    assert choose_clips(128) == [0, 32, 64, 95, 127]
    assert choose_clips(3) == [0, 1, 2]
    truth, figures = shard.true_outputs(), dict.fromkeys(CLIP_FIGURES, 0.5)
    parts = [sheet_clip(k, clip, truth[k], clip.faces, figures) for k, clip in enumerate(shard.clips)]
    one, two = render_sheet(parts[:1]), render_sheet(parts)
    assert np.array_equal(two[: len(one)], one)
    assert len(two) == 2 * len(one)
    assert one.std() > 20


# A complete run

TINY = Extent(clips=2, drift=1, counterfactual=1, prior=8, frames=14, drift_frames=32)


@pytest.fixture(scope="module")
def record(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    sheet = tmp_path_factory.mktemp("sheet") / "sheet.png"
    found = evaluate_roundtable(weights, None, TINY, sheet=sheet)
    assert sheet.stat().st_size > 10_000
    return found


def test_the_record_is_json_with_every_row_and_figure(record: dict[str, Any]) -> None:
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert set(record["rows"]) == set(ROW_NAMES)
    assert all(set(figures) == set(FIGURE_NAMES) for figures in record["rows"].values())
    assert (record["benchmark"], record["clips"], record["frames"]) == ("roundtable", 2, 14)
    assert set(record["missing"]) == {"no_lip", "one_stage", "context_blind"}
    assert record["weights"]["components"]["face_first"]["steps"] == 0


def test_undefined_figures_are_null(record: dict[str, Any]) -> None:
    rows = record["rows"]
    assert all(cell is None for cell in rows["one_stage"].values())
    assert [name for name, cell in rows["mask_body"].items() if cell] == ["yaw_mae_deg_landmarks", "side_accuracy"]
    assert rows["per_frame"]["mouth_corr_landmarks"] is None
    assert rows["per_frame"]["psnr"]["mean"] > 0
    assert rows["truth"]["mouth_corr_landmarks"]["mean"] > 0.8
    assert rows["truth"]["listener_slope"]["mean"] == pytest.approx(1, abs=0.25)
    assert rows["truth"]["seam"]["mean"] == pytest.approx(1)
    assert rows["two_stage_generated"]["drift_10"] is not None
    assert rows["two_stage_generated"]["drift_50"] is None  # the chain is shorter
    assert f"{OURS} - per_frame" in record["differences"]


def test_record_as_text_and_markdown(record: dict[str, Any]) -> None:
    text, markdown = text_table(record), markdown_table(record)
    for words in ("two_stage_generated", "mask_body", "targets:", "no row one_stage: "):
        assert words in text
        assert words in markdown
    table = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table[:3]}) == 1


@pytest.mark.slow
def test_figures_do_not_depend_on_the_number_of_processes(weights: Path, record: dict[str, Any]) -> None:
    parallel = evaluate_roundtable(weights, None, TINY, jobs=2)
    for key in ("rows", "differences"):
        assert parallel[key] == record[key]


def test_invalid_options_are_refused(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(TccpError, match="--clips 1"):
        dataclasses.replace(QUICK, clips=1)
    with pytest.raises(TccpError, match="--jobs 0"):
        evaluate_roundtable(weights, jobs=0)
    with pytest.raises(TccpError, match="--sheet"):
        evaluate_roundtable(weights, sheet=tmp_path)


def test_benchmark_page_matches_the_recorded_results() -> None:
    """The tables in docs/benchmark.md are those of docs/roundtable.json (`python benchmarks/docs_tables.py`)."""
    path = tiny.ROOT / "docs" / "roundtable.json"
    if not path.exists():
        pytest.skip("the packaged weights have not been measured yet")
    record = json.loads(path.read_text())
    assert markdown_table(record) in (tiny.ROOT / "docs" / "benchmark.md").read_text()
    assert record["clips"] >= 128
