"""Checks that a damaged film affects nothing but itself: `python benchmarks/mutated_media.py --out FILE.json`.

Films in eight containers, and the shared clips if present, are damaged at random (by seed) and decoded completely
through tccp.media.sandbox: probe, sound, every picture. After each one, an intact film must decode as before. The run
can be stopped and started at any point; the work file keeps finished files. Exit status 1: a file left processes,
descriptors or temporary files behind, hung, or changed the next decoding.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np

from tccp.errors import TccpError
from tccp.media import MediaError, read_frames
from tccp.media.sandbox import Decoder

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from mutations import mutated, write_films  # noqa: E402 - shared with the tests

_SLOWEST = 5
Result = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--count", type=int, default=300, help="number of damaged files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the summary")
    parser.add_argument("--work", type=Path, default=Path("out/mutated_media.jsonl"), help="finished files")
    parser.add_argument(
        "--clips", type=Path, default=Path(os.environ.get("TCCP_SHARED") or ROOT.parent / "shared") / "clips"
    )
    given = parser.parse_args()
    given.work.parent.mkdir(parents=True, exist_ok=True)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=given.work.parent) as folder:
        (Path(folder) / "temporary").mkdir()
        tempfile.tempdir = str(Path(folder) / "temporary")
        films = _films(Path(folder), given.clips)
        settings = _settings(given.seed, films)
        left = _decode_all(films, Path(folder), settings, given.count, given.work)
    results = [result for result in _results(given.work, settings) if result["number"] < given.count]
    summary = summarised(results, settings, left)
    given.out.write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps({key: summary[key] for key in ("files", "outcomes", "seconds", "left_behind")}))
    behind = [count for name, count in left.items() if name != "files"]
    return int(any(behind) or summary["spoilt"] > 0 or "too_slow" in summary["outcomes"])


def _films(folder: Path, clips: Path) -> list[Path]:
    """The films to damage. The first one is also the intact film that must decode as before."""
    found = sorted(clips.glob("*.m*")) if clips.is_dir() else []
    return write_films(folder) + [
        clip for clip in found if clip.suffix != ".md" and not clip.name.startswith("corrupt")
    ]


def _settings(seed: int, films: Sequence[Path]) -> Result:
    """What identifies a run: results of other settings are not reused."""
    return {
        "seed": seed,
        "films": len(films),
        "av": av.__version__,
        "avcodec": ".".join(map(str, av.library_versions["libavcodec"])),
    }


def _results(work: Path, settings: Result) -> list[Result]:
    """The results in the work file for these settings. Skips a truncated line."""
    lines = work.read_text().splitlines() if work.is_file() else []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found[1:] if found and found[0] == settings else []


def _decode_all(films: Sequence[Path], folder: Path, settings: Result, count: int, work: Path) -> dict[str, int]:
    """Appends a result for each number without one. Returns the number of files and what they left behind."""
    done = {result["number"] for result in _results(work, settings) if result["number"] < count}
    if not _results(work, settings):
        work.write_text(json.dumps(settings) + "\n")
    intact = np.stack(list(read_frames(films[0])))
    processes, descriptors = _processes(), len(os.listdir("/proc/self/fd"))
    with Decoder() as decoder, work.open("a") as file:
        file.write("\n")  # ends a line that an interruption truncated
        for number in range(count):
            if number not in done:
                result = _decode(number, films, folder, settings["seed"], decoder)
                result["spoilt"] = not np.array_equal(np.stack(list(decoder.frames(films[0]))), intact)
                file.write(json.dumps(result) + "\n")
                file.flush()
    return {
        "files": count - len(done),
        "processes": len(_processes() - processes),
        "descriptors": len(os.listdir("/proc/self/fd")) - descriptors,
        "temporary_files": len(os.listdir(tempfile.gettempdir())),
    }


def _decode(number: int, films: Sequence[Path], folder: Path, seed: int, decoder: Decoder) -> Result:
    """Decodes damaged file `number`. Every second one is a small film of ours, whose header gets most of the damage."""
    ours, theirs = films[:8], films[8:] or films[:8]
    source = (theirs if number % 2 else ours)[number // 2 % len(theirs if number % 2 else ours)]
    mutation, data = mutated(source.read_bytes(), seed * 1_000_000 + number)
    path = folder / f"mutated{source.suffix}"
    path.write_bytes(data)
    began = time.monotonic()
    frames, outcome, message = 0, "decoded", None
    try:
        info = decoder.probe(path)
        if info.has_audio:
            decoder.sound(path).close()
        if info.has_video:
            for _ in decoder.frames(path):
                frames += 1
    except MediaError as error:
        outcome, message = error.reason, error.problem
    except TccpError as error:
        outcome, message = "bad_audio", str(error)
    seconds = round(time.monotonic() - began, 2)
    result = {"number": number, "film": source.name, "mutation": mutation, "outcome": outcome, "frames": frames}
    return result | {"seconds": seconds, "message": message}


def _processes() -> set[str]:
    """Ids of child processes, including zombies."""
    return {pid for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()}


def summarised(results: Sequence[Result], settings: Result, left: dict[str, int]) -> Result:
    """Counts, the slowest files, and all files that crashed or hung the child process."""
    worst = sorted(results, key=lambda result: -result["seconds"])
    bad = [result for result in results if result["outcome"] in ("decoder_crashed", "too_slow", "too_much_memory")]
    return {
        **settings,
        "files": len(results),
        "outcomes": dict(sorted(Counter(result["outcome"] for result in results).items())),
        "by_mutation": {name: dict(sorted(counts.items())) for name, counts in sorted(_by(results, "mutation"))},
        "frames": sum(result["frames"] for result in results),
        "seconds": round(sum(result["seconds"] for result in results), 1),
        "slowest": worst[:_SLOWEST],
        "crashed_or_hung": bad,
        "spoilt": sum(result["spoilt"] for result in results),
        "left_behind": left,
    }


def _by(results: Sequence[Result], key: str) -> Iterator[tuple[str, Counter[str]]]:
    for value in {result[key] for result in results}:
        yield value, Counter(result["outcome"] for result in results if result[key] == value)


if __name__ == "__main__":
    sys.exit(main())
