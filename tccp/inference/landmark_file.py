"""Landmark files: JSON lines that generation writes, users edit, and generation reads again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
from jaxtyping import Float32

from tccp.config import FPS
from tccp.errors import TccpError
from tccp.files import atomic_path
from tccp.inference.conditioning import LANDMARK_DIGITS, rounded
from tccp.inference.frames import GeneratedFrame
from tccp.strict_json import parse_json

_FARTHEST = 2.0  # from the corner of the head box, in its sides: an edited point may lie outside


class LandmarkFile:
    """Reads the landmarks of a film from JSON lines, one line per frame.

    After a header line, each line is `{"frame": i, "confidence": c, "points": [[x, y] x 68]}`, with points in 0..1 of
    the head box, or null if no face could be read (drawn as a black picture). Only one line is in memory at a time. Use
    it as a context manager.
    Raises TccpError if the file cannot be opened or is not a landmark file.
    """

    def __init__(self, path: Path):
        self.path = path
        self._line = 1  # the one read last
        try:
            self._file: IO[str] = path.open(encoding="utf-8")
        except OSError as error:
            raise self._refused(error.strerror or str(error)) from None
        try:
            header = parse_json(self._file.readline())
            if not isinstance(header, dict) or header.get("tccp") != "landmarks":
                raise ValueError("its first line is not a landmark header")
        except (OSError, ValueError) as error:
            self.close()
            raise self._refused(str(error)) from None

    def _refused(self, reason: str) -> TccpError:
        return TccpError(
            f"{self.path} is not a landmark file ({reason}): make one with `tccp generate --save-landmarks`"
        )

    def read(self, frame: int) -> tuple[Float32[np.ndarray, "68 2"], float]:
        """Points (NaN if the file says null) and confidence of a frame. Call with frame numbers in ascending order.

        Raises TccpError for an invalid line, and if the file has no such frame.
        """
        for number, points, confidence in self._rows():
            if number == frame:
                return points, confidence
        raise TccpError(
            f"{self.path} has no landmarks for frame {frame}: it must hold every frame with a head, in order; "
            "use the same scene, sound and head box"
        )

    def check(self) -> None:
        """Reads the file once. Raises TccpError for its first invalid line."""
        start = self._file.tell()
        for _ in self._rows():
            pass
        self._file.seek(start)
        self._line = 1

    def _rows(self) -> Iterator[tuple[int, Float32[np.ndarray, "68 2"], float]]:
        """Frame number, points and confidence of the following lines."""
        while line := self._file.readline():
            self._line += 1
            try:
                yield _row(line)
            except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
                raise TccpError(
                    f"{self.path}, line {self._line}: is not as `--save-landmarks` writes it "
                    f"({type(error).__name__}: {error}); correct it"
                ) from None

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> LandmarkFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _row(line: str) -> tuple[int, Float32[np.ndarray, "68 2"], float]:
    record = parse_json(line)
    frame, confidence = record["frame"], float(record.get("confidence", 1.0))
    if isinstance(frame, bool) or not isinstance(frame, int) or frame < 0:
        raise ValueError(f"frame {frame!r:.40} is not a number of a frame")
    if not 0 <= confidence <= 1:
        raise ValueError(f"confidence {confidence:g} is outside 0..1")
    if record["points"] is None:
        return frame, np.full((68, 2), np.nan, np.float32), confidence
    points = np.array(record["points"], np.float64)
    if points.shape != (68, 2) or not np.isfinite(points).all():
        raise ValueError(f"68 finite pairs of numbers are needed, not an array of {points.shape}")
    if np.abs(points).max() > _FARTHEST:
        raise ValueError(f"a point at {points.flat[np.abs(points).argmax()]:g}: give points in 0..1 of the head box")
    return frame, points.astype(np.float32), confidence


@contextmanager
def landmark_writer(path: Path | None) -> Iterator[Callable[[GeneratedFrame], None]]:
    """Gives a function that writes a frame's landmarks to `path`; without a path it writes nothing.

    The file appears when the block succeeds.
    """
    if path is None:
        yield lambda frame: None
        return
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        header = {"tccp": "landmarks", "fps": FPS, "coordinates": "0..1 of the head box", "order": "iBUG 68"}
        file.write(json.dumps(header) + "\n")

        def write(frame: GeneratedFrame) -> None:
            if frame.points is not None:
                points = rounded(frame.points).astype(np.float64).round(LANDMARK_DIGITS).tolist()
                known = bool(np.isfinite(frame.points).all())
                record = {"frame": frame.index, "confidence": frame.confidence, "points": points if known else None}
                file.write(json.dumps(record) + "\n")

        yield write
