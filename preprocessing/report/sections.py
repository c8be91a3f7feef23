"""The sections of the page, top to bottom. Each function turns the report into HTML; "" if there is nothing to show."""

from __future__ import annotations

import base64
import itertools
import json
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

from preprocessing.reasons import explain
from preprocessing.report.charts import histogram, reason_colours, share_bar, step_bars
from preprocessing.report.formatting import (
    duration,
    escaped,
    film_time,
    isolated,
    number,
    percent,
    plural,
    size,
)
from preprocessing.report.record import Histogram, RunReport, SourceReport, TrackSample
from preprocessing.sources.listing import described
from tccp.config import FPS

MOST_FILMS = 2000
"""Most rows in the table of films. If there are more films, only those without a clip or with a warning are listed."""
MOST_MESSAGES = 100
"""Most messages shown for each reason."""

_MEASURES = {
    "length_s": ("Clip length", "from the first frame to the last"),
    "face_px": ("Face size", "brows to chin, in pixels of the film"),
    "yaw_deg": ("Head turn", "0 faces the camera; positive is to the right of the picture"),
    "blur": ("Blur", "0 sharp, 1 blurred"),
    "brightness": ("Brightness", "of the face: 0 black, 1 white"),
    "occlusion": ("Mouth covered", "0 visible, 1 covered; highest value in the clip"),
    "jitter": ("Jitter of the landmarks", "before smoothing, in distances of the outer eye corners"),
    "bridged": ("Frames without a detected face", "share of the clip's frames, whose landmarks are interpolated"),
    "visible": ("Visible scene", "share of the picture outside the head box"),
    "av_offset_ms": ("Offset of the sound", "positive: the film's sound comes late"),
    "sync_confidence": ("Confidence of that offset", "higher is more certain"),
    "speaking_score": ("Speaks", "share of the frames with a voice in which this mouth moves"),
}


def headline(report: RunReport) -> str:
    """Start time, share of film in clips, and the main figures."""
    totals = report.totals
    share = totals.frames_in_clips / totals.frames if totals.frames else 0.0
    cards = [
        ("clips", f"{totals.clips:,}"),
        ("films with clips", f"{totals.films_with_clips:,} of {totals.films:,}"),
        ("time taken", duration(report.seconds)),
        ("times real time", f"{number(report.throughput)}×"),
        ("workers", f"{report.workers:,}"),
    ]
    if report.peak_memory_bytes is not None:
        cards.append(("peak memory", size(report.peak_memory_bytes)))
    listed = "".join(f"<div><dt>{escaped(name)}</dt><dd>{escaped(value)}</dd></div>" for name, value in cards)
    return (
        f'<h1>Preprocessing report</h1>\n<p class="soft">Started {escaped(_date_and_time(report.started))}</p>\n'
        f'<p class="lead">{film_time(totals.frames)} of film <span aria-hidden="true">→</span> '
        f"<b>{film_time(totals.frames_in_clips)} in clips</b> ({percent(share)})</p>\n"
        f'<dl class="cards">{listed}</dl>'
    )


def _date_and_time(iso: str) -> str:
    try:
        return datetime.fromisoformat(iso).strftime("%Y-%m-%d %H:%M %Z").strip()
    except ValueError:
        return iso


def frames_by_reason(report: RunReport) -> str:
    """All frames by what became of them, with advice."""
    totals = report.totals
    if not totals.frames:
        return "<h2>Where the frames went</h2>\n<p>No film could be opened, so there are no frames to count.</p>"
    colours = {"in clips": "var(--fill)", **reason_colours(totals.frames_by_reason)}
    counts = {"in clips": totals.frames_in_clips, **totals.frames_by_reason}
    rows = []
    for code in colours:
        reason = explain(code)
        what, advice = (
            (f"<b>{escaped(reason.title)}</b> <code>{escaped(code)}</code><br>{escaped(reason.meaning)}", reason.advice)
            if code != "in clips"
            else ("<b>in clips</b><br>In the clip table, ready for training.", "")
        )
        rows.append(
            f'<tr><td data-label="What"><span class="swatch" style="background:{colours[code]}"></span>{what}</td>'
            f'<td data-label="Share" class="n">{percent(counts[code] / totals.frames)}</td>'
            f'<td data-label="Film" class="n">{film_time(counts[code])}</td>'
            f'<td data-label="What to do">{escaped(advice)}</td></tr>'
        )
    return (
        "<h2>Where the frames went</h2>\n<p>Every frame of every film that could be opened is either in a clip or was "
        "left out for one reason.</p>\n"
        f"{share_bar(totals.frames_in_clips, totals.frames_by_reason)}\n"
        f'<table class="stack"><thead><tr><th class="wide">What</th><th class="n">Share</th><th class="n">Film</th>'
        f"<th>What to do</th></tr></thead><tbody>{''.join(rows)}</tbody></table>"
    )


def films(report: RunReport) -> str:
    """The table of films."""
    listed: list[SourceReport] = report.sources
    if not listed:
        return ""
    note = ""
    if len(listed) > MOST_FILMS:
        troubled = [source for source in listed if not source.clips or source.warnings]
        listed = troubled[:MOST_FILMS]
        rest = f", the first {MOST_FILMS:,} of {len(troubled):,}" if len(troubled) > MOST_FILMS else ""
        note = (
            f"<p>Of {len(report.sources):,} films only those without a clip or with a warning are listed{rest}; "
            "all are in report.json.</p>"
        )
    if report.not_films:
        note += f"<p>{escaped(described(report.not_films))}.</p>"
    heads = [
        ("Film", ""),
        ("Length", ' class="n"'),
        ("In clips", ' class="n"'),
        ("Share", ""),
        ("Clips", ' class="n"'),
    ]
    head = "".join(f'<th{kind}><button type="button">{name}</button></th>' for name, kind in heads)
    return (
        f"<h2>Films</h2>\n{note}"
        '<input type="search" id="films" placeholder="Search films and reasons" aria-label="Search films" hidden>\n'
        f'<table class="stack sort" data-search="films"><thead><tr>{head}<th>Left out, and warnings</th></tr></thead>'
        f"<tbody>{''.join(map(_film, listed))}</tbody></table>"
    )


_MOST_REASONS = 3


def _film(source: SourceReport) -> str:
    share = source.frames_in_clips / source.frames if source.frames else 0.0
    parts = []
    for code in source.reasons:
        frames = source.left_out.get(code, 0)
        parts.append(explain(code).title + (f" {film_time(frames)}" if frames else ""))
    rest = f" · {len(parts) - _MOST_REASONS} more" if len(parts) > _MOST_REASONS else ""
    left_out = escaped(" · ".join(parts[:_MOST_REASONS]) + rest or "nothing")
    if not source.clips:
        left_out = f'<span class="bad">{left_out}</span>'
    warnings = "".join(f'<br><span class="small">{escaped(warning)}</span>' for warning in source.warnings)
    length, in_clips = (film_time(count) if count else "–" for count in (source.frames, source.frames_in_clips))
    return (
        f'<tr><td data-value="{escaped(source.source)}">{isolated(source.source)}</td>'
        f'<td data-label="Length" class="n" data-value="{source.frames}">{length}</td>'
        f'<td data-label="In clips" class="n" data-value="{source.frames_in_clips}">{in_clips}</td>'
        f'<td data-label="Share" data-value="{share:.6f}"><span>{percent(share)}<span class="meter">'
        f'<i style="width:{100 * share:.1f}%"></i></span></span></td>'
        f'<td data-label="Clips" class="n" data-value="{source.clips}">{source.clips:,}</td>'
        f'<td data-label="Left out"><span>{left_out}{warnings}</span></td></tr>'
    )


_UNFOLDED_MESSAGES = 8


def set_aside(report: RunReport) -> str:
    """The films without a clip, by reason, with their messages."""
    without = [source for source in report.sources if source.reason is not None]
    if not without:
        return ""
    blocks = []
    order = sorted(report.totals.sources_by_reason.items(), key=lambda item: (-item[1], item[0]))
    for code, count in order:
        reason = explain(code)
        messages = [source for source in without if source.reason == code]
        lines = "".join(
            f"<li>{isolated(source.source)}<br><span class='small soft'>{isolated(source.message or '')}</span></li>"
            for source in messages[:MOST_MESSAGES]
        )
        rest = f"<p>… and {count - MOST_MESSAGES:,} more, in report.json.</p>" if count > MOST_MESSAGES else ""
        listed = f'<ul class="plain">{lines}</ul>{rest}'
        if count > _UNFOLDED_MESSAGES:
            listed = f"<details><summary>{plural(count, 'film')}</summary>{listed}</details>"
        blocks.append(
            f"<h3>{escaped(reason.title)}: {plural(count, 'film')} <code>{escaped(code)}</code></h3>\n"
            f"<p>{escaped(reason.meaning)} {escaped(reason.advice)}</p>\n{listed}"
        )
    return f"<h2>Films set aside</h2>\n<p>The run continued without these films.</p>\n{''.join(blocks)}"


def histograms(report: RunReport) -> str:
    """A histogram of each quality figure."""
    charts = [chart for chart in report.distributions if chart.known]
    if not charts:
        return ""
    figures = "".join(map(_chart, charts))
    return (
        "<h2>What the clips are like</h2>\n<p>Number of clips by value. The line marks the median; the number at the "
        f'top right is the height of the tallest bar.</p>\n<div class="charts">{figures}</div>'
    )


def _chart(chart: Histogram) -> str:
    title, explanation = _MEASURES.get(chart.name, (chart.name, ""))
    median = chart.quantile(0.5)
    assert median is not None and chart.lowest is not None and chart.highest is not None
    unit = "" if not chart.unit or chart.unit == "°" else f" {chart.unit}"
    sign = "°" if chart.unit == "°" else ""
    facts = [f"median {number(median)}{sign}{unit}", f"{number(chart.lowest)} to {number(chart.highest)}{sign}{unit}"]
    outside = chart.below + chart.above
    facts += [f"{outside:,} beyond the chart"] if outside else []
    facts += [f"not measured in {chart.unknown:,}"] if chart.unknown else []
    return (
        f"<figure><figcaption><b>{escaped(title)}</b> {escaped(explanation)}</figcaption>{histogram(chart)}"
        f"<figcaption>{escaped(' · '.join(facts))}</figcaption></figure>"
    )


def tracks(report: RunReport) -> str:
    """The sampled face pictures: kept ones, and the others by reason."""
    kept = [track for track in report.tracks if track.kept]
    rejected = [track for track in report.tracks if not track.kept]
    if not kept and not rejected:
        return ""
    parts = [
        "<h2>Faces, as a sample</h2>\n<p>One picture for each person in each shot, sampled evenly from all films.</p>"
    ]
    if kept:
        parts.append(f"<h3>Kept ({len(kept)} shown)</h3>\n{_sheet(kept)}")
    if rejected:
        parts.append(f"<h3>Left out ({len(rejected)} shown)</h3>")
        for code, group in itertools.groupby(rejected, key=lambda track: track.reason or "unknown"):
            members = list(group)
            reason = explain(code)
            parts.append(
                f"<p><b>{escaped(reason.title)}</b> <code>{escaped(code)}</code> "
                f'<span class="soft">{escaped(reason.meaning)}</span></p>{_sheet(members)}'
            )
    return "\n".join(parts)


_UNFOLDED_TRACKS = 36


def _sheet(members: list[TrackSample]) -> str:
    first, rest = members[:_UNFOLDED_TRACKS], members[_UNFOLDED_TRACKS:]
    sheet = f'<div class="sheet">{"".join(map(_track, first))}</div>'
    if rest:
        more = f'<div class="sheet">{"".join(map(_track, rest))}</div>'
        sheet += f"<details><summary>{len(rest)} more</summary>{more}</details>"
    return sheet


def _track(track: TrackSample) -> str:
    if track.jpeg:
        data = base64.b64encode(track.jpeg).decode("ascii")
        picture = f'<img src="data:image/jpeg;base64,{data}" alt="face" loading="lazy">'
    else:
        picture = '<span class="none">no picture</span>'
    figures = " · ".join(f"{name.replace('_', ' ')} {number(value)}" for name, value in track.figures.items())
    when = f"{track.start_s:.1f}–{track.stop_s:.1f} s"
    return (
        f"<figure{'' if track.kept else ' class=out'}>{picture}<figcaption>"
        f'<span class="name" title="{escaped(track.source)}">{isolated(track.source)}</span>{when}, track {track.track}'
        f'<br><span class="soft">{escaped(figures)}</span></figcaption></figure>'
    )


def time_per_step(report: RunReport) -> str:
    """Speed of the run, and the time of each step."""
    if not report.steps:
        return ""
    busy = duration(sum(step.seconds for step in report.steps))
    return (
        "<h2>Where the time went</h2>\n"
        f"<p>{film_time(report.totals.frames)} of film in {duration(report.seconds)}: {number(report.throughput)} "
        f"seconds of film per second, with {plural(report.workers, 'worker')}. The times of the steps are summed over "
        f"all workers: {busy}.</p>\n"
        '<table class="stack"><thead><tr><th>Step</th><th class="n">Time</th><th>Share</th><th class="n">Items</th>'
        '<th class="n">Frames</th><th class="n">Frames/s</th></tr></thead>'
        f"<tbody>{step_bars(report.steps)}</tbody></table>"
    )


def settings(report: RunReport) -> str:
    """The table of settings."""
    rows = [
        f'<tr><td><code>{escaped(name)}</code></td><td data-label="Value">{escaped(value)}</td></tr>'
        for name, value in _flat(report.settings)
    ]
    return (
        f"<h2>Settings</h2>\n<details><summary>{plural(len(rows), 'setting')}</summary>"
        '<table class="stack"><thead><tr><th>Name</th><th>Value</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></details>"
    )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """Nested settings as dotted names with their values as text, JSON where they are not text."""
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value, default=str)


def footer(report: RunReport) -> str:
    """Where the same figures are stored, and versions."""
    return (
        f"<footer>All figures are also in report.json (report version {report.report_version}), beside the clip table "
        f"(schema version {report.schema_version}). Film durations are counted at {FPS} frames per second.</footer>"
    )
