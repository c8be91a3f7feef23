"""Quality measures respond to degradation of the footage, and the default bounds accept good footage."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from facetracks import film_track, moved, repainted, roundtable_track, track_of

from preprocessing.analysis.chips import chip_frames, read_chip
from preprocessing.analysis.quality import QualityBounds, blur, brightness, face_px, jitter, median_yaw_deg, occlusion
from preprocessing.reels import Track
from tccp import faces, roundtable
from tccp.errors import TccpError
from tccp.landmarks import head_pose
from tccp.media import read_frames

BOUNDS = QualityBounds()


@pytest.fixture(scope="module")
def backend(shared_weights: Path) -> Iterator[faces.FaceBackend]:
    detector = faces.open_backend("mediapipe", shared_weights)
    yield detector
    detector.close()


@pytest.fixture(scope="module")
def grid_man(backend: faces.FaceBackend, shared_clips: Path) -> Track:
    return film_track(shared_clips / "grid_bbaf2n.mpg", backend, 50)


@pytest.fixture(scope="module")
def bearded_man(backend: faces.FaceBackend, shared_clips: Path) -> Track:
    return film_track(shared_clips / "lowres_180x320.mp4", backend, 50)


@pytest.fixture(scope="module")
def roundtable_tracks() -> list[Track]:
    return [roundtable_track(roundtable.synthesise(1000 + s, 1.6, person_seed=s)) for s in range(5)]


def test_blur_and_brightness_respond_to_picture_changes() -> None:
    rng = np.random.default_rng(0)
    sharp = cv2.GaussianBlur(rng.integers(0, 256, (64, 64, 3), np.uint8), (0, 0), 0.7)
    values = [blur(sharp), *(blur(cv2.GaussianBlur(sharp, (0, 0), sigma)) for sigma in (1, 2, 4))]
    assert values == sorted(values) and values[-1] > values[0] + 0.3
    one_way = cv2.GaussianBlur(sharp, (1, 31), 0, sigmaY=4)  # motion blur counts as blur
    assert blur(one_way) > values[1]
    assert blur(np.zeros((8, 8, 3), np.uint8)) == 1
    assert brightness(np.full((4, 4, 3), 51, np.uint8)) == pytest.approx(0.2)


# ---- Occlusion


def _face(points: np.ndarray) -> tuple[np.ndarray, float]:
    """A point just below the mouth's centre, and the height from the nose bridge to the chin."""
    height = float(np.linalg.norm(points[8] - points[27]))
    return points[[48, 54, 57]].mean(0) + np.array([0, 0.06 * height]), height


def microphone(picture: np.ndarray, points: np.ndarray) -> np.ndarray:
    (x, y), height = _face(points)
    cv2.circle(picture, (round(x), round(y)), round(0.2 * height), (38, 36, 36), -1)
    cv2.circle(picture, (round(x - 0.05 * height), round(y - 0.05 * height)), round(0.05 * height), (90, 90, 90), -1)
    return picture


def cup(picture: np.ndarray, points: np.ndarray) -> np.ndarray:
    (x, y), height = _face(points)
    corner, other = (x - 0.2 * height, y - 0.15 * height), (x + 0.2 * height, y + 0.3 * height)
    cv2.rectangle(picture, tuple(map(round, corner)), tuple(map(round, other)), (40, 90, 160), -1)
    return picture


def hand(picture: np.ndarray, points: np.ndarray) -> np.ndarray:
    """A hand, slightly darker than the cheek, with dark gaps between the fingers."""
    (x, y), height = _face(points)
    column, row = ((points[41] + points[31]) / 2).round().astype(int)
    skin = picture[row, column].astype(float) * 0.85
    cv2.ellipse(picture, (round(x), round(y)), (round(0.34 * height), round(0.24 * height)), 20, 0, 360, skin, -1)
    for finger in (-0.12, 0.0, 0.12):
        ends = [(round(x + side * 0.3 * height), round(y + (finger + side * 0.1) * height)) for side in (-1, 1)]
        cv2.line(picture, ends[0], ends[1], tuple(skin * 0.7), max(1, round(0.03 * height)))
    return picture


COVERS = [microphone, cup, hand]


@pytest.mark.parametrize("cover", COVERS)
def test_temporary_mouth_occlusion_is_located_in_time(
    roundtable_tracks: list[Track], cover: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> None:
    found, false = [], []
    for track in roundtable_tracks:
        score = occlusion(repainted(track, range(10, 20), cover))
        assert score.shape == (track.num_frames,)
        found += [score[10], score[15]]
        false += [score[0], score[5], score[25], score[30], score[35]]
    assert np.mean(np.array(found) > BOUNDS.max_occlusion) >= 0.8
    assert np.mean(np.array(false) > BOUNDS.max_occlusion) <= 0.03


@pytest.mark.parametrize("cover", COVERS)
def test_mouth_occlusion_is_found_on_real_faces(
    grid_man: Track, bearded_man: Track, cover: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> None:
    for track in (grid_man, bearded_man):
        score = occlusion(repainted(track, range(20, 35), cover))
        assert (score[20:31] > 0.15).all() and score[[20, 25, 30]].mean() > 0.25
        assert score[:16].max() < 0.2 and score[35:].max() < 0.2


def test_speech_beards_turns_and_lighting_are_not_occlusion(
    grid_man: Track, bearded_man: Track, roundtable_tracks: list[Track]
) -> None:
    for track in (grid_man, bearded_man, *roundtable_tracks):
        assert occlusion(track).max() <= BOUNDS.max_occlusion

    def darker(picture: np.ndarray, points: np.ndarray) -> np.ndarray:
        return (picture * 0.55).astype(np.uint8)

    for track in (grid_man, bearded_man):
        assert occlusion(repainted(track, range(25, 50), darker)).max() <= BOUNDS.max_occlusion


def test_occlusion_is_interpolated_between_chips_and_held_after_the_last(grid_man: Track) -> None:
    score = occlusion(moved(repainted(grid_man, range(20, 30), microphone), 300))
    np.testing.assert_allclose(np.diff(score[15:21]), score[20] / 5, atol=1e-5)
    np.testing.assert_array_equal(score[46:], score[45])


def test_occlusion_is_zero_without_chips_or_landmarks(grid_man: Track) -> None:
    blind = dataclasses.replace(grid_man, landmarks=np.full_like(grid_man.landmarks, np.nan))
    for track in (dataclasses.replace(grid_man, chips={}), blind):
        assert not occlusion(track).any() and occlusion(track).dtype == np.float32
    assert chip_frames(blind) == []


def test_hand_and_microphone_before_a_singers_mouth_are_found(backend: faces.FaceBackend, shared_clips: Path) -> None:
    """A hand covers the mouth around frame 140 and a microphone around 182; nothing does from 90 to 110."""
    frames = list(read_frames(shared_clips / "short_hamilton_clip.mp4", start_frame=90, num_frames=108))
    points: list[np.ndarray | None] = []
    for frame in frames:
        found = backend.detect(frame)
        points.append(found[0].landmarks_px if found else None)
    seen = [i for i, p in enumerate(points) if p is not None]
    assert len(seen) > 95
    filled = np.stack([points[min(seen, key=lambda j: abs(j - i))] for i in range(len(points))])  # type: ignore[misc]
    score = occlusion(track_of(filled, frames.__getitem__, 90))
    for frame in (140, 182):
        assert score[frame - 93 : frame - 86].max() > BOUNDS.max_occlusion
    assert score[:21].max() < 0.2


def test_chips_of_any_size_are_read_with_scaled_landmarks(grid_man: Track) -> None:
    large = {frame: _doubled(data) for frame, data in grid_man.chips.items()}
    doubled = dataclasses.replace(grid_man, chips=large)
    small, big, shrunk = read_chip(grid_man, 10), read_chip(doubled, 10, None), read_chip(doubled, 10)
    assert big.picture.shape == (224, 224, 3) and shrunk.picture.shape == (112, 112, 3)
    np.testing.assert_allclose(big.points + 0.5, 2 * (small.points + 0.5), atol=1e-3)
    np.testing.assert_allclose(shrunk.points, small.points, atol=1e-3)
    assert np.abs(shrunk.picture.astype(int) - small.picture).mean() < 3


def _doubled(data: bytes) -> bytes:
    picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    assert picture is not None
    return cv2.imencode(".jpg", cv2.resize(picture, None, fx=2, fy=2))[1].tobytes()


# ---- Jitter


def a_still_track(num_frames: int = 80, size: float = 1.0) -> Track:
    points = roundtable.synthesise(3, 0.04).landmarks_px.astype(np.float64) * size
    return track_of(np.tile(points, (num_frames, 1, 1)), lambda i: np.zeros((64, 64, 3), np.uint8))


def shaken(track: Track, share: float, seed: int = 0) -> Track:
    """The track with white landmark noise; its standard deviation is `share` times the eye distance."""
    scale = head_pose(track.landmarks.astype(np.float64)).scale[:, None, None]
    noise = np.random.default_rng(seed).normal(0, share, track.landmarks.shape) * scale
    return dataclasses.replace(track, landmarks=(track.landmarks + noise).astype(np.float32))


@pytest.mark.parametrize("size", [0.5, 1.0, 4.0])
def test_jitter_equals_the_landmark_noise_at_any_face_size(size: float) -> None:
    track = a_still_track(size=size)
    assert jitter(track) < 1e-4
    for share in (0.01, 0.03, 0.1):
        assert jitter(shaken(track, share)) == pytest.approx(share, rel=0.12)


def test_head_motion_is_not_jitter() -> None:
    track = a_still_track()
    scale = float(head_pose(track.landmarks.astype(np.float64)).scale[0])
    nod = np.sin(np.arange(80) / 25 * 2 * np.pi * 1.0) * scale  # 1 Hz, with an amplitude of one eye distance
    nodding = dataclasses.replace(track, landmarks=track.landmarks + nod[:, None, None].astype(np.float32))
    assert BOUNDS.max_jitter is not None and jitter(nodding) < BOUNDS.max_jitter / 4


def test_bridged_frames_do_not_count_towards_jitter() -> None:
    track = shaken(a_still_track(), 0.02)
    landmarks, confidence = track.landmarks.copy(), track.confidence.copy()
    landmarks[15:65] += np.random.default_rng(1).normal(0, 50, (50, 1, 1)).astype(np.float32)
    assert jitter(dataclasses.replace(track, landmarks=landmarks)) > 0.03
    confidence[15:65] = 0
    assert jitter(dataclasses.replace(track, landmarks=landmarks, confidence=confidence)) == pytest.approx(
        0.02, rel=0.2
    )
    assert jitter(dataclasses.replace(track, confidence=np.zeros_like(confidence))) == 0


# ---- Bounds


@pytest.mark.parametrize(
    ("name", "value", "code"),
    [
        ("face_px", 8, "too_small"),
        ("blur", 0.9, "too_blurred"),
        ("brightness", 0.03, "too_dark"),
        ("brightness", 0.97, "too_bright"),
        ("yaw_deg", 70, "too_turned"),
        ("yaw_deg", -70, "too_turned"),
        ("occlusion", 0.8, "occluded"),
        ("jitter", 0.2, "jittery"),
    ],
)
def test_every_bound_has_a_reason_code_and_can_be_disabled(name: str, value: float, code: str) -> None:
    good = {"face_px": 90.0, "blur": 0.4, "brightness": 0.5, "yaw_deg": -20.0, "occlusion": 0.0, "jitter": 0.01}
    assert BOUNDS.reason(good) is None and BOUNDS.reason({}) is None
    assert BOUNDS.reason(good | {name: value}) == code
    assert BOUNDS.reason({name: None}) is None and BOUNDS.reason({name: math.nan}) is None
    free = dataclasses.replace(BOUNDS, **{field.name: None for field in dataclasses.fields(BOUNDS)})
    assert free.reason(good | {name: value}) is None


def test_invalid_and_unknown_bounds_are_refused() -> None:
    with pytest.raises(TccpError, match="max_blur is -1: give a number of at least 0, or none"):
        QualityBounds(max_blur=-1)
    with pytest.raises(KeyError, match="no bound for sharpness"):
        BOUNDS.reason({"sharpness": 1.0})


def _values(track: Track, picture: np.ndarray) -> dict[str, float]:
    low, high = track.landmarks[0].min(0).astype(int), track.landmarks[0].max(0).astype(int)
    face = np.ascontiguousarray(picture[max(low[1], 0) : high[1], max(low[0], 0) : high[0]])
    return {
        "face_px": face_px(track.landmarks),
        "blur": blur(face),
        "brightness": brightness(face),
        "yaw_deg": median_yaw_deg(track.landmarks),
        "occlusion": float(occlusion(track).max()),
        "jitter": jitter(track),
    }


@pytest.mark.parametrize("size", [(256, 192), (128, 96)])
def test_roundtable_is_within_the_bounds(size: tuple[int, int]) -> None:
    for seed in range(3):
        clip = roundtable.synthesise(2000 + seed, 0.4, *size)
        assert BOUNDS.reason(_values(roundtable_track(clip), clip.render(0))) is None


@pytest.mark.parametrize("name", ["grid_lwbsza.mpg", "lowres_180x320.mp4", "fps_50.mp4", "vfr.mp4", "rotate_tag.mp4"])
def test_good_film_is_within_the_bounds_and_degraded_film_is_not(
    name: str, backend: faces.FaceBackend, shared_clips: Path
) -> None:
    film = shared_clips / name
    track = film_track(film, backend, 12)
    picture = next(read_frames(film, num_frames=1))
    assert BOUNDS.reason(_values(track, picture)) is None
    soft = cv2.GaussianBlur(picture, (0, 0), max(5.0, 0.05 * face_px(track.landmarks)))
    assert BOUNDS.reason(_values(track, np.asarray(soft, np.uint8))) == "too_blurred"
    assert BOUNDS.reason(_values(track, (picture * 0.1).astype(np.uint8))) == "too_dark"
    assert BOUNDS.reason(_values(shaken(track, 0.1), picture)) == "jittery"
