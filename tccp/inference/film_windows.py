"""The inputs of the frames that a window adds to a film, without torch: they are made where films are decoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, UInt8

from tccp.config import Settings
from tccp.inference.conditioning import landmark_pictures, masked_scenes
from tccp.inference.frames import SceneFrame
from tccp.media.mel import mel_windows, wav2lip_windows


@runtime_checkable
class LandmarkSource(Protocol):
    """A source of given landmarks, such as `tccp.inference.landmark_file.LandmarkFile`."""

    def read(self, frame: int) -> tuple[Float32[np.ndarray, "68 2"], float]:
        """Points in 0..1 of the head box, and confidence. Called with frame numbers in ascending order."""


@dataclass(frozen=True)
class LandmarkWindow:
    """The landmarks of the frames of a `SceneWindow`: stage 2 takes their pictures."""

    pictures: UInt8[np.ndarray, "f s s 3"]
    points: Float32[np.ndarray, "f 68 2"]
    confidence: Float32[np.ndarray, " f"]


@dataclass(frozen=True)
class SceneWindow:
    """The inputs of the frames that a window adds to its chain.

    first: the number of the first frame. mel: windows of the sound for the networks; lip_mel: for the lip source, which
    may look ahead. landmarks: where they are given.
    """

    first: int
    masked_scene: UInt8[np.ndarray, "f s s 3"]
    mask_box: Float32[np.ndarray, "f 4"]
    mel: Float32[np.ndarray, "f 80 16"]
    lip_mel: Float32[np.ndarray, "f 80 16"]
    landmarks: LandmarkWindow | None = None

    @property
    def num_frames(self) -> int:
        return len(self.mel)


def scene_window(
    frames: Sequence[SceneFrame], sound: Any, settings: Settings, landmarks: LandmarkSource | None = None
) -> SceneWindow:
    """The inputs of consecutive frames that show the person. sound: 16 kHz, -1..1; frame 0 begins with sample 0."""
    boxes = np.stack([frame.box for frame in frames if frame.box is not None])
    pictures = np.stack([frame.picture for frame in frames])
    masked, mask_box = masked_scenes(pictures, boxes, settings.picture_px)
    first, count = frames[0].index, len(frames)
    mel = mel_windows(sound, first, count)
    lip_mel = wav2lip_windows(sound, first, count) if settings.lips.source == "wav2lip" else mel
    given = None if landmarks is None else _given(landmarks, first, count, settings.picture_px)
    return SceneWindow(first, masked, mask_box, mel, lip_mel, given)


def _given(source: LandmarkSource, first: int, count: int, size_px: int) -> LandmarkWindow:
    read = [source.read(number) for number in range(first, first + count)]
    points = np.stack([points for points, _ in read])
    confidence = np.array([confidence for _, confidence in read], np.float32)
    return LandmarkWindow(landmark_pictures(points, size_px), points, confidence)
