"""A picture of a few held-out clips over time, with the truth beside: figures are to be looked at too."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import UInt8

from tccp import headbox, landmarks
from tccp.errors import TccpError
from tccp.evaluation.benchmark_clips import EvaluationClip
from tccp.evaluation.figures import Shown

CLIPS, COLUMNS = 5, 8
_CELL_PX, _LABEL_PX = 120, 20
_ROWS = ("masked scene", "true landmarks", "generated", "true face", "generated", "in the scene")
_CAPTION = {
    "mouth_corr_landmarks": "mouth, landmarks",
    "mouth_corr_face": "face",
    "yaw_mae_deg_landmarks": "yaw error, landmarks",
    "yaw_mae_deg_face": "face",
    "psnr": "PSNR",
}


@dataclass(frozen=True)
class SheetClip:
    """One clip of the sheet: a caption, and per row of the sheet a few frames."""

    caption: str
    rows: Sequence[UInt8[np.ndarray, "n _ _ 3"]]


def chosen(count: int) -> list[int]:
    """Which of `count` clips are shown: five, spread over all of them."""
    return sorted(set(np.linspace(0, count - 1, min(CLIPS, count)).round().astype(int).tolist()))


def sheet_clip(
    index: int,
    clip: EvaluationClip,
    shown: Shown,
    landmark_pictures: UInt8[np.ndarray, "f s s 3"],
    figures: Mapping[str, float],
) -> SheetClip:
    """landmark_pictures: as generated; shown: faces and scenes made from them."""
    assert shown.faces is not None and shown.scenes is not None
    at = np.linspace(0, clip.num_frames - 1, COLUMNS).round().astype(int)
    masked = headbox.mask_scene(clip.scenes[at], clip.truth.head_box[at])
    true_marks = landmarks.draw(clip.points[at], clip.faces.shape[1])
    rows = (masked, true_marks, landmark_pictures[at], clip.faces[at], shown.faces[at], shown.scenes[at])
    measured = ", ".join(f"{label} {figures[name]:.2f}" for name, label in _CAPTION.items())
    return SheetClip(f"clip {index}, {clip.truth.kind}: {measured}", rows)


def draw_sheet(clips: Sequence[SheetClip]) -> UInt8[np.ndarray, "h w 3"]:
    """Clips below each other; time runs to the right."""
    return np.concatenate([_block(clip) for clip in clips])


def check_writable(path: Path) -> None:
    """Raises TccpError if no file can be written there: before the work, not after it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise TccpError(f"cannot write --sheet {path}: {error.strerror}; choose another place") from None
    if path.is_dir():
        raise TccpError(f"--sheet {path} is a folder: give the name of a PNG file")


def write_sheet(path: Path, clips: Sequence[SheetClip]) -> None:
    """As PNG."""
    path.write_bytes(cv2.imencode(".png", draw_sheet(clips)[..., ::-1])[1].tobytes())


def _block(clip: SheetClip) -> UInt8[np.ndarray, "h w 3"]:
    lines = []
    for label, pictures in zip(_ROWS, clip.rows, strict=True):
        strip = np.concatenate([_cell(picture) for picture in pictures], axis=1)
        lines.append(np.concatenate([_label(label, strip.shape[0]), strip], axis=1))
    block = np.concatenate(lines)
    caption = np.full((_LABEL_PX, block.shape[1], 3), 24, np.uint8)
    return np.concatenate([_written(caption, clip.caption), block])


def _cell(picture: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h2 w2 3"]:
    """Scenes keep their shape: as high as faces, and as much wider as they are."""
    height, width = picture.shape[:2]
    size = (round(_CELL_PX * width / height), _CELL_PX)
    how = cv2.INTER_AREA if height > _CELL_PX else cv2.INTER_CUBIC
    cell = np.zeros((_CELL_PX, round(_CELL_PX * 4 / 3), 3), np.uint8)
    left = (cell.shape[1] - size[0]) // 2
    cell[:, left : left + size[0]] = cv2.resize(picture, size, interpolation=how)
    return cell


def _label(text: str, height: int) -> UInt8[np.ndarray, "h w 3"]:
    return _written(np.full((height, 120, 3), 24, np.uint8), text)


def _written(ground: UInt8[np.ndarray, "h w 3"], text: str) -> UInt8[np.ndarray, "h w 3"]:
    baseline = min(ground.shape[0] // 2 + 5, ground.shape[0] - 5)
    cv2.putText(ground, text, (4, baseline), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (235, 235, 235), 1, cv2.LINE_AA)
    return ground
