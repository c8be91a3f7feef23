"""Groups the tracks of a source by person, finds the tracks of a requested person, and finds person switches.

With SFace's weights, faces are compared by its embeddings. Without them they are compared by appearance, and only faces
of nearly equal appearance count as one person: two people are almost never merged, but one person in two scenes is
often counted as two.
"""

from __future__ import annotations

import logging
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
from tccp.errors import DamagedData, TccpError
from tccp.faces import Face, FaceBackend
from tccp.files import redacted
from tccp.landmarks import head_pose, normalise
from tccp.media import MediaError
from tccp.media.remote import local_copy
from tccp.media.sandbox import Decoder

SAME_PERSON_COSINE = 0.363
"""Least cosine similarity of two embeddings of one person: OpenCV's threshold for SFace."""

# ---- SFace

logger = logging.getLogger(__name__)

_CHIPS_EMBEDDED = 5
_CANDIDATES = 12  # number of most frontal chips; the sharpest of them are embedded
_CLEARLY_LARGER = 1.5  # least ratio of the largest face's size to the second in a reference picture


class FaceEmbedder:
    """SFace: maps pictures of a face to unit vectors, which are close to each other for one person."""

    def __init__(self, weights: Path) -> None:
        """weights: face_recognition_sface_2021dec.onnx of the OpenCV zoo. Raises TccpError if it is not usable."""
        try:
            self._network: Any = cv2.FaceRecognizerSF.create(str(weights), "")
            self._feature(np.zeros((CHIP_PX, CHIP_PX, 3), np.uint8))
        except cv2.error as error:
            reason = str(error).strip().splitlines()[0][:120]
            raise TccpError(f"{weights} is not a usable SFace model ({reason}): tccp weights fetch sface") from None

    def embed(
        self, picture: UInt8[np.ndarray, "h w 3"], points: Float32[np.ndarray, "68 2"]
    ) -> Float32[np.ndarray, " d"]:
        """Embedding of the face in an RGB picture, a unit vector. points: its 68 landmarks in the picture's pixels."""
        five = np.stack(
            [points[36:42].mean(0), points[42:48].mean(0), points[30], points[48], points[54]]
        )  # in the order of OpenCV's own detector: left in the picture first
        # SFace's template includes the forehead, but chips end at the brows: without a border, it would be black.
        margin = len(picture) // 2
        picture = np.asarray(
            cv2.copyMakeBorder(picture, margin, margin, margin, margin, cv2.BORDER_REPLICATE), np.uint8
        )
        five += margin
        face = np.concatenate([points.min(0), np.ptp(points, axis=0), five.ravel(), [1.0]]).astype(np.float32)
        return self._feature(self._network.alignCrop(np.ascontiguousarray(picture[..., ::-1]), face[None]))

    def embed_track(self, track: Track) -> Float32[np.ndarray, " d"] | None:
        """Mean embedding of the most frontal and sharpest chips, as a unit vector; None without chips."""
        frames = _most_frontal(track, _CANDIDATES)
        if not frames:
            return None
        return self._mean(_sharpest([read_chip(track, frame, None) for frame in frames], _CHIPS_EMBEDDED))

    def embed_frames(self, track: Track, frames: Sequence[int]) -> Float32[np.ndarray, " d"]:
        """Mean embedding of the chips of these frames, as a unit vector."""
        return self._mean([read_chip(track, frame, None) for frame in frames])

    def embed_reference(
        self, path: str | Path, backend: FaceBackend, name: str | None = None
    ) -> Float32[np.ndarray, " d"]:
        """Embedding of the face in a reference picture of the requested person, a unit vector.

        If there are several faces, the largest is used. name: of the picture in messages, by default its path.
        Raises DamagedData if the file does not exist or is not a picture, if it shows no face, or if the largest face
        is not clearly the largest; TccpError if the backend gives no landmarks.
        """
        name = name or redacted(str(path))
        picture = _read_picture(str(path), name)
        found = backend.detect(picture)
        faces = [face for face in found if face.landmarks_px is not None]
        if found and not faces:
            raise TccpError(
                f"face backend {backend.name} gives no landmarks, which a reference picture needs: choose mediapipe"
            )
        if not faces:
            raise DamagedData(f"{name}: no face was found; give a picture of the person's face, from the front")
        faces.sort(key=lambda face: -face.side)
        if len(faces) > 1 and faces[0].side < _CLEARLY_LARGER * faces[1].side:
            raise DamagedData(
                f"{name}: {len(faces)} faces of about the same size; give a picture of the person alone, or crop it"
            )
        return self.embed(*_as_chip(picture, faces[0]))

    def _mean(self, chips: Sequence[Chip]) -> Float32[np.ndarray, " d"]:
        return _unit(np.mean([self.embed(chip.picture, chip.points) for chip in chips], axis=0))

    def _feature(self, aligned: np.ndarray) -> Float32[np.ndarray, " d"]:
        return _unit(self._network.feature(aligned).ravel())


def _unit(vector: np.ndarray) -> Float32[np.ndarray, " d"]:
    return (vector / max(float(np.linalg.norm(vector)), 1e-12)).astype(np.float32)


def _as_chip(picture: UInt8[np.ndarray, "h w 3"], face: Face) -> tuple[np.ndarray, np.ndarray]:
    """A face cut out as in a track's chip, at most twice as large, for similar embeddings; and its landmarks in it."""
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


def _read_picture(place: str, name: str) -> UInt8[np.ndarray, "h w 3"]:
    """The picture at a path or URL, decoded in a child process."""
    try:
        with local_copy(place) as path, Decoder() as decoder:
            still = decoder.picture(path)
    except MediaError as error:
        raise DamagedData(f"person picture {name}: {error.problem}") from None
    for text in still.warnings:
        logger.warning("person picture %s: %s", name, text)
    return still.pixels


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


# ---- Appearance

_APPEARANCE_PX = 48
_APPEARANCE_EYES = ((0.30, 0.36), (0.70, 0.36))
_APPEARANCE_MOUTH = (0.50, 0.74)
_UPPER = (slice(2, 34), slice(6, 42))  # rows and columns from the brows to the nose, without mouth and hands
_COMPARED_CHIPS = 5
_SAME_LAB = 5.5  # mean difference (Lab, 0..255): 1 to 5.9 for one person in one scene, 7 or more for two people
_SAME_NCC = 0.88  # correlation of lightness


def _appearance(chip: Chip) -> Float32[np.ndarray, "s s 3"]:
    """Lab picture of the face, warped so that eyes and mouth are at fixed positions."""
    points = chip.points
    here = np.array([points[36:42].mean(0), points[42:48].mean(0), points[[48, 54]].mean(0)], np.float32)
    there = np.array([*_APPEARANCE_EYES, _APPEARANCE_MOUTH], np.float32) * _APPEARANCE_PX
    matrix = cv2.getAffineTransform(here, there)
    scale = float(np.sqrt(abs(np.linalg.det(matrix[:, :2]))))
    picture = cv2.GaussianBlur(chip.picture, (0, 0), 0.5 / scale) if 0 < scale < 1 else chip.picture
    face = cv2.warpAffine(
        picture, matrix, (_APPEARANCE_PX, _APPEARANCE_PX), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
    )
    return lab(np.asarray(face, np.uint8), 1.0)


def _difference(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Mean absolute differences of appearances ("... a b 3", broadcast)."""
    return np.abs(first - second).mean((-3, -2, -1))


def _texture(appearances: np.ndarray) -> np.ndarray:
    """Lightness of appearances ("... a b 3") as unit vectors with mean 0: their dot products are correlations."""
    flat = appearances[..., 0].reshape(*appearances.shape[:-3], -1)
    flat = flat - flat.mean(-1, keepdims=True)
    return flat / np.maximum(np.linalg.norm(flat, axis=-1, keepdims=True), 1e-6)


# ---- Grouping

_Distance = Callable[[int, int], float]


def group(tracks: Sequence[Track], embedder: FaceEmbedder | None) -> list[int]:
    """The number of the person in each track of one source, counted from 0 in the order of the tracks.

    Tracks that share a frame show different persons. The others are clustered (average linkage) by the distance of
    their embeddings, or, without `embedder`, by appearance.
    """
    limit, distance_of = _appearance_distances(tracks) if embedder is None else _embedding_distances(tracks, embedder)
    distance = np.full((len(tracks), len(tracks)), np.inf)
    for i, a in enumerate(tracks):
        for j, b in enumerate(tracks[:i]):
            if a.stop_frame <= b.start_frame or b.stop_frame <= a.start_frame:
                distance[i, j] = distance[j, i] = distance_of(i, j)
    return average_linkage(distance, limit)


def _embedding_distances(tracks: Sequence[Track], embedder: FaceEmbedder) -> tuple[float, _Distance]:
    """The largest distance within one person, and a function for the distance of two tracks; infinite without chips."""
    vectors = [embedder.embed_track(track) for track in tracks]

    def distance_of(i: int, j: int) -> float:
        a, b = vectors[i], vectors[j]
        return float("inf") if a is None or b is None else max(1 - float(a @ b), 0.0)  # rounding can give -1e-7

    return 1 - SAME_PERSON_COSINE, distance_of


def _appearance_distances(tracks: Sequence[Track]) -> tuple[float, _Distance]:
    """As `_embedding_distances`: at most 1 if any chip of one track looks nearly like any chip of the other."""
    appearances = [
        [_appearance(read_chip(track, frame)) for frame in _most_frontal(track, _COMPARED_CHIPS)] for track in tracks
    ]

    def distance_of(i: int, j: int) -> float:
        if not appearances[i] or not appearances[j]:
            return float("inf")
        a, b = np.stack(appearances[i]), np.stack(appearances[j])
        texture_distance = (1 - _texture(a) @ _texture(b).T) / (1 - _SAME_NCC)
        return float(np.maximum(texture_distance, _difference(a[:, None], b) / _SAME_LAB).min())

    return 1.0, distance_of


def average_linkage(distance: Float[np.ndarray, "n n"], limit: float) -> list[int]:
    """Group number of each of n items, counted from 0 in the order of the items.

    Agglomerative clustering with average linkage (UPGMA): groups whose mean distance is at most `limit` are joined,
    nearest first. Two items at an infinite distance never come into one group. distance: symmetric, at least 0; its
    diagonal is ignored.
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


# ---- The requested person


def matches(
    tracks: Sequence[Track], references: Sequence[Float32[np.ndarray, " d"]], embedder: FaceEmbedder | None
) -> list[bool]:
    """Whether each track shows the person of the references (`FaceEmbedder.embed_reference`), by any one of them.

    False for a track without chips or landmarks. Raises TccpError without `embedder`.
    """
    if embedder is None:
        raise TccpError(
            "the person filter needs the weights of SFace, which are missing: tccp weights fetch sface, or leave the "
            "person out"
        )
    vectors = [embedder.embed_track(track) for track in tracks]
    return [
        vector is not None and any(float(vector @ reference) >= SAME_PERSON_COSINE for reference in references)
        for vector in vectors
    ]


# ---- Switches within a track

_AROUND = 3  # chips on either side that are compared
_SAME_POSE_DEG = 12.0  # appearances are compared only if the poses differ by no more
_OTHER_LAB, _OTHER_SKIN = 7.5, 10.0  # least differences of the upper face, and of its skin alone, of another person
_LITTLE_SKIN = 3.0  # if the skin differs by less, the difference of the upper face does not count
_STAND_OUT, _SKIN_STAND_OUT = 1.5, 2.0  # least ratio of the difference at a switch to those before and after it
_SAME_TEXTURE = 0.9  # with such a correlation it is the same person in another light
_SUSPECT = 0.6  # share of these bounds from which on the embedder decides
_SKIN_WEIGHTS = np.array([0.5, 1.0, 1.0], np.float32)
_UNMOVED = list(range(17, 36))  # brows and nose, which speech and blinks do not move


def switches(track: Track, embedder: FaceEmbedder | None) -> list[int]:
    """Frames at which another person begins within a track; usually none.

    Up to three chips before a frame are compared with up to three after it: their skin, and, for pairs of similar pose,
    their appearance. A switch is where all pairs differ strongly, and more than chips before and after do. With
    `embedder`, smaller differences count too if the embeddings are not those of one person. Between two chips, the
    switch is placed at the frame where brows and nose change most.
    """
    frames = chip_frames(track)
    if len(frames) < 2:
        return []
    chips = [read_chip(track, frame) for frame in frames]
    appearances = np.stack([_appearance(chip)[_UPPER] for chip in chips])
    skins = np.stack([np.median(values_at(lab(chip.picture, 1.2), chip.points, CHEEKS), axis=0) for chip in chips])
    strength = _strengths(appearances, skins * _SKIN_WEIGHTS, _poses(track, frames))
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


def _strengths(appearances: np.ndarray, skins: np.ndarray, poses: np.ndarray) -> list[float]:
    """Evidence that another person begins at each chip but the first: 0 none, 1 and more enough."""
    reach = 2 * _AROUND - 1
    # Row k, column d: chip k compared with chip k + d + 1; NaN beyond the end.
    face, skin, turn, similarity = (np.full((len(appearances), reach), np.nan) for _ in range(4))
    texture = _texture(appearances)
    for d in range(min(reach, len(appearances) - 1)):
        n, step = len(appearances) - d - 1, d + 1
        face[:n, d] = _difference(appearances[step:], appearances[:-step])
        skin[:n, d] = np.linalg.norm(skins[step:] - skins[:-step], axis=1)
        turn[:n, d] = np.abs(poses[step:] - poses[:-step]).max(1)
        similarity[:n, d] = (texture[step:] * texture[:-step]).sum(1)
    return [_strength(face, skin, turn, similarity, i) for i in range(1, len(appearances))]


def _strength(face: np.ndarray, skin: np.ndarray, turn: np.ndarray, similarity: np.ndarray, i: int) -> float:
    before, after = range(max(0, i - _AROUND), i), range(i, min(i + _AROUND, len(face)))
    pairs = [(a, b - a - 1) for a in before for b in after]
    neighbours = [k for k in (i - 2, i) if k >= 0 and k + 1 < len(face)]  # the steps before and after this one
    same_pose = [pair for pair in pairs if turn[pair] <= _SAME_POSE_DEG]
    if any(similarity[pair] >= _SAME_TEXTURE for pair in same_pose):
        return 0.0
    other_skin = min(float(skin[pair]) for pair in pairs)
    usual_skin = max((float(skin[k, 0]) for k in neighbours), default=0.0)
    by_skin = other_skin / _OTHER_SKIN if other_skin > _SKIN_STAND_OUT * usual_skin else 0.0
    if not same_pose or other_skin < _LITTLE_SKIN:
        return by_skin
    other_face = min(float(face[pair]) for pair in same_pose)
    usual_face = max((float(face[k, 0]) for k in neighbours), default=0.0)
    return max(by_skin, other_face / _OTHER_LAB if other_face > _STAND_OUT * usual_face else 0.0)


def _where(track: Track, before: int, after: int) -> int:
    """The frame in (before, after] at which brows and nose change most, among the frames with a detected face."""
    rows = np.arange(before, after + 1) - track.start_frame
    rows = rows[track.confidence[rows] > 0]
    if len(rows) < 2:
        return after
    shapes = normalise(track.landmarks[rows].astype(np.float64))[:, _UNMOVED]
    steps = np.linalg.norm(np.diff(shapes, axis=0), axis=-1).mean(1)
    return track.start_frame + int(rows[1:][int(np.argmax(steps))])
