"""Samples where each person stands and whom the talker addresses at each time.

Lengths are in scene pixels, the floor plan is in metres, everything is per frame. The mask cannot reveal the listener's
side: the talker's position, body path and box are sampled before that side and independently of it. Only the talker's
torso turns towards the first listener, with added noise.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Float64, Int8

from tccp.config import FPS
from tccp.errors import TccpError
from tccp.roundtable.head import Pose
from tccp.roundtable.motion import drift, follow, glide
from tccp.roundtable.voice import Speech

ClipKind = Literal["still", "change", "move"]

BOX_UNITS = 4.0
"""Side of the head box in head units. It holds head, hair, neck and collar in every pose, with a margin."""
BOX_CENTRE_Y = 0.40
"""Centre of the head box below the eyes, in head units."""
_BOX_M = 0.36
_TALKER_DEPTH_M = 3.0  # near enough that a listener's size shows the bearing; from 5 m, 64 pixels hardly show it
_TURN_S = 0.5
_ATTEND_S = 0.35
_MOVE_S = 1.0
_TORSO_GAIN, _TORSO_NOISE_DEG = 0.35, 20.0
_NEAR_DEG, _WIDE_DEG = (20.0, 32.0), (45.0, 60.0)
MIN_BEARING_DEG, MAX_BEARING_DEG = _NEAR_DEG[0], _WIDE_DEG[1]


@dataclass(frozen=True)
class Camera:
    """Zooms about the scene's centre, then shifts."""

    zoom: Float64[np.ndarray, " f"]
    pan_px: Float64[np.ndarray, "f 2"]
    centre: Float64[np.ndarray, " 2"]

    def see(self, points: Float[np.ndarray, "f 2"]) -> Float64[np.ndarray, "f 2"]:
        return (points - self.centre) * self.zoom[:, None] + self.centre + self.pan_px


@dataclass(frozen=True)
class Place:
    """One person's position and pose. origin: of the head, before the camera. hands: left, right; 0 down, 1 raised."""

    origin: Float64[np.ndarray, "f 2"]
    unit_px: Float64[np.ndarray, " f"]
    depth_m: Float64[np.ndarray, " f"]
    pose: Pose
    torso_yaw_deg: Float64[np.ndarray, " f"]
    hands: Float64[np.ndarray, "f 2"]
    gaze_deg: Float64[np.ndarray, " f"]


@dataclass(frozen=True)
class Staging:
    """Positions and poses of all persons of a clip, and the camera.

    target_deg: bearing of the addressee; the talker's yaw follows it after lag_s. event_s: times of its changes.
    """

    kind: ClipKind
    camera: Camera
    box_side_px: int
    talker: Place
    others: tuple[Place, ...]
    addressee: Int8[np.ndarray, " f"]
    listener_side: Int8[np.ndarray, " f"]
    target_deg: Float64[np.ndarray, " f"]
    event_s: Float64[np.ndarray, " e"]
    lag_s: float


def make_camera(rng: np.random.Generator, num_frames: int, width: int, height: int) -> Camera:
    scale = height / 192
    return Camera(
        zoom=1 + np.clip(drift(rng, num_frames, 0.006, 0.2), -0.015, 0.015),
        pan_px=np.stack([drift(rng, num_frames, 1.6 * scale, 0.3), drift(rng, num_frames, 1.0 * scale, 0.3)], axis=-1),
        centre=np.array([width / 2, height / 2]),
    )


def make_staging(
    rng: np.random.Generator, speech: Speech, width: int, height: int, listener_deg: float | None = None
) -> Staging:
    """Samples a conversation for this speech, in a fixed order: first the talker, then the sides of the others.

    listener_deg: fixed bearing of the only other person, instead of the sampled one (`synthesise`).
    """
    num_frames = len(speech.opening)
    scale = min(height / 192, width / 256)
    camera = make_camera(rng, num_frames, width, height)
    side_px = round(rng.uniform(65, 79) * scale)
    unit = side_px / BOX_UNITS
    middle = np.array([rng.uniform(0.42, 0.58) * width, rng.uniform(0.30, 0.40) * height])
    sway = np.stack([drift(rng, num_frames, 1.2 * scale), drift(rng, num_frames, 0.6 * scale)], axis=-1)
    origin = middle + sway - (0.0, BOX_CENTRE_Y * unit)

    kind: ClipKind = ("still", "change", "move")[rng.choice(3, p=[0.5, 0.3, 0.2])]
    num_others = 2 if kind == "change" else int(rng.integers(1, 3))
    sides = np.array([-1, 1]) if rng.random() < 0.5 else np.array([1, -1])
    event_s = _event_times(rng, num_frames / FPS) if kind != "still" else np.zeros(0)
    lag_s = float(rng.uniform(0.2, 0.5))
    past_events = np.searchsorted(event_s, np.arange(num_frames) / FPS, side="right")
    addressee = (past_events % 2 if kind == "change" else np.zeros(num_frames)).astype(np.int8)

    layout = _Layout(middle, side_px, side_px / _BOX_M * _TALKER_DEPTH_M, width, height)
    others, bearings = [], []
    same_rng = deepcopy(rng)
    for k in range(num_others):
        moves = kind == "move" and k == 0
        place, bearing = _other(rng, layout, int(sides[k]), moves, addressee == k, event_s)
        others.append(place)
        bearings.append(bearing)
    leans_to_deg = bearings[0][0]
    if listener_deg is not None:
        if num_others > 1:
            raise TccpError(
                f"listener_deg needs a clip with one other person, and this one has {num_others}: take another seed "
                "(len(clip.others_box[0]) counts them)"
            )
        # The talker's body stays unchanged, so it still turns towards the sampled bearing.
        sides = np.sign([listener_deg]).astype(int)
        others[0], bearings[0] = _other(
            same_rng, layout, int(sides[0]), kind == "move", addressee == 0, event_s, listener_deg
        )
        kind, event_s = "still", np.zeros(0)

    target = np.stack(bearings)[addressee, np.arange(num_frames)]
    lower_px = np.stack([place.origin[:, 1] - origin[:, 1] for place in others])[addressee, np.arange(num_frames)]
    yaw = follow(target, lag_s, _TURN_S)
    eyes = follow(target, max(lag_s - 0.12, 0.04), 0.12) - yaw
    torso = np.clip(_TORSO_GAIN * leans_to_deg + rng.normal(0, _TORSO_NOISE_DEG), -45, 45)
    hands = np.zeros((num_frames, 2))
    if rng.random() < 0.6:
        beat = 0.32 + 0.22 * speech.stress + drift(rng, num_frames, 0.05)
        hands[:, int(rng.integers(2))] = np.clip(beat, 0, 0.7)
    pitch = np.rad2deg(np.arctan2(lower_px * _BOX_M / side_px, 1.0)) + 6.0 * speech.stress + drift(rng, num_frames, 1.2)
    talker = Place(
        origin=origin,
        unit_px=np.full(num_frames, unit),
        depth_m=np.full(num_frames, _TALKER_DEPTH_M),
        pose=_pose(yaw + drift(rng, num_frames, 1.6), pitch, drift(rng, num_frames, 2.0)),
        torso_yaw_deg=torso + drift(rng, num_frames, 1.5),
        hands=hands,
        gaze_deg=np.clip(eyes, -25, 25),
    )
    return Staging(
        kind=kind,
        camera=camera,
        box_side_px=side_px,
        talker=talker,
        others=tuple(others),
        addressee=addressee,
        listener_side=sides[addressee].astype(np.int8),
        target_deg=target,
        event_s=event_s,
        lag_s=lag_s,
    )


def _pose(yaw: Float64[np.ndarray, " f"], pitch: Float64[np.ndarray, " f"], roll: Float64[np.ndarray, " f"]) -> Pose:
    return Pose(yaw.astype(np.float32), pitch.astype(np.float32), roll.astype(np.float32))


def _event_times(rng: np.random.Generator, seconds: float) -> Float64[np.ndarray, " e"]:
    """Times at which the addressee changes or moves: at least one, about every three seconds, not close to the end."""
    first = rng.uniform(0.8, 2.0)
    times = [min(first, 0.45 * seconds)]
    while (following := times[-1] + rng.uniform(2.0, 4.0)) < seconds - 0.8:
        times.append(following)
    # Rounded to frames, so that ground truth and picture change in the same frame.
    return np.round(np.array(times) * FPS) / FPS


@dataclass(frozen=True)
class _Layout:
    """The talker's centre and size, and the camera, which determine the positions of the others."""

    talker: Float64[np.ndarray, " 2"]
    box_side_px: int
    focal_px: float
    width: int
    height: int


def _other(
    rng: np.random.Generator,
    layout: _Layout,
    side: int,
    moves: bool,
    is_addressed: Bool[np.ndarray, " f"],
    event_s: Float64[np.ndarray, " e"],
    bearing_deg: float | None = None,
) -> tuple[Place, Float64[np.ndarray, " f"]]:
    """Another person, nearer to the camera than the talker, and their bearing from the talker in degrees.

    bearing_deg: replaces the sampled bearing on `side`. Everything else is sampled as without it.
    """
    num_frames = len(is_addressed)
    unit = layout.box_side_px / BOX_UNITS
    angles = [rng.uniform(*_NEAR_DEG), rng.uniform(*_WIDE_DEG)]
    if rng.random() < 0.5:
        angles.reverse()
    if not moves:
        angles = [rng.uniform(_NEAR_DEG[0], _WIDE_DEG[1])] * 2
    bearing = np.full(num_frames, angles[0])
    for k, at_s in enumerate(event_s if moves else ()):
        bearing += glide(0.0, (angles[1] - angles[0]) * (-1) ** k, float(at_s), _MOVE_S, num_frames)
    bearing = bearing * side if bearing_deg is None else np.full(num_frames, float(bearing_deg))
    gap = rng.uniform(0.1, 1.2) * unit

    # Depth from bearing and position: solve tan(bearing) = (X - X_talker) / (Z_talker - Z), X = (x - centre) Z / focal.
    # The position depends on the size, and so on the depth, to keep the others beside the talker's head. Three
    # iterations are enough.
    grow = np.ones(num_frames)
    for _ in range(3):
        x = layout.talker[0] + side * (layout.box_side_px / 2 + 1.5 * unit * grow + gap)
        nearer_m = (
            (x - layout.talker[0])
            * _TALKER_DEPTH_M
            / (layout.focal_px * np.tan(np.deg2rad(bearing)) + x - layout.width / 2)
        )
        depth_m = _TALKER_DEPTH_M - nearer_m
        grow = _TALKER_DEPTH_M / depth_m
    horizon = 0.36 * layout.height
    lower = rng.uniform(0.2, 1.0) * unit
    y = horizon + (layout.talker[1] - BOX_CENTRE_Y * unit + lower - horizon) * grow
    sway = np.stack([drift(rng, num_frames, 0.06 * unit), drift(rng, num_frames, 0.04 * unit)], axis=-1)

    # The addressee looks at the talker; the other person looks outwards and to the camera.
    towards, elsewhere = bearing - 180 * side, side * rng.uniform(25, 70)
    attention = follow(is_addressed.astype(np.float64), 0.0, _ATTEND_S)
    yaw = elsewhere + attention * (towards - elsewhere) + drift(rng, num_frames, 3.0)
    hands = np.zeros((num_frames, 2))
    for at_s in event_s:
        begins = round(float(at_s) * FPS)
        if begins < num_frames and is_addressed[begins] and not is_addressed[max(begins - 1, 0)]:
            up = glide(0.0, 1.0, float(at_s), 0.3, num_frames) - glide(0.0, 1.0, float(at_s) + 0.8, 0.4, num_frames)
            hands[:, (side + 1) // 2] = np.maximum(hands[:, (side + 1) // 2], up)
    pose = _pose(yaw, drift(rng, num_frames, 2.0), drift(rng, num_frames, 2.0))
    # The body turns with the head, later and less. In a small picture bodies are visible where heads hardly are.
    torso_towards, torso_elsewhere = 0.9 * towards + rng.uniform(-10, 10), 0.5 * elsewhere
    torso = torso_elsewhere + follow(is_addressed.astype(np.float64), 0.08, 0.6) * (torso_towards - torso_elsewhere)
    place = Place(
        origin=np.stack([x, y], axis=-1) + sway,
        unit_px=unit * grow,
        depth_m=depth_m,
        pose=pose,
        torso_yaw_deg=torso,
        hands=hands,
        gaze_deg=np.zeros(num_frames),
    )
    return place, bearing
