"""Tracks for tests of what is judged by faces: RoundTable's and a detector's, spliced, painted on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Float32, UInt8

from preprocessing.analysis.chips import read_chip
from preprocessing.reels import CHIP_PX, Track, chip_box
from tccp.faces import FaceBackend
from tccp.media import read_frames
from tccp.roundtable import RoundTableClip

EVERY = 5


def jpeg(picture: UInt8[np.ndarray, "a b 3"]) -> bytes:
    return cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()


def chip_of(picture: UInt8[np.ndarray, "h w 3"], box: Float32[np.ndarray, "4"]) -> bytes:
    x0, y0, x1, _ = chip_box(box)
    step = float(x1 - x0) / CHIP_PX
    matrix = np.array([[step, 0, x0 + step / 2 - 0.5], [0, step, y0 + step / 2 - 0.5]])
    soft = cv2.GaussianBlur(picture, (0, 0), 0.4 * step) if step > 1.5 else picture
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    chip = cv2.warpAffine(soft, matrix, (CHIP_PX, CHIP_PX), flags=flags, borderMode=cv2.BORDER_REPLICATE)
    return jpeg(np.asarray(chip, np.uint8))


def track_of(points: np.ndarray, picture: Callable[[int], np.ndarray], start_frame: int = 0) -> Track:
    """points: f x 68 x 2; picture: the frame of a number counted from 0."""
    points = points.astype(np.float32)
    box = np.concatenate([points.min(1), points.max(1)], axis=1)
    chips = {start_frame + i: chip_of(picture(i), box[i]) for i in range(0, len(points), EVERY)}
    return Track(0, 0, start_frame, box, points, np.ones(len(points), np.float32), chips)


def roundtable_track(clip: RoundTableClip, start_frame: int = 0) -> Track:
    return track_of(clip.landmarks_px, clip.render, start_frame)


def film_track(film: Path, backend: FaceBackend, num_frames: int) -> Track:
    """The largest face of the first frames of a film that shows one in each."""
    frames = list(read_frames(film, num_frames=num_frames))
    points = [backend.detect(frame)[0].landmarks_px for frame in frames]
    return track_of(np.stack([p for p in points if p is not None]), frames.__getitem__)


def moved(track: Track, frames: int) -> Track:
    """The same, so many frames later."""
    chips = {frame + frames: chip for frame, chip in track.chips.items()}
    return dataclasses.replace(track, start_frame=track.start_frame + frames, chips=chips)


def spliced(first: Track, second: Track, at: int) -> Track:
    """`first` up to frame `at`, then `second` with the face at the same place in the same size. Both begin at 0."""
    one, other = first.box[at - 1], second.box[at]
    scale = float((one[2:] - one[:2]).max() / (other[2:] - other[:2]).max())
    shift = (one[:2] + one[2:]) / 2 - (other[:2] + other[2:]) / 2 * scale
    return Track(
        0,
        0,
        0,
        np.concatenate([first.box[:at], second.box[at:] * scale + np.tile(shift, 2)]).astype(np.float32),
        np.concatenate([first.landmarks[:at], second.landmarks[at:] * scale + shift]).astype(np.float32),
        np.concatenate([first.confidence[:at], second.confidence[at:]]),
        {f: c for f, c in first.chips.items() if f < at} | {f: c for f, c in second.chips.items() if f >= at},
    )


def repainted(track: Track, frames: Iterable[int], paint: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Track:
    """With the chips of these frames changed: paint(picture, landmarks in its pixels)."""
    chips = dict(track.chips)
    for frame in sorted(set(frames) & chips.keys()):
        chip = read_chip(track, frame)
        chips[frame] = jpeg(paint(chip.picture.copy(), chip.points))
    return dataclasses.replace(track, chips=chips)
