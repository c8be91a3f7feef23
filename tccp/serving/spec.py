"""What a client may ask for: the options of one video."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from tccp.config import Solver
from tccp.inference.film import SAMPLING_OPTIONS, FilmRequest
from tccp.inference.scene import Extend

MAX_SEED = 2**63 - 1
Role = Literal["scene", "audio", "identity", "mask", "track", "landmarks"]
NEEDED_ROLES: tuple[Role, ...] = ("scene", "audio", "identity")
ROLES: tuple[Role, ...] = (*NEEDED_ROLES, "mask", "track", "landmarks")
_FILM = ("person", "identity_box", "extend", "seed", "one_stage", "redraw", "color_match", "lossless", "exact_size")
_Number = Annotated[float, Field(allow_inf_nan=False)]


class VideoSpec(BaseModel):
    """Options of a video; those of `tccp generate` under the same names. Unknown ones are refused.

    consent: who agreed that this person's face is generated, or why nobody needs to. prompt: a note of the client; it
    changes nothing. save_landmarks: offer the landmarks of stage 1, for editing.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    consent: str = Field(min_length=3, max_length=2000)
    model: str = Field(default="default", max_length=64)
    prompt: str | None = Field(default=None, max_length=32_000)
    seed: int = Field(default=0, ge=0, le=MAX_SEED)
    steps: int | None = Field(default=None, ge=1, le=1000)
    solver: Solver | None = None
    guidance_scale: _Number | None = Field(default=None, ge=0, le=100)
    guidance_interval: tuple[_Number, _Number] | None = None
    time_power: _Number | None = Field(default=None, gt=0, le=10)
    temperature: _Number | None = Field(default=None, ge=0, le=10)
    box: str | None = Field(default=None, max_length=200)
    person: tuple[_Number, _Number] | None = None
    identity_box: str | None = Field(default=None, max_length=200)
    detector: Literal["mediapipe", "fan", "lbp"] | None = None
    extend: Extend = "no"
    one_stage: bool = False
    redraw: bool = False
    color_match: bool = True
    lossless: bool = False
    exact_size: bool = False
    save_landmarks: bool = True

    @field_validator("consent")
    @classmethod
    def _says_something(cls, text: str) -> str:
        if len(text.strip()) < 3:
            raise ValueError("say who agreed that this face is generated, or why nobody needs to")
        return text.strip()

    @field_validator("box")
    @classmethod
    def _box_is_no_path(cls, text: str | None) -> str | None:
        # `FilmRequest.box` may also be the path of a file; a client sends that file as `track`.
        if text is not None:
            try:
                numbers = [float(part) for part in text.split(",")]
            except ValueError:
                numbers = []
            if len(numbers) != 4:
                raise ValueError("give x0,y0,x1,y1 in pixels of the scene")
        return text

    @field_validator("identity_box")
    @classmethod
    def _identity_box_is_known(cls, text: str | None) -> str | None:
        if text is not None and text != "whole":
            cls._box_is_no_path(text)
        return text

    @model_validator(mode="after")
    def _fits_together(self) -> VideoSpec:
        if self.box is not None and self.person is not None:
            raise ValueError("box and person both say where the head is: give only one of them")
        if self.one_stage and self.redraw:
            raise ValueError("one_stage has no landmarks: leave out redraw")
        return self

    @property
    def sampling(self) -> dict[str, Any]:
        """The options that change the pipeline's sampling settings."""
        return {name: getattr(self, name) for name in SAMPLING_OPTIONS if getattr(self, name) is not None}

    def film_request(
        self, files: dict[Role, Path], weights: str, detector_weights: Path | None, out: Path | None = None
    ) -> FilmRequest:
        """The request for the film. files: local files by role."""
        given = {name: getattr(self, name) for name in (*_FILM, *SAMPLING_OPTIONS)}
        if self.detector is not None:
            given["detector"] = self.detector
        box = str(files["track"]) if "track" in files else self.box
        return FilmRequest(
            scene=files["scene"],
            audio=files["audio"],
            identity=files["identity"],
            mask=files.get("mask"),
            landmarks=files.get("landmarks"),
            box=box,
            weights=weights,
            detector_weights=detector_weights,
            out=out,
            **given,
        )
