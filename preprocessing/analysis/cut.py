"""Cuts spans of a speaking person into clips of bounded length and assigns frames for their identity pictures."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from preprocessing.analysis.identity import Sighting, choose_sightings
from preprocessing.reasons import set_aside
from preprocessing.spans import Span
from tccp.config import FPS
from tccp.errors import TccpError
from tccp.faces import MIN_STRETCH_FRAMES

_RESERVED_FRAMES = 4  # kept out of the clip for its identity picture, where a span is too short for two clips
MIN_CLIP_S = MIN_STRETCH_FRAMES / FPS


def cut_clips(
    span: Span, sightings: Sequence[Sighting], max_clip_s: float = 5.0, min_clip_s: float = MIN_CLIP_S
) -> list[Span]:
    """Cuts a span with head boxes into clips of `min_clip_s` to `max_clip_s` seconds, and parts that are set aside.

    The parts cover the span's frames exactly once; its clips are about equally long. sightings: all frames of the
    source that show the person, for identity pictures. Identity pictures come from outside their clip: if the person
    is seen nowhere outside the span, it is cut into at least two clips, or, if it is too short for that, a few frames
    of it are reserved for the identity picture.
    Raises TccpError if max_clip_s is too short to divide every span, or min_clip_s shorter than a frame.
    """
    min_frames, max_frames = clip_frames(min_clip_s, max_clip_s)
    has_identity = span.identity_path is not None
    seen_outside = any(not span.start_frame <= sighting.frame < span.stop_frame for sighting in sightings)
    parts = -(-span.num_frames // max_frames)
    length = span.num_frames
    if not seen_outside and not has_identity and parts == 1:
        if span.num_frames >= 2 * min_frames:
            parts = 2
        else:
            length = max(span.num_frames - _RESERVED_FRAMES, min(span.num_frames - 1, min_frames))
    if length < min_frames:
        return [set_aside(span, "too_short")]
    edges = [span.start_frame + length * part // parts for part in range(parts + 1)]
    clips = []
    for start, stop in itertools.pairwise(edges):
        clip = span.cut(start, stop)
        clips.append(clip if has_identity else _with_identity(clip, sightings))
    if length < span.num_frames:
        clips.append(set_aside(span.cut(span.start_frame + length, span.stop_frame), "identity"))
    return clips


def clip_frames(min_clip_s: float, max_clip_s: float) -> tuple[int, int]:
    """Numbers of frames of the shortest and of the longest clip. Raises TccpError as `cut_clips`."""
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


def _with_identity(clip: Span, sightings: Sequence[Sighting]) -> Span:
    chosen = choose_sightings(sightings, clip.start_frame, clip.stop_frame)
    if not chosen:
        return set_aside(clip, "no_identity")
    boxes = np.array([sighting.box for sighting in chosen], np.float32)
    return replace(clip, identity_frames=tuple(sighting.frame for sighting in chosen), identity_box=boxes)
