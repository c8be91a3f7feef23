"""Who stands where, and whom the talker addresses when. Lengths in scene pixels, plan in metres, all per frame.

No leak by construction: the talker's place, body path and box are drawn before, and without, the listener's side; his
torso only leans to the first listener, under noise.
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
"""Side of the head box in head units: head with hair, neck and collar at every turn, with a margin."""
BOX_CENTRE_Y = 0.40
"""Centre of the head box below the eyes, in head units."""
_BOX_M = 0.36
_TALKER_DEPTH_M = 3.0  # near enough that a listener's size tells his bearing: from 5 m, 64 pixels hardly show it
_TURN_S = 0.5
_ATTEND_S = 0.35
_MOVE_S = 1.0
_TORSO_GAIN, _TORSO_NOISE_DEG = 0.35, 20.0
_NEAR_DEG, _WIDE_DEG = (20.0, 32.0), (45.0, 60.0)
MIN_BEARING_DEG, MAX_BEARING_DEG = _NEAR_DEG[0], _WIDE_DEG[1]


@dataclass(frozen=True)
class Camera:
    """Zoom about the scene's centre, then a shift."""

    zoom: Float64[np.ndarray, " f"]
    pan_px: Float64[np.ndarray, "f 2"]
    centre: Float64[np.ndarray, " 2"]

    def see(self, points: Float[np.ndarray, "f 2"]) -> Float64[np.ndarray, "f 2"]:
        return (points - self.centre) * self.zoom[:, None] + self.centre + self.pan_px


@dataclass(frozen=True)
class Place:
    """One person's place and bearing. origin: the head's, before the camera. hands: raised left, right, 0..1."""

    origin: Float64[np.ndarray, "f 2"]
    unit_px: Float64[np.ndarray, " f"]
    depth_m: Float64[np.ndarray, " f"]
    pose: Pose
    torso_yaw_deg: Float64[np.ndarray, " f"]
    hands: Float64[np.ndarray, "f 2"]
    gaze_deg: Float64[np.ndarray, " f"]


@dataclass(frozen=True)
class Staging:
    """target_deg: bearing of the addressee; the talker's yaw follows it by lag_s. event_s: when it jumps or moves."""

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


def stage(
    rng: np.random.Generator, speech: Speech, width: int, height: int, listener_deg: float | None = None
) -> Staging:
    """A conversation for this speech. Its draws follow one another in a fixed order: talker first, sides after.

    listener_deg: bearing at which the only other person stands instead, throughout (`synthesise`).
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

    plan = _Plan(middle, side_px, side_px / _BOX_M * _TALKER_DEPTH_M, width, height)
    others, bearings = [], []
    same_draws = deepcopy(rng)
    for k in range(num_others):
        moves = kind == "move" and k == 0
        place, bearing = _other(rng, plan, int(sides[k]), moves, addressee == k, event_s)
        others.append(place)
        bearings.append(bearing)
    leans_to_deg = bearings[0][0]
    if listener_deg is not None:
        if num_others > 1:
            raise TccpError(
                f"listener_deg moves the only other person of a clip, and this one has {num_others}: take another seed "
                "(len(clip.others_box[0]) counts them)"
            )
        # The talker's body stays as it was, so it still leans to where the listener stood.
        sides = np.sign([listener_deg]).astype(int)
        others[0], bearings[0] = _other(
            same_draws, plan, int(sides[0]), kind == "move", addressee == 0, event_s, listener_deg
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
    """When the addressee changes or moves: at least once, about every three seconds, with time left for the head."""
    first = rng.uniform(0.8, 2.0)
    times = [min(first, 0.45 * seconds)]
    while (following := times[-1] + rng.uniform(2.0, 4.0)) < seconds - 0.8:
        times.append(following)
    # On frames, so that truth and picture agree on the frame of the change.
    return np.round(np.array(times) * FPS) / FPS


@dataclass(frozen=True)
class _Plan:
    """What fixes where others can stand: the talker's middle and size, and how scene pixels map to metres."""

    talker: Float64[np.ndarray, " 2"]
    box_side_px: int
    focal_px: float
    width: int
    height: int


def _other(
    rng: np.random.Generator,
    plan: _Plan,
    side: int,
    moves: bool,
    is_addressed: Bool[np.ndarray, " f"],
    event_s: Float64[np.ndarray, " e"],
    bearing_deg: float | None = None,
) -> tuple[Place, Float64[np.ndarray, " f"]]:
    """One of the others, nearer to the camera than the talker, and his bearing from the talker in degrees.

    bearing_deg: instead of the bearing that is drawn, on `side`; everything else is drawn as without it.
    """
    num_frames = len(is_addressed)
    unit = plan.box_side_px / BOX_UNITS
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

    # Depth from bearing and place: solve tan(bearing) = (X - X_talker) / (Z_talker - Z), X = (x - centre) Z / focal.
    # Place depends on size, hence on depth, so that no other stands before the talker's head; three rounds settle it.
    grow = np.ones(num_frames)
    for _ in range(3):
        x = plan.talker[0] + side * (plan.box_side_px / 2 + 1.5 * unit * grow + gap)
        nearer_m = (
            (x - plan.talker[0]) * _TALKER_DEPTH_M / (plan.focal_px * np.tan(np.deg2rad(bearing)) + x - plan.width / 2)
        )
        depth_m = _TALKER_DEPTH_M - nearer_m
        grow = _TALKER_DEPTH_M / depth_m
    horizon = 0.36 * plan.height
    lower = rng.uniform(0.2, 1.0) * unit
    y = horizon + (plan.talker[1] - BOX_CENTRE_Y * unit + lower - horizon) * grow
    sway = np.stack([drift(rng, num_frames, 0.06 * unit), drift(rng, num_frames, 0.04 * unit)], axis=-1)

    # The addressee looks at the talker, the other one outwards and to the camera.
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
    # The body turns with the head, later and less: a small picture shows bodies where it hardly shows heads.
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
