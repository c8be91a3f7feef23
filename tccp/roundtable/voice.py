"""Synthesises speech-like sound from a source-filter model, with the mouth movement that belongs to it.

The mouth movement is sampled first, as two smooth tracks (opening and width). Glottal pulses and noise then pass
through resonators whose frequencies follow these tracks, so the sound at a moment determines the mouth at that moment.
Smoothing reaches at most 0.06 s (mouth) and 0.1 s (stress) to either side, which is inside the 16 mel columns (0.2 s)
centred on a frame.
Cascade of digital resonators after Klatt, "Software for a cascade/parallel formant synthesizer" (1980).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Float64

from tccp.config import FPS, SAMPLE_RATE_HZ, SAMPLES_PER_FRAME

CONTROL_HZ = 200
"""Rate of the articulation tracks. The resonators are updated at this rate."""
REST_WIDTH = 0.45
"""Mouth width in silence."""
_SAMPLES_PER_STEP = SAMPLE_RATE_HZ // CONTROL_HZ
_STEPS_PER_FRAME = CONTROL_HZ // FPS
_MOUTH_REACH_S = 0.06
_STRESS_REACH_S = 0.1
_SOUND_REACH_S = 0.015


@dataclass(frozen=True)
class Voice:
    """The properties of a speaker's voice."""

    f0_hz: float
    tract: float  # factor of every formant; above 1 for short vocal tracts
    rate: float  # factor of the speed of speech
    breath: float  # noise in voiced sounds, relative to the pulses


class Phone(NamedTuple):
    """Targets of one speech sound, all 0..1 except `noise_hz`."""

    opening: float
    width: float
    voicing: float
    noise: float = 0.0
    noise_hz: float = 4000.0


VOWELS = (
    Phone(1.00, 0.45, 1.0),  # a
    Phone(0.65, 0.80, 1.0),  # e
    Phone(0.28, 1.00, 1.0),  # i
    Phone(0.62, 0.15, 1.0),  # o
    Phone(0.25, 0.00, 1.0),  # u
    Phone(0.42, 0.50, 1.0),  # schwa
)
CONSONANTS = (
    Phone(0.00, 0.45, 0.5),  # m
    Phone(0.00, 0.45, 0.0),  # b: closed and silent
    Phone(0.12, 0.80, 0.0, 0.6, 5600.0),  # s
    Phone(0.20, 0.20, 0.0, 0.7, 2700.0),  # sh
    Phone(0.05, 0.60, 0.0, 0.3, 7200.0),  # f
    Phone(0.30, 0.65, 0.7),  # l
    Phone(0.12, 0.00, 0.7),  # w
)
SILENCE = Phone(0.0, REST_WIDTH, 0.0)


@dataclass(frozen=True)
class Speech:
    """Sound and its articulation, with one value per frame at the time i / 25 s.

    audio: -1..1 at 16 kHz, exactly 640 samples per frame. opening: 0 closed..1. width: 0 rounded..1 spread.
    stress: 0..1, high on stressed syllables, which are louder and higher in pitch.
    """

    audio: Float32[np.ndarray, " samples"]
    opening: Float32[np.ndarray, " f"]
    width: Float32[np.ndarray, " f"]
    stress: Float32[np.ndarray, " f"]


@dataclass(frozen=True)
class _Score:
    """Targets per control step, before smoothing."""

    opening: Float64[np.ndarray, " k"]
    width: Float64[np.ndarray, " k"]
    voicing: Float64[np.ndarray, " k"]
    noise: Float64[np.ndarray, " k"]
    noise_hz: Float64[np.ndarray, " k"]
    stress: Float64[np.ndarray, " k"]
    declination: Float64[np.ndarray, " k"]


def speak(rng: np.random.Generator, voice: Voice, num_frames: int) -> Speech:
    """Speech of `num_frames` frames: phrases of syllables between pauses. Equal generator states give equal samples."""
    score = _score(rng, voice, num_frames * _STEPS_PER_FRAME)
    opening = _smooth(score.opening, _MOUTH_REACH_S)
    width = _smooth(score.width, _MOUTH_REACH_S)
    audio = _sound(rng, voice, score, opening, width)
    frames = slice(None, None, _STEPS_PER_FRAME)
    return Speech(
        audio=audio[: num_frames * SAMPLES_PER_FRAME],
        opening=opening[frames].astype(np.float32),
        width=width[frames].astype(np.float32),
        stress=_smooth(score.stress, _STRESS_REACH_S)[frames].astype(np.float32),
    )


def formants_hz(
    opening: Float[np.ndarray, " k"], width: Float[np.ndarray, " k"], tract: float
) -> Float64[np.ndarray, "k 4"]:
    """Four resonances of a mouth: the first rises as it opens, the second and third as it spreads."""
    first = 270 + 560 * opening
    second = 720 + 1600 * width
    third = 2350 + 550 * width
    return tract * np.stack([first, second, third, np.full_like(first, 3600.0)], axis=-1)


def _score(rng: np.random.Generator, voice: Voice, num_steps: int) -> _Score:
    rows: list[tuple[float, ...]] = []

    def hold(phone: Phone, seconds: float, stress: float = 0.0, declination: float = 1.0) -> None:
        rows.extend([(*phone, stress, declination)] * max(1, round(seconds * CONTROL_HZ)))

    hold(SILENCE, rng.uniform(0.05, 0.3))
    while len(rows) < num_steps:
        num_syllables = int(rng.integers(3, 9))
        until_stress = int(rng.integers(0, 2))
        for syllable in range(num_syllables):
            declination = 1.1 - 0.2 * syllable / num_syllables
            stressed = until_stress == 0
            until_stress = int(rng.integers(1, 4)) if stressed else until_stress - 1
            stress = rng.uniform(0.7, 1.0) if stressed else 0.0
            if rng.random() < 0.85:
                consonant = CONSONANTS[rng.integers(len(CONSONANTS))]
                hold(consonant, rng.uniform(0.085, 0.115) / voice.rate, 0.0, declination)
            vowel = VOWELS[rng.integers(len(VOWELS) - 1 if stressed else len(VOWELS))]
            opening = vowel.opening * (1.0 if stressed else rng.uniform(0.7, 0.85))
            seconds = rng.uniform(0.11, 0.17) * (1.45 if stressed else 1.0) / voice.rate
            hold(vowel._replace(opening=opening), seconds, stress, declination)
        hold(SILENCE, rng.uniform(0.2, 0.7))
    columns = np.array(rows[:num_steps]).T
    return _Score(*columns)


def _smooth(track: Float64[np.ndarray, " k"], reach_s: float) -> Float64[np.ndarray, " k"]:
    """Weighted mean over at most +-reach_s. The ends repeat the first and last value."""
    reach = round(reach_s * CONTROL_HZ)
    kernel = np.hanning(2 * reach + 3)[1:-1]
    return np.convolve(np.pad(track, reach, mode="edge"), kernel / kernel.sum(), mode="valid")


def _per_sample(track: Float64[np.ndarray, " k"]) -> Float64[np.ndarray, " n"]:
    at = np.arange(len(track) * _SAMPLES_PER_STEP) / _SAMPLES_PER_STEP
    return np.interp(at, np.arange(len(track)), track)


def _sound(
    rng: np.random.Generator,
    voice: Voice,
    score: _Score,
    opening: Float64[np.ndarray, " k"],
    width: Float64[np.ndarray, " k"],
) -> Float32[np.ndarray, " n"]:
    stress = _smooth(score.stress, _MOUTH_REACH_S)
    wobble = _smooth(rng.normal(0.0, 0.02, len(stress)), 0.03)
    f0_hz = _per_sample(voice.f0_hz * score.declination * (1 + 0.3 * stress + wobble))
    pulses = _glottal_pulses(f0_hz)
    loudness = _smooth(score.voicing, _SOUND_REACH_S) * (0.35 + 0.65 * opening) * (0.55 + 0.65 * stress)
    breath = voice.breath * rng.standard_normal(len(pulses))
    voiced = _resonate(
        (pulses + breath) * _per_sample(loudness),
        formants_hz(opening, width, voice.tract),
        np.array([70.0, 90.0, 140.0, 220.0]),
    )
    hiss = rng.standard_normal(len(pulses)) * _per_sample(_smooth(score.noise, _SOUND_REACH_S))
    fricatives = _resonate(np.diff(hiss, prepend=0.0), score.noise_hz[:, None], np.array([1500.0]))
    room = rng.standard_normal(len(pulses))
    return np.clip(0.15 * voiced + 0.025 * fricatives + 2e-4 * room, -1.0, 1.0).astype(np.float32)


def _glottal_pulses(f0_hz: Float64[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
    """The derivative of the air flow through the glottis: Rosenberg's trigonometric pulse, open 60% of the period."""
    phase = np.cumsum(f0_hz / SAMPLE_RATE_HZ) % 1.0
    rising = 0.5 * (1 - np.cos(np.pi * phase / 0.4))
    falling = np.cos(0.5 * np.pi * (phase - 0.4) / 0.2)
    flow = np.where(phase < 0.4, rising, np.where(phase < 0.6, falling, 0.0))
    # The difference models the radiation at the lips. The division by f0 keeps high voices from being louder.
    return np.diff(flow, prepend=0.0) * SAMPLE_RATE_HZ / (8 * f0_hz)


def _resonate(
    source: Float64[np.ndarray, " n"],
    frequencies_hz: Float64[np.ndarray, "k m"],
    bandwidths_hz: Float64[np.ndarray, " m"],
) -> Float64[np.ndarray, " n"]:
    """m second-order resonators in cascade with unit gain at 0 Hz, updated at each control step without state reset."""
    from scipy.signal import sosfilt  # imported here because it is slow and only sound synthesis needs it

    radius = np.exp(-np.pi * bandwidths_hz / SAMPLE_RATE_HZ)
    feedback = -2 * radius * np.cos(2 * np.pi * frequencies_hz / SAMPLE_RATE_HZ)
    sections = np.zeros((*frequencies_hz.shape, 6))
    sections[..., 0] = 1 + feedback + radius**2
    sections[..., 3] = 1
    sections[..., 4] = feedback
    sections[..., 5] = radius**2
    state = np.zeros((frequencies_hz.shape[1], 2))
    blocks = source.reshape(len(sections), _SAMPLES_PER_STEP)
    out = np.empty_like(blocks)
    for k, section in enumerate(sections):
        out[k], state = sosfilt(section, blocks[k], zi=state)
    return out.reshape(-1)
