"""`python -m tccp.media FILE...` prints one line per file: its streams, their timing, and counts at 25 fps.

Below it stands what is unusual about the file.
"""

import sys

from tccp.errors import TccpError
from tccp.media import open_audio, probe, read_frames

ROW = "{:<32} {:>11} {:>10} {:>9} {:>9} {:>8} {:>8} {:>8} {:>6}"


def _row(path: str) -> str:
    """Counts decoded frames and samples instead of trusting the header."""
    info = probe(path)
    frames = sum(1 for _ in read_frames(path)) if info.has_video else 0
    num_samples = sound_frames = 0
    notes = info.notes
    if info.has_audio:
        with open_audio(path) as sound:
            num_samples, sound_frames = sound.num_samples, sound.num_frames
            notes += sound.notes
    starts = [f"{start:.6f}" if start is not None else "-" for start in (info.video_start_s, info.audio_start_s)]
    rate = f"{float(info.frame_rate):.3f}" if info.frame_rate else "variable" if info.has_video else "-"
    size = f"{info.width}x{info.height}" if info.has_video else "-"
    row = ROW.format(info.path.name, size, rate, *starts, info.num_pictures, frames, num_samples, sound_frames)
    return "\n    ".join([row, *notes])


def main(paths: list[str]) -> int:
    print(ROW.format("file", "size", "rate", "video s", "audio s", "pictures", "frames", "samples", "sound"))
    failed = 0
    for path in paths:
        try:
            print(_row(path))
        except TccpError as error:
            failed = 2
            print(f"{error}", file=sys.stderr)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
