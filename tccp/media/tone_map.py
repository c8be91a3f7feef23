"""Converts linear, HDR and wide-gamut colours to BT.709 for standard displays.

PQ and HLG are decoded to the light of a display of 1000 cd/m2 (ITU-R BT.2100), with HLG's system gamma of 1.2. Diffuse
white of 203 cd/m2 (ITU-R BT.2408) becomes white. A Möbius curve keeps light below 0.8 of white unchanged and bends
brighter light so that 1000 cd/m2 reaches white. All three channels are scaled alike, which keeps the hue. The result is
encoded for a display of gamma 2.4 (ITU-R BT.1886).
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
from av.video.reformatter import ColorPrimaries
from jaxtyping import Float, Float32, Float64, Int32, UInt8, UInt16

from tccp.media.stored_pictures import Transfer

_PEAK, _WHITE = 1000.0, 203.0  # cd/m2
_KNEE = 0.8
_HLG_GAMMA = 1.2
_DISPLAY_GAMMA = 2.4
_CODES = 4096  # input levels of the tables: HDR films have 10 or 12 bits
_ROWS = 32  # converted at a time, so that they stay in the processor's cache
_LEVELS = 8192  # output levels, over the square root of light, which is fine where eyes are

# Chromaticities of red, green, blue (ITU-R BT.2020, SMPTE RP 431-2, BT.709) and of the white point D65.
_PRIMARIES = {
    ColorPrimaries.BT2020: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),
    ColorPrimaries.SMPTE431: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
    ColorPrimaries.SMPTE432: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
    ColorPrimaries.BT709: ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060)),
}
_D65 = (0.3127, 0.3290)


def pq_light(code: Float[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
    """Light of PQ values 0..1, in cd/m2 (SMPTE ST 2084)."""
    m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
    power = np.asarray(code, np.float64) ** (1 / m2)
    return 10_000 * (np.maximum(power - c1, 0) / (c2 - c3 * power)) ** (1 / m1)


def hlg_scene_light(code: Float[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
    """Scene light 0..1 of HLG values 0..1 (ARIB STD-B67)."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    code = np.asarray(code, np.float64)
    return np.where(code <= 0.5, code**2 / 3, (np.exp((code - c) / a) + b) / 12)


def moebius(light: Float[np.ndarray, " n"], peak: float) -> Float64[np.ndarray, " n"]:
    """Light 0..peak to 0..1: the identity below the knee, and with the same slope there."""
    a = -(_KNEE**2) * (peak - 1) / (_KNEE**2 - 2 * _KNEE + peak)
    b = (_KNEE**2 - 2 * _KNEE * peak + peak) / (peak - 1)
    light = np.asarray(light, np.float64)
    bent = (b * b + 2 * b * _KNEE + _KNEE**2) / (b - a) * (light + a) / (light + b)
    return np.minimum(np.where(light <= _KNEE, light, bent), 1.0)


def _to_xyz(primaries: ColorPrimaries) -> Float64[np.ndarray, "3 3"]:
    """Linear RGB to CIE XYZ, with the white point D65 (SMPTE RP 177)."""
    columns = np.array([(x / y, 1, (1 - x - y) / y) for x, y in _PRIMARIES[primaries]]).T
    x, y = _D65
    return columns * np.linalg.solve(columns, np.array([x / y, 1, (1 - x - y) / y]))


class ToneMap:
    """Converts 16-bit RGB pictures of one film."""

    def __init__(self, transfer: Transfer, primaries: ColorPrimaries):
        self.transfer = transfer
        to_xyz = _to_xyz(primaries)
        self._to_bt709 = (np.linalg.inv(_to_xyz(ColorPrimaries.BT709)) @ to_xyz).astype(np.float32)
        self._luminance = to_xyz[1].astype(np.float32)
        self._peak = _PEAK / _WHITE

    @cached_property
    def _linear(self) -> Float32[np.ndarray, " codes"]:
        """Light by code; 1 is diffuse white. For HLG, scene light."""
        code = (np.arange(_CODES) + 0.5) / _CODES
        if self.transfer is Transfer.PQ:
            light = pq_light(code) / _WHITE
        elif self.transfer is Transfer.HLG:
            light = hlg_scene_light(code)
        else:
            light = code**_DISPLAY_GAMMA
        return light.astype(np.float32)

    @cached_property
    def _gain(self) -> Float32[np.ndarray, " levels"]:
        """Of the channels, by the square root of the brightest channel's light over the peak."""
        light = (np.arange(_LEVELS) / (_LEVELS - 1)) ** 2 * self._peak
        if self.transfer is Transfer.SDR:
            return np.ones(_LEVELS, np.float32)
        return (moebius(light, self._peak) / np.maximum(light, 1e-9)).astype(np.float32)

    @cached_property
    def _encoded(self) -> UInt8[np.ndarray, " levels"]:
        light = (np.arange(_LEVELS) / (_LEVELS - 1)) ** 2
        return np.rint(255 * light ** (1 / _DISPLAY_GAMMA)).astype(np.uint8)

    @cached_property
    def _system_gain(self) -> Float32[np.ndarray, " levels"]:
        """Display light over scene light in HLG, by the square root of the scene's luminance."""
        luminance = np.maximum((np.arange(_LEVELS) / (_LEVELS - 1)) ** 2, 1e-6)
        return (self._peak * luminance ** (_HLG_GAMMA - 1)).astype(np.float32)

    def __call__(self, picture: UInt16[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w 3"]:
        mapped = np.empty(picture.shape, np.uint8)
        for top in range(0, len(picture), _ROWS):
            mapped[top : top + _ROWS] = self._rows(picture[top : top + _ROWS])
        return mapped

    def _rows(self, picture: UInt16[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w 3"]:
        light = self._linear.take(picture >> 4)
        if self.transfer is Transfer.HLG:
            luminance = light @ self._luminance
            light *= self._system_gain.take(_level(luminance))[..., None]
        light = np.maximum(light @ self._to_bt709.T, 0)
        brightest = light.max(axis=2) / np.float32(self._peak)
        light *= self._gain.take(_level(brightest))[..., None]
        return self._encoded.take(_level(light))


def _level(light: Float32[np.ndarray, "..."]) -> Int32[np.ndarray, "..."]:
    """Index into a table over the square root of light, which is cut at 1."""
    return np.rint(np.sqrt(np.minimum(light, 1)) * (_LEVELS - 1)).astype(np.int32)
