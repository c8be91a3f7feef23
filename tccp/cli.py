"""`tccp <verb>`: the commands. Heavy imports stay inside the verbs, so that `tccp --help` answers at once."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional

from tccp.config import TccpError, load_settings, storage_root

Preset = Annotated[str, tyro.conf.arg(help="settings to start from: paper or toy")]
Overrides = Annotated[
    tuple[str, ...],
    tyro.conf.arg(name="set", metavar="KEY=VALUE", help="settings to change, e.g. training.max_steps=200"),
]
Json = Annotated[bool, tyro.conf.arg(help="print one JSON object on stdout, and nothing else there")]
Storage = Annotated[Path | None, tyro.conf.arg(help="where runs and caches live (default: TCCP_STORAGE, else ~/.tccp)")]
Device = Annotated[str, tyro.conf.arg(help="cpu, cuda or cuda:N; auto takes a GPU where there is one")]


def _emit(as_json: bool, record: dict[str, Any], text: str) -> None:
    print(json.dumps(record, indent=2, allow_nan=False) if as_json else text)


def _note(text: str) -> None:
    print(f"tccp: {text}", file=sys.stderr)


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise TccpError(f"--device {name}: give auto, cpu, cuda or cuda:N")
    found = torch.cuda.device_count()
    if name != "cpu" and int(name.partition(":")[2] or 0) >= found:
        raise TccpError(
            f"--device {name}: {found or 'no'} CUDA devices here; use --device {'cuda:0' if found else 'cpu'}"
        )
    return name


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
    _emit(json, {"out": str(out), "films": [str(path) for path in paths]}, f"{len(paths)} films in {out}")


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
        workers: processes that look at films (default: this one). More than one run on Ray, on the cluster of
            RAY_ADDRESS if it is set.
        ray: use Ray in any case; workers are then as many as there are CPUs for, unless --workers says.
        dry_run: measure a sample of the films, say what all of them would take, and write nothing.
        sample: with --dry-run, how many films to measure.
        price_per_cpu_hour: with --dry-run, to estimate the cost.
    """
    from preprocessing.pipeline import dry_run as estimate
    from preprocessing.pipeline import preprocess as run

    settings = load_settings(preset, set)
    common: dict[str, Any] = {
        "backend": backend,
        "weights": weights,
        "max_clip_s": max_clip_s,
        "min_clip_s": min_clip_s,
        "speakers": speakers,
        "person": person,
    }
    if dry_run:
        found = estimate(
            [source], settings, sample=sample, price_per_cpu_hour=price_per_cpu_hour, workers=workers or 1, **common
        )
        print(found.to_json() if json else found.to_text())
        return
    report = run([source], out, settings, workers=workers, on_ray=ray, **common)
    lines = [f"{report.clips} clips, {report.frames} frames in {out}"]
    for item in report.sources:
        for warning in item.warnings:
            _note(f"{item.source}: {warning}")
        if item.reason:
            lines.append(f"set aside: {item.message} [{item.reason}]")
    lines.append(f"look at {out}/report.html")
    _emit(json, {"out": out, **report.to_dict(pictures=False)}, "\n".join(lines))


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
        out: what to write: .png for a contact sheet, .mp4 with --clip.
        count: clips on the contact sheet.
    """
    from preprocessing import inspecting
    from tccp.clip import ClipTable

    with ClipTable(table) as opened:
        if clip is not None:
            target = out or Path("clip.mp4")
            shown = inspecting.preview(opened, inspecting.find_clip(opened, clip), target)
            _emit(json, {"clip_id": shown.clip_id, "out": str(target)}, f"clip {shown.clip_id}: {target}")
            return
        figures = inspecting.statistics(opened)
        text = inspecting.statistics_text(figures)
        if out is not None:
            drawn = inspecting.sheet(opened, out, count)
            text += f"\n{drawn} clips in {out}"
        _emit(json, figures, text)


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
        _emit(json, {"folder": str(third_party.place()), "weights": rows}, third_party.text_table(rows))
        return
    if not names:
        raise TccpError(f"tccp weights {action}: name which of {', '.join(third_party.WEIGHTS)}")
    if action == "path":
        paths = {name: str(third_party.find(name)) for name in names}
        _emit(json, {"paths": paths}, "\n".join(paths.values()))
        return
    if url is not None and len(names) > 1:
        raise TccpError(f"--url {url} is the address of one file: name one of {', '.join(names)}")
    fetched = [third_party.fetch(name, url, to) for name in names]
    _emit(json, {"fetched": [item.to_json() for item in fetched]}, "\n".join(map(str, fetched)))


def train(
    components: Positional[tuple[str, ...]],
    /,
    data: Path,
    weights: Path,
    preset: Preset = "toy",
    set: Overrides = (),
    resume: bool = False,
    autoencoder: Path | None = None,
    lip_weights: Path | None = None,
    control_from: Path | None = None,
    jobs: int = 1,
    device: Device = "auto",
    storage: Storage = None,
    json: Json = False,
) -> None:
    """Train components of a pipeline, or all that it lacks, and add them to its folder.

    Args:
        components: of autoencoder, lips, landmark_first, landmark_sequence, face_first, face_sequence, one_stage_first
            and one_stage_sequence; or all.
        data: clip table (the folder that `tccp preprocess` wrote).
        weights: the pipeline folder to add to; made if it does not exist.
        resume: go on with a run that was interrupted, from its last checkpoint.
        autoencoder: a pre-trained diffusers AutoencoderKL folder to take instead of training one.
        lip_weights: the published Wav2Lip checkpoint, for lips.source=wav2lip.
        control_from: a pipeline folder whose video branches are taken over; with training.freeze_video_branch=true only
            the control branch is trained.
        jobs: components trained side by side, each in a process with its share of the cores.
    """
    from tccp.training.recipe import Trainer

    if not components or ("all" in components and len(components) > 1):
        raise TccpError("name components, or all, not both: tccp train --help lists them")
    settings = load_settings(preset, set)
    taken = {"autoencoder": autoencoder, "lip-weights": lip_weights, "control-from": control_from}
    options = [item for name, path in taken.items() if path for item in (f"--{name}", path.resolve().name)]
    trainer = Trainer(
        data,
        weights,
        settings,
        storage_root(storage),
        resume=resume,
        device=_device(device),
        pretrained_autoencoder=autoencoder,
        lip_weights=lip_weights,
        control_from=control_from,
        command=shlex.join(
            ["tccp", "train", *components, "--preset", preset, *options, *(["--set", *set] if set else [])]
        ),
    )
    if "all" in components:
        components = trainer.train_missing(jobs)
    else:
        trainer.train(components, jobs)
    _emit(
        json,
        {"weights": str(weights), "trained": list(components)},
        f"trained {', '.join(components) or 'nothing: all is there'}: {weights}",
    )


def export(
    weights: Positional[Path],
    out: Positional[Path],
    components: tuple[str, ...] | None = None,
    half: bool = False,
    set: Overrides = (),
    json: Json = False,
) -> None:
    """Copy components of a pipeline folder to another folder, to be passed on.

    Args:
        weights: pipeline folder.
        out: folder to copy to; components that are there are replaced.
        components: which; by default those that generate in two stages.
        half: store weights in half precision, at half the size.
        set: settings of sampling that the copy is to have, e.g. sampling.steps=20; training has decided the others.
    """
    from tccp.pipeline import export as export_components
    from tccp.pipeline import read_manifest

    copied = export_components(weights, out, components, half=half, sampling=set)
    files = [path for path in out.rglob("*") if path.is_file()]
    size_mb = sum(path.stat().st_size for path in files) / 1e6
    _emit(
        json,
        {"out": str(out), "components": sorted(read_manifest(out)["components"]), "megabytes": round(size_mb, 1)},
        f"{len(copied)} components in {out}, {size_mb:.1f} MB",
    )


def generate(
    scene: Path,
    audio: Path,
    identity: Path,
    weights: Path,
    out: Path,
    mask: Path | None = None,
    box: str | None = None,
    truth: bool = False,
    detector: Literal["mediapipe", "fan", "lbp"] = "mediapipe",
    detector_weights: Path | None = None,
    person: tuple[float, float] | None = None,
    identity_box: str | None = None,
    extend: Literal["no", "freeze", "pingpong"] = "no",
    steps: int | None = None,
    solver: Literal["ddpm", "ddim", "dpmpp"] | None = None,
    guidance_scale: float | None = None,
    temperature: float | None = None,
    seed: int = 0,
    preset: Annotated[str | None, tyro.conf.arg(help="refuse weights of any other preset")] = None,
    one_stage: bool = False,
    save_landmarks: Path | None = None,
    landmarks: Path | None = None,
    redraw: bool = False,
    color_match: bool = True,
    lossless: bool = False,
    lip_weights: Path | None = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Generate a talking head into a scene: an MP4 with exactly as many frames as the sound asks for, and the sound.

    Where the head is comes from --mask, --box or --truth; without them a face detector looks for it.

    Args:
        scene: the film.
        audio: any media file with sound.
        identity: a picture or a film of the person; with --truth, a picture is taken as the head crop it is there.
        weights: pipeline folder; `toy` is the packaged one, which knows RoundTable only.
        out: the film to write, .mp4.
        mask: a film of the scene's size, bright where the head is to be.
        box: x0,y0,x1,y1 in scene pixels, or a JSON track file {"boxes": [[x0, y0, x1, y1], null, ...]}.
        truth: take the head box from the truth file beside a film of `tccp synth`.
        detector: mediapipe, fan (slow without a GPU), or lbp (frontal faces, needs no download).
        detector_weights: face_landmarker.task, or its folder.
        person: x y of the person to replace, when there are several; default: the one who is there most.
        identity_box: x0,y0,x1,y1 of the head in the identity picture, or `whole` when it shows the head alone.
        extend: what to do when the scene is shorter than the sound.
        steps: sampling steps (default: as the weights say).
        guidance_scale: above 1, conditions are followed more closely.
        temperature: below 1, nearer to what is most likely; at 1, livelier.
        one_stage: use the one-stage ablation networks.
        save_landmarks: write stage 1's landmarks as JSON lines, to look at or edit.
        landmarks: take (edited) landmarks from such a file instead of stage 1.
        redraw: read stage 1's points back and draw them anew for stage 2.
        color_match: match the generated head's colour to the ring around the mask.
        lossless: every pixel outside the mask bit-equal to the decoded scene.
        lip_weights: the published Wav2Lip checkpoint, for weights trained with lips.source=wav2lip.
    """
    from tccp.film import FilmRequest, generate_film
    from tccp.pipeline import weights_folder

    request = FilmRequest(
        scene=scene,
        audio=audio,
        identity=identity,
        weights=weights_folder(weights),
        out=out,
        mask=mask,
        box=box,
        truth=truth,
        detector=detector,
        detector_weights=detector_weights,
        person=person,
        identity_box=identity_box,
        extend=extend,
        steps=steps,
        solver=solver,
        guidance_scale=guidance_scale,
        temperature=temperature,
        seed=seed,
        preset=preset,
        one_stage=one_stage,
        save_landmarks=save_landmarks,
        landmarks=landmarks,
        redraw=redraw,
        color_match=color_match,
        lossless=lossless,
        lip_weights=lip_weights,
        device=_device(device),
    )
    result = generate_film(request, warn=_note)
    text = f"{result.out}: {result.frames} frames, {result.passed_through} passed through, {result.seconds:.1f} s"
    _emit(json, result.to_json(), text)


def evaluate(
    benchmark: Positional[Literal["roundtable"]],
    /,
    weights: Path,
    ablations: Path | None = None,
    quick: bool = False,
    clips: int | None = None,
    jobs: int | None = None,
    sheet: Path | None = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Measure a pipeline on clips of which everything is known: sync, coherence, fidelity, drift, against baselines.

    On two cores some twenty minutes; with --quick two.

    Args:
        benchmark: roundtable: procedural scenes with new people, rooms and voices.
        weights: pipeline folder; `toy` for the packaged one.
        ablations: folder with the pipelines no_lip, one_stage and context_blind; rows without them are left out.
        quick: a tenth of the clips and shorter chains, to see that all is well; not to be quoted.
        clips: number of held-out clips (default: 128; 12 with --quick).
        jobs: processes of one thread each (default: one per core, at most 8; 1 on a GPU). Figures do not depend on it.
        sheet: a PNG to write, of five clips: what was given, the truth, what was generated.
    """
    import dataclasses

    from tccp.evaluation.report import text_table
    from tccp.evaluation.runner import FULL, QUICK, evaluate_roundtable
    from tccp.pipeline import weights_folder

    place = _device(device)
    extent = QUICK if quick else FULL
    if clips is not None:
        extent = dataclasses.replace(extent, clips=clips)
    if jobs is None:
        jobs = min(8, os.cpu_count() or 1) if place == "cpu" else 1
    record = evaluate_roundtable(weights_folder(weights), ablations, extent, jobs=jobs, sheet=sheet, device=place)
    _emit(json, record, "" if json else text_table(record))


def describe(preset: Preset = "paper", set: Overrides = (), json: Json = False) -> None:
    """Build the networks of a preset and count their parameters and their work per window."""
    from tccp.describe import describe as count

    rows = count(load_settings(preset, set))
    header = f"{'variant':20} {'params':>12} {'control':>12} {'GFLOP/window':>13}"
    lines = [
        f"{row['variant']:20} {row['params']:12,} {row['control_params']:12,} {row['gflop_per_window']:13.2f}"
        for row in rows
    ]
    _emit(json, {"preset": preset, "variants": rows}, "\n".join([header, *lines]))


def doctor(storage: Storage = None, json: Json = False) -> None:
    """Say what this installation can do: versions, devices, weights, storage."""
    from tccp.doctor import examine

    checks = examine(storage_root(storage))
    lines = [f"{'ok ' if check['ok'] else '-- '} {check['name']}: {check['found']}" for check in checks]
    _emit(json, {"checks": checks}, "\n".join(lines))
    if not all(check["ok"] for check in checks if check["required"]):
        raise SystemExit(1)


def demo(
    out: Path = Path("out"),
    train: bool = False,
    fresh: bool = False,
    device: Device = "auto",
    storage: Storage = None,
    json: Json = False,
) -> None:
    """The whole chain on RoundTable: generate into an unseen scene, with unseen sound, in under a minute.

    Args:
        out: folder for demo.mp4, demo.png, demo.webp and demo.json.
        train: with weights trained first, small, in a quarter of an hour, instead of the packaged ones.
        fresh: with --train, train again although the storage holds the demo's weights.
    """
    from tccp.demo import run_demo

    record = run_demo(out, storage_root(storage), train=train, fresh=fresh, device=_device(device))
    _emit(json, record, f"look at {out / 'demo.mp4'} and {out / 'demo.png'}")


VERBS: dict[str, Callable[..., None]] = {
    "synth": synth,
    "weights": weights,
    "preprocess": preprocess,
    "inspect": inspect,
    "train": train,
    "export": export,
    "generate": generate,
    "evaluate": evaluate,
    "describe": describe,
    "doctor": doctor,
    "demo": demo,
}


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """A user's mistake ends in one line on stderr and exit code 2; a bug keeps its traceback."""
    try:
        yield
    except TccpError as error:
        _note(f"error: {' '.join(str(error).split())}")
        raise SystemExit(2) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except OSError as error:
        if error.filename is None:
            raise
        _note(f"error: {error.filename}: {error.strerror}; check the path and its permissions")
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        _note("interrupted")
        raise SystemExit(130) from None


def main(argv: Sequence[str] | None = None) -> None:
    warnings.simplefilter("ignore", FutureWarning)  # of other packages; no news to a user
    with _one_line_errors():
        tyro.extras.subcommand_cli_from_dict(
            VERBS, prog="tccp", description="Talking heads, generated into scenes from sound.", args=argv
        )


if __name__ == "__main__":
    main()
