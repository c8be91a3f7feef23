"""The clips that rows are judged on: RoundTable, drawn in memory, with people, rooms and voices of their own.

No film is written or decoded: what a codec does to pictures is no part of the measurement.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float32, UInt8

from tccp import headbox
from tccp.config import FPS, SAMPLES_PER_FRAME, Settings
from tccp.inference.conditioning import identity_picture, masked_scenes
from tccp.media.mel import mel_windows
from tccp.roundtable import Truth, synthesise

HELD_OUT_FRAMES = 36
"""1.44 s: a first frame and five windows of seven new ones."""
DRIFT_FRAMES = 351
"""A first frame and fifty windows of seven new ones."""
COUNTERFACTUAL_FRAMES = 15
COUNTERFACTUAL_DEG = (-50.0, -25.0, 25.0, 50.0)
"""Bearings at which the only listener of a clip is made to stand."""
MID_SPEECH_FRAME = 50
"""By two seconds everybody has begun to speak; all clips begin in silence, heads and mouths at rest."""
_SOUND_MARGIN_FRAMES = 5  # the last frame's audio window looks 0.14 s ahead of it

Purpose = Literal["held_out", "reference", "prior", "drift", "counterfactual"]
"""What clips are for: figures; the true faces of the Frechet distance; what predictors that see no scene learn from;
long chains; the listener moved."""
_FIRST_ENTROPY = 90_001  # training films come from seeds 1 and 1001 onward (write_clips), the probe's from 5,000,000


def clip_seeds(purpose: Purpose, count: int) -> list[int]:
    """Seeds of `count` clips, the same whenever asked for; more of them begin with the same ones.

    They are hashes of 63 bits, so no two purposes share a clip, nor do they with any film of `tccp synth`.
    """
    sequence = np.random.SeedSequence([_FIRST_ENTROPY + get_args(Purpose).index(purpose)])
    return [int(seed) for seed in sequence.generate_state(count, np.uint64) >> 1]


def counterfactual_seeds(count: int) -> list[int]:
    """Seeds of clips in which the talker has one listener: `make_clip(..., listener_deg=...)` can move him."""

    def suitable() -> Iterator[int]:
        for seed in clip_seeds("counterfactual", 16 * count + 16):
            if synthesise(seed, _seconds(COUNTERFACTUAL_FRAMES)).others_box.shape[1] == 1:
                yield seed

    return list(islice(suitable(), count))


def _seconds(num_frames: int) -> float:
    return (num_frames + _SOUND_MARGIN_FRAMES) / FPS


@dataclass(frozen=True)
class EvaluationClip:
    """A clip of f frames: its truth, and everything that generation is given.

    scenes: as drawn; faces: what truth.head_box shows, at picture_px; points: true landmarks, 0..1 of the head box;
    masked_scenes: at picture_px; mel: the networks' audio window of each frame; audio: 16 kHz, -1..1, going on a little
    after the last frame; identity: the talker elsewhere, at picture_px; fitted_boxes: the mask in masked_scenes.
    """

    truth: Truth
    scenes: UInt8[np.ndarray, "f h w 3"]
    faces: UInt8[np.ndarray, "f s s 3"]
    points: Float32[np.ndarray, "f 68 2"]
    masked_scenes: UInt8[np.ndarray, "f s s 3"]
    mel: Float32[np.ndarray, "f 80 16"]
    audio: Float32[np.ndarray, " samples"]
    identity: UInt8[np.ndarray, "s s 3"]
    fitted_boxes: Float32[np.ndarray, "f 4"]

    @property
    def num_frames(self) -> int:
        return len(self.faces)


def make_clip(seed: int, num_frames: int, settings: Settings, start: int = 0, **options: Any) -> EvaluationClip:
    """The clip of this seed, from frame `start` on, as `tccp generate` would see it.

    options: of `tccp.roundtable.synthesise`.
    """
    clip = synthesise(seed, _seconds(start + num_frames), **options)
    truth = _stretch(clip, start, num_frames)
    scenes = np.stack([clip.render(frame) for frame in range(start, start + num_frames)])
    audio = clip.audio[start * SAMPLES_PER_FRAME :]
    size, boxes = settings.picture_px, truth.head_box
    masked, mask_box = masked_scenes(scenes, boxes, size)
    return EvaluationClip(
        truth=truth,
        scenes=scenes,
        faces=np.stack([headbox.crop(scene, box, size) for scene, box in zip(scenes, boxes, strict=True)]),
        points=true_points(truth),
        masked_scenes=masked,
        mel=mel_windows(audio, 0, num_frames),
        audio=audio,
        identity=identity_picture(clip.identity, size),
        fitted_boxes=mask_box,
    )


def true_points(truth: Truth) -> Float32[np.ndarray, "f 68 2"]:
    """The true landmarks in 0..1 of the head box."""
    return np.stack([headbox.to_crop(*frame) for frame in zip(truth.landmarks_px, truth.head_box, strict=True)])


def in_mid_speech(clip: EvaluationClip) -> EvaluationClip:
    """The clip with the truth of as many frames from two seconds on, for the wrong-clip control.

    Any two clips agree on when speech sets in: the true mouths of two beginnings correlate by 0.24, those of a
    beginning and a later stretch by 0.01.
    """
    count = clip.num_frames
    longer = synthesise(clip.truth.seed, _seconds(MID_SPEECH_FRAME + 2 * count), clip.truth.width, clip.truth.height)
    return replace(clip, truth=_stretch(longer, MID_SPEECH_FRAME, count))


def _stretch(truth: Truth, start: int, count: int) -> Truth:
    """`count` frames of a truth from frame `start` on, and what happens in them."""
    part = truth.between(start, start + count)
    return replace(part, event_s=part.event_s[(part.event_s >= 0) & (part.event_s < count / FPS)])
