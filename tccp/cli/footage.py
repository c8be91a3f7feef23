"""Commands about footage and clip tables: synth, weights, preprocess, inspect."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from tccp.cli.options import Json, Overrides, Preset, emit, note
from tccp.config import load_settings
from tccp.errors import TccpError


def synth(
    out: Positional[Path],
    /,
    clips: int = 8,
    seconds: float = 4.0,
    seed: int = 0,
    people: int | None = None,
    excerpt: float | None = None,
    json: Json = False,
) -> None:
    """Write procedural conversation scenes (RoundTable): MP4s with sound, a truth file and an identity picture each.

    Args:
        out: folder for the films; made if it does not exist.
        clips: number of films.
        seconds: length of each.
        seed: the same seed gives the same films.
        people: how many different persons talk in them; by default each film has its own.
        excerpt: film only so many seconds of each conversation, from a random moment: more scenes in as many frames.
    """
    from tccp.progress import progress
    from tccp.roundtable import write_clips

    with progress() as bar:
        task = bar.add_task("drawing scenes", total=None)

        def on_frame(name: str, done: int, total: int) -> None:
            bar.update(task, advance=1, total=clips * total)

        paths = write_clips(out, clips, seconds, seed, people, progress=on_frame, excerpt_s=excerpt)
    emit(json, {"out": str(out), "films": [str(path) for path in paths]}, f"{len(paths)} films in {out}")


def weights(
    action: Positional[Literal["list", "fetch", "path"]],
    names: Positional[tuple[str, ...]] = (),
    /,
    url: str | None = None,
    to: Path | None = None,
    json: Json = False,
) -> None:
    """Weights made by others: what there is and under which licence, fetch them, or say where they are.

    Args:
        action: list: the table; fetch: download, check the hash, put into place; path: where a file is.
        names: which of the table; with list, all by default.
        url: of the one file to fetch (http, https, file). TCCP_WEIGHTS_URL names a mirror's folder for all of them.
        to: folder to fetch to (default: TCCP_WEIGHTS, else <storage>/weights).
    """
    from tccp import weights as third_party

    for name in names:
        third_party.entry(name)
    if action == "list":
        rows = [row for row in third_party.listing() if not names or row["name"] in names]
        emit(json, {"folder": str(third_party.default_folder()), "weights": rows}, third_party.text_table(rows))
        return
    if not names:
        raise TccpError(f"tccp weights {action}: name which of {', '.join(third_party.WEIGHTS)}")
    if action == "path":
        paths = {name: str(third_party.find(name)) for name in names}
        emit(json, {"paths": paths}, "\n".join(paths.values()))
        return
    if url is not None and len(names) > 1:
        raise TccpError(f"--url {url} is the address of one file: name one of {', '.join(names)}")
    fetched = [third_party.fetch(name, url, to) for name in names]
    emit(json, {"fetched": [item.to_json() for item in fetched]}, "\n".join(map(str, fetched)))


def preprocess(
    source: Positional[str],
    out: Positional[str],
    /,
    backend: Literal["mediapipe", "fan", "truth"] = "mediapipe",
    weights: Path | None = None,
    max_clip_s: float = 5.0,
    min_clip_s: float = 0.64,
    speakers: Literal["active", "main"] = "active",
    person: tuple[Path, ...] = (),
    lips: Path | None = None,
    workers: int | None = None,
    ray: bool = False,
    dry_run: bool = False,
    sample: int = 5,
    price_per_cpu_hour: float | None = None,
    preset: Preset = "toy",
    set: Overrides = (),
    json: Json = False,
) -> None:
    """Raw footage to a clip table: shots, faces, who speaks, 68 landmarks, head boxes, identity pictures, sound.

    Run it again after a stop, or with more films, and only what is missing is done. OUT/report.html shows what became
    of every film.

    Args:
        source: a film, a folder, a pattern in quotes, a manifest (.csv, .parquet, .jsonl), or a URL of any of them.
        out: folder or URL for the table (index.parquet, clips/), report.json and report.html.
        backend: where landmarks come from: mediapipe, fan (face-alignment), or truth (RoundTable's truth files).
        weights: folder of weights, or the backend's file (default: TCCP_WEIGHTS, else <storage>/weights).
        max_clip_s: longest clip in seconds; a longer shot gives several.
        min_clip_s: shortest; what is shorter is set aside. A window of the sequence networks has 0.32 seconds.
        speakers: active: whoever is seen to speak; main: in each shot the person who is there most, speaking or not.
        person: pictures of the one person who is wanted; needs SFace (tccp weights fetch sface).
        lips: also draw the lip references of all clips, into OUT/lips, with this Wav2Lip checkpoint (--set
            lips.source=wav2lip) or folder of cross-fitted Liplets. Training draws them itself where they are not there.
        workers: processes that look at films (default: this one). More than one run on Ray, on the cluster of
            RAY_ADDRESS if it is set.
        ray: use Ray in any case; workers are then as many as there are CPUs for, unless --workers says.
        dry_run: measure a sample of the films, say what all of them would take, and write nothing.
        sample: with --dry-run, how many films to measure.
        price_per_cpu_hour: with --dry-run, to estimate the cost.
    """
    from preprocessing.lip_step import lip_work
    from preprocessing.plan import make_plan
    from preprocessing.run import dry_run as estimate
    from preprocessing.run import preprocess as run

    settings = load_settings(preset, set)
    pictures = tuple(str(path) for path in person)
    plan = make_plan(settings.picture_px, backend, weights, max_clip_s, min_clip_s, speakers, pictures)
    if dry_run:
        found = estimate([source], plan, workers or 1, sample, price_per_cpu_hour)
        print(found.to_json() if json else found.to_text())
        return
    report = run([source], out, plan, workers, ray, None if lips is None else lip_work(settings.lips, lips))
    lines = [f"{report.clips} clips, {report.frames} frames in {out}"]
    for item in report.sources:
        for warning in item.warnings:
            note(f"{item.source}: {warning}")
        if item.reason:
            lines.append(f"set aside: {item.message} [{item.reason}]")
    lines.append(f"look at {out}/report.html")
    emit(json, {"out": out, **report.to_dict(pictures=False)}, "\n".join(lines))


def inspect(
    table: Positional[str],
    /,
    clip: str | None = None,
    out: Path | None = None,
    count: int = 24,
    json: Json = False,
) -> None:
    """Look into a clip table: statistics; a contact sheet of its clips; a film of one clip with all that is known.

    Args:
        table: folder or URL of a clip table.
        clip: id of a clip, or its beginning; --out is then an MP4 with landmarks, box, mask, mel and offset drawn in.
        out: what to write: .png for a contact sheet, .mp4 with --clip (default: clip-ID.mp4 here).
        count: clips on the contact sheet.
    """
    from preprocessing.report import inspection as inspecting
    from tccp.clips.clip_table import ClipTable

    with ClipTable(table) as opened:
        if clip is not None:
            found = inspecting.find_clip(opened, clip)
            target = out or Path(f"clip-{found[:12]}.mp4")
            shown = inspecting.preview(opened, found, target)
            emit(json, {"clip_id": shown.clip_id, "out": str(target)}, f"clip {shown.clip_id}: {target}")
            return
        figures = inspecting.statistics(opened)
        text = inspecting.statistics_text(figures)
        if out is not None:
            drawn = inspecting.sheet(opened, out, count)
            text += f"\n{drawn} clips in {out}"
        emit(json, figures, text)
