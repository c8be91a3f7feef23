"""How the pictures of a film are stored: size, shape of pixels, colours, fields."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from fractions import Fraction

import av
from av.video.reformatter import ColorPrimaries, Colorspace, ColorTrc
from av.video.stream import VideoStream

# Players take untagged pictures of at least this size for BT.709, smaller ones for BT.601 (mpv's rule).
_HD_WIDTH, _HD_HEIGHT = 1280, 577
_NEARLY_SQUARE = Fraction(1, 100)
_MOST_RATIO = 8
_WIDE = {ColorPrimaries.BT2020, ColorPrimaries.SMPTE431, ColorPrimaries.SMPTE432}
_MATRICES = {1: Colorspace.ITU709, 4: Colorspace.FCC, 5: Colorspace.ITU601, 6: Colorspace.ITU601,
             7: Colorspace.SMPTE240M, 9: Colorspace.BT2020, 10: Colorspace.BT2020}  # fmt: skip
_UNSPECIFIED = 2


class Transfer(Enum):
    """The transfer function of stored pictures."""

    SDR = "SDR"
    PQ = "PQ"
    HLG = "HLG"


@dataclass(frozen=True)
class StoredPictures:
    """width, height: of the stored picture in pixels. pixel_ratio: width to height of a pixel.

    matrix: for the conversion to RGB; None for RGB. matrix_guessed: whether it was chosen by size, because the film
    does not state it. interlaced: whether the first picture consists of two fields.
    """

    width: int = 0
    height: int = 0
    pixel_ratio: Fraction = Fraction(1)
    matrix: Colorspace | None = Colorspace.ITU709
    matrix_guessed: bool = False
    transfer: Transfer = Transfer.SDR
    primaries: ColorPrimaries = ColorPrimaries.BT709
    interlaced: bool = False

    @property
    def shown_size(self) -> tuple[int, int]:
        """Width and height with square pixels, before any turn. No side gets smaller; an enlarged one gets even."""
        if self.pixel_ratio > 1:
            return 2 * round(self.width * self.pixel_ratio / 2), self.height
        if self.pixel_ratio < 1:
            return self.width, 2 * round(self.height / self.pixel_ratio / 2)
        return self.width, self.height

    @property
    def is_sdr(self) -> bool:
        """Whether colours are those of BT.709 or BT.601, so that only the matrix has to be applied."""
        return self.transfer is Transfer.SDR and self.primaries not in _WIDE

    def notes(self) -> list[str]:
        """What is unusual, and how it is read."""
        found = []
        if self.pixel_ratio != 1:
            width, height = self.shown_size
            ratio = f"{self.pixel_ratio.numerator}:{self.pixel_ratio.denominator}"
            found.append(
                f"its pixels are {ratio}, not square: pictures are scaled from {self.width}x{self.height} to "
                f"{width}x{height}"
            )
        if self.transfer is not Transfer.SDR:
            found.append(f"its pictures are HDR ({self.transfer.value}): they are tone-mapped to BT.709 (Möbius curve)")
        elif not self.is_sdr:
            found.append("its pictures have a wide gamut: they are converted to BT.709")
        if self.matrix_guessed and self.matrix is Colorspace.ITU709:
            found.append("its colours are not tagged: BT.709 is taken because of its size, as players do")
        if self.interlaced:
            found.append("its pictures are interlaced: bwdif makes whole pictures of them")
        return found


def stored_pictures(stream: VideoStream, first: av.VideoFrame) -> StoredPictures:
    """The properties of a stream, by its header and its first picture."""
    ratio = Fraction(stream.sample_aspect_ratio or 1)
    if abs(ratio - 1) <= _NEARLY_SQUARE or not 1 / Fraction(_MOST_RATIO) <= ratio <= _MOST_RATIO:
        ratio = Fraction(1)
    transfers = {int(ColorTrc.SMPTE2084): Transfer.PQ, int(ColorTrc.ARIB_STD_B67): Transfer.HLG}
    transfer = transfers.get(int(first.color_trc), Transfer.SDR)
    primaries = ColorPrimaries(first.color_primaries) if first.color_primaries in _WIDE else ColorPrimaries.BT709
    if transfer is not Transfer.SDR and first.color_primaries == _UNSPECIFIED:
        primaries = ColorPrimaries.BT2020
    tagged, guessed = int(first.colorspace), False
    matrix = None if first.format.is_rgb else _MATRICES.get(tagged)
    if matrix is None and not first.format.is_rgb:
        guessed = True
        is_hd = first.width >= _HD_WIDTH or first.height >= _HD_HEIGHT
        matrix = Colorspace.ITU709 if is_hd else Colorspace.ITU601
        if transfer is not Transfer.SDR:
            matrix = Colorspace.BT2020
    return StoredPictures(
        first.width, first.height, ratio, matrix, guessed, transfer, primaries, bool(first.interlaced_frame)
    )
