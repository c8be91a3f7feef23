"""Persons: skin, hair, face shape, glasses and voice. Clothes belong to the scene, not to the person."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from tccp.roundtable.voice import Voice

Colour = tuple[int, int, int]
HairStyle = Literal["short", "parted", "bob", "long", "curly", "bun", "bald"]

HAIR_STYLES: tuple[HairStyle, ...] = ("short", "parted", "bob", "long", "curly", "bun", "bald")
_SKINS: tuple[Colour, ...] = (
    (248, 214, 186), (238, 190, 152), (222, 168, 124), (196, 138, 94), (160, 106, 70), (122, 78, 52), (98, 64, 46),
)  # fmt: skip
_HAIRS: tuple[Colour, ...] = (
    (30, 24, 24), (62, 40, 28), (104, 66, 38), (150, 92, 44), (208, 168, 92), (168, 62, 34), (150, 148, 150),
)  # fmt: skip
_IRISES: tuple[Colour, ...] = ((70, 44, 26), (52, 88, 130), (66, 100, 62), (96, 78, 48))
_RIMS: tuple[Colour, ...] = ((24, 24, 28), (110, 60, 34), (60, 66, 90))


@dataclass(frozen=True)
class Person:
    """A person's appearance and voice. Lengths are factors of the head template's lengths (head.py); 1 is the mean."""

    seed: int
    skin: Colour
    hair: Colour
    hair_style: HairStyle
    iris: Colour
    lips: Colour
    glasses: Literal["none", "round", "square"]
    rims: Colour
    face_width: float
    jaw_width: float
    chin: float
    nose: float
    eyes: float
    eye_distance: float
    lip_fullness: float
    mouth_width: float
    brow_thickness: float
    voice: Voice

    @property
    def person_id(self) -> str:
        return f"person-{self.seed}"


def make_person(seed: int) -> Person:
    """The person of this seed. Equal seeds give equal persons."""
    rng = np.random.default_rng([seed, 0x9E5])
    skin_index = int(rng.integers(len(_SKINS)))
    skin = _vary(rng, _SKINS[skin_index], 10)
    # Brown skin gets black or grey hair, because brown on brown would hide the edge of the face.
    hair_index = int(rng.integers(len(_HAIRS))) if skin_index < 3 else int(rng.choice([0, 6], p=[0.75, 0.25]))
    has_low_voice = rng.random() < 0.5
    return Person(
        seed=seed,
        skin=skin,
        hair=_vary(rng, _HAIRS[hair_index], 12),
        hair_style=HAIR_STYLES[rng.choice(len(HAIR_STYLES), p=[0.2, 0.18, 0.15, 0.17, 0.12, 0.1, 0.08])],
        iris=_IRISES[rng.integers(len(_IRISES))],
        lips=blend(skin, (176, 32, 52), rng.uniform(0.4, 0.65)),
        glasses=("none", "round", "square")[rng.choice(3, p=[0.65, 0.18, 0.17])],
        rims=_RIMS[rng.integers(len(_RIMS))],
        face_width=rng.uniform(0.92, 1.05),
        jaw_width=rng.uniform(0.9, 1.1),
        chin=rng.uniform(0.94, 1.06),
        nose=rng.uniform(0.85, 1.15),
        eyes=rng.uniform(0.9, 1.15),
        eye_distance=rng.uniform(0.95, 1.05),
        lip_fullness=rng.uniform(0.85, 1.25),
        mouth_width=rng.uniform(0.93, 1.07),
        brow_thickness=rng.uniform(0.7, 1.3),
        voice=Voice(
            f0_hz=rng.uniform(95, 140) if has_low_voice else rng.uniform(170, 235),
            tract=rng.uniform(0.94, 1.02) if has_low_voice else rng.uniform(1.02, 1.1),
            rate=rng.uniform(0.9, 1.12),
            breath=rng.uniform(0.01, 0.05),
        ),
    )


def blend(first: Colour, second: Colour, share: float) -> Colour:
    """Interpolates colours: `first` at share 0, `second` at share 1."""
    r, g, b = (round(a + (z - a) * share) for a, z in zip(first, second, strict=True))
    return r, g, b


def shade(colour: Colour, factor: float) -> Colour:
    """Makes a colour darker (factor below 1) or lighter (above 1)."""
    r, g, b = (min(255, round(value * factor)) for value in colour)
    return r, g, b


def _vary(rng: np.random.Generator, colour: Colour, spread: int) -> Colour:
    common = rng.integers(-spread, spread + 1)
    r, g, b = (int(np.clip(value + common + rng.integers(-3, 4), 0, 255)) for value in colour)
    return r, g, b
