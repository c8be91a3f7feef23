"""What the parts of the server send each other: windows of films, and where their chains go on. Only numpy arrays."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32, UInt8

from tccp.inference.film_windows import LandmarkWindow, SceneWindow

StageKind = Literal["landmark", "face"]


class JobLost(Exception):
    """A claim of a job does not hold any more: the job was cancelled, or somebody else works on it."""


@dataclass(frozen=True)
class FilmKey:
    """A job as a stage sees it: who it is, and all that its networks depend on besides windows.

    weights: version of the pipeline. sampling: options of `FilmRequest` that change the pipeline's settings.
    """

    job_id: str
    fence: int
    weights: str
    identity: UInt8[np.ndarray, "s s 3"]
    seed: int = 0
    one_stage: bool = False
    redraw: bool | None = None
    read_landmarks: bool = True
    sampling: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class ChainPoint:
    """Where the chain of a stage goes on, after its last frame (`tccp.diffusion.chains.ChainState`).

    points: landmarks that the stage read last, for frames in which it can read none.
    """

    position: int
    control: Float32[np.ndarray, "c2 h w"]
    latents: Float32[np.ndarray, "c h w"]
    audio: Float32[np.ndarray, "80 16"] | None = None
    lips: Float32[np.ndarray, "3 l l"] | None = None
    points: Float32[np.ndarray, "68 2"] | None = None


@dataclass(frozen=True)
class Task:
    """A window of one stage. shot: number of the first frame of its chain. point: None at the start of the chain.

    landmarks: for faces, what stage 1 has made of the same window; None with one stage and with given landmarks.
    """

    film: FilmKey
    shot: int
    window: SceneWindow
    point: ChainPoint | None
    landmarks: LandmarksDone | None = None


@dataclass(frozen=True)
class LandmarksDone:
    """A window after stage 1. latents: of its landmark pictures, unless these were drawn again."""

    point: ChainPoint
    latents: Float32[np.ndarray, "f c h w"] | None
    landmarks: LandmarkWindow | None


@dataclass(frozen=True)
class FacesDone:
    """A window after stage 2: the heads of the frames that it adds."""

    point: ChainPoint
    faces: UInt8[np.ndarray, "f s s 3"]


@dataclass(frozen=True)
class KeptWindow:
    """A finished window as it is stored: heads, landmarks if they were read, and where both chains go on."""

    first: int
    faces: UInt8[np.ndarray, "f s s 3"]
    face_point: ChainPoint
    landmark_point: ChainPoint | None = None
    points: Float32[np.ndarray, "f 68 2"] | None = None
    confidence: Float32[np.ndarray, " f"] | None = None


_POINTS = ("face_point", "landmark_point")


def to_bytes(window: KeptWindow) -> bytes:
    """The window as an .npz file without pickles."""
    arrays: dict[str, Any] = {"first": np.int64(window.first)}
    for name in ("faces", "points", "confidence"):
        arrays[name] = getattr(window, name)
    for name in _POINTS:
        point = getattr(window, name)
        for field in fields(ChainPoint) if point is not None else ():
            value = getattr(point, field.name)
            arrays[f"{name}.{field.name}"] = np.int64(value) if field.name == "position" else value
    given = {name: array for name, array in arrays.items() if array is not None}
    given["names"] = np.array(list(given))  # a damaged directory of the file can lose parts without a word
    content = io.BytesIO()
    np.savez(content, allow_pickle=False, **given)
    return content.getvalue()


def from_bytes(content: bytes, faces: bool = True) -> KeptWindow:
    """A stored window. faces: without them, heads and landmarks are left out. Raises ValueError if it is damaged."""
    try:
        return _read(content, faces)
    except Exception as error:  # numpy and zipfile raise a dozen kinds for what is damaged
        raise ValueError(f"{type(error).__name__}: {error}") from None


def _read(content: bytes, faces: bool) -> KeptWindow:
    with np.load(io.BytesIO(content), allow_pickle=False) as stored:
        if stored.files != [*stored["names"].tolist(), "names"]:
            raise ValueError("a part is missing")
        points: dict[str, ChainPoint | None] = {}
        for name in _POINTS:
            known = {key.partition(".")[2]: stored[key] for key in stored.files if key.startswith(f"{name}.")}
            if known:
                known["position"] = int(known["position"])
            points[name] = ChainPoint(**known) if known else None
        rest = {name: stored[name] for name in ("points", "confidence") if faces and name in stored.files}
        heads = stored["faces"] if faces else np.zeros((0, 1, 1, 3), np.uint8)
        face_point = points["face_point"]
        if face_point is None:
            raise ValueError("the window has no place where its chain goes on")
        return KeptWindow(int(stored["first"]), heads, face_point, points["landmark_point"], **rest)
