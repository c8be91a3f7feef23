"""Previews of a job, and its film: heads that are kept are pasted into the scene, and the film gets its place."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jaxtyping import Float32, UInt8

from tccp import headbox
from tccp.errors import StorageError
from tccp.files import Folder
from tccp.inference.film_windows import SceneWindow
from tccp.inference.finishing import FilmFile, Head, finished_frame
from tccp.inference.frames import SceneFrame
from tccp.inference.scene import scene_frames
from tccp.media.sandbox import Limits
from tccp.serving.decoders import Decoders
from tccp.serving.job_folder import JobFolder, Plan
from tccp.serving.spec import Role, VideoSpec
from tccp.serving.work import KeptWindow

FILM, LANDMARKS, REPORT = "film.mp4", "landmarks.jsonl", "report.json"
_PREVIEW_PX = 640
_JPEG = [cv2.IMWRITE_JPEG_QUALITY, 85]


@dataclass(frozen=True)
class PreviewScene:
    """A frame of the scene for a preview. box: of the head, in its pixels. frame: number in the film."""

    frame: int
    jpeg: bytes
    box: Float32[np.ndarray, "4"]


@dataclass(frozen=True)
class PreparedWindow:
    """A window's inputs as they go through the stages, and a frame of the scene for its preview."""

    window: SceneWindow
    preview: PreviewScene | None = None


def preview_scene(frame: SceneFrame) -> PreviewScene:
    """The frame as a small picture. It must show the person."""
    height, width = frame.picture.shape[:2]
    scale = min(1.0, _PREVIEW_PX / max(height, width))
    small = cv2.resize(frame.picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    assert frame.box is not None
    return PreviewScene(frame.index, jpeg_of(small), (frame.box * scale).astype(np.float32))


def preview(scene: PreviewScene, face: UInt8[np.ndarray, "s s 3"], color_match: bool) -> bytes:
    """The JPEG of the frame with the head in it."""
    decoded = cv2.imdecode(np.frombuffer(scene.jpeg, np.uint8), cv2.IMREAD_COLOR)
    assert decoded is not None  # `preview_scene` has made it
    picture = np.asarray(cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB), np.uint8)
    return jpeg_of(headbox.paste(picture, face, scene.box, color_match=color_match))


def jpeg_of(picture: UInt8[np.ndarray, "h w 3"]) -> bytes:
    """The JPEG of an RGB picture."""
    return bytes(cv2.imencode(".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), _JPEG)[1])


class Publishing:
    """Makes the films of jobs whose windows are all kept."""

    def __init__(self, storage: Folder, limits: Limits | None = None):
        self._storage = storage
        self._decoders = Decoders(limits)

    def close(self) -> None:
        self._decoders.close()

    def finish(
        self,
        job_id: str,
        fence: int,
        spec: VideoSpec,
        roles: list[Role],
        model: str,
        on_progress: Callable[[int, int], object] = lambda done, total: None,
    ) -> dict[str, Any]:
        """Writes the film of an attempt into its folder in the storage; returns what the job's result says.

        on_progress: called with frames done and all; it may raise, and then nothing is published.
        Raises TccpError for a film that cannot be written, FileNotFoundError if a window is not kept, StorageError if
        one is damaged or there is no plan.
        """
        folder = JobFolder(self._storage, job_id)
        plan = folder.read_plan()
        if plan is None:
            raise StorageError(f"{job_id} is not prepared, or its plan was damaged")
        with tempfile.TemporaryDirectory(prefix="tccp-film-") as place, folder.local_inputs(roles) as files:
            made = Path(place)
            landmarks = made / LANDMARKS if spec.save_landmarks and not spec.one_stage else None
            request = spec.film_request(files, model, None, out=made / FILM)
            request = dataclasses.replace(request, save_landmarks=landmarks)
            with self._decoders.borrowed() as decoder, self._decoders.borrowed() as sound_decoder:
                scene = decoder.probe(request.scene)
                sound = sound_decoder.film_sound(request.audio)
                film = FilmFile(request, scene, sound, plan.num_frames, plan.warnings)
                frames = scene_frames(request.scene, scene, plan.track, plan.num_frames, request.extend, decoder)
                try:
                    with closing(frames):  # type: ignore[type-var]
                        for frame, head in _with_heads(frames, folder, plan):
                            film.write(finished_frame(frame, head, request.color_match))
                            on_progress(film.num_frames, plan.num_frames)
                    found = film.complete()
                except BaseException as error:
                    film.discard(error)
                    raise
            result: dict[str, Any] = {
                "frames": found.frames,
                "generated": found.generated,
                "passed_through": found.passed_through,
                "reasons": found.reasons,
                "warnings": list(found.warnings),
                "width": plan.width,
                "height": plan.height,
                "seconds": plan.num_frames / 25,
                "folder": folder.film_folder(fence),
                "files": {},
            }
            report = {"id": job_id, "model": model, "spec": spec.model_dump(mode="json"), **result}
            (made / REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
            for path in sorted(made.iterdir()):
                result["files"][path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
                self._publish(path, f"{folder.film_folder(fence)}/{path.name}")
        return result

    def _publish(self, path: Path, name: str) -> None:
        with self._storage.writing(name) as target:
            shutil.copyfile(path, target)


def _with_heads(
    frames: Iterator[SceneFrame], folder: JobFolder, plan: Plan
) -> Iterator[tuple[SceneFrame, Head | None]]:
    """Each frame and the head that is kept for it. One window is in memory at a time."""
    starts = {first for shot in plan.shots for first, _ in shot.windows(plan.window)}
    window: KeptWindow | None = None
    for frame in frames:
        if frame.index in starts:
            window = folder.read_window(frame.index)
        if frame.box is None:
            yield frame, None
            continue
        assert window is not None
        i = frame.index - window.first
        points = None if window.points is None else window.points[i]
        confidence = None if window.confidence is None else float(window.confidence[i])
        yield frame, Head(window.faces[i], points=points, confidence=confidence)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def film_file(result: Mapping[str, Any], name: str) -> str | None:
    """The name in the storage of a file of a completed job; None if it has none of this name."""
    return f"{result['folder']}/{name}" if name in result["files"] else None
