"""Lip references: pictures of the person's mouth for the driving sound. Training and generation use the same source.

A source uses only sound and the identity picture, never a frame of the target video, because there is no target video
when generating, and training must give the network the same input.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from pathlib import Path

import cv2
import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from safetensors.torch import save_file
from torch import Tensor, nn

from tccp.config import LipSettings
from tccp.errors import TccpError
from tccp.headbox import CENTER, SIDE
from tccp.media.mel import MEL_VERSION, Sound, mel_windows, wav2lip_windows
from tccp.models.autoencoder import to_bytes, to_model
from tccp.models.liplet import Liplet, identity_picture
from tccp.models.wav2lip import SIZE_PX as WAV2LIP_PX
from tccp.models.wav2lip import Wav2Lip, load_wav2lip

LIPS_VERSION = 1
"""Increased when a source gives other pictures for the same mel, identity picture and weights."""
_FACE_BOX = np.array([-0.85, -0.55, 0.85, 1.45])  # in MEAN_FACE's coordinates: jaw to jaw, forehead to below the chin
_BATCH = 32  # frames per evaluation, so that memory use does not grow with the length of the sound


class LipSource(ABC):
    """Generates lip pictures of `size_px`. `hash` identifies the kind of source, its weights, the picture size, and the
    versions of the code that makes its inputs: rendered lips are keyed by it.
    """

    name: str

    def __init__(self, network: nn.Module, size_px: int, device: str | torch.device) -> None:
        self.network = network.eval().to(device)
        self.device = torch.device(device)
        self.size_px = size_px
        key = f"{self.name} {weights_hash(network)} {size_px} {LIPS_VERSION} {MEL_VERSION}"
        self.hash = hashlib.blake2b(key.encode(), digest_size=8).hexdigest()

    @abstractmethod
    def windows(self, samples: Sound, start_frame: int, num_frames: int) -> Float32[np.ndarray, "{num_frames} 80 16"]:
        """The mel windows for `lips` of these frames of the sound (16 kHz, -1..1)."""

    def lips(
        self, mel: Float[np.ndarray, "f 80 16"], identity: UInt8[np.ndarray, "h w 3"]
    ) -> UInt8[np.ndarray, "f {self.size_px} {self.size_px} 3"]:
        """Lip pictures, RGB, one per mel window. identity: a head crop of the person, of any size."""
        picture = self._prepare(identity)
        pictures = np.empty((len(mel), self.size_px, self.size_px, 3), np.uint8)
        with torch.inference_mode():
            for start in range(0, len(mel), _BATCH):
                window = torch.from_numpy(mel[start : start + _BATCH]).to(picture)
                lips = to_bytes(self._evaluate(window, picture.expand(len(window), -1, -1, -1)))
                pictures[start : start + _BATCH] = [_resize(one, self.size_px) for one in lips.cpu().numpy()]
        return pictures

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Writes the network without pickles into `folder`, for `open_lip_source`."""

    @abstractmethod
    def _prepare(self, identity: UInt8[np.ndarray, "h w 3"]) -> Float[Tensor, "1 c i j"]:
        """The network's picture input."""

    @abstractmethod
    def _evaluate(self, mel: Float[Tensor, "f 80 16"], picture: Float[Tensor, "f c i j"]) -> Float[Tensor, "f 3 i j"]:
        """Lips, RGB in [-1, 1]."""


class LipletSource(LipSource):
    """Lips from Liplet, which takes the centred mel window."""

    name = "liplet"
    network: Liplet

    def __init__(self, network: Liplet, device: str | torch.device = "cpu") -> None:
        super().__init__(network, network.config.size_px, device)

    def save(self, folder: Path) -> None:
        self.network.save_pretrained(folder)

    def windows(self, samples: Sound, start_frame: int, num_frames: int) -> Float32[np.ndarray, "{num_frames} 80 16"]:
        return mel_windows(samples, start_frame, num_frames)

    def _prepare(self, identity: UInt8[np.ndarray, "h w 3"]) -> Float[Tensor, "1 3 s s"]:
        picture = torch.from_numpy(identity_picture(identity, self.size_px))
        return to_model(picture.to(self.device)[None])

    def _evaluate(self, mel: Float[Tensor, "f 80 16"], picture: Float[Tensor, "f 3 s s"]) -> Float[Tensor, "f 3 s s"]:
        return self.network(mel, picture)


class Wav2LipSource(LipSource):
    """Lips from Wav2Lip, which takes its look-ahead window and the identity picture as reference and masked target.

    The paper drives Wav2Lip with the sound. It does not say on which picture; we use the identity picture, because
    there is no target video when generating. Wav2Lip expects a face box of a detector, but the identity picture shows
    a head with hair, neck and collar. So the usual region of a frontal face is cut out and stretched to a square, which
    needs no detector.
    """

    name = "wav2lip"
    FACE_REGION = tuple(float(edge) for edge in (_FACE_BOX - np.tile(CENTER[:2] - SIDE / 2, 2)) / SIDE)
    """x0 y0 x1 y1, fractions of the head crop."""

    def __init__(self, network: Wav2Lip, size_px: int = WAV2LIP_PX, device: str | torch.device = "cpu") -> None:
        super().__init__(network, size_px, device)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.network.state_dict(), folder / "wav2lip.safetensors")

    def windows(self, samples: Sound, start_frame: int, num_frames: int) -> Float32[np.ndarray, "{num_frames} 80 16"]:
        return wav2lip_windows(samples, start_frame, num_frames)

    def _prepare(self, identity: UInt8[np.ndarray, "h w 3"]) -> Float[Tensor, "1 6 96 96"]:
        height, width = identity.shape[:2]
        x0, y0, x1, y1 = (round(a * b) for a, b in zip(self.FACE_REGION, (width, height) * 2, strict=True))
        face = _resize(identity[y0:y1, x0:x1], WAV2LIP_PX)
        reference = torch.from_numpy(face).to(self.device).permute(2, 0, 1).flip(0)[None] / 255  # BGR
        masked = reference.clone()
        masked[:, :, WAV2LIP_PX // 2 :] = 0
        return torch.cat((masked, reference), dim=1)

    def _evaluate(
        self, mel: Float[Tensor, "f 80 16"], picture: Float[Tensor, "f 6 96 96"]
    ) -> Float[Tensor, "f 3 96 96"]:
        return self.network(mel[:, None], picture).flip(1) * 2 - 1


def _resize(picture: UInt8[np.ndarray, "h w 3"], size_px: int) -> UInt8[np.ndarray, "{size_px} {size_px} 3"]:
    return cv2.resize(picture, (size_px, size_px), interpolation=cv2.INTER_AREA)


def open_lip_source(
    settings: LipSettings, weights: Path | None, device: str | torch.device = "cpu"
) -> LipSource | None:
    """Opens the source of these settings; None for `none`.

    weights: a folder written by `LipSource.save`, or the published Wav2Lip `.pth`.
    Raises TccpError if the weights are missing or unreadable, or if their picture size differs from the settings'.
    """
    if settings.source == "none":
        return None
    if weights is None:
        raise TccpError(f"lips.source={settings.source} needs weights: give --lip-weights PATH or set lips.source=none")
    if settings.source == "wav2lip":
        path = weights / "wav2lip.safetensors" if weights.is_dir() else weights
        return Wav2LipSource(load_wav2lip(path), settings.size_px, device)
    network = load_liplet(weights)
    if network.config.size_px != settings.size_px:
        raise TccpError(
            f"liplet {weights} makes {network.config.size_px} px pictures; lips.size_px is {settings.size_px}: "
            "use the settings it was trained with"
        )
    return LipletSource(network, device)


def load_liplet(folder: Path) -> Liplet:
    """Loads a Liplet from its folder (`config.json` + safetensors). Raises TccpError with the folder and the reason."""
    if not (folder / "config.json").is_file():
        raise TccpError(f"liplet {folder}: not a folder with config.json; train one or set lips.source=none")
    try:
        network = Liplet.from_pretrained(folder)
    except (OSError, ValueError, TccpError) as error:
        raise TccpError(f"liplet {folder}: cannot be loaded ({str(error).splitlines()[0][:200]})") from None
    return network


def weights_hash(network: nn.Module) -> str:
    """Hash of names, shapes and values of all tensors, independent of the file format."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
