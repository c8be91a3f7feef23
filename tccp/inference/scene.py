"""The frames to generate: the picture of the scene that each shows, its head box, and the starts of shots."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import UInt8

from tccp.config import FPS
from tccp.errors import TccpError
from tccp.inference.frames import SceneFrame
from tccp.inference.head_tracks import HeadTrack
from tccp.media import MediaInfo
from tccp.media.sandbox import Decoder

Extend = Literal["no", "freeze", "pingpong"]
_HELD_FRAMES = 2  # 80 ms; a block of AAC lasts 21 to 64 ms
_REVERSED_CHUNK = 16  # frames held in memory to play film backwards


def scene_indices(num_scene: int, num_frames: int, extend: Extend, name: str | Path = "scene") -> Iterator[int]:
    """The number of the scene frame that each frame of the generated film shows.

    A scene that is at most two frames shorter holds its last picture: sound often ends a little later, because encoders
    fill up its last block. Raises TccpError if the scene is even shorter and `extend` is "no".
    """
    held = _HELD_FRAMES if extend == "no" else 0
    if num_scene >= num_frames - held or extend == "freeze":
        return (min(i, num_scene - 1) for i in range(num_frames))
    if extend == "no":
        raise TccpError(
            f"{name} lasts {num_scene / FPS:.2f} s and the sound {num_frames / FPS:.2f} s: give a longer scene or "
            "shorter sound, or extend the scene with --extend freeze or --extend pingpong"
        )
    period = max(1, 2 * (num_scene - 1))
    return (min(i % period, period - i % period) for i in range(num_frames))


def _scene_pictures(path: Path, indices: Iterable[int], decoder: Decoder) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
    """The pictures of these frames. Ascending numbers are decoded as a stream, descending ones in short chunks."""
    reader: Iterator[np.ndarray] = iter(())
    next_of_reader, shown_at = -1, -1
    shown: np.ndarray | None = None
    held: dict[int, np.ndarray] = {}
    for index in indices:
        if index == shown_at and shown is not None:
            yield shown
            continue
        if index in held:
            shown = held[index]
        elif index < shown_at:
            first = max(0, index - _REVERSED_CHUNK + 1)
            held = dict(enumerate(decoder.frames(path, first, index - first + 1), first))
            next_of_reader = -1  # the decoder has left the reader's place
            shown = held[index]
        else:
            if next_of_reader != index:
                reader, next_of_reader = decoder.frames(path, index), index
            held = {}
            shown = next(reader)
            next_of_reader += 1
        shown_at = index
        yield shown


def scene_frames(
    path: Path, info: MediaInfo, track: HeadTrack, num_frames: int, extend: Extend, decoder: Decoder, first: int = 0
) -> Iterator[SceneFrame]:
    """The frames to generate, in order, from frame `first` on. `decoder` can do nothing else meanwhile."""
    indices = list(scene_indices(info.num_frames, num_frames, extend, path))
    starts = _shot_starts(indices, track)
    for i, picture in enumerate(_scene_pictures(path, indices[first:], decoder), first):
        yield SceneFrame(i, picture, track.box(indices[i]), starts[i], track.reason(indices[i]))


def shots(path: Path, info: MediaInfo, track: HeadTrack, num_frames: int, extend: Extend) -> list[range]:
    """The uninterrupted stretches of the film that show the person: each becomes a chain of windows."""
    indices = list(scene_indices(info.num_frames, num_frames, extend, path))
    present = [track.box(index) is not None for index in indices]
    found: list[range] = []
    for i, start in enumerate(_shot_starts(indices, track)):
        if present[i] and (start or not present[i - 1]):
            found.append(range(i, i + 1))
        elif present[i]:
            found[-1] = range(found[-1].start, i + 1)
    return found


def _shot_starts(indices: list[int], track: HeadTrack) -> list[bool]:
    """Whether a new shot starts at each frame."""
    # A cut lies between the same two frames when they are played backwards.
    cuts = track.cuts or frozenset()
    return [True, *(a != b and max(a, b) in cuts for a, b in pairwise(indices))]
