"""Converts decoded pictures to RGB as a display would show them: matrix, range, tone mapping, pixel shape, turn."""

from __future__ import annotations

from functools import cached_property

import av
import numpy as np
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter
from jaxtyping import UInt8

from tccp.media.source import MediaError, MediaInfo
from tccp.media.tone_map import ToneMap

# swscale's fast path is too dark by about one level in 255 and repeats chroma; these flags give unbiased colours.
_TO_RGB = Interpolation.BILINEAR | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND
_SCALED = Interpolation.BICUBIC | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND


class ToRgb:
    """Converts the pictures of one film. Raises MediaError unsupported if a picture has another size than the first."""

    def __init__(self, info: MediaInfo):
        self._info = info
        self._stored = info.stored
        self._reformatter = VideoReformatter()

    @cached_property
    def _tone_map(self) -> ToneMap:
        return ToneMap(self._stored.transfer, self._stored.primaries)

    def __call__(self, frame: av.VideoFrame) -> UInt8[np.ndarray, "h w 3"]:
        stored = self._stored
        if (frame.width, frame.height) != (stored.width, stored.height):
            problem = "its pictures change size midway; cut it into films of one size"
            raise MediaError(self._info.path, "unsupported", problem)
        width, height = stored.shown_size
        rgb = self._reformatter.reformat(
            frame,
            width,
            height,
            # With full chroma interpolation, rgb48le gets wrong green and blue (FFmpeg 8); the planar format is right.
            format="rgb24" if stored.is_sdr else "gbrp16le",
            src_colorspace=stored.matrix,
            src_color_range=ColorRange(frame.color_range),
            threads=1,
            interpolation=_TO_RGB if stored.pixel_ratio == 1 else _SCALED,
        )
        # The stream's turn is used. Reading it from each frame would create a reference cycle, and tens of frames would
        # stay in memory until the garbage collector runs: 950 MB instead of 140 at 1080x1920.
        picture = rgb.to_ndarray()
        return self._info.turn.apply(picture if stored.is_sdr else self._tone_map(picture))
