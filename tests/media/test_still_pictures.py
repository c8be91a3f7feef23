"""Still pictures: known by their content, upright, in sRGB, without what transparency hides. Read in the sandbox."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest
from heic import write_heic
from PIL import Image, ImageCms

from tccp.inference.identity_crop import identity_candidates
from tccp.media import MediaError, VideoWriter, probe, read_frames
from tccp.media.sandbox import Decoder, Limits
from tccp.media.still_pictures import picture_format, read_picture

GREY = 127
# What each EXIF orientation does to the stored picture, by the standard: row 0 and column 0 are at ...
UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.transpose(1, 0, 2),
    6: lambda p: np.rot90(p, -1),
    7: lambda p: p[::-1, ::-1].transpose(1, 0, 2),
    8: lambda p: np.rot90(p, 1),
}


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    with Decoder() as opened:
        yield opened


def gradient(height: int = 48, width: int = 64) -> np.ndarray:
    """A smooth picture whose corners differ, so that lossy formats keep it and every turn shows."""
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    return np.stack([220 * x + 20, 200 * y + 30, 120 * (1 - x) + 60 * y + 20], -1).round().astype(np.uint8)


def saved(path: Path, picture: np.ndarray | Image.Image, kind: str, **options: Any) -> Path:
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    image.save(path, kind, **options)
    return path


def exif(orientation: int) -> bytes:
    block = Image.Exif()
    block[274] = orientation
    return block.tobytes()


LOSSY = {"JPEG": {"quality": 95, "subsampling": 0}, "AVIF": {"quality": 95, "subsampling": "4:4:4"}}
LOSSLESS: dict[str, dict[str, Any]] = {"PNG": {}, "BMP": {}, "TIFF": {}, "WEBP": {"lossless": True}}


@pytest.mark.parametrize("kind", [*LOSSLESS, *LOSSY, "GIF"])
def test_a_picture_is_known_by_its_content_not_by_its_name(kind: str, tmp_path: Path, decoder: Decoder) -> None:
    picture = gradient()
    if kind == "GIF":  # has 256 colours
        picture = (picture // 64 * 64).astype(np.uint8)
    path = saved(tmp_path / "identity.mp4", picture, kind, **{**LOSSY, **LOSSLESS}.get(kind, {}))
    still = decoder.picture(path)
    assert np.abs(still.pixels.astype(int) - picture).max() <= (4 if kind in LOSSY else 0)
    assert still.warnings == () and picture_format(path.read_bytes()[:64]) == kind
    candidates = identity_candidates(path, decoder)
    assert not candidates.is_film and np.array_equal(candidates.pictures[0], still.pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "AVIF"])
def test_orientation_is_applied_once(kind: str, orientation: int, tmp_path: Path, decoder: Decoder) -> None:
    options = {**LOSSY, **LOSSLESS}[kind]
    path = saved(tmp_path / "turned", gradient(), kind, exif=exif(orientation), **options)
    expected = UPRIGHT[orientation](gradient())
    pixels = decoder.picture(path).pixels
    assert pixels.shape == expected.shape
    assert np.abs(pixels.astype(int) - expected).max() <= 5


@pytest.mark.parametrize(("width", "height"), [(64, 48), (131, 97), (132, 97), (131, 98)])
def test_heic_shows_its_own_size_and_turn(width: int, height: int, tmp_path: Path, decoder: Decoder) -> None:
    for quarter_turns in range(4):
        write_heic(tmp_path / "a.heic", gradient(height, width), quarter_turns)
        pixels = decoder.picture(tmp_path / "a.heic").pixels
        expected = np.rot90(gradient(height, width), quarter_turns)
        assert pixels.shape == expected.shape
        assert np.abs(pixels.astype(int) - expected).max() <= 4


def test_what_transparency_hides_is_not_shown(tmp_path: Path, decoder: Decoder) -> None:
    picture = np.zeros((32, 32, 4), np.uint8)
    picture[:] = (0, 255, 0, 0)  # hidden green
    picture[8:24, 8:24] = (200, 100, 50, 255)
    picture[8:24, 16:24, 3] = 128
    half = [round((value * 128 + GREY * 127) / 255) for value in (200, 100, 50)]
    expected = np.full((32, 32, 3), GREY, np.uint8)
    expected[8:24, 8:16], expected[8:24, 16:24] = (200, 100, 50), half
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True}), ("TIFF", {})):
        pixels = decoder.picture(saved(tmp_path / kind, picture, kind, **options)).pixels
        assert np.abs(pixels.astype(int) - expected).max() <= 1
    palette = Image.fromarray(np.repeat(np.arange(2, dtype=np.uint8)[:, None], 4, 1), "P")
    palette.putpalette([0, 255, 0, 200, 100, 50])
    for kind in ("PNG", "GIF"):
        pixels = decoder.picture(saved(tmp_path / kind, palette, kind, transparency=0)).pixels
        assert pixels[0, 0].tolist() == [GREY] * 3 and pixels[1, 0].tolist() == [200, 100, 50]
    grey = Image.merge("LA", [Image.new("L", (4, 4), 255), Image.new("L", (4, 4), 0)])
    assert (decoder.picture(saved(tmp_path / "grey", grey, "PNG")).pixels == GREY).all()


def profile(matrix: np.ndarray, gamma: float) -> bytes:
    """An ICC profile (version 2) of RGB with these columns, adapted to D50, and a power law."""

    def fixed(value: float) -> bytes:
        return struct.pack(">i", round(value * 65536))

    tags: dict[bytes, bytes] = {b"wtpt": b"XYZ \0\0\0\0" + b"".join(map(fixed, (0.9642, 1.0, 0.8249)))}
    for name, column in zip((b"r", b"g", b"b"), matrix.T, strict=True):
        tags[name + b"XYZ"] = b"XYZ \0\0\0\0" + b"".join(map(fixed, column))
        tags[name + b"TRC"] = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    text = b"test\0"
    tags[b"desc"] = b"desc\0\0\0\0" + struct.pack(">I", len(text)) + text + bytes(79)
    tags[b"cprt"] = b"text\0\0\0\0" + text
    table, data = b"", b""
    start = 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        table += name + struct.pack(">II", start + len(data), len(content))
        data += content
    head = bytearray(128)
    head[0:4] = struct.pack(">I", start + len(data))
    head[8:12], head[12:16], head[16:20], head[20:24] = b"\x02\x40\0\0", b"mntr", b"RGB ", b"XYZ "
    head[36:40], head[68:80] = b"acsp", b"".join(map(fixed, (0.9642, 1.0, 0.8249)))
    return bytes(head) + struct.pack(">I", len(tags)) + table + data


# Columns of Adobe RGB (1998) and sRGB, adapted to D50 (Bradford).
ADOBE = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])
SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])


def in_srgb(picture: np.ndarray, matrix: np.ndarray, gamma: float) -> np.ndarray:
    """The same colours by hand: to linear light, to sRGB's primaries, to sRGB's curve."""
    linear = (picture / 255) ** gamma @ (np.linalg.inv(SRGB) @ matrix).T
    linear = linear.clip(0, 1)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.rint(255 * encoded)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP", "AVIF"])
def test_colour_profiles_are_converted_to_srgb(kind: str, tmp_path: Path, decoder: Decoder) -> None:
    picture = (0.4 * gradient() + 70).astype(np.uint8)  # within sRGB
    options = {**LOSSY, **LOSSLESS}[kind]
    path = saved(tmp_path / kind, picture, kind, icc_profile=profile(ADOBE, 2.2), **options)
    expected = in_srgb(picture, ADOBE, 2.2)
    assert np.abs(expected - picture).max() > 12  # otherwise the test could not fail
    difference = np.abs(decoder.picture(path).pixels - expected)
    assert difference.mean() <= 1.5 if kind in LOSSY else difference.max() <= 2


def test_the_profile_of_srgb_changes_nothing(tmp_path: Path, decoder: Decoder) -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    path = saved(tmp_path / "s.png", gradient(), "PNG", icc_profile=srgb)
    assert np.array_equal(decoder.picture(path).pixels, gradient())


@pytest.mark.parametrize("given", [b"no profile", profile(ADOBE, 2.2)[:200]])
def test_a_broken_profile_is_ignored_and_said(given: bytes, tmp_path: Path, decoder: Decoder) -> None:
    still = decoder.picture(saved(tmp_path / "p.png", gradient(), "PNG", icc_profile=given))
    assert np.array_equal(still.pixels, gradient())
    assert still.warnings == ("its colour profile is not valid; its colours are taken as sRGB",)


@pytest.mark.parametrize("primaries", [9, 12])
def test_heic_of_wide_gamut_is_converted(primaries: int, tmp_path: Path, decoder: Decoder) -> None:
    """A colour of sRGB, stored in other primaries, is read as what it was. Primaries by their chromaticities."""
    corners = {9: ((0.708, 0.292), (0.17, 0.797), (0.131, 0.046)), 12: ((0.68, 0.32), (0.265, 0.69), (0.15, 0.06))}
    bt709 = ((0.64, 0.33), (0.3, 0.6), (0.15, 0.06))

    def to_xyz(chromaticities: tuple[tuple[float, float], ...]) -> np.ndarray:
        columns = np.array([(x / y, 1, (1 - x - y) / y) for x, y in chromaticities]).T
        white = np.array([0.3127 / 0.329, 1, (1 - 0.3127 - 0.329) / 0.329])
        return columns * np.linalg.solve(columns, white)

    meant = np.array([180, 120, 90])
    linear = ((meant / 255 + 0.055) / 1.055) ** 2.4
    other = np.linalg.solve(to_xyz(corners[primaries]), to_xyz(bt709) @ linear)
    stored = np.rint(255 * (1.055 * other ** (1 / 2.4) - 0.055)).astype(np.uint8)
    write_heic(tmp_path / "wide.heic", np.tile(stored, (32, 32, 1)), nclx=(primaries, 13))
    assert np.abs(decoder.picture(tmp_path / "wide.heic").pixels.astype(int) - meant).max() <= 3
    assert np.abs(stored.astype(int) - meant).max() > 3


@pytest.mark.parametrize("transfer", [16, 18])
def test_hdr_pictures_are_refused(transfer: int, tmp_path: Path, decoder: Decoder) -> None:
    write_heic(tmp_path / "hdr.heic", gradient(), nclx=(9, transfer))
    with pytest.raises(MediaError, match="HDR picture") as caught:
        decoder.picture(tmp_path / "hdr.heic")
    assert caught.value.reason == "unsupported"


def png16(path: Path, samples: np.ndarray, kind: int) -> Path:
    """A PNG of 16 bits a sample, by hand. kind: 0 grey, 2 RGB, 4 grey with opacity, 6 RGB with opacity."""
    height, width = samples.shape[:2]

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    head = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    data = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + data)
    return path


def test_16_bits_grey_palette_and_cmyk(tmp_path: Path, decoder: Decoder) -> None:
    levels = gradient().astype(np.uint16) * 257
    grey = levels[..., 0]
    assert np.array_equal(decoder.picture(png16(tmp_path / "rgb16.png", levels, 2)).pixels, gradient())
    expected = np.repeat(gradient()[..., :1], 3, 2)
    assert np.array_equal(decoder.picture(png16(tmp_path / "grey16.png", grey, 0)).pixels, expected)
    opaque = np.stack([grey, np.full_like(grey, 65535)], -1)
    assert np.array_equal(decoder.picture(png16(tmp_path / "la16.png", opaque, 4)).pixels, expected)
    cv2.imwrite(str(tmp_path / "grey16.tif"), grey)
    cv2.imwrite(str(tmp_path / "rgb16.tif"), levels[..., ::-1])
    assert np.array_equal(decoder.picture(tmp_path / "grey16.tif").pixels, expected)
    assert np.array_equal(decoder.picture(tmp_path / "rgb16.tif").pixels, gradient())
    for mode in ("L", "1", "P"):
        image = Image.fromarray(gradient()).convert(mode)
        pixels = decoder.picture(saved(tmp_path / f"{mode}.png", image, "PNG")).pixels
        assert np.array_equal(pixels, np.asarray(image.convert("RGB")))
    cmyk = Image.fromarray(gradient()).convert("CMYK")
    for kind in ("JPEG", "TIFF"):  # Pillow writes JPEG inverted, as Adobe does
        pixels = decoder.picture(saved(tmp_path / kind, cmyk, kind)).pixels
        assert np.abs(pixels.astype(int) - gradient()).mean() < 3
    grey_profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    still = decoder.picture(
        saved(tmp_path / "l.png", Image.fromarray(gradient()[..., 0]), "PNG", icc_profile=grey_profile)
    )
    assert np.array_equal(still.pixels, expected) and still.profile_ignored  # a profile for RGB says nothing of grey


def test_of_several_pictures_the_first_is_used_and_said(tmp_path: Path, decoder: Decoder) -> None:
    first, others = Image.fromarray(gradient()), [Image.new("RGB", (64, 48), color) for color in ("red", "blue")]
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {}), ("GIF", {})):
        path = saved(tmp_path / kind, first, kind, save_all=True, append_images=others, **options)
        candidates = identity_candidates(path, decoder)
        assert np.abs(candidates.pictures[0].astype(int) - gradient()).mean() < (8 if kind == "GIF" else 0.1)
        assert candidates.warnings == ("it holds 3 pictures; the first one is used",)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "AVIF", "HEIF"])
def test_damaged_pictures_give_one_line(kind: str, tmp_path: Path, decoder: Decoder) -> None:
    path = tmp_path / "damaged"
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    if kind == "HEIF":
        write_heic(path, noise)
    else:
        saved(path, noise, kind)
    whole = path.read_bytes()
    for length in (70, len(whole) // 2):
        path.write_bytes(whole[:length])
        with pytest.raises(MediaError) as caught:
            decoder.picture(path)
        text = str(caught.value)
        assert caught.value.reason == "corrupt" and "\n" not in text
        assert "JPEG, PNG, WebP, GIF, TIFF, BMP, AVIF or HEIC" in text


def test_pictures_beyond_the_limit_are_unsafe(tmp_path: Path) -> None:
    path = saved(tmp_path / "large.png", gradient(480, 640), "PNG")
    with Decoder(Limits(max_pixels=100_000)) as decoder:
        with pytest.raises(MediaError, match=r"it is 640x480; the limit is 100000 pixels \(max_pixels\)") as caught:
            decoder.picture(path)
        assert caught.value.reason == "unsafe"
        assert decoder.picture(saved(tmp_path / "small.png", gradient(), "PNG")).pixels.shape == (48, 64, 3)


def test_films_and_other_files_are_no_pictures(tmp_path: Path, decoder: Decoder) -> None:
    with VideoWriter(tmp_path / "film.mp4", 64, 48) as film:
        for _ in range(20):
            film.write(gradient())
    (tmp_path / "film.mp4").rename(tmp_path / "film.png")
    (tmp_path / "text.jpg").write_text("no picture at all, but text\n" * 10)
    for name in ("film.png", "text.jpg"):
        with pytest.raises(MediaError) as caught:
            decoder.picture(tmp_path / name)
        assert caught.value.reason == "not_picture"
    candidates = identity_candidates(tmp_path / "film.png", decoder)
    assert candidates.is_film and len(candidates.pictures) == 16
    with pytest.raises(MediaError, match="no picture, and no video or audio file of a known format; give JPEG, PNG"):
        identity_candidates(tmp_path / "text.jpg", decoder)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_mjpeg_films_with_exif_are_read_and_turned(orientation: int, tmp_path: Path) -> None:
    """PyAV 18.1 raises on any side data of a frame with EXIF."""
    buffer = io.BytesIO()
    Image.fromarray(gradient()).save(buffer, "JPEG", quality=95, subsampling=0, exif=exif(orientation))
    with av.open(str(tmp_path / "film.avi"), "w") as container:
        stream = container.add_stream("mjpeg", 25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj444p"
        container.start_encoding()
        for number in range(3):
            packet = av.Packet(buffer.getvalue())
            packet.pts = packet.dts = number
            packet.time_base, packet.stream, packet.is_keyframe = Fraction(1, 25), stream, True
            container.mux(packet)
    expected = UPRIGHT[orientation](gradient())
    info = probe(tmp_path / "film.avi")
    assert (info.height, info.width) == expected.shape[:2]
    for picture in read_frames(tmp_path / "film.avi"):
        assert np.abs(picture.astype(int) - expected).max() <= 8


def test_reading_in_process_gives_the_same(tmp_path: Path, decoder: Decoder) -> None:
    path = saved(tmp_path / "p.png", gradient(), "PNG", icc_profile=profile(ADOBE, 2.2))
    still, other = read_picture(path, 1 << 20), decoder.picture(path)
    assert np.array_equal(still.pixels, other.pixels) and still.warnings == other.warnings == ()
