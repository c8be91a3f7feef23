"""Cuts the head of the person to generate from a picture or a film."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8

from tccp import faces, headbox
from tccp.errors import TccpError
from tccp.inference.head_tracks import square_box
from tccp.media import MediaError
from tccp.media.sandbox import Decoder
from tccp.media.still_pictures import PICTURE_FORMATS
from tccp.roundtable import read_truth

_LEAST_HEAD_PX = 16
_CANDIDATES = 16  # frames of an identity film to search for faces


@dataclass(frozen=True)
class Candidates:
    """Pictures to search for the head, by frame number. is_film: whether they are frames of a film.

    warnings: about a still picture, such as that its file holds more pictures.
    """

    pictures: dict[int, UInt8[np.ndarray, "_ _ 3"]]
    is_film: bool
    warnings: tuple[str, ...] = ()


def identity_candidates(path: Path, decoder: Decoder) -> Candidates:
    """The identity picture, or up to 16 evenly spaced frames of the identity film. The content says which it is.

    Raises MediaError if the file is missing, unreadable or has no pictures.
    """
    try:
        still = decoder.picture(path)
        return Candidates({0: still.pixels}, is_film=False, warnings=still.warnings)
    except MediaError as error:
        if error.reason != "not_picture":
            raise
    try:
        info = decoder.probe(path)
    except MediaError as error:
        if error.reason != "not_media":
            raise
        text = f"this is no picture, and no video or audio file of a known format; give {PICTURE_FORMATS}, or a film"
        raise MediaError(path, "not_media", text) from None
    if not info.has_video:
        raise MediaError(path, "no_video", "it has sound only; give a picture or a film of the person")
    count = min(_CANDIDATES, info.num_frames)
    wanted = [(2 * k + 1) * info.num_frames // (2 * count) for k in range(count)]
    return Candidates(dict(decoder.frames_at(path, wanted)), is_film=True)


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
    frame, middle = list(candidates.pictures.items())[len(candidates.pictures) // 2]
    if box == "whole" or (box is None and truth and not candidates.is_film):  # `tccp synth` writes head crops
        head = middle
    elif box is not None:
        head = _crop_native(middle, _box_of_option(box, middle, path))
    elif truth:
        head = _crop_native(middle, read_truth(path).head_box[frame])
    else:
        with open_detector() as detector:
            head = _largest_head(path, candidates, detector)
    height, width = head.shape[:2]
    if min(width, height) < _LEAST_HEAD_PX:
        raise TccpError(
            f"{path}: the head is {width}x{height} pixels, too few to show a person; give a picture in which the head "
            f"has at least {_LEAST_HEAD_PX} pixels on each side"
        )
    return head


def _box_of_option(option: str, picture: UInt8[np.ndarray, "h w 3"], path: Path) -> Float[np.ndarray, "4"]:
    try:
        corners = np.array([float(part) for part in option.split(",")]).reshape(4)
    except ValueError:
        raise TccpError(f"--identity-box {option}: give x0,y0,x1,y1 in pixels, or whole") from None
    height, width = picture.shape[:2]
    return square_box(corners, width, height, f"--identity-box {option} of {path}")


def _largest_head(path: Path, candidates: Candidates, detector: faces.FaceBackend) -> UInt8[np.ndarray, "s s 3"]:
    found = [(face, picture) for picture in candidates.pictures.values() for face in detector.detect(picture)]
    if not found:
        raise TccpError(
            f"no face found in {path} with {detector.name}: give --identity-box x0,y0,x1,y1, or --identity-box whole "
            "if the picture shows only the head"
        )
    face, picture = max(found, key=lambda pair: pair[0].side)
    if face.landmarks_px is not None:
        return _crop_native(picture, headbox.head_boxes(face.landmarks_px[None])[0])
    return _crop_native(picture, faces.head_boxes_from_faces([face])[0])


def _crop_native(picture: UInt8[np.ndarray, "h w 3"], box: Float[np.ndarray, "4"]) -> UInt8[np.ndarray, "s s 3"]:
    """The crop at the picture's own resolution."""
    return headbox.crop(picture, box, int(box[2] - box[0]))
