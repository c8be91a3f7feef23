#!/usr/bin/env bash
# Guess: the flags of a conversion change its quality. A colour gets the same 16-bit RGB values in every pixel format, to
#   within rounding, and grey pictures are a good test of it.
# Found: FFmpeg 8 in PyAV 18.1.0 converts 10-bit 4:2:0 to rgb48le with wrong green and blue if FULL_CHR_H_INT is set: a
#   skin tone loses all its green and turns magenta. Grey stays grey, which hides the fault. Without the flag, or with
#   the planar format gbrp16le, the colour is right.
# Why it matters here: HDR films are decoded to 16 bits before tone mapping, with this flag because it avoids a colour
#   bias. They came out magenta and blue. We use gbrp16le.
# Exit: 0 as described, 1 if the behaviour changed, 2 if it could not run.
set -u
folder=$(mktemp -d) || exit 2
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv" || exit 2
"$folder/venv/bin/python" -m pip --disable-pip-version-check install --quiet av==18.1.0 numpy==2.4.6 || exit 2
found=$("$folder/venv/bin/python" - <<'PY'
import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter


def converted(codes, name, flags):
    frame = av.VideoFrame(64, 64, "yuv420p10le")
    for plane, code in zip(frame.planes, codes, strict=True):
        plane.update(np.full(plane.buffer_size // 2, code, "<u2").tobytes())
    rgb = VideoReformatter().reformat(
        frame, format=name, src_colorspace=Colorspace.ITU709, src_color_range=ColorRange.MPEG, interpolation=flags
    )
    return rgb.to_ndarray()[32, 32].astype(int)


plain, full = Interpolation.BILINEAR, Interpolation.BILINEAR | Interpolation.FULL_CHR_H_INT
for codes in ((400, 512, 512), (400, 480, 560)):  # grey, a skin tone
    right = converted(codes, "rgb48le", plain)
    for name in ("rgb48le", "gbrp16le"):
        print("right" if abs(converted(codes, name, full) - right).max() < 300 else "wrong", end=" ")
PY
) || exit 2
echo "PyAV 18.1.0, yuv420p10le with FULL_CHR_H_INT; grey as rgb48le and gbrp16le, skin as rgb48le and gbrp16le: $found"
[ "$found" = "right right wrong right " ] && exit 0
exit 1
