"""The one place where films are finished: heads are pasted into the scene, and the film is marked and written."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32, UInt8

from tccp import headbox
from tccp.inference.film import FilmRequest, FilmResult, OnFrame
from tccp.inference.frames import GeneratedFrame, SceneFrame
from tccp.inference.landmark_file import landmark_writer
from tccp.media import MediaInfo, VideoWriter, mark_generated
from tccp.media.film_sound import FilmSound


@dataclass(frozen=True)
class Head:
    """A generated head, and what `GeneratedFrame` tells of its inputs."""

    face: UInt8[np.ndarray, "s s 3"]
    masked_scene: UInt8[np.ndarray, "s s 3"] | None = None
    landmark_picture: UInt8[np.ndarray, "s s 3"] | None = None
    points: Float32[np.ndarray, "68 2"] | None = None
    confidence: float | None = None


def finished_frame(frame: SceneFrame, head: Head | None, color_match: bool) -> GeneratedFrame:
    """The frame with the head in it, or passed through if it has no box.

    color_match: match the head's colours to the ring around the mask.
    """
    if frame.box is None:
        return GeneratedFrame(frame.index, frame.picture, reason=frame.reason)
    assert head is not None
    picture = headbox.paste(frame.picture, head.face, frame.box, color_match=color_match)
    return GeneratedFrame(index=frame.index, picture=picture, box=frame.box, **vars(head))


class FilmFile:
    """The written film of a request, and what is counted for its result."""

    def __init__(
        self,
        request: FilmRequest,
        scene: MediaInfo,
        sound: FilmSound,
        num_frames: int,
        warnings: Sequence[str],
        on_frame: OnFrame | None = None,
    ):
        """Nothing is written before the first frame. warnings: of the inputs; more may come until the film is complete.

        sound: of the film. num_frames: that it must have. on_frame: called with every frame.
        """
        assert request.out is not None
        self.request, self.out = request, request.out
        self._expected, self._warnings = num_frames, warnings
        self._on_frame = on_frame
        self._started = time.monotonic()
        self._open = ExitStack()
        self._writing = False
        self.num_frames, self._generated, self._reasons = 0, 0, Counter[str]()
        self._film = VideoWriter(
            request.out,
            scene.width,
            scene.height,
            sound,
            lossless=request.lossless,
            exact_size=request.exact_size,
            metadata=mark_generated(seed=str(request.seed), weights=Path(request.weights).absolute().name),
        )

    def write(self, frame: GeneratedFrame) -> None:
        if not self._writing:  # by now, every input is checked; create the folder only then
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self._open.enter_context(self._film)
            self._save = self._open.enter_context(landmark_writer(self.request.save_landmarks))
            self._writing = True
        self._film.write(frame.picture)
        self.num_frames += 1
        self._save(frame)
        if self._on_frame is not None:
            self._on_frame(frame)
        self._generated += frame.face is not None
        self._reasons.update([frame.reason] if frame.reason else [])

    def complete(self) -> FilmResult:
        """Gives the film its name."""
        self._open.close()
        frames, warnings = self._expected, tuple(self._warnings)
        seconds = round(time.monotonic() - self._started, 2)
        passed_through = frames - self._generated
        return FilmResult(self.out, frames, self._generated, passed_through, seconds, warnings, dict(self._reasons))

    def discard(self, error: BaseException) -> None:
        """Leaves nothing under the film's name."""
        self._open.__exit__(type(error), error, error.__traceback__)
