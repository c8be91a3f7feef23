"""Which sources can be used, and from which frame to which; the others get a reason."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa

from preprocessing.spans import Span, spans_from_table, spans_to_table
from tccp.audio import check_audio
from tccp.config import TccpError
from tccp.media import MediaError, open_audio, probe


def probe_sources(batch: pa.Table) -> pa.Table:
    """Rows of (path, source) to spans: of each source the frames that have picture and sound, and those set aside.

    A file that cannot be used is one row with the reason of its MediaError, or `bad_audio`.
    """
    return spans_to_table(span for source in spans_from_table(batch) for span in _probe(source))


def _probe(source: Span) -> Iterator[Span]:
    path = Path(source.path)
    try:
        info = probe(path)
        source = replace(
            source, source_hash=_file_hash(path), width=info.width, height=info.height, num_frames=info.num_frames
        )
        if not info.has_video:
            raise MediaError(path, "no_video", "has no video; clips are cut from films with picture and sound")
        if not info.has_audio:
            raise MediaError(path, "no_audio", "has no sound; training needs a film in which somebody is heard")
        with open_audio(path) as audio:
            warnings = tuple(check_audio(audio.samples))
            heard = min(info.num_frames, audio.num_frames)
    except MediaError as error:
        yield source.set_aside(error.reason, str(error))
        return
    except TccpError as error:
        yield source.set_aside("bad_audio", f"{path}: {error}")
        return
    source = replace(source, warnings=warnings)
    seen = min(info.first_frame, heard)
    if seen:
        yield source.cut(0, seen).set_aside("before_video", f"{path}: sound without a picture yet")
    if heard > seen:
        yield source.cut(seen, heard)
    if info.num_frames > heard:
        yield source.cut(heard, info.num_frames).set_aside("after_audio", f"{path}: picture after the end of the sound")


def _file_hash(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
