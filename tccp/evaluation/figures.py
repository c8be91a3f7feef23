"""Figures that compare one generated RoundTable clip with its truth: sync, coherence, fidelity; and Frechet distances.

All functions are pure. A figure is NaN if it is undefined for an output or a clip. A frame without readable landmarks
counts as uninformative: it gets the clip's mean mouth, a head straight ahead, and the wrong side. A constant series has
correlation 0 with truth, so that frozen pictures count in a mean instead of being left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64, UInt8

from tccp import sequences
from tccp.config import FPS, SAMPLES_PER_FRAME
from tccp.evaluation.benchmark_clips import EvaluationClip
from tccp.evaluation.face_probe import FaceReading
from tccp.landmarks import head_pose, mouth_opening, mouth_width

MAX_LAG = 5
"""Largest lag tried in either direction, in frames."""
CLOSED = 0.02
"""Largest opening of a closed mouth."""
SILENCE = 0.02
"""A frame is silent if its audio's root mean square is at most this share of that of the loudest frame (-34 dB)."""
CLEAR_DEG = 10.0
"""Smallest true yaw of a head that clearly faces one side."""
BLINK = 0.5
"""Eyes are shut if their opening is below this share of the clip's median opening."""
_SSIM_FRAME_STEP = 4  # SSIM is slow, and neighbouring frames have nearly equal values
_ROUNDING_ERROR = 1 / 12  # mean squared error of rounding to 8 bits
_LIDS = ((37, 38, 43, 44), (41, 40, 47, 46))


@dataclass(frozen=True)
class ClipOutput:
    """The output of one method for one clip; None for the parts that the method does not produce.

    points: read from landmark pictures, 0..1 of the head box, NaN in unreadable frames. faces: crops of the head box.
    reading: the probe's reading of `faces`. scenes: frames with the face pasted in.
    """

    points: Float32[np.ndarray, "f 68 2"] | None = None
    faces: UInt8[np.ndarray, "f s s 3"] | None = None
    reading: FaceReading | None = None
    scenes: UInt8[np.ndarray, "f h w 3"] | None = None


@dataclass(frozen=True)
class _Motion:
    """Mouth and head over time, and their references in the same units: of landmarks, or of the probe's reading.

    opening, width: of the mouth. yaw_deg: in degrees, positive to the picture's right.
    """

    opening: Float[np.ndarray, " f"]
    width: Float[np.ndarray, " f"]
    yaw_deg: Float[np.ndarray, " f"]
    true_opening: Float[np.ndarray, " f"]
    true_yaw_deg: Float[np.ndarray, " f"]


# -- series over time -------------------------------------------------------------------------------------------------


def correlation(generated: Float[np.ndarray, " f"], true: Float[np.ndarray, " f"]) -> float:
    """Pearson's r: 0 if `generated` is constant, NaN if `true` is constant or has fewer than 3 frames."""
    if len(true) < 3 or np.ptp(true) < 1e-6:
        return np.nan
    generated = _filled(generated)
    return sequences.correlation(generated, true) if np.ptp(generated) >= 1e-6 else 0.0


def best_lag(generated: Float[np.ndarray, " f"], true: Float[np.ndarray, " f"]) -> float:
    """The shift in frames, -5..5, at which the series correlate best; positive if `generated` is late.

    NaN if `generated` is constant or the series has fewer than 13 frames.
    """
    if len(true) < 2 * MAX_LAG + 3 or np.ptp(_filled(generated)) < 1e-6:
        return np.nan
    lags = sorted(range(-MAX_LAG, MAX_LAG + 1), key=abs)  # of equal correlations the smallest lag wins
    shifted = [
        (generated[max(lag, 0) : len(generated) + min(lag, 0)], true[max(-lag, 0) : len(true) - max(lag, 0)])
        for lag in lags
    ]
    correlations = [correlation(*pair) for pair in shifted]
    return np.nan if np.isnan(correlations).all() else float(lags[int(np.nanargmax(correlations))])


def silent_frames(opening: Float[np.ndarray, " f"], audio: Float[np.ndarray, " samples"]) -> Bool[np.ndarray, " f"]:
    """Frames in which the true mouth is closed (CLOSED) and the audio silent (SILENCE). audio: 16 kHz."""
    frames = audio[: len(opening) * SAMPLES_PER_FRAME].reshape(len(opening), SAMPLES_PER_FRAME).astype(np.float64)
    loudness = np.sqrt((frames**2).mean(axis=1))
    return (opening <= CLOSED) & (loudness <= SILENCE * loudness.max())


def silent_motion(opening: Float[np.ndarray, " f"], silent: Bool[np.ndarray, " f"]) -> float:
    """Mean change of the opening between frames in silence, divided by that in speech.

    A step counts as silence if both its frames are silent, as speech if neither is. 0: the mouth is still in silence.
    1: it moves as in speech; a mouth that never moves also gets 1. NaN with fewer than 3 steps of either kind.
    """
    steps = np.abs(np.diff(_filled(opening)))
    in_silence, in_speech = steps[silent[1:] & silent[:-1]], steps[~silent[1:] & ~silent[:-1]]
    if min(len(in_silence), len(in_speech)) < 3:
        return np.nan
    return float(in_silence.mean() / in_speech.mean()) if in_speech.mean() > 1e-6 else 1.0


def side_accuracy(yaw_deg: Float[np.ndarray, " f"], clip: EvaluationClip) -> float:
    """Share of frames with the head turned to the listener's side, among those in which the true head clearly is.

    Frames are left out if the true head is within CLEAR_DEG of straight ahead or has not yet turned to a new listener.
    NaN if no frame remains.
    """
    side, true = clip.truth.listener_side, clip.truth.yaw_deg
    clear = side * true >= CLEAR_DEG
    return float((np.sign(yaw_deg) == side)[clear].mean()) if clear.any() else np.nan


def eye_opening(points: Float[np.ndarray, "f 68 2"]) -> Float64[np.ndarray, " f"]:
    """Mean gap between the lids of both eyes, in units of the (frontal) distance of the outer eye corners."""
    upper, lower = (points[:, list(lids)].astype(np.float64) for lids in _LIDS)
    return np.linalg.norm(upper - lower, axis=-1).mean(axis=1) / head_pose(points).scale


def blinks_per_s(eyes: Float[np.ndarray, " f"]) -> float:
    """Blinks (BLINK) per second. eyes: their opening; NaN, for unreadable frames, counts as open."""
    known = eyes[np.isfinite(eyes)]
    if not len(known):
        return 0.0
    shut = np.nan_to_num(eyes, nan=np.inf) < BLINK * np.median(known)
    return len(sequences.true_runs(shut)) * FPS / len(eyes)


def listener_slope(generated_yaw_deg: Float[np.ndarray, " b"], true_yaw_deg: Float[np.ndarray, " b"]) -> float:
    """Least-squares slope of the generated yaw over the true yaw, one value per bearing of the moved listener.

    1: the head follows the listener fully; 0: not at all. NaN if the true yaw is constant.
    """
    centred = true_yaw_deg.astype(np.float64) - true_yaw_deg.mean()
    return float(centred @ generated_yaw_deg / (centred @ centred)) if np.ptp(true_yaw_deg) > 1e-6 else np.nan


def _filled(values: Float[np.ndarray, " f"]) -> Float64[np.ndarray, " f"]:
    known = np.isfinite(values)
    return np.where(known, values, values[known].mean() if known.any() else 0.0).astype(np.float64)


def _ratio(generated: float, true: float) -> float:
    return generated / true if true > 1e-6 else np.nan


# -- pictures ---------------------------------------------------------------------------------------------------------


def psnr(generated: UInt8[np.ndarray, "f h w 3"], true: UInt8[np.ndarray, "f h w 3"]) -> float:
    """Peak signal-to-noise ratio in dB over all frames together; at most 58.9 dB, the ratio for rounding to 8 bits.

    Own code, because scikit-image's returns infinity for equal pictures, and training calls this without scikit-image.
    """
    error = ((generated.astype(np.float32) - true) ** 2).mean(dtype=np.float64)
    return float(10 * np.log10(255**2 / max(error, _ROUNDING_ERROR)))


def ssim(generated: UInt8[np.ndarray, "f h w 3"], true: UInt8[np.ndarray, "f h w 3"]) -> float:
    """Structural similarity index, -1..1, mean over every fourth frame. Needs the `evaluate` extra (scikit-image)."""
    from skimage.metrics import structural_similarity  # a slow import

    pairs = zip(generated[::_SSIM_FRAME_STEP], true[::_SSIM_FRAME_STEP], strict=True)
    return float(np.mean([structural_similarity(a, b, channel_axis=-1, data_range=255) for a, b in pairs]))


def border_step(scenes: UInt8[np.ndarray, "f h w 3"], boxes: Float[np.ndarray, "f 4"]) -> float:
    """Mean absolute difference, in 8-bit levels, between the pixels just inside and just outside the boxes' borders.

    boxes: x0, y0, x1, y1 in pixels. NaN if no border lies inside a picture.
    """
    steps = []
    for scene, box in zip(scenes.astype(np.float32), boxes.astype(int), strict=True):
        height, width = scene.shape[:2]
        x0, y0, x1, y1 = box
        rows, columns = slice(max(y0, 0), max(y1, 0)), slice(max(x0, 0), max(x1, 0))
        # A border outside the picture or on its edge has pixels on one side at most.
        steps += [np.abs(scene[y, columns] - scene[y - 1, columns]) for y in (y0, y1) if 0 < y < height]
        steps += [np.abs(scene[rows, x] - scene[rows, x - 1]) for x in (x0, x1) if 0 < x < width]
    return float(np.concatenate(steps).mean()) if steps else np.nan


def consistency(identity: Float[np.ndarray, "f d"]) -> float:
    """Mean cosine over all pairs of frames' unit identity vectors: 1 for a frozen face."""
    return float((identity.astype(np.float64).mean(axis=0) ** 2).sum())


def flicker(faces: UInt8[np.ndarray, "f h w 3"]) -> float:
    """Root mean square of the second difference over time, divided by sqrt(6), in 8-bit levels.

    Independent noise keeps its standard deviation; still pictures and steady changes give 0. NaN below 3 frames.
    """
    if len(faces) < 3:
        return np.nan
    values = faces.astype(np.float32)
    return float(np.sqrt(((values[2:] - 2 * values[1:-1] + values[:-2]) ** 2).mean(dtype=np.float64) / 6))


def frechet_distance(a: Float[np.ndarray, "n k"], b: Float[np.ndarray, "m k"]) -> float:
    """Frechet distance of the normal distributions fitted to two sets of features (Heusel et al. 2017).

    |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)). The distance depends on the number of frames, because small
    sets differ by chance: compare only distances from equally many frames.
    """
    a, b = a.astype(np.float64), b.astype(np.float64)
    cov_a, cov_b = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (a, b))
    values, vectors = np.linalg.eigh(cov_a)
    root_a = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    # S_a S_b has the eigenvalues of root_a S_b root_a. The latter is symmetric, so its eigenvalues are real.
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root_a @ cov_b @ root_a), 0, None)).sum()
    distance = ((a.mean(axis=0) - b.mean(axis=0)) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross
    return float(max(distance, 0.0))


# -- one clip ---------------------------------------------------------------------------------------------------------

_MOTION_FIGURES = (
    "amplitude_ratio",
    "lag_frames",
    "silent_motion",
    "wrong_clip_corr",
    "side_accuracy",
    "head_motion_ratio",
)
_LANDMARK_FIGURES = ("nod_stress_corr", "blink_rate_gap", "landmark_nme", "unread_landmarks")
_FACE_FIGURES = ("psnr", "ssim", "consistency_gap", "flicker_gap")
CLIP_FIGURES = (
    *(f"{name}_{of}" for of in ("landmarks", "face") for name in ("mouth_corr", "width_corr", "yaw_mae_deg")),
    *_MOTION_FIGURES,
    *(f"{name}_face" for name in _MOTION_FIGURES),
    *_LANDMARK_FIGURES,
    *_FACE_FIGURES,
    "seam",
)
"""Names of the figures in `clip_figures`. If NAME and NAME_face both exist, NAME is measured on landmarks."""


def clip_figures(
    clip: EvaluationClip, output: ClipOutput, truth: ClipOutput, other: EvaluationClip
) -> dict[str, float]:
    """All figures of one clip (`CLIP_FIGURES`), NaN where undefined.

    truth: the true pictures of this clip as an output (`Shard.true_outputs`). other: a wrong clip, for the control.

    - mouth_corr, width_corr: correlation with the true mouth. wrong_clip_corr: correlation of the opening with that of
      `other`. amplitude_ratio: standard deviation of the opening over the true one. lag_frames: positive is late.
      silent_motion: see the function.
    - yaw_mae_deg, side_accuracy: yaw of landmarks is estimated by `head_pose`, which underestimates RoundTable's yaw by
      about a tenth. Landmarks are therefore compared with the same estimate from the true landmarks, and the probe's
      yaw with the truth itself.
    - nod_stress_corr: correlation of the landmarks' pitch with speech stress; the row `truth` has the upper bound.
    - head_motion_ratio: standard deviation of yaw, pitch and roll (faces: yaw alone) over the true one.
      blink_rate_gap: blinks per second minus the true rate. True blinks depend on no input, so only the mean over clips
      is informative.
    - landmark_nme: mean error over readable frames, in units of the (frontal) distance of the outer eye corners.
      unread_landmarks: share of unreadable frames.
    - psnr, ssim: of the face crops. seam: `border_step` of the head box in the scene over that in truth; best is 1.
    - consistency_gap: absolute difference of `consistency` from truth. flicker_gap: relative difference of `flicker`
      from truth. Best is 0, which a frozen picture does not reach.
    """
    figures = dict.fromkeys(CLIP_FIGURES, np.nan)
    silent = silent_frames(clip.truth.mouth_opening, clip.audio)
    if (motion := landmark_motion(clip, output)) is not None:
        figures |= _motion_figures(motion, clip, other, silent, "landmarks", "")
        figures |= _landmark_figures(clip, output)
    if (motion := face_motion(clip, output)) is not None:
        figures |= _motion_figures(motion, clip, other, silent, "face", "_face")
        figures["head_motion_ratio_face"] = _ratio(float(motion.yaw_deg.std()), float(motion.true_yaw_deg.std()))
    if output.faces is not None:
        figures["psnr"], figures["ssim"] = psnr(output.faces, clip.faces), ssim(output.faces, clip.faces)
        figures["flicker_gap"] = abs(_ratio(flicker(output.faces), flicker(clip.faces)) - 1)
    if output.reading is not None and truth.reading is not None:
        figures["consistency_gap"] = abs(consistency(output.reading.identity) - consistency(truth.reading.identity))
    if output.scenes is not None:
        boxes = clip.truth.head_box
        figures["seam"] = _ratio(border_step(output.scenes, boxes), border_step(clip.scenes, boxes))
    return figures


def landmark_motion(clip: EvaluationClip, output: ClipOutput) -> _Motion | None:
    """Mouth and head of the landmarks, with the same measures of the true landmarks; None without landmarks."""
    if output.points is None:
        return None
    return _Motion(
        opening=mouth_opening(output.points),
        width=mouth_width(output.points),
        yaw_deg=np.nan_to_num(head_pose(output.points).yaw_deg, nan=0.0),
        true_opening=mouth_opening(clip.points),
        true_yaw_deg=head_pose(clip.points).yaw_deg,
    )


def face_motion(clip: EvaluationClip, output: ClipOutput) -> _Motion | None:
    """Mouth and head of the faces as the probe reads them, with the truth itself; None without a reading."""
    reading, truth = output.reading, clip.truth
    if reading is None:
        return None
    return _Motion(reading.opening, reading.width, reading.yaw_deg, truth.mouth_opening, truth.yaw_deg)


def _motion_figures(
    motion: _Motion, clip: EvaluationClip, other: EvaluationClip, silent: Bool[np.ndarray, " f"], of: str, ending: str
) -> dict[str, float]:
    opening, true_opening = motion.opening, clip.truth.mouth_opening
    n = min(len(opening), other.truth.num_frames)
    return {
        f"mouth_corr_{of}": correlation(opening, true_opening),
        f"width_corr_{of}": correlation(motion.width, clip.truth.mouth_width),
        f"yaw_mae_deg_{of}": float(np.abs(motion.yaw_deg - motion.true_yaw_deg).mean()),
        f"amplitude_ratio{ending}": _ratio(float(_filled(opening).std()), float(motion.true_opening.std())),
        f"lag_frames{ending}": best_lag(opening, true_opening),
        f"silent_motion{ending}": silent_motion(opening, silent),
        f"wrong_clip_corr{ending}": correlation(opening[:n], other.truth.mouth_opening[:n]),
        f"side_accuracy{ending}": side_accuracy(motion.yaw_deg, clip),
    }


def _landmark_figures(clip: EvaluationClip, output: ClipOutput) -> dict[str, float]:
    assert output.points is not None
    pose, true_pose = head_pose(output.points), head_pose(clip.points)

    def deviation(angles: Sequence[Float[np.ndarray, " f"]]) -> float:
        return float(np.sqrt(sum(_filled(angle).var() for angle in angles)))

    distance = np.linalg.norm(output.points - clip.points, axis=-1).mean(axis=1) / true_pose.scale
    readable = np.isfinite(distance)
    true_blinks = blinks_per_s(1 - clip.truth.blink)
    return {
        "nod_stress_corr": correlation(pose.pitch_deg, clip.truth.stress),
        "head_motion_ratio": _ratio(
            deviation((pose.yaw_deg, pose.pitch_deg, pose.roll_deg)),
            deviation((true_pose.yaw_deg, true_pose.pitch_deg, true_pose.roll_deg)),
        ),
        "blink_rate_gap": blinks_per_s(eye_opening(output.points)) - true_blinks,
        "landmark_nme": float(distance[readable].mean()) if readable.any() else np.nan,
        "unread_landmarks": float(1 - readable.mean()),
    }


# -- drift ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drift:
    """Changes from window 1 of a clip to a later window k.

    figures: `drift_<k>` (loss of PSNR in dB), `drift_<k>_yaw_deg` and `drift_<k>_yaw_deg_face` (growth of the mean
    absolute yaw error, of landmarks and of faces), `drift_<k>_colour` (change of the mean colour minus that in truth,
    in % of full scale, mean of the channels' absolute values). mouth, mouth_face: k -> an array for `corr_loss` with
    axes (window 1 or k, generated or true opening, frame); empty without an output or if the clip is too short.
    """

    figures: dict[str, float]
    mouth: Mapping[int, Float64[np.ndarray, "2 2 _"]]
    mouth_face: Mapping[int, Float64[np.ndarray, "2 2 _"]]


def drift_figures(
    clip: EvaluationClip, output: ClipOutput, truth: ClipOutput, window: int = 8, later: Sequence[int] = (10, 50)
) -> Drift:
    """Compares later windows of a chain with window 1.

    Window k is frames (k - 1) (window - 1) + 1 to k (window - 1). later: the windows' numbers k; figures are NaN for a
    k beyond the clip. truth: its faces give the change of colour in truth, by default those of `clip`.
    """
    new_frames = window - 1
    landmarks, faces = landmark_motion(clip, output), face_motion(clip, output)
    true_faces = clip.faces if truth.faces is None else truth.faces
    figures: dict[str, float] = {}
    mouth: dict[int, Float64[np.ndarray, "2 2 _"]] = {}
    mouth_face: dict[int, Float64[np.ndarray, "2 2 _"]] = {}
    for k in later:
        figures |= dict.fromkeys((f"drift_{k}{of}" for of in ("", "_yaw_deg", "_yaw_deg_face", "_colour")), np.nan)
        mouth[k] = mouth_face[k] = np.empty((2, 2, 0))
        if k * new_frames >= clip.truth.num_frames:
            continue
        parts = [slice((w - 1) * new_frames + 1, w * new_frames + 1) for w in (1, k)]
        for motion, openings, ending in ((landmarks, mouth, ""), (faces, mouth_face, "_face")):
            if motion is None:
                continue
            series = np.stack([_filled(motion.opening), motion.true_opening.astype(np.float64)])
            openings[k] = np.stack([series[:, part] for part in parts])
            error = np.abs(motion.yaw_deg - motion.true_yaw_deg)
            figures[f"drift_{k}_yaw_deg{ending}"] = float(error[parts[1]].mean() - error[parts[0]].mean())
        if output.faces is not None:
            quality = [psnr(output.faces[part], clip.faces[part]) for part in parts]
            figures[f"drift_{k}"] = quality[0] - quality[1]
            colour, true_colour = (
                pictures[parts[1]].mean(axis=(0, 1, 2)) - pictures[parts[0]].mean(axis=(0, 1, 2))
                for pictures in (output.faces, true_faces)
            )
            figures[f"drift_{k}_colour"] = float(100 / 255 * np.abs(colour - true_colour).mean())
    return Drift(figures, mouth, mouth_face)


def corr_loss(openings: Sequence[Float64[np.ndarray, "2 2 _"]]) -> float:
    """Correlation of generated and true opening in window 1 minus that in window k.

    A window of one clip is too short to correlate, so the frames of all clips are pooled. openings: `Drift.mouth[k]` or
    `mouth_face[k]` of each clip.
    """
    pooled = np.concatenate(list(openings), axis=-1)
    first, last = (correlation(*window) for window in pooled)
    return first - last
