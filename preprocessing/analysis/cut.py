"""Runs of a person who speaks to clips of bounded length, with the frames their identity pictures come from."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from preprocessing.analysis.identity import Place, choose_places
from preprocessing.spans import Span
from tccp.config import FPS
from tccp.errors import TccpError

_HELD_OUT = 4  # frames kept back for the identity picture where a run is too short for two clips


MIN_CLIP_S = 0.64


def cut_clips(run: Span, seen: Sequence[Place], max_clip_s: float = 5.0, min_clip_s: float = MIN_CLIP_S) -> list[Span]:
    """A span with head boxes, cut into clips of `min_clip_s` to `max_clip_s` seconds, and what is left over.

    Clips of a run are about equally long. seen: where else its person is to be seen, for identity pictures. A run whose
    person is seen nowhere else makes at least two clips where it can, for each takes its pictures from outside
    itself; a shorter one keeps a few frames back. The parts cover the run's frames exactly once.
    Raises TccpError if max_clip_s is too short to divide any run, or min_clip_s shorter than a frame.
    """
    min_frames, max_frames = clip_frames(min_clip_s, max_clip_s)
    given = run.identity_path is not None
    alone = not any(not run.start_frame <= place.frame < run.stop_frame for place in seen)
    parts = -(-run.num_frames // max_frames)
    length = run.num_frames
    if alone and not given and parts == 1:
        if run.num_frames >= 2 * min_frames:
            parts = 2
        else:
            length = max(run.num_frames - _HELD_OUT, min(run.num_frames - 1, min_frames))
    if length < min_frames:
        needed = f"{min_frames}" if given else f"{min_frames} and one for identity"
        text = f"{run.num_frames} frames of a speaking face in a row; a clip needs {needed}"
        return [run.set_aside("too_short", text)]
    edges = [run.start_frame + length * part // parts for part in range(parts + 1)]
    clips = []
    for start, stop in itertools.pairwise(edges):
        clip = run.cut(start, stop)
        clips.append(clip if given else _with_identity(clip, seen))
    if length < run.num_frames:
        held = run.cut(run.start_frame + length, run.stop_frame)
        clips.append(held.set_aside("identity", "kept back for the identity picture of the clip before"))
    return clips


def clip_frames(min_clip_s: float, max_clip_s: float) -> tuple[int, int]:
    """The shortest and the longest clip, in frames. Raises TccpError as `cut_clips`."""
    for name, value in (("min_clip_s", min_clip_s), ("max_clip_s", max_clip_s)):
        if not math.isfinite(value):
            raise TccpError(f"{name} {value}: give a number of seconds")
    min_frames, max_frames = math.ceil(min_clip_s * FPS - 1e-6), int(max_clip_s * FPS + 1e-6)
    if min_frames < 1:
        raise TccpError(f"min_clip_s {min_clip_s:g} is too short: give at least {1 / FPS:g} seconds, one frame")
    if max_frames < 2 * min_frames:
        least = 2 * min_frames / FPS
        raise TccpError(f"max_clip_s {max_clip_s:g} is too short: give at least {least:g} seconds, twice the shortest")
    return min_frames, max_frames


def _with_identity(clip: Span, seen: Sequence[Place]) -> Span:
    places = choose_places(seen, clip.start_frame, clip.stop_frame)
    if not places:
        return clip.set_aside("no_identity", "no frame outside the clip shows the person")
    boxes = np.array([place.box for place in places], np.float32)
    return replace(clip, identity_frames=tuple(place.frame for place in places), identity_box=boxes)
