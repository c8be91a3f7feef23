"""The networks of a pipeline as one film uses them: with its person, seed and sampling settings."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, UInt8
from torch import Tensor

from tccp.diffusion.chains import Chain, ChainState, FrameInputs
from tccp.inference.components import Components
from tccp.inference.conditioning import LandmarkReader, identity_picture, landmark_pictures
from tccp.inference.film_windows import LandmarkWindow, SceneWindow
from tccp.models.variants import VARIANTS, ControlKind, VariantName
from tccp.seeds import rng_seed


class FilmNetworks:
    """The networks of one film. The same inputs and seed give the same heads."""

    def __init__(
        self,
        components: Components,
        identity: UInt8[np.ndarray, "h w 3"],
        seed: int = 0,
        *,
        one_stage: bool = False,
        redraw: bool | None = None,
        read_landmarks: bool = True,
        traced: bool = False,
    ):
        """identity: a head crop of any size.

        redraw: read landmarks from stage 1's pictures and draw them again for stage 2; None: as in the settings.
        read_landmarks: decode the landmark pictures and read them. traced: record networks that are evaluated often
        (`Components.stage`).
        """
        self.components = components
        self.encoder = components.encoder
        self.seed = seed
        self.one_stage = one_stage
        self.redraw = components.settings.sampling.redraw_landmarks if redraw is None else redraw
        self.read_landmarks = read_landmarks
        self.traced = traced
        self.size_px = components.settings.picture_px
        self.identity_picture = identity_picture(identity, self.size_px)
        self.identity = self.encoder.tensor(self.identity_picture)

    @property
    def face_variant(self) -> VariantName:
        return "one_stage_sequence" if self.one_stage else "face_sequence"

    def chain(self, sequence: VariantName, first_frame: int, state: ChainState | None = None) -> Chain:
        """The chain of a stage for the shot that starts at this frame. state: where it goes on."""
        seed = rng_seed(self.seed, "run", first_frame)
        if not self.one_stage:
            seed = rng_seed(seed, VARIANTS[sequence].generates)
        return Chain(self.components.stage(sequence, self.traced), self.identity, seed, state)

    def generated_landmarks(
        self, latents: Float[Tensor, "f c h w"], reader: LandmarkReader
    ) -> tuple[LandmarkWindow | None, Float[Tensor, "f c h w"] | None]:
        """Stage 1's landmarks as pictures and points, where somebody reads them, and as latents unless redrawn."""
        if not (self.read_landmarks or self.redraw):
            return None, latents
        pictures = self.encoder.decode(latents, "landmark")
        points, confidence = reader.read(pictures)
        if self.redraw:
            pictures = landmark_pictures(points, self.size_px)
        return LandmarkWindow(pictures, points, confidence), None if self.redraw else latents

    def inputs(
        self,
        variant: VariantName,
        window: SceneWindow,
        landmarks: LandmarkWindow | None = None,
        landmark_latents: Float[Tensor, "f c h w"] | None = None,
    ) -> list[FrameInputs]:
        """The inputs of a network, frame by frame. landmark_latents: those generated, instead of encoded pictures."""
        fields = {"masked_scene": window.masked_scene, "mask_box": window.mask_box}
        if landmarks is not None:
            fields["landmark_pictures"] = landmarks.pictures
        known: dict[ControlKind, Tensor] = {} if landmark_latents is None else {"landmark": landmark_latents}
        source, lips = self.components.lips, None
        if source is not None and "lips" in VARIANTS[variant].conditions:
            lips = source.lips(window.lip_mel, self.identity_picture)
        return self.encoder.inputs(VARIANTS[variant], fields, window.mel, lips, known)
