"""The face probe: a small fixed network that reads mouth, yaw and identity from pictures of RoundTable faces.

The probe measures generated faces, so it is trained on none of them. `python -m tccp.evaluation.train_face_probe`
trains it on rendered faces, which are blurred, moved and tinted so that the probe also reads soft pictures. Its seeds
are used for nothing else: from 5,000,000 for training, from 5,500,000 for the figures below.

The table shows the packaged probe on 64 held-out clips of 2 s: on rendered faces, and on the same faces after encoding
and decoding with the packaged auto-encoder, the upper bound for generated faces. Its training used the command's
defaults: 1,200 people, 12 faces each, 1,400 steps, about 10 core-minutes including the rendering.

    figure, mean over clips              rendered auto-encoded
    correlation of the opening           0.994    0.971
    amplitude of the opening, ratio      0.98     0.90
    correlation of the width             0.979    0.750
    yaw error, degrees                   1.15     1.34
    right person of 16, frames           98.6%    95.1%
    right person of 16, clips            98.4%    95.3%
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Float32, UInt8
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from tccp.errors import TccpError
from tccp.headbox import crop
from tccp.models.autoencoder import PictureAutoencoder, to_bytes, to_model
from tccp.roundtable import RoundTableClip, identity_picture, synthesise
from tccp.sequences import correlation

PROBE_FILE = Path(__file__).with_name("probe.safetensors")
PROBE_PX = 64
"""Side of the probe's input in pixels; other crops are resized."""
CANDIDATES = 16
"""Number of people among whom the probe identifies the talker."""
_YAW_UNIT_DEG = 45.0
_MARGIN_PX = 4  # around training crops, so that `augment` can move the box
_TRAINING_SEED, _HELD_OUT_SEED = 5_000_000, 5_500_000
_IDENTITY_STREAM = 0x1D
_CLIP_S = 2.0
_BATCH_PEOPLE, _FRAMES_EACH = 64, 2
_LEARNING_RATE, _TEMPERATURE = 2e-3, 0.08


@dataclass(frozen=True)
class FaceReading:
    """The probe's outputs for f face pictures of one clip.

    opening (0 closed), width (0 rounded): of the mouth, 0..1 as in `Truth`. yaw_deg: positive to the picture's right.
    identity: unit vectors, close together for one person. features: of the last hidden layer, for Frechet distances.
    """

    opening: Float32[np.ndarray, " f"]
    width: Float32[np.ndarray, " f"]
    yaw_deg: Float32[np.ndarray, " f"]
    identity: Float32[np.ndarray, "f d"]
    features: Float32[np.ndarray, "f k"]


def _conv(c_in: int, c_out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True))


class FaceProbe(nn.Module):
    """Maps face crops to mouth opening, mouth width, yaw, an identity embedding and features. 0.5 M parameters."""

    def __init__(self, channels: int = 24, features: int = 160, identity: int = 64) -> None:
        super().__init__()
        c = channels
        self.trunk = nn.Sequential(
            nn.Conv2d(3, c, 5, 2, 2, bias=False),
            nn.BatchNorm2d(c),
            nn.ReLU(inplace=True),
            _conv(c, c),
            _conv(c, 2 * c, 2),
            _conv(2 * c, 2 * c),
            _conv(2 * c, 4 * c, 2),
            _conv(4 * c, 4 * c),
            _conv(4 * c, 4 * c, 2),
            nn.Flatten(),
            nn.Linear(4 * c * (PROBE_PX // 16) ** 2, features),
            nn.ReLU(),
        )
        self.pose = nn.Linear(features, 3)
        self.identity = nn.Linear(features, identity)

    def forward(
        self, pictures: Float[Tensor, "n 3 s s"]
    ) -> tuple[Float[Tensor, "n 3"], Float[Tensor, "n d"], Float[Tensor, "n k"]]:
        """Faces in [-1, 1] -> (opening, width, yaw / 45 degrees), unit identity vectors, features."""
        features = self.trunk(pictures)
        return self.pose(features), functional.normalize(self.identity(features), dim=-1), features


def load_probe(path: Path = PROBE_FILE) -> FaceProbe:
    """A probe in evaluation mode, by default the packaged one. Raises TccpError if the file is missing or no probe."""
    probe = FaceProbe()
    try:
        probe.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    except FileNotFoundError:
        raise TccpError(f"no probe at {path}: train it with `python -m tccp.evaluation.train_face_probe`") from None
    except (SafetensorError, RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise TccpError(
            f"{path} is no probe ({reason}): train it with `python -m tccp.evaluation.train_face_probe`"
        ) from None
    return probe.eval()


def save_probe(probe: FaceProbe, path: Path, metadata: dict[str, str]) -> None:
    """Writes the weights in half precision."""
    state = {name: value.half() if value.is_floating_point() else value for name, value in probe.state_dict().items()}
    save_file({name: value.contiguous() for name, value in state.items()}, path, metadata)


def _resized(pictures: UInt8[np.ndarray, "n h w 3"]) -> UInt8[np.ndarray, "n s s 3"]:
    if pictures.shape[1:3] == (PROBE_PX, PROBE_PX):
        return pictures
    interpolation = cv2.INTER_AREA if pictures.shape[1] > PROBE_PX else cv2.INTER_CUBIC
    size = (PROBE_PX, PROBE_PX)
    return np.stack([cv2.resize(picture, size, interpolation=interpolation) for picture in pictures])


@torch.inference_mode()
def read_faces(probe: FaceProbe, faces: UInt8[np.ndarray, "f s s 3"]) -> FaceReading:
    """Applies the probe to every face crop. faces: crops of the head box, of any size.

    Raises TccpError if there is no frame.
    """
    if not len(faces):
        raise TccpError("there are no face pictures to read: give at least one frame")
    parts = [probe(to_model(part)) for part in torch.from_numpy(_resized(faces)).split(256)]
    pose, identity, features = (torch.cat(part).numpy() for part in zip(*parts, strict=True))
    return FaceReading(pose[:, 0].copy(), pose[:, 1].copy(), _YAW_UNIT_DEG * pose[:, 2], identity, features)


def embed_identity(probe: FaceProbe, pictures: UInt8[np.ndarray, "n s s 3"]) -> Float32[np.ndarray, "n d"]:
    """Unit vectors of identity pictures, comparable with `FaceReading.identity`."""
    return read_faces(probe, pictures).identity


def top1(identity: Float32[np.ndarray, "f d"], candidates: Float32[np.ndarray, "n d"], true_index: int) -> float:
    """Share of frames whose nearest candidate, by cosine, is the true one.

    identity: `FaceReading.identity`; candidates: `embed_identity` of n people's pictures.
    """
    return float(((identity @ candidates.T).argmax(axis=1) == true_index).mean())


# -- training ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FaceSamples:
    """Rendered faces of p people, k each, and their identity pictures, with a margin for `augment`.

    pose: the truth of each face: mouth opening, mouth width, yaw / 45 degrees.
    """

    faces: UInt8[np.ndarray, "p k m m 3"]
    pose: Float32[np.ndarray, "p k 3"]
    identities: UInt8[np.ndarray, "p m m 3"]


def _with_margin(picture: UInt8[np.ndarray, "h w 3"], box: Float[np.ndarray, "4"]) -> UInt8[np.ndarray, "m m 3"]:
    margin = (box[2] - box[0]) * _MARGIN_PX / PROBE_PX
    return crop(picture, box + np.array([-margin, -margin, margin, margin]), PROBE_PX + 2 * _MARGIN_PX)


def render_samples(
    people: int, frames: int, first_seed: int = _TRAINING_SEED, on_person: Callable[[int], None] | None = None
) -> FaceSamples:
    """Renders `frames` faces of each person: half with the clip's motion, half with random head pose and mouth.

    frames: at most 50. first_seed: seed of the first person; the others follow. on_person: receives the number done.
    """
    faces, poses, identities = [], [], []
    for seed in range(first_seed, first_seed + people):
        rng = np.random.default_rng([seed, _IDENTITY_STREAM])
        clip = synthesise(seed, _CLIP_S)
        f = clip.num_frames
        randomised = clip.with_head(
            yaw_deg=rng.uniform(-65, 65, f).astype(np.float32),
            pitch_deg=(clip.pitch_deg + rng.normal(0, 4, f)).astype(np.float32),
            mouth_opening=np.clip(rng.uniform(-0.3, 1.1, f), 0, 1).astype(np.float32),
            mouth_width=rng.uniform(0, 1, f).astype(np.float32),
        )
        chosen = rng.choice(f, frames, replace=False)
        views = [(clip if k % 2 else randomised, int(frame)) for k, frame in enumerate(chosen)]
        faces.append(np.stack([_with_margin(c.render(i), c.head_box[i]) for c, i in views]))
        poses.append([(c.mouth_opening[i], c.mouth_width[i], c.yaw_deg[i] / _YAW_UNIT_DEG) for c, i in views])
        # The identity picture ends at the head box, so its margin repeats the edge pixels.
        picture = identity_picture(clip.scene.talker.model.person, rng)
        identities.append(_with_margin(picture, np.array([0.0, 0, *picture.shape[:2]])))
        if on_person is not None:
            on_person(seed - first_seed + 1)
    return FaceSamples(np.stack(faces), np.array(poses, np.float32), np.stack(identities))


def augment(pictures: Float[Tensor, "n 3 m m"], rng: np.random.Generator) -> Float[Tensor, "n 3 s s"]:
    """Degrades pictures with a margin in the ways a generator might, and cuts the margin off.

    Moves and resizes the box, blurs by resizing down and up, adds noise, and changes contrast, brightness and tint.
    Each picture gets its own changes; a quarter of them are only moved and resized.
    """
    n, size = len(pictures), pictures.shape[-1]

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.from_numpy(rng.uniform(low, high, (n, *shape)).astype(np.float32))

    zoom = PROBE_PX / size * uniform(0.96, 1.04)
    shift = uniform(-1.0, 1.0, 2) * (2 * 2.5 / size)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = zoom
    theta[:, :, 2] = shift
    grid = functional.affine_grid(theta, [n, 3, PROBE_PX, PROBE_PX], align_corners=False)
    moved = functional.grid_sample(pictures, grid, padding_mode="border", align_corners=False)
    out = moved.clone()
    kind = torch.from_numpy(rng.choice(5, n, p=[0.4, 0.2, 0.2, 0.1, 0.1]))
    for number, smaller in enumerate((44, 32, 24, 20), start=1):
        blurred = kind == number
        small = functional.interpolate(moved[blurred], size=smaller, mode="bilinear", antialias=True)
        out[blurred] = functional.interpolate(small, size=PROBE_PX, mode="bicubic")
    gain, level = uniform(0.88, 1.12, 1, 1, 1), uniform(-0.12, 0.12, 1, 1, 1) + uniform(-0.04, 0.04, 3, 1, 1)
    noise = torch.from_numpy(rng.standard_normal(out.shape).astype(np.float32)) * uniform(0.0, 0.08, 1, 1, 1)
    degraded = (out * gain + level + noise).clamp(-1, 1)
    return torch.where(uniform(0.0, 1.0, 1, 1, 1) < 0.25, moved, degraded)


def probe_loss(
    pose: Float[Tensor, "n 3"], truth: Float[Tensor, "n 3"], faces: Float[Tensor, "p k d"], people: Float[Tensor, "p d"]
) -> Float[Tensor, ""]:
    """Huber loss of mouth and yaw, plus the InfoNCE loss, in both directions, of faces and identity pictures."""
    error = functional.smooth_l1_loss(pose, truth, beta=0.05, reduction="none") * torch.tensor([3.0, 1.5, 2.0])
    same = torch.arange(len(people))
    contrast = torch.zeros(())
    for k in range(faces.shape[1]):
        logits = faces[:, k] @ people.T / _TEMPERATURE
        contrast = contrast + functional.cross_entropy(logits, same) + functional.cross_entropy(logits.T, same)
    return error.sum(dim=1).mean() + 0.1 * contrast / faces.shape[1]


def train_probe(
    samples: FaceSamples, steps: int, seed: int = 0, on_step: Callable[[int, float], None] | None = None
) -> FaceProbe:
    """Trains a probe on one thread. Equal samples, steps and seed give the same network on one machine.

    on_step: receives the number of steps done and the loss.
    """
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        probe = FaceProbe().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimiser = torch.optim.AdamW(probe.parameters(), lr=_LEARNING_RATE, weight_decay=0.02)
    rng = np.random.default_rng([seed, 1])
    people, frames = samples.pose.shape[:2]
    batch = min(_BATCH_PEOPLE, people)
    for step in range(steps):
        persons = rng.choice(people, batch, replace=False)
        indices = rng.integers(frames, size=(batch, _FRAMES_EACH))
        chosen = samples.faces[persons[:, None], indices]
        pictures = np.concatenate([rearrange(chosen, "p k m n c -> (p k) m n c"), samples.identities[persons]])
        truth = torch.from_numpy(samples.pose[persons[:, None], indices].reshape(-1, 3))
        augmented = augment(to_model(torch.from_numpy(pictures)), rng)
        # All pictures of a person are mirrored together, so that asymmetric hair matches between them.
        mirrored = torch.from_numpy(rng.random(batch) < 0.5)
        of_faces = mirrored.repeat_interleave(_FRAMES_EACH)
        flips = torch.cat([of_faces, mirrored])[:, None, None, None]
        augmented = torch.where(flips, augmented.flip(-1), augmented).contiguous(memory_format=torch.channels_last)
        truth[:, 2] *= torch.where(of_faces, -1.0, 1.0)
        for group in optimiser.param_groups:
            group["lr"] = _LEARNING_RATE * min((step + 1) / 50, 0.5 * (1 + math.cos(math.pi * step / steps)) + 1e-3)
        pose, identity, _ = probe(augmented)
        in_faces, of_people = identity.split([len(truth), batch])
        loss = probe_loss(pose[: len(truth)], truth, in_faces.view(batch, _FRAMES_EACH, -1), of_people)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if on_step is not None:
            on_step(step + 1, loss.item())
    return probe.to(memory_format=torch.contiguous_format).eval()


# -- accuracy --------------------------------------------------------------------------------------------------------


def _faces(clip: RoundTableClip) -> UInt8[np.ndarray, "f s s 3"]:
    return np.stack([crop(clip.render(i), clip.head_box[i], PROBE_PX) for i in range(clip.num_frames)])


def _autoencoded(faces: UInt8[np.ndarray, "f s s 3"], autoencoder: PictureAutoencoder) -> UInt8[np.ndarray, "f s s 3"]:
    pictures = rearrange(to_model(torch.from_numpy(faces)), "f c h w -> 1 c f h w")
    with torch.inference_mode():
        decoded = autoencoder.decode(autoencoder.encode(pictures, "face"), "face")
    return to_bytes(rearrange(decoded, "1 c f h w -> f c h w")).numpy()


def measure(
    probe: FaceProbe, clips: Sequence[RoundTableClip], autoencoder: PictureAutoencoder | None = None
) -> dict[str, float]:
    """The probe's accuracy on held-out faces, rendered or after an auto-encoder: means over clips.

    clips: at least 16. Correlations are per clip. identity_top1: the candidates are the talker and those of the 15
    following clips.
    """
    candidates = embed_identity(probe, np.stack([clip.identity for clip in clips]))
    figures = []
    for k, clip in enumerate(clips):
        faces = _faces(clip)
        reading = read_faces(probe, faces if autoencoder is None else _autoencoded(faces, autoencoder))
        indices = (k + np.arange(CANDIDATES)) % len(clips)
        yaw_error = reading.yaw_deg - clip.yaw_deg
        figures.append(
            {
                "mouth_corr_face": correlation(reading.opening, clip.mouth_opening),
                "amplitude_ratio_face": reading.opening.std() / clip.mouth_opening.std(),
                "width_corr_face": correlation(reading.width, clip.mouth_width),
                "yaw_mae_deg_face": np.abs(yaw_error).mean(),
                "yaw_bias_deg": yaw_error.mean(),
                "identity_top1": top1(reading.identity, candidates[indices], 0),
                "identity_top1_of_mean": top1(reading.identity.mean(axis=0, keepdims=True), candidates[indices], 0),
            }
        )
    return {name: round(float(np.mean([figure[name] for figure in figures])), 4) for name in figures[0]}


def held_out_clips(count: int, seconds: float = 2.0) -> list[RoundTableClip]:
    """Clips for `measure`, which the probe was not trained on."""
    return [synthesise(_HELD_OUT_SEED + k, seconds) for k in range(count)]
