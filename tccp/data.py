"""Clip rows to training windows, and the order in which training takes them.

Two properties hold everywhere here. Pictures: a jitter draw moves the mask, the face crop and the landmarks together,
and the scene is masked before anything else happens to it. Order: which windows step k trains on, and every random
number about them, is a pure function of (seed, window id, epoch); so resuming, streaming and the number of workers
change nothing.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
from jaxtyping import Float32, UInt8

from tccp import audio, headbox, landmarks
from tccp.clip import STORED_MARGIN, Clip, clip_from_row, decode_still
from tccp.config import SAMPLES_PER_FRAME, HeadBoxSettings, Settings, TccpError

_INT16_FULL_SCALE = 32768.0
_Item = TypeVar("_Item")


def rng_seed(*parts: int | str | float | bytes | np.integer | np.floating) -> int:
    """A 63-bit seed from named parts, e.g. `rng_seed(seed, "noise", clip_id, start_frame, epoch)`.

    Stable across processes, machines and versions of Python (BLAKE2b); parts of different types or splits never collide
    by concatenation. Every random draw of the project starts from here.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        if isinstance(part, (bool, np.bool_)):
            raise TypeError("a truth value is no seed part: use a name or a number")
        if isinstance(part, (int, np.integer)):
            tag, data = b"i", str(int(part)).encode()
        elif isinstance(part, (float, np.floating)):
            tag, data = b"f", struct.pack("<d", part)
        elif isinstance(part, str):
            tag, data = b"s", part.encode()
        else:
            tag, data = b"b", part
        digest.update(tag + struct.pack("<q", len(data)) + data)
    return int.from_bytes(digest.digest(), "little") >> 1


class WindowId(NamedTuple):
    """A training window: `window` frames of a clip from `start_frame` of that clip."""

    clip_id: str
    start_frame: int


class PlannedWindow(NamedTuple):
    """A window as one step takes it. Noise, t, mask and dropout draw from (seed, id, epoch)."""

    epoch: int
    id: WindowId


def window_starts(num_frames: int, window: int, stride: int) -> list[int]:
    """First frames of a clip's windows: every `stride` frames, and one more that ends with the clip if any are left."""
    if window < 1 or stride < 1:
        raise TccpError(f"window {window} and stride {stride} must be at least 1 frame")
    starts = list(range(0, num_frames - window + 1, stride))
    if starts and starts[-1] + window < num_frames and stride <= window:
        starts.append(num_frames - window)
    return starts


def window_ids(clip_ids: Iterable[str], num_frames: Iterable[int], window: int, stride: int) -> list[WindowId]:
    """All windows of clips of these lengths; a clip shorter than a window has none."""
    return [
        WindowId(clip_id, start)
        for clip_id, length in zip(clip_ids, num_frames, strict=True)
        for start in window_starts(length, window, stride)
    ]


def plan(ids: Iterable[WindowId], seed: int, epoch: int) -> list[WindowId]:
    """The order of one epoch: every window once, shuffled by (seed, epoch) alone, whatever order `ids` came in."""
    ordered = sorted(ids)
    order = np.random.default_rng(rng_seed(seed, "plan", epoch)).permutation(len(ordered))
    return [ordered[i] for i in order]


def step_slice(
    num_windows: int, step: int, batch_size: int, rank: int = 0, num_ranks: int = 1
) -> list[tuple[int, int]]:
    """(epoch, position in that epoch's plan) of each window that global step `step`, counted from 0, takes.

    Steps run through the epochs without a seam: a batch may end one epoch and begin the next, so no tail is dropped
    and a plan shorter than a batch works. Rank r takes a fixed, contiguous part; the parts of all ranks are the step's
    slice in order. Raises TccpError if there are no windows or the ranks do not divide the batch.
    """
    if num_windows < 1:
        raise TccpError("no training windows: every clip is shorter than the window; preprocess longer footage")
    if batch_size < 1 or batch_size % num_ranks or not 0 <= rank < num_ranks:
        raise TccpError(f"batch_size {batch_size} cannot be divided among {num_ranks} workers (rank {rank})")
    share = batch_size // num_ranks
    first = step * batch_size + rank * share
    return [divmod(position, num_windows) for position in range(first, first + share)]


def shuffled(windows: Iterable[_Item], seed: int, epoch: int, buffer: int) -> Iterator[_Item]:
    """A stream in another order, drawn from (seed, epoch) alone, with at most `buffer` items in memory.

    Where windows come straight from film there is no list of them to plan by: this is their order. The same items in
    the same order give the same order, wherever they come from. Raises TccpError for a buffer below one.
    """
    if buffer < 1:
        raise TccpError(f"shuffle buffer {buffer}: give at least 1")
    rng = np.random.default_rng(rng_seed(seed, "shuffle", epoch))
    held: list[_Item] = []
    for item in windows:
        held.append(item)
        if len(held) > buffer:
            yield held.pop(int(rng.integers(len(held))))
    yield from (held[i] for i in rng.permutation(len(held)))


class TrainingOrder:
    """`plan` and `step_slice` together; keeps the last epochs' plans, which costs time, never changes results."""

    def __init__(self, ids: Iterable[WindowId], seed: int) -> None:
        self.ids = sorted(ids)
        if len(set(self.ids)) != len(self.ids):
            raise TccpError("the same window is listed twice: give each clip table once")
        self.seed = seed
        self._plans: dict[int, list[WindowId]] = {}

    def step(self, step: int, batch_size: int, rank: int = 0, num_ranks: int = 1) -> list[PlannedWindow]:
        """The windows of global step `step` that rank `rank` of `num_ranks` trains on."""
        places = step_slice(len(self.ids), step, batch_size, rank, num_ranks)
        needed = sorted({epoch for epoch, _ in places})
        self._plans = {
            epoch: self._plans[epoch] if epoch in self._plans else plan(self.ids, self.seed, epoch) for epoch in needed
        }
        return [PlannedWindow(epoch, self._plans[epoch][position]) for epoch, position in places]


@dataclass(frozen=True, eq=False)
class ClipView:
    """A stretch of a clip under one jitter draw, `s` = picture_px, uint8 RGB.

    landmarks: 0..1 of the jittered crop, where `face` shows them. mask_box: the jittered head box, pixels of the fitted
    scene; `masked_scene` is filled wherever it reaches. mel: the networks' audio window of each frame.
    """

    face: UInt8[np.ndarray, "f s s 3"]
    landmark_pictures: UInt8[np.ndarray, "f s s 3"]
    masked_scene: UInt8[np.ndarray, "f s s 3"]
    landmarks: Float32[np.ndarray, "f 68 2"]
    mel: Float32[np.ndarray, "f 80 16"]
    identity: UInt8[np.ndarray, "s s 3"]
    mask_box: Float32[np.ndarray, "f 4"]


def view(
    clip: Clip, settings: Settings, draw: int | None, seed: int, start_frame: int = 0, num_frames: int | None = None
) -> ClipView:
    """What training sees of `num_frames` frames of a clip from `start_frame` on (default: all to its end).

    draw: number of the jitter draw, from (seed, clip_id, draw), one for the whole clip however much of it is read; None
    leaves the head box where it is and takes the first identity picture. A draw that is `mirrored` shows everything
    with left and right exchanged.
    Raises TccpError if the clip was preprocessed at another picture size, if the jitter leaves the stored pictures, or
    if the frames are not in the clip.
    """
    size = settings.picture_px
    _check(clip, settings)
    stop = clip.num_frames if num_frames is None else start_frame + num_frames
    if not 0 <= start_frame < stop <= clip.num_frames:
        raise TccpError(f"frames {start_frame} to {stop} are not in clip {clip.clip_id} of {clip.num_frames} frames")
    if draw is None:
        boxes, identity = clip.head_box, clip.identity[0]
    else:
        rng = np.random.default_rng(rng_seed(seed, "jitter", clip.clip_id, draw))
        boxes = headbox.jitter(clip.head_box, settings.headbox, rng)
        identity = clip.identity[int(rng.integers(len(clip.identity)))]
    frames = slice(start_frame, stop)
    boxes, head_boxes = boxes[frames], clip.head_box[frames]

    fit = headbox.SceneFit(clip.source_width, clip.source_height, size)
    mask_box = fit.boxes(boxes)
    scenes = headbox.mask_scene(np.stack([decode_still(still) for still in clip.scene[frames]]), mask_box)
    faces = [
        headbox.crop(picture, _inside(box, stored, picture.shape[0]), size)
        for picture, box, stored in zip(
            map(decode_still, clip.face[frames]), boxes, clip.stored_box[frames], strict=True
        )
    ]
    points, faces_seen, person = (
        _rescale(clip.landmarks[frames], head_boxes, boxes),
        np.stack(faces),
        decode_still(identity),
    )
    if mirrored(settings, draw):
        points = (points[:, landmarks.MIRROR] * (-1, 1) + (1, 0)).astype(np.float32)
        faces_seen, scenes, person = (np.ascontiguousarray(p[..., ::-1, :]) for p in (faces_seen, scenes, person))
        mask_box = np.stack([size - mask_box[:, 2], mask_box[:, 1], size - mask_box[:, 0], mask_box[:, 3]], axis=1)
    return ClipView(
        face=faces_seen,
        landmark_pictures=landmarks.draw(points, size),
        masked_scene=scenes,
        landmarks=points,
        mel=_mel(clip, start_frame, stop - start_frame),
        identity=person,
        mask_box=mask_box,
    )


def mirrored(settings: Settings, draw: int | None) -> bool:
    """Whether this draw shows the clip mirrored."""
    return settings.headbox.mirror and draw is not None and draw % 2 == 1


def _check(clip: Clip, settings: Settings) -> None:
    if clip.picture_px != settings.picture_px:
        raise TccpError(
            f"clip {clip.clip_id} was preprocessed at picture_px={clip.picture_px}, these settings have "
            f"{settings.picture_px}: preprocess again with the same preset"
        )
    if jitter_reach(settings.headbox) > STORED_MARGIN:
        raise TccpError(
            f"headbox jitter reaches {jitter_reach(settings.headbox):.2f} head boxes, stored pictures {STORED_MARGIN}: "
            f"lower headbox.jitter_center or headbox.jitter_size"
        )


def jitter_reach(jitter: HeadBoxSettings) -> float:
    """Side of the smallest box, in head-box sides about the same centre, that holds every jittered box."""
    return 1 + jitter.jitter_size + 2 * jitter.jitter_center


def _inside(box: Float32[np.ndarray, "4"], stored: Float32[np.ndarray, "4"], side_px: int) -> Float32[np.ndarray, "4"]:
    """A box of the source in pixels of the still that shows `stored`."""
    origin = np.tile(stored[:2], 2)
    return ((box - origin) * (side_px / (stored[2] - stored[0]))).astype(np.float32)


def _rescale(
    points: Float32[np.ndarray, "f 68 2"], old: Float32[np.ndarray, "f 4"], new: Float32[np.ndarray, "f 4"]
) -> Float32[np.ndarray, "f 68 2"]:
    """Points in 0..1 of boxes `old`, in 0..1 of boxes `new`."""
    source = old[:, None, :2] + points * (old[:, None, 2:] - old[:, None, :2])
    return ((source - new[:, None, :2]) / (new[:, None, 2:] - new[:, None, :2])).astype(np.float32)


def _mel(clip: Clip, start_frame: int, num_frames: int) -> Float32[np.ndarray, "f 80 16"]:
    samples, first = clip_sound(clip)
    return audio.mel_windows(samples, first + start_frame, num_frames)


def clip_sound(clip: Clip) -> tuple[Float32[np.ndarray, " samples"], int]:
    """A clip's sound with its context, -1..1, and the frame at which the clip itself starts in it."""
    pcm = np.concatenate([clip.audio_before, clip.audio, clip.audio_after])
    return pcm.astype(np.float32) / _INT16_FULL_SCALE, len(clip.audio_before) // SAMPLES_PER_FRAME


def clip_hash(clip_id: str) -> int:
    """A clip id as a non-negative int64, for columns that cannot hold strings."""
    return rng_seed("clip", clip_id)


def windows(
    batch: pa.Table, settings: Settings, window: int, stride: int, seed: int = 0, draws: Sequence[int | None] = (0,)
) -> dict[str, np.ndarray]:
    """Training windows of a batch of clip rows: every window of every clip, once per jitter draw.

    Columns, n windows of f = `window` frames, s = picture_px: face, landmark_pictures, masked_scene uint8 (n f s s 3);
    landmarks float32 (n f 68 2); mask_box float32 (n f 4), pixels of the scene; mel float32 (n f 80 16); identity uint8
    (n s s 3); clip_hash int64, start_frame and draw int32 (n), draw -1 standing for None; and lips uint8 (n f l l 3),
    l = lips.size_px, if the rows have a column `lips`. A pure function: Ray Data calls it unchanged through
    `map_batches(windows, fn_kwargs=..., batch_format="pyarrow")`, and shapes are fixed even where n is 0.
    """
    size = settings.picture_px
    pictures = ((window, size, size, 3), np.uint8)
    layout: dict[str, tuple[tuple[int, ...], type]] = {
        "face": pictures,
        "landmark_pictures": pictures,
        "masked_scene": pictures,
        "landmarks": ((window, 68, 2), np.float32),
        "mask_box": ((window, 4), np.float32),
        "mel": ((window, 80, 16), np.float32),
        "identity": ((size, size, 3), np.uint8),
        "clip_hash": ((), np.int64),
        "start_frame": ((), np.int32),
        "draw": ((), np.int32),
    }
    lips_px = settings.lips.size_px
    if "lips" in batch.column_names:
        layout["lips"] = ((window, lips_px, lips_px, 3), np.uint8)
    columns: dict[str, list] = {name: [] for name in layout}
    for row in range(batch.num_rows):
        clip = clip_from_row(batch, row)
        starts = window_starts(clip.num_frames, window, stride)
        for draw in draws if starts else ():
            whole = view(clip, settings, draw, seed)
            lips = None
            if "lips" in layout:
                stored = np.frombuffer(batch.column("lips")[row].as_py(), np.uint8)
                lips = stored.reshape(clip.num_frames, lips_px, lips_px, 3)
                lips = lips[..., ::-1, :] if mirrored(settings, draw) else lips
            for start in starts:
                if lips is not None:
                    columns["lips"].append(lips[start : start + window])
                for name in ("face", "landmark_pictures", "masked_scene", "landmarks", "mask_box", "mel"):
                    columns[name].append(getattr(whole, name)[start : start + window])
                columns["identity"].append(whole.identity)
                columns["clip_hash"].append(clip_hash(clip.clip_id))
                columns["start_frame"].append(start)
                columns["draw"].append(-1 if draw is None else draw)
    return {
        name: np.asarray(columns[name], dtype).reshape(len(columns[name]), *shape)
        for name, (shape, dtype) in layout.items()
    }
