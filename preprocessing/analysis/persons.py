"""Who is who: the tracks of one source that show the same human, those of a person who is wanted, and switches.

With SFace's weights faces are compared by its embeddings. Without, by look alone, and then only what looks nearly the
same counts as one person: two humans are practically never joined, one human in two scenes may well stay two persons.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jaxtyping import Float, Float32, UInt8
from scipy.cluster.hierarchy import fcluster, linkage

from preprocessing.analysis.chips import CHEEKS, Chip, chip_frames, lab, read_chip, values_at
from preprocessing.analysis.quality import blur
from preprocessing.reels import CHIP_PX, Track, chip_box
from tccp.errors import TccpError
from tccp.faces import Face, FaceBackend
from tccp.landmarks import head_pose, normalise

SAME_PERSON_COSINE = 0.363
"""Embeddings at least so alike are one person's: the threshold that OpenCV states for SFace."""

# ---- SFace

_CHIPS_EMBEDDED = 5
_CANDIDATES = 12  # the most frontal chips, of which the sharpest are embedded
_CLEARLY_LARGER = 1.5  # by how much the one face meant exceeds the others in a reference picture


class FaceEmbedder:
    """SFace: unit vectors that are near one another for pictures of one person."""

    def __init__(self, weights: Path) -> None:
        """weights: the OpenCV zoo's face_recognition_sface_2021dec.onnx. Raises TccpError if it is not usable."""
        try:
            self._network: Any = cv2.FaceRecognizerSF.create(str(weights), "")
            self._feature(np.zeros((CHIP_PX, CHIP_PX, 3), np.uint8))
        except cv2.error as error:
            reason = str(error).strip().splitlines()[0][:120]
            raise TccpError(f"{weights} is not a usable SFace model ({reason}): tccp weights fetch sface") from None

    def embed(
        self, picture: UInt8[np.ndarray, "h w 3"], points: Float32[np.ndarray, "68 2"]
    ) -> Float32[np.ndarray, " d"]:
        """Unit vector of an RGB picture's face; points: its 68 landmarks in the picture's pixels."""
        five = np.stack(
            [points[36:42].mean(0), points[42:48].mean(0), points[30], points[48], points[54]]
        )  # by place in the picture, as OpenCV's own detector hands them over
        # Chips end at the brows, SFace's template above the forehead: without a border it would be black there.
        room = len(picture) // 2
        picture = np.asarray(cv2.copyMakeBorder(picture, room, room, room, room, cv2.BORDER_REPLICATE), np.uint8)
        five += room
        face = np.concatenate([points.min(0), np.ptp(points, axis=0), five.ravel(), [1.0]]).astype(np.float32)
        return self._feature(self._network.alignCrop(np.ascontiguousarray(picture[..., ::-1]), face[None]))

    def embed_track(self, track: Track) -> Float32[np.ndarray, " d"] | None:
        """Mean of several chips, the most frontal and sharpest ones, as a unit vector; None without any."""
        frames = _most_frontal(track, _CANDIDATES)
        if not frames:
            return None
        return self._mean(_sharpest([read_chip(track, frame, None) for frame in frames], _CHIPS_EMBEDDED))

    def embed_frames(self, track: Track, frames: Sequence[int]) -> Float32[np.ndarray, " d"]:
        """Mean of the chips of these frames, as a unit vector."""
        return self._mean([read_chip(track, frame, None) for frame in frames])

    def embed_reference(self, path: str | Path, backend: FaceBackend) -> Float32[np.ndarray, " d"]:
        """Unit vector of the face in a picture of the person who is wanted.

        Of several faces the largest, if it is clearly the largest. Raises TccpError if there is no such file, if it is
        no picture, if it shows no face, or several of about the same size.
        """
        picture = _read_picture(Path(path))
        found = backend.detect(picture)
        faces = [face for face in found if face.landmarks_px is not None]
        if found and not faces:
            raise TccpError(
                f"face backend {backend.name} gives no landmarks, which a reference picture needs: take mediapipe"
            )
        if not faces:
            raise TccpError(f"{path}: no face is to be seen; give a picture of the person's face, from the front")
        faces.sort(key=lambda face: -face.side)
        if len(faces) > 1 and faces[0].side < _CLEARLY_LARGER * faces[1].side:
            raise TccpError(
                f"{path}: {len(faces)} faces of about the same size; give a picture of the person alone, or crop it"
            )
        return self.embed(*_as_chip(picture, faces[0]))

    def _mean(self, chips: Sequence[Chip]) -> Float32[np.ndarray, " d"]:
        return _unit(np.mean([self.embed(chip.picture, chip.points) for chip in chips], axis=0))

    def _feature(self, aligned: np.ndarray) -> Float32[np.ndarray, " d"]:
        return _unit(self._network.feature(aligned).ravel())


def _unit(vector: np.ndarray) -> Float32[np.ndarray, " d"]:
    return (vector / max(float(np.linalg.norm(vector)), 1e-12)).astype(np.float32)


def _as_chip(picture: UInt8[np.ndarray, "h w 3"], face: Face) -> tuple[np.ndarray, np.ndarray]:
    """A face as tracks show theirs, up to twice as large, and its landmarks there: both are embedded from the same."""
    points = face.landmarks_px
    assert points is not None
    box = chip_box(face.box)
    shrink = min(1.0, 2 * CHIP_PX / float(box[2] - box[0]))
    if shrink < 1:
        small = cv2.resize(picture, None, fx=shrink, fy=shrink, interpolation=cv2.INTER_AREA)
        picture, box, points = np.asarray(small, np.uint8), box * shrink, points * shrink
    side, corner = round(float(box[2] - box[0])), box[:2].round()
    matrix = np.array([[1, 0, corner[0]], [0, 1, corner[1]]], np.float32)
    flags = cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP
    square = cv2.warpAffine(picture, matrix, (side, side), flags=flags, borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(square, np.uint8), (points - corner - 0.5).astype(np.float32)


def _read_picture(path: Path) -> UInt8[np.ndarray, "h w 3"]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TccpError(f"person picture {path}: {error.strerror}; give a picture of the person") from None
    picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) if data else None
    if picture is None:
        raise TccpError(f"person picture {path} is not a picture that can be read; give a JPEG or PNG file")
    return np.ascontiguousarray(picture[..., ::-1])


def _most_frontal(track: Track, count: int) -> list[int]:
    frames = chip_frames(track)
    if not frames:
        return []
    pose = _poses(track, frames)
    return [frames[i] for i in np.argsort(np.abs(pose).max(1), kind="stable")[:count]]


def _sharpest(chips: list[Chip], count: int) -> list[Chip]:
    return sorted(chips, key=lambda chip: blur(chip.picture))[:count]


def _poses(track: Track, frames: Sequence[int]) -> np.ndarray:
    """Yaw and pitch in degrees, k x 2."""
    pose = head_pose(track.landmarks[np.array(frames) - track.start_frame].astype(np.float64))
    return np.stack([pose.yaw_deg, pose.pitch_deg], axis=1)


# ---- The same look

_LOOK_PX = 48
_LOOK_EYES = ((0.30, 0.36), (0.70, 0.36))
_LOOK_MOUTH = (0.50, 0.74)
_UPPER = (slice(2, 34), slice(6, 42))  # rows and columns from the brows to the nose: no mouth, no hands
_LOOK_CHIPS = 5
_SAME_LAB = 5.5  # mean difference (Lab, 0..255); one person in one scene is at 1 to 5.9, two persons at 7 or more
_SAME_NCC = 0.88  # correlation of lightness


def _look(chip: Chip) -> Float32[np.ndarray, "s s 3"]:
    """Lab picture of the face with its eyes and mouth at fixed places, whatever its size, place and (mild) turn."""
    points = chip.points
    here = np.array([points[36:42].mean(0), points[42:48].mean(0), points[[48, 54]].mean(0)], np.float32)
    there = np.array([*_LOOK_EYES, _LOOK_MOUTH], np.float32) * _LOOK_PX
    matrix = cv2.getAffineTransform(here, there)
    scale = float(np.sqrt(abs(np.linalg.det(matrix[:, :2]))))
    picture = cv2.GaussianBlur(chip.picture, (0, 0), 0.5 / scale) if 0 < scale < 1 else chip.picture
    face = cv2.warpAffine(
        picture, matrix, (_LOOK_PX, _LOOK_PX), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
    )
    return lab(np.asarray(face, np.uint8), 1.0)


def _difference(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Mean absolute differences of looks ("... a b 3", broadcast against one another)."""
    return np.abs(first - second).mean((-3, -2, -1))


def _texture(looks: np.ndarray) -> np.ndarray:
    """Lightness of looks ("... a b 3") as unit vectors without a mean: their products are correlations, -1..1."""
    flat = looks[..., 0].reshape(*looks.shape[:-3], -1)
    flat = flat - flat.mean(-1, keepdims=True)
    return flat / np.maximum(np.linalg.norm(flat, axis=-1, keepdims=True), 1e-6)


# ---- Grouping

_Unlike = Callable[[int, int], float]


def group(tracks: Sequence[Track], embedder: FaceEmbedder | None) -> list[int]:
    """Number of the person whom each track of one source shows; counted from 0 in the order of the tracks.

    Tracks that share a frame are different persons. Of the others those are joined, nearest first (average linkage),
    whose embeddings are alike, or without `embedder` whose faces look nearly the same.
    """
    limit, unlike = _unlike_looks(tracks) if embedder is None else _unlike_embeddings(tracks, embedder)
    distance = np.full((len(tracks), len(tracks)), np.inf)
    for i, a in enumerate(tracks):
        for j, b in enumerate(tracks[:i]):
            if a.stop_frame <= b.start_frame or b.stop_frame <= a.start_frame:
                distance[i, j] = distance[j, i] = unlike(i, j)
    return average_linkage(distance, limit)


def _unlike_embeddings(tracks: Sequence[Track], embedder: FaceEmbedder) -> tuple[float, _Unlike]:
    """The largest distance between tracks of one person, and the distance of any two; infinite without chips."""
    vectors = [embedder.embed_track(track) for track in tracks]

    def unlike(i: int, j: int) -> float:
        a, b = vectors[i], vectors[j]
        return float("inf") if a is None or b is None else 1 - float(a @ b)

    return 1 - SAME_PERSON_COSINE, unlike


def _unlike_looks(tracks: Sequence[Track]) -> tuple[float, _Unlike]:
    """Likewise: up to 1 where some chip of one track looks nearly as some chip of the other does."""
    looks = [[_look(read_chip(track, frame)) for frame in _most_frontal(track, _LOOK_CHIPS)] for track in tracks]

    def unlike(i: int, j: int) -> float:
        if not looks[i] or not looks[j]:
            return float("inf")
        a, b = np.stack(looks[i]), np.stack(looks[j])
        other_texture = (1 - _texture(a) @ _texture(b).T) / (1 - _SAME_NCC)
        return float(np.maximum(other_texture, _difference(a[:, None], b) / _SAME_LAB).min())

    return 1.0, unlike


def average_linkage(distance: Float[np.ndarray, "n n"], limit: float) -> list[int]:
    """Group number of each of n items, counted from 0 in the order of the items.

    Agglomerative clustering with average linkage (UPGMA): groups whose mean distance is at most `limit` are joined,
    nearest first. Two items at an infinite distance never come into one group. distance: symmetric; its diagonal is
    ignored.
    """
    count = len(distance)
    if count < 2:
        return list(range(count))
    pairs = distance[np.triu_indices(count, 1)]
    # SciPy takes finite distances only. Two groups have at most n * n / 4 pairs: one forbidden pair among them lifts
    # their mean distance above `limit`.
    forbidden = count**2 * max(limit, 1.0)
    tree = linkage(np.where(np.isfinite(pairs), pairs, forbidden), "average")
    labels = fcluster(tree, limit, "distance").tolist()
    numbers = {label: number for number, label in enumerate(dict.fromkeys(labels))}
    return [numbers[label] for label in labels]


# ---- The person who is wanted


def matches(
    tracks: Sequence[Track], references: Sequence[Float32[np.ndarray, " d"]], embedder: FaceEmbedder | None
) -> list[bool]:
    """Whether each track shows the person of the references (`FaceEmbedder.embed_reference`): any of them suffices.

    A track without chips or landmarks does not. Raises TccpError without `embedder`.
    """
    if embedder is None:
        raise TccpError(
            "the person filter compares faces by SFace's embeddings, whose weights are not there: "
            "tccp weights fetch sface, or leave the person out"
        )
    vectors = [embedder.embed_track(track) for track in tracks]
    return [
        vector is not None and any(float(vector @ reference) >= SAME_PERSON_COSINE for reference in references)
        for vector in vectors
    ]


# ---- Switches within a track

_AROUND = 3  # chips on either side that are compared
_SAME_POSE_DEG = 12.0  # looks are compared only of faces that look the same way
_OTHER_LAB, _OTHER_SKIN = 7.5, 10.0  # differences of the upper face, and of its skin alone, that make another person
_LITTLE_SKIN = 3.0  # whose skin does not change at all is the same person
_STAND_OUT, _SKIN_STAND_OUT = 1.5, 2.0  # by how much a switch exceeds the differences on either side
_SAME_TEXTURE = 0.9  # a correlation that is no other person's: the light has changed
_SUSPECT = 0.6  # share of these bounds that is enough to ask the embedder
_SKIN_WEIGHTS = np.array([0.5, 1.0, 1.0], np.float32)
_UNMOVED = list(range(17, 36))  # brows and nose: speech and blinks leave them


def switches(track: Track, embedder: FaceEmbedder | None) -> list[int]:
    """Frames at which somebody else begins in a track; as a rule none.

    The faces of up to three chips before and after are compared, of those pairs that look the same way, and their skin
    whichever way they look; a switch is where all of these differ much, and more than they do on either side. With
    `embedder` smaller differences count too, if their embeddings are not one person's. Between two chips it is the
    frame where brows and nose change most.
    """
    frames = chip_frames(track)
    if len(frames) < 2:
        return []
    chips = [read_chip(track, frame) for frame in frames]
    looks = np.stack([_look(chip)[_UPPER] for chip in chips])
    skins = np.stack([np.median(values_at(lab(chip.picture, 1.2), chip.points, CHEEKS), axis=0) for chip in chips])
    strength = _strengths(looks, skins * _SKIN_WEIGHTS, _poses(track, frames))
    bounds = 1.0 if embedder is None else _SUSPECT
    found: list[int] = []
    for i in sorted(range(1, len(frames)), key=lambda i: (-strength[i - 1], i)):
        if strength[i - 1] < bounds or any(abs(i - other) < _AROUND for other in found):
            continue
        if embedder is not None:
            before = embedder.embed_frames(track, frames[max(0, i - _AROUND) : i])
            after = embedder.embed_frames(track, frames[i : i + _AROUND])
            if float(before @ after) >= SAME_PERSON_COSINE:
                continue
        found.append(i)
    return [_where(track, frames[i - 1], frames[i]) for i in sorted(found)]


def _strengths(looks: np.ndarray, skins: np.ndarray, poses: np.ndarray) -> list[float]:
    """How much each chip but the first begins another person: 1 and more is one, 0 none."""
    reach = 2 * _AROUND - 1
    # Row k, column d: chip k against chip k + d + 1; NaN beyond the end.
    look, skin, turn, alike = (np.full((len(looks), reach), np.nan) for _ in range(4))
    texture = _texture(looks)
    for d in range(min(reach, len(looks) - 1)):
        n, step = len(looks) - d - 1, d + 1
        look[:n, d] = _difference(looks[step:], looks[:-step])
        skin[:n, d] = np.linalg.norm(skins[step:] - skins[:-step], axis=1)
        turn[:n, d] = np.abs(poses[step:] - poses[:-step]).max(1)
        alike[:n, d] = (texture[step:] * texture[:-step]).sum(1)
    return [_strength(look, skin, turn, alike, i) for i in range(1, len(looks))]


def _strength(look: np.ndarray, skin: np.ndarray, turn: np.ndarray, alike: np.ndarray, i: int) -> float:
    before, after = range(max(0, i - _AROUND), i), range(i, min(i + _AROUND, len(look)))
    pairs = [(a, b - a - 1) for a in before for b in after]
    beside = [k for k in (i - 2, i) if k >= 0 and k + 1 < len(look)]  # the steps next to this one, on either side
    same_pose = [pair for pair in pairs if turn[pair] <= _SAME_POSE_DEG]
    if any(alike[pair] >= _SAME_TEXTURE for pair in same_pose):
        return 0.0
    other_skin = min(float(skin[pair]) for pair in pairs)
    usual_skin = max((float(skin[k, 0]) for k in beside), default=0.0)
    by_skin = other_skin / _OTHER_SKIN if other_skin > _SKIN_STAND_OUT * usual_skin else 0.0
    if not same_pose or other_skin < _LITTLE_SKIN:
        return by_skin
    other_look = min(float(look[pair]) for pair in same_pose)
    usual_look = max((float(look[k, 0]) for k in beside), default=0.0)
    return max(by_skin, other_look / _OTHER_LAB if other_look > _STAND_OUT * usual_look else 0.0)


def _where(track: Track, before: int, after: int) -> int:
    """The frame after `before`, up to `after`, at which the shape of brows and nose changes most among those seen."""
    rows = np.arange(before, after + 1) - track.start_frame
    rows = rows[track.confidence[rows] > 0]
    if len(rows) < 2:
        return after
    shapes = normalise(track.landmarks[rows].astype(np.float64))[:, _UNMOVED]
    steps = np.linalg.norm(np.diff(shapes, axis=0), axis=-1).mean(1)
    return track.start_frame + int(rows[1:][int(np.argmax(steps))])
