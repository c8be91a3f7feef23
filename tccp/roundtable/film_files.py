"""Writes and reads RoundTable films, each with a file of ground truth and an identity picture beside it."""

from __future__ import annotations

import io
import math
import zlib
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from zipfile import BadZipFile

import cv2
import numpy as np
from jaxtyping import UInt8

from tccp.config import FPS, SAMPLES_PER_FRAME
from tccp.errors import TccpError
from tccp.media import VideoWriter
from tccp.roundtable.world import RoundTableClip, Truth, synthesise

TRUTH_SUFFIX, IDENTITY_SUFFIX = ".truth.npz", ".identity.png"
FILMS_VERSION = 2
"""Increased when the same seed gives another film: films that are kept in a storage are keyed by it."""
UNREADABLE = (OSError, ValueError, EOFError, OverflowError, MemoryError, BadZipFile, zlib.error)
"""Errors of NumPy for damaged `.npz` files."""
_MOST_PX = 100_000
_PER_FRAME = ("landmarks_px", "head_box", "yaw_deg", "mouth_opening", "mouth_width", "addressee", "others_box")
_SCALARS = {"seed": int, "person_seed": int, "width": int, "height": int, "kind": str, "lag_s": float}


def write_clips(
    out: str | Path,
    clips: int,
    seconds: float | int,
    seed: int = 0,
    people: int | None = None,
    width: int = 256,
    height: int = 192,
    lossless: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
    excerpt_s: float | int | None = None,
) -> list[Path]:
    """Writes films `roundtable_<seed>_<k>.mp4` with sound, each with `.truth.npz` and `.identity.png` beside it.

    people: number of different talkers, who take turns; by default each clip has its own talker. progress: called with
    (name, frames done, frames in all). excerpt_s: write only an excerpt of this length of each clip of `seconds`, from
    a random start. Existing files are replaced, each when its new version is complete.
    Raises TccpError if numbers are out of range or `out` cannot be written to.
    """
    if clips < 1 or (people is not None and people < 1):
        spoken = "" if people is None else f" of {people} people"
        raise TccpError(f"{clips} clips{spoken}: give at least 1{' of each' if spoken else ''}")
    if seed < 0:
        raise TccpError(f"seed {seed}: give an integer of at least 0")
    if not (math.isfinite(seconds) and round(seconds * FPS) >= 1):
        raise TccpError(f"clips of {seconds} s: give at least {1 / FPS} s, one frame")
    num_frames = num_kept = round(seconds * FPS)
    if excerpt_s is not None:
        if not (math.isfinite(excerpt_s) and 1 <= round(excerpt_s * FPS) <= num_frames):
            raise TccpError(
                f"excerpt of {excerpt_s} s of clips of {seconds} s: give at least {1 / FPS} s, at most the whole clip"
            )
        num_kept = round(excerpt_s * FPS)
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TccpError(f"{folder}: cannot create this folder ({error.strerror}): choose another") from None
    clip_seeds = np.random.SeedSequence([seed, 1]).generate_state(clips, np.uint64) >> 1
    person_seeds = np.random.SeedSequence([seed, 2]).generate_state(people or clips, np.uint32)
    starts = np.random.default_rng([seed, 3]).integers(num_frames - num_kept + 1, size=clips)
    written = []
    for k in range(clips):
        person_seed = int(person_seeds[k % len(person_seeds)])
        clip = synthesise(int(clip_seeds[k]), seconds, width, height, person_seed)
        path = folder / f"roundtable_{seed}_{k:04d}.mp4"
        write_clip(clip, path, lossless, progress, range(starts[k], starts[k] + num_kept))
        written.append(path)
    return written


def write_clip(
    clip: RoundTableClip,
    path: str | Path,
    lossless: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
    frames: range | None = None,
) -> None:
    """Writes the clip, or these frames of it, as a film with its ground truth and identity picture.

    Writes the film last, so that the other files exist wherever a film exists.
    """
    path = Path(path)
    frames = frames or range(clip.num_frames)
    audio = clip.audio[frames.start * SAMPLES_PER_FRAME : frames.stop * SAMPLES_PER_FRAME]
    try:
        _replace_with(truth_path(path), _npz_bytes(clip.between(frames.start, frames.stop)))
        _replace_with(identity_path(path), cv2.imencode(".png", clip.identity[..., ::-1])[1].tobytes())
    except OSError as error:
        raise TccpError(f"{path.parent}: cannot be written to ({error.strerror}): choose another folder") from None
    with VideoWriter(path, clip.width, clip.height, audio_from=audio, lossless=lossless) as film:
        for done, frame in enumerate(frames, start=1):
            film.write(clip.render(frame))
            if progress is not None:
                progress(path.name, done, len(frames))


def truth_path(film: str | Path) -> Path:
    """Where the truth of a film lies: `<name>.truth.npz` beside it."""
    return Path(film).with_suffix(TRUTH_SUFFIX)


def identity_path(film: str | Path) -> Path:
    """Where the identity picture of a film's talker lies: `<name>.identity.png` beside it."""
    return Path(film).with_suffix(IDENTITY_SUFFIX)


def read_truth(path: str | Path) -> Truth:
    """The ground truth of a film, from the path of the film or of its truth file.

    Raises TccpError if the truth file does not exist or cannot be read.
    """
    path = Path(path)
    source = path if path.suffix == ".npz" else truth_path(path)
    if not source.is_file():
        raise TccpError(f"{source}: no such truth file; `tccp synth` writes one beside every film")
    try:
        with np.load(source, allow_pickle=False) as stored:
            values = {
                field.name: _SCALARS[field.name](stored[field.name].item())
                if field.name in _SCALARS
                else stored[field.name]
                for field in fields(Truth)
            }
        truth = Truth(**values)
        _check_truth(truth)
    except (*UNREADABLE, KeyError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise TccpError(f"{source}: not a RoundTable truth file ({reason}): write it again with `tccp synth`") from None
    return truth


def _check_truth(truth: Truth) -> None:
    """Raises ValueError unless all arrays have a row per frame, and positions are possible."""
    frames = {name: len(getattr(truth, name)) for name in _PER_FRAME}
    if len(set(frames.values())) != 1 or not truth.num_frames:
        raise ValueError(f"its arrays have {min(frames.values())} to {max(frames.values())} frames")
    if truth.landmarks_px.shape[1:] != (68, 2) or truth.head_box.shape[1:] != (4,):
        raise ValueError("landmarks or head boxes have another shape")
    if not (1 <= truth.width <= _MOST_PX and 1 <= truth.height <= _MOST_PX):
        raise ValueError(f"a picture of {truth.width}x{truth.height} pixels")
    for positions in (truth.landmarks_px, truth.head_box):
        if not (np.abs(positions) < _MOST_PX).all():  # also where they are NaN
            raise ValueError("a position is not a number of pixels")
    if not (truth.head_box[:, 2:] > truth.head_box[:, :2]).all():
        raise ValueError("a head box is empty")


def read_identity(path: str | Path) -> UInt8[np.ndarray, "s s 3"]:
    """The identity picture beside a film, RGB. Raises TccpError if it does not exist or cannot be read."""
    source = identity_path(path)
    picture = cv2.imread(str(source), cv2.IMREAD_COLOR) if source.is_file() else None
    if picture is None:
        raise TccpError(f"{source}: no readable picture; `tccp synth` writes one beside every film")
    return np.ascontiguousarray(picture[..., ::-1])


def _npz_bytes(truth: Truth) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **{field.name: np.asarray(getattr(truth, field.name)) for field in fields(Truth)})  # type: ignore[arg-type]
    return buffer.getvalue()


def _replace_with(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
