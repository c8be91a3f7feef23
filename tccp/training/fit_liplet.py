"""Trains Liplet to paint mouths in the canonical frame, from the sound and identity pictures of clips."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64, UInt8
from torch import Tensor

from tccp.clips.clip_table import Clip, decode_still
from tccp.clips.windows import clip_sound
from tccp.config import LipSettings
from tccp.errors import DamagedData, TccpError
from tccp.media.mel import mel_windows
from tccp.models.autoencoder import to_model
from tccp.models.liplet import Liplet, identity_picture, mouth_picture, mouth_region
from tccp.seeds import rng_seed
from tccp.training.loop import NonFiniteLoss
from tccp.training.set_aside import say_set_aside

LIPLET_VERSION = 1
"""Increased when the same clips and settings give another network: trained Liplets are keyed by it."""
MAX_SAMPLES = 16_384
"""Most frames held in memory (0.5 GB at 96 px); of longer footage, every n-th frame is used."""
TINT = 0.25
"""Largest change of a colour channel's gain, and of its offset in [-1, 1], when augmentation tints pictures."""
MOUTH_WEIGHT = 4.0
"""Weight of the error where lips can be, in addition to the weight 1 of every pixel."""


@dataclass(frozen=True)
class LipletSamples:
    """Training frames of some clips. identity_range: rows (first, end) of `identities` that belong to each frame."""

    mel: Float32[np.ndarray, "n 80 16"]
    mouths: UInt8[np.ndarray, "n s s 3"]
    identity_range: Int64[np.ndarray, "n 2"]
    identities: UInt8[np.ndarray, "p s s 3"]


def mouths_of(clip: Clip, frames: Sequence[int], size_px: int) -> list[UInt8[np.ndarray, "s s 3"] | None]:
    """Canonical mouth pictures of a clip's frames.

    None where landmarks are missing or bridge a gap, the mouth is beyond the picture's border, or the head is turned
    away.
    """
    head, stored = clip.head_box, clip.stored_box
    pictures = []
    for frame in frames:
        source_px = head[frame, :2] + clip.landmarks[frame] * (head[frame, 2:] - head[frame, :2])
        in_stored = (source_px - stored[frame, :2]) / (stored[frame, 2:] - stored[frame, :2])
        mouth = source_px[48:]
        in_picture = bool(((mouth >= 0) & (mouth <= (clip.source_width, clip.source_height))).all())
        known = clip.landmark_confidence[frame] > 0 and in_picture
        pictures.append(mouth_picture(decode_still(clip.face[frame]), in_stored, size_px) if known else None)
    return pictures


def collect_samples(clips: Iterable[Clip], num_frames: int, size_px: int) -> LipletSamples:
    """Collects at most about MAX_SAMPLES frames to train on, evenly spaced.

    num_frames: total of all clips, given so that the clips can be streamed. A damaged clip is set aside.
    Raises TccpError if no frame has a usable mouth.
    """
    stride = max(1, math.ceil(num_frames / MAX_SAMPLES))
    mel: list[np.ndarray] = []
    mouths: list[np.ndarray] = []
    identities: list[np.ndarray] = []
    ranges: list[tuple[int, int]] = []
    for clip in clips:
        frames = range(0, clip.num_frames, stride)
        try:
            mouths_here = mouths_of(clip, frames, size_px)
            identities_here = [identity_picture(decode_still(picture), size_px) for picture in clip.identity]
        except DamagedData as error:
            say_set_aside(f"clip {clip.clip_id}", error)
            continue
        first = len(identities)
        identities += identities_here
        samples, start_frame = clip_sound(clip)
        windows = mel_windows(samples, start_frame, clip.num_frames)
        for frame, mouth in zip(frames, mouths_here, strict=True):
            if mouth is not None:
                mel.append(windows[frame])
                mouths.append(mouth)
                ranges.append((first, len(identities)))
    if not mouths:
        raise TccpError("no frame of these clips shows a mouth to train liplet on (no landmarks, or all in profile)")
    return LipletSamples(np.stack(mel), np.stack(mouths), np.array(ranges, np.int64), np.stack(identities))


def mouth_loss(lips: Float[Tensor, "b 3 s s"], target: Float[Tensor, "b 3 s s"]) -> Float[Tensor, ""]:
    """Mean absolute error, weighted 1 + MOUTH_WEIGHT where lips can be; the weights average to one."""
    weight = 1 + MOUTH_WEIGHT * torch.from_numpy(mouth_region(lips.shape[-1])).to(lips)
    return ((lips - target).abs() * (weight / weight.mean())).mean()


def augment(
    identity: Float[Tensor, "b 3 s s"], mouths: Float[Tensor, "b 3 s s"], rng: np.random.Generator
) -> tuple[Float[Tensor, "b 3 s s"], Float[Tensor, "b 3 s s"]]:
    """Mirrors and tints both pictures of a sample alike, because data sets have few people and skin colours."""
    gain = rng.uniform(1 - TINT, 1 + TINT, (len(mouths), 3, 1, 1))
    shift = rng.uniform(-TINT, TINT, (len(mouths), 3, 1, 1))
    mirrored = torch.from_numpy(rng.random((len(mouths), 1, 1, 1)) < 0.5).to(mouths.device)

    def apply(pictures: Tensor) -> Tensor:
        tinted = pictures * torch.from_numpy(gain).to(pictures) + torch.from_numpy(shift).to(pictures)
        return torch.where(mirrored, tinted.flip(-1), tinted).clamp(-1, 1)

    return apply(identity), apply(mouths)


def train_liplet(
    samples: LipletSamples,
    settings: LipSettings,
    seed: int,
    on_step: Callable[[int, float], None] | None = None,
    device: str | torch.device = "cpu",
) -> Liplet:
    """Trains a Liplet for `liplet_steps` with Adam. The same samples, settings and seed give the same network.

    on_step: called with (steps done, loss) after every step. Raises NonFiniteLoss.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng_seed("liplet", "init", seed))
        network = Liplet(settings.size_px, settings.liplet_channels).to(device)
    optimiser = torch.optim.Adam(network.parameters(), lr=settings.liplet_learning_rate)
    network.train()
    for step in range(settings.liplet_steps):
        rng = np.random.default_rng(rng_seed("liplet", "batch", seed, step))
        rows = rng.integers(len(samples.mel), size=settings.liplet_batch_size)
        identities = rng.integers(*samples.identity_range[rows].T)
        mel, mouths, identity = (
            torch.from_numpy(array).to(device)
            for array in (samples.mel[rows], samples.mouths[rows], samples.identities[identities])
        )
        identity, mouths = augment(to_model(identity), to_model(mouths), rng)
        loss = mouth_loss(network(mel, identity), mouths)
        for group in optimiser.param_groups:  # warm-up, then a cosine decay to zero
            warm_up = min(1.0, (step + 1) / 20)
            decay = 0.5 * (1 + math.cos(math.pi * step / settings.liplet_steps))
            group["lr"] = settings.liplet_learning_rate * warm_up * decay
        optimiser.zero_grad()
        loss.backward()
        value = loss.item()
        if not math.isfinite(value):
            raise NonFiniteLoss(
                f"the loss of liplet is {value} at step {step}; give a lower lips.liplet_learning_rate (it is "
                f"{settings.liplet_learning_rate!r}), such as --set lips.liplet_learning_rate="
                f"{settings.liplet_learning_rate / 3:.2g}, with --resume"
            )
        optimiser.step()
        if on_step is not None:
            on_step(step + 1, value)
    return network.eval()
