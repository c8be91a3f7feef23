"""Light-ASD, which detects whether a visible face talks (Liao et al. 2023, "A Light Weight Model for Active Speaker
Detection"), in the layout of the published checkpoints.

Only the layout comes from the authors' release: names and shapes of the tensors, strides and paddings, which the
checkpoints determine. Two encoders of split convolutions (space or band first, then time) give 128 numbers per frame
each. Their sum passes through one recurrence forward and one backward in time. 1,021,636 parameters.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Float32, Int16, UInt8
from torch import Tensor, nn
from torch.nn import functional

from tccp.config import SAMPLES_PER_FRAME
from tccp.models.checkpoint import load_published
from tccp.models.mfcc import mfcc

SIZE_PX = 112
"""Side of the grey pictures: the middle of a face's 224 px chip, from the eyes down."""
STEPS_PER_FRAME = 4
"""Rows of cepstra, at 100 Hz, per frame."""
_CHANNELS = 128
_GREY_MEAN, _GREY_DEVIATION = 0.4161, 0.1688  # of the network's training pictures
_TALKS = 1  # index of the output for a talking face
_WINDOW_FRAMES, _WINDOW_STEP = 25, 5  # over a whole track, the recurrence would remember speech of seconds ago
_WINDOWS_AT_ONCE = 64
_REACH_FRAMES = 6  # reach of an encoder to either side: three kernels of five frames; for the sound, 17 steps
_PART_FRAMES = 50  # frames per encoder call; it bounds their memory use, about 2 MB a frame
_WINDOW_REST = 240  # samples of the last step's 25 ms window beyond the last frame


class _SplitBlock(nn.Module):
    """Two chains with kernels of 3 and of 5, each across space (or bands) first, then along time. A last layer mixes
    their sum.

    across: for each axis of the kernels, True if it is a space or band axis. stride: along these axes.
    """

    def __init__(
        self,
        first: str,
        conv: type[nn.Conv2d] | type[nn.Conv3d],
        norm: type[nn.BatchNorm2d] | type[nn.BatchNorm3d],
        across: tuple[bool, ...],
        c_in: int,
        c_out: int,
        stride: int = 1,
    ) -> None:
        super().__init__()

        def add(name: str, c_in: int, kernel: tuple[int, ...], stride: tuple[int, ...]) -> None:
            padding = tuple(k // 2 for k in kernel)
            self.add_module(name, conv(c_in, c_out, kernel, stride, padding, bias=False))  # type: ignore[arg-type]
            self.add_module(f"bn_{name}", norm(c_out, eps=1e-3))

        ones = (1,) * len(across)
        self.chains = []
        for k in (3, 5):
            add(f"{first}_{k}", c_in, tuple(k if a else 1 for a in across), tuple(stride if a else 1 for a in across))
            add(f"t_{k}", c_out, tuple(1 if a else k for a in across), ones)
            self.chains.append((f"{first}_{k}", f"t_{k}"))
        add("last", c_out, ones, ones)

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        narrow, wide = (self._apply_all(chain, x) for chain in self.chains)
        return self._apply_all(("last",), narrow + wide)

    def _apply_all(self, names: tuple[str, ...], x: Tensor) -> Tensor:
        for name in names:
            x = torch.relu(self.get_submodule(f"bn_{name}")(self.get_submodule(name)(x)))
        return x


class _VisualEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        kind = ("s", nn.Conv3d, nn.BatchNorm3d, (False, True, True))
        self.block1 = _SplitBlock(*kind, 1, 32, stride=2)
        self.block2 = _SplitBlock(*kind, 32, 64)
        self.block3 = _SplitBlock(*kind, 64, _CHANNELS)

    def forward(self, faces: Float[Tensor, "b f 112 112"]) -> Float[Tensor, "b f 128"]:
        x = self.block1(((faces / 255 - _GREY_MEAN) / _GREY_DEVIATION)[:, None])
        for block in (self.block2, self.block3):
            x = block(functional.max_pool3d(x, (1, 3, 3), (1, 2, 2), (0, 1, 1)))
        return x.amax((3, 4)).transpose(1, 2)


class _AudioEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        kind = ("m", nn.Conv2d, nn.BatchNorm2d, (True, False))
        self.block1 = _SplitBlock(*kind, 1, 32)
        self.block2 = _SplitBlock(*kind, 32, 64)
        self.block3 = _SplitBlock(*kind, 64, _CHANNELS)

    def forward(self, cepstra: Float[Tensor, "b steps 13"]) -> Float[Tensor, "b f 128"]:
        x = self.block1(cepstra.transpose(1, 2)[:, None])
        for block in (self.block2, self.block3):
            x = block(functional.max_pool2d(x, (1, 3), (1, 2), (0, 1)))
        return x.mean(2).transpose(1, 2)


class _Recurrence(nn.Module):
    """Two GRUs in sequence, not in parallel as usual: the backward GRU reads the output of the forward GRU."""

    def __init__(self) -> None:
        super().__init__()
        self.gru_forward = nn.GRU(_CHANNELS, _CHANNELS, batch_first=True)
        self.gru_backward = nn.GRU(_CHANNELS, _CHANNELS, batch_first=True)

    def forward(self, x: Float[Tensor, "b f 128"]) -> Float[Tensor, "b f 128"]:
        x = functional.gelu(self.gru_forward(x)[0]).flip(1)
        return functional.gelu(self.gru_backward(x)[0].flip(1))


class _Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.visualEncoder = _VisualEncoder()
        self.audioEncoder = _AudioEncoder()
        self.GRU = _Recurrence()


class LightAsd(nn.Module):
    """The network with both its heads. Use it in `eval()` mode, because batch norm must use the stored statistics.

    Only the head `lossAV` is used. `lossV`, for pictures without sound, helped training and is in the checkpoints.
    """

    def __init__(self) -> None:
        super().__init__()
        self.model = _Network()
        self.lossAV = nn.ModuleDict({"FC": nn.Linear(_CHANNELS, 2)})
        self.lossV = nn.ModuleDict({"FC": nn.Linear(_CHANNELS, 2)})

    def forward(
        self, cepstra: Float[Tensor, "b steps 13"], faces: Float[Tensor, "b f 112 112"]
    ) -> Float[Tensor, "b f"]:
        """A logit per frame that the face talks. steps: 4 f. faces: grey, 0..255."""
        return self._heads(self.model.audioEncoder(cepstra) + self.model.visualEncoder(faces))

    def _heads(self, embedding: Float[Tensor, "b f 128"]) -> Float[Tensor, "b f"]:
        return self.lossAV["FC"](self.model.GRU(embedding))[..., _TALKS]

    @torch.inference_mode()
    def score(self, pcm: Int16[np.ndarray, " n"], chips: UInt8[np.ndarray, "f 112 112"]) -> Float32[np.ndarray, " f"]:
        """A score per frame that the face talks: +2 to +5 for a moving mouth, about -1 for a still one.

        pcm: 16 kHz mono, 640 samples per frame. chips: grey. A frame's score is the mean over windows of one second
        that contain it. Memory use does not grow with the length of the track except for 1 kB per frame: the encoders
        process it in parts, each extended by the reach of their kernels.
        Raises ValueError if sound and pictures differ in length.
        """
        if len(pcm) != len(chips) * SAMPLES_PER_FRAME:
            raise ValueError(f"{len(pcm)} samples for {len(chips)} frames: give {SAMPLES_PER_FRAME} per frame")
        if not len(chips):
            return np.zeros(0, np.float32)
        parts = [self._embedding(pcm, chips, start) for start in range(0, len(chips), _PART_FRAMES)]
        embedding = torch.cat(parts, 1)[0]
        window = min(_WINDOW_FRAMES, len(chips))
        starts = [*range(0, len(chips) - window, _WINDOW_STEP), len(chips) - window]
        total, count = torch.zeros(len(chips)), torch.zeros(len(chips))
        for i in range(0, len(starts), _WINDOWS_AT_ONCE):
            group = starts[i : i + _WINDOWS_AT_ONCE]
            logits = self._heads(torch.stack([embedding[start : start + window] for start in group]))
            for start, row in zip(group, logits, strict=True):
                total[start : start + window] += row
                count[start : start + window] += 1
        return (total / count).numpy()

    def _embedding(
        self, pcm: Int16[np.ndarray, " n"], chips: UInt8[np.ndarray, "f 112 112"], start: int
    ) -> Float[Tensor, "1 p 128"]:
        """The sum of both encoders for the part that begins at frame `start`, equal to that of the whole track."""
        stop = min(start + _PART_FRAMES, len(chips))
        first, last = max(start - _REACH_FRAMES, 0), min(stop + _REACH_FRAMES, len(chips))
        sound = pcm[first * SAMPLES_PER_FRAME : last * SAMPLES_PER_FRAME + _WINDOW_REST]
        missing = (last - first) * SAMPLES_PER_FRAME + _WINDOW_REST - len(sound)
        cepstra = mfcc(np.pad(sound, (0, missing)))
        faces = torch.from_numpy(chips[first:last]).float()
        both = self.model.audioEncoder(torch.from_numpy(cepstra)[None]) + self.model.visualEncoder(faces[None])
        return both[:, start - first : stop - first]


def load_light_asd(path: Path) -> LightAsd:
    """The network with published weights. Raises TccpError like `load_published`."""
    return load_published(path, LightAsd(), "Light-ASD", "give a checkpoint of it, e.g. finetuning_TalkSet.model")
