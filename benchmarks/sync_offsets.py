"""Accuracy of the a/v offset from lips and sound, and how often it is reported as sure.

`python benchmarks/sync_offsets.py` prints one JSON object. A track is a part of a RoundTable clip: its true landmarks
with noise, and its sound moved by -8..8 frames, or the sound of another clip, where no offset may be sure. An estimate
is right if it is at most one frame off. With `--real FOLDER --weights FILE` (clips as in REAL, MediaPipe's landmark
model) it also measures parts of real films, with their own sound, with other films' sound, and with their own sound
from elsewhere in the film.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int16

from preprocessing.analysis.av_offset import MAX_OFFSET, Offset, av_offset
from preprocessing.reels import FilmSound, Track
from tccp.config import FPS, SAMPLES_PER_FRAME
from tccp.faces import open_backend
from tccp.faces import track as track_person
from tccp.media import open_audio, read_frames
from tccp.roundtable import synthesise

CLIPS, CLIP_SECONDS, FIRST_SEED = 60, 32, 90_000
SECONDS = (3, 5, 10, 20, 30)
PARTS = {3: 6, 5: 6, 10: 5, 20: 5, 30: 5}
"""Number of parts of each clip, by their length in seconds. Parts may overlap. The thresholds in the code were set on
seeds below 60,000."""
NOISE = (0.015, 0.05, 0.12)
"""Standard deviations of the noise on each coordinate; unit: distance between the outer eye corners."""
REAL = ("latentsync_demo2.mp4", "grid_bbaf2n.mpg", "grid_brbk7n.mpg", "grid_lwbsza.mpg")

Film = tuple[Float32[np.ndarray, "f 68 2"], Int16[np.ndarray, " n"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=CLIPS, help=f"number of RoundTable clips of {CLIP_SECONDS} s")
    parser.add_argument("--real", type=Path, help="folder of real clips")
    parser.add_argument("--weights", type=Path, help="MediaPipe's face_landmarker.task")
    given = parser.parse_args()
    start = time.process_time()
    report: dict = {"roundtable": drawn_tracks(given.clips)}
    if given.real is not None:
        report["real"] = real_tracks([read_film(given.real / name, given.weights) for name in REAL])
    print(json.dumps(report | {"processor_s": round(time.process_time() - start)}, indent=1))


def drawn_tracks(num_clips: int) -> dict:
    films = [drawn_film(FIRST_SEED + number) for number in range(num_clips)]
    counts = Counts()
    for number, (landmarks, pcm) in enumerate(films):
        rng = np.random.default_rng(number)
        eyes_px = float(np.linalg.norm(landmarks[:, 45] - landmarks[:, 36], axis=1).mean())
        for seconds in SECONDS:
            for part in range(PARTS[seconds]):
                noise = NOISE[part % len(NOISE)]
                shaken = (landmarks + rng.normal(0, noise * eyes_px, landmarks.shape)).astype(np.float32)
                first = int(rng.integers(len(landmarks) - seconds * FPS + 1))
                late = int(rng.integers(-8, 9))
                other = films[(number + int(rng.integers(1, num_clips))) % num_clips][1]
                frames = (first, first + seconds * FPS)
                counts.add(f"{seconds} s", measured((shaken, pcm), frames, late), late)
                counts.add(f"{seconds} s", measured((shaken, other), frames, late), None)
    return counts.report()


def real_tracks(films: list[Film]) -> dict:
    counts = Counts()
    for number, film in enumerate(films):
        landmarks, pcm = film
        for seconds in (3, 5, 10, 20):
            starts = range(0, len(landmarks) - seconds * FPS + 1, FPS // 2)
            for first in starts:
                frames = (first, first + seconds * FPS)
                for late in (-6, 0, 3):
                    counts.add(f"{seconds} s", measured(film, frames, late), late)
                for _, other in films[:number] + films[number + 1 :]:
                    for step in range(0, max(1, len(other) // SAMPLES_PER_FRAME - seconds * FPS), FPS // 2):
                        counts.add(f"{seconds} s", measured((landmarks, other), frames, first - step), None)
                turned = pcm[: len(landmarks) * SAMPLES_PER_FRAME]
                for away in range(2 * MAX_OFFSET, len(landmarks) - 2 * MAX_OFFSET, FPS // 2):
                    elsewhere = np.roll(turned, away * SAMPLES_PER_FRAME)
                    counts.add(f"{seconds} s", measured((landmarks, elsewhere), frames, 0), None)
    return counts.report()


def drawn_film(seed: int) -> Film:
    clip = synthesise(seed, CLIP_SECONDS)
    return clip.landmarks_px, np.rint(clip.audio * 32767).astype(np.int16)


def read_film(path: Path, weights: Path | None) -> Film:
    backend = open_backend("mediapipe", weights)
    person = track_person([backend.detect(frame) for frame in read_frames(path)])
    backend.close()
    missing = np.full((68, 2), np.nan, np.float32)
    points = [missing if face is None or face.landmarks_px is None else face.landmarks_px for face in person]
    with open_audio(path) as audio:
        return np.stack(points), np.rint(np.clip(audio.samples, -1, 1) * 32767).astype(np.int16)


def measured(film: Film, frames: tuple[int, int], late: int) -> Offset:
    """The estimated offset of a part of a film whose sound is delayed by `late` frames."""
    landmarks = film[0][slice(*frames)]
    box, confidence = np.zeros((len(landmarks), 4), np.float32), np.ones(len(landmarks), np.float32)
    track = Track(0, 0, frames[0], box, landmarks, confidence, {})
    return av_offset(track, FilmSound(film[1], late), [frames])


class Counts:
    """Estimated and true offsets by group. Sound from elsewhere has no true offset (None)."""

    def __init__(self) -> None:
        self._own: dict[str, list[tuple[Offset, int]]] = defaultdict(list)
        self._other: dict[str, list[Offset]] = defaultdict(list)

    def add(self, group: str, found: Offset, late: int | None) -> None:
        if late is None:
            self._other[group].append(found)
        else:
            self._own[group].append((found, late))

    def report(self) -> dict:
        groups: dict[str, dict] = {}
        for group, own in self._own.items():
            wrong = [found for found, late in own if abs(found.frames - late) > 1]
            sure = [(found, late) for found, late in own if found.sure]
            groups[group] = {
                "tracks": len(own),
                "right": _share(len(own) - len(wrong), len(own)),
                "sure": _share(len(sure), len(own)),
                "sure_and_exact": _share(sum(found.frames == late for found, late in sure), len(sure)),
                "wrong_and_sure": sum(found.sure for found in wrong),
                "mismatched": len(self._other[group]),
                "mismatched_and_sure": sum(found.sure for found in self._other[group]),
                "mismatched_peak_max": round(max((found.confidence for found in self._other[group]), default=0.0), 2),
            }
        names = ("tracks", "wrong_and_sure", "mismatched", "mismatched_and_sure")
        return {"all": {name: sum(row[name] for row in groups.values()) for name in names}} | groups


def _share(part: int, whole: int) -> float | None:
    return round(part / whole, 4) if whole else None


if __name__ == "__main__":
    main()
