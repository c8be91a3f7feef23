"""Commands for footage and clip tables: synth, weights, preprocess, inspect."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from tccp.cli.options import Backend, Json, Overrides, Preset, emit, note, settings_of
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
    """Draw RoundTable films: procedural conversations, each an MP4 with sound, a truth file and an identity picture.

    Args:
        out: folder for the films; created if it does not exist.
        clips: number of films.
        seconds: length of each film.
        seed: the same seed gives the same films.
        people: number of different speakers over all films (default: a new speaker in each film).
        excerpt: film only this many seconds of each conversation, from a random moment. More scenes for the same number
            of frames.
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
    """List third-party weights with their licences, download them, or print where they are.

    Args:
        action: list: print the table; fetch: download files and check their hashes; path: print where files are.
        names: names from the table (with list, default: all).
        url: address to download the one named file from (http, https, file). TCCP_WEIGHTS_URL names the folder of a
            mirror for all files.
        to: folder to download to (default: TCCP_WEIGHTS, else <storage>/weights).
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
    backend: Backend = "mediapipe",
    weights: Path | None = None,
    max_clip_s: float = 5.0,
    min_clip_s: float = 0.64,
    speakers: Literal["active", "main"] = "active",
    person: tuple[Path, ...] = (),
    max_bridged: float = 0.25,
    min_visible: float = 0.05,
    lips: Path | None = None,
    workers: int | None = None,
    ray: bool = False,
    overlap: bool = True,
    dry_run: bool = False,
    sample: int = 5,
    price_per_cpu_hour: float | None = None,
    preset: Preset = "toy",
    set: Overrides = (),
    json: Json = False,
) -> None:
    """Turn raw footage into a clip table: shots, faces, active speaker, 68 landmarks, head boxes, identity pictures,
    sound.

    A second run, after an interruption or with more films, does only the missing work. OUT/report.html shows the result
    for every film.

    Args:
        source: a film, a folder, a pattern in quotes, a manifest (.csv, .parquet, .jsonl), or a URL of one of these.
        out: folder or URL for the table (index.parquet, clips/), report.json and report.html.
        weights: folder of weights, or the backend's file (default: TCCP_WEIGHTS, else <storage>/weights).
        max_clip_s: longest clip in seconds; a longer shot is split into several clips.
        min_clip_s: shortest clip in seconds; shorter ones are left out. A window of the sequence networks lasts 0.32 s.
        speakers: active: keep people who are seen to speak; main: keep in each shot the person who is visible longest,
            whether they speak or not.
        person: pictures of the one person to keep; needs SFace (tccp weights fetch sface).
        max_bridged: largest share of a clip's frames in which the detector did not find the face, 0 to 1.
        min_visible: smallest share of the picture that the head box leaves visible, 0 to 1; with less, networks see
            nothing of the scene.
        lips: also compute the lip references of all clips, in OUT/lips, with this Wav2Lip checkpoint (--set
            lips.source=wav2lip) or folder of cross-fitted Liplets. Training computes the references that are missing.
        workers: processes that analyse films (default: only this one). Several workers run on Ray, on the cluster that
            RAY_ADDRESS names if it is set.
        ray: always use Ray. Without --workers, it uses as many workers as there are CPUs for.
        overlap: without Ray, look at the next reel, in a thread, while the clips of this one are cut, and let several
            MediaPipe detectors work at once. The table is the same without.
        dry_run: measure a sample of the films and print the estimated time, storage and cost for all; write nothing.
        sample: with --dry-run, number of films to measure.
        price_per_cpu_hour: with --dry-run, price for the estimate of the cost.
    """
    from preprocessing.analysis.cut import clip_frames
    from preprocessing.analysis.quality import QualityBounds

    settings = settings_of(preset, set)
    pictures = tuple(str(path) for path in person)
    clip_frames(min_clip_s, max_clip_s)
    _check_preprocess(source, None if dry_run else out, backend, weights, workers)
    from preprocessing.lip_step import lip_work
    from preprocessing.plan import make_plan
    from preprocessing.run import dry_run as estimate
    from preprocessing.run import preprocess as run

    bounds = None if backend == "truth" else QualityBounds(max_bridged=max_bridged, min_visible=min_visible)
    plan = make_plan(settings.picture_px, backend, weights, max_clip_s, min_clip_s, speakers, pictures, bounds)
    if dry_run:
        found = estimate([source], plan, workers or 1, sample, price_per_cpu_hour)
        print(found.to_json() if json else found.to_text())
        return
    report = run([source], out, plan, workers, ray, None if lips is None else lip_work(settings.lips, lips), overlap)
    lines = [f"{report.clips} clips, {report.frames} frames in {out}"]
    for item in report.sources:
        for warning in item.warnings:
            note(f"{item.source}: {warning}")
        if item.reason:
            lines.append(f"set aside: {item.message} [{item.reason}]")
    lines.append(f"look at {out}/report.html")
    emit(json, {"out": out, **report.to_dict(pictures=False)}, "\n".join(lines))


def _check_preprocess(source: str, out: str | None, backend: str, weights: Path | None, workers: int | None) -> None:
    """Raises TccpError for what can be seen before the detector and Ray are loaded, which takes seconds."""
    from preprocessing.sources.finding import find_sources
    from tccp import faces
    from tccp.files import check_writable_folder, is_url

    if workers is not None and workers < 1:
        raise TccpError(f"workers {workers}: give at least 1")
    if not is_url(source):
        films = find_sources([source]).column("path").to_pylist()
        if len(films) == 1 and not is_url(films[0]) and not Path(films[0]).exists():
            raise TccpError(f"{films[0]}: there is no such file; check the path")
    if out is not None and not is_url(out):
        check_writable_folder("OUT", Path(out))
    if backend != "truth":
        faces.check_backend(backend, weights)


def inspect(
    table: Positional[str],
    /,
    clip: str | None = None,
    out: Path | None = None,
    count: int = 24,
    json: Json = False,
) -> None:
    """Print statistics of a clip table; draw a contact sheet of its clips, or a film of one clip with its annotations.

    Args:
        table: folder or URL of a clip table.
        clip: id of a clip, or the first characters of it. --out is then an MP4 that shows landmarks, box, mask, mel and
            offset.
        out: file to write: a .png contact sheet, or with --clip an .mp4 (default: clip-ID.mp4 in the current folder).
        count: number of clips on the contact sheet.
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
