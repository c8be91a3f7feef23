#!/usr/bin/env bash
# Guess: a film of H.264 without B-frames needs no reordering, so the first picture in an AVI file is shown at zero,
#   together with the first sample of its sound.
# Found: FFmpeg 8 in PyAV 18.1.0 gives every packet of such a stream a presentation time one picture after its decoding
#   time: pictures start at 1/25 s, sound at 0. The same packets in Matroska start at 0. Nothing in the file says so; the
#   demuxer guesses a delay for a codec that may reorder.
# Why it matters here: a click and a flash at the same time were 40 ms apart in AVI. Where all pictures have the same
#   delay, none is reordered, and we take the decoding times.
# Exit: 0 as described, 1 if the behaviour changed, 2 if it could not run.
set -u
folder=$(mktemp -d) || exit 2
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv" || exit 2
"$folder/venv/bin/python" -m pip --disable-pip-version-check install --quiet av==18.1.0 numpy==2.4.6 || exit 2
found=$("$folder/venv/bin/python" - "$folder" <<'PY'
import sys
from fractions import Fraction

import av
import numpy as np

for ending in ("avi", "mkv"):
    path = f"{sys.argv[1]}/film.{ending}"
    with av.open(path, "w") as container:
        video = container.add_stream("libx264", rate=25)
        video.width, video.height, video.pix_fmt = 64, 64, "yuv420p"
        video.options = {"bf": "0"}
        sound = container.add_stream("pcm_s16le", rate=48000, layout="mono")
        for number in range(10):
            picture = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 20 * number, np.uint8), "rgb24")
            picture.pts, picture.time_base = number, Fraction(1, 25)
            container.mux(video.encode(picture))
            block = av.AudioFrame.from_ndarray(np.zeros((1, 1920), np.int16), "s16", "mono")
            block.sample_rate, block.pts, block.time_base = 48000, 1920 * number, Fraction(1, 48000)
            container.mux(sound.encode(block))
        container.mux(video.encode(None))
        container.mux(sound.encode(None))
    starts = []
    for kind in ("video", "audio"):
        with av.open(path) as container:
            frame = next(container.decode(**{kind: 0}))
            starts.append(float(frame.pts * frame.time_base))
    print(*starts, end=" ")
PY
) || exit 2
echo "PyAV 18.1.0, start of pictures and sound in seconds, in AVI and in Matroska: $found"
[ "$found" = "0.04 0.0 0.0 0.0 " ] && exit 0
exit 1
