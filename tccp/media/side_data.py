"""Side data of frames, such as the display matrix and EXIF, of every type that FFmpeg knows."""

from __future__ import annotations

from typing import Any, cast

import av
from av.sidedata.sidedata import SideData
from av.sidedata.sidedata import Type as SideDataType


def _member_of_unknown_type(kind: type[SideDataType], value: object) -> SideDataType:
    """PyAV 18.1 lists fewer types than its FFmpeg has, and refuses *all* side data of a frame that has another one."""
    member: Any = object.__new__(kind)
    member._name_, member._value_ = f"UNKNOWN_{value}", value
    return cast(SideDataType, member)


SideDataType._missing_ = classmethod(_member_of_unknown_type)  # type: ignore[assignment,method-assign]


def side_data(frame: av.frame.Frame, kind: SideDataType) -> bytes | None:
    """The content of the frame's side data of one type; None if it has none."""
    for data in frame.side_data:
        assert isinstance(data, SideData)  # PyAV's types call side_data a mapping, but it is a sequence
        if data.type == kind:
            return bytes(data)
    return None
