"""Face detectors and landmark backends behind one interface, and the track of one person.

`mediapipe` gives 68 points and needs its weights file. `fan`, the paper's, gives 68 points and needs two files and, to
be quick, a GPU. `lbp`, scikit-image's cascade, needs no download, finds frontal faces and gives boxes only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from tccp import weights as third_party
from tccp.errors import TccpError
from tccp.faces.face import MAX_FACES, Face, FaceBackend, iou
from tccp.faces.fan import FanBackend
from tccp.faces.lbp import LbpBackend
from tccp.faces.mesh import MediapipeBackend, ibug_from_mesh
from tccp.faces.person_track import LBP_DROP, LBP_SIDE, head_boxes_from_faces, link, track

__all__ = [
    "LBP_DROP",
    "LBP_SIDE",
    "MAX_FACES",
    "BackendName",
    "Face",
    "FaceBackend",
    "FanBackend",
    "LbpBackend",
    "MediapipeBackend",
    "find_weights",
    "head_boxes_from_faces",
    "ibug_from_mesh",
    "iou",
    "link",
    "open_backend",
    "track",
]

BackendName = Literal["mediapipe", "fan", "lbp"]


def open_backend(name: BackendName | str, weights: Path | None = None) -> FaceBackend:
    """A detector, ready to use; close it after use (left open, MediaPipe's clean-up fails noisily at the very end).

    weights: the folder they are in, or the file: of `mediapipe` its one, of `fan` FAN's, with S3FD's beside it; by
    default TCCP_WEIGHTS, else <storage>/weights. Nothing is downloaded.
    Raises TccpError for an unknown name, for weights that are absent or unreadable, and for a package that is absent.
    """
    try:
        if name == "mediapipe":
            return MediapipeBackend(find_weights(weights))
        if name == "fan":
            fan = third_party.find("fan", weights)
            return FanBackend(fan, third_party.find("s3fd", None if weights is None else fan.parent))
        if name == "lbp":
            return LbpBackend()
    except ModuleNotFoundError as error:
        raise TccpError(
            f"face backend {name} needs {error.name}, which is not installed: "
            "pip install -c constraints.txt -e '.[preprocess]'"
        ) from None
    *others, last = get_args(BackendName)
    raise TccpError(f"unknown face backend {name!r}: choose {', '.join(others)} or {last}")


def find_weights(given: Path | None = None) -> Path:
    """MediaPipe's landmark model. Raises TccpError that says where it was looked for."""
    return third_party.find("mediapipe", given)
