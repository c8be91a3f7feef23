"""What the metadata of pictures means: pixel shape, HDR and gamut, fields, untagged colours.

The films are written with PyAV directly; expected colours come from the formulas of the standards, written out here.
"""

from __future__ import annotations

import itertools
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from tccp.media import probe, read_frames

BT2020_FROM_BT709 = np.array(
    [[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]]
)  # ITU-R BT.2087, table
PATCHES = np.array(
    [[0, 0, 0], [60, 60, 60], [202, 141, 119], [120, 80, 60], [30, 90, 40], [40, 60, 150], [180, 180, 180], [255] * 3]
)


def write(
    path: Path,
    pictures: list[np.ndarray],
    bits: int = 8,
    tags: dict[str, int] | None = None,
    ratio: Fraction | None = None,
    matrix: list[int] | None = None,
    params: str = "qp=0",
    rate: Fraction | int = 25,
) -> None:
    """Writes Y'CbCr pictures (h x w x 3, 4:4:4) without conversion or loss."""
    pix_fmt = "yuv444p" if bits == 8 else f"yuv444p{bits}le"
    with av.open(str(path), "w") as container:
        height, width = pictures[0].shape[:2]
        stream = container.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        stream.options = {"x264-params": params, "preset": "ultrafast"}
        if ratio:
            stream.codec_context.sample_aspect_ratio = stream.sample_aspect_ratio = ratio
        if matrix:
            stream.set_display_matrix(matrix)
        for name, value in (tags or {}).items():
            setattr(stream.codec_context, name, value)
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame(width, height, pix_fmt)
            for channel, plane in enumerate(frame.planes):
                lines = np.zeros((height, plane.line_size), np.uint8)
                values = np.ascontiguousarray(picture[..., channel]).view(np.uint8)
                lines[:, : values.shape[1]] = values
                plane.update(lines.tobytes())
            frame.pts, frame.time_base = number, 1 / Fraction(rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def yuv(rgb: np.ndarray, kr: float, kb: float, bits: int) -> np.ndarray:
    """Limited-range Y'CbCr codes (h x w x 3) of R'G'B' 0..1: ITU-R BT.601, BT.709 and BT.2020, by kr and kb."""
    y = kr * rgb[..., 0] + (1 - kr - kb) * rgb[..., 1] + kb * rgb[..., 2]
    cb, cr = (rgb[..., 2] - y) / (2 * (1 - kb)), (rgb[..., 0] - y) / (2 * (1 - kr))
    codes = np.stack([219 * y + 16, 224 * cb + 128, 224 * cr + 128], axis=-1) * 2 ** (bits - 8)
    return np.rint(codes).astype(np.uint8 if bits == 8 else np.uint16)


def in_patches(colours: np.ndarray) -> np.ndarray:
    """A picture of 32 x 32 pixel patches side by side."""
    return np.repeat(np.repeat(colours[None], 32, axis=1), 32, axis=0)


def patches_of(picture: np.ndarray) -> np.ndarray:
    return picture[8:24].reshape(16, -1, 32, 3)[:, :, 8:24].mean(axis=(0, 2))


def hlg(display_light: np.ndarray) -> np.ndarray:
    """HLG values of light 0..1 of a display of 1000 cd/m2: inverse system gamma of 1.2, then ARIB STD-B67."""
    luminance = np.maximum(display_light @ [0.2627, 0.6780, 0.0593], 1e-9)[..., None]
    scene = display_light * luminance ** (1 / 1.2 - 1)
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), a * np.log(np.maximum(12 * scene - b, 1e-9)) + c)


def pq(display_light: np.ndarray) -> np.ndarray:
    """PQ values of light 0..1 of a display of 1000 cd/m2 (SMPTE ST 2084)."""
    power = (display_light / 10) ** (2610 / 16384)
    return ((3424 / 4096 + 2413 / 128 * power) / (1 + 2392 / 128 * power)) ** (2523 / 32)


@pytest.mark.parametrize(("transfer", "encode", "name"), [(18, hlg, "HLG"), (16, pq, "PQ")])
def test_hdr_is_tone_mapped(tmp_path: Path, transfer: int, encode, name: str):
    """Standard colours in an HDR film, white at 203 cd/m2 (ITU-R BT.2408), come back; only bright light is bent."""
    film = tmp_path / "film.mp4"
    light = (PATCHES / 255) ** 2.4 @ BT2020_FROM_BT709.T * 203 / 1000
    codes = yuv(encode(light), 0.2627, 0.0593, bits=10)
    tags = {"color_trc": transfer, "color_primaries": 9, "colorspace": 9, "color_range": 1}
    write(film, [in_patches(codes)], 10, tags)
    read = patches_of(next(iter(read_frames(film))).astype(float))
    np.testing.assert_allclose(read[:-1], PATCHES[:-1], atol=3)
    assert 240 < read[-1].min() <= read[-1].max() < 250
    assert probe(film).notes == (f"its pictures are HDR ({name}): they are tone-mapped to BT.709 (Möbius curve)",)


def test_light_above_white_keeps_its_order(tmp_path: Path):
    film = tmp_path / "film.mp4"
    light = np.array([0.1, 0.15, 0.17, 0.203, 0.25, 0.3, 0.5, 1.0])[:, None].repeat(3, axis=1)
    codes = yuv(pq(light), 0.2627, 0.0593, bits=10)
    tags = {"color_trc": 16, "color_primaries": 9, "colorspace": 9, "color_range": 1}
    write(film, [in_patches(codes)], 10, tags)
    read = patches_of(next(iter(read_frames(film))).astype(float)).mean(axis=1)
    assert (np.diff(read) > 0).all() and read[-1] > 254


def test_wide_gamut_is_converted(tmp_path: Path):
    film = tmp_path / "film.mp4"
    colours = ((PATCHES / 255) ** 2.4 @ BT2020_FROM_BT709.T) ** (1 / 2.4)
    tags = {"color_trc": 14, "color_primaries": 9, "colorspace": 9, "color_range": 1}
    write(film, [in_patches(yuv(colours, 0.2627, 0.0593, bits=10))], 10, tags)
    np.testing.assert_allclose(patches_of(next(iter(read_frames(film)))), PATCHES, atol=2)
    assert probe(film).notes == ("its pictures have a wide gamut: they are converted to BT.709",)


def test_the_shared_hlg_film_looks_like_its_source(shared_clips: Path, shared_faults: Path):
    hdr = next(iter(read_frames(shared_faults / "02_hdr_hlg.mp4"))).astype(int)
    sdr = next(iter(read_frames(shared_clips / "audio_short_2s.mp4")))
    sdr = cv2.resize(sdr, (360, 640), interpolation=cv2.INTER_AREA)
    assert np.abs(hdr - sdr).mean() < 3.2  # 9.0 without tone mapping; much is the HDR film's compression


@pytest.mark.parametrize(("width", "height", "kr", "kb"), [(1280, 720, 0.2126, 0.0722), (640, 360, 0.299, 0.114)])
def test_untagged_colours_are_read_by_size(tmp_path: Path, width: int, height: int, kr: float, kb: float):
    film = tmp_path / "film.mp4"
    picture = np.zeros((height, width, 3))
    picture[:32, :256] = in_patches(PATCHES / 255)
    write(film, [yuv(picture, kr, kb, bits=8)])
    read = next(iter(read_frames(film)))
    np.testing.assert_allclose(patches_of(read[:32, :256]), PATCHES, atol=1.5)
    assert bool(probe(film).notes) == (height == 720)


def test_the_shared_untagged_film_has_its_true_colours(shared_faults: Path):
    truth = cv2.imread(str(shared_faults / "08_truth.png"))[..., ::-1].astype(int)
    read = next(iter(read_frames(shared_faults / "08_untagged_hd_bt709.mp4")))
    assert np.abs(read - truth).mean() < 0.8


@pytest.mark.parametrize(
    ("ratio", "matrix", "size"),
    [
        (Fraction(3, 2), None, (96, 64)),
        (Fraction(1, 2), None, (64, 128)),
        (Fraction(2), [0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30], (64, 128)),
        (Fraction(855, 854), None, (64, 64)),
    ],
)
def test_pixels_become_square(tmp_path: Path, ratio: Fraction, matrix: list[int] | None, size: tuple[int, int]):
    """A circle is stored squeezed by the shape of the pixels, and shown round."""
    film = tmp_path / "film.mp4"
    y, x = np.mgrid[0:64, 0:64] + 0.5
    wide, high = max(ratio, Fraction(1)), max(1 / ratio, Fraction(1))
    circle = ((x - 32) * float(wide)) ** 2 + ((y - 32) * float(high)) ** 2 < 28**2
    stored = np.where(circle[..., None], 200, 20).astype(np.uint8).repeat(3, axis=2)
    stored[..., 1:] = 128
    write(film, [stored], ratio=ratio, matrix=matrix)
    picture = next(iter(read_frames(film)))
    assert (probe(film).width, probe(film).height) == size == picture.shape[1::-1]
    inside = picture[..., 1] > 100
    assert inside.any(axis=0).sum() == pytest.approx(inside.any(axis=1).sum(), abs=2)
    assert len(probe(film).notes) == (ratio != Fraction(855, 854))


def test_the_shared_film_with_flat_pixels_is_shown_wide(shared_faults: Path):
    info = probe(shared_faults / "01_sar_3to2.mp4")
    assert (info.width, info.height) == (360, 288)


def combed(picture: np.ndarray) -> float:
    """The share of pixels that differ from both neighbours above and below in the same direction."""
    grey = picture.mean(axis=2)
    above, below = grey[1:-1] - grey[:-2], grey[1:-1] - grey[2:]
    return float((above * below > 400).mean())


def test_interlaced_pictures_are_made_whole(shared_faults: Path):
    film = shared_faults / "03_interlaced_tff.mp4"
    pictures = list(itertools.islice(read_frames(film), 12))
    with av.open(str(film)) as container:
        stored = [frame.to_ndarray(format="rgb24") for frame in itertools.islice(container.decode(video=0), 12)]
    assert np.mean([combed(picture) for picture in stored]) > 0.03
    assert np.mean([combed(picture) for picture in pictures]) < 0.002
    assert probe(film).notes == ("its pictures are interlaced: bwdif makes whole pictures of them",)
    for start in (3, 9):
        for picture, expected in zip(read_frames(film, start, 3), pictures[start:], strict=False):
            np.testing.assert_array_equal(picture, expected)


def test_each_field_counts_at_other_rates(tmp_path: Path):
    """29.97i has 59.94 fields a second: a bar that moves by 4 pixels a field is found where it is at every i/25 s."""
    film, rate = tmp_path / "film.mp4", Fraction(30000, 1001)
    fields = []
    for number in range(60):
        field = np.full((64, 320, 3), 30, np.uint8)
        field[:, 4 * number : 4 * number + 24] = 220
        fields.append(field)
    frames = []
    for bottom, top in zip(fields[::2], fields[1::2], strict=True):  # x264 marks the bottom field as the first
        frame = top.copy()
        frame[1::2] = bottom[1::2]
        frame[..., 1:] = 128
        frames.append(frame)
    write(film, frames, params="qp=0:tff=1", rate=rate)
    for i, picture in enumerate(itertools.islice(read_frames(film), 1, 22), 1):
        bar = np.flatnonzero(picture[32, :, 1] > 125)
        expected = 4 * (Fraction(i, 25) * 2 * rate)  # left edge of the bar at i/25 s
        assert float(bar[0]) == pytest.approx(float(expected), abs=2.5)
