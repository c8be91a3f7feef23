"""Which sources can be used, and cutting them into reels; the others get a reason."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from preprocessing.plan import Plan
from preprocessing.reels import FilmSound, Reel
from preprocessing.spans import Span
from tccp.config import FPS, SAMPLES_PER_FRAME
from tccp.files import redacted
from tccp.media import MediaError
from tccp.media.remote import content_hash, local_copy
from tccp.media.sandbox import Decoder

SOUND_MARGIN_FRAMES = FPS
"""Sound kept before and after a reel: for mel windows, and for moving sound that comes early or late."""
_LEAST_REEL_S = 10.0
_WITHOUT_INDEX = 10


def probe_source(source: Span, order: int, plan: Plan, decoder: Decoder) -> Iterator[Reel]:
    """The reels of one source, each with its sound; one after the other, so one is in memory at a time.

    A file that cannot be used is one reel with the reason of its MediaError, or `bad_audio`.
    Raises TccpError where this machine is the trouble: no room for a copy or for the sound.
    """
    try:
        with local_copy(source.path) as path:
            yield from _reels(source, order, plan, decoder, path)
    except MediaError as error:
        yield Reel(source.set_aside(error.reason, f"{redacted(source.path)}: {error.problem}"), order)


def _reels(source: Span, order: int, plan: Plan, decoder: Decoder, path: Path) -> Iterator[Reel]:
    info = decoder.probe(path)
    if not info.has_video:
        raise MediaError(path, "no_video", "has no video; clips are cut from films with picture and sound")
    source = replace(source, source_hash=content_hash(path), width=info.width, height=info.height)
    source = replace(source, num_frames=info.num_frames)
    if not info.has_audio:
        text = f"{redacted(source.path)}: has no sound; training needs a film in which somebody is heard"
        yield Reel(source.set_aside("no_audio", text), order)
        return
    with decoder.sound(path) as sound:
        heard = min(info.num_frames, sound.num_frames)
        usable = (min(info.first_frame, heard), heard)
        for first, stop in reel_edges(info.num_frames, plan.reel_s, info.seeks):
            low = max(first - SOUND_MARGIN_FRAMES, 0)
            samples = sound.samples[low * SAMPLES_PER_FRAME : (stop + SOUND_MARGIN_FRAMES) * SAMPLES_PER_FRAME]
            span = replace(source.cut(first, stop), warnings=tuple(sound.warnings))
            share = (stop - first) / max(info.num_frames, 1)
            yield Reel(span, order, usable, FilmSound(to_pcm(samples), low), share=share)


def reel_edges(num_frames: int, reel_s: float, seeks: bool) -> list[tuple[int, int]]:
    """[first, stop) of each reel of a film: about equally long, none shorter than ten seconds but a film that is.

    seeks: whether decoding can begin anywhere. Where a container has no index, to begin in the middle is to decode all
    that comes before: such a film has reels ten times as long, so that few of them pay for it, and memory still does
    not follow its length.
    """
    longest = max(round(max(reel_s, _LEAST_REEL_S) * FPS), 1) * (1 if seeks else _WITHOUT_INDEX)
    count = max(-(-num_frames // longest), 1)
    edges = [num_frames * part // count for part in range(count + 1)]
    return list(itertools.pairwise(edges))


def to_pcm(samples: np.ndarray) -> np.ndarray:
    """Float samples, -1..1, as int16; int16 as they are."""
    if samples.dtype == np.int16:
        return np.array(samples)
    return np.clip(np.rint(samples * 32768), -32768, 32767).astype(np.int16)
