"""The run report: independent of record order, bounded in size; its page: complete, safe and self-contained."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import random
import re
import tracemalloc
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from preprocessing.reasons import FRAME_REASONS, REASONS, explain
from preprocessing.report import record as report
from preprocessing.report.charts import reason_colours
from preprocessing.report.formatting import duration, number, percent
from preprocessing.report.page import page_html, write_page
from preprocessing.report.record import ClipFigures, ReportBuilder, RunReport, SourceReport, StepTime, TrackSample
from preprocessing.report.sections import MOST_FILMS, MOST_MESSAGES
from tccp.clips.clip_table import Quality
from tccp.errors import TccpError
from tccp.media import MediaError

HOSTILE = "<script>alert(1)</script>\"'&.mp4"


JPEG = cv2.imencode(".jpg", np.full((224, 224, 3), 128, np.uint8))[1].tobytes()


def source(name: str, frames: int = 100, kept: int = 60, reason: str = "no_face") -> SourceReport:
    left = {reason: frames - kept} if frames > kept or not kept else {}
    gone = None if kept else reason
    return SourceReport(
        name, name.encode("utf-8", "replace").hex(), frames, kept // 20, kept, left, gone, gone and f"{name}: why not"
    )


def track(number: int, kept: bool = True, reason: str | None = None) -> TrackSample:
    start_s = 2.0 * number
    return TrackSample(f"film_{number % 7}.mp4", number, start_s, start_s + 1.5, kept, reason, JPEG, {"face_px": 80.0})


def records() -> list[SourceReport | ClipFigures | TrackSample | StepTime]:
    rng = np.random.default_rng(0)
    sources = [source(f"film_{i}.mp4", 100, 20 * (i % 4)) for i in range(12)] + [source(HOSTILE, 80, 40, "occluded")]
    clips: list[ClipFigures] = []
    for _ in range(60):
        blur, brightness, share = rng.random(3).tolist()
        quality = Quality(blur, 200 * share, brightness, float(rng.normal(0, 20)))
        clips.append(ClipFigures(int(rng.integers(16, 126)), quality))
    tracks = [track(i) for i in range(30)] + [track(i, False, "not_speaking") for i in range(30, 70)]
    return [*sources, *clips, *tracks, StepTime("look", 3.0, 4, 500), StepTime("render", 1.5, 4, 300)]


def finished(
    items: Sequence[SourceReport | ClipFigures | TrackSample | StepTime], sample_tracks: int = 20
) -> RunReport:
    builder = ReportBuilder(sample_tracks)
    for item in items:
        builder.add(item)
    return builder.finish({"backend": "truth"}, "2026-01-02T03:04:05+00:00", 4.0, 2, 300 << 20)


@pytest.fixture(scope="module")
def run() -> RunReport:
    return finished(records())


# The report


def test_totals_are_the_sums_of_the_sources(run: RunReport) -> None:
    totals = run.totals
    assert (totals.films, totals.films_with_clips) == (13, 10)
    assert totals.frames == 12 * 100 + 80 and totals.frames_in_clips == 3 * (20 + 40 + 60) + 40
    assert totals.frames == totals.frames_in_clips + sum(totals.frames_by_reason.values())
    assert totals.sources_by_reason == run.reasons == {"no_face": 3}
    assert totals.hours == pytest.approx(1280 / 25 / 3600)
    assert run.throughput == pytest.approx(1280 / 25 / 4.0)
    assert run.clips == sum(item.clips for item in run.sources)


def test_a_source_whose_frames_do_not_add_up_is_refused() -> None:
    with pytest.raises(AssertionError, match="of 10 frames 9 are accounted for"):
        SourceReport("a.mp4", "x", 10, 1, 8, {"no_face": 1}, None, None)


def test_steps_of_the_same_name_are_added_up() -> None:
    built = finished([StepTime("look", 1.0, 2, 30), StepTime("cut", 0.5, 1, 30), StepTime("look", 2.0, 3, 40)])
    assert built.steps == [StepTime("look", 3.0, 5, 70), StepTime("cut", 0.5, 1, 30)]


def test_report_does_not_depend_on_the_order_of_records(run: RunReport) -> None:
    shuffled = [item for item in records() if not isinstance(item, StepTime)]
    random.Random(1).shuffle(shuffled)
    assert dataclasses.replace(finished(shuffled), steps=run.steps) == run


def test_report_round_trips_through_json(run: RunReport) -> None:
    assert RunReport.from_json(run.to_json()) == run
    record = json.loads(run.to_json(pictures=False))
    assert (record["clips"], record["frames"], record["reasons"]) == (run.clips, run.frames, run.reasons)
    assert all(item["jpeg"] == "" for item in record["tracks"])
    assert {item["source"]: item["reasons"] for item in record["sources"]}[HOSTILE] == ["occluded"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not a report.json"),
        ("[1]", "not a report.json"),
        ('{"clips": 3}', "report version None, this code reads 1"),
        ('{"report_version": 9}', "report version 9, this code reads 1"),
        ('{"report_version": 1}', "not a report.json"),
    ],
)
def test_invalid_report_gives_a_one_line_error(text: str, said: str) -> None:
    with pytest.raises(TccpError, match=said) as caught:
        RunReport.from_json(text)
    assert "\n" not in str(caught.value)


def test_undecodable_file_names_are_escaped(tmp_path: Path) -> None:
    built = finished([source("bad\udcff.mp4", 10, 0)])
    assert built.sources[0].source == "bad\\udcff.mp4"
    write_page(built, tmp_path / "report.html")
    assert "bad\\udcff.mp4: why not" in (tmp_path / "report.html").read_text("utf-8")
    assert RunReport.from_json(built.to_json()) == built


@given(st.lists(st.one_of(st.none(), st.floats(-200, 200), st.just(float("nan"))), max_size=60))
def test_histograms_count_every_clip_once(yaws: list[float | None]) -> None:
    clips = [ClipFigures(25, Quality(0.5, 100.0, 0.5, 0.0 if y is None else y, av_offset_ms=y)) for y in yaws]
    charts = {chart.name: chart for chart in finished([*clips]).distributions}
    chart = charts["av_offset_ms"]
    known = [y for y in yaws if y is not None and np.isfinite(y)]
    assert chart.known == len(known) and chart.known + chart.unknown == len(yaws)
    assert (chart.lowest, chart.highest) == ((min(known), max(known)) if known else (None, None))
    for place, count in enumerate(chart.counts):
        assert count == sum(chart.edges[place] <= y < chart.edges[place + 1] for y in known)
    median = chart.quantile(0.5)
    assert (median is None) == (not known)
    if median is not None:  # between the two middle values, within one bin
        low, high = sorted(known)[(len(known) - 1) // 2], sorted(known)[len(known) // 2]
        assert low - 41 <= median <= high + 41


def test_histograms_count_outliers_and_include_the_upper_edge() -> None:
    blurs = [-0.1, 0.0, 1.0, 1.2]
    built = finished([ClipFigures(25, Quality(blur, 5000.0, 0.5, 0.0)) for blur in blurs])
    charts = {chart.name: chart for chart in built.distributions}
    blur, face = charts["blur"], charts["face_px"]
    assert (blur.below, blur.counts[0], blur.counts[-1], blur.above) == (1, 1, 1, 1)
    assert face.above == 4 and face.quantile(0.5) == 5000
    assert "4 beyond the chart" in page_html(built)


def test_every_quality_number_has_a_histogram(run: RunReport) -> None:
    numbers = {item.name for item in dataclasses.fields(Quality)} - {"av_corrected"}
    assert {chart.name for chart in run.distributions} == numbers | {"length_s"}


def test_track_sample_is_bounded_evenly_spread_and_keeps_rare_reasons() -> None:
    many = [track(i, False, "not_speaking") for i in range(300)] + [track(i, False, "jittery") for i in range(300, 303)]
    built = finished([*many, *many, *[track(i) for i in range(500, 900)]], 20)
    kept, out = ([item for item in built.tracks if item.kept is wanted] for wanted in (True, False))
    assert len(kept) == len(out) == 20  # a track given twice counts once
    assert len({(item.source, item.track) for item in out}) == 20
    assert sum(item.reason == "jittery" for item in out) == 3
    assert len({item.source for item in kept}) >= 5
    ids = [item.track for item in kept]
    assert min(ids) < 600 and max(ids) > 800


def test_pictures_become_thumbnails_and_invalid_ones_are_dropped() -> None:
    good, bad = track(1), dataclasses.replace(track(2), jpeg=b"no picture", figures={"face_px": float("nan")})
    first, second = finished([good, bad]).tracks
    picture = cv2.imdecode(np.frombuffer(first.jpeg, np.uint8), cv2.IMREAD_COLOR)
    assert picture is not None and picture.shape == (report.THUMBNAIL_PX, report.THUMBNAIL_PX, 3)
    assert (second.jpeg, second.figures) == (b"", {})
    assert "no picture" in page_html(finished([bad]))


def test_report_memory_does_not_grow_with_tracks_and_clips() -> None:
    def peak(count: int) -> int:
        builder = ReportBuilder(10)
        tracemalloc.start()
        for i in range(count):
            builder.add(track(i, i % 2 == 0, "jittery" if i % 2 else None))
            builder.add(ClipFigures(50, Quality(0.1, 80.0, 0.5, 3.0)))
        high = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return high

    peak(20)
    assert peak(400) < 1.5 * peak(100)


# The page


class Outline(HTMLParser):
    """Collects tags, attributes and the text outside style and script; checks that tags are closed in order."""

    VOID = frozenset({"meta", "br", "img", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def test_page_is_well_formed_and_loads_nothing_external(run: RunReport) -> None:
    outline = Outline(page_html(run))
    assert outline.open == []
    assert not {"link", "iframe", "object", "base", "form", "a"} & set(outline.tags)
    for name, value in outline.attributes:
        if name in ("src", "href", "action", "srcset", "data"):
            assert value.startswith("data:image/jpeg;base64,")
        assert not name.startswith("on")
    assert not re.search(r"https?:|url\(|@import", page_html(run))


def test_page_has_every_section_and_the_numbers_of_the_report(run: RunReport) -> None:
    text = Outline(page_html(run)).text
    headings = ("Where the frames went", "Films", "Films set aside", "What the clips are like", "Faces, as a sample")
    places = [text.index(heading) for heading in (*headings, "Where the time went", "Settings")]
    assert places == sorted(places)
    assert "51.2 s of film" in text and "16.0 s in clips" in text and "10 of 13" in text
    assert "film_0.mp4: why not" in text and REASONS["no_face"].advice in text
    assert "300 MiB" in text and "2026-01-02 03:04" in text


@pytest.mark.parametrize("place", ["source", "message", "warning", "reason", "step", "setting", "track", "started"])
def test_untrusted_text_is_escaped(place: str) -> None:
    def at(name: str, plain: str) -> str:
        return HOSTILE if place == name else plain

    code = at("reason", "no_face")
    gone = SourceReport(
        at("source", "a.mp4"), None, 5, 0, 0, {code: 5}, code, at("message", "why"), [at("warning", "w")]
    )
    builder = ReportBuilder()
    for item in (gone, StepTime(at("step", "look"), 1.0, 1, 5), track(1, False, code)):
        builder.add(item)
    builder.add(dataclasses.replace(track(2), source=at("track", "b.mp4"), figures={at("track", "x"): 1.0}))
    built = builder.finish({at("setting", "a"): {"b": at("setting", "c")}}, at("started", "now"), 1.0, 1)
    outline = Outline(page_html(built))
    assert outline.tags.count("script") == 1 and outline.open == []
    assert "alert(1)" in outline.text
    assert not [name for name, _ in outline.attributes if not re.fullmatch(r"[a-zA-Z-]+\d?", name)]


def test_content_security_policy_allows_only_the_page_script(run: RunReport) -> None:
    html = page_html(run)
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    (policy,) = (value for name, value in Outline(html).attributes if name == "content" and "script-src" in value)
    wanted = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{wanted}'" in policy and "default-src 'none'" in policy


def test_page_of_very_many_films_lists_only_those_with_problems() -> None:
    sources = [source(f"good_{i}.mp4", 100, 100) for i in range(MOST_FILMS)]
    few = finished([*sources])
    assert page_html(few).count("<bdi>good_") == MOST_FILMS
    troubled = [source(f"bad_{i}.mp4", 100, 0) for i in range(3)]
    warned = dataclasses.replace(source("loud.mp4", 100, 100), warnings=["clipped"])
    many = page_html(finished([*sources, *troubled, warned]))
    (films,) = re.findall(r"<h2>Films</h2>.*?</table>", many, re.DOTALL)
    assert f"Of {MOST_FILMS + 4:,} films only those without a clip or with a warning" in films
    assert "good_" not in films and films.count("<bdi>bad_") == 3 and "loud.mp4" in films


def test_the_page_stays_bounded_when_everything_fails() -> None:
    html = page_html(finished([source(f"bad_{i}.mp4", 0, 0, "truncated") for i in range(MOST_FILMS + 500)]))
    assert f"the first {MOST_FILMS:,} of {MOST_FILMS + 500:,}" in html
    assert html.count("why not") == MOST_MESSAGES and f"{MOST_FILMS + 500 - MOST_MESSAGES:,} more" in html
    assert "No film could be opened" in html


def test_empty_run_has_a_page() -> None:
    built = ReportBuilder().finish({}, "", 0.0, 1)
    assert Outline(page_html(built)).open == []
    assert RunReport.from_json(built.to_json()) == built


def test_page_is_written_atomically(run: RunReport, tmp_path: Path) -> None:
    write_page(run, tmp_path / "deep" / "report.html")
    assert [item.name for item in (tmp_path / "deep").iterdir()] == ["report.html"]
    assert (tmp_path / "deep" / "report.html").read_text("utf-8") == page_html(run)
    with pytest.raises(TccpError, match="cannot write"):
        write_page(run, tmp_path / "deep" / "report.html" / "report.html")


# Texts


def test_every_reason_code_has_an_explanation() -> None:
    listed = re.sub(r"\s+", " ", str(MediaError.__doc__)).split("tccp.media uses")[1].replace(" and ", " ")
    ascending_rank = [
        *("before_video", "after_audio", "no_face", "not_speaking", "several_speak", "other_person", "too_turned"),
        *("too_small", "jittery", "occluded", "bridged", "no_context", "too_dark", "too_bright", "too_blurred"),
        *("too_short", "no_identity", "identity"),
    ]
    assert ascending_rank == FRAME_REASONS  # a frame with several reasons is counted under the last of them
    codes = {*re.findall(r"\w+", listed), *FRAME_REASONS, "bad_audio", "duplicate", "unsafe", "too_long_to_decode"}
    codes |= {"decoder_crashed", "no_truth", "other_truth", "bad_identity"}
    assert codes <= set(REASONS)
    for reason in REASONS.values():
        for sentence in (reason.meaning, reason.advice):
            assert sentence.endswith(".") and sentence[0].isupper()
    assert explain("not_known_yet").title == "not known yet"


def test_every_reason_has_a_colour_and_groups_are_contiguous() -> None:
    colours = reason_colours(dict.fromkeys(REASONS, 5))
    assert set(colours) == set(REASONS)
    groups = [explain(code).group for code in colours]
    assert [group for i, group in enumerate(groups) if group not in groups[:i]] == [*dict.fromkeys(groups)]
    assert len({group for i, group in enumerate(groups) if i and group != groups[i - 1]}) == 3
    few = reason_colours({"no_face": 9, "too_small": 5, "not_speaking": 3, "too_short": 1})
    assert len(set(few.values())) == 4


def test_formats_of_durations_percentages_and_numbers() -> None:
    assert [duration(s) for s in (0.0, 9.994, 42.04, 750.0, 16_416.0, 400_000.0)] == [
        "0.00 s",
        "9.99 s",
        "42.0 s",
        "12.5 min",
        "4.56 h",
        "111 h",
    ]
    shares = (0.0, 0.0001, 0.004, 0.126, 0.9981, 0.99999, 1.0)
    assert [percent(s) for s in shares] == ["0 %", "<0.1 %", "0.4 %", "13 %", "99.8 %", ">99.9 %", "100 %"]
    assert [number(v) for v in (0.12345, -40.0, 12345.0, 3e-9)] == ["0.123", "−40", "12,345", "0"]
