"""Converts clip rows to training windows.

Jitter moves the mask, the face crop and the landmarks together, and the scene is masked before any other step. A clip
has several jittered views, numbered from 0; the setting `headbox.draws` is their number in the latent cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float32, UInt8

from tccp import headbox, landmarks
from tccp.clips.clip_table import STORED_MARGIN, Clip, clip_from_row, decode_still
from tccp.clips.order import window_starts
from tccp.config import SAMPLES_PER_FRAME, HeadBoxSettings, Settings
from tccp.errors import TccpError
from tccp.media import mel as audio
from tccp.seeds import rng_seed

VIEW_VERSION = 2
"""Increased when `view` gives another view of a clip, and no other version in VIEW_VERSIONS says so."""
VIEW_VERSIONS = {"view": VIEW_VERSION, "drawing": landmarks.DRAWING_VERSION, "mel": audio.MEL_VERSION}
"""Versions of the code that makes a view. Caches of what is computed from views are keyed by them."""
_INT16_FULL_SCALE = 32768.0
_FRAME_FIELDS = ("face", "landmark_pictures", "masked_scene", "landmarks", "mask_box", "known", "inside", "mel")


@dataclass(frozen=True, eq=False)
class ClipView:
    """Consecutive frames of a clip in one jittered view; `s` = picture_px, pictures are uint8 RGB.

    landmarks: positions in `face`, 0..1. known: whether they were detected, not interpolated over a gap. inside: the
    part of `face` that is in the film's picture (`headbox.inside_picture`); the rest is filled. mask_box: the jittered
    head box, in pixels of the fitted scene; `masked_scene` is masked there. mel: the networks' audio window of each
    frame.
    """

    face: UInt8[np.ndarray, "f s s 3"]
    landmark_pictures: UInt8[np.ndarray, "f s s 3"]
    masked_scene: UInt8[np.ndarray, "f s s 3"]
    landmarks: Float32[np.ndarray, "f 68 2"]
    mel: Float32[np.ndarray, "f 80 16"]
    identity: UInt8[np.ndarray, "s s 3"]
    mask_box: Float32[np.ndarray, "f 4"]
    known: Bool[np.ndarray, "f"]
    inside: Float32[np.ndarray, "f 4"]


def view(
    clip: Clip, settings: Settings, jitter: int | None, seed: int, start_frame: int = 0, num_frames: int | None = None
) -> ClipView:
    """The training data of `num_frames` frames of a clip from `start_frame` on (default: all frames to its end).

    jitter: number of the jittered view. Its random numbers depend on (seed, clip_id, jitter) only, not on the frames.
    None: leaves the head box unchanged and takes the first identity picture. If `mirrored(settings, jitter)`, left and
    right are exchanged everywhere.
    Raises TccpError if the clip was preprocessed at another picture size, if the jitter exceeds the stored pictures, or
    if the frames are not in the clip.
    """
    size = settings.picture_px
    _check(clip, settings)
    stop = clip.num_frames if num_frames is None else start_frame + num_frames
    if not 0 <= start_frame < stop <= clip.num_frames:
        raise TccpError(f"frames {start_frame} to {stop} are not in clip {clip.clip_id} of {clip.num_frames} frames")
    if jitter is None:
        boxes, identity = clip.head_box, clip.identity[0]
    else:
        rng = np.random.default_rng(rng_seed(seed, "jitter", clip.clip_id, jitter))
        boxes = headbox.jitter(clip.head_box, settings.headbox, rng)
        identity = clip.identity[int(rng.integers(len(clip.identity)))]
    frames = slice(start_frame, stop)
    boxes, head_boxes = boxes[frames], clip.head_box[frames]

    fit = headbox.SceneFit(clip.source_width, clip.source_height, size)
    mask_box = fit.boxes(boxes)
    scenes = headbox.mask_scene(np.stack([decode_still(still) for still in clip.scene[frames]]), mask_box)
    inside = np.stack([headbox.inside_picture(box, clip.source_width, clip.source_height) for box in boxes])
    faces = [
        headbox.mark_outside(headbox.crop(picture, _in_still(box, stored, picture.shape[0]), size, True), within)
        for picture, box, stored, within in zip(
            map(decode_still, clip.face[frames]), boxes, clip.stored_box[frames], inside, strict=True
        )
    ]
    points, face, person = _rescale(clip.landmarks[frames], head_boxes, boxes), np.stack(faces), decode_still(identity)
    if mirrored(settings, jitter):
        points = (points[:, landmarks.MIRROR] * (-1, 1) + (1, 0)).astype(np.float32)
        face, scenes, person = (np.ascontiguousarray(picture[..., ::-1, :]) for picture in (face, scenes, person))
        mask_box = np.stack([size - mask_box[:, 2], mask_box[:, 1], size - mask_box[:, 0], mask_box[:, 3]], axis=1)
        inside = np.stack([1 - inside[:, 2], inside[:, 1], 1 - inside[:, 0], inside[:, 3]], axis=1)
    return ClipView(
        face=face,
        landmark_pictures=landmarks.draw(points, size),
        masked_scene=scenes,
        landmarks=points,
        mel=_mel(clip, start_frame, stop - start_frame),
        identity=person,
        mask_box=mask_box,
        known=clip.landmark_confidence[frames] > 0,
        inside=inside,
    )


def mirrored(settings: Settings, jitter: int | None) -> bool:
    """Whether this jittered view shows the clip mirrored: every second one, if the settings say so."""
    return settings.headbox.mirror and jitter is not None and jitter % 2 == 1


def _check(clip: Clip, settings: Settings) -> None:
    if clip.picture_px != settings.picture_px:
        raise TccpError(
            f"clip {clip.clip_id} was preprocessed at picture_px={clip.picture_px}, these settings have "
            f"{settings.picture_px}: preprocess again with the same preset"
        )
    if (reach := jitter_reach(settings.headbox)) > STORED_MARGIN:
        raise TccpError(
            f"headbox jitter reaches {reach:.12g} head boxes, stored pictures {STORED_MARGIN}: "
            f"lower headbox.jitter_center or headbox.jitter_size"
        )


def jitter_reach(settings: HeadBoxSettings) -> float:
    """Side of the smallest box around the head box's centre that contains every jittered box, in head-box sides."""
    return 1 + settings.jitter_size + 2 * settings.jitter_center


def _in_still(
    box: Float32[np.ndarray, "4"], stored: Float32[np.ndarray, "4"], side_px: int
) -> Float32[np.ndarray, "4"]:
    """Converts a box in source pixels to pixels of the still of box `stored`, which is `side_px` wide."""
    origin = np.tile(stored[:2], 2)
    return ((box - origin) * (side_px / (stored[2] - stored[0]))).astype(np.float32)


def _rescale(
    points: Float32[np.ndarray, "f 68 2"], old: Float32[np.ndarray, "f 4"], new: Float32[np.ndarray, "f 4"]
) -> Float32[np.ndarray, "f 68 2"]:
    """Converts points relative to boxes `old` (0..1) to points relative to boxes `new` (0..1)."""
    source = old[:, None, :2] + points * (old[:, None, 2:] - old[:, None, :2])
    return ((source - new[:, None, :2]) / (new[:, None, 2:] - new[:, None, :2])).astype(np.float32)


def _mel(clip: Clip, start_frame: int, num_frames: int) -> Float32[np.ndarray, "f 80 16"]:
    samples, first = clip_sound(clip)
    return audio.mel_windows(samples, first + start_frame, num_frames)


def clip_sound(clip: Clip) -> tuple[Float32[np.ndarray, " samples"], int]:
    """A clip's sound with its context, -1..1, and the frame in it at which the clip itself starts."""
    pcm = np.concatenate([clip.audio_before, clip.audio, clip.audio_after])
    return pcm.astype(np.float32) / _INT16_FULL_SCALE, len(clip.audio_before) // SAMPLES_PER_FRAME


def clip_hash(clip_id: str) -> int:
    """Converts a clip id to a non-negative int64, for columns that cannot hold strings."""
    return rng_seed("clip", clip_id)


def windows(
    batch: pa.Table, settings: Settings, window: int, stride: int, seed: int = 0, jitters: Sequence[int | None] = (0,)
) -> dict[str, np.ndarray]:
    """Training windows of a batch of clip rows: every window of every clip, once for each jittered view.

    Columns for n windows of f = `window` frames, s = picture_px: face, landmark_pictures, masked_scene uint8
    (n f s s 3); landmarks float32 (n f 68 2); mask_box float32 (n f 4), in pixels of the scene; known bool (n f) and
    inside float32 (n f 4), as in `ClipView`; mel float32 (n f 80 16); identity uint8 (n s s 3); clip_hash int64 (n);
    start_frame and jitter int32 (n), jitter -1 for None; and lips uint8 (n f l l 3), l = lips.size_px, if the rows have
    a column `lips`. The shapes are fixed even if n is 0.
    A pure function, which Ray Data calls with `map_batches(windows, fn_kwargs=..., batch_format="pyarrow")`.
    """
    size = settings.picture_px
    pictures = ((window, size, size, 3), np.uint8)
    layout: dict[str, tuple[tuple[int, ...], type]] = {
        "face": pictures,
        "landmark_pictures": pictures,
        "masked_scene": pictures,
        "landmarks": ((window, 68, 2), np.float32),
        "mask_box": ((window, 4), np.float32),
        "known": ((window,), np.bool_),
        "inside": ((window, 4), np.float32),
        "mel": ((window, 80, 16), np.float32),
        "identity": ((size, size, 3), np.uint8),
        "clip_hash": ((), np.int64),
        "start_frame": ((), np.int32),
        "jitter": ((), np.int32),
    }
    lips_px = settings.lips.size_px
    if "lips" in batch.column_names:
        layout["lips"] = ((window, lips_px, lips_px, 3), np.uint8)
    columns: dict[str, list] = {name: [] for name in layout}
    for row in range(batch.num_rows):
        clip = clip_from_row(batch, row)
        starts = window_starts(clip.num_frames, window, stride)
        for jitter in jitters if starts else ():
            whole = view(clip, settings, jitter, seed)
            lips = None
            if "lips" in layout:
                stored = np.frombuffer(batch.column("lips")[row].as_py(), np.uint8)
                lips = stored.reshape(clip.num_frames, lips_px, lips_px, 3)
                lips = lips[..., ::-1, :] if mirrored(settings, jitter) else lips
            for start in starts:
                if lips is not None:
                    columns["lips"].append(lips[start : start + window])
                for name in _FRAME_FIELDS:
                    columns[name].append(getattr(whole, name)[start : start + window])
                columns["identity"].append(whole.identity)
                columns["clip_hash"].append(clip_hash(clip.clip_id))
                columns["start_frame"].append(start)
                columns["jitter"].append(-1 if jitter is None else jitter)
    return {
        name: np.asarray(columns[name], dtype).reshape(len(columns[name]), *shape)
        for name, (shape, dtype) in layout.items()
    }
