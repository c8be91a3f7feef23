"""Head tracks of a scene, from a mask film, a box, a track file, RoundTable's truth, or a face detector.

Every source gives square crop boxes by the rule of training (`headbox.crop_box_from_mask`).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Float32, UInt8

from tccp import faces, headbox
from tccp.config import FPS
from tccp.errors import TccpError
from tccp.media import MediaError, MediaInfo
from tccp.media.sandbox import Decoder
from tccp.media.shots import CONTEXT_FRAMES, CutFinder
from tccp.roundtable import read_truth
from tccp.strict_json import parse_json

Point = tuple[float, float]
Reason = Literal["before", "absent", "after", "too_short", "left_picture"]
"""Why a frame has no head box."""
OnFrame = Callable[[], object]
_MASK_LEVEL = 127
_LEAST_SEEN_SHARE = 0.5  # of a stretch; preprocessing is stricter, because there landmarks become training targets
_LEAST_SIDE_PX = 2
_MAX_SIDE_RATIO = 4.0  # longest side of a head box, relative to the picture's longer side


@dataclass(frozen=True)
class HeadTrack:
    """The head boxes of one person in the frames of a scene.

    boxes: x0, y0, x1, y1 in scene pixels; NaN in frames without the person. cuts: frames at which a new shot begins;
    None if the source does not give them. reasons: why frames have no box, if it is not that the person is absent.
    """

    boxes: Float32[np.ndarray, "f 4"]
    cuts: frozenset[int] | None = None
    reasons: Mapping[int, Reason] = field(default_factory=dict)

    def box(self, frame: int) -> Float32[np.ndarray, "4"] | None:
        """The box in a frame; None if the person is absent."""
        box = self.boxes[frame]
        return box if np.isfinite(box).all() else None

    def reason(self, frame: int) -> Reason | None:
        """Why a frame has no box; None if it has one."""
        if self.box(frame) is not None:
            return None
        if frame in self.reasons:
            return self.reasons[frame]
        first, last = self._span
        return "before" if frame < first else "after" if frame > last else "absent"

    @functools.cached_property
    def _span(self) -> tuple[int, int]:
        """The first and the last frame with a box. Without any box, every frame counts as between them."""
        present = np.flatnonzero(np.isfinite(self.boxes).all(1))
        return (int(present[0]), int(present[-1])) if len(present) else (0, len(self.boxes))


def _outside(boxes: Float[np.ndarray, "f 4"], width: int, height: int) -> Bool[np.ndarray, "f"]:
    """Whether each box lies entirely outside the picture."""
    return (boxes[:, 2] <= 0) | (boxes[:, 3] <= 0) | (boxes[:, 0] >= width) | (boxes[:, 1] >= height)


def _check_track(track: HeadTrack, scene: MediaInfo, source: str) -> HeadTrack:
    """Returns the track if it fits the scene: the same number of frames, and boxes that overlap the picture.

    Raises TccpError, whose message starts with `source`, otherwise.
    """
    if len(track.boxes) != scene.num_frames:
        raise _other_length(source, len(track.boxes), scene)
    present = np.isfinite(track.boxes).all(1)
    if not present.any():
        raise TccpError(f"{source} has no head in any frame of {scene.path}: give one with at least one head")
    boxes = track.boxes[present]
    outside = _outside(boxes, scene.width, scene.height)
    if outside.any():
        raise _outside_error(boxes[outside][0], scene.width, scene.height, source)
    return track


def _other_length(source: str, frames: int, scene: MediaInfo) -> TccpError:
    return TccpError(f"{source} has {frames} frames, {scene.path} has {scene.num_frames} at {FPS} fps: give as many")


def _outside_error(box: Float[np.ndarray, "4"], width: int, height: int, source: str) -> TccpError:
    return TccpError(
        f"{source}: box {np.round(box, 1).tolist()} is outside the picture of {width}x{height} pixels; "
        "boxes are x0,y0,x1,y1 in pixels of the upright picture"
    )


def square_box(box: Float[np.ndarray, "4"], width: int, height: int, source: str) -> Float32[np.ndarray, "4"]:
    """The crop box of a box-shaped mask: square, with integer corners. It may extend beyond the picture.

    box: x0, y0, x1, y1 in pixels. width, height: of the picture. source: the option or file that the box comes from.
    Raises TccpError, whose message starts with `source`, if the box is invalid or lies outside the picture.
    """
    if problem := _box_problem(box, width, height):
        shown = ", ".join(f"{value:.6g}" for value in box)
        raise TccpError(f"{source}: [{shown}] is no head box in a picture of {width}x{height}: {problem}")
    if _outside(box[None], width, height).any():
        raise _outside_error(box, width, height, source)
    # A margin of one pixel on every side, so that the mask does not count as cut by the picture's border.
    origin = np.floor(box[:2]) - 1
    side = int(np.ceil((box[2:] - origin).max())) + 1
    square = headbox.crop_box_from_mask(headbox.mask_from_box(box - np.tile(origin, 2), side, side))
    assert square is not None
    return (square + np.tile(origin, 2)).astype(np.float32)


def _box_problem(box: Float[np.ndarray, "4"], width: int, height: int) -> str | None:
    """What is wrong with a box, and what to do; None if nothing is."""
    if not np.isfinite(box).all():
        return "give four finite numbers, x0,y0,x1,y1 in pixels"
    with np.errstate(over="ignore"):
        sides = box[2:] - box[:2]
    if sides.min() <= 0:
        return "give x0,y0,x1,y1 in pixels with x0 < x1 and y0 < y1"
    size = f"it is {sides[0]:.4g}x{sides[1]:.4g} pixels"
    if sides.min() < _LEAST_SIDE_PX:
        return f"{size}; give pixels, not shares of the picture, and at least {_LEAST_SIDE_PX} on each side"
    most = _MAX_SIDE_RATIO * max(width, height)
    if sides.max() > most:
        return f"{size}; give at most {most:g} on each side, {_MAX_SIDE_RATIO:g} times the picture's longer side"
    return None


def _first_frames(film: MediaInfo, decoder: Decoder, most: int) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
    return decoder.frames(film.path, num_frames=min(most, film.num_frames), copy=False)


def find_cuts(
    scene: MediaInfo, decoder: Decoder, num_frames: int | None = None, on_frame: OnFrame = lambda: None
) -> frozenset[int]:
    """The frames, except frame 0, at which a new shot begins.

    num_frames: search only this many frames (default: all) and the few that the last decisions need. on_frame: called
    after each of the `num_frames`.
    """
    needed = scene.num_frames if num_frames is None else num_frames
    finder = CutFinder()
    cuts: set[int] = set()
    for i, frame in enumerate(_first_frames(scene, decoder, needed + CONTEXT_FRAMES)):
        cuts.update(finder.add(frame))
        if i < needed:
            on_frame()
    cuts.update(finder.finish())
    return frozenset(cuts)


def track_from_boxes(scene: MediaInfo, option: str) -> HeadTrack:
    """A track from the text `x0,y0,x1,y1`, for all frames, or from the path of a JSON file.

    The file holds {"boxes": [[x0, y0, x1, y1] or null, ...], "cuts": [frame, ...]}; `cuts` is optional.
    Raises TccpError if `option` is neither, or if a box is invalid or outside the picture.
    """
    try:
        numbers = [float(part) for part in option.split(",")]
    except ValueError:
        return _track_from_file(scene, Path(option))
    if len(numbers) != 4:
        raise TccpError(f"--box {option}: give four numbers, x0,y0,x1,y1 in pixels, or a JSON track file")
    box = square_box(np.array(numbers), scene.width, scene.height, f"--box {option}")
    return HeadTrack(np.tile(box, (scene.num_frames, 1)))


def _track_from_file(scene: MediaInfo, path: Path) -> HeadTrack:
    try:
        record = parse_json(path.read_bytes())
        listed = record["boxes"]
        if not isinstance(listed, list):
            raise ValueError("boxes is not a list")
        cuts = _cuts_of(record["cuts"], len(listed)) if "cuts" in record else None
        boxes = np.full((len(listed), 4), np.nan, np.float32)
        for i, value in enumerate(listed):
            if value is not None:
                box = np.array(value, np.float64).reshape(4)
                boxes[i] = square_box(box, scene.width, scene.height, f"{path}, frame {i}")
    except TccpError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise TccpError(
            f"{path} is neither a box nor a track file ({type(error).__name__}: {error}): give x0,y0,x1,y1 or JSON "
            'like {"boxes": [[x0, y0, x1, y1], null, ...]}'
        ) from None
    return _check_track(HeadTrack(boxes, cuts), scene, str(path))


def _cuts_of(listed: object, num_frames: int) -> frozenset[int]:
    """The cuts of a track file. Raises ValueError unless they are frames of the film."""
    if not isinstance(listed, list):
        raise ValueError("cuts is not a list of frames")
    for cut in listed:
        if isinstance(cut, bool) or not isinstance(cut, int) or not 0 <= cut < num_frames:
            raise ValueError(f"cut {cut!r:.40} is not a frame of the film, 0 to {num_frames - 1}")
    return frozenset(listed)


def track_from_truth(scene: MediaInfo) -> HeadTrack:
    """A track from the truth file that `tccp synth` writes beside a film. Raises TccpError unless it fits the scene."""
    truth = read_truth(scene.path)
    return _check_track(HeadTrack(truth.head_box, frozenset()), scene, f"the truth of {scene.path}")


def check_mask(scene: MediaInfo, path: Path, decoder: Decoder) -> MediaInfo:
    """Probes a mask film. Raises as `track_from_mask` does for everything except the pictures."""
    info = decoder.probe(path)
    if not info.has_video:
        raise MediaError(path, "no_video", "the mask has no pictures; give a film that is bright at the head")
    if (info.width, info.height) != (scene.width, scene.height):
        raise TccpError(
            f"mask {path} is {info.width}x{info.height}, {scene.path} {scene.width}x{scene.height}: "
            "give a mask of the scene's size"
        )
    if info.num_frames != scene.num_frames:
        raise _other_length(f"mask {path}", info.num_frames, scene)
    return info


def track_from_mask(scene: MediaInfo, path: Path, decoder: Decoder, num_frames: int | None = None) -> HeadTrack:
    """A track from a mask film of the scene's size, which is bright at the head. Frames without a mask have no box.

    num_frames: read only this many frames (default: all).
    Raises TccpError unless the mask film has the scene's size and length, MediaError if it has no video stream.
    """
    info = check_mask(scene, path, decoder)
    boxes = np.full((info.num_frames, 4), np.nan, np.float32)
    for i, frame in enumerate(_first_frames(info, decoder, num_frames or info.num_frames)):
        box = headbox.crop_box_from_mask(_is_masked(frame))
        if box is not None:
            boxes[i] = box
    return _check_track(HeadTrack(boxes), scene, f"mask {path}")


def _is_masked(frame: UInt8[np.ndarray, "h w 3"]) -> Bool[np.ndarray, "h w"]:
    return frame.mean(axis=2) > _MASK_LEVEL


def track_from_detector(
    scene: MediaInfo,
    backend: faces.FaceBackend,
    decoder: Decoder,
    choose: Point | None = None,
    num_frames: int | None = None,
    on_frame: OnFrame = lambda: None,
) -> HeadTrack:
    """A track from a face detector: in each shot, the person in most frames, or the one at `choose` (x, y in pixels).

    num_frames: length of the track (default: all frames). on_frame: called after each of these frames.
    A person who is seen too briefly or too seldom (`faces.stretches`) is mostly a false detection and gets no box.
    Raises TccpError if no face is found, or none for long enough.
    """
    needed = scene.num_frames if num_frames is None else num_frames
    finder = CutFinder()
    detections: list[list[faces.Face]] = []
    cuts: set[int] = set()
    for i, frame in enumerate(_first_frames(scene, decoder, needed + CONTEXT_FRAMES)):
        cuts.update(finder.add(frame))
        if i < needed:
            detections.append(backend.detect(frame))
            on_frame()
    cuts = {cut for cut in cuts | set(finder.finish()) if cut < needed}
    boxes = np.full((len(detections), 4), np.nan, np.float32)
    reasons: dict[int, Reason] = {}
    edges = [0, *sorted(cuts), len(detections)]
    for start, stop in itertools.pairwise(edges):
        person = faces.track(detections[start:stop], choose=choose)
        present = np.array([face is not None for face in person], bool)
        there = np.zeros(len(person), bool)
        for first, end in faces.stretches(present, _LEAST_SEEN_SHARE, min(faces.MIN_SEEN_FRAMES, len(detections))):
            there[first:end] = True
        reasons |= dict.fromkeys(
            (start + np.flatnonzero(faces.with_gaps_closed(present) & ~there)).tolist(), "too_short"
        )
        if there.any():
            shot = _shot_boxes([face if kept else None for face, kept in zip(person, there, strict=True)])
            outside = _outside(shot, scene.width, scene.height)
            reasons |= dict.fromkeys((start + np.flatnonzero(there & outside)).tolist(), "left_picture")
            shot[~there | outside] = np.nan
            boxes[start:stop] = shot
    if not np.isfinite(boxes).any():
        found = sum(map(bool, detections))
        how = f" for long enough: there is one in {found} of {len(detections)} frames" if found else ""
        raise TccpError(
            f"no face found in {scene.path} with {backend.name}{how}: give the head's position with --box or --mask"
        )
    return HeadTrack(boxes, frozenset(cuts), reasons)


def _shot_boxes(person: list[faces.Face | None]) -> Float32[np.ndarray, "f 4"]:
    """Head boxes of one person in one shot, interpolated in frames without a detection."""
    points = np.full((len(person), 68, 2), np.nan, np.float32)
    for i, face in enumerate(person):
        if face is not None and face.landmarks_px is not None:
            points[i] = face.landmarks_px
    if np.isfinite(points).any():
        return headbox.head_boxes(points).copy()
    return faces.head_boxes_from_faces(person).copy()
