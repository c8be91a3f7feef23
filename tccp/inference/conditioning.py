"""The rules that decide the inputs of each network.

Generation, evaluation, validation, the latent cache and the training readers all use this module, so that a network
gets the same inputs in training and in use. `tccp.inference.encoding` encodes the pictures chosen here to latents.

This module does not import torch: Ray Data workers import it and start in about a second.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Float, Float32, UInt8

from tccp import headbox, landmarks
from tccp.config import Settings
from tccp.models.variants import FIRST_OF, VARIANTS, ConditionKind, ControlKind, PictureKind, Variant

LANDMARK_DIGITS = 5
"""Decimal places of landmark coordinates in files. 1e-5 of the head box is far below a pixel."""

_Array = TypeVar("_Array", bound=Any)  # of numpy or of torch
_FIELDS: dict[PictureKind, str] = {"face": "face", "landmark": "landmark_pictures", "scene": "masked_scene"}


@runtime_checkable
class LipPainter(Protocol):
    """The methods of `tccp.models.lip_sources.LipSource` that conditioning uses."""

    def windows(self, samples: Any, start_frame: int, num_frames: int) -> Float32[np.ndarray, "f 80 16"]: ...

    def lips(
        self, mel: Float[np.ndarray, "f 80 16"], identity: UInt8[np.ndarray, "h w 3"]
    ) -> UInt8[np.ndarray, "f l l 3"]: ...


CONDITION_FIELDS: dict[ConditionKind, str] = {"audio": "mel", "identity": "identity", "lips": "lips"}
"""The name of each condition's input as a field of `ClipView` and a column of training windows. Lip references are no
field of a clip: they come from the lip table."""


LOSS_FIELDS = ("known", "inside")
"""Fields of `ClipView` and columns of training windows that decide which parts of a target count in the loss."""


# Which pictures


def control_kinds(row: Variant, settings: Settings) -> tuple[ControlKind, ...]:
    """The kinds of pictures whose latents the control branch takes, joined on the channel axis in this order."""
    return row.control_with(settings.surround)


def is_hidden(kind: ControlKind, settings: Settings) -> bool:
    """Whether the network gets zeros in place of the latents of these pictures.

    With `context=none`, these are the masked scene and the colours around the head.
    """
    return settings.context == "none" and kind in ("scene", "surround")


def zero_if_hidden(kind: ControlKind, latents: _Array, settings: Settings) -> _Array:
    """The latents unchanged, or zeros of the same shape if the settings hide these pictures (see `is_hidden`)."""
    return latents - latents if is_hidden(kind, settings) else latents


def latent_kind(kind: PictureKind | ControlKind) -> PictureKind:
    """The kind whose latent statistics normalise these pictures. Surround pictures use those of the scene."""
    return "scene" if kind == "surround" else kind


def picture_of(kind: PictureKind | ControlKind, fields: Mapping[str, Any]) -> UInt8[np.ndarray, "f s s 3"]:
    """The pictures of one kind of consecutive frames.

    fields: those of `tccp.clips.windows.ClipView`, or columns of `tccp.clips.windows.windows`. Only the fields that the
    kind needs are read: `face`, `landmark_pictures`, or `masked_scene`, and `mask_box` for the surround.
    """
    if kind == "surround":
        return headbox.surround(fields["masked_scene"], fields["mask_box"])
    return np.asarray(fields[_FIELDS[kind]])


def training_pictures(row: Variant, settings: Settings, fields: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The pictures to encode for training this variant: `latents` (those it generates), and control pictures by kind.

    fields: as for `picture_of`.
    """
    pictures: dict[str, np.ndarray] = {"latents": picture_of(row.generates, fields)}
    pictures.update((kind, picture_of(kind, fields)) for kind in control_kinds(row, settings))
    return pictures


def training_conditions(row: Variant, settings: Settings) -> tuple[ConditionKind, ...]:
    """The conditions that training this variant reads.

    These are its own, and those of its first-frame network if that network makes initial frames.
    """
    rows = [row]
    if row.continues and settings.for_variant(row.name).training.initial_frames != "truth":
        rows.append(VARIANTS[FIRST_OF[row.name]])
    kinds = itertools.chain.from_iterable(one.conditions_with(settings.lips.source) for one in rows)
    return tuple(dict.fromkeys(kinds))


# The pictures themselves


def masked_scenes(
    pictures: UInt8[np.ndarray, "f h w 3"], boxes: Float[np.ndarray, "f 4"], size_px: int
) -> tuple[UInt8[np.ndarray, "f s s 3"], Float32[np.ndarray, "f 4"]]:
    """Scenes fitted into a square of `size_px` with the head masked, and the mask boxes in pixels of the square.

    boxes: head boxes x0 y0 x1 y1 in pixels of `pictures`.
    """
    height, width = pictures.shape[1:3]
    fit = headbox.SceneFit(width, height, size_px)
    fitted_boxes = fit.boxes(boxes)
    return headbox.mask_scene(np.stack([fit.fit(picture) for picture in pictures]), fitted_boxes), fitted_boxes


def identity_picture(head: UInt8[np.ndarray, "h w 3"], size_px: int) -> UInt8[np.ndarray, "s s 3"]:
    """The identity picture from a head crop of any size."""
    whole = np.array([0, 0, head.shape[1], head.shape[0]], np.float32)
    return headbox.crop(head, whole, size_px)


def lip_pictures(
    source: LipPainter,
    samples: Any,
    start_frame: int,
    num_frames: int,
    identity: UInt8[np.ndarray, "h w 3"],
) -> UInt8[np.ndarray, "f l l 3"]:
    """Lip references of these frames, from the sound and the identity picture only.

    samples: 16 kHz, -1..1; frame 0 begins with sample 0.
    """
    return source.lips(source.windows(samples, start_frame, num_frames), identity)


# Landmarks passed from stage 1 to stage 2


def rounded(points: Float[np.ndarray, "*f 68 2"]) -> Float32[np.ndarray, "*f 68 2"]:
    """Landmarks rounded as in a landmark file, so that an unedited file gives exactly the same pictures."""
    return points.astype(np.float64).round(LANDMARK_DIGITS).astype(np.float32)


def landmark_pictures(points: Float[np.ndarray, "f 68 2"], size_px: int) -> UInt8[np.ndarray, "f s s 3"]:
    """Landmark pictures for stage 2. A frame whose points are NaN gives a black picture."""
    return landmarks.draw(points, size_px)


class LandmarkReader:
    """Reads landmarks back from the pictures of one chain of stage 1, window by window, in order.

    A frame whose picture shows no readable face gets the points of the frame before it, or NaN if no face was read yet.
    """

    def __init__(self, last: Float32[np.ndarray, "68 2"] | None = None) -> None:
        """last: the points of the frame before the first one, to go on with a chain."""
        self.last = np.full((landmarks.NUM_POINTS, 2), np.nan, np.float32) if last is None else last

    def read(
        self, pictures: UInt8[np.ndarray, "f s s 3"]
    ) -> tuple[Float32[np.ndarray, "f 68 2"], Float32[np.ndarray, "f"]]:
        """Points in 0..1 of the head box, rounded as in files, and the confidence of each frame, 0..1."""
        found, confidence = landmarks.read(pictures)
        points = rounded(found)
        for index in range(len(points)):
            if np.isfinite(found[index]).all():
                self.last = points[index].copy()
            points[index] = self.last
        return points, confidence
