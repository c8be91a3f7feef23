"""The settings of a preprocessing run: resolved once, where the run is started, and sent to every worker."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, cast

from preprocessing.analysis.cut import MIN_CLIP_S, clip_frames
from preprocessing.analysis.quality import QualityBounds
from preprocessing.spans import Span
from tccp import faces, weights
from tccp.clips.clip_table import GEOMETRY_VERSION, SCHEMA_VERSION
from tccp.errors import TccpError
from tccp.media.sandbox import Limits

Backend = Literal["mediapipe", "fan", "truth"]
Speakers = Literal["active", "main"]

LOOK_VERSION = 3
"""Increased when pass 1 (`preprocessing.analysis.look`) finds other faces, cuts or chips in the same film, and when
`tccp.media` gives other pictures, times or sound of it."""
SELECT_VERSION = 3
"""Increased when the same faces and sound give other clips."""
RENDER_VERSION = 2
"""Increased when the same clips give other rows."""

REEL_S = 60.0
NO_BOUNDS = QualityBounds(**{item.name: None for item in fields(QualityBounds)})
"""For footage with known truth, of which nothing is left out."""
_OPTIONAL_NETWORKS = {
    "light-asd": "who speaks",
    "silero-vad": "voice activity",
    "syncnet": "a/v offset",
    "sface": "persons",
}


@dataclass(frozen=True)
class Plan:
    """Everything except the films that the results depend on.

    backend: the source of landmarks: a face detector, or `truth`, the truth files of RoundTable footage. backend_key:
    its versions and weights. weights: files by name; weight_hashes: their SHA-256. Workers use exactly these files,
    whatever other weights are on their machines. speakers: `active` makes clips where a person is seen to speak, `main`
    of the main person of each shot, speaking or not. person_pictures: only clips of this person are made.
    """

    picture_px: int
    backend: Backend
    backend_key: str
    weights: Mapping[str, Path] = field(default_factory=dict)
    weight_hashes: Mapping[str, str] = field(default_factory=dict)
    speakers: Speakers = "active"
    person_pictures: tuple[str, ...] = ()
    person_key: str = ""
    max_clip_s: float = 5.0
    min_clip_s: float = MIN_CLIP_S
    reel_s: float = REEL_S
    bounds: QualityBounds = field(default_factory=QualityBounds)
    limits: Limits = field(default_factory=Limits)

    @property
    def speech_chips(self) -> bool:
        """Whether pass 1 stores a picture of every face, for the speech networks."""
        return self.backend != "truth" and bool({"light-asd", "syncnet"} & self.weights.keys())

    @property
    def look_key(self) -> str:
        """Hash of everything that pass 1 (`preprocessing.analysis.look`) depends on except the film: 16 hex digits."""
        cuts = "" if self.backend == "truth" else importlib.metadata.version("scenedetect")
        return _hash(LOOK_VERSION, self.backend_key, self.speech_chips, self.reel_s, cuts)

    @property
    def provenance(self) -> str:
        """Hash of everything that a clip's landmarks, head boxes and pictures depend on except the film: 16 hex digits.

        Clip ids contain it, so that what is computed from a clip and kept under its id is never that of other pictures.
        """
        rendered = (RENDER_VERSION,) if RENDER_VERSION > 1 else ()  # the first version was not part of it
        return _hash(self.look_key, GEOMETRY_VERSION, *rendered)

    @property
    def part_key(self) -> str:
        """Hash of everything that a clip's row depends on except the film: 16 hex digits."""
        chosen = {name: self.weight_hashes[name] for name in sorted(self.weights) if name in _OPTIONAL_NETWORKS}
        lengths = (self.speakers, self.person_key, self.max_clip_s, self.min_clip_s)
        versions = (SELECT_VERSION, RENDER_VERSION, SCHEMA_VERSION)
        return _hash(self.provenance, *versions, self.picture_px, chosen, *lengths, asdict(self.bounds))

    def part_name(self, span: Span) -> str:
        """Path of the file with the clips of a reel, relative to the output folder."""
        person = (span.person_picture,) if span.person_key is None else (span.person_picture, span.person_key)
        listed = _hash(span.source, span.speaker_x, span.speaker_y, *person)
        return f"clips/{self.part_key}/{span.source_hash}-{span.start_frame}-{listed[:8]}.parquet"

    def look_name(self, span: Span) -> str:
        """Path of the file with the results of pass 1 for a reel. It depends on the film's content, not on its name."""
        return f"work/looks/{self.look_key}/{span.source_hash}-{span.start_frame}.parquet"

    def record(self) -> dict[str, Any]:
        """The settings for the report, without paths of this machine."""
        values = asdict(self)
        for name in ("weights", "limits", "person_key"):
            values.pop(name)
        found = sorted(self.weights.keys() & _OPTIONAL_NETWORKS.keys())
        absent = sorted(_OPTIONAL_NETWORKS.keys() - self.weights.keys())
        values["person_pictures"] = [Path(path).name for path in self.person_pictures]
        return values | {
            "weights": found,
            "without": [f"{name} ({_OPTIONAL_NETWORKS[name]})" for name in absent],
            "look_key": self.look_key,
            "part_key": self.part_key,
        }


def make_plan(
    picture_px: int,
    backend: Backend | str = "mediapipe",
    weights_place: Path | None = None,
    max_clip_s: float = 5.0,
    min_clip_s: float = MIN_CLIP_S,
    speakers: Speakers = "active",
    person_pictures: tuple[str, ...] = (),
    bounds: QualityBounds | None = None,
    limits: Limits | None = None,
) -> Plan:
    """Resolves the settings of a run and finds the weights.

    weights_place: the file of the face landmark model, or a folder of weights; by default as in `tccp.weights`. An
    optional network is used if its weights are found there.
    Raises TccpError for impossible clip lengths, for an unknown backend, and if the backend's weights are missing.
    """
    clip_frames(min_clip_s, max_clip_s)
    person_key = _hash(*[_content(path) for path in person_pictures]) if person_pictures else ""
    found: dict[str, Path] = {}
    if backend == "truth":
        key, bounds = "truth", bounds or NO_BOUNDS
    elif backend != "mediapipe" and backend != "fan":
        problem = "finds boxes only, and clips need 68 landmarks" if str(backend) == "lbp" else "is not a backend"
        raise TccpError(f"backend {backend} {problem}: choose mediapipe, fan or truth")
    else:
        detector = faces.open_backend(backend, weights_place)
        key = detector.key
        detector.close()
        folder = weights_place if weights_place is not None and weights_place.is_dir() else None
        for name in _OPTIONAL_NETWORKS:
            path = weights.available(name, folder)
            if path is not None:
                found[name] = path.resolve()
    hashes = {name: weights.weights_key(path) for name, path in found.items()}
    if weights_place is not None:
        found["backend"] = weights_place.resolve()
    if person_pictures and "sface" not in found:
        raise TccpError("the person filter needs the weights of SFace: tccp weights fetch sface, or leave --person out")
    return Plan(
        picture_px=picture_px,
        backend=cast(Backend, backend),
        backend_key=key,
        weights=found,
        weight_hashes=hashes,
        speakers=speakers,
        person_pictures=person_pictures,
        person_key=person_key,
        max_clip_s=float(max_clip_s),
        min_clip_s=float(min_clip_s),
        bounds=bounds or QualityBounds(),
        limits=limits or Limits(),
    )


def _content(path: str) -> str:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise TccpError(f"person picture {path}: {error.strerror}; give a picture of the person") from None


def _hash(*parts: object) -> str:
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=8).hexdigest()


def detector_of(plan: Plan) -> faces.FaceBackend:
    """The face detector of a plan other than `truth`. Raises TccpError if this machine has another version of it."""
    detector = faces.open_backend(plan.backend, plan.weights.get("backend"))
    if detector.key != plan.backend_key:
        detector.close()
        raise TccpError(
            f"face detector {plan.backend} on {platform.node()} is {detector.key}, the run started with "
            f"{plan.backend_key}: install the same packages and weights on every machine"
        )
    return detector
