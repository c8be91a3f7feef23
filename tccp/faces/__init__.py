"""Face detectors and landmark backends behind one interface, and tracks of persons.

`mediapipe` returns 68 points and needs one weights file. `fan`, which the paper uses, returns 68 points and needs two
weights files; it is fast only on a GPU. `lbp`, scikit-image's cascade, needs no download, finds frontal faces and
returns boxes without landmarks.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Literal, get_args

from tccp import weights as third_party
from tccp.errors import TccpError
from tccp.faces.face import MAX_FACES, Face, FaceBackend, iou
from tccp.faces.fan import FanBackend
from tccp.faces.lbp import LbpBackend
from tccp.faces.mesh import MediapipeBackend, ibug_from_mesh
from tccp.faces.person_track import LBP_DROP, LBP_SIDE, head_boxes_from_faces, link, track
from tccp.faces.presence import MAX_BRIDGED_FRAMES, MIN_SEEN_FRAMES, MIN_STRETCH_FRAMES, stretches, with_gaps_closed

__all__ = [
    "LBP_DROP",
    "LBP_SIDE",
    "MAX_BRIDGED_FRAMES",
    "MAX_FACES",
    "MIN_SEEN_FRAMES",
    "MIN_STRETCH_FRAMES",
    "BackendName",
    "Face",
    "FaceBackend",
    "FanBackend",
    "LbpBackend",
    "MediapipeBackend",
    "check_backend",
    "find_weights",
    "head_boxes_from_faces",
    "ibug_from_mesh",
    "iou",
    "link",
    "open_backend",
    "stretches",
    "track",
    "with_gaps_closed",
]

BackendName = Literal["mediapipe", "fan", "lbp"]


def open_backend(name: BackendName | str, weights: Path | None = None) -> FaceBackend:
    """Opens a detector. Close it after use: MediaPipe's own clean-up at exit fails and prints errors.

    weights: the folder of the weights, or the file itself. For `fan`, give FAN's file and keep S3FD's in the same
    folder. The default is TCCP_WEIGHTS, else <storage>/weights. Nothing is downloaded.
    Raises TccpError if the name is unknown, or if weights or a package are missing or unreadable.
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
        raise _not_installed(name, error.name) from None
    *others, last = get_args(BackendName)
    raise TccpError(f"unknown face backend {name!r}: choose {', '.join(others)} or {last}")


def check_backend(name: BackendName | str, weights: Path | None = None) -> None:
    """Raises TccpError as `open_backend`, for what can be seen without loading the detector."""
    package = {"mediapipe": "mediapipe", "fan": "face_alignment", "lbp": "skimage"}.get(name)
    if package is not None and importlib.util.find_spec(package) is None:
        raise _not_installed(name, package)
    if name == "mediapipe":
        find_weights(weights)
    elif name == "fan":
        third_party.find("s3fd", None if weights is None else third_party.find("fan", weights).parent)


def _not_installed(name: str, package: str | None) -> TccpError:
    return TccpError(
        f"face backend {name} needs {package}, which is not installed: "
        "pip install -c constraints.txt -e '.[preprocess]'"
    )


def find_weights(given: Path | None = None) -> Path:
    """The file of MediaPipe's landmark model. Raises TccpError that names the folders searched."""
    return third_party.find("mediapipe", given)
