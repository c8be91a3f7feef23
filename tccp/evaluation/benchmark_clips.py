"""The benchmark's clips: RoundTable scenes rendered in memory, with people, rooms and voices unseen in training.

No film is encoded or decoded, so that codec losses do not affect the figures.
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
"""1.44 s: a first frame and five windows of seven new frames each."""
DRIFT_FRAMES = 351
"""A first frame and fifty windows of seven new frames each."""
COUNTERFACTUAL_FRAMES = 15
COUNTERFACTUAL_DEG = (-50.0, -25.0, 25.0, 50.0)
"""Bearings, in degrees, at which the only listener of a counterfactual clip is placed."""
MID_SPEECH_FRAME = 50
"""After two seconds every talker speaks. All clips begin in silence, with heads and mouths at rest."""
_SOUND_MARGIN_FRAMES = 5  # the audio window of the last frame ends 0.14 s after the frame

Purpose = Literal["held_out", "reference", "prior", "drift", "counterfactual"]
"""held_out: figures per clip. reference: true faces for the Frechet distance. prior: training of the baselines in
`predictors`. drift: long chains. counterfactual: clips whose listener is moved."""
_FIRST_ENTROPY = 90_001  # training films come from seeds 1 and 1001 onward (write_clips), the probe's from 5,000,000


def clip_seeds(purpose: Purpose, count: int) -> list[int]:
    """Seeds of the first `count` clips for a purpose; deterministic, and a prefix of those for a larger count.

    The seeds are 63-bit hashes, so different purposes, and films of `tccp synth`, share no seed.
    """
    sequence = np.random.SeedSequence([_FIRST_ENTROPY + get_args(Purpose).index(purpose)])
    return [int(seed) for seed in sequence.generate_state(count, np.uint64) >> 1]


def counterfactual_seeds(count: int) -> list[int]:
    """Seeds of clips in which the talker has a single listener, which `make_clip(..., listener_deg=...)` can move."""

    def suitable() -> Iterator[int]:
        for seed in clip_seeds("counterfactual", 16 * count + 16):
            if synthesise(seed, _seconds(COUNTERFACTUAL_FRAMES)).others_box.shape[1] == 1:
                yield seed

    return list(islice(suitable(), count))


def _seconds(num_frames: int) -> float:
    return (num_frames + _SOUND_MARGIN_FRAMES) / FPS


@dataclass(frozen=True)
class EvaluationClip:
    """A clip of f frames: its truth, and the inputs of generation.

    scenes: as rendered. faces: crops of truth.head_box, s = picture_px pixels wide. points: true landmarks, 0..1 of the
    head box. masked_scenes: scaled to picture_px, head masked. mel: audio window of each frame. audio: 16 kHz, -1..1;
    ends 0.2 s after the last frame. identity: picture of the talker from another scene. fitted_boxes: mask boxes in
    pixels of masked_scenes.
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
    """Renders the clip with this seed from frame `start` on, and prepares the inputs as `tccp generate` does.

    options: passed to `tccp.roundtable.synthesise`.
    """
    clip = synthesise(seed, _seconds(start + num_frames), **options)
    truth = _excerpt(clip, start, num_frames)
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
    """The true landmarks, 0..1 of the head box."""
    return np.stack([headbox.to_crop(*frame) for frame in zip(truth.landmarks_px, truth.head_box, strict=True)])


def in_mid_speech(clip: EvaluationClip) -> EvaluationClip:
    """The clip with its truth replaced by that of equally many frames from two seconds on, for the wrong-clip control.

    Speech begins at a similar time in all clips: true mouth openings of the beginnings of two clips correlate by 0.24,
    those of a beginning and a later excerpt by 0.01.
    """
    count = clip.num_frames
    longer = synthesise(clip.truth.seed, _seconds(MID_SPEECH_FRAME + 2 * count), clip.truth.width, clip.truth.height)
    return replace(clip, truth=_excerpt(longer, MID_SPEECH_FRAME, count))


def _excerpt(truth: Truth, start: int, count: int) -> Truth:
    """The truth of `count` frames from frame `start` on, with the events that fall into them."""
    part = truth.between(start, start + count)
    return replace(part, event_s=part.event_s[(part.event_s >= 0) & (part.event_s < count / FPS)])
