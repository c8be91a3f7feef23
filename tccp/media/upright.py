"""Display matrices: how to turn a stored picture upright."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import av
import numpy as np
from av.sidedata.sidedata import Type as SideDataType
from jaxtyping import UInt8

from tccp.media.side_data import side_data


@dataclass(frozen=True)
class DisplayTurn:
    """Transposes first, then mirrors. This covers every multiple of a quarter turn, with and without mirroring."""

    transpose: bool = False
    mirror_x: bool = False
    mirror_y: bool = False

    @property
    def rotation_deg(self) -> int:
        """The clockwise turn. A mirrored picture is mirrored left to right after this turn."""
        if self.transpose:
            return 270 if self.mirror_y else 90
        return 180 if self.mirror_y else 0

    def apply(self, picture: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h2 w2 3"]:
        """A view of the picture."""
        upright = picture.transpose(1, 0, 2) if self.transpose else picture
        return upright[:: -1 if self.mirror_y else 1, :: -1 if self.mirror_x else 1]


def display_turn(frame: av.VideoFrame) -> DisplayTurn:
    """The frame's display matrix, rounded to the nearest quarter turn.

    ISO/IEC 14496-12: x' = a x + c y, y' = b x + d y.
    """
    matrix = side_data(frame, SideDataType.DISPLAYMATRIX)
    if matrix is None:
        return DisplayTurn()
    a, b, _, c, d = struct.unpack("<5i", matrix[:20])
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return DisplayTurn(False, a < 0, d < 0)
    return DisplayTurn(True, c < 0, b < 0)
