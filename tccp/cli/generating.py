"""Commands that show what is there: generate, demo, doctor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro

from tccp.cli.options import Device, Json, Storage, device_of, emit
from tccp.config import storage_root


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
        weights: pipeline folder, URL or Hugging Face Hub id; `toy` is the packaged one, which knows RoundTable only.
        out: the film to write, .mp4.
        mask: a film of the scene's size, bright where the head is to be.
        box: x0,y0,x1,y1 in scene pixels, or a JSON track file {"boxes": [[x0, y0, x1, y1], null, ...]}.
        truth: take the head box from the truth file beside a film of `tccp synth`.
        detector: mediapipe, fan (slow without a GPU), or lbp (frontal faces, needs no download).
        detector_weights: face_landmarker.task, or its folder.
        person: x y of the person to replace if there are several; default: the person who is visible in most frames.
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
    from tccp.inference.film import FilmRequest
    from tccp.inference.pipeline import generate_film

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
        device=device_of(device),
    )
    result = generate_film(request)
    text = f"{result.out}: {result.frames} frames, {result.passed_through} passed through, {result.seconds:.1f} s"
    emit(json, result.to_json(), text)


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
        train: first train small weights, in about twelve minutes on two cores, and use them.
        fresh: with --train, train again although the storage holds the demo's weights.
    """
    from tccp.cli.demo_run import run_demo

    record = run_demo(out, storage_root(storage), train=train, fresh=fresh, device=device_of(device))
    emit(json, record, f"look at {out / 'demo.mp4'} and {out / 'demo.png'}")


def doctor(storage: Storage = None, json: Json = False) -> None:
    """Say what this installation can do: versions, devices, weights, storage."""
    from tccp.cli.doctor_checks import examine

    checks = examine(storage_root(storage))
    lines = [f"{'ok ' if check['ok'] else '-- '} {check['name']}: {check['found']}" for check in checks]
    emit(json, {"checks": checks}, "\n".join(lines))
    if not all(check["ok"] for check in checks if check["required"]):
        raise SystemExit(1)
