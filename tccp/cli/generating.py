"""The commands generate, films, demo and doctor."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from tccp.cli.options import Device, Json, Storage, check_device, device_of, emit, importing, note
from tccp.config import storage_root
from tccp.errors import TccpError
from tccp.files import Folder, check_writable_folder
from tccp.progress import progress

if TYPE_CHECKING:
    from tccp.inference.film import FilmRequest
    from tccp.inference.film_generation import FilmOutcome


def generate(
    scene: Path,
    audio: Path,
    identity: Path,
    weights: str,
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
    guidance_interval: tuple[float, float] | None = None,
    time_power: float | None = None,
    temperature: float | None = None,
    seed: int = 0,
    preset: Annotated[str | None, tyro.conf.arg(help="refuse a pipeline of another preset")] = None,
    one_stage: bool = False,
    save_landmarks: Path | None = None,
    landmarks: Path | None = None,
    redraw: bool = False,
    color_match: bool = True,
    lossless: bool = False,
    exact_size: bool = False,
    lip_weights: Path | None = None,
    device: Device = "auto",
    overlap: bool = True,
    batch: int = 4,
    json: Json = False,
) -> None:
    """Generate a talking head into a scene, and write it as an MP4 with the driving sound.

    The film has as many frames as the sound needs at 25 frames per second. --mask, --box or --truth gives the position
    of the head; without them, a face detector finds it.

    Args:
        scene: film of the scene.
        audio: any media file with sound.
        identity: picture or film of the person. With --truth, a picture must show the head alone.
        weights: pipeline folder, URL or Hugging Face Hub id. `toy`: the packaged weights, trained on RoundTable only.
        out: the MP4 file to write.
        mask: film of the scene's size, bright where the head is to be generated.
        box: x0,y0,x1,y1 in scene pixels, or a JSON track file {"boxes": [[x0, y0, x1, y1], null, ...]}.
        truth: take the head box from the truth file beside a film of `tccp synth`.
        detector: mediapipe, fan (slow without a GPU), or lbp (frontal faces only; needs no download).
        detector_weights: face_landmarker.task, or the folder that holds it.
        person: x y, a point on the person to replace. Default: the person who is visible in most frames.
        identity_box: x0,y0,x1,y1 of the head in the identity picture, or `whole` if the picture shows the head alone.
        extend: how to lengthen a scene that is shorter than the sound.
        steps: number of sampling steps. Default: the pipeline's.
        guidance_scale: values above 1 make the result follow the conditions more closely.
        guidance_interval: from to, the part of diffusion time in which guidance acts; 0 is clean, 1 is noise.
        time_power: spacing of the steps: 1 is even; above 1, more steps lie at the clean end.
        temperature: values below 1 reduce the random variation of the result.
        one_stage: use the one-stage networks of the ablation.
        save_landmarks: file to write stage 1's landmarks to, as JSON lines, for viewing or editing.
        landmarks: such a file, to use in place of stage 1.
        redraw: read the points of stage 1's pictures, and draw new landmark pictures from them for stage 2.
        color_match: match the colour of the generated head to the pixels around the mask.
        lossless: keep every pixel outside the mask equal to the decoded scene.
        exact_size: keep an odd width or height, which browsers and phones do not show. Default: add one row or column.
        lip_weights: the published Wav2Lip checkpoint, for pipelines trained with lips.source=wav2lip.
        overlap: run stage 1 ahead of stage 2, in a thread. The film is the same without.
        batch: the most windows of different shots that are generated at once; they differ by rounding only.
    """
    with importing():
        from tccp.inference.coverage import Coverage
        from tccp.inference.film import FilmInputs, FilmRequest

    check_device(device)
    request = FilmRequest(
        scene=scene,
        audio=audio,
        identity=identity,
        weights=weights,
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
        guidance_interval=guidance_interval,
        time_power=time_power,
        temperature=temperature,
        seed=seed,
        preset=preset,
        one_stage=one_stage,
        save_landmarks=save_landmarks,
        landmarks=landmarks,
        redraw=redraw,
        color_match=color_match,
        lossless=lossless,
        exact_size=exact_size,
        lip_weights=lip_weights,
        overlap=overlap,
        batch=batch,
    )
    with ExitStack() as opened:
        with progress() as bar:
            bar.add_task("checking the inputs")
            inputs = opened.enter_context(FilmInputs(request))
        with progress() as bar, importing():
            bar.add_task("loading torch")  # after the checks, because it takes seconds
            from tccp.inference.pipeline import generate_film

            request = dataclasses.replace(request, device=device_of(device))
        result = generate_film(request, inputs=inputs)
    shown = Coverage(result.frames, result.reasons)
    text = f"{result.out}: {shown.text()}, {result.seconds:.1f} s"
    emit(json, result.to_json(), text)


def films(
    listed: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="LIST.csv")],
    out: str,
    weights: str = "toy",
    detector: Literal["mediapipe", "fan", "lbp"] = "mediapipe",
    detector_weights: Path | None = None,
    lip_weights: Path | None = None,
    batch: int = 4,
    overlap: bool = True,
    restart: bool = False,
    ray: bool = False,
    workers: int | None = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Generate many films, several at once, which takes less time than one after the other.

    A film that cannot be made is set aside with its reason; the others are made, and the exit code is 1. A second run
    makes what is missing.

    Args:
        listed: CSV with the columns scene, audio, identity, and options such as out, seed, box, mask; see the docs.
        out: folder for the films, and for films.json, which tells what became of each.
        weights: pipeline folder, URL or Hugging Face Hub id. `toy`: the packaged weights, trained on RoundTable only.
        detector: as for `tccp generate`.
        detector_weights: face_landmarker.task, or the folder that holds it.
        lip_weights: the published Wav2Lip checkpoint, for pipelines trained with lips.source=wav2lip.
        batch: the most windows of different films and shots that are generated at once.
        overlap: run stage 1 ahead of stage 2, in a thread. The films are the same without.
        restart: also make the films again that are finished.
        ray: make them on the Ray cluster of RAY_ADDRESS, else on a new Ray of this machine.
        workers: with --ray, processes that generate (default: one for each GPU, or for each two CPUs).
    """
    if not ray:
        check_device(device)
    with importing():
        from tccp.inference.film import check_batch
        from tccp.inference.film_list import FilmRecord, read_film_list

    check_batch(batch)
    if workers is not None and (not ray or workers < 1):
        raise TccpError(f"--workers {workers}: give at least 1, together with --ray")
    folder = Folder(out).local
    if folder is None:
        raise TccpError(f"--out {out} is not a folder of this machine: films are written to a folder")
    check_writable_folder("--out", folder)
    requests = read_film_list(
        listed,
        folder,
        weights=weights,
        detector=detector,
        detector_weights=detector_weights,
        lip_weights=lip_weights,
        batch=batch,
        overlap=overlap,
    )
    record = FilmRecord(folder)
    due = [request for request in requests if restart or not record.made(request)]
    failed: list[str] = []
    if due:
        given: dict[str, Any] = {"weights": weights, "device": device, "lip_weights": lip_weights, "batch": batch}
        for outcome in _on_ray(due, out, workers, **given) if ray else _made_here(due, **given):
            record.add(outcome.request, outcome.result, outcome.error)
            if outcome.error is not None:
                failed.append(outcome.error)
                note(f"{outcome.request.out} was not made: {outcome.error}")
    counts = {"listed": len(requests), "made": len(due) - len(failed), "made_before": len(requests) - len(due)}
    text = f"{out}: {counts['made']} films made, {counts['made_before']} made before, {len(failed)} not made"
    emit(json, {**counts, "not_made": failed, "record": str(record.path)}, text)
    if failed:
        raise SystemExit(1)


def _made_here(
    due: Sequence[FilmRequest], weights: str, device: str, lip_weights: Path | None, batch: int
) -> Iterator[FilmOutcome]:
    with progress() as bar:
        bar.add_task("loading torch")  # after the checks, because it takes seconds
        with importing():
            from tccp.inference.pipeline import Pipeline, generate_films
        pipeline = Pipeline.from_pretrained(weights, device=device_of(device), lip_weights=lip_weights)
    yield from generate_films(due, pipeline=pipeline, batch=batch)


def _on_ray(due: Sequence[FilmRequest], out: str, workers: int | None, **given: Any) -> Iterator[FilmOutcome]:
    from tccp.serving.films_on_ray import generate_films_on_ray

    with progress() as bar:
        task = bar.add_task("films", total=len(due))
        for outcome in generate_films_on_ray(due, out, workers=workers, **given):
            bar.advance(task)
            yield outcome


def demo(
    out: Path = Path("out"),
    train: bool = False,
    fresh: bool = False,
    device: Device = "auto",
    storage: Storage = None,
    json: Json = False,
) -> None:
    """Generate a head into a RoundTable scene that the packaged weights have not seen, with sound they have not seen.

    Args:
        out: folder for demo.mp4, demo.png, demo.webp and demo.json.
        train: first train small weights, which takes about twelve minutes on two cores, and use them.
        fresh: with --train, train again even if the storage has the demo's weights.
    """
    check_device(device)
    check_writable_folder("--out", out)
    check_writable_folder("--storage", storage_root(storage))
    with progress() as bar, importing():
        bar.add_task("loading torch")  # after the checks, because it takes seconds
        from tccp.cli.demo_run import run_demo

    record = run_demo(out, storage_root(storage), train=train, fresh=fresh, device=device_of(device))
    emit(json, record, f"look at {out / 'demo.mp4'} and {out / 'demo.png'}")


def doctor(storage: Storage = None, json: Json = False) -> None:
    """Check this installation: versions, devices, weights and storage."""
    from tccp.cli.doctor_checks import examine

    checks = examine(storage_root(storage))
    lines = [f"{'ok ' if check['ok'] else '-- '} {check['name']}: {check['found']}" for check in checks]
    emit(json, {"checks": checks}, "\n".join(lines))
    if not all(check["ok"] for check in checks if check["required"]):
        raise SystemExit(1)
