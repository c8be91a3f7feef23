"""Figures of one generated RoundTable clip against its truth: sync, coherence, fidelity; and of a set of features.

Pure functions. A figure that has no meaning for what is shown, or for this clip, is NaN. A frame in which no landmarks
could be read counts as one that says nothing: the clip's mean mouth, a head straight ahead, the wrong side. A series
that never changes correlates 0 with truth, so that a frozen picture is not left out of a mean but counted.
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
"""Lags tried, in frames, to either side."""
CLOSED = 0.02
"""Openings up to this are a closed mouth."""
SILENCE = 0.02
"""A frame is silent whose sound's root mean square is at most this share of the clip's loudest frame's (-34 dB)."""
CLEAR_DEG = 10.0
"""A head turned by this much has a side."""
BLINK = 0.5
"""Eyes are shut whose opening is below this share of the clip's median."""
_SSIM_EVERY = 4  # frames; it is slow, and neighbours tell the same
_ROUNDING = 1 / 12  # mean squared error of rounding to 8 bits: keeps PSNR finite, at most 58.9 dB
_LIDS = ((37, 38, 43, 44), (41, 40, 47, 46))


@dataclass(frozen=True)
class Shown:
    """What a row of the table shows of one clip.

    points: read from landmark pictures, 0..1 of the head box, NaN where nothing could be read. faces: crops of the head
    box. reading: the probe's, of `faces`. scenes: frames with the head pasted in.
    """

    points: Float32[np.ndarray, "f 68 2"] | None = None
    faces: UInt8[np.ndarray, "f s s 3"] | None = None
    reading: FaceReading | None = None
    scenes: UInt8[np.ndarray, "f h w 3"] | None = None


@dataclass(frozen=True)
class _Acted:
    """Mouth and head over time, and what they are measured against, in the same units: of landmarks or of the probe."""

    opening: Float[np.ndarray, " f"]
    width: Float[np.ndarray, " f"]
    yaw_deg: Float[np.ndarray, " f"]
    true_opening: Float[np.ndarray, " f"]
    true_yaw_deg: Float[np.ndarray, " f"]


# -- series over time -------------------------------------------------------------------------------------------------


def correlation(shown: Float[np.ndarray, " f"], true: Float[np.ndarray, " f"]) -> float:
    """Pearson's r. 0 for a series that never changes; NaN where truth itself does not, or for fewer than 3 frames."""
    if len(true) < 3 or np.ptp(true) < 1e-6:
        return np.nan
    shown = _filled(shown)
    return sequences.correlation(shown, true) if np.ptp(shown) >= 1e-6 else 0.0


def best_lag(shown: Float[np.ndarray, " f"], true: Float[np.ndarray, " f"]) -> float:
    """The shift in frames, -5..5, at which the series correlate best; positive where the shown one is late."""
    if len(true) < 2 * MAX_LAG + 3 or np.ptp(_filled(shown)) < 1e-6:
        return np.nan
    lags = sorted(range(-MAX_LAG, MAX_LAG + 1), key=abs)  # among equals the smallest
    shifted = [
        (shown[max(lag, 0) : len(shown) + min(lag, 0)], true[max(-lag, 0) : len(true) - max(lag, 0)]) for lag in lags
    ]
    likeness = [correlation(*pair) for pair in shifted]
    return np.nan if np.isnan(likeness).all() else float(lags[int(np.nanargmax(likeness))])


def silent_frames(opening: Float[np.ndarray, " f"], audio: Float[np.ndarray, " samples"]) -> Bool[np.ndarray, " f"]:
    """Frames in which the true mouth is closed (CLOSED) and the sound silent (SILENCE)."""
    frames = audio[: len(opening) * SAMPLES_PER_FRAME].reshape(len(opening), SAMPLES_PER_FRAME).astype(np.float64)
    loudness = np.sqrt((frames**2).mean(axis=1))
    return (opening <= CLOSED) & (loudness <= SILENCE * loudness.max())


def silent_motion(opening: Float[np.ndarray, " f"], silent: Bool[np.ndarray, " f"]) -> float:
    """Mean change of the opening from frame to frame in silence, as a ratio to that in speech.

    A step counts as silence if both its frames are silent, as speech if neither is. 0: still in silence; 1: the mouth
    does not know of it, nor does one that never moves. NaN without 3 steps of either.
    """
    steps = np.abs(np.diff(_filled(opening)))
    in_silence, in_speech = steps[silent[1:] & silent[:-1]], steps[~silent[1:] & ~silent[:-1]]
    if min(len(in_silence), len(in_speech)) < 3:
        return np.nan
    return float(in_silence.mean() / in_speech.mean()) if in_speech.mean() > 1e-6 else 1.0


def side_accuracy(yaw_deg: Float[np.ndarray, " f"], clip: EvaluationClip) -> float:
    """Share of frames in which the head is turned to the listener's side, of those in which the true one clearly is.

    Left out are true heads within CLEAR_DEG of straight ahead, and those that have not turned to a new listener yet.
    """
    side, true = clip.truth.listener_side, clip.truth.yaw_deg
    clear = side * true >= CLEAR_DEG
    return float((np.sign(yaw_deg) == side)[clear].mean()) if clear.any() else np.nan


def eye_opening(points: Float[np.ndarray, "f 68 2"]) -> Float64[np.ndarray, " f"]:
    """Mean gap between the lids of both eyes, in units of the (frontal) distance of the outer eye corners."""
    upper, lower = (points[:, list(lids)].astype(np.float64) for lids in _LIDS)
    return np.linalg.norm(upper - lower, axis=-1).mean(axis=1) / head_pose(points).scale


def blinks_per_s(eyes: Float[np.ndarray, " f"]) -> float:
    """How often the eyes shut (BLINK) in a second. Frames not read, or without eyes, are open ones."""
    known = eyes[np.isfinite(eyes)]
    if not len(known):
        return 0.0
    shut = np.nan_to_num(eyes, nan=np.inf) < BLINK * np.median(known)
    return len(sequences.true_runs(shut)) * FPS / len(eyes)


def listener_slope(generated_yaw_deg: Float[np.ndarray, " b"], true_yaw_deg: Float[np.ndarray, " b"]) -> float:
    """Least-squares slope of the generated yaw over the true one, one value per bearing of the moved listener.

    1: the head follows him fully; 0: not at all. NaN where the true yaw is the same everywhere.
    """
    centred = true_yaw_deg.astype(np.float64) - true_yaw_deg.mean()
    return float(centred @ generated_yaw_deg / (centred @ centred)) if np.ptp(true_yaw_deg) > 1e-6 else np.nan


def _filled(values: Float[np.ndarray, " f"]) -> Float64[np.ndarray, " f"]:
    known = np.isfinite(values)
    return np.where(known, values, values[known].mean() if known.any() else 0.0).astype(np.float64)


def _ratio(shown: float, true: float) -> float:
    return shown / true if true > 1e-6 else np.nan


# -- pictures ---------------------------------------------------------------------------------------------------------


def psnr(shown: UInt8[np.ndarray, "f h w 3"], true: UInt8[np.ndarray, "f h w 3"]) -> float:
    """Peak signal-to-noise ratio in dB, of all frames together; at most 58.9 dB, which is rounding to 8 bits."""
    error = ((shown.astype(np.float32) - true) ** 2).mean(dtype=np.float64)
    return float(10 * np.log10(255**2 / max(error, _ROUNDING)))


def ssim(shown: UInt8[np.ndarray, "f h w 3"], true: UInt8[np.ndarray, "f h w 3"]) -> float:
    """Structural similarity, mean over every fourth frame."""
    from skimage.metrics import structural_similarity  # a slow import

    pairs = zip(shown[::_SSIM_EVERY], true[::_SSIM_EVERY], strict=True)
    return float(np.mean([structural_similarity(a, b, channel_axis=-1, data_range=255) for a, b in pairs]))


def border_step(scenes: UInt8[np.ndarray, "f h w 3"], boxes: Float[np.ndarray, "f 4"]) -> float:
    """Mean absolute step, in levels, from the pixels just inside a mask's border to those just outside."""
    steps = []
    for scene, box in zip(scenes.astype(np.float32), boxes.astype(int), strict=True):
        height, width = scene.shape[:2]
        x0, y0, x1, y1 = box
        rows, columns = slice(max(y0, 0), max(y1, 0)), slice(max(x0, 0), max(x1, 0))
        # A border outside the picture, or on its edge, has no other side.
        steps += [np.abs(scene[y, columns] - scene[y - 1, columns]) for y in (y0, y1) if 0 < y < height]
        steps += [np.abs(scene[rows, x] - scene[rows, x - 1]) for x in (x0, x1) if 0 < x < width]
    return float(np.concatenate(steps).mean()) if steps else np.nan


def consistency(identity: Float[np.ndarray, "f d"]) -> float:
    """Mean cosine between the identity vectors of any two frames: 1 for a frozen face."""
    return float((identity.astype(np.float64).mean(axis=0) ** 2).sum())


def flicker(faces: UInt8[np.ndarray, "f h w 3"]) -> float:
    """Root mean square of the second difference over time, in levels: what is neither still nor steady motion."""
    if len(faces) < 3:
        return np.nan
    values = faces.astype(np.float32)
    return float(np.sqrt(((values[2:] - 2 * values[1:-1] + values[:-2]) ** 2).mean(dtype=np.float64) / 6))


def frechet_distance(a: Float[np.ndarray, "n k"], b: Float[np.ndarray, "m k"]) -> float:
    """Frechet distance of the normal distributions fitted to two sets of features (Heusel et al. 2017).

    |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)). Sets of few frames differ by chance: compare only figures from
    equally many.
    """
    a, b = a.astype(np.float64), b.astype(np.float64)
    cov_a, cov_b = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (a, b))
    values, vectors = np.linalg.eigh(cov_a)
    root_a = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    # S_a S_b has the eigenvalues of the symmetric root_a S_b root_a, of which no root can turn complex.
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root_a @ cov_b @ root_a), 0, None)).sum()
    distance = ((a.mean(axis=0) - b.mean(axis=0)) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross
    return float(max(distance, 0.0))


# -- one clip ---------------------------------------------------------------------------------------------------------

_ACTED = ("amplitude_ratio", "lag_frames", "silent_motion", "wrong_clip_corr", "side_accuracy", "head_motion_ratio")
_LANDMARKS = ("nod_stress_corr", "blink_rate_gap", "landmark_nme", "unread_landmarks")
_FACES = ("psnr", "ssim", "consistency_gap", "flicker_gap")
CLIP_FIGURES = (
    *(f"{name}_{of}" for of in ("landmarks", "face") for name in ("mouth_corr", "width_corr", "yaw_mae_deg")),
    *_ACTED,
    *(f"{name}_face" for name in _ACTED),
    *_LANDMARKS,
    *_FACES,
    "seam",
)
"""What `clip_figures` gives; names without an ending are of landmarks where there is one with `_face` beside."""


def clip_figures(clip: EvaluationClip, shown: Shown, truth: Shown, other: EvaluationClip) -> dict[str, float]:
    """Every figure of one clip (`CLIP_FIGURES`), NaN where it has no meaning.

    truth: what the row `truth` shows of this clip. other: another clip, for the wrong-clip control.

    - mouth_corr, width_corr, wrong_clip_corr: correlation with truth, with that of another clip. amplitude_ratio:
      standard deviation of the opening over the true one's. lag_frames: positive is late. silent_motion: see there.
    - yaw_mae_deg, side_accuracy: landmarks show yaw by `head_pose`, which sees RoundTable's faces turned about a tenth
      less than they are; so their reference is the same function of the true landmarks, and the probe's is the truth.
    - nod_stress_corr: pitch of the landmarks with speech stress; what can be had is in the row `truth`.
    - head_motion_ratio: spread of yaw, pitch and roll (yaw alone for faces) over the true one's. blink_rate_gap: blinks
      per second less the true ones, which follow nothing, so that only the mean over clips says something.
    - landmark_nme: mean distance in units of the (frontal) distance of the outer eye corners, of the frames that could
      be read; unread_landmarks: share of those that could not.
    - psnr, ssim: in the head box. seam: step across its border in the scene over the step there in truth, 1 is right.
    - consistency_gap: difference from truth's likeness of frames to each other (`consistency`); flicker_gap: of
      `flicker`, as a share of truth's. 0 is right, and a frozen picture has neither.
    """
    figures = dict.fromkeys(CLIP_FIGURES, np.nan)
    silent = silent_frames(clip.truth.mouth_opening, clip.audio)
    if (acted := landmarks_acted(clip, shown)) is not None:
        figures |= _acted_figures(acted, clip, other, silent, "landmarks", "")
        figures |= _landmark_figures(clip, shown)
    if (acted := faces_acted(clip, shown)) is not None:
        figures |= _acted_figures(acted, clip, other, silent, "face", "_face")
        figures["head_motion_ratio_face"] = _ratio(float(acted.yaw_deg.std()), float(acted.true_yaw_deg.std()))
    if shown.faces is not None:
        figures["psnr"], figures["ssim"] = psnr(shown.faces, clip.faces), ssim(shown.faces, clip.faces)
        figures["flicker_gap"] = abs(_ratio(flicker(shown.faces), flicker(clip.faces)) - 1)
    if shown.reading is not None and truth.reading is not None:
        figures["consistency_gap"] = abs(consistency(shown.reading.identity) - consistency(truth.reading.identity))
    if shown.scenes is not None:
        boxes = clip.truth.head_box
        figures["seam"] = _ratio(border_step(shown.scenes, boxes), border_step(clip.scenes, boxes))
    return figures


def landmarks_acted(clip: EvaluationClip, shown: Shown) -> _Acted | None:
    """Mouth and head of the landmarks, None without; against the same measures of the true landmarks."""
    if shown.points is None:
        return None
    return _Acted(
        opening=mouth_opening(shown.points),
        width=mouth_width(shown.points),
        yaw_deg=np.nan_to_num(head_pose(shown.points).yaw_deg, nan=0.0),
        true_opening=mouth_opening(clip.points),
        true_yaw_deg=head_pose(clip.points).yaw_deg,
    )


def faces_acted(clip: EvaluationClip, shown: Shown) -> _Acted | None:
    """Mouth and head of the faces as the probe reads them, None without; against the truth itself."""
    reading, truth = shown.reading, clip.truth
    if reading is None:
        return None
    return _Acted(reading.opening, reading.width, reading.yaw_deg, truth.mouth_opening, truth.yaw_deg)


def _acted_figures(
    acted: _Acted, clip: EvaluationClip, other: EvaluationClip, silent: Bool[np.ndarray, " f"], of: str, ending: str
) -> dict[str, float]:
    opening, true_opening = acted.opening, clip.truth.mouth_opening
    n = min(len(opening), other.truth.num_frames)
    return {
        f"mouth_corr_{of}": correlation(opening, true_opening),
        f"width_corr_{of}": correlation(acted.width, clip.truth.mouth_width),
        f"yaw_mae_deg_{of}": float(np.abs(acted.yaw_deg - acted.true_yaw_deg).mean()),
        f"amplitude_ratio{ending}": _ratio(float(_filled(opening).std()), float(acted.true_opening.std())),
        f"lag_frames{ending}": best_lag(opening, true_opening),
        f"silent_motion{ending}": silent_motion(opening, silent),
        f"wrong_clip_corr{ending}": correlation(opening[:n], other.truth.mouth_opening[:n]),
        f"side_accuracy{ending}": side_accuracy(acted.yaw_deg, clip),
    }


def _landmark_figures(clip: EvaluationClip, shown: Shown) -> dict[str, float]:
    assert shown.points is not None
    pose, true_pose = head_pose(shown.points), head_pose(clip.points)

    def spread(turns: Sequence[Float[np.ndarray, " f"]]) -> float:
        return float(np.sqrt(sum(_filled(turn).var() for turn in turns)))

    distance = np.linalg.norm(shown.points - clip.points, axis=-1).mean(axis=1) / true_pose.scale
    readable = np.isfinite(distance)
    true_blinks = blinks_per_s(1 - clip.truth.blink)
    return {
        "nod_stress_corr": correlation(pose.pitch_deg, clip.truth.stress),
        "head_motion_ratio": _ratio(
            spread((pose.yaw_deg, pose.pitch_deg, pose.roll_deg)),
            spread((true_pose.yaw_deg, true_pose.pitch_deg, true_pose.roll_deg)),
        ),
        "blink_rate_gap": blinks_per_s(eye_opening(shown.points)) - true_blinks,
        "landmark_nme": float(distance[readable].mean()) if readable.any() else np.nan,
        "unread_landmarks": float(1 - readable.mean()),
    }


# -- drift ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drift:
    """What changes from the first window of a clip to a later one.

    figures: `drift_<k>` (loss of PSNR in dB), `drift_<k>_yaw_deg` and `drift_<k>_yaw_deg_face` (growth of the mean
    absolute yaw error, of landmarks and of faces), `drift_<k>_colour` (change of the mean colour less truth's own, in %
    of full scale, mean over the channels' absolute values). mouth, mouth_face: for each k, windows 1 and k, in each the
    shown and the true opening, for `corr_loss`; empty where nothing is shown or the clip is too short.
    """

    figures: dict[str, float]
    mouth: Mapping[int, Float64[np.ndarray, "2 2 _"]]
    mouth_face: Mapping[int, Float64[np.ndarray, "2 2 _"]]


def drift_figures(
    clip: EvaluationClip, shown: Shown, truth: Shown, window: int = 8, at: Sequence[int] = (10, 50)
) -> Drift:
    """Windows k of a chain against its first: window k is frames (k - 1) (window - 1) + 1 to k (window - 1).

    truth: what the row `truth` shows; its faces give truth's own change of colour. NaN for a k beyond the clip.
    """
    new = window - 1
    landmarks, faces = landmarks_acted(clip, shown), faces_acted(clip, shown)
    true_faces = clip.faces if truth.faces is None else truth.faces
    figures: dict[str, float] = {}
    mouth: dict[int, Float64[np.ndarray, "2 2 _"]] = {}
    mouth_face: dict[int, Float64[np.ndarray, "2 2 _"]] = {}
    for k in at:
        figures |= dict.fromkeys((f"drift_{k}{of}" for of in ("", "_yaw_deg", "_yaw_deg_face", "_colour")), np.nan)
        mouth[k] = mouth_face[k] = np.empty((2, 2, 0))
        if k * new >= clip.truth.num_frames:
            continue
        parts = [slice((w - 1) * new + 1, w * new + 1) for w in (1, k)]
        for acted, openings, ending in ((landmarks, mouth, ""), (faces, mouth_face, "_face")):
            if acted is None:
                continue
            series = np.stack([_filled(acted.opening), acted.true_opening.astype(np.float64)])
            openings[k] = np.stack([series[:, part] for part in parts])
            error = np.abs(acted.yaw_deg - acted.true_yaw_deg)
            figures[f"drift_{k}_yaw_deg{ending}"] = float(error[parts[1]].mean() - error[parts[0]].mean())
        if shown.faces is not None:
            quality = [psnr(shown.faces[part], clip.faces[part]) for part in parts]
            figures[f"drift_{k}"] = quality[0] - quality[1]
            colour, true_colour = (
                pictures[parts[1]].mean(axis=(0, 1, 2)) - pictures[parts[0]].mean(axis=(0, 1, 2))
                for pictures in (shown.faces, true_faces)
            )
            figures[f"drift_{k}_colour"] = float(100 / 255 * np.abs(colour - true_colour).mean())
    return Drift(figures, mouth, mouth_face)


def corr_loss(openings: Sequence[Float64[np.ndarray, "2 2 _"]]) -> float:
    """Correlation of shown and true opening in window 1 less that in window k, frames of all clips pooled.

    Within one clip a window is too short to correlate. openings: `Drift.mouth[k]` or `mouth_face[k]` of each clip.
    """
    pooled = np.concatenate(list(openings), axis=-1)
    first, last = (correlation(*window) for window in pooled)
    return first - last
