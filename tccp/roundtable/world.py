"""Synthesises RoundTable clips: a room, a talker, one or two other persons, and their ground truth.

Every clip is a pure function of its seed, bit for bit. Coordinates are scene pixels, continuous: pixel i covers i..i+1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property

import numpy as np
from jaxtyping import Float, Float32, Float64, Int8, UInt8

from tccp.config import FPS
from tccp.errors import TccpError
from tccp.roundtable.body import NECK_BASE_Y, Outfit, paint_body, shoulder_ends
from tccp.roundtable.canvas import Canvas
from tccp.roundtable.face_painting import HeadView
from tccp.roundtable.head import Expression, Pose, landmarks_3d, rotation, turned
from tccp.roundtable.motion import blinks
from tccp.roundtable.people import Person, make_person, shade
from tccp.roundtable.portrait import HeadModel, paint_head
from tccp.roundtable.room import Room, camera_view, make_room, tint
from tccp.roundtable.staging import (
    BOX_CENTRE_Y,
    BOX_UNITS,
    MAX_BEARING_DEG,
    MIN_BEARING_DEG,
    Camera,
    ClipKind,
    Place,
    make_camera,
    make_staging,
)
from tccp.roundtable.voice import REST_WIDTH, speak

MIN_WIDTH, MIN_HEIGHT = 128, 96
IDENTITY_PX = 128
_IDENTITY_STREAM = 4


@dataclass(frozen=True)
class Truth:
    """The ground truth of a clip, with one row per frame at 25 fps.

    landmarks_px: the talker's 68 points (iBUG order). head_box: the talker's head box and mask, a square of constant
    size with integer corners (x0 y0 x1 y1). yaw_deg: positive to the picture's right; pitch down, roll clockwise.
    mouth_opening (0 closed), mouth_width (0 rounded), stress, brow, blink (1 closed): 0..1. kind: at event_s the
    addressee stays (`still`), another person becomes the addressee (`change`), or the addressee moves (`move`).
    target_deg: bearing of the addressee; yaw_deg follows it after lag_s. addressee: index into others_box.
    listener_side: -1 left, 1 right of the talker. torso_yaw_deg, shoulders_px (left, right in the picture): the
    talker's body.
    """

    seed: int
    person_seed: int
    width: int
    height: int
    kind: ClipKind
    lag_s: float
    landmarks_px: Float32[np.ndarray, "f 68 2"]
    head_box: Float32[np.ndarray, "f 4"]
    yaw_deg: Float32[np.ndarray, " f"]
    pitch_deg: Float32[np.ndarray, " f"]
    roll_deg: Float32[np.ndarray, " f"]
    mouth_opening: Float32[np.ndarray, " f"]
    mouth_width: Float32[np.ndarray, " f"]
    stress: Float32[np.ndarray, " f"]
    brow: Float32[np.ndarray, " f"]
    blink: Float32[np.ndarray, " f"]
    addressee: Int8[np.ndarray, " f"]
    listener_side: Int8[np.ndarray, " f"]
    target_deg: Float32[np.ndarray, " f"]
    event_s: Float32[np.ndarray, " e"]
    others_box: Float32[np.ndarray, "f others 4"]
    torso_yaw_deg: Float32[np.ndarray, " f"]
    shoulders_px: Float32[np.ndarray, "f 2 2"]

    @property
    def num_frames(self) -> int:
        return len(self.yaw_deg)

    @property
    def person_id(self) -> str:
        return make_person(self.person_seed).person_id

    def between(self, start: int, stop: int) -> Truth:
        """The ground truth of frames `start` to `stop` as a separate clip. Events before it get negative times.

        Raises TccpError if the clip does not have these frames.
        """
        if not 0 <= start < stop <= self.num_frames:
            raise TccpError(f"frames {start} to {stop} are not in this clip of {self.num_frames} frames")
        values = {field.name: getattr(self, field.name) for field in fields(Truth)}
        events = values.pop("event_s") - np.float32(start / FPS)
        part = {name: value[start:stop] if isinstance(value, np.ndarray) else value for name, value in values.items()}
        return Truth(**part, event_s=events)  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Actor:
    """A person in a scene, with the position in the camera and the turned and projected head of every frame."""

    model: HeadModel
    outfit: Outfit
    place: Place
    expression: Expression
    origin: Float64[np.ndarray, "f 2"]
    unit_px: Float64[np.ndarray, " f"]
    rotation: Float64[np.ndarray, "f 3 3"]
    landmarks: Float64[np.ndarray, "f 68 3"]

    def paint(self, canvas: Canvas, frame: int) -> None:
        origin, unit = self.origin[frame], float(self.unit_px[frame])
        neck_base = origin + np.array([0.0, NECK_BASE_Y * unit])
        left, right = self.place.hands[frame]
        person, torso = self.model.person, float(self.place.torso_yaw_deg[frame])
        paint_body(canvas, person, self.outfit, neck_base, unit, torso, (float(left), float(right)))
        gaze = float(self.place.gaze_deg[frame])
        view = HeadView(self.landmarks[frame], self.rotation[frame], origin, unit, gaze)
        paint_head(canvas, self.model, view, neck_base)


@dataclass(frozen=True)
class _Scene:
    room: Room
    camera: Camera
    talker: _Actor
    others: tuple[_Actor, ...]

    def paint(self, width: int, height: int, frame: int) -> UInt8[np.ndarray, "h w 3"]:
        zoom, pan = float(self.camera.zoom[frame]), self.camera.pan_px[frame]
        canvas = Canvas(camera_view(self.room, width, height, zoom, pan))
        self.talker.paint(canvas, frame)
        _paint_table(canvas, self.room, width, height, zoom, pan)
        for other in sorted(self.others, key=lambda actor: -actor.place.depth_m[frame]):
            other.paint(canvas, frame)
        return canvas.picture()


@dataclass(frozen=True)
class RoundTableClip(Truth):
    """A clip: its ground truth, its sound, and its pictures, which `render` paints on request.

    audio: mono 16 kHz, -1..1, 640 samples per frame.
    """

    audio: Float32[np.ndarray, " samples"]
    scene: _Scene

    def render(self, frame: int) -> UInt8[np.ndarray, "h w 3"]:
        """Paints the scene at frame / 25 s. Raises TccpError if the clip does not have this frame."""
        if not 0 <= frame < self.num_frames:
            raise TccpError(f"frame {frame} is not in this clip: it has frames 0 to {self.num_frames - 1}")
        return self.scene.paint(self.width, self.height, frame)

    @cached_property
    def identity(self) -> UInt8[np.ndarray, "s s 3"]:
        """The talker's head box in another room, clothes and pose, 128 px."""
        return identity_picture(self.scene.talker.model.person, np.random.default_rng([self.seed, _IDENTITY_STREAM]))

    def frames(self) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
        """All frames in order, one at a time."""
        for frame in range(self.num_frames):
            yield self.render(frame)

    def with_head(
        self,
        yaw_deg: Float32[np.ndarray, " f"] | None = None,
        pitch_deg: Float32[np.ndarray, " f"] | None = None,
        mouth_opening: Float32[np.ndarray, " f"] | None = None,
        mouth_width: Float32[np.ndarray, " f"] | None = None,
    ) -> RoundTableClip:
        """The same clip with another head motion. Pixels outside the head box stay unchanged, bit for bit."""
        talker = self.scene.talker
        expression, pose = talker.expression, talker.place.pose
        if mouth_opening is not None:
            expression = replace(expression, opening=mouth_opening)
        if mouth_width is not None:
            expression = replace(expression, width=mouth_width)
        if yaw_deg is not None:
            pose = replace(pose, yaw_deg=yaw_deg)
        if pitch_deg is not None:
            pose = replace(pose, pitch_deg=pitch_deg)
        place = replace(talker.place, pose=pose)
        changed = _actor(talker.model.person, talker.outfit, place, expression, self.scene.camera)
        return replace(
            self,
            landmarks_px=changed.landmarks[..., :2].astype(np.float32),
            yaw_deg=pose.yaw_deg,
            pitch_deg=pose.pitch_deg,
            mouth_opening=expression.opening,
            mouth_width=expression.width,
            scene=replace(self.scene, talker=changed),
        )


def synthesise(
    seed: int,
    seconds: float | int,
    width: int = 256,
    height: int = 192,
    person_seed: int | None = None,
    listener_deg: float | int | None = None,
) -> RoundTableClip:
    """The clip of this seed. Clips with equal `person_seed` have the same talker, with face and voice.

    width, height: even, at least 128 x 96. The side of the head box is about 3/8 of the height.
    listener_deg: makes a counterfactual clip. The listener, the only other person of the clip (`others_box[0]` has one
    row), stays at this bearing, 20 to 60 degrees to the left (negative) or right (positive). The talker's head and eyes
    turn there. Everything else equals the clip without listener_deg, bit for bit: people, clothes, the talker's body,
    head box, camera, room and sound.
    Raises TccpError if values are out of range, and for a listener_deg if there are two other persons.
    """
    num_frames = round(seconds * FPS)
    if num_frames < 1:
        raise TccpError(f"seconds is {seconds}: give at least one frame, {1 / FPS} s")
    if width < MIN_WIDTH or height < MIN_HEIGHT or width % 2 or height % 2:
        raise TccpError(f"scene of {width}x{height}: give an even width and height, at least {MIN_WIDTH}x{MIN_HEIGHT}")
    if seed < 0 or (person_seed is not None and person_seed < 0):
        raise TccpError(f"seed {seed}, person seed {person_seed}: give seeds of at least 0")
    if listener_deg is not None and not MIN_BEARING_DEG <= abs(listener_deg) <= MAX_BEARING_DEG:
        raise TccpError(
            f"listener_deg is {listener_deg}: give {MIN_BEARING_DEG:g} to {MAX_BEARING_DEG:g} degrees to "
            "the left (negative) or right (positive)"
        )
    # Separate random streams, so that a longer clip or another person changes nothing else.
    person_rng, sound_rng, scene_rng, motion_rng = (np.random.default_rng([seed, stream]) for stream in range(4))
    person = make_person(int(person_rng.integers(2**31)) if person_seed is None else person_seed)
    speech = speak(sound_rng, person.voice, num_frames)
    room = make_room(scene_rng, width, height)
    staging = make_staging(motion_rng, speech, width, height, None if listener_deg is None else float(listener_deg))
    brow = np.clip(speech.stress, 0, 1)
    expression = Expression(speech.opening, speech.width, brow, blinks(motion_rng, num_frames).astype(np.float32))
    talker = _actor(person, _outfit(scene_rng), staging.talker, expression, staging.camera)
    others = []
    for place in staging.others:
        other = make_person(int(person_rng.integers(2**31)))
        silent = _silent(num_frames, blinks(motion_rng, num_frames).astype(np.float32))
        others.append(_actor(other, _outfit(scene_rng), place, silent, staging.camera))
    pose = staging.talker.pose
    return RoundTableClip(
        seed=seed,
        person_seed=person.seed,
        width=width,
        height=height,
        kind=staging.kind,
        lag_s=staging.lag_s,
        landmarks_px=talker.landmarks[..., :2].astype(np.float32),
        head_box=_box(talker, staging.box_side_px),
        yaw_deg=pose.yaw_deg,
        pitch_deg=pose.pitch_deg,
        roll_deg=pose.roll_deg,
        mouth_opening=speech.opening,
        mouth_width=speech.width,
        stress=speech.stress,
        brow=brow,
        blink=expression.blink,
        addressee=staging.addressee,
        listener_side=staging.listener_side,
        target_deg=staging.target_deg.astype(np.float32),
        event_s=staging.event_s.astype(np.float32),
        others_box=np.stack([_box(actor) for actor in others], axis=1),
        torso_yaw_deg=staging.talker.torso_yaw_deg.astype(np.float32),
        shoulders_px=_shoulders(talker),
        audio=speech.audio,
        scene=_Scene(room, staging.camera, talker, tuple(others)),
    )


def identity_picture(
    person: Person, rng: np.random.Generator, size_px: int = IDENTITY_PX
) -> UInt8[np.ndarray, "s s 3"]:
    """Paints the person's head box with closed mouth, nearly from the front, in a random room and random clothes."""
    width, height = 2 * size_px, 2 * size_px
    room = replace(make_room(rng, width, height), table_y=None)
    unit = size_px / BOX_UNITS
    corner = np.array([size_px // 2, size_px // 4])

    def one(value: float) -> Float32[np.ndarray, " 1"]:
        return np.array([value], np.float32)

    place = Place(
        origin=(corner + size_px / 2 - (0.0, BOX_CENTRE_Y * unit))[None],
        unit_px=np.array([unit]),
        depth_m=np.ones(1),
        pose=Pose(one(rng.uniform(-15, 15)), one(rng.uniform(-4, 4)), one(rng.uniform(-3, 3))),
        torso_yaw_deg=np.array([rng.uniform(-20, 20)]),
        hands=np.zeros((1, 2)),
        gaze_deg=np.zeros(1),
    )
    still = replace(make_camera(rng, 1, width, height), zoom=np.ones(1), pan_px=np.zeros((1, 2)))
    actor = _actor(person, _outfit(rng), place, _silent(1, one(0.0)), still)
    x, y = corner
    return _Scene(room, still, actor, ()).paint(width, height, 0)[y : y + size_px, x : x + size_px].copy()


def _silent(num_frames: int, blink: Float32[np.ndarray, " f"]) -> Expression:
    zero = np.zeros(num_frames, np.float32)
    return Expression(zero, np.full(num_frames, REST_WIDTH, np.float32), zero, blink)


def _actor(person: Person, outfit: Outfit, place: Place, expression: Expression, camera: Camera) -> _Actor:
    matrices = rotation(place.pose)
    points = turned(landmarks_3d(person, expression), matrices)
    origin, unit = camera.see(place.origin), place.unit_px * camera.zoom
    flat = origin[:, None] + unit[:, None, None] * points[..., :2]
    landmarks = np.concatenate([flat, points[..., 2:]], axis=-1)
    return _Actor(HeadModel(person), outfit, place, expression, origin, unit, matrices, landmarks)


def _box(actor: _Actor, side_px: int | None = None) -> Float32[np.ndarray, "f 4"]:
    """The head box around a person's position. It does not depend on yaw or mouth."""
    side = actor.unit_px[:, None] * BOX_UNITS if side_px is None else np.full((len(actor.origin), 1), float(side_px))
    centre = actor.origin + actor.unit_px[:, None] * (0.0, BOX_CENTRE_Y)
    corner = np.rint(centre - side / 2)
    return np.concatenate([corner, corner + np.rint(side)], axis=1).astype(np.float32)


def _shoulders(actor: _Actor) -> Float32[np.ndarray, "f 2 2"]:
    ends = np.stack([shoulder_ends(actor.outfit, float(yaw)) for yaw in actor.place.torso_yaw_deg])
    neck_base = actor.origin + actor.unit_px[:, None] * (0.0, NECK_BASE_Y)
    return (neck_base[:, None] + actor.unit_px[:, None, None] * ends).astype(np.float32)


def _outfit(rng: np.random.Generator) -> Outfit:
    cloth = tint(rng, (0.2, 0.75), (0.25, 0.85))
    cut = ("crew", "shirt", "jacket")[rng.integers(3)]
    collar = (235, 235, 238) if cut == "jacket" else shade(cloth, rng.choice([0.75, 1.25]))
    return Outfit(cloth, collar, cut, rng.uniform(1.8, 2.15))  # type: ignore[arg-type]


def _paint_table(
    canvas: Canvas, room: Room, width: int, height: int, zoom: float, pan: Float[np.ndarray, " 2"]
) -> None:
    if room.table_y is None:
        return
    centre = np.array([width / 2, height / 2])
    angles = np.linspace(np.pi, 2 * np.pi, 24)
    top = np.array([width / 2, room.table_y * height]) + np.stack(
        [0.62 * width * np.cos(angles), 0.06 * height * (1 + np.sin(angles))], axis=-1
    )
    down = np.array([(1.12 * width, 1.3 * height), (-0.12 * width, 1.3 * height)])
    for lift, factor in ((0.0, 1.12), (0.025 * height, 1.0)):
        edge = np.concatenate([top + np.array([0, lift]), down])
        canvas.fill((edge - centre) * zoom + centre + pan, shade(room.table, factor))
