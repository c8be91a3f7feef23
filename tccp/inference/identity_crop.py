"""Cuts the head of the person to generate from a picture or a film."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Float, UInt8

from tccp import faces, headbox
from tccp.errors import TccpError
from tccp.inference.head_tracks import square_box
from tccp.media import MediaError, probe, read_frames
from tccp.roundtable import read_truth

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
_LEAST_HEAD_PX = 16
_CANDIDATES = 16  # frames of an identity film to search for faces

Candidates = dict[int, UInt8[np.ndarray, "_ _ 3"]]
"""Pictures to search for the head, by frame number."""


def identity_candidates(path: Path) -> Candidates:
    """The identity picture, or up to 16 evenly spaced frames of the identity film.

    Raises TccpError or MediaError if the file is missing, unreadable or has no pictures.
    """
    if is_picture(path):
        try:
            data = np.frombuffer(path.read_bytes(), np.uint8)
        except OSError as error:
            raise TccpError(f"{path}: {error.strerror}; give a picture or a film of the person") from None
        picture = cv2.imdecode(data, cv2.IMREAD_COLOR) if len(data) else None
        if picture is None:
            raise TccpError(f"{path} is not a readable picture: give PNG, JPEG, BMP or WebP, or a film")
        return {0: np.asarray(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB), np.uint8)}
    info = probe(path)
    if not info.has_video:
        raise MediaError(path, "no_video", "it has sound only; give a picture or a film of the person")
    count = min(_CANDIDATES, info.num_frames)
    wanted = [(2 * k + 1) * info.num_frames // (2 * count) for k in range(count)]
    return {i: frame for i, frame in enumerate(read_frames(path, num_frames=wanted[-1] + 1)) if i in wanted}


def identity_head(
    path: Path,
    candidates: Candidates,
    *,
    box: str | None,
    truth: bool,
    open_detector: Callable[[], AbstractContextManager[faces.FaceBackend]],
) -> UInt8[np.ndarray, "h w 3"]:
    """The head crop of the candidate that shows the largest face, of at least 16x16 pixels.

    path: the identity file, for messages and its truth file. box: `x0,y0,x1,y1` in pixels of the middle candidate, or
    `whole` if it shows only the head. truth: use a picture as it is, and take the box of a film from its truth file.
    Raises TccpError if no face is found, the box is outside the picture, or the head is too small to be recognised.
    """
    head = _head(path, candidates, box, truth, open_detector)
    height, width = head.shape[:2]
    if min(width, height) < _LEAST_HEAD_PX:
        raise TccpError(
            f"{path}: the head is {width}x{height} pixels, too few to show a person; give a picture in which the head "
            f"has at least {_LEAST_HEAD_PX} pixels on each side"
        )
    return head


def _head(
    path: Path,
    candidates: Candidates,
    box: str | None,
    truth: bool,
    open_detector: Callable[[], AbstractContextManager[faces.FaceBackend]],
) -> UInt8[np.ndarray, "h w 3"]:
    frame, middle = list(candidates.items())[len(candidates) // 2]
    if box == "whole":
        return middle
    if box is not None:
        try:
            corners = np.array([float(part) for part in box.split(",")]).reshape(4)
        except ValueError:
            raise TccpError(f"--identity-box {box}: give x0,y0,x1,y1 in pixels, or whole") from None
        height, width = middle.shape[:2]
        return _crop_native(middle, square_box(corners, width, height, f"--identity-box {box} of {path}"))
    if truth:
        if is_picture(path):
            return middle  # `tccp synth` writes head crops
        return _crop_native(middle, read_truth(path).head_box[frame])
    with open_detector() as detector:
        found = [(face, picture) for picture in candidates.values() for face in detector.detect(picture)]
        name = detector.name
    if not found:
        raise TccpError(
            f"no face found in {path} with {name}: give --identity-box x0,y0,x1,y1, or --identity-box whole if the "
            "picture shows only the head"
        )
    face, picture = max(found, key=lambda pair: pair[0].side)
    if face.landmarks_px is not None:
        return _crop_native(picture, headbox.head_boxes(face.landmarks_px[None])[0])
    return _crop_native(picture, faces.head_boxes_from_faces([face])[0])


def is_picture(path: Path) -> bool:
    return path.suffix.lower() in PICTURE_SUFFIXES


def _crop_native(picture: UInt8[np.ndarray, "h w 3"], box: Float[np.ndarray, "4"]) -> UInt8[np.ndarray, "s s 3"]:
    """The crop at the picture's own resolution."""
    return headbox.crop(picture, box, int(box[2] - box[0]))
