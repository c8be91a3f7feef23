"""Accuracy of preprocessing on RoundTable films, compared with their ground truth.

`python benchmarks/raw_roundtable.py` prints JSON. For each picture size, a film of several scenes with hard cuts and
recurring talkers is preprocessed like any film. Compared with the ground truth are cuts, the person that the clips
show, landmarks, and the frames left out by reason. Two more films test the sound: in one it is late, in the other some
scenes are silent or dubbed. It needs the detector's weights: --weights, or TCCP_WEIGHTS.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from preprocessing.plan import make_plan
from preprocessing.run import preprocess
from tccp import media
from tccp.clips.clip_table import Clip, ClipTable
from tccp.config import git_commit, toy
from tccp.errors import TccpError
from tccp.faces import open_backend
from tccp.landmarks import GROUPS, head_pose
from tccp.media.shots import CutFinder
from tccp.roundtable.reel import OTHER_SOUND, OWN_SOUND, SILENCE, Dub, ReelTruth, Shot, plan_shots, write_reel

SIZES = ("256x192", "640x480", "960x720", "1280x960")
LATE_FRAMES = 5
_DETECT_EVERY = 10  # frames
_LEAST_IOU = 0.3  # a box with less overlap shows nobody


def iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes (... 4); 0 where one is NaN."""
    overlap = np.maximum(np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]), 0).prod(-1)
    areas = [(box[..., 2:] - box[..., :2]).prod(-1) for box in (a, b)]
    return np.nan_to_num(overlap / (areas[0] + areas[1] - overlap))


def measure_cuts(film: Path, truth: ReelTruth) -> dict[str, Any]:
    """The cuts that CutFinder finds in the encoded film."""
    finder, found = CutFinder(), set()
    for frame in media.read_frames(film):
        found.update(finder.add(frame))
    found.update(finder.finish())
    true = set(truth.cuts.tolist())
    return {"cuts": len(true), "found": len(true & found), "missed": len(true - found), "false": len(found - true)}


def measure_detector(film: Path, truth: ReelTruth, weights: Path | None) -> dict[str, Any]:
    """How often MediaPipe detects the talker and the others, in every tenth frame. Others may face away."""
    seen = frames = others_seen = others = elsewhere = 0
    detector = open_backend("mediapipe", weights)
    try:
        for frame, picture in enumerate(media.read_frames(film)):
            if frame % _DETECT_EVERY:
                continue
            frames += 1
            heads = np.concatenate([truth.head_box[frame][None], truth.others_box[frame]])
            heads = heads[np.isfinite(heads).all(1)]
            owners = set()
            for face in detector.detect(picture):
                inside = [
                    k
                    for k, box in enumerate(heads)
                    if (box[:2] <= face.center).all() and (face.center <= box[2:]).all()
                ]
                elsewhere += not inside
                owners.update(inside[:1])
            seen += 0 in owners
            others_seen += len(owners - {0})
            others += len(heads) - 1
    finally:
        detector.close()
    return {
        "frames": frames,
        "talker_seen": round(seen / frames, 4),
        "others_seen": round(others_seen / max(others, 1), 4),
        "faces_elsewhere": elsewhere,
    }


def landmark_errors(clip: Clip, truth: ReelTruth) -> np.ndarray:
    """Offsets (f 68 2) from true to detected points; unit: frontal distance between the outer eye corners."""
    frames = slice(clip.start_frame, clip.start_frame + clip.num_frames)
    side = (clip.head_box[:, 2] - clip.head_box[:, 0])[:, None, None]
    found, true = clip.head_box[:, None, :2] + side * clip.landmarks, truth.landmarks_px[frames]
    errors = (found - true) / head_pose(true.astype(np.float64)).scale[:, None, None]
    return errors[clip.landmark_confidence > 0]


def summary(errors: np.ndarray) -> dict[str, float]:
    lengths = np.linalg.norm(errors, axis=-1)
    return {"median": round(float(np.median(lengths)), 4), "p95": round(float(np.quantile(lengths, 0.95)), 4)}


def measure_clips(clips: Sequence[Clip], truth: ReelTruth) -> dict[str, Any]:
    """The person that the clips show, how much is kept, and the error of the landmarks."""
    shows = {"talker": 0, "another": 0, "nobody": 0}
    crossing = 0
    ious, errors = [], []
    for clip in clips:
        start, stop = clip.start_frame, clip.start_frame + clip.num_frames
        crossing += bool(((truth.cuts > start) & (truth.cuts < stop)).any())
        on_talker = iou(clip.head_box, truth.head_box[start:stop])
        on_others = iou(clip.head_box[:, None], truth.others_box[start:stop]).max(1)
        is_talker = (on_talker >= _LEAST_IOU) & (on_talker > on_others)
        is_other = (on_others >= _LEAST_IOU) & ~is_talker
        shows["talker"] += int(is_talker.sum())
        shows["another"] += int(is_other.sum())
        shows["nobody"] += int((~is_talker & ~is_other).sum())
        ious.append(on_talker[is_talker])
        if is_talker.all():
            errors.append(landmark_errors(clip, truth))
    kept = sum(shows.values())
    result: dict[str, Any] = {
        "clips": len(clips),
        "clips_across_cuts": crossing,
        "frames_kept": kept,
        "kept_share": round(kept / truth.num_frames, 4),
        "talker_share": round(shows["talker"] / kept, 4) if kept else None,
        "frames_of": shows,
    }
    if errors:
        found = np.concatenate(errors)
        steady = found - found.mean(0)
        result |= {
            "head_box_iou_median": round(float(np.median(np.concatenate(ious))), 4),
            "landmark_error": summary(found),
            "landmark_error_without_offset": summary(steady),
            "by_group_without_offset": {name: summary(steady[:, list(points)]) for name, points in GROUPS.items()},
        }
    return result


def run(film: Path, out: Path, weights: Path | None) -> tuple[list[Clip], dict[str, int]]:
    """Preprocesses a film. Returns its clips, and the number of frames left out by reason."""
    try:
        preprocess([film], out, make_plan(toy().picture_px, "mediapipe", weights))
    except TccpError:  # no clip at all; the report has the reasons
        if not (out / "report.json").is_file():
            raise
        clips = []
    else:
        with ClipTable(out) as table:
            clips = list(table)
    (source,) = json.loads((out / "report.json").read_text(encoding="utf-8"))["sources"]
    return clips, source["left_out"]


def measure_size(folder: Path, shots: Sequence[Shot], width: int, height: int, weights: Path | None) -> dict[str, Any]:
    film = folder / f"{width}x{height}.mp4"
    truth = write_reel(film, shots, width, height)
    clips, left_out = run(film, folder / film.stem, weights)
    face_px = float(np.median(np.ptp(truth.landmarks_px[..., 1], axis=1)))
    return {
        "size": film.stem,
        "scenes": len(shots),
        "frames": truth.num_frames,
        "face_px": round(face_px, 1),
        "cut_finder": measure_cuts(film, truth),
        "detector": measure_detector(film, truth, weights),
        **measure_clips(clips, truth),
        "left_out": left_out,
    }


def measure_sound(folder: Path, shots: Sequence[Shot], width: int, height: int, weights: Path | None) -> dict[str, Any]:
    """Late sound, and wrong sound: of three scenes, one is silent and one is dubbed."""
    late = folder / "late.mp4"
    write_reel(late, shots, width, height, sound_offset_frames=LATE_FRAMES)
    clips, _ = run(late, folder / "late", weights)
    known = [clip.quality.av_offset_ms for clip in clips if clip.quality.av_offset_ms is not None]
    edges = np.cumsum([0, *(shot.num_frames for shot in shots)])
    dubs = [
        Dub(int(edges[k]), int(edges[k + 1]), None if k % 3 == 1 else 1_000_000 + k) for k in range(len(shots)) if k % 3
    ]
    dubbed = folder / "dubbed.mp4"
    truth = write_reel(dubbed, shots, width, height, dubs=dubs)
    of_dubbed, left_out = run(dubbed, folder / "dubbed", weights)
    kept = np.zeros(truth.num_frames, bool)
    for clip in of_dubbed:
        kept[clip.start_frame : clip.start_frame + clip.num_frames] = True
    sounds = (("own", OWN_SOUND), ("silence", SILENCE), ("another's", OTHER_SOUND))
    return {
        "late_by_frames": LATE_FRAMES,
        "late_clips": len(clips),
        "late_found_ms": sorted(known),
        "late_corrected": sum(bool(clip.quality.av_corrected) for clip in clips),
        "kept_share_by_sound": {
            name: round(float(kept[truth.sound == code].mean()), 4)
            for name, code in sounds
            if (truth.sound == code).any()
        },
        "left_out": left_out,
    }


def measure(
    folder: Path, sizes: Sequence[str], scenes: int, scene_s: float, seed: int, weights: Path | None, sound: bool
) -> dict[str, Any]:
    shots = plan_shots(seed, scenes * scene_s, scene_s, people=max(1, 2 * scenes // 3))
    pairs = [(int(width), int(height)) for width, height in (size.split("x") for size in sizes)]
    result: dict[str, Any] = {
        "commit": git_commit(),
        "seed": seed,
        "sizes": [measure_size(folder, shots, *pair, weights) for pair in pairs],
    }
    return result | ({"sound": measure_sound(folder, shots, *pairs[0], weights)} if sound else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), help="picture sizes: WIDTHxHEIGHT")
    parser.add_argument("--scenes", type=int, default=12, help="scenes per film")
    parser.add_argument("--scene-s", type=float, default=5.0, help="approximate length of a scene in seconds")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--sound", action="store_true", help="also test films with late or dubbed sound, in the first size"
    )
    parser.add_argument("--weights", type=Path, help="folder of the detector's weights (default: TCCP_WEIGHTS)")
    parser.add_argument("--out", type=Path, help="JSON file to write as well")
    given = parser.parse_args()
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), given.sizes, given.scenes, given.scene_s, given.seed, given.weights, given.sound)
    text = json.dumps(found, indent=2)
    if given.out is not None:
        given.out.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
