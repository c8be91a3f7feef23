"""Raw footage to clip table: every frame is accounted for, times match the film, bad files do not stop a run."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import shutil
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

from preprocessing.analysis.cut import cut_clips
from preprocessing.analysis.face_tracks import find_tracks, part_of
from preprocessing.analysis.identity import Sighting
from preprocessing.analysis.quality import QualityBounds, bridged_share, with_few_bridged
from preprocessing.analysis.select import Networks, select
from preprocessing.graph import _looked_ahead, _OwnFrames, clip_rows
from preprocessing.plan import Plan, make_plan
from preprocessing.reels import Faces, FilmSound, Reel, reels_from_table, reels_to_table
from preprocessing.render import render_clips
from preprocessing.report.record import RunReport
from preprocessing.run import NoClipError, _no_empty_folder, preprocess
from preprocessing.sources import find_reels as probe
from preprocessing.sources.find_reels import probe_source, reel_edges
from preprocessing.sources.listing import list_sources
from preprocessing.spans import Span, spans_from_table, spans_to_table
from preprocessing.steps import Look, Work
from tccp import headbox, media, roundtable
from tccp.clips.clip_table import ClipTable, decode_still
from tccp.clips.windows import view
from tccp.config import FPS, SAMPLES_PER_FRAME, toy
from tccp.errors import TccpError
from tccp.files import Folder, Reading, without_readers
from tccp.media.sandbox import Decoder

TOY = toy()


@pytest.fixture(scope="module")
def footage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One film of 160 frames and one of 50, each with its truth file; lossless, so that pictures can be compared."""
    folder = tmp_path_factory.mktemp("footage")
    roundtable.write_clips(folder, 1, 6.4, seed=1, lossless=True)
    roundtable.write_clips(folder, 1, 2.0, seed=2, lossless=True)
    return folder


@pytest.fixture(scope="module")
def long_film(footage: Path) -> Path:
    return footage / "roundtable_1_0000.mp4"


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    with Decoder() as opened:
        yield opened


def truth_plan(**changes: Any) -> Plan:
    return make_plan(TOY.picture_px, "truth", **changes)


def reels_of(path: Path, decoder: Decoder, plan: Plan | None = None) -> list[Reel]:
    return list(probe_source(Span(str(path), path.name), 0, plan or truth_plan(), decoder))


def reels_with_faces(path: Path, plan: Plan, decoder: Decoder, detectors: int = 1) -> list[Reel]:
    """The reels of a film after face detection."""
    step = Look(Work(plan, None), detectors=detectors)
    try:
        return [
            r
            for reel in reels_of(path, decoder, plan)
            for table in step(reels_to_table([reel]))
            for r in reels_from_table(table)
        ]
    finally:
        step.close()


def selected(path: Path, plan: Plan, decoder: Decoder) -> list[Span]:
    """The clips of a film before rendering, and the spans set aside."""
    networks = Networks(plan)
    return [span for reel in reels_with_faces(path, plan, decoder) for span in select(reel, plan, networks).spans]


def covered(spans: list[Span]) -> list[int]:
    return sorted(frame for span in spans for frame in range(span.start_frame, span.stop_frame))


# Spans, reels


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


def sightings(*frames: int) -> list[Sighting]:
    return [Sighting(frame, (frame, frame, frame + 9, frame + 9)) for frame in frames]


def test_spans_round_trip_through_a_table() -> None:
    spans = [
        a_run(audio=b"\1\0" * 640, av_offset_frames=-3, av_corrected=True, speaker_x=3.5),
        Span("x.mp4", "x.mp4", reason="no_audio", message="silent film", warnings=("a", "b")),
    ]
    for before, after in zip(spans, spans_from_table(spans_to_table(spans)), strict=True):
        for field in dataclasses.fields(Span):
            np.testing.assert_equal(getattr(after, field.name), getattr(before, field.name))


def test_table_of_paths_and_names_gives_spans() -> None:
    (span,) = spans_from_table(pa.table({"path": ["a/b.mp4"], "source": ["b.mp4"]}))
    assert (span.path, span.source, span.reason, span.num_frames) == ("a/b.mp4", "b.mp4", None, 0)


def a_reel(faces: Faces | None = None, cuts: tuple[int, ...] = (), num_frames: int = 100) -> Reel:
    span = Span("film.mp4", "film.mp4", "ab", 640, 480, 500, num_frames)
    sound = FilmSound(np.arange(150 * SAMPLES_PER_FRAME, dtype=np.int64).astype(np.int16), 475)
    return Reel(span, 3, (510, 590), sound, cuts=cuts, faces=faces)


def some_faces(frames: list[int], at: Any = lambda frame: (100.0, 100.0), side: float = 60) -> Faces:
    corners = np.array([at(frame) for frame in frames], np.float32).reshape(-1, 2)
    return Faces(
        frame=np.array(frames, np.int32),
        box=np.concatenate([corners, corners + side], 1).astype(np.float32),
        landmarks=(corners[:, None] + np.linspace(0, side, 136, dtype=np.float32).reshape(68, 2)).astype(np.float32),
        confidence=np.full(len(frames), 0.9, np.float32),
        chips={i: b"chip" for i, frame in enumerate(frames) if frame % 5 == 0},
    )


def test_reels_round_trip_through_a_table() -> None:
    faces = some_faces([510, 511, 515])
    reel = dataclasses.replace(a_reel(faces, (530,)), times_s={"look": 1.5}, share=0.25, head_box=faces.box)
    aside = Reel(reel.span.set_aside("corrupt", "film.mp4: damaged"), 4)
    for before, after in zip([reel, aside], reels_from_table(reels_to_table([reel, aside])), strict=True):
        assert (after.order, after.usable, after.cuts, after.share) == (
            before.order,
            before.usable,
            before.cuts,
            before.share,
        )
        assert dict(after.times_s) == dict(before.times_s) and after.span.reason == before.span.reason
        assert (after.faces is None) == (before.faces is None) and (after.sound is None) == (before.sound is None)
    (after, _) = reels_from_table(reels_to_table([reel, aside]))
    assert after.faces is not None and after.sound is not None and reel.sound is not None
    for field in dataclasses.fields(Faces):
        np.testing.assert_equal(getattr(after.faces, field.name), getattr(faces, field.name))
    np.testing.assert_array_equal(after.sound.pcm, reel.sound.pcm)
    assert (after.start_frame, after.stop_frame) == (510, 590)  # frames with both picture and audio


@given(st.integers(0, 20_000), st.floats(10, 200), st.booleans())
def test_reels_cover_the_film_and_have_bounded_length(num_frames: int, reel_s: float, seeks: bool) -> None:
    edges = reel_edges(num_frames, reel_s, seeks)
    assert edges[0][0] == 0 and edges[-1][1] == num_frames
    assert all(one[1] == other[0] for one, other in itertools.pairwise(edges))
    lengths = [stop - first for first, stop in edges]
    assert max(lengths) <= round(reel_s * FPS) * (1 if seeks else 10) and max(lengths) - min(lengths) <= 1
    assert len(edges) == max(1, math.ceil(num_frames / (round(reel_s * FPS) * (1 if seeks else 10))))


def test_audio_is_cut_exactly_padded_with_silence_and_shifted() -> None:
    sound = FilmSound(np.arange(1, 3 * SAMPLES_PER_FRAME + 1, dtype=np.int64).astype(np.int16), 10)
    np.testing.assert_array_equal(sound.between(11, 12), sound.pcm[640:1280])
    np.testing.assert_array_equal(sound.between(11, 12, shift=100), sound.pcm[740:1380])
    early = sound.between(9, 11)
    assert (early[:640] == 0).all() and (early[640:] == sound.pcm[:640]).all()
    assert (sound.between(12, 14)[640:] == 0).all() and (sound.between(20, 21) == 0).all()


# Tracks


def test_short_gaps_are_interpolated_and_long_gaps_end_a_track() -> None:
    away = {*range(520, 532), *range(550, 563)}  # 12 frames: 0.48 s; 13: 0.52 s
    frames = [frame for frame in range(510, 590) if frame not in away]
    tracks = find_tracks(a_reel(some_faces(frames, lambda frame: (frame - 400.0, 100.0))))
    assert [(t.number, t.start_frame, t.stop_frame) for t in tracks] == [(0, 510, 550), (1, 563, 590)]
    np.testing.assert_allclose(tracks[0].landmarks[:, 0, 0], np.arange(510, 550) - 400, atol=1e-3)
    np.testing.assert_array_equal(np.flatnonzero(tracks[0].confidence == 0), np.arange(10, 22))
    assert set(tracks[0].chips) == {frame for frame in frames if frame % 5 == 0 and frame < 550}


def test_cut_ends_every_track_and_two_people_get_two_tracks() -> None:
    left = some_faces(list(range(510, 590)))
    both = Faces(
        frame=np.repeat(left.frame, 2),
        box=np.stack([left.box, left.box + np.array([300, 0, 300, 0], np.float32)], 1).reshape(-1, 4),
        landmarks=np.stack([left.landmarks, left.landmarks + np.array([300, 0], np.float32)], 1).reshape(-1, 68, 2),
        confidence=np.repeat(left.confidence, 2),
        chips={},
    )
    tracks = find_tracks(a_reel(both, (540,)))
    assert [(t.shot, t.start_frame, t.stop_frame) for t in tracks] == [(0, 510, 540)] * 2 + [(1, 540, 590)] * 2
    assert [float(t.box[0, 0]) for t in tracks] == [100, 400, 100, 400]
    part = part_of(tracks[2], 550, 560)
    assert (part.start_frame, part.num_frames, part.number) == (550, 10, 2)
    assert find_tracks(a_reel(some_faces([510, 511, 512]))) == []  # three frames are a false detection


@given(st.lists(st.booleans(), max_size=60), st.floats(0, 1))
def test_parts_with_few_bridged_frames(bridged: list[bool], bound: float) -> None:
    """Each part keeps the bound, only bridged frames are left out, and nothing is if the whole keeps the bound."""
    confidence = (~np.array(bridged, bool)).astype(np.float32)
    parts = with_few_bridged(confidence, bound)
    kept = np.zeros(len(bridged), bool)
    for first, stop in parts:
        assert first < stop and bridged_share(confidence[first:stop]) <= bound
        kept[first:stop] = True
    assert all(one[1] < other[0] for one, other in itertools.pairwise(parts))
    assert kept[confidence > 0].all()
    if len(bridged) and np.mean(bridged) <= bound:
        assert parts == [(0, len(bridged))]
    assert with_few_bridged(confidence, None) == ([(0, len(bridged))] if bridged else [])


def selected_from(landmarks: np.ndarray, seen: np.ndarray, width: int, height: int, **bounds: Any) -> list[Span]:
    """What `select` gives for a film of one person whose face is detected in the frames `seen`."""
    frames = np.flatnonzero(seen).astype(np.int32)
    points = landmarks[frames].astype(np.float32)
    box = np.concatenate([points.min(1), points.max(1)], 1)
    faces = Faces(frames, box, points, np.ones(len(frames), np.float32), {})
    span = Span("film.mp4", "film.mp4", "ab", width, height, 0, len(seen))
    sound = FilmSound(np.zeros(len(seen) * SAMPLES_PER_FRAME, np.int16), 0)
    reel = Reel(span, 0, (0, len(seen)), sound, faces=faces)
    plan = Plan(TOY.picture_px, "mediapipe", "key", speakers="main", bounds=QualityBounds(**bounds))
    return select(reel, plan, Networks(plan)).spans


def test_share_of_bridged_frames_is_bounded_and_counted() -> None:
    """In the second half of the film, 12 of 16 frames bridge gaps: without a bound, that half of the clips is guessed.

    The long gaps are left out; what is between them is too short for a clip.
    """
    points = roundtable.synthesise(3, 8.0).landmarks_px
    seen = np.ones(200, bool)
    for start in range(100, 196, 16):
        seen[start : start + 12] = False
    free = [span for span in selected_from(points, seen, 256, 192, max_bridged=None) if span.reason is None]
    assert max(bridged_share(span.confidence) for span in free if span.confidence is not None) > 0.7
    spans = selected_from(points, seen, 256, 192)
    clips = [span for span in spans if span.reason is None]
    assert covered(spans) == list(range(200))
    assert sum(span.num_frames for span in clips) >= 96
    for clip in clips:
        assert clip.confidence is not None and bridged_share(clip.confidence) <= 0.25
    left_out = {span.reason for span in spans if span.reason is not None}
    assert "bridged" in left_out and left_out <= {"bridged", "too_short", "identity"}
    some = [span for span in selected_from(points, seen, 256, 192, max_bridged=0.0) if span.reason is None]
    assert some and all(np.all(span.confidence > 0) for span in some if span.confidence is not None)


def test_films_in_which_the_head_covers_the_picture_are_left_out() -> None:
    clip = roundtable.synthesise(3, 4.0)
    box = clip.head_box
    low = box[:, :2].min(0)
    points, seen = clip.landmarks_px - low, np.ones(len(box), bool)
    width, height = (int(size) for size in (box[:, 2:].max(0) - low))
    close = selected_from(points, seen, width, height)
    assert {span.reason for span in close} == {"no_context"}
    assert close[0].message is not None and "covers nearly the whole picture" in close[0].message
    kept = selected_from(points, seen, width, height, min_visible=None)
    assert {span.reason for span in kept} == {None}
    wide = selected_from(clip.landmarks_px, seen, 256, 192)
    assert {span.reason for span in wide} == {None}


# Cutting, identity


@given(
    num_frames=st.integers(1, 200),
    max_frames=st.integers(32, 130),
    elsewhere=st.booleans(),
    given_identity=st.booleans(),
)
def test_cut_clips_respect_length_bounds_and_account_for_every_frame(
    num_frames: int, max_frames: int, elsewhere: bool, given_identity: bool
) -> None:
    path = "identity.png" if given_identity else None
    run = a_run(100, num_frames, identity_path=path)
    seen = sightings(*range(100, 100 + num_frames), *(range(900, 950) if elsewhere else ()))
    cut = cut_clips(run, seen, max_frames / FPS)
    assert covered(cut) == covered([run])
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
            assert clip.reason == "identity" and clip.num_frames <= 4 and not elsewhere
    if num_frames >= 17:
        assert any(clip.reason is None for clip in cut)


def test_short_film_gives_two_clips_that_supply_each_others_identity() -> None:
    first, second = cut_clips(a_run(0, 73), sightings(*range(73)))
    assert (first.start_frame, first.stop_frame, second.stop_frame) == (0, 36, 73)
    assert min(first.identity_frames) >= 36 > max(second.identity_frames)
    assert len(set(first.identity_frames)) == 4


def test_clip_without_identity_frames_elsewhere_is_set_aside() -> None:
    cut = cut_clips(a_run(0, 60), sightings(*range(30)))
    assert [clip.reason for clip in cut] == ["no_identity", None]


def test_too_short_max_clip_s_is_refused() -> None:
    with pytest.raises(TccpError, match=r"max_clip_s 1 is too short: give at least 1.28 seconds, twice the shortest"):
        cut_clips(a_run(), [], 1.0)


# Whole runs on RoundTable


@pytest.fixture(scope="module")
def run(footage: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunReport]:
    out = tmp_path_factory.mktemp("table")
    return out, preprocess([footage], out, make_plan(TOY.picture_px, "truth"))


@pytest.fixture(scope="module")
def table(run: tuple[Path, RunReport]) -> Iterator[ClipTable]:
    out, report = run
    assert (report.clips, report.frames, report.reasons) == (3, 210, {})
    with ClipTable(out) as opened:
        yield opened


def test_rows_match_the_film_frames_audio_and_truth(table: ClipTable, footage: Path) -> None:
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
        masks = [headbox.mask_from_box(box, clip.source_height, clip.source_width) for box in clip.head_box]
        assert clip.quality.visible == pytest.approx(1 - np.mean(masks), abs=1e-6)
        assert clip.quality.bridged == 0
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
            before = sound.samples[
                part.start * SAMPLES_PER_FRAME - len(clip.audio_before) : part.start * SAMPLES_PER_FRAME
            ]
            assert np.abs(clip.audio_before / 32768 - before).max(initial=0) <= 0.5 / 32768 + 1e-7
            behind = sound.samples[part.stop * SAMPLES_PER_FRAME :][: 5 * SAMPLES_PER_FRAME]
            assert len(clip.audio_after) == len(behind)
        identity = cv2.cvtColor(decode_still(clip.identity[0]), cv2.COLOR_RGB2GRAY)
        given = cv2.cvtColor(roundtable.read_identity(path), cv2.COLOR_RGB2GRAY)
        given = cv2.resize(given, identity.shape, interpolation=cv2.INTER_AREA)
        assert np.corrcoef(identity.ravel(), given.ravel())[0, 1] > 0.97


def rows_of(out: Path) -> list[dict[str, Any]]:
    """Every value of every clip, in the table's order."""
    with ClipTable(out) as opened:
        return opened.rows(opened.ids).to_pylist()


def test_table_does_not_depend_on_the_footage_location(
    footage: Path, run: tuple[Path, RunReport], tmp_path: Path
) -> None:
    shutil.copytree(footage, tmp_path / "moved")
    preprocess([tmp_path / "moved"], tmp_path / "b", make_plan(TOY.picture_px, "truth"))
    assert rows_of(run[0]) == rows_of(tmp_path / "b")
    assert (run[0] / "index.parquet").read_bytes() == (tmp_path / "b" / "index.parquet").read_bytes()


def test_rerun_skips_unchanged_sources_and_processes_changed_ones(footage: Path, tmp_path: Path) -> None:
    films = tmp_path / "films"
    shutil.copytree(footage, films)
    out = tmp_path / "out"
    first = preprocess([films], out, make_plan(TOY.picture_px, "truth"))
    parts = {path: path.stat().st_mtime_ns for path in out.glob("clips/*/*.parquet")}
    again = preprocess([films], out, make_plan(TOY.picture_px, "truth"))
    assert "render" not in {step.name for step in again.steps} and again.sources == first.sources
    assert {path: path.stat().st_mtime_ns for path in out.glob("clips/*/*.parquet")} == parts
    roundtable.write_clips(films, 1, 2.0, seed=3)
    more = preprocess([films], out, make_plan(TOY.picture_px, "truth"))
    assert more.clips == first.clips + 1
    assert {step.name: step.items for step in more.steps}["render"] == 1
    (films / "roundtable_2_0000.mp4").unlink()
    fewer = preprocess([films], out, make_plan(TOY.picture_px, "truth"))
    assert fewer.clips == first.clips and len(list(out.glob("clips/*/*.parquet"))) == 2
    shorter = preprocess([films], out, make_plan(TOY.picture_px, "truth", max_clip_s=2.0))
    assert {clip["num_frames"] for clip in rows_of(out)} == {40, 50}
    assert {step.name: step.items for step in shorter.steps}["render"] == 2
    assert len(list(out.glob("clips/*"))) == 1  # parts made with the old settings are deleted


@pytest.mark.parametrize(
    ("made", "error"),
    [
        (None, TccpError("the disk is full")),
        ("work/looks/a/b", TccpError("the disk is full")),
        ("work/looks/a/b", NoClipError("nobody speaks", found_faces=True)),
        ("work/looks/a/b", KeyboardInterrupt()),
        ("clips/a/b", TccpError("the disk is full")),
    ],
)
def test_a_run_that_fails_early_keeps_the_results_of_pass_1(
    tmp_path: Path, made: str | None, error: BaseException
) -> None:
    folder = Folder(tmp_path / "out")

    def run() -> None:
        with _no_empty_folder(folder):
            folder.write(made or "work/films/a", b"")
            raise error

    with pytest.raises(type(error)):
        run()
    assert folder.exists() == folder.exists(made or "work/films/a") == (made is not None)


def test_a_table_that_is_read_keeps_its_files_until_it_is_closed(
    footage: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Preprocessing the same folder with other settings, and with fewer films, writes a new index beside them."""
    films, out = tmp_path / "films", tmp_path / "out"
    shutil.copytree(footage, films)
    preprocess([films], out, truth_plan())
    before = rows_of(out)
    with caplog.at_level("INFO", "tccp.preprocessing"), ClipTable(out, keep=0) as reader, ClipTable(out) as closed:
        closed.close()
        preprocess([films], out, truth_plan(max_clip_s=2.0))
        assert "files of an earlier run stay, because a process reads the table: clips/" in caplog.text
        assert reader.rows(reader.ids).to_pylist() == before
        assert {row["num_frames"] for row in rows_of(out)} == {40, 50}
        (films / "roundtable_2_0000.mp4").unlink()
        preprocess([films], out, truth_plan())
        assert reader.rows(reader.ids).to_pylist() == before
    preprocess([films], out, truth_plan())
    assert len(list(out.glob("clips/*"))) == len(list(out.glob("clips/*/*"))) == 1
    assert len(rows_of(out)) == 2


def test_readers_of_a_folder_are_known_until_they_close_or_are_forgotten(tmp_path: Path) -> None:
    def is_free(folder: Folder) -> bool:
        with without_readers(folder) as free:
            return free

    folder = Folder(tmp_path)
    one, other = Reading(folder), Reading(folder)
    assert not is_free(folder)
    one.close()
    one.close()
    assert not is_free(folder)
    del other
    assert is_free(folder)
    for nowhere in (Folder("memory://tccp-tests/readers"), Folder(tmp_path / "absent")):
        Reading(nowhere).close()
        assert not is_free(nowhere), "what cannot be known is not removed"


def test_damaged_records_of_a_run_are_made_again_and_damaged_clips_are_named(footage: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    film = footage / "roundtable_2_0000.mp4"
    preprocess([film], out, truth_plan())
    for record in (out / "work" / "films").iterdir():
        record.write_text('{"reels": [')
    preprocess([film], out, truth_plan())
    (part,) = out.glob("clips/*/*.parquet")
    part.write_bytes(part.read_bytes()[:1000])
    with pytest.raises(TccpError, match=r"\.parquet is damaged .*: remove it, and give the same command again"):
        preprocess([film], out, truth_plan())
    part.unlink()
    assert preprocess([film], out, truth_plan()).clips == 1


def test_clip_ids_depend_on_clip_content(footage: Path, run: tuple[Path, RunReport], tmp_path: Path) -> None:
    preprocess([footage], tmp_path / "b", make_plan(TOY.picture_px, "truth", max_clip_s=2.0))
    before, after = ({row["clip_id"]: row for row in rows_of(out)} for out in (run[0], tmp_path / "b"))
    same = before.keys() & after.keys()
    assert len(after) == 5 and [before[key]["source"] for key in same] == ["roundtable_2_0000.mp4"]  # unchanged clip
    for key in same:
        assert before[key] == after[key]


def test_failed_run_keeps_the_previous_table(footage: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    preprocess([footage / "roundtable_2_0000.mp4"], out, make_plan(TOY.picture_px, "truth"))
    before = (out / "index.parquet").read_bytes()
    (tmp_path / "empty.mp4").touch()
    with pytest.raises(TccpError, match="empty"):
        preprocess([tmp_path / "empty.mp4"], out, make_plan(TOY.picture_px, "truth"))
    assert (out / "index.parquet").read_bytes() == before and len(rows_of(out)) == 1


def test_streamed_rows_equal_the_table_rows(footage: Path, run: tuple[Path, RunReport]) -> None:
    streamed = [row for table in clip_rows(list_sources([footage]), truth_plan()) for row in table.to_pylist()]
    assert streamed == rows_of(run[0])


def test_looking_ahead_gives_the_same_parts(footage: Path, tmp_path: Path) -> None:
    found = []
    for overlap in (False, True):
        preprocess([footage], tmp_path / str(overlap), truth_plan(), overlap=overlap)
        parts = sorted((tmp_path / str(overlap)).rglob("*.parquet"))
        found.append({str(part.relative_to(tmp_path / str(overlap))): part.read_bytes() for part in parts})
    assert found[0] == found[1] and len(found[0]) == 3  # a part for each film, and the index


@pytest.mark.slow
def test_detectors_side_by_side_find_what_one_finds(shared_clips: Path, shared_weights: Path, decoder: Decoder) -> None:
    """The face goes, so that most frames are skipped, and comes back."""
    plan = make_plan(TOY.picture_px, "mediapipe", shared_weights)
    one, several = (reels_with_faces(shared_clips / "face_gap.mp4", plan, decoder, count) for count in (1, 3))
    for a, b in zip(one, several, strict=True):
        assert a.faces is not None and b.faces is not None
        for name in ("frame", "box", "landmarks", "confidence"):
            np.testing.assert_array_equal(getattr(a.faces, name), getattr(b.faces, name))
        assert a.faces.chips == b.faces.chips and a.cuts == b.cuts
    seen = np.concatenate([reel.faces.frame for reel in one if reel.faces is not None])
    assert 90 < len(seen) < 110 and np.diff(seen).max() > 40


def test_an_error_comes_after_the_reels_before_it_and_a_stopped_caller_ends_the_look_ahead() -> None:
    batches = [pa.table({"number": [number]}) for number in range(3)]

    def reels() -> Iterator[pa.Table]:
        yield from batches
        raise TccpError("the disk is full")

    frames = _OwnFrames(None)
    seen: list[pa.Table] = []
    with pytest.raises(TccpError, match="disk is full"):
        seen.extend(_looked_ahead(reels(), lambda reel: iter([reel]), frames))
    assert seen == batches

    def look(reel: pa.Table) -> Iterator[pa.Table]:
        while reel is batches[1]:  # without the stop this would not end
            frames.on_frame()
        yield reel

    frames = _OwnFrames(None)
    ahead = _looked_ahead(iter(batches), look, frames)
    assert next(ahead) is batches[0]
    ahead.close()
    assert frames.stopped


def test_max_clip_s_bounds_clip_length(long_film: Path, decoder: Decoder) -> None:
    assert [s.num_frames for s in selected(long_film, truth_plan(max_clip_s=2.0), decoder)] == [40, 40, 40, 40]
    assert len(selected(long_film, truth_plan(max_clip_s=8.0), decoder)) == 1


def test_min_clip_s_allows_shorter_clips(tmp_path: Path, decoder: Decoder) -> None:
    (film,) = roundtable.write_clips(tmp_path, 1, 1.6, seed=1, excerpt_s=0.4)
    (kept,) = selected(film, truth_plan(min_clip_s=0.4), decoder)
    assert (kept.num_frames, kept.reason) == (10, None)
    (gone,) = selected(film, truth_plan(min_clip_s=0.44), decoder)
    assert gone.reason == "too_short"
    with pytest.raises(TccpError, match="min_clip_s 0 is too short"):
        truth_plan(min_clip_s=0.0)


def test_rendering_memory_does_not_grow_with_film_length(long_film: Path, decoder: Decoder) -> None:
    def peak(clips: int) -> int:
        spans = selected(long_film, truth_plan(max_clip_s=32 / FPS), decoder)[:clips]
        tracemalloc.start()
        for _ in render_clips(spans, TOY.picture_px, decoder, QualityBounds()):
            pass
        high = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return high

    two, five = peak(2), peak(5)  # the previous clip is still held while the next is rendered
    assert five < 1.25 * two


# Reports and bad files


def test_every_frame_is_counted_and_every_bad_file_has_a_reason(footage: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "empty.mp4").touch()
    (bad / "text.mp4").write_text("no film at all " * 30)
    shutil.copy(footage / "roundtable_2_0000.mp4", bad / "untold.mp4")  # no truth file
    with media.VideoWriter(bad / "silent_film.mp4", 64, 48) as film:
        for _ in range(20):
            film.write(np.zeros((48, 64, 3), np.uint8))
    media.write_audio_wav(bad / "sound.wav", np.zeros(16000, np.float32))
    again = bad / "again.mp4"
    shutil.copy(footage / "roundtable_1_0000.mp4", again)
    sources = [footage / "roundtable_1_0000.mp4", bad, bad / "sound.wav", bad / "absent.mp4"]
    report = preprocess(sources, tmp_path / "out", make_plan(TOY.picture_px, "truth"))
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
    assert "silent_film.mp4" in (tmp_path / "out" / "report.html").read_text()


def test_run_without_clips_gives_a_one_line_error_and_a_report_but_no_table(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("no film")
    with pytest.raises(TccpError, match=r"empty\.mp4.*empty.*\(2 sources, none gave a clip\)") as caught:
        preprocess([tmp_path], tmp_path / "out", make_plan(TOY.picture_px, "truth"))
    assert "\n" not in str(caught.value)
    assert {path.name for path in (tmp_path / "out").glob("*")} == {"report.json", "report.html"}


def test_silent_audio_is_kept_with_a_warning(tmp_path: Path, footage: Path) -> None:
    source = footage / "roundtable_2_0000.mp4"
    copy = tmp_path / "film.mp4"
    with media.VideoWriter(copy, 256, 192, audio_from=np.zeros(50 * SAMPLES_PER_FRAME, np.float32)) as film:
        for frame in media.read_frames(source):
            film.write(frame)
    shutil.copy(roundtable.truth_path(source), roundtable.truth_path(copy))
    shutil.copy(roundtable.identity_path(source), roundtable.identity_path(copy))
    (report,) = preprocess([copy], tmp_path / "out", make_plan(TOY.picture_px, "truth")).sources
    assert report.clips == 1 and report.frames_in_clips == 50
    assert len(report.warnings) == 1 and "silent" in report.warnings[0]


def test_truth_file_of_another_film_is_detected(tmp_path: Path, footage: Path, decoder: Decoder) -> None:
    film = tmp_path / "film.mp4"
    shutil.copy(footage / "roundtable_1_0000.mp4", film)
    shutil.copy(footage / "roundtable_2_0000.truth.npz", roundtable.truth_path(film))
    (reel,) = reels_with_faces(film, truth_plan(), decoder)
    assert reel.span.reason == "other_truth" and "tccp synth" in str(reel.span.message)


def test_backends_without_landmarks_are_refused() -> None:
    with pytest.raises(TccpError, match="backend lbp finds boxes only, and clips need 68 landmarks: choose mediapipe"):
        make_plan(64, "lbp")


def test_cache_keys_change_only_with_settings_that_affect_results() -> None:
    plan = truth_plan()
    assert truth_plan().part_key == plan.part_key
    longer, larger = truth_plan(max_clip_s=4.0), make_plan(128, "truth")
    assert longer.look_key == larger.look_key == plan.look_key  # face detection is reused
    assert len({plan.part_key, longer.part_key, larger.part_key}) == 3
    other = dataclasses.replace(plan, backend_key="mediapipe 9")
    assert other.look_key != plan.look_key and other.part_key != plan.part_key


# Real footage


def real_plan(weights: Path) -> Plan:
    return make_plan(TOY.picture_px, "mediapipe", weights / "face_landmarker.task")


def test_absent_face_ends_the_clip_and_later_frames_keep_their_times(
    shared_clips: Path, shared_weights: Path, decoder: Decoder
) -> None:
    spans = selected(shared_clips / "face_gap.mp4", real_plan(shared_weights), decoder)
    clips = [s for s in spans if s.reason is None]
    assert covered(spans) == list(range(150))
    assert all(s.stop_frame <= 52 or s.start_frame >= 98 for s in clips)
    assert sum(s.num_frames for s in clips) >= 85


def test_cut_ends_the_clip_and_identity_frames_stay_on_its_side(
    shared_clips: Path, shared_weights: Path, decoder: Decoder
) -> None:
    spans = selected(shared_clips / "hard_cut.mp4", real_plan(shared_weights), decoder)
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
        ("corrupt_bitflips.mp4", "corrupt"),
        ("audio_only.m4a", "no_video"),
        ("no_audio.mp4", "no_audio"),
    ],
)
def test_damaged_files_get_the_matching_reason(shared_clips: Path, decoder: Decoder, name: str, reason: str) -> None:
    (reel,) = reels_of(shared_clips / name, decoder)
    assert reel.span.reason == reason
    assert reel.span.message is not None and name in reel.span.message and "\n" not in reel.span.message


def test_audio_shorter_than_the_video_bounds_the_reel(shared_clips: Path, decoder: Decoder) -> None:
    (reel,) = reels_of(shared_clips / "audio_short_2s.mp4", decoder)
    assert reel.stop_frame == pytest.approx(50, abs=2) and reel.span.num_frames == 100


def test_reel_starts_at_the_first_picture_when_audio_starts_earlier(shared_clips: Path, decoder: Decoder) -> None:
    (reel,) = reels_of(shared_clips / "short_hamilton_clip.mp4", decoder)
    assert reel.start_frame == 22  # (0.852 - 0.008) s at 25 fps, rounded up


def test_a_film_without_a_face_gives_no_clip(shared_weights: Path, tmp_path: Path) -> None:
    film = tmp_path / "wall.mp4"
    rng = np.random.default_rng(0)
    wall = cv2.GaussianBlur(rng.integers(0, 256, (96, 128, 3), np.uint8), (0, 0), 5)
    with media.VideoWriter(film, 128, 96, audio_from=rng.normal(0, 0.1, 20 * SAMPLES_PER_FRAME)) as writer:
        for _ in range(20):
            writer.write(wall)
    with pytest.raises(TccpError, match=r"wall\.mp4: no face was found"):
        preprocess([film], tmp_path / "out", make_plan(TOY.picture_px, "mediapipe", shared_weights))
    assert not (tmp_path / "out").exists()


def test_film_without_index_gives_the_same_faces_in_one_reel_or_three(
    shared_clips: Path, shared_weights: Path, decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    film = shared_clips / "grid_bbaf2n.mpg"
    assert not decoder.probe(film).seeks
    plan = make_plan(TOY.picture_px, "mediapipe", shared_weights / "face_landmarker.task")
    (whole,) = reels_with_faces(film, plan, decoder)
    monkeypatch.setattr(probe, "_LEAST_REEL_S", 1.0)
    monkeypatch.setattr(probe, "_WITHOUT_INDEX", 1)
    parts = [reel.faces for reel in reels_with_faces(film, dataclasses.replace(plan, reel_s=1.0), decoder)]
    assert whole.faces is not None and len(parts) == 3
    for name in ("frame", "box", "landmarks"):
        joined = np.concatenate([getattr(faces, name) for faces in parts])
        np.testing.assert_array_equal(joined, getattr(whole.faces, name))
