"""Light-ASD, which sees whether a face on screen talks (Liao et al. 2023, "A Light Weight Model for Active Speaker
Detection"), in the layout of the published checkpoints.

Only the layout is shared with the authors' release: names and shapes of the tensors, strides and paddings, which the
checkpoints dictate. Two encoders of split convolutions (space or band first, then time) give 128 numbers a frame each;
their sum passes through a recurrence forward in time and one backward. 1,021,636 parameters.
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
"""Side of the grey pictures: the middle of a face's 224 px chip, which shows it from the eyes down."""
STEPS_PER_FRAME = 4
"""Rows of cepstra, at 100 Hz, under one frame."""
_CHANNELS = 128
_GREY_MEAN, _GREY_DEVIATION = 0.4161, 0.1688  # of the pictures the network was trained on
_TALKS = 1  # which of the two outputs; the other says that it does not
_WINDOW_FRAMES, _WINDOW_STEP = 25, 5  # over a whole track, the recurrence goes on hearing who spoke seconds ago
_WINDOWS_AT_ONCE = 64
_REACH_FRAMES = 6  # how far an encoder sees to either side: three kernels of five frames; the sound's, 17 steps
_PART_FRAMES = 50  # the encoders' stride over a film; their memory, about 2 MB a frame, is bounded by it
_WINDOW_REST = 240  # samples by which the 25 ms window of the last step reaches beyond the last frame


class _SplitBlock(nn.Module):
    """Kernels of 3 and of 5, each first across space (or bands), then along time; what they give is added and mixed.

    across: for each axis of the kernels, whether it is one of space or bands. stride: along those.
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
    """Not the usual pair side by side: the one that runs backward reads what the one that runs forward has made."""

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
    """The network with both its heads. Use in `eval()` mode: batch norm must run on the stored statistics.

    Of the heads only `lossAV` is asked; `lossV`, of the pictures alone, helped training and is in the checkpoints.
    """

    def __init__(self) -> None:
        super().__init__()
        self.model = _Network()
        self.lossAV = nn.ModuleDict({"FC": nn.Linear(_CHANNELS, 2)})
        self.lossV = nn.ModuleDict({"FC": nn.Linear(_CHANNELS, 2)})

    def forward(
        self, cepstra: Float[Tensor, "b steps 13"], faces: Float[Tensor, "b f 112 112"]
    ) -> Float[Tensor, "b f"]:
        """How much each frame's face talks, as a logit. steps: 4 f. faces: grey, 0..255."""
        return self._heads(self.model.audioEncoder(cepstra) + self.model.visualEncoder(faces))

    def _heads(self, embedding: Float[Tensor, "b f 128"]) -> Float[Tensor, "b f"]:
        return self.lossAV["FC"](self.model.GRU(embedding))[..., _TALKS]

    @torch.inference_mode()
    def score(self, pcm: Int16[np.ndarray, " n"], chips: UInt8[np.ndarray, "f 112 112"]) -> Float32[np.ndarray, " f"]:
        """How much the face of each frame talks: +2 to +5 for a moving mouth, about -1 for a still one.

        pcm: 16 kHz mono, 640 samples a frame. chips: grey. A frame's score is the mean over windows of a second around
        it. A track of any length takes the same memory but for 1 kB a frame: the encoders see it part by part, with as
        much around each part as their kernels reach.
        Raises ValueError if sound and pictures differ in length.
        """
        if len(pcm) != len(chips) * SAMPLES_PER_FRAME:
            raise ValueError(f"{len(pcm)} samples for {len(chips)} frames: give {SAMPLES_PER_FRAME} to a frame")
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
        """Both encoders' sum for the part that begins at frame `start`, as from the whole track."""
        stop = min(start + _PART_FRAMES, len(chips))
        first, last = max(start - _REACH_FRAMES, 0), min(stop + _REACH_FRAMES, len(chips))
        heard = pcm[first * SAMPLES_PER_FRAME : last * SAMPLES_PER_FRAME + _WINDOW_REST]
        missing = (last - first) * SAMPLES_PER_FRAME + _WINDOW_REST - len(heard)
        cepstra = mfcc(np.pad(heard, (0, missing)))
        faces = torch.from_numpy(chips[first:last]).float()
        both = self.model.audioEncoder(torch.from_numpy(cepstra)[None]) + self.model.visualEncoder(faces[None])
        return both[:, start - first : stop - first]


def load_light_asd(path: Path) -> LightAsd:
    """The network with published weights, as `load_published`."""
    return load_published(path, LightAsd(), "Light-ASD", "give a checkpoint of it, e.g. finetuning_TalkSet.model")
