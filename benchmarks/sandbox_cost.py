"""What decoding in a child process costs: `python benchmarks/sandbox_cost.py CLIP... --out FILE.json`.

Decodes every picture of each clip in this process and through tccp.media.sandbox, in turns. The cost is that of a long
film, so the start of the child is measured apart. Both give the same pictures.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from tccp.media import open_audio, probe, read_frames
from tccp.media.sandbox import Decoder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("clips", nargs="+", type=Path)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    given = parser.parse_args()
    began = time.monotonic()
    with Decoder() as decoder:
        decoder.unconfined()
        start_s = time.monotonic() - began
        rows = [_measured(clip, decoder, given.turns) for clip in given.clips]
    result: dict[str, Any] = {"cores": os.cpu_count(), "start_s": round(start_s, 3), "clips": rows}
    text = json.dumps(result, indent=2)
    print(text)
    if given.out is not None:
        given.out.write_text(text + "\n")


def _measured(clip: Path, decoder: Decoder, turns: int) -> dict[str, Any]:
    info = probe(clip)
    assert decoder.probe(clip) == info  # both have read the file now
    pictures: dict[str, list[tuple[float, float]]] = {"here": [], "child": []}
    for _ in range(turns):
        here, first = _timed(lambda: read_frames(clip))
        child, second = _timed(lambda: decoder.frames(clip))
        assert first == second, f"{clip}: other pictures"
        pictures["here"].append(here)
        pictures["child"].append(child)
    sound = {"here": min(_seconds(lambda: open_audio(clip).close()) for _ in range(turns))}
    sound["child"] = min(_seconds(lambda: decoder.sound(clip).close()) for _ in range(turns))
    ratios = [child[0] / here[0] for here, child in zip(pictures["here"], pictures["child"], strict=True)]
    return {
        "clip": clip.name,
        "size": f"{info.width}x{info.height}",
        "frames": info.num_frames,
        "ms_per_frame": {kind: _per_frame(times, info.num_frames) for kind, times in pictures.items()},
        "ratio": round(statistics.median(ratios), 3),
        "sound_ms": {kind: round(1000 * seconds, 1) for kind, seconds in sound.items()},
    }


def _per_frame(times: list[tuple[float, float]], frames: int) -> float:
    return round(1000 * statistics.median(wall for wall, _ in times) / frames, 3)


def _timed(frames: Callable[[], Iterable[np.ndarray]]) -> tuple[tuple[float, float], int]:
    """(wall seconds, CPU seconds of this process), and a checksum of samples of the pictures."""
    wall, cpu, check = time.monotonic(), time.process_time(), 0
    for picture in frames():
        check = zlib.crc32(picture[::16].tobytes(), check)
    return (time.monotonic() - wall, time.process_time() - cpu), check


def _seconds(call: Callable[[], object]) -> float:
    began = time.monotonic()
    call()
    return time.monotonic() - began


if __name__ == "__main__":
    main()
