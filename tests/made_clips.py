"""Rows of a clip table made of random numbers."""

from __future__ import annotations

import numpy as np

from tccp.clips import clip_table as clips
from tccp.clips.clip_table import Clip, Quality, clip_id_of
from tccp.config import SAMPLES_PER_FRAME


def make_clip(number: int = 0, num_frames: int = 16, picture_px: int = 32, still_px: int = 24) -> Clip:
    """A clip whose every value differs from those of another number."""
    rng = np.random.default_rng(number)
    head_box = np.tile(np.array([10, 12, 42, 44], np.float32) + number % 7, (num_frames, 1))

    def stills(count: int, side: int, lossless: bool = False) -> list[bytes]:
        return [clips.encode_still(rng.integers(0, 256, (side, side, 3), np.uint8), lossless) for _ in range(count)]

    return Clip(
        clip_id=clip_id_of(f"{number:032x}", 1, 50),
        source=f"film_{number}.mp4",
        source_hash=f"{number:032x}",
        track=1,
        start_s=2.0,
        num_frames=num_frames,
        source_width=96,
        source_height=64,
        picture_px=picture_px,
        head_box=head_box,
        stored_box=clips.stored_box_of(head_box),
        landmarks=rng.random((num_frames, 68, 2), np.float32),
        landmark_confidence=rng.random(num_frames, np.float32),
        scene=stills(num_frames, picture_px, lossless=True),
        face=stills(num_frames, still_px),
        identity=stills(3, picture_px),
        audio=rng.integers(-32768, 32768, num_frames * SAMPLES_PER_FRAME).astype(np.int16),
        audio_before=rng.integers(-32768, 32768, 2 * SAMPLES_PER_FRAME).astype(np.int16),
        audio_after=rng.integers(-32768, 32768, 100).astype(np.int16),
        quality=Quality(blur=0.25, face_px=20.0, brightness=0.5, yaw_deg=-3.5, av_offset_ms=40.0),
    )
