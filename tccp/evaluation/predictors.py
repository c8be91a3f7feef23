"""Baselines without networks, which do not use the other people in the scene.

`mean` outputs the mean landmarks and the mean face of other clips, whatever the input. `mask_only` and `mask_body` are
random forests that predict the head's yaw, from the head box, and from the head box and the talker's own body. A model
that uses the scene has to predict yaw better than they do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Float32, UInt8

from tccp import headbox
from tccp.config import FPS
from tccp.evaluation.benchmark_clips import EvaluationClip, clip_seeds, true_points
from tccp.evaluation.figures import side_accuracy
from tccp.landmarks import head_pose
from tccp.roundtable import Truth, synthesise

Cue = Literal["mask_only", "mask_body"]
CUES: tuple[Cue, ...] = ("mask_only", "mask_body")
_MEAN_CLIPS = 64
_FRAME_STEP = 3  # neighbouring frames are nearly equal: the forests are fitted to every third
_TREES, _MIN_SAMPLES_LEAF = 200, 15


@dataclass(frozen=True)
class MeanFace:
    """The mean landmarks, 0..1 of the head box, and the mean face crop, over clips used for no figure."""

    points: Float32[np.ndarray, "68 2"]
    face: UInt8[np.ndarray, "s s 3"]


@functools.cache
def mean_face(picture_px: int) -> MeanFace:
    """The mean over the first frames of 64 clips, with face crops of `picture_px` pixels."""
    clips = [synthesise(seed, 1 / FPS) for seed in clip_seeds("prior", _MEAN_CLIPS)]
    faces = [headbox.crop(clip.render(0), clip.head_box[0], picture_px) for clip in clips]
    points = np.stack([true_points(clip)[0] for clip in clips]).mean(axis=0)
    return MeanFace(points, np.rint(np.mean(faces, axis=0)).astype(np.uint8))


def cue_features(cue: Cue, truth: Truth) -> Float[np.ndarray, "f n"]:
    """The input of a forest for every frame.

    mask_only: position and size of the head box, its displacement since the first frame, and its velocity.
    mask_body: also the exact yaw of the torso, now and in the first frame, and the shoulders relative to the head box.
    """
    box = truth.head_box.astype(np.float64)
    corner, side = box[:, :2], box[:, 2:3] - box[:, :1]
    features = [corner, side, corner - corner[0], np.gradient(corner, axis=0)]
    if cue == "mask_body":
        shoulders = (truth.shoulders_px - box[:, None, :2]) / side[:, None]
        torso = truth.torso_yaw_deg[:, None]
        features += [torso, np.broadcast_to(torso[:1], torso.shape), shoulders.reshape(len(box), -1)]
    return np.concatenate(features, axis=1)


def fit_cues(count: int, num_frames: int, on_clip: Callable[[], object] = lambda: None) -> dict[Cue, Any]:
    """A random forest per cue, fitted to the yaw of the true landmarks (`head_pose`) of `count` separate clips.

    on_clip: called after each clip is rendered.
    """
    from sklearn.ensemble import RandomForestRegressor  # a slow import

    features: dict[Cue, list[np.ndarray]] = {cue: [] for cue in CUES}
    yaw_deg = []
    for seed in clip_seeds("prior", count):
        clip = synthesise(seed, num_frames / FPS)
        yaw_deg.append(head_pose(true_points(clip)).yaw_deg[::_FRAME_STEP])
        for cue in CUES:
            features[cue].append(cue_features(cue, clip)[::_FRAME_STEP])
        on_clip()
    forests = {}
    for cue in CUES:
        forest = RandomForestRegressor(_TREES, min_samples_leaf=_MIN_SAMPLES_LEAF, max_samples=0.5, random_state=0)
        forests[cue] = forest.fit(np.concatenate(features[cue]), np.concatenate(yaw_deg))
    return forests


def cue_figures(cue: Cue, forest: Any, clip: EvaluationClip) -> dict[str, float]:
    """Figures of a forest's yaw. It predicts neither mouth nor picture, so there are no other figures."""
    yaw_deg = forest.predict(cue_features(cue, clip.truth))
    error = np.abs(yaw_deg - head_pose(clip.points).yaw_deg).mean()
    return {"yaw_mae_deg_landmarks": float(error), "side_accuracy": side_accuracy(yaw_deg, clip)}
