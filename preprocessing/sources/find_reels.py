"""Probes sources and cuts them into reels; sources that cannot be used get a reason."""

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
"""Sound that is kept before and after a reel: for mel windows, and for correcting an a/v offset."""
_LEAST_REEL_S = 10.0
_WITHOUT_INDEX = 10  # factor for the length of reels of films without an index


def probe_source(source: Span, order: int, plan: Plan, decoder: Decoder) -> Iterator[Reel]:
    """Yields the reels of one source, each with its sound; one of them is in memory at a time.

    A file that cannot be used gives one reel with the reason of its MediaError, or `bad_audio`.
    Raises TccpError if this machine causes the failure: no space for a copy of the film or for its sound.
    """
    try:
        with local_copy(source.path) as path:
            yield from _reels(source, order, plan, decoder, path)
    except MediaError as error:
        yield Reel(source.set_aside(error.reason, f"{redacted(source.path)}: {error.problem}"), order)


def _reels(source: Span, order: int, plan: Plan, decoder: Decoder, path: Path) -> Iterator[Reel]:
    info = decoder.probe(path)
    if not info.has_video:
        raise MediaError(path, "no_video", "has no video; clips need picture and sound")
    source = replace(source, source_hash=content_hash(path), width=info.width, height=info.height)
    source = replace(source, num_frames=info.num_frames)
    if not info.has_audio:
        text = f"{redacted(source.path)}: has no sound; clips need a film with speech"
        yield Reel(source.set_aside("no_audio", text), order)
        return
    with decoder.sound(path) as sound:
        end = min(info.num_frames, sound.num_frames)
        usable = (min(info.first_frame, end), end)
        for first, stop in reel_edges(info.num_frames, plan.reel_s, info.seeks):
            low = max(first - SOUND_MARGIN_FRAMES, 0)
            samples = sound.samples[low * SAMPLES_PER_FRAME : (stop + SOUND_MARGIN_FRAMES) * SAMPLES_PER_FRAME]
            warnings = (*info.notes, *sound.warnings, *_about_speaker(source))
            span = replace(source.cut(first, stop), warnings=warnings)
            share = (stop - first) / max(info.num_frames, 1)
            yield Reel(span, order, usable, FilmSound(to_pcm(samples), low), share=share)


def _about_speaker(source: Span) -> list[str]:
    """A warning if the manifest's point on the speaker is outside the picture, where no face is."""
    x, y, width, height = source.speaker_x, source.speaker_y, source.width or 0, source.height or 0
    if x is None or y is None or (x < width and y < height):
        return []
    return [f"the manifest's speaker point {x:g}, {y:g} is outside the picture of {width}x{height} pixels"]


def reel_edges(num_frames: int, reel_s: float, seeks: bool) -> list[tuple[int, int]]:
    """[first, stop) of each reel of a film. Reels are about equally long, and at most max(reel_s, 10 s) long.

    seeks: whether decoding can begin anywhere. A film without an index has to be decoded from its beginning to reach a
    reel. Its reels are ten times as long, so that this happens rarely, while memory use stays bounded.
    """
    longest = max(round(max(reel_s, _LEAST_REEL_S) * FPS), 1) * (1 if seeks else _WITHOUT_INDEX)
    count = max(-(-num_frames // longest), 1)
    edges = [num_frames * part // count for part in range(count + 1)]
    return list(itertools.pairwise(edges))


def to_pcm(samples: np.ndarray) -> np.ndarray:
    """Samples as int16: float samples -1..1 are scaled, int16 samples are copied."""
    if samples.dtype == np.int16:
        return np.array(samples)
    return np.clip(np.rint(samples * 32768), -32768, 32767).astype(np.int16)
