"""One clip: one talking shot of one person, with its pictures still encoded."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int16

from tccp.config import FPS, SAMPLES_PER_FRAME
from tccp.errors import TccpError

GEOMETRY_VERSION = 2
"""Increase it when head boxes or crops of the same footage change, so that clip ids change with them."""
STORED_MARGIN = 1.25
"""Ratio of the side of the stored face picture to the side of the head box. The margin leaves room for jitter."""
AUDIO_CONTEXT_FRAMES = 5
"""Frames of sound stored after a clip and (at least) before it, if the film has them, for its outermost mel windows."""


@dataclass(frozen=True)
class Quality:
    """Measures to filter clips by, in the units of the clip table's columns. None: not measured."""

    blur: float
    face_px: float
    brightness: float
    yaw_deg: float
    sync_confidence: float | None = None
    av_offset_ms: float | None = None
    av_corrected: bool | None = None
    speaking_score: float | None = None
    occlusion: float | None = None
    jitter: float | None = None
    bridged: float | None = None
    visible: float | None = None


@dataclass(frozen=True, eq=False)
class Clip:
    """One row of the clip table, with numeric columns as arrays and pictures still encoded.

    Raises TccpError if the columns' lengths disagree or there is no identity picture.
    """

    clip_id: str
    source: str
    source_hash: str
    track: int
    start_s: float
    num_frames: int
    source_width: int
    source_height: int
    picture_px: int
    head_box: Float32[np.ndarray, "f 4"]
    stored_box: Float32[np.ndarray, "f 4"]
    landmarks: Float32[np.ndarray, "f 68 2"]
    landmark_confidence: Float32[np.ndarray, "f"]
    scene: list[bytes]
    face: list[bytes]
    identity: list[bytes]
    audio: Int16[np.ndarray, "samples"]
    audio_before: Int16[np.ndarray, "before"]
    audio_after: Int16[np.ndarray, "after"]
    quality: Quality
    person: int | None = None

    def __post_init__(self) -> None:
        for name in ("head_box", "stored_box", "landmarks", "landmark_confidence", "scene", "face"):
            if len(getattr(self, name)) != self.num_frames:
                given = f"{name} has {len(getattr(self, name))} frames"
                raise TccpError(f"clip {self.clip_id}: {given}, num_frames is {self.num_frames}")
        if len(self.audio) != self.num_frames * SAMPLES_PER_FRAME:
            raise TccpError(
                f"clip {self.clip_id}: {len(self.audio)} samples of sound; {self.num_frames} frames need "
                f"{self.num_frames * SAMPLES_PER_FRAME}"
            )
        if len(self.audio_before) % SAMPLES_PER_FRAME:
            raise TccpError(f"clip {self.clip_id}: sound before the clip must be a multiple of a frame's samples")
        if not self.identity:
            raise TccpError(f"clip {self.clip_id} has no identity picture")

    @property
    def start_frame(self) -> int:
        return round(self.start_s * FPS)


def clip_id_of(source_hash: str, track: int, start_frame: int, content: bytes = b"") -> str:
    """Stable content hash of a clip, 32 hex digits, from the source file's content and the clip's position in it.

    content: everything else that the clip was made from. Data derived from a clip is stored under its id.
    """
    key = f"{source_hash}/{track}/{start_frame}/{GEOMETRY_VERSION}".encode()
    return hashlib.blake2b(key + content, digest_size=16).hexdigest()


def audio_context_start(start_frame: int) -> int:
    """The frame at which the stored sound before a clip begins.

    It is a multiple of 5 frames, which are exactly 16 mel columns, so that a clip's mel columns coincide with the
    film's.
    """
    return max(0, (start_frame - AUDIO_CONTEXT_FRAMES) // 5 * 5)


def stored_box_of(head_box: Float32[np.ndarray, "f 4"]) -> Float32[np.ndarray, "f 4"]:
    """Head boxes enlarged by STORED_MARGIN about their centres."""
    center = (head_box[:, :2] + head_box[:, 2:]) / 2
    half = (head_box[:, 2:] - head_box[:, :2]) / 2 * STORED_MARGIN
    return np.concatenate([center - half, center + half], axis=1).astype(np.float32)
