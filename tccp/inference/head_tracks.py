"""Where the head is in a scene: from a mask film, a box or track file, RoundTable's truth, or a face detector.

All of them end in the same square crop boxes that training uses (`headbox.crop_box_from_mask`).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Float32, UInt8

from tccp import faces, headbox
from tccp.config import FPS
from tccp.errors import TccpError
from tccp.media import MediaError, MediaInfo, probe, read_frames
from tccp.media.shots import CONTEXT_FRAMES, CutFinder
from tccp.roundtable import read_truth
from tccp.sequences import true_runs

Point = tuple[float, float]
OnFrame = Callable[[], object]
_MASK_LEVEL = 127
_LARGEST = 4.0  # side of a head box over the longer side of the picture: beyond it, something else was meant


@dataclass(frozen=True)
class HeadTrack:
    """Where one person's head is in a scene.

    boxes: in scene pixels, NaN where the person is away. cuts: the frames at which a shot begins; None where nobody has
    looked for them.
    """

    boxes: Float32[np.ndarray, "f 4"]
    cuts: frozenset[int] | None = None

    def box(self, frame: int) -> Float32[np.ndarray, "4"] | None:
        box = self.boxes[frame]
        return box if np.isfinite(box).all() else None


def _outside(boxes: Float[np.ndarray, "f 4"], width: int, height: int) -> Bool[np.ndarray, "f"]:
    """Boxes that touch no pixel of the picture."""
    return (boxes[:, 2] <= 0) | (boxes[:, 3] <= 0) | (boxes[:, 0] >= width) | (boxes[:, 1] >= height)


def _checked(track: HeadTrack, scene: MediaInfo, given: str) -> HeadTrack:
    """Raises TccpError unless the track fits the scene: as many frames, every box in the picture at least in part."""
    if len(track.boxes) != scene.num_frames:
        raise TccpError(
            f"{given} has {len(track.boxes)} frames, {scene.path} has {scene.num_frames} at {FPS} fps: give as many"
        )
    present = np.isfinite(track.boxes).all(1)
    if not present.any():
        raise TccpError(f"{given} has no head in any frame of {scene.path}: give one where the head is to be seen")
    boxes = track.boxes[present]
    outside = _outside(boxes, scene.width, scene.height)
    if outside.any():
        raise _outside_error(boxes[outside][0], scene.width, scene.height, given)
    return track


def _outside_error(box: Float[np.ndarray, "4"], width: int, height: int, given: str) -> TccpError:
    return TccpError(
        f"{given}: box {np.round(box, 1).tolist()} is outside the picture of {width}x{height} pixels; "
        "boxes are x0,y0,x1,y1 in pixels of the upright picture"
    )


def square_box(box: Float[np.ndarray, "4"], width: int, height: int, given: str) -> Float32[np.ndarray, "4"]:
    """Any box as the crop box of its mask: square, with whole corners. It may reach beyond the picture.

    width, height: of the picture. Raises TccpError, which names `given`, for what is no box or lies outside.
    """
    sides = box[2:] - box[:2]
    if not np.isfinite(box).all() or sides.min() < 2 or sides.max() > _LARGEST * max(width, height):
        raise TccpError(
            f"{given}: {np.round(box, 2).tolist()} is no head box in a picture of {width}x{height}: give "
            "x0,y0,x1,y1 in pixels with x0 < x1 and y0 < y1"
        )
    if _outside(box[None], width, height).any():
        raise _outside_error(box, width, height, given)
    # One pixel of room on every side, so that nothing is taken for a mask cut by the picture's border.
    origin = np.floor(box[:2]) - 1
    side = int(np.ceil((box[2:] - origin).max())) + 1
    square = headbox.crop_box_from_mask(headbox.mask_from_box(box - np.tile(origin, 2), side, side))
    assert square is not None
    return (square + np.tile(origin, 2)).astype(np.float32)


def find_cuts(scene: MediaInfo, num_frames: int | None = None, on_frame: OnFrame = lambda: None) -> frozenset[int]:
    """The frames at which a shot begins, but the first, looked for in the first `num_frames`."""
    needed = scene.num_frames if num_frames is None else num_frames
    finder = CutFinder()
    cuts: set[int] = set()
    for i, frame in enumerate(read_frames(scene.path, num_frames=min(needed + CONTEXT_FRAMES, scene.num_frames))):
        cuts.update(finder.add(frame))
        if i < needed:
            on_frame()
    cuts.update(finder.finish())
    return frozenset(cuts)


def track_from_boxes(scene: MediaInfo, given: str) -> HeadTrack:
    """`x0,y0,x1,y1` for all frames, or a JSON file: {"boxes": [[x0, y0, x1, y1] or null, ...], "cuts": [frame, ...]}.

    Raises TccpError for what is neither, and for boxes outside the picture.
    """
    try:
        numbers = [float(part) for part in given.split(",")]
    except ValueError:
        return _track_from_file(scene, Path(given))
    if len(numbers) != 4:
        raise TccpError(f"--box {given}: four numbers are needed, x0,y0,x1,y1 in pixels")
    box = square_box(np.array(numbers), scene.width, scene.height, f"--box {given}")
    return HeadTrack(np.tile(box, (scene.num_frames, 1)))


def _track_from_file(scene: MediaInfo, path: Path) -> HeadTrack:
    try:
        record = json.loads(path.read_text())
        rows = record["boxes"]
        cuts = frozenset(int(cut) for cut in record["cuts"]) if "cuts" in record else None
        boxes = np.full((len(rows), 4), np.nan, np.float32)
        for i, row in enumerate(rows):
            if row is not None:
                box = np.array(row, np.float64).reshape(4)
                boxes[i] = square_box(box, scene.width, scene.height, f"{path}, frame {i}")
    except TccpError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TccpError(
            f"{path} is neither a box nor a track file ({type(error).__name__}: {error}): give x0,y0,x1,y1 or JSON "
            'like {"boxes": [[x0, y0, x1, y1], null, ...]}'
        ) from None
    return _checked(HeadTrack(boxes, cuts), scene, str(path))


def track_from_truth(scene: MediaInfo) -> HeadTrack:
    """From the truth file that `tccp synth` wrote beside the film."""
    truth = read_truth(scene.path)
    return _checked(HeadTrack(truth.head_box, frozenset()), scene, f"the truth of {scene.path}")


def track_from_mask(scene: MediaInfo, path: Path, num_frames: int | None = None) -> HeadTrack:
    """From a mask film of the scene's size, bright where the head is to be; frames without a mask pass through.

    num_frames: how many frames will be needed; of the others nothing is read.
    Raises TccpError unless it fits the scene in size and length.
    """
    info = probe(path)
    if not info.has_video:
        raise MediaError(path, "no_video", "the mask has no pictures; give a film that is bright where the head is")
    if (info.width, info.height) != (scene.width, scene.height):
        raise TccpError(
            f"mask {path} is {info.width}x{info.height}, {scene.path} {scene.width}x{scene.height}: make it that size"
        )
    boxes = np.full((info.num_frames, 4), np.nan, np.float32)
    for i, frame in enumerate(read_frames(path, num_frames=min(num_frames or info.num_frames, info.num_frames))):
        box = headbox.crop_box_from_mask(_is_masked(frame))
        if box is not None:
            boxes[i] = box
    return _checked(HeadTrack(boxes), scene, f"mask {path}")


def _is_masked(frame: UInt8[np.ndarray, "h w 3"]) -> Bool[np.ndarray, "h w"]:
    return frame.mean(axis=2) > _MASK_LEVEL


def track_from_detector(
    scene: MediaInfo,
    backend: faces.FaceBackend,
    choose: Point | None = None,
    num_frames: int | None = None,
    on_frame: OnFrame = lambda: None,
) -> HeadTrack:
    """From a face detector: in each shot the person who is there most, or the one at `choose` (x, y in pixels).

    num_frames: how many frames will be needed; the track has no more.
    Raises TccpError if nobody is found.
    """
    needed = scene.num_frames if num_frames is None else num_frames
    finder = CutFinder()
    found: list[list[faces.Face]] = []
    cuts: set[int] = set()
    for i, frame in enumerate(read_frames(scene.path, num_frames=min(needed + CONTEXT_FRAMES, scene.num_frames))):
        cuts.update(finder.add(frame))
        if i < needed:
            found.append(backend.detect(frame))
            on_frame()
    cuts = {cut for cut in cuts | set(finder.finish()) if cut < needed}
    boxes = np.full((len(found), 4), np.nan, np.float32)
    edges = [0, *sorted(cuts), len(found)]
    for start, stop in itertools.pairwise(edges):
        person = faces.track(found[start:stop], choose=choose)
        present = np.array([face is not None for face in person], bool)
        if present.any():
            shot = _shot_boxes(person)
            shot[~_bridged(present)] = np.nan
            shot[_outside(shot, scene.width, scene.height)] = np.nan  # walked out of the picture
            boxes[start:stop] = shot
    if not np.isfinite(boxes).any():
        raise TccpError(
            f"no face found in {scene.path} with {backend.name}: give the place of the head with --box or --mask"
        )
    return HeadTrack(boxes, frozenset(cuts))


def _shot_boxes(person: list[faces.Face | None]) -> Float32[np.ndarray, "f 4"]:
    """Head boxes of one person in one shot, also where he is away (interpolated)."""
    points = np.full((len(person), 68, 2), np.nan, np.float32)
    for i, face in enumerate(person):
        if face is not None and face.landmarks_px is not None:
            points[i] = face.landmarks_px
    if np.isfinite(points).any():
        return headbox.head_boxes(points).copy()
    return faces.head_boxes_from_faces(person).copy()


def _bridged(present: Bool[np.ndarray, "f"], longest: int = FPS // 2) -> Bool[np.ndarray, "f"]:
    """Presence with gaps of up to `longest` frames closed: a detector that blinks does not end a chain."""
    filled = present.copy()
    for start, stop in true_runs(present, max_gap=longest):
        filled[start:stop] = True
    return filled
