"""Reads still pictures, such as a photograph of a person, as 8-bit sRGB, upright and without transparency.

The content decides on the format, not the name. Orientation (EXIF, HEIF's and AVIF's own) is applied once, colour
profiles are converted to sRGB, and transparent pixels show a neutral grey, never the colours hidden beneath them.
"""

from __future__ import annotations

import contextlib
import io
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import AvifImagePlugin, Image, ImageCms, ImageOps, MpoImagePlugin, TiffImagePlugin, WebPImagePlugin

from tccp.media.file_access import FileReader, file_status
from tccp.media.source import MediaError

try:
    import pi_heif
except ImportError:
    pi_heif = None
else:
    pi_heif.register_heif_opener()

Image.preinit()
_PLUGINS = (AvifImagePlugin, MpoImagePlugin, TiffImagePlugin, WebPImagePlugin)  # imported now: later it is forbidden
PICTURE_FORMATS = "JPEG, PNG, WebP, GIF, TIFF, BMP, AVIF or HEIC"
_MOST_BYTES = 1 << 29
_GREY = 127  # behind transparent pixels, as where a scene is masked
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}
_AVIF_BRANDS = {b"avif", b"avis"}
_MEMORY = MemoryError, RecursionError
_HDR = {16: "PQ", 18: "HLG"}  # transfer characteristics of ITU-T H.273
_TO_BT709 = {  # from linear light of other primaries of H.273: BT.2020 (ITU-R BT.2087) and Display P3 (SMPTE EG 432-1)
    9: ((1.6605, -0.5876, -0.0728), (-0.1246, 1.1329, -0.0083), (-0.0182, -0.1006, 1.1187)),
    12: ((1.2249, -0.2249, 0.0), (-0.0421, 1.0421, 0.0), (-0.0196, -0.0786, 1.0983)),
}
_ROWS = 256  # converted at a time

Pixels = UInt8[np.ndarray, "h w 3"]


@dataclass(frozen=True)
class Still:
    """A picture. num_pictures: how many the file holds; this is the first or main one. profile_ignored: the colour
    profile in the file is not valid, so its colours were taken as sRGB."""

    pixels: Pixels
    num_pictures: int = 1
    profile_ignored: bool = False

    @property
    def warnings(self) -> tuple[str, ...]:
        texts = []
        if self.num_pictures > 1:
            texts.append(f"it holds {self.num_pictures} pictures; the first one is used")
        if self.profile_ignored:
            texts.append("its colour profile is not valid; its colours are taken as sRGB")
        return tuple(texts)


def picture_format(head: bytes) -> str | None:
    """The format that the first 64 or more bytes of a file announce, by Pillow's name; None if it is no picture."""
    if head[4:8] == b"ftyp":
        size = min(max(int.from_bytes(head[:4], "big"), 16), len(head))
        brands = {head[8:12], *(head[at : at + 4] for at in range(16, size - 3, 4))}
        if head[8:12] in _AVIF_BRANDS or (head[8:12] in {b"mif1", b"msf1"} and brands & _AVIF_BRANDS):
            return "AVIF"
        return "HEIF" if head[8:12] in _HEIF_BRANDS else None
    if head[:4] == b"RIFF":
        return "WEBP" if head[8:12] == b"WEBP" else None
    marks = {
        b"\xff\xd8\xff": "JPEG",
        b"\x89PNG\r\n\x1a\n": "PNG",
        b"GIF87a": "GIF",
        b"GIF89a": "GIF",
        b"BM": "BMP",
        **dict.fromkeys((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), "TIFF"),
    }
    return next((name for mark, name in marks.items() if head.startswith(mark)), None)


def read_picture(path: Path, max_pixels: int) -> Still:
    """The picture in a file.

    Raises MediaError: not_picture if the content is of no known format, unsupported, corrupt, or unsafe if it has more
    than max_pixels pixels.
    """
    with FileReader(path) as file:
        kind = picture_format(file.read(64))
        if kind is None:
            raise MediaError(path, "not_picture", f"this is no picture of a known format; give {PICTURE_FORMATS}")
        if file_status(path).num_bytes > _MOST_BYTES:
            raise MediaError(path, "unsafe", f"it is a picture of more than {_MOST_BYTES >> 20} MiB; shrink it")
        if kind == "HEIF" and pi_heif is None:
            raise MediaError(path, "unsupported", "HEIC needs the package pi-heif; install it, or give a JPEG")
        file.seek(0)
        data = file.read()
    try:
        with Image.open(io.BytesIO(data), formats=[kind]) as image:
            _check_size(path, image, max_pixels)
            image.load()
            _check_size(path, image, max_pixels)  # that of HEIF is known for sure only now
            count = 1 if image.format in ("MPO", "JPEG") else int(getattr(image, "n_frames", 1))
            return _converted(path, image, data, kind, count)
    except (MediaError, *_MEMORY):
        raise
    except Exception as error:  # Pillow's plugins raise many kinds for damaged files
        what = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, Image.UnidentifiedImageError):
            what = f"it begins like {kind}, but cannot be read"
        text = f"the picture is damaged ({what}); export it again, as {PICTURE_FORMATS}"
        raise MediaError(path, "corrupt", text) from None


def _check_size(path: Path, image: Image.Image, max_pixels: int) -> None:
    if image.width * image.height > max_pixels:
        what = f"it is {image.width}x{image.height}; the limit is {max_pixels} pixels (max_pixels)"
        raise MediaError(path, "unsafe", f"{what}: shrink it, or allow more")


def _converted(path: Path, image: Image.Image, data: bytes, kind: str, count: int) -> Still:
    profile = image.info.get("icc_profile")
    primaries, transfer = _signalled_colours(data, kind)
    if transfer in _HDR and not profile:
        text = f"it is an HDR picture ({_HDR[transfer]}), whose colours are not converted; export it as sRGB"
        raise MediaError(path, "unsupported", text)
    with contextlib.suppress(Exception):  # a damaged EXIF block states no orientation
        image = ImageOps.exif_transpose(image)
    image, alpha = _without_alpha(path, image)
    rgb, ignored = _to_srgb(image, profile)
    if not profile and primaries in _TO_BT709:
        rgb = _from_primaries(rgb, np.array(_TO_BT709[primaries], np.float32))
    if alpha is not None:
        weight = alpha[..., None].astype(np.uint32)
        rgb = ((rgb * weight + _GREY * (255 - weight) + 127) // 255).astype(np.uint8)
    return Still(np.ascontiguousarray(rgb), count, ignored)


def _without_alpha(path: Path, image: Image.Image) -> tuple[Image.Image, UInt8[np.ndarray, "h w"] | None]:
    """The colours as 8-bit L, RGB, CMYK or LAB, and the opacity if there is any."""
    mode, clear = image.mode, image.info.get("transparency")
    if mode.startswith("I;16"):
        levels = np.asarray(image).astype(np.uint32)
        alpha = np.where(levels == clear, 0, 255).astype(np.uint8) if isinstance(clear, int) else None
        return Image.fromarray(((levels * 255 + 32767) // 65535).astype(np.uint8)), alpha
    if mode in ("I", "F"):
        text = "its pixels are numbers of 32 bits, which state no brightness; export it with 8 or 16 bits"
        raise MediaError(path, "unsupported", text)
    if mode in ("LA", "La"):
        grey, opacity = image.convert("LA").split()
        return grey, np.asarray(opacity)
    if mode in ("RGBA", "RGBa", "PA") or clear is not None:
        rgba = np.asarray(image.convert("RGBA"))
        return Image.fromarray(np.ascontiguousarray(rgba[..., :3])), rgba[..., 3]
    if mode in ("L", "RGB", "CMYK", "LAB"):
        return image, None
    return image.convert("L" if mode == "1" else "RGB"), None


def _to_srgb(image: Image.Image, profile: bytes | None) -> tuple[Pixels, bool]:
    """The colours as sRGB, and whether the profile had to be ignored."""
    ignored = False
    source: Any = ImageCms.createProfile("LAB") if image.mode == "LAB" else None
    if profile:
        try:
            embedded = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            space = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}.get(embedded.profile.xcolor_space.strip())
            if space == "L" and image.mode == "RGB" and _is_grey(image):
                image = image.convert("L")
            ignored = space != image.mode
            source = source if ignored else embedded
        except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
            ignored = True
    if source is not None:
        try:
            to_srgb = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), image.mode, "RGB")
            if image.mode != "RGB" or _changes(to_srgb):
                image = ImageCms.applyTransform(image, to_srgb) or image
        except ImageCms.PyCMSError:
            ignored = True
    return np.asarray(image.convert("RGB")), ignored


def _is_grey(image: Image.Image) -> bool:
    red, green, blue = (np.asarray(band) for band in image.split())
    return np.array_equal(red, green) and np.array_equal(green, blue)


def _changes(to_srgb: ImageCms.ImageCmsTransform) -> bool:
    """Whether a transform does more than round: many files carry a copy of sRGB itself."""
    levels = np.linspace(0, 255, 9).round().astype(np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(27, 27, 3)
    after = ImageCms.applyTransform(Image.fromarray(grid), to_srgb)
    return after is not None and int(np.abs(np.asarray(after).astype(int) - grid).max()) > 1


def _signalled_colours(data: bytes, kind: str) -> tuple[int, int]:
    """Primaries and transfer characteristics as numbers of ITU-T H.273; (2, 2) if the file states none."""
    mark = {"AVIF": b"colrnclx", "HEIF": b"colrnclx", "PNG": b"cICP"}.get(kind)
    at = data.find(mark, 0, 1 << 16) if mark else -1
    if at < 0:
        return 2, 2
    start = at + len(mark or b"")
    try:
        return struct.unpack_from(">BB" if kind == "PNG" else ">HH", data, start)
    except struct.error:
        return 2, 2


def _from_primaries(rgb: Pixels, matrix: np.ndarray) -> Pixels:
    """Converts sRGB-encoded colours of other primaries to those of sRGB. Colours outside it are cut off."""
    codes = np.arange(256, dtype=np.float32) / 255
    to_linear = np.where(codes <= 0.04045, codes / 12.92, ((codes + 0.055) / 1.055) ** 2.4).astype(np.float32)
    out = np.empty_like(rgb)
    for top in range(0, len(rgb), _ROWS):
        linear = np.clip(to_linear[rgb[top : top + _ROWS]] @ matrix.T, 0, 1)
        encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
        out[top : top + _ROWS] = np.rint(255 * encoded)
    return out
