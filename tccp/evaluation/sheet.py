"""The sheet: one picture that shows frames of a few held-out clips, true and generated, for inspection by eye."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import UInt8

from tccp import headbox, landmarks
from tccp.evaluation.benchmark_clips import EvaluationClip
from tccp.evaluation.figures import ClipOutput
from tccp.files import atomic_path

CLIPS, COLUMNS = 5, 8
_CELL_PX, _LABEL_PX = 120, 20
_LINES = ("masked scene", "true landmarks", "generated", "true face", "generated", "in the scene")
_CAPTION = {
    "mouth_corr_landmarks": "mouth, landmarks",
    "mouth_corr_face": "face",
    "yaw_mae_deg_landmarks": "yaw error, landmarks",
    "yaw_mae_deg_face": "face",
    "psnr": "PSNR",
}


@dataclass(frozen=True)
class SheetClip:
    """One clip of the sheet: a caption, and for every line of pictures (`_LINES`) a few frames."""

    caption: str
    lines: Sequence[UInt8[np.ndarray, "n _ _ 3"]]


def choose_clips(count: int) -> list[int]:
    """Indices of the clips to show, out of `count`: at most five, evenly spaced."""
    return sorted(set(np.linspace(0, count - 1, min(CLIPS, count)).round().astype(int).tolist()))


def sheet_clip(
    index: int,
    clip: EvaluationClip,
    output: ClipOutput,
    landmark_pictures: UInt8[np.ndarray, "f s s 3"],
    figures: Mapping[str, float],
) -> SheetClip:
    """Selects eight evenly spaced frames of a clip. output: needs faces and scenes. landmark_pictures: generated."""
    assert output.faces is not None and output.scenes is not None
    frames = np.linspace(0, clip.num_frames - 1, COLUMNS).round().astype(int)
    masked = headbox.mask_scene(clip.scenes[frames], clip.truth.head_box[frames])
    true_landmarks = landmarks.draw(clip.points[frames], clip.faces.shape[1])
    faces = (clip.faces[frames], output.faces[frames])
    lines = (masked, true_landmarks, landmark_pictures[frames], *faces, output.scenes[frames])
    measured = ", ".join(f"{label} {figures[name]:.2f}" for name, label in _CAPTION.items())
    return SheetClip(f"clip {index}, {clip.truth.kind}: {measured}", lines)


def render_sheet(clips: Sequence[SheetClip]) -> UInt8[np.ndarray, "h w 3"]:
    """Clips from top to bottom, time from left to right."""
    return np.concatenate([_block(clip) for clip in clips])


def write_sheet(path: Path, clips: Sequence[SheetClip]) -> None:
    """Writes the sheet as PNG. The file appears when it is complete."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(cv2.imencode(".png", render_sheet(clips)[..., ::-1])[1].tobytes())


def _block(clip: SheetClip) -> UInt8[np.ndarray, "h w 3"]:
    lines = []
    for label, pictures in zip(_LINES, clip.lines, strict=True):
        strip = np.concatenate([_cell(picture) for picture in pictures], axis=1)
        lines.append(np.concatenate([_label(label, strip.shape[0]), strip], axis=1))
    block = np.concatenate(lines)
    caption = np.full((_LABEL_PX, block.shape[1], 3), 24, np.uint8)
    return np.concatenate([_with_text(caption, clip.caption), block])


def _cell(picture: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h2 w2 3"]:
    """Scales a picture to the height of a cell, keeps its aspect ratio, and centres it in a 4:3 cell."""
    height, width = picture.shape[:2]
    size = (round(_CELL_PX * width / height), _CELL_PX)
    interpolation = cv2.INTER_AREA if height > _CELL_PX else cv2.INTER_CUBIC
    cell = np.zeros((_CELL_PX, round(_CELL_PX * 4 / 3), 3), np.uint8)
    left = (cell.shape[1] - size[0]) // 2
    cell[:, left : left + size[0]] = cv2.resize(picture, size, interpolation=interpolation)
    return cell


def _label(text: str, height: int) -> UInt8[np.ndarray, "h w 3"]:
    return _with_text(np.full((height, 120, 3), 24, np.uint8), text)


def _with_text(canvas: UInt8[np.ndarray, "h w 3"], text: str) -> UInt8[np.ndarray, "h w 3"]:
    baseline = min(canvas.shape[0] // 2 + 5, canvas.shape[0] - 5)
    cv2.putText(canvas, text, (4, baseline), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (235, 235, 235), 1, cv2.LINE_AA)
    return canvas
