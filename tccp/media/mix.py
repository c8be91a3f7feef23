"""Mixes the channels of a recording to one, so that speech in it stays audible.

The mean of all channels is the rule. It fails where channels cancel each other (one microphone connected with reversed
polarity), where one of many channels holds the voice, and in films whose centre channel holds the dialogue.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32, Float64

_CENTRE, _EFFECTS = "FC", {"LFE", "LFE2"}
_CENTRE_LEVEL = 0.01  # -20 dB: a quieter centre channel, against the loudest channel, holds no dialogue
_AUDIBLE = 1e-4  # -40 dB: quieter seconds, against the loudest one, do not count
_QUANTILE = 0.1
_MUCH_BETTER = 3.0  # 5 dB; two independent channels lose 3 dB in their mean


@dataclass(frozen=True)
class Mix:
    """weights: of the channels. note: why they are not equal; None if they are."""

    weights: Float32[np.ndarray, " channels"]
    note: str | None = None

    def __call__(self, block: Float32[np.ndarray, "channels n"]) -> Float32[np.ndarray, "1 n"]:
        if np.all(self.weights == self.weights[0]):
            return block.mean(axis=0, keepdims=True, dtype=np.float32)
        return (self.weights @ block)[None]


def choose_mix(blocks: Iterable[Float32[np.ndarray, "channels n"]], names: tuple[str, ...], sample_rate_hz: int) -> Mix:
    """Chooses the mix of a recording from its sound.

    names: FFmpeg's names of the channels, such as FL, FR, FC, LFE. Compares the level of each mix, second by second,
    with that of the loudest channel. Reads the blocks as a stream.
    """
    count = len(names)
    equal = np.full(count, 1 / count, np.float32)
    if count == 1:
        return Mix(equal)
    seconds = _covariances(blocks, count, sample_rate_hz)
    power = seconds.sum(axis=0).diagonal()
    loudest = int(power.argmax())
    if not power[loudest] > 0:
        return Mix(equal)
    if count > 2 and _CENTRE in names and power[names.index(_CENTRE)] >= _CENTRE_LEVEL * power[loudest]:
        centre = names.index(_CENTRE)
        return Mix(_one(centre, count), f"channel {centre + 1} of {count} (the centre) is used as the voice")
    peaks = seconds.diagonal(axis1=1, axis2=2).max(axis=1)
    audible = peaks > _AUDIBLE * peaks.max()

    def levels(weights: Float[np.ndarray, " channels"]) -> Float64[np.ndarray, " seconds"]:
        """The power of the mix in each second, 1 being that of the loudest channel."""
        return np.einsum("sij,i,j->s", seconds[audible], weights, weights) / peaks[audible]

    def level(weights: Float[np.ndarray, " channels"]) -> float:
        in_order = np.sort(levels(weights))
        return float(in_order[int(_QUANTILE * (len(in_order) - 1))])

    full = np.array([name not in _EFFECTS for name in names]) if count > 2 else np.ones(count, bool)
    mean = np.where(full, 1 / max(full.sum(), 1), 0).astype(np.float32)
    by_power = (power / power.sum()).astype(np.float32)
    others = [*(_one(channel, count) for channel in range(count)), by_power]
    best = int(np.argmax([level(weights) for weights in others]))
    if level(others[best]) <= _MUCH_BETTER * level(mean):
        if count == 2:
            return Mix(mean)
        # As loud as the loudest channel, but no louder in any second: turns of many microphones stay audible.
        gain = np.float32(1 / np.sqrt(max(levels(mean).max(), 1 / count**2)))
        return Mix(mean * gain, f"its {count} channels are added up, each times {mean.max() * gain:.2f}")
    quieter_db = 10 * np.log10(max(level(mean), 1e-10) / level(others[best]))
    why = f"the mean of its {count} channels would be {-quieter_db:.0f} dB quieter"
    if best == count:
        return Mix(by_power, f"its {count} channels are weighted by their power: {why}")
    return Mix(others[best], f"channel {best + 1} of {count} is used: {why}")


def _one(channel: int, count: int) -> Float32[np.ndarray, " channels"]:
    weights = np.zeros(count, np.float32)
    weights[channel] = 1
    return weights


def _covariances(
    blocks: Iterable[Float32[np.ndarray, "channels n"]], count: int, sample_rate_hz: int
) -> Float64[np.ndarray, "seconds channels channels"]:
    """Sums of products of the channels over each second."""
    seconds: list[Float64[np.ndarray, "channels channels"]] = []
    position = 0
    for block in blocks:
        while block.shape[1]:
            room = sample_rate_hz - position % sample_rate_hz
            if position % sample_rate_hz == 0:
                seconds.append(np.zeros((count, count)))
            part, block = block[:, :room], block[:, room:]
            seconds[-1] += np.nan_to_num((part @ part.T).astype(np.float64))
            position += part.shape[1]
    return np.stack(seconds) if seconds else np.zeros((0, count, count))
