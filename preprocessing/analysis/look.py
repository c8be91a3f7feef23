"""Pass 1 over a film: finds the cuts and detects all faces. Only numbers and small face pictures are kept."""

from __future__ import annotations

import posixpath
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import UInt8

from preprocessing.analysis.detectors import Detectors
from preprocessing.plan import Plan
from preprocessing.reels import CHIP_PX, SPEECH_CHIP_PX, Faces, Reel, chip_box
from tccp.errors import TccpError
from tccp.faces import Face
from tccp.files import redacted
from tccp.media import MediaError
from tccp.media.remote import local_copy
from tccp.media.sandbox import Decoder
from tccp.media.shots import CONTEXT_FRAMES, CutFinder
from tccp.roundtable import read_truth
from tccp.roundtable.film_files import IDENTITY_SUFFIX, TRUTH_SUFFIX

CHIP_EVERY = 5
_CHIP_QUALITY = 90
# After so many frames without a face, the detector runs on every third frame until it finds one: it searches frames
# without a face more closely, at twenty times the cost of a frame with a face.
_PATIENCE_FRAMES = 12
_STRIDE_WITHOUT_FACES = 3


def look(reel: Reel, plan: Plan, decoder: Decoder, detectors: Detectors | None, on_frame: Callable[[], object]) -> Reel:
    """The reel with its cuts and faces. If it cannot be decoded, the whole reel is set aside with the reason.

    on_frame: called after each frame, for progress.
    """
    try:
        if plan.backend == "truth":
            return _with_truth(reel)
        with local_copy(reel.span.path) as path:
            assert detectors is not None
            return _with_faces(reel, plan, path, decoder, detectors, on_frame)
    except MediaError as error:
        text = f"{redacted(reel.span.path)}: {error.problem}"
        return replace(reel, span=reel.span.set_aside(error.reason, text), sound=None)


def _with_faces(
    reel: Reel, plan: Plan, path: Path, decoder: Decoder, detectors: Detectors, on_frame: Callable[[], object]
) -> Reel:
    cutter, cuts = CutFinder(), []
    search = _Search(plan, detectors, reel.start_frame)
    first = max(reel.start_frame - CONTEXT_FRAMES, reel.usable[0])
    stop = min(reel.stop_frame + CONTEXT_FRAMES, reel.usable[1])
    for frame, picture in enumerate(decoder.frames(path, first, stop - first, copy=False), start=first):
        cuts += [first + cut for cut in cutter.add(picture)]
        if reel.start_frame <= frame < reel.stop_frame:
            search.add(frame, picture)
            on_frame()
    cuts += [first + cut for cut in cutter.finish()]
    return replace(
        reel, cuts=tuple(cut for cut in cuts if reel.start_frame < cut < reel.stop_frame), faces=search.finish()
    )


class _Search:
    """Looks for faces in the frames of a reel, in as many at once as there are detectors."""

    def __init__(self, plan: Plan, detectors: Detectors, start_frame: int):
        self._plan = plan
        self._detectors = detectors
        self._last_seen = start_frame
        self._begun: deque[tuple[int, UInt8[np.ndarray, "h w 3"], Future[list[Face]] | None]] = deque()
        self._frames: list[int] = []
        self._faces: list[Face] = []
        self._chips: dict[int, bytes] = {}

    def _is_due(self, frame: int) -> bool:
        return frame - self._last_seen <= _PATIENCE_FRAMES or frame % _STRIDE_WITHOUT_FACES == 0

    def add(self, frame: int, picture: UInt8[np.ndarray, "h w 3"]) -> None:
        """picture: may change after the call."""
        if self._detectors.count > 1:
            picture = picture.copy()
        found = self._detectors.detect(picture) if self._is_due(frame) else None
        self._begun.append((frame, picture, found))
        if len(self._begun) >= self._detectors.count:
            self._take()

    def _take(self) -> None:
        frame, picture, found = self._begun.popleft()
        if found is None and self._is_due(frame):  # a frame before this one showed a face after all
            found = self._detectors.detect(picture)
        for face in [] if found is None else found.result():
            self._last_seen = frame
            if self._plan.speech_chips or frame % CHIP_EVERY == 0:
                side = SPEECH_CHIP_PX if self._plan.speech_chips else CHIP_PX
                self._chips[len(self._faces)] = encode_chip(picture, face, side)
            self._frames.append(frame)
            self._faces.append(face)

    def finish(self) -> Faces:
        while self._begun:
            self._take()
        missing = np.full((68, 2), np.nan, np.float32)
        points = [missing if face.landmarks_px is None else face.landmarks_px for face in self._faces]
        return Faces(
            frame=np.array(self._frames, np.int32),
            box=np.array([face.box for face in self._faces], np.float32).reshape(-1, 4),
            landmarks=np.array(points, np.float32).reshape(-1, 68, 2),
            confidence=np.array([face.confidence for face in self._faces], np.float32),
            chips=self._chips,
        )


def encode_chip(picture: UInt8[np.ndarray, "h w 3"], face: Face, side_px: int) -> bytes:
    """The picture of a face (`preprocessing.reels.chip_box`) as JPEG; outside the frame, its edges are repeated."""
    x0, y0, x1, _ = chip_box(face.box)
    step = float(x1 - x0) / side_px
    # In OpenCV, whole coordinates are pixel centres; here they are pixel corners.
    matrix = np.array([[step, 0, x0 + step / 2 - 0.5], [0, step, y0 + step / 2 - 0.5]])
    if step > 1.5:  # linear sampling would skip pixels: shrink the part that is needed first
        height, width = picture.shape[:2]
        left, top = int(np.clip(x0, 0, width - 1)), int(np.clip(y0, 0, height - 1))
        part = picture[top : max(int(y0 + step * side_px) + 2, top + 1), left : max(int(x1) + 2, left + 1)]
        part = cv2.resize(part, None, fx=1 / step, fy=1 / step, interpolation=cv2.INTER_AREA)
        matrix = np.array([[1.0, 0, (x0 - left) / step], [0, 1.0, (y0 - top) / step]])
        picture = np.asarray(part, np.uint8)
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    square = cv2.warpAffine(picture, matrix, (side_px, side_px), flags=flags, borderMode=cv2.BORDER_REPLICATE)
    done, data = cv2.imencode(
        ".jpg", cv2.cvtColor(square, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, _CHIP_QUALITY]
    )
    assert done
    return data.tobytes()


def _with_truth(reel: Reel) -> Reel:
    """Landmarks and head boxes of RoundTable footage, from the truth files beside the films, here or at a URL."""
    span = reel.span
    stem = posixpath.splitext(span.path)[0]
    try:
        with local_copy(f"{stem}{TRUTH_SUFFIX}") as file:
            truth = read_truth(file)
    except TccpError as error:
        return replace(reel, span=span.set_aside("no_truth", f"{redacted(span.path)}: {error}"), sound=None)
    frames = len(truth.landmarks_px)
    if frames < reel.usable[1] or (truth.width, truth.height) != (span.width, span.height):
        what = f"{frames} frames of {truth.width}x{truth.height}"
        text = f"{redacted(span.path)}: its truth file is for {what}; write both again with tccp synth"
        return replace(reel, span=span.set_aside("other_truth", text), sound=None)
    part = slice(reel.start_frame, reel.stop_frame)
    points = truth.landmarks_px[part].astype(np.float32)
    count = len(points)
    faces = Faces(
        frame=np.arange(part.start, part.stop, dtype=np.int32),
        box=np.concatenate([points.min(1), points.max(1)], 1).reshape(count, 4),
        landmarks=points,
        confidence=np.ones(count, np.float32),
        chips={},
    )
    span = replace(span, identity_path=f"{stem}{IDENTITY_SUFFIX}")
    return replace(reel, span=span, faces=faces, head_box=truth.head_box[part].astype(np.float32))
