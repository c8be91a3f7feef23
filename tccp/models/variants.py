"""A table of the paper's four MVControlNets (section 4.2, Figure 2) and of its one-stage ablation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from tccp.config import LipSource, VariantName
from tccp.errors import TccpError

PictureKind = Literal["landmark", "face", "scene"]
"""The content of a picture. Latents of each kind have their own mean and deviation. `scene`: with the head masked."""
ControlKind = Literal["scene", "landmark", "surround"]
"""Pictures for the control branch. `surround`: the colours around the head box (`tccp.headbox.surround`)."""
ConditionKind = Literal["audio", "identity", "lips"]

ONE_PER_WINDOW: frozenset[ConditionKind] = frozenset({"identity"})
"""Conditions with one input for all frames of a window; the others have one for each frame."""

PICTURE_KINDS: tuple[PictureKind, ...] = get_args(PictureKind)


@dataclass(frozen=True)
class Variant:
    """One row of the table.

    generates: the kind of picture that the network generates.
    control: the video-based condition, the input of the control branch.
    conditions: the latent-based conditions for cross-attention, in token order.
    continues: True if the window starts from a given clean frame (Eq. 8) and has more than one frame.
    """

    name: VariantName
    generates: PictureKind
    control: PictureKind
    conditions: tuple[ConditionKind, ...]
    continues: bool

    def num_frames(self, window: int) -> int:
        return window if self.continues else 1

    def control_with(self, surround: bool) -> tuple[ControlKind, ...]:
        """The pictures whose latents the control branch takes, joined on the channel axis in this order.

        surround: the setting of that name; only networks that generate faces follow it.
        """
        assert self.control != "face"
        return (self.control, "surround") if surround and self.generates == "face" else (self.control,)

    def conditions_with(self, lips: LipSource) -> tuple[ConditionKind, ...]:
        """The conditions for this lip source: without `lips` if it is `none` (the ablation of section 5.5)."""
        return tuple(kind for kind in self.conditions if kind != "lips" or lips != "none")


VARIANTS: dict[VariantName, Variant] = {
    v.name: v
    for v in (
        #       name                  generates   control     conditions                     continues
        Variant("landmark_first",     "landmark", "scene",    ("audio", "identity"),         False),
        Variant("landmark_sequence",  "landmark", "scene",    ("audio",),                    True),
        Variant("face_first",         "face",     "landmark", ("lips", "identity"),          False),
        Variant("face_sequence",      "face",     "landmark", ("lips", "identity"),          True),
        Variant("one_stage_first",    "face",     "scene",    ("audio", "lips", "identity"), False),
        Variant("one_stage_sequence", "face",     "scene",    ("audio", "lips", "identity"), True),
    )
}  # fmt: skip

FIRST_OF: dict[VariantName, VariantName] = {
    "landmark_sequence": "landmark_first",
    "face_sequence": "face_first",
    "one_stage_sequence": "one_stage_first",
}
"""For each sequence variant, the variant that generates its initial frame."""

TWO_STAGE: tuple[VariantName, ...] = ("landmark_first", "landmark_sequence", "face_first", "face_sequence")


def variant(name: str) -> Variant:
    """The variant of this name. Raises TccpError that lists the names if there is none."""
    if name not in VARIANTS:
        raise TccpError(f"unknown variant {name!r}: choose one of {', '.join(VARIANTS)}")
    return VARIANTS[name]
