"""`make demo`: generates a head into an unseen scene, with the packaged weights or with weights trained first."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from preprocessing.plan import make_plan
from preprocessing.run import preprocess
from tccp import headbox, landmarks
from tccp.clips.clip_table import INDEX
from tccp.config import FPS, Settings, git_commit, load_settings, settings_to_json
from tccp.errors import TccpError
from tccp.evaluation.benchmark_clips import true_points as true_points_of
from tccp.evaluation.figures import correlation, psnr
from tccp.files import atomic_path, check_outputs, check_writable, check_writable_folder
from tccp.inference.film import FilmRequest, FilmResult
from tccp.inference.frames import GeneratedFrame
from tccp.inference.manifest import TOY_WEIGHTS, pipeline_files, read_settings
from tccp.inference.pipeline import generate_film
from tccp.media import VideoWriter, mark_generated, read_frames
from tccp.progress import progress
from tccp.roundtable import FILMS_VERSION, Truth, identity_path, read_truth, write_clips
from tccp.training.recipe import Trainer

TRAINING_FILMS, TRAINING_SECONDS, TRAINING_SEED = 72, 3.0, 1
SCENE_SECONDS, SCENE_SEED = 4.0, 20_001
"""Films of different seeds share no people, rooms or voices."""
SETTINGS = (
    "autoencoder.max_steps=2200",
    "training.max_steps=500",
    "training.initial_frames=truth",  # frames restored by half-trained networks do not help training
    "lips.liplet_steps=250",
    "headbox.draws=1",
    "variant_overrides.landmark_first.training.max_steps=450",
    "variant_overrides.face_first.training.max_steps=450",
)
"""The toy preset with fewer steps, so that a demo with training takes about twelve minutes on two cores."""
FILES = ("demo.mp4", "demo.png", "demo.webp", "demo.json", "generated.mp4", "landmarks.jsonl")
"""What a demo writes to its folder."""
SHEET_COLUMNS = 8
_SCALE = 2
_LABEL_PX = 22
_PREVIEW_PX = 768


def run_demo(out: Path, storage: Path, train: bool = False, fresh: bool = False, device: str = "cpu") -> dict[str, Any]:
    """Writes demo.mp4, demo.png, demo.webp, demo.json, generated.mp4 and landmarks.jsonl to `out`.

    train: train weights first, instead of using the packaged toy weights. Finished parts of an earlier training are
    reused from `storage`, and an interrupted training continues from its last checkpoint, unless `fresh`.
    Returns the content of demo.json. Raises TccpError if `out` or `storage` is not writable.
    """
    started = time.monotonic()
    files = [out / name for name in FILES]
    check_outputs({"--out": files}, {"--storage": storage / "demo", "--weights": pipeline_files(TOY_WEIGHTS)})
    check_writable_folder("--out", out)
    for path in files:
        check_writable("--out", path)
    check_writable_folder("--storage", storage)
    out.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, float] = {}
    if train:
        root = _training_root(storage, fresh)
        weights = _train(root, device, started, seconds)
    else:
        root, weights = storage / "demo", TOY_WEIGHTS
    settings = read_settings(weights)

    (scene,) = _footage(root / f"scene-{FILMS_VERSION}-{SCENE_SECONDS:g}s", 1, SCENE_SECONDS, SCENE_SEED).glob("*.mp4")
    truth = read_truth(scene)
    frames: list[GeneratedFrame] = []
    request = FilmRequest(
        scene=scene,
        audio=scene,
        identity=identity_path(scene),
        weights=weights,
        out=out / "generated.mp4",
        truth=True,
        save_landmarks=out / "landmarks.jsonl",
        device=device,
    )
    result = generate_film(request, on_frame=frames.append)
    seconds["generate"] = _lap(started, seconds)
    _write_films(out, scene, frames)
    _write_picture(out / "demo.png", sheet(scene, truth, frames))
    seconds["pictures"] = _lap(started, seconds)
    record = {
        "weights": "trained by this demo" if train else "packaged",
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "total_seconds": round(time.monotonic() - started, 1),
        "cores": os.cpu_count(),
        "device": device,
        "git_commit": git_commit(),
        "settings": json.loads(settings.model_dump_json()),
        "film": _film_record(result),
        "against_truth": measure(scene, truth, frames, settings),
    }
    (out / "demo.json").write_text(json.dumps(record, indent=2) + "\n")
    return record


def _training_root(storage: Path, fresh: bool) -> Path:
    key = hashlib.blake2b(settings_to_json(load_settings("toy", SETTINGS)).encode(), digest_size=6).hexdigest()
    root = storage / "demo" / key
    if fresh:
        shutil.rmtree(root, ignore_errors=True)
    return root


def _train(root: Path, device: str, started: float, seconds: dict[str, float]) -> Path:
    """Trains the demo's weights in minutes and returns their folder. Adds the time of each part to `seconds`."""
    settings = load_settings("toy", SETTINGS)
    films = _footage(root / f"footage-{FILMS_VERSION}", TRAINING_FILMS, TRAINING_SECONDS, TRAINING_SEED)
    seconds["footage"] = _lap(started, seconds)
    plan = make_plan(settings.picture_px, "truth")
    clips = root / f"clips-{FILMS_VERSION}-{plan.part_key}"
    if not (clips / INDEX).exists():
        preprocess([films], clips, plan)
    seconds["preprocess"] = _lap(started, seconds)
    trainer = Trainer(clips, root / "weights", settings, root, resume=True, device=device)
    trainer.train_missing(jobs=min(2, os.cpu_count() or 1) if device == "cpu" else 1)
    seconds["train"] = _lap(started, seconds)
    return root / "weights"


def _lap(started: float, seconds: dict[str, float]) -> float:
    """Seconds since the parts in `seconds` ended."""
    return time.monotonic() - started - sum(seconds.values())


def _film_record(result: FilmResult) -> dict[str, Any]:
    """The result without paths, because demo.json may be published."""
    return {name: value for name, value in result.to_json().items() if name != "out"}


def _footage(folder: Path, films: int, seconds: float, seed: int) -> Path:
    """Draws RoundTable films into `folder` unless all of them exist. Returns the folder."""
    if len(list(folder.glob("*.mp4"))) < films:
        with progress() as bar:
            total = films * round(seconds * FPS)
            task = bar.add_task("drawing scenes", total=total)
            write_clips(folder, films, seconds, seed, progress=lambda name, done, total: bar.advance(task))
    return folder


def measure(scene: Path, truth: Truth, frames: list[GeneratedFrame], settings: Settings) -> dict[str, float | None]:
    """Generated landmarks and faces against the ground truth: correlation of mouth opening and width, yaw error, PSNR.

    Landmark figures use the points read back from stage 1's pictures. A frame in which none could be read counts as a
    head that looks straight ahead, as in the benchmark. `wrong_clip_mouth_corr` is a control: the same generated mouth
    against the reversed ground truth. `landmark_error` is null if no frame could be read.
    """
    points = np.stack([frame.points for frame in frames if frame.points is not None])
    opening, width = landmarks.mouth_opening(points), landmarks.mouth_width(points)
    true_points = true_points_of(truth)[: len(points)]
    faces, true_faces = [], []
    for frame, picture in zip(frames, read_frames(scene), strict=False):
        assert frame.face is not None and frame.box is not None
        faces.append(frame.face)
        true_faces.append(headbox.crop(picture, frame.box, settings.picture_px))
    yaw_error = np.abs(np.nan_to_num(landmarks.yaw_deg(points)) - landmarks.yaw_deg(true_points))
    distance = np.linalg.norm(points - true_points, axis=-1)
    figures = {
        "mouth_corr_landmarks": correlation(opening, truth.mouth_opening[: len(points)]),
        "width_corr_landmarks": correlation(width, truth.mouth_width[: len(points)]),
        "wrong_clip_mouth_corr": correlation(opening, truth.mouth_opening[: len(points)][::-1]),
        "yaw_mae_deg_landmarks": float(yaw_error.mean()),
        "landmark_error": float(np.nanmean(distance)) if np.isfinite(distance).any() else math.nan,
        "psnr_face": psnr(np.stack(faces), np.stack(true_faces)),
    }
    return {name: round(value, 4) if math.isfinite(value) else None for name, value in figures.items()}


def _labelled(picture: UInt8[np.ndarray, "h w 3"], text: str) -> UInt8[np.ndarray, "h2 w 3"]:
    strip = np.full((_LABEL_PX, picture.shape[1], 3), 24, np.uint8)
    cv2.putText(strip, text, (6, _LABEL_PX - 7), cv2.FONT_HERSHEY_SIMPLEX, 0.45, (235, 235, 235), 1, cv2.LINE_AA)
    return np.concatenate([strip, picture])


def _enlarged(picture: UInt8[np.ndarray, "h w 3"], width: int, height: int) -> UInt8[np.ndarray, "h2 w2 3"]:
    return np.asarray(cv2.resize(picture, (width, height), interpolation=cv2.INTER_CUBIC), np.uint8)


def _masked(picture: UInt8[np.ndarray, "h w 3"], frame: GeneratedFrame) -> UInt8[np.ndarray, "h w 3"]:
    assert frame.box is not None
    return headbox.mask_scene(picture[None], frame.box[None])[0]


def _write_films(out: Path, scene: Path, frames: list[GeneratedFrame]) -> None:
    """Writes the masked scene, the result and the ground truth side by side: demo.mp4 with sound, demo.webp as a loop.

    demo.webp holds every second frame, each shown twice as long, so that it plays at the film's speed.
    """
    height, width = frames[0].picture.shape[:2]
    size = (_SCALE * width, _SCALE * height)
    preview = []
    with VideoWriter(
        out / "demo.mp4", 3 * size[0], size[1] + _LABEL_PX, audio_from=scene, metadata=mark_generated(demo="RoundTable")
    ) as film:
        for i, (frame, true) in enumerate(zip(frames, read_frames(scene), strict=False)):
            columns = {"given: masked scene, sound": _masked(true, frame), "generated": frame.picture, "truth": true}
            picture = np.concatenate([_labelled(_enlarged(p, *size), text) for text, p in columns.items()], axis=1)
            film.write(picture)
            if i % 2 == 0:
                preview.append(
                    Image.fromarray(picture).resize((_PREVIEW_PX, _PREVIEW_PX * picture.shape[0] // picture.shape[1]))
                )
    with atomic_path(out / "demo.webp") as path:
        preview[0].save(
            path, format="WEBP", save_all=True, append_images=preview[1:], duration=2 * 1000 // FPS, loop=0, quality=60
        )


def sheet(scene: Path, truth: Truth, frames: list[GeneratedFrame]) -> UInt8[np.ndarray, "h w 3"]:
    """A picture of frames over time, in rows: masked scene, landmarks, face and result, each with its ground truth."""
    chosen = set(np.linspace(0, len(frames) - 1, SHEET_COLUMNS).round().astype(int).tolist())
    rows: dict[str, list[np.ndarray]] = {}
    for i, (frame, true) in enumerate(zip(frames, read_frames(scene), strict=False)):
        if i not in chosen:
            continue
        assert frame.box is not None and frame.face is not None and frame.landmark_picture is not None
        size = frame.face.shape[0]
        points = headbox.to_crop(truth.landmarks_px[i], truth.head_box[i])
        pictures = {
            "given: scene with the head masked": _masked(true, frame),
            "stage 1: landmarks": frame.landmark_picture,
            "true landmarks": landmarks.draw(points[None], size)[0],
            "stage 2: face": frame.face,
            "true face": headbox.crop(true, frame.box, size),
            "result": frame.picture,
            "true scene": true,
        }
        for name, picture in pictures.items():
            rows.setdefault(name, []).append(picture)
    width = 192
    lines = []
    for name, row in rows.items():
        height = round(width * row[0].shape[0] / row[0].shape[1])
        lines.append(_labelled(np.concatenate([_enlarged(p, width, height) for p in row], axis=1), name))
    return np.concatenate(lines)


def _write_picture(path: Path, picture: UInt8[np.ndarray, "h w 3"]) -> None:
    done, data = cv2.imencode(".png", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    assert done
    try:
        path.write_bytes(data.tobytes())
    except OSError as error:
        raise TccpError(f"cannot write {path}: {error.strerror}") from None
