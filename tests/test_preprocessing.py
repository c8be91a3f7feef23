"""Raw footage to the clip table: every frame is accounted for, times are the film's, bad files stop nothing."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from preprocessing import faces as face_steps
from preprocessing.cut import cut_clips
from preprocessing.decode import frames_at
from preprocessing.faces import find_tracks, runs
from preprocessing.headbox import fit_head_boxes
from preprocessing.pipeline import find_sources, preprocess
from preprocessing.probe import probe_sources
from preprocessing.quality import blur, brightness, face_px
from preprocessing.rows import ROW_SCHEMA, render_clips
from preprocessing.spans import Span, spans_from_table, spans_to_table
from preprocessing.truth import read_tracks
from tccp import headbox, media, roundtable
from tccp.clip import ClipTable, clip_from_row, decode_still
from tccp.config import FPS, SAMPLES_PER_FRAME, TccpError, toy
from tccp.data import view
from tccp.shots import CutFinder

TOY = toy()


@pytest.fixture(scope="module")
def footage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One film of 160 frames and one of 50, each with its truth; lossless, so that pictures can be compared."""
    folder = tmp_path_factory.mktemp("footage")
    roundtable.write_clips(folder, 1, 6.4, seed=1, lossless=True)
    roundtable.write_clips(folder, 1, 2.0, seed=2, lossless=True)
    return folder


@pytest.fixture(scope="module")
def long_film(footage: Path) -> Path:
    return footage / "roundtable_1_0000.mp4"


def one_source(path: Path) -> pa.Table:
    return spans_to_table([Span(str(path), path.name)])


def from_truth(path: Path, max_clip_s: float = 5.0) -> pa.Table:
    return cut_clips(fit_head_boxes(read_tracks(probe_sources(one_source(path)))), max_clip_s)


def covered(spans: list[Span]) -> list[int]:
    return sorted(frame for span in spans for frame in range(span.start_frame, span.stop_frame))


# Spans


def a_run(start: int = 100, num_frames: int = 60, track: int = 0, **changes: Any) -> Span:
    rng = np.random.default_rng(start)
    span = Span(
        path="film.mp4",
        source="film.mp4",
        source_hash="ab",
        width=64,
        height=48,
        start_frame=start,
        num_frames=num_frames,
        track=track,
        landmarks_px=rng.random((num_frames, 68, 2), np.float32),
        confidence=np.ones(num_frames, np.float32),
        head_box=np.arange(start, start + num_frames, dtype=np.float32)[:, None] + np.array([0, 0, 9, 9], np.float32),
    )
    return dataclasses.replace(span, **changes)


def test_spans_come_back_from_their_table() -> None:
    spans = [a_run(), Span("x.mp4", "x.mp4", reason="no_audio", message="silent film", warnings=("a", "b"))]
    for before, after in zip(spans, spans_from_table(spans_to_table(spans)), strict=True):
        for field in dataclasses.fields(Span):
            np.testing.assert_equal(getattr(after, field.name), getattr(before, field.name))


def test_a_bare_list_of_paths_is_a_batch_of_spans() -> None:
    (span,) = spans_from_table(pa.table({"path": ["a/b.mp4"], "source": ["b.mp4"]}))
    assert (span.path, span.source, span.reason, span.num_frames) == ("a/b.mp4", "b.mp4", None, 0)


# Cutting, identity


@given(
    lengths=st.lists(st.integers(1, 200), min_size=1, max_size=4),
    max_frames=st.integers(32, 130),
    given_identity=st.booleans(),
)
def test_clips_keep_their_bounds_and_every_frame_is_accounted_for(
    lengths: list[int], max_frames: int, given_identity: bool
) -> None:
    path = "identity.png" if given_identity else None
    starts = np.cumsum([0, *[length + 20 for length in lengths]])
    track = [a_run(int(s), n, identity_path=path) for s, n in zip(starts, lengths, strict=False)]
    cut = spans_from_table(cut_clips(spans_to_table(track), max_frames / FPS))
    assert covered(cut) == covered(track)
    for clip in cut:
        if clip.reason is None:
            assert 16 <= clip.num_frames <= max_frames
            if given_identity:
                assert clip.identity_path == path and not clip.identity_frames
            else:
                own = set(range(clip.start_frame, clip.stop_frame))
                assert 1 <= len(clip.identity_frames) <= 4 and not own & set(clip.identity_frames)
                assert clip.identity_box is not None
                np.testing.assert_array_equal(clip.identity_box[:, 0], clip.identity_frames)  # each with its own box
        elif clip.reason == "too_short":
            assert clip.num_frames < 17
        else:
            assert clip.reason == "identity" and clip.num_frames <= 4 and len(lengths) == 1
    if max(lengths) >= 17:
        assert any(clip.reason is None for clip in cut)


def test_a_single_short_film_makes_two_clips_that_show_each_others_person() -> None:
    first, second = spans_from_table(cut_clips(spans_to_table([a_run(0, 73)])))
    assert (first.start_frame, first.stop_frame, second.stop_frame) == (0, 36, 73)
    assert min(first.identity_frames) >= 36 > max(second.identity_frames)
    assert len(set(first.identity_frames)) == 4


def test_identity_comes_from_the_same_track_and_from_frames_where_a_face_was_seen() -> None:
    bridged = a_run(0, 60, confidence=np.repeat(np.array([1, 0], np.float32), [30, 30]))
    cut = spans_from_table(cut_clips(spans_to_table([bridged, a_run(200, 40, track=1)])))
    assert all(f < 30 for clip in cut if clip.track == 0 for f in clip.identity_frames)
    assert all(f >= 200 for clip in cut if clip.track == 1 for f in clip.identity_frames)
    assert [clip.reason for clip in cut] == ["no_identity", None, None, None]  # frames 0-29 have nobody else to show


def test_a_clip_bound_that_cannot_be_kept_is_refused() -> None:
    with pytest.raises(TccpError, match=r"max_clip_s 1 is too short: give at least 1.28 seconds, twice the shortest"):
        cut_clips(spans_to_table([a_run()]), 1.0)


# Faces in time


@given(st.lists(st.booleans(), max_size=60), st.integers(0, 5))
def test_runs_bridge_short_gaps_only(seen: list[bool], max_bridged: int) -> None:
    stretches = runs(np.array(seen, bool), max_bridged)
    inside = {i for first, stop in stretches for i in range(first, stop)}
    assert {i for i, s in enumerate(seen) if s} <= inside
    text = "".join("x" if s else "." for s in seen)
    for first, stop in stretches:
        assert text[first] == text[stop - 1] == "x"
        assert "." * (max_bridged + 1) not in text[first:stop]
    for (_, stop), (first, _) in itertools.pairwise(stretches):
        assert first - stop > max_bridged


class Person:
    """A face backend that knows where the face is: on every frame but those that `away` lists."""

    name = "known"

    def __init__(self, away: set[int]) -> None:
        self.frame, self.away = 0, away

    def detect(self, frame: np.ndarray) -> list[face_steps.faces.Face]:
        if frame.shape[0] == frame.shape[1]:
            return []  # a tile: this person is large, and away
        i, self.frame = self.frame, self.frame + 1
        if i in self.away:
            return []
        points = np.linspace(20, 60, 136, dtype=np.float32).reshape(68, 2) + i
        return [face_steps.faces.Face(np.array([20, 20, 60, 60], np.float32) + i, points, 0.9)]

    def close(self) -> None: ...


def test_gaps_end_a_clip_or_are_bridged_in_a_straight_line(long_film: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    away = {*range(40, 52), *range(90, 103)}  # 12 frames: 0.48 s; 13: 0.52 s
    monkeypatch.setattr(face_steps.faces, "open_backend", lambda name, weights: Person(away))
    (table,) = find_tracks(probe_sources(one_source(long_film)), "known")
    spans = spans_from_table(table)
    assert [(s.start_frame, s.stop_frame, s.reason) for s in spans] == [
        (0, 90, None),
        (90, 103, "no_face"),
        (103, 160, None),
    ]
    points, confidence = spans[0].landmarks_px, spans[0].confidence
    assert points is not None and confidence is not None
    np.testing.assert_allclose(points[:, 0, 0], 20 + np.arange(90), atol=1e-4)
    assert (np.flatnonzero(confidence == 0) == np.arange(40, 52)).all()


class SmallFaces:
    """A face backend that sees one white square, if it is at least a tenth of the picture's longer side."""

    name = "squares"

    def detect(self, frame: np.ndarray) -> list[face_steps.faces.Face]:
        white = np.argwhere(frame[..., 0] > 0)
        if len(white) == 0 or np.ptp(white, axis=0).max() + 1 < 0.1 * max(frame.shape):
            return []
        low, high = white.min(0)[::-1], white.max(0)[::-1] + 1
        return [face_steps.faces.Face(np.concatenate([low, high]).astype(np.float32), None, 0.5)]

    def close(self) -> None: ...


@pytest.mark.parametrize("place", [0, 100, 170, 296])
@pytest.mark.parametrize("upright", [False, True])
def test_a_face_too_small_for_the_whole_frame_is_found_once_and_in_its_place(place: int, upright: bool) -> None:
    frame = np.zeros((160, 320, 3), np.uint8)
    frame[60:84, place : place + 24] = 255
    expected = [place, 60, place + 24, 84]
    if upright:
        frame, expected = np.ascontiguousarray(frame.transpose(1, 0, 2)), [60, place, 84, place + 24]
    assert not SmallFaces().detect(frame)
    (face,) = face_steps.detect(SmallFaces(), frame)
    np.testing.assert_array_equal(face.box, expected)


# Shots, decoding, quality


def test_cuts_are_found_and_pans_are_not() -> None:
    rng = np.random.default_rng(0)
    worlds = [cv2.resize(rng.integers(0, 256, (3, 12, 3), np.uint8), (400, 90)) for _ in range(2)]
    finder, cuts = CutFinder(), []
    for i in range(60):
        cuts += finder.add(np.ascontiguousarray(worlds[i >= 23][:, 3 * i : 3 * i + 160]))
    assert cuts == [23]


def test_frames_at_are_the_films_own(long_film: Path) -> None:
    frames = list(media.read_frames(long_film))
    wanted = [0, 1, 7, 130, 159]  # a jump far enough to seek
    found = list(frames_at(long_film, wanted))
    assert [frame for frame, _ in found] == wanted
    for frame, picture in found:
        np.testing.assert_array_equal(picture, frames[frame])


def test_blur_and_brightness_follow_what_is_done_to_a_picture() -> None:
    rng = np.random.default_rng(0)
    sharp = rng.integers(0, 256, (64, 64, 3), np.uint8)
    values = [blur(sharp), *(blur(cv2.GaussianBlur(sharp, (0, 0), sigma)) for sigma in (1, 2, 4))]
    assert all(0 <= v <= 1 for v in values) and values == sorted(values) and values[-1] - values[0] > 0.3
    one_way = cv2.GaussianBlur(sharp, (1, 31), 0, sigmaY=4)  # motion blur counts as blur
    assert blur(one_way) > values[1]
    assert blur(np.zeros((8, 8, 3), np.uint8)) == 1
    assert brightness(np.full((4, 4, 3), 51, np.uint8)) == pytest.approx(0.2)
    points = np.zeros((3, 68, 2), np.float32)
    points[:, 8, 1] = [40, 50, 60]
    assert face_px(points) == 50


# RoundTable, whole


@pytest.fixture(scope="module")
def table(footage: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClipTable]:
    out = tmp_path_factory.mktemp("table")
    report = preprocess([footage], out, TOY, "truth")
    assert (report.clips, report.frames, report.reasons) == (3, 210, {})
    with ClipTable(out) as opened:
        yield opened


def test_rows_are_the_films_frames_sound_and_truth(table: ClipTable, footage: Path) -> None:
    assert [(c.source, c.start_frame, c.num_frames) for c in table] == [
        ("roundtable_1_0000.mp4", 0, 80),
        ("roundtable_1_0000.mp4", 80, 80),
        ("roundtable_2_0000.mp4", 0, 50),
    ]
    for clip in table:
        path = footage / clip.source
        truth = roundtable.read_truth(path)
        part = slice(clip.start_frame, clip.start_frame + clip.num_frames)
        frames = list(media.read_frames(path, clip.start_frame, clip.num_frames))
        np.testing.assert_array_equal(clip.head_box, truth.head_box[part])
        fit = headbox.SceneFit(clip.source_width, clip.source_height, TOY.picture_px)
        seen = view(clip, TOY, None, 0)
        for i in (0, 17, clip.num_frames - 1):
            box = clip.head_box[i]
            np.testing.assert_allclose(
                headbox.from_crop(clip.landmarks[i], box), truth.landmarks_px[part][i], atol=1e-3
            )
            np.testing.assert_array_equal(decode_still(clip.scene[i]), fit.fit(frames[i]))
            direct = headbox.crop(frames[i], box, TOY.picture_px)
            error = np.abs(seen.face[i].astype(float) - direct)
            assert error.mean() < 4  # cropped twice and JPEG-coded once
        with media.open_audio(path) as sound:
            heard = sound.samples[part.start * SAMPLES_PER_FRAME : part.stop * SAMPLES_PER_FRAME]
            assert np.abs(clip.audio[: len(heard)] / 32768 - heard).max() <= 0.5 / 32768 + 1e-7
        identity = cv2.cvtColor(decode_still(clip.identity[0]), cv2.COLOR_RGB2GRAY)
        given = cv2.cvtColor(roundtable.read_identity(path), cv2.COLOR_RGB2GRAY)
        given = cv2.resize(given, identity.shape, interpolation=cv2.INTER_AREA)
        assert np.corrcoef(identity.ravel(), given.ravel())[0, 1] > 0.97


def test_the_same_footage_writes_the_same_bytes_wherever_it_lies(footage: Path, tmp_path: Path) -> None:
    shutil.copytree(footage, tmp_path / "moved")
    preprocess([footage], tmp_path / "a", TOY, "truth")
    preprocess([tmp_path / "moved"], tmp_path / "b", TOY, "truth")
    for name in ("clips.parquet", "report.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_set_aside_spans_are_rows_of_the_same_table_with_a_reason(long_film: Path) -> None:
    batch = spans_to_table([*spans_from_table(from_truth(long_film)), a_run(3, 5).set_aside("no_face", "nobody")])
    rows = pa.concat_tables(render_clips(batch, TOY.picture_px))
    assert rows.schema.equals(ROW_SCHEMA)
    assert rows.column("reason").to_pylist() == ["no_face", None, None]
    gone = rows.slice(0, 1).to_pylist()[0]
    assert (gone["source"], gone["start_s"], gone["num_frames"], gone["scene"]) == ("film.mp4", 0.12, 5, None)


def test_max_clip_s_bounds_the_clips(long_film: Path) -> None:
    spans = spans_from_table(from_truth(long_film, 2.0))
    assert [s.num_frames for s in spans] == [40, 40, 40, 40]
    assert len(spans_from_table(from_truth(long_film, 8.0))) == 1


def test_min_clip_s_keeps_shorter_clips_in(tmp_path: Path) -> None:
    roundtable.write_clips(tmp_path, 1, 1.6, seed=1, excerpt_s=0.4)
    table = fit_head_boxes(read_tracks(probe_sources(find_sources([tmp_path]))))
    (kept,) = spans_from_table(cut_clips(table, min_clip_s=0.4))
    assert (kept.num_frames, kept.reason) == (10, None)
    (gone,) = spans_from_table(cut_clips(table, min_clip_s=0.44))
    assert gone.reason == "too_short"
    assert "10 frames of a face in a row; a clip needs 11" in str(gone.message)
    with pytest.raises(TccpError, match="min_clip_s 0 is too short"):
        cut_clips(table, min_clip_s=0.0)


def test_speed_on_roundtable_footage(long_film: Path) -> None:
    """At least 150 frames per second of processor time, even with every array's shape checked as here."""
    start = time.process_time()
    rows = list(render_clips(from_truth(long_film), TOY.picture_px))
    assert sum(row.column("num_frames")[0].as_py() for row in rows) / (time.process_time() - start) >= 150


def test_memory_is_that_of_one_clip_however_long_the_film(long_film: Path) -> None:
    def peak(max_frames: int) -> int:
        (span,) = spans_from_table(read_tracks(probe_sources(one_source(long_film))))
        batch = cut_clips(spans_to_table([span.cut(0, max_frames)]), 32 / FPS)
        tracemalloc.start()
        for _ in render_clips(batch, TOY.picture_px):
            pass
        high = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return high

    two, five = peak(64), peak(160)  # a clip is made while the one before is still held here
    assert five < 1.25 * two


# Reports and bad files


def test_every_frame_is_counted_and_every_bad_file_has_a_reason(footage: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "empty.mp4").touch()
    (bad / "text.mp4").write_text("no film at all " * 30)
    shutil.copy(footage / "roundtable_2_0000.mp4", bad / "untold.mp4")  # no truth beside it
    with media.VideoWriter(bad / "silent_film.mp4", 64, 48) as film:
        for _ in range(20):
            film.write(np.zeros((48, 64, 3), np.uint8))
    media.write_audio_wav(bad / "sound.wav", np.zeros(16000, np.float32))
    again = bad / "again.mp4"
    shutil.copy(footage / "roundtable_1_0000.mp4", again)
    sources = [footage / "roundtable_1_0000.mp4", bad, bad / "sound.wav", bad / "absent.mp4"]
    report = preprocess(sources, tmp_path / "out", TOY, "truth")
    assert {s.source: s.reason for s in report.sources} == {
        "roundtable_1_0000.mp4": None,
        "again.mp4": "duplicate",
        "empty.mp4": "empty_file",
        "silent_film.mp4": "no_audio",
        "text.mp4": "not_media",
        "untold.mp4": "no_truth",
        "sound.wav": "no_video",
        "absent.mp4": "missing",
    }
    for source in report.sources:
        assert source.frames == source.frames_in_clips + sum(source.left_out.values())
        assert source.message is None or ("\n" not in source.message and source.source in source.message)
    stored = json.loads((tmp_path / "out" / "report.json").read_text())
    assert stored["clips"] == report.clips == 2 and len(stored["sources"]) == 8
    assert stored["reasons"]["duplicate"] == 1


def test_no_clip_at_all_is_one_line_and_no_file(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("no film")
    with pytest.raises(TccpError, match=r"empty\.mp4.*empty.*\(2 sources, none gave a clip\)") as caught:
        preprocess([tmp_path], tmp_path / "out", TOY, "truth")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "out").glob("*"))


def test_sources_are_films_of_a_folder_and_files_by_name(tmp_path: Path) -> None:
    for name in ("b.mp4", "a.MOV", "deep/c.mkv", "notes.txt", "b.truth.npz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / ".b.0f1e.partial.mp4").touch()  # what a writer that was killed leaves
    found = find_sources([tmp_path, tmp_path / "notes.txt"])
    assert found.column("source").to_pylist() == ["a.MOV", "b.mp4", "deep/c.mkv", "notes.txt"]
    (tmp_path / "none").mkdir()
    with pytest.raises(TccpError, match="holds no film"):
        find_sources([tmp_path / "none"])
    with pytest.raises(TccpError, match="no source was given"):
        find_sources([])


def test_silence_is_valid_with_a_warning_and_sound_bounds_the_clips(tmp_path: Path, footage: Path) -> None:
    source = footage / "roundtable_2_0000.mp4"
    copy = tmp_path / "film.mp4"
    with media.VideoWriter(copy, 256, 192, audio_from=np.zeros(50 * SAMPLES_PER_FRAME, np.float32)) as film:
        for frame in media.read_frames(source):
            film.write(frame)
    shutil.copy(roundtable.truth_path(source), roundtable.truth_path(copy))
    shutil.copy(roundtable.identity_path(source), roundtable.identity_path(copy))
    (report,) = preprocess([copy], tmp_path / "out", TOY, "truth").sources
    assert report.clips == 1 and report.frames_in_clips == 50
    assert len(report.warnings) == 1 and "silent" in report.warnings[0]


def test_a_truth_file_of_another_film_is_noticed(tmp_path: Path, footage: Path) -> None:
    film = tmp_path / "film.mp4"
    shutil.copy(footage / "roundtable_1_0000.mp4", film)
    shutil.copy(footage / "roundtable_2_0000.truth.npz", roundtable.truth_path(film))
    (span,) = spans_from_table(read_tracks(probe_sources(one_source(film))))
    assert span.reason == "other_truth" and "tccp synth" in str(span.message)


@pytest.mark.cluster
def test_every_step_runs_in_ray_data_unchanged(footage: Path) -> None:
    ray = pytest.importorskip("ray")
    ray.init(address="local", num_cpus=1, include_dashboard=False)
    try:
        data = ray.data.from_arrow(find_sources([footage]))
        for step in (probe_sources, read_tracks, fit_head_boxes, cut_clips):
            data = data.map_batches(step, batch_format="pyarrow", batch_size=None)
        arguments = {"picture_px": TOY.picture_px}
        data = data.map_batches(render_clips, fn_kwargs=arguments, batch_format="pyarrow", batch_size=None)
        there = sorted(data.take_all(), key=lambda row: row["clip_id"])
    finally:
        ray.shutdown()
    here: list[pa.Table] = []
    for path in sorted(footage.glob("*.mp4")):
        here += render_clips(from_truth(path), TOY.picture_px)
    here_rows = sorted(pa.concat_tables(here).to_pylist(), key=lambda row: row["clip_id"])
    assert [row["clip_id"] for row in there] == [row["clip_id"] for row in here_rows]
    for one, other in zip(there, here_rows, strict=True):
        assert list(one["scene"]) == other["scene"] and one["audio"] == other["audio"]


# Real footage


def steps_on(path: Path, weights: Path, num_frames: int | None = None) -> list[Span]:
    """The clips of (the first frames of) a film, before they are rendered."""
    spans = spans_from_table(probe_sources(one_source(path)))
    if num_frames is not None:
        spans = [spans[0].cut(0, num_frames)]
    tables = list(find_tracks(spans_to_table(spans), "mediapipe", weights))
    return spans_from_table(cut_clips(fit_head_boxes(pa.concat_tables(tables))))


def test_a_real_person_becomes_clips(shared_clips: Path, shared_weights: Path) -> None:
    spans = steps_on(shared_clips / "latentsync_demo2.mp4", shared_weights, 40)
    assert [(s.start_frame, s.num_frames, s.reason) for s in spans] == [(0, 20, None), (20, 20, None)]
    (one, *_) = tables = list(render_clips(spans_to_table(spans), TOY.picture_px))
    assert len(tables) == 2 and one.schema.equals(ROW_SCHEMA)
    clip = clip_from_row(one)
    assert (clip.source_width, clip.source_height) == (1080, 1920)
    side = clip.head_box[:, 2] - clip.head_box[:, 0]
    assert np.ptp(side) == 0 and 250 < side[0] < 900
    # The face lies in the head box as people are built: centred, eyes above the mouth, chin inside.
    assert clip.landmarks.min() > 0 and clip.landmarks.max() < 1
    center = clip.landmarks.mean(axis=(0, 1))
    assert abs(center[0] - 0.5) < 0.12 and abs(center[1] - 0.5) < 0.15
    assert (clip.landmarks[:, 36:48, 1].mean(1) < clip.landmarks[:, 48:68, 1].mean(1) - 0.1).all()
    assert clip.quality.face_px > 100 and abs(clip.quality.yaw_deg) < 40 and clip.quality.blur < 0.8
    assert len(clip.identity) == 4


def test_a_face_that_leaves_ends_a_clip_and_time_goes_on(shared_clips: Path, shared_weights: Path) -> None:
    spans = steps_on(shared_clips / "face_gap.mp4", shared_weights)
    clips = [s for s in spans if s.reason is None]
    gone = [s for s in spans if s.reason == "no_face"]
    assert covered(spans) == list(range(150))
    assert sum(s.num_frames for s in gone) == pytest.approx(50, abs=3)
    assert all(s.stop_frame <= 52 or s.start_frame >= 98 for s in clips)
    assert sum(s.num_frames for s in clips) == pytest.approx(100, abs=3)


def test_a_cut_ends_a_clip_and_identities_stay_on_their_side(shared_clips: Path, shared_weights: Path) -> None:
    spans = steps_on(shared_clips / "hard_cut.mp4", shared_weights)
    clips = [s for s in spans if s.reason is None]
    assert {(s.track, s.start_frame >= 73) for s in clips} == {(0, False), (1, True)}
    for span in clips:
        assert span.stop_frame <= 73 or span.start_frame >= 73
        assert all((f >= 73) == (span.start_frame >= 73) for f in span.identity_frames)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("corrupt_empty.mp4", "empty_file"),
        ("corrupt_text.mp4", "not_media"),
        ("corrupt_truncated_no_moov.mp4", "no_index"),
        ("corrupt_truncated_faststart.mp4", "truncated"),
        ("audio_only.m4a", "no_video"),
        ("no_audio.mp4", "no_audio"),
    ],
)
def test_damaged_files_are_named_for_what_they_are(shared_clips: Path, name: str, reason: str) -> None:
    (span,) = spans_from_table(probe_sources(one_source(shared_clips / name)))
    assert span.reason == reason
    assert span.message is not None and name in span.message and "\n" not in span.message


def test_damage_inside_a_film_is_a_reason_too(shared_clips: Path, shared_weights: Path) -> None:
    spans = steps_on(shared_clips / "corrupt_bitflips.mp4", shared_weights)
    assert {s.reason for s in spans} <= {"corrupt", "truncated"} and all(s.message for s in spans)


def test_sound_shorter_than_the_picture_bounds_the_clips(shared_clips: Path) -> None:
    spans = spans_from_table(probe_sources(one_source(shared_clips / "audio_short_2s.mp4")))
    assert [s.reason for s in spans] == [None, "after_audio"]
    assert spans[0].num_frames == pytest.approx(50, abs=2) and covered(spans) == list(range(spans[-1].stop_frame))


def test_a_film_that_opens_with_sound_alone_starts_with_its_picture(shared_clips: Path) -> None:
    spans = spans_from_table(probe_sources(one_source(shared_clips / "short_hamilton_clip.mp4")))
    assert spans[0].reason == "before_video" and spans[1].reason is None
    assert spans[0].num_frames == 22  # (0.852 - 0.008) s at 25 fps, rounded up


def test_a_film_without_a_face_gives_no_clip(shared_weights: Path, tmp_path: Path) -> None:
    film = tmp_path / "wall.mp4"
    rng = np.random.default_rng(0)
    wall = cv2.GaussianBlur(rng.integers(0, 256, (96, 128, 3), np.uint8), (0, 0), 5)
    with media.VideoWriter(film, 128, 96, audio_from=rng.normal(0, 0.1, 20 * SAMPLES_PER_FRAME)) as writer:
        for _ in range(20):
            writer.write(wall)
    with pytest.raises(TccpError, match=r"wall\.mp4: nobody's face"):
        preprocess([film], tmp_path / "out", TOY, "mediapipe", shared_weights)
