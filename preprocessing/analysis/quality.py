"""Quality figures by which clips are filtered, and their bounds. None of them needs a network."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

import cv2
import numpy as np
from jaxtyping import Float32, UInt8

from preprocessing.analysis.chips import CHEEKS, Chip, FacePoints, chip_frames, lab, read_chip, values_at
from preprocessing.reels import Track
from tccp.errors import TccpError
from tccp.landmarks import head_pose, yaw_deg
from tccp.landmarks.geometry import RIGID
from tccp.sequences import true_runs


def blur(picture: UInt8[np.ndarray, "h w 3"]) -> float:
    """0 sharp .. 1 blurred, after Crete et al. 2007: the share of contrast that survives another blur."""
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY).astype(np.float32)
    shares = []
    for axis, kernel in ((0, (1, 9)), (1, (9, 1))):
        before = np.abs(np.diff(grey, axis=axis))
        after = np.abs(np.diff(cv2.blur(grey, kernel), axis=axis))
        total = float(before.sum())
        shares.append(1 - float(np.maximum(before - after, 0).sum()) / total if total else 1.0)
    return max(shares)


def brightness(picture: UInt8[np.ndarray, "h w 3"]) -> float:
    """Mean luma, 0..1."""
    return float(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY).mean()) / 255


def face_px(landmarks_px: Float32[np.ndarray, "f 68 2"]) -> float:
    """Median height of the face from the brows to the chin, in pixels."""
    return float(np.median(landmarks_px[..., 1].max(axis=1) - landmarks_px[..., 1].min(axis=1)))


def median_yaw_deg(landmarks_px: Float32[np.ndarray, "f 68 2"]) -> float:
    """Median head yaw of a clip, sign as in `tccp.landmarks.yaw_deg`."""
    return float(np.median(yaw_deg(landmarks_px)))


# ---- Bridged frames


def bridged_share(confidence: Float32[np.ndarray, " f"]) -> float:
    """The share of frames without a detected face, whose landmarks are interpolated over a gap."""
    return float(np.mean(confidence == 0))


def with_few_bridged(confidence: Float32[np.ndarray, " f"], bound: float | None) -> list[tuple[int, int]]:
    """The parts [first, stop) in which at most the share `bound` of the frames is bridged.

    A part with more is cut at its longest gap, which is left out, until this holds for each part.
    """
    if bound is None or not len(confidence) or bridged_share(confidence) <= bound:
        return [(0, len(confidence))] if len(confidence) else []
    gaps = list(true_runs(confidence == 0))
    first, stop = max(gaps, key=lambda gap: gap[1] - gap[0])
    after = [(stop + one, stop + other) for one, other in with_few_bridged(confidence[stop:], bound)]
    return with_few_bridged(confidence[:first], bound) + after


# ---- Occlusion

# Points below the lips, beside them, between them and the nose, and towards the jaw: hands, microphones and cups cover
# them.
_LOWER = FacePoints.of(
    *(
        (lip, jaw, share)
        for share in (0.4, 0.6, 0.8)
        for lip, jaw in ((48, 4), (48, 5), (59, 6), (58, 7), (58, 8), (57, 8))
    ),
    *((48, jaw, share) for jaw in (2, 3) for share in (0.4, 0.65)),
    *((31, 48, share) for share in (0.5, 0.8)),
    *((nostril, lip, 0.4) for nostril, lip in ((32, 50), (33, 51))),
)
_LIPS = FacePoints.of((50, 61, 0.5), (51, 62, 0.5), (58, 67, 0.5), (57, 66, 0.5))
_LIP_EDGE = FacePoints.of(*((point, point, 0.0) for point in (49, 51, 57, 59)))
_AROUND_LIPS = FacePoints.of(
    *((31, 48, 0.5), (32, 50, 0.4), (33, 51, 0.4), (48, 4, 0.3), (59, 6, 0.35), (57, 8, 0.4)),
)
_GREY = np.array([0, 128, 128, 0], np.float32)  # black in Lab, without texture
_LAB_WEIGHTS = np.array([0.7, 1.5, 1.5], np.float32)  # light and shadow change lightness more than colour
_SMALL, _LARGE = 9.0, 18.0  # weighted Lab differences: up to _SMALL they are no evidence, from _LARGE on full evidence
_LIKELY_NOISE = 2.5  # up to so many times a point's usual difference there is no evidence either
_RED_LIPS = 5.0  # least redness of lips against the skin around them for which their absence is evidence
_HIDDEN_LIPS = 0.5  # added to the covered share if the lips are hidden
_KNOWN_TURN_DEG = 15.0  # colours are comparable up to this turn of the head, and not at all from twice this turn on
_MAX_COMPARED = 64  # most chips that are compared to find the uncovered face


def occlusion(track: Track) -> Float32[np.ndarray, " f"]:
    """How much of the lower face is covered, per frame: 0 visible .. 1 covered; interpolated linearly between chips.

    Each point of the face is compared with its appearance in most of the track (in chips with visible lips, if lips
    are redder than skin). Changes that the upper face shares are subtracted, and hidden lips add to the result.
    An object that covers the face all the time is found only if it hides the lips and its colour is far from skin's
    red. 0 where nothing is known: without chips or landmarks.
    """
    frames = chip_frames(track)
    if not frames:
        return np.zeros(track.num_frames, np.float32)
    views = [_view(read_chip(track, frame)) for frame in frames]
    yaw = yaw_deg(track.landmarks[np.array(frames) - track.start_frame].astype(np.float64))
    lower, upper, visible, redness = (np.stack(column) for column in zip(*views, strict=True))
    covered = _covered(lower, upper, visible, redness, yaw)
    at = np.arange(track.start_frame, track.stop_frame)
    return np.interp(at, frames, covered).astype(np.float32)


_View = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def _view(chip: Chip) -> _View:
    """Colour and texture at points of the lower and of the upper face, visibility of all points, redness of the lips.

    Redness: of the middle of the lips against the skin around them, and of the reddest points of the lips and their
    edge, which teeth do not affect.
    """
    colours = lab(chip.picture, 1.2)
    light = colours[..., 0]
    variance = np.maximum(cv2.blur(light * light, (7, 7)) - cv2.blur(light, (7, 7)) ** 2, 0)
    picture = np.dstack([colours, np.sqrt(variance)])
    lower, upper, lips, edge, around = (
        values_at(picture, chip.points, group) for group in (_LOWER, CHEEKS, _LIPS, _LIP_EDGE, _AROUND_LIPS)
    )
    reddest = np.sort(np.concatenate([lips[:, 1], edge[:, 1]]))[-4:]
    redness = [lips[:, 1].mean() - around[:, 1].mean(), reddest.mean() - np.median(around[:, 1])]
    half = np.concatenate([_LOWER.half, CHEEKS.half])
    return lower, upper, _visibility(chip.points, half), np.array(redness)


def _visibility(points: Float32[np.ndarray, "68 2"], half: np.ndarray) -> np.ndarray:
    """Visibility of each point: 1 on both halves of a frontal face, down to 0 on the half that is turned away."""
    across = points[42:48].mean(0) - points[36:42].mean(0)
    along = points @ (across / max(float(np.linalg.norm(across)), 1e-6))
    middle = along[[8, 27, 30, 33, 51]].mean()
    widths = np.array([middle - along[[2, 4]].mean(), along[[12, 14]].mean() - middle])
    left, right = np.clip((widths / max(float(widths.sum()), 1e-6) - 0.2) / 0.15, 0, 1)
    return np.where(half < 0, left, np.where(half > 0, right, 1.0))


def _covered(
    lower: np.ndarray, upper: np.ndarray, visible: np.ndarray, redness: np.ndarray, yaw: np.ndarray
) -> np.ndarray:
    """Covered share per chip. lower, upper: k x points x 4; visible: k x all points; redness: k x 2; yaw: k degrees"""
    # Changes of light are removed: a change of its intensity is a factor in Lab, a change of its colour a shift.
    points = np.concatenate([lower, upper], axis=1) - _GREY
    skin = np.median(upper - _GREY, axis=1)
    gain = np.median(skin[:, 0]) / np.maximum(skin[:, 0], 1)
    points *= gain[:, None, None]
    skin *= gain[:, None]
    colours = points[..., :3] - (skin - np.median(skin, axis=0))[:, None, :3]
    features = np.concatenate([colours * _LAB_WEIGHTS, points[..., 3:]], axis=-1)
    count = lower.shape[1]
    uncovered = _uncovered(features[:, :count], redness[:, 0])
    difference = np.linalg.norm(features - np.median(features[uncovered], axis=0), axis=-1)
    usual = np.median(difference[uncovered], axis=0)
    evidence = np.clip((difference - _SMALL - _LIKELY_NOISE * usual) / (_LARGE - _SMALL), 0, 1) * visible
    below = evidence[:, :count].sum(1) / visible[:, :count].sum(1)
    above = evidence[:, count:].sum(1) / visible[:, count:].sum(1)
    # Poses far from those in which the uncovered face is known are not judged.
    turned = np.abs(yaw[:, None] - yaw[uncovered]).min(1)
    known = np.clip(2 - turned / _KNOWN_TURN_DEG, 0, 1)
    return np.clip(known * np.maximum(below - above, 0) + _HIDDEN_LIPS * _hidden_lips(redness), 0, 1)


def _uncovered(lower: np.ndarray, redness: np.ndarray) -> np.ndarray:
    """Indices of the half of the chips (with visible lips) whose lower faces are most similar to each other."""
    red = np.quantile(redness, 0.9)
    chosen = np.flatnonzero(redness >= 0.6 * red) if red >= _RED_LIPS else np.arange(len(lower))
    if len(chosen) > _MAX_COMPARED:
        chosen = chosen[np.linspace(0, len(chosen) - 1, _MAX_COMPARED).round().astype(int)]
    faces = lower[chosen]
    apart = np.array([np.minimum(np.linalg.norm(faces - face, axis=-1), 40).mean(1) for face in faces])
    half = min(len(chosen), max(3, (len(chosen) + 1) // 2))
    mean_distance = np.sort(apart, axis=1)[:, :half].mean(1)
    return chosen[np.argsort(mean_distance, kind="stable")[:half]]


def _hidden_lips(redness: np.ndarray) -> np.ndarray:
    """0..1 per chip: 1 if the lips are no redder than the skin around them, although they are in other chips.

    redness: k x 2, see `_view`.
    """
    red = np.quantile(redness, 0.9, axis=0)
    if (red < _RED_LIPS).any():
        # In many faces lips are hardly redder than skin. Only objects are this much greener than skin.
        return np.clip((-3 - redness[:, 1]) / 3, 0, 1)
    hidden = (np.array([0.3, 0.5]) - redness / red) / 0.4
    return np.clip(hidden.min(axis=1), 0, 1)


# ---- Jitter

_RIGID = list(RIGID)
_THIRD_DIFFERENCE = np.array([1.0, -3.0, 3.0, -1.0])


def jitter(track: Track) -> float:
    """Noise of the landmarks, as a share of the (frontal) distance of the outer eye corners; median over the frames.

    Computed from third differences of the rigid points, which remove the smooth movement of a head almost completely,
    and scaled so that white noise gives its standard deviation. 0 without four consecutive detected frames.
    """
    if track.num_frames < 4:
        return 0.0
    windows = np.lib.stride_tricks.sliding_window_view(track.landmarks[:, _RIGID].astype(np.float64), 4, axis=0)
    known = np.isfinite(track.landmarks).all((1, 2)) & (track.confidence > 0)
    whole = np.lib.stride_tricks.sliding_window_view(known, 4).all(1)
    if not whole.any():
        return 0.0
    third = windows[whole] @ _THIRD_DIFFERENCE
    noise = np.sqrt((third**2).mean((1, 2)) / (_THIRD_DIFFERENCE**2).sum())
    scale = head_pose(track.landmarks[:-3][whole].astype(np.float64)).scale
    return float(np.median(noise / scale))


# ---- Bounds


@dataclass(frozen=True)
class QualityBounds:
    """Bounds on quality figures, in the units of this module's functions. None sets no bound.

    face_px, blur and brightness are measured on source pixels. The defaults reject false detections and faces without
    a visible mouth; footage of merely low quality passes.
    """

    min_face_px: float | int | None = 16.0  # faces in RoundTable's smallest footage, 128x96, have 18 pixels
    max_blur: float | int | None = 0.7  # sharp faces have .2 to .6; with a Gaussian blur of 3 % of their height .73
    min_brightness: float | int | None = 0.1
    max_brightness: float | int | None = 0.9
    max_yaw_deg: float | int | None = 60.0  # median over the clip; RoundTable's speakers turn by up to 60
    max_occlusion: float | int | None = 0.3  # in any frame
    max_jitter: float | int | None = 0.05
    max_bridged: float | int | None = 0.25  # share of the clip's frames
    min_visible: float | int | None = 0.05  # share of the picture outside the head box

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise TccpError(f"{field.name} is {value}: give a number of at least 0, or none")

    def reason(self, values: Mapping[str, float | int | None]) -> str | None:
        """The reason code of the first violated bound; None if there is none.

        values: any of face_px, blur, brightness, yaw_deg, occlusion, jitter, bridged and visible; None or NaN means not
        measured.
        Raises KeyError for other names.
        """
        checks = {
            "face_px": (("too_small", self.min_face_px, None),),
            "blur": (("too_blurred", None, self.max_blur),),
            "brightness": (("too_dark", self.min_brightness, None), ("too_bright", None, self.max_brightness)),
            "yaw_deg": (("too_turned", None, self.max_yaw_deg),),
            "occlusion": (("occluded", None, self.max_occlusion),),
            "jitter": (("jittery", None, self.max_jitter),),
            "bridged": (("bridged", None, self.max_bridged),),
            "visible": (("no_context", self.min_visible, None),),
        }
        if unknown := values.keys() - checks.keys():
            raise KeyError(f"no bound for {', '.join(sorted(unknown))}: choose from {', '.join(checks)}")
        for name, bounds in checks.items():
            value = values.get(name)
            if value is None:
                continue
            value = abs(value) if name == "yaw_deg" else value
            for code, low, high in bounds:
                if (low is not None and value < low) or (high is not None and value > high):
                    return code
        return None
