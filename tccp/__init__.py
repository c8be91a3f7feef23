"""TCCP generates a talking head into a scene, from audio, a film with the head masked, and a picture of the person.

    import tccp

    pipeline = tccp.Pipeline.from_pretrained("toy")
    for frame in pipeline.generate("film.mp4", "speech.wav", "face.png"):
        show(frame.picture)

Names are imported when they are first used, so `import tccp` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tccp.threads import wait_passively

if TYPE_CHECKING:
    from tccp.errors import StorageError, TccpError
    from tccp.inference.film import FilmRequest, FilmResult
    from tccp.inference.film_generation import FilmOutcome
    from tccp.inference.frames import GeneratedFrame
    from tccp.inference.pipeline import Pipeline, generate_film, generate_films
    from tccp.progress import ProgressEvent
    from tccp.serving.client import Client

__version__ = "0.1.0"

wait_passively()

_HOME = {
    "Client": "tccp.serving.client",
    "FilmOutcome": "tccp.inference.film_generation",
    "FilmRequest": "tccp.inference.film",
    "FilmResult": "tccp.inference.film",
    "GeneratedFrame": "tccp.inference.frames",
    "Pipeline": "tccp.inference.pipeline",
    "ProgressEvent": "tccp.progress",
    "StorageError": "tccp.errors",
    "TccpError": "tccp.errors",
    "generate_film": "tccp.inference.pipeline",
    "generate_films": "tccp.inference.pipeline",
}

__all__ = [
    "Client",
    "FilmOutcome",
    "FilmRequest",
    "FilmResult",
    "GeneratedFrame",
    "Pipeline",
    "ProgressEvent",
    "StorageError",
    "TccpError",
    "__version__",
    "generate_film",
    "generate_films",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'tccp' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
