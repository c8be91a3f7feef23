"""What decoding in a child process costs: `python benchmarks/sandbox_cost.py CLIP... --out FILE.json`.

Decodes every picture of each clip in this process and through tccp.media.sandbox, in turns. The cost is that of a long
film, so the start of the child is measured apart. Both give the same pictures. Each clip is decoded until `--seconds`
of it have passed, because the CPU time of a process is known in hundredths of a second.
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
from typing import Any, NamedTuple

import numpy as np
import psutil

from tccp.media import open_audio, probe, read_frames
from tccp.media.sandbox import Decoder


class Cost(NamedTuple):
    """Seconds: of the clock, and of the CPU in this process and its child."""

    wall_s: float
    cpu_s: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("clips", nargs="+", type=Path)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=2.0, help="of decoding, for each turn and each way")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    given = parser.parse_args()
    began = time.monotonic()
    with Decoder() as decoder:
        decoder.unconfined()
        start_s = time.monotonic() - began
        rows = [_measured(clip, decoder, given.turns, given.seconds) for clip in given.clips]
    result: dict[str, Any] = {"cores": os.cpu_count(), "start_s": round(start_s, 3), "clips": rows}
    text = json.dumps(result, indent=2)
    print(text)
    if given.out is not None:
        given.out.write_text(text + "\n")


def _measured(clip: Path, decoder: Decoder, turns: int, least_s: float) -> dict[str, Any]:
    info = probe(clip)
    assert decoder.probe(clip) == info  # both have read the file now
    first, _ = _timed(lambda: read_frames(clip), 1)
    times = max(1, round(least_s / first.wall_s))
    costs: dict[str, list[Cost]] = {"here": [], "child": []}
    for _ in range(turns):
        here, expected = _timed(lambda: read_frames(clip), times)
        child, found = _timed(lambda: decoder.frames(clip, copy=False), times)
        assert expected == found, f"{clip}: other pictures"
        costs["here"].append(here)
        costs["child"].append(child)
    sound = {"here": min(_seconds(lambda: open_audio(clip).close()) for _ in range(turns))}
    sound["child"] = min(_seconds(lambda: decoder.sound(clip).close()) for _ in range(turns))
    pairs = list(zip(costs["here"], costs["child"], strict=True))
    per_frame = 1000 / (times * info.num_frames)
    return {
        "clip": clip.name,
        "size": f"{info.width}x{info.height}",
        "frames": info.num_frames,
        "wall_ms_per_frame": {way: round(per_frame * _median(c.wall_s for c in costs[way]), 3) for way in costs},
        "cpu_ms_per_frame": {way: round(per_frame * _median(c.cpu_s for c in costs[way]), 3) for way in costs},
        "wall_ratio": round(_median(child.wall_s / here.wall_s for here, child in pairs), 3),
        "cpu_ratio": round(_median(child.cpu_s / here.cpu_s for here, child in pairs), 3),
        "sound_ms": {way: round(1000 * seconds, 1) for way, seconds in sound.items()},
    }


def _median(values: Iterable[float]) -> float:
    return statistics.median(values)


def _timed(frames: Callable[[], Iterable[np.ndarray]], times: int) -> tuple[Cost, int]:
    """The cost of decoding the film so many times, and a checksum of its pictures.

    Every pixel is read once, as every user of a picture does: swscale leaves it outside the CPU's caches.
    """
    wall, cpu, check = time.monotonic(), _cpu_s(), 0
    for _ in range(times):
        for picture in frames():
            check = zlib.crc32(picture[::16].tobytes(), check) + int(picture.max())
    return Cost(time.monotonic() - wall, _cpu_s() - cpu), check


def _cpu_s() -> float:
    me = psutil.Process()
    times = [process.cpu_times() for process in (me, *me.children())]
    return sum(each.user + each.system for each in times)


def _seconds(call: Callable[[], object]) -> float:
    began = time.monotonic()
    call()
    return time.monotonic() - began


if __name__ == "__main__":
    main()
