"""SyncNet (Chung & Zisserman 2016, "Out of time: automated lip sync in the wild"), in the published layout.

Only the layout comes from the authors' release (syncnet_v2.model): names and shapes of the tensors, strides and
paddings. The lip branch takes 5 frames, the sound branch 20 MFCC steps, both 0.2 s. Their 1024-vectors are close if
lips and sound belong together, so the offset of a film is the one with the least mean distance.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Float32, Int16, UInt8
from torch import Tensor, nn

from tccp.config import SAMPLES_PER_FRAME
from tccp.models.checkpoint import load_published
from tccp.models.mfcc import mfcc

SIZE_PX = 224
WINDOW_FRAMES = 5
WINDOW_STEPS = 20
STEPS_PER_FRAME = 4
MAX_OFFSET = 15
"""The tested offsets are -15..15 frames."""
EMBEDDING = 1024
_BATCH = 16  # windows per evaluation, so that memory use does not grow with the length of the film


def _conv2d(c_in: int, c_out: int, kernel: int | tuple[int, int], padding: int) -> list[nn.Module]:
    return [nn.Conv2d(c_in, c_out, kernel, padding=padding), nn.BatchNorm2d(c_out), nn.ReLU()]


def _conv3d(c_in: int, c_out: int, frames: int, kernel: int, stride: int, padding: int) -> list[nn.Module]:
    conv = nn.Conv3d(c_in, c_out, (frames, kernel, kernel), (1, stride, stride), (0, padding, padding))
    return [conv, nn.BatchNorm3d(c_out), nn.ReLU()]


def _head() -> nn.Sequential:
    return nn.Sequential(nn.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, EMBEDDING))


class SyncNet(nn.Module):
    """The network with both branches. Use it in `eval()` mode, because batch norm must use the stored statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.netcnnaud = nn.Sequential(  # 13 cepstra x 20 steps
            *_conv2d(1, 64, 3, 1),
            nn.Identity(),  # stands for the published network's 1 x 1 pooling, to keep the layers' numbers
            *_conv2d(64, 192, 3, 1),
            nn.MaxPool2d(3, (1, 2)),  # 11 x 9
            *_conv2d(192, 384, 3, 1),
            *_conv2d(384, 256, 3, 1),
            *_conv2d(256, 256, 3, 1),
            nn.MaxPool2d(3, 2),  # 5 x 4
            *_conv2d(256, 512, (5, 4), 0),  # 1 x 1
        )
        self.netfcaud = _head()
        self.netfclip = _head()
        self.netcnnlip = nn.Sequential(  # 224 px; only the first layer spans several frames
            *_conv3d(3, 96, WINDOW_FRAMES, 7, 2, 0),  # 109
            nn.MaxPool3d((1, 3, 3), (1, 2, 2)),  # 54
            *_conv3d(96, 256, 1, 5, 2, 1),  # 26
            nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)),  # 13
            *_conv3d(256, 256, 1, 3, 1, 1),
            *_conv3d(256, 256, 1, 3, 1, 1),
            *_conv3d(256, 256, 1, 3, 1, 1),
            nn.MaxPool3d((1, 3, 3), (1, 2, 2)),  # 6
            *_conv3d(256, 512, 1, 6, 1, 0),  # 1
        )

    def embed_sound(self, cepstra: Float[Tensor, "w 1 13 20"]) -> Float[Tensor, "w 1024"]:
        """One vector per window. cepstra: 20 steps of `mfcc` per window, from samples on the scale of 16-bit PCM."""
        return self.netfcaud(self.netcnnaud(cepstra).flatten(1))

    def embed_lips(self, pictures: Float[Tensor, "3 f 224 224"]) -> Float[Tensor, "w 1024"]:
        """One vector per window of 5 consecutive pictures (f - 4 windows). pictures: faces, BGR, 0..255."""
        features = self.netcnnlip(pictures[None])[0, :, :, 0, 0]
        return self.netfclip(features.T)


@dataclass(frozen=True)
class SyncNetOffset:
    """The result of `syncnet_offset`.

    offset: in frames, with the published sign: positive if the sound comes *early*. confidence (LSE-C): median minus
    minimum, over all offsets, of the mean distance. distance (LSE-D): that minimum.
    """

    offset: int
    confidence: float
    distance: float


def syncnet_offset(
    network: SyncNet, pictures: Iterable[UInt8[np.ndarray, "224 224 3"]], pcm: Int16[np.ndarray, " n"]
) -> SyncNetOffset:
    """The offset of sound and lips, as syncnet_python measures it.

    pictures: a face at 25 fps, RGB, cropped as by `preprocessing.reels.chip_box`. pcm: 16 kHz sound of the same time.
    Raises ValueError if there are fewer than 6 frames of either.
    """
    return read_offset(distances(lip_embeddings(network, pictures), sound_embeddings(network, pcm)))


def lip_embeddings(
    network: SyncNet, pictures: Iterable[UInt8[np.ndarray, "224 224 3"]]
) -> Float32[np.ndarray, "w 1024"]:
    """One vector per window of 5 pictures (RGB), with stride 1. Reads the pictures one at a time."""
    device = next(network.parameters()).device
    parts = [np.zeros((0, EMBEDDING), np.float32)]
    with torch.inference_mode():
        for part in _overlapping(pictures):
            bgr = torch.from_numpy(np.ascontiguousarray(part[..., ::-1])).to(device)
            parts.append(network.embed_lips(bgr.permute(3, 0, 1, 2).float()).cpu().numpy())
    return np.concatenate(parts)


def _overlapping(pictures: Iterable[UInt8[np.ndarray, "h w 3"]]) -> Iterator[UInt8[np.ndarray, "f h w 3"]]:
    """Batches of pictures that overlap by 4, so that they contain each window of 5 once. None for fewer than 5."""
    rest = iter(pictures)
    kept = list(islice(rest, WINDOW_FRAMES - 1))
    while more := list(islice(rest, _BATCH)):
        yield np.stack(kept + more)
        kept = (kept + more)[1 - WINDOW_FRAMES :]


def sound_embeddings(network: SyncNet, pcm: Int16[np.ndarray, " n"]) -> Float32[np.ndarray, "w 1024"]:
    """One vector per frame whose 20 steps lie in the sound: five fewer than the sound's whole frames."""
    device = next(network.parameters()).device
    num_frames = len(pcm) // SAMPLES_PER_FRAME
    parts = [np.zeros((0, EMBEDDING), np.float32)]
    if num_frames > WINDOW_FRAMES:
        steps = np.lib.stride_tricks.sliding_window_view(mfcc(pcm), WINDOW_STEPS, axis=0)
        windows = steps[::STEPS_PER_FRAME][: num_frames - WINDOW_FRAMES]
        with torch.inference_mode():
            for start in range(0, len(windows), _BATCH):
                part = torch.from_numpy(np.ascontiguousarray(windows[start : start + _BATCH])).to(device)
                parts.append(network.embed_sound(part[:, None]).cpu().numpy())
    return np.concatenate(parts)


def distances(lips: Float32[np.ndarray, "a d"], sound: Float32[np.ndarray, "b d"]) -> Float32[np.ndarray, "w 31"]:
    """Distances of each lip window to the sound windows from 15 before it to 15 after it. Zeros extend the sound.

    w: the number of windows that both have.
    """
    count = min(len(lips), len(sound))
    lips = lips[:count]
    padded = np.pad(sound[:count], ((MAX_OFFSET, MAX_OFFSET), (0, 0)))
    # The 1e-6 is from torch's pairwise_distance, which the published code uses.
    columns = [np.linalg.norm(lips - padded[k : k + count] + 1e-6, axis=1) for k in range(2 * MAX_OFFSET + 1)]
    return np.stack(columns, axis=1).astype(np.float32)


def read_offset(distances: Float32[np.ndarray, "w 31"]) -> SyncNetOffset:
    """The offset with the least mean distance. Raises ValueError if there are no windows."""
    if len(distances) == 0:
        raise ValueError(f"no windows: SyncNet needs at least {WINDOW_FRAMES + 1} frames of pictures and of sound")
    mean = distances.mean(0, dtype=np.float64)
    best = int(np.argmin(mean))
    return SyncNetOffset(MAX_OFFSET - best, float(np.median(mean) - mean[best]), float(mean[best]))


def load_syncnet(path: Path) -> SyncNet:
    """The network with published weights. Raises TccpError like `load_published`."""
    return load_published(path, SyncNet(), "SyncNet", "give the published syncnet_v2.model")
