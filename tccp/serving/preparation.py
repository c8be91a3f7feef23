"""Checks the inputs of a job, finds the head, and makes the inputs of its windows. Without torch.

All files of clients are decoded in the sandbox. A job's scene stays open between its windows, as far as there is room.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from tccp import faces, headbox
from tccp.config import Settings
from tccp.errors import TccpError
from tccp.files import Folder
from tccp.inference.conditioning import identity_picture
from tccp.inference.film import FilmInputs, find_head, identity_of, with_sampling
from tccp.inference.film_windows import scene_window
from tccp.inference.frames import SceneFrame
from tccp.inference.landmark_file import LandmarkFile
from tccp.inference.manifest import has_component, read_settings
from tccp.inference.pipeline_source import pipeline_folder
from tccp.inference.scene import scene_frames, shots
from tccp.media import MediaError, MediaInfo
from tccp.media.sandbox import Limits, SoundFile
from tccp.progress import ProgressEvent, progress
from tccp.serving.decoders import Decoders
from tccp.serving.job_folder import JobFolder, Plan, PlanCache, Shot
from tccp.serving.publishing import PreparedWindow, jpeg_of, preview_scene
from tccp.serving.spec import Role, VideoSpec
from tccp.serving.weight_versions import place

_MOST_OPEN = 8  # films
_LOOKED_AT = 5  # frames of a film in which heads are looked for
_MOST_READERS = 4  # of one film, for shots that are generated at once


class Stopped(Exception):
    """The caller does not need the result any more."""


class Preparation:
    """storage: of the server. limits: for the sandbox. detector_weights: file or folder of the face detector's."""

    def __init__(self, storage: Folder, limits: Limits | None = None, detector_weights: Path | None = None):
        self._storage, self._detector_weights = storage, detector_weights
        self._decoders = Decoders(limits)
        self._open: OrderedDict[str, _OpenFilm] = OrderedDict()
        self._plans = PlanCache()
        self._lock = threading.Lock()

    def close(self) -> None:
        with self._lock:
            films, self._open = list(self._open.values()), OrderedDict()
        for film in films:
            film.close()
        self._decoders.close()

    def analyse(
        self,
        job_id: str,
        spec: VideoSpec,
        roles: list[Role],
        weights: str,
        max_film_s: float,
        on_progress: Callable[[str, float], object] = lambda text, share: None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> Plan:
        """Checks a job's inputs and finds the head. The plan is kept in the job's folder.

        max_film_s: longest sound that is accepted. on_progress: called with what is done, and the share that is done.
        stopped: asked now and then; if it says so, `Stopped` is raised.
        Raises TccpError or MediaError for inputs that cannot be used.
        """
        folder = JobFolder(self._storage, job_id)
        known = folder.read_plan()
        if known is not None:
            return known

        def on_event(event: ProgressEvent) -> None:
            if stopped():
                raise Stopped
            on_progress(event.description, event.done / event.total if event.total else 0.0)

        with folder.local_inputs(roles) as files:
            request = spec.film_request(files, "", self._detector_weights)
            settings = with_sampling(self._settings(weights), request)
            for name in request.variants:
                if not has_component(self._pipeline(weights), name):
                    raise TccpError(f"the model has no network {name}: name another model, or leave out one_stage")
            with FilmInputs(request, True, self._decoders.borrowed) as inputs, progress(on_event) as tasks:
                seconds = inputs.num_frames / 25
                if seconds > max_film_s:
                    raise TccpError(f"the sound lasts {seconds:.1f} s: give at most {max_film_s:g} s")
                identity = identity_picture(identity_of(inputs), settings.picture_px)
                track = find_head(inputs, tasks)
                stretches = shots(request.scene, inputs.scene, track, inputs.num_frames, request.extend)
                points = confidence = None
                if inputs.landmarks is not None:
                    points, confidence = _given(inputs.landmarks, inputs.num_frames, stretches)
                plan = Plan(
                    num_frames=inputs.num_frames,
                    width=inputs.scene.width,
                    height=inputs.scene.height,
                    window=settings.window,
                    picture_px=settings.picture_px,
                    shots=tuple(Shot(one.start, len(one)) for one in stretches),
                    warnings=tuple(_without_paths(text, files) for text in inputs.warnings),
                    track=track,
                    identity=identity,
                    points=points,
                    confidence=confidence,
                )
        folder.write_plan(plan)
        return plan

    def prepared(
        self, job_id: str, spec: VideoSpec, roles: list[Role], weights: str, first: int, num_frames: int
    ) -> PreparedWindow:
        """The inputs of the frames that a window of a prepared job adds."""
        film = self._film(job_id, spec, roles)
        with film.lock:
            return film.window(self._settings(weights), first, num_frames)

    def heads(self, name: str) -> tuple[int, int, bytes, list[list[float]]]:
        """Width and height of a film in the storage, a frame of it as JPEG, and the boxes of the heads in that frame.

        The frame is the one of a few with most heads. Raises MediaError, and TccpError if there is no detector.
        """
        with self._storage.local_file(name) as path, self._decoders.borrowed() as decoder:
            info = decoder.probe(path)
            if not info.has_video:
                raise MediaError(path, "no_video", "the file has no pictures; scene needs a film with a video track")
            count = min(_LOOKED_AT, info.num_frames)
            pictures = [
                picture for _, picture in decoder.frames_at(path, [k * info.num_frames // count for k in range(count)])
            ]
        found: list[list[float]] = []
        shown = pictures[0]
        backend = faces.open_backend("mediapipe", self._detector_weights)
        try:
            for picture in pictures:
                boxes = [_head_box(face) for face in backend.detect(picture)]
                if len(boxes) > len(found):
                    found, shown = boxes, picture
        finally:
            backend.close()
        return info.width, info.height, jpeg_of(shown), found

    def forget(self, job_id: str) -> None:
        """Closes a job's films."""
        with self._lock:
            film = self._open.pop(job_id, None)
        if film is not None:
            film.close()

    def _settings(self, weights: str) -> Settings:
        return read_settings(self._pipeline(weights))

    def _pipeline(self, weights: str) -> Path:
        """A local folder with at least the manifest of the pipeline."""
        return pipeline_folder(place(weights, self._storage), ())

    def _film(self, job_id: str, spec: VideoSpec, roles: list[Role]) -> _OpenFilm:
        closed = []
        with self._lock:
            film = self._open.get(job_id)
            if film is None:
                folder = JobFolder(self._storage, job_id)
                film = self._open[job_id] = _OpenFilm(folder, self._plans.of(folder), spec, roles, self._decoders)
                while len(self._open) > _MOST_OPEN:
                    closed.append(self._open.popitem(last=False)[1])
            self._open.move_to_end(job_id)
        for one in closed:
            one.close()
        return film


class _OpenFilm:
    """The scene and the sound of a job. Its windows are read in any order, fastest in the order of the film."""

    def __init__(self, folder: JobFolder, plan: Plan, spec: VideoSpec, roles: list[Role], decoders: Decoders):
        self.lock = threading.Lock()
        self._plan, self._spec, self._decoders = plan, spec, decoders
        self._opened = ExitStack()
        with ExitStack() as opening:
            self._files = opening.enter_context(folder.local_inputs(roles))
            with decoders.borrowed() as decoder:
                self._scene: MediaInfo = decoder.probe(self._files["scene"])
                self._sound: SoundFile = opening.enter_context(decoder.sound(self._files["audio"]))
            self._opened = opening.pop_all()
        # By the number of the next frame.
        self._readers: OrderedDict[int, tuple[ExitStack, Iterator[SceneFrame]]] = OrderedDict()

    def close(self) -> None:
        with self.lock:
            for opened, _ in self._readers.values():
                opened.close()
            self._readers.clear()
            self._opened.close()

    def window(self, settings: Settings, first: int, num_frames: int) -> PreparedWindow:
        opened, frames = self._readers.pop(first) if first in self._readers else self._reader(first)
        try:
            read = [next(frames) for _ in range(num_frames)]
        except BaseException:
            opened.close()
            raise
        self._readers[first + num_frames] = opened, frames
        while len(self._readers) > _MOST_READERS:
            self._readers.popitem(last=False)[1][0].close()
        plan = self._plan
        given = None if plan.points is None or plan.confidence is None else _Points(plan.points, plan.confidence)
        return PreparedWindow(scene_window(read, self._sound, settings, given), preview_scene(read[0]))

    def _reader(self, first: int) -> tuple[ExitStack, Iterator[SceneFrame]]:
        with ExitStack() as opening:
            decoder = opening.enter_context(self._decoders.borrowed())
            plan, scene = self._plan, self._files["scene"]
            extend = self._spec.extend
            frames = scene_frames(scene, self._scene, plan.track, plan.num_frames, extend, decoder, first)
            opening.enter_context(closing(frames))  # type: ignore[type-var]
            return opening.pop_all(), frames


def _head_box(face: faces.Face) -> list[float]:
    if face.landmarks_px is not None:
        return [float(edge) for edge in headbox.head_boxes(face.landmarks_px[None])[0]]
    return [float(edge) for edge in faces.head_boxes_from_faces([face])[0]]


class _Points:
    """Given landmarks that are in memory."""

    def __init__(self, points: Float32[np.ndarray, "f 68 2"], confidence: Float32[np.ndarray, " f"]):
        self._points, self._confidence = points, confidence

    def read(self, frame: int) -> tuple[Float32[np.ndarray, "68 2"], float]:
        return self._points[frame], float(self._confidence[frame])


def _given(
    file: LandmarkFile, num_frames: int, stretches: list[range]
) -> tuple[Float32[np.ndarray, "f 68 2"], Float32[np.ndarray, " f"]]:
    """The landmarks of all frames with a head. Raises TccpError if the file lacks one."""
    points = np.full((num_frames, 68, 2), np.nan, np.float32)
    confidence = np.zeros(num_frames, np.float32)
    for stretch in stretches:
        for frame in stretch:
            points[frame], confidence[frame] = file.read(frame)
    return points, confidence


def _without_paths(text: str, files: dict[Any, Path]) -> str:
    """A message in which files of this machine have the names that the client knows."""
    for role, path in files.items():
        text = text.replace(str(path), str(role))
    return text
