"""Which frames of a film are generated, and why the others show the scene unchanged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from tccp.inference.head_tracks import HeadTrack, Reason

REASONS: dict[Reason, str] = {
    "before": "before the person appears",
    "absent": "without the person",
    "after": "after the person is last seen",
    "too_short": "in which a face is found too briefly or too seldom",
    "left_picture": "in which the head is outside the picture",
}
"""Why a frame is passed through, to follow "N frames"."""


@dataclass(frozen=True)
class Coverage:
    """Numbers of frames. generated + the sum of passed_through = frames."""

    frames: int
    passed_through: Mapping[str, int] = field(default_factory=dict)

    @property
    def generated(self) -> int:
        return self.frames - sum(self.passed_through.values())

    def text(self) -> str:
        """How many frames are generated, and why the others are not."""
        parts = [f"{self.passed_through[name]} {text}" for name, text in REASONS.items() if name in self.passed_through]
        rest = f"; passed through {', '.join(parts)}" if parts else ""
        return f"{self.generated} of {self.frames} frames generated{rest}"


def coverage(track: HeadTrack, scene_frames: Iterable[int]) -> Coverage:
    """The coverage of a film that shows these frames of the scene."""
    reasons = [track.reason(frame) for frame in scene_frames]
    return Coverage(len(reasons), Counter(reason for reason in reasons if reason is not None))
