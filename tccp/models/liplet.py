"""Liplet: a small audio-driven lip network of this project, for users without Wav2Lip's weights.

From 0.2 s of sound and one picture of a person it generates the person's mouth for that sound, in a canonical frontal
frame: without head pose, but with the mouth's opening and width. Like Wav2Lip it has two encoders and one decoder.
Because the output frame differs from the identity picture's frame, the picture enters as a code that modulates every
level, and only the coarsest features are passed on with their positions.
"""

from __future__ import annotations

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn
from torch.nn import functional

from tccp.errors import TccpError
from tccp.landmarks import MEAN_FACE, head_pose
from tccp.models.pretrained import Pretrained, with_config

# The canonical frame in MEAN_FACE's coordinates (outer eye corners 1 apart, y down from their line): a square on the
# plane of the lips, from the nose base to below the chin of an open mouth.
_VIEW_TOP, _VIEW_SIDE = 0.50, 0.96
_MOUTH_CORNERS = [48, 54]
_LIPS_Z = float(MEAN_FACE[48:60, 2].mean())
_MAX_SHRINK = 2.5  # beyond about 65 degrees of turn, too little of the mouth is visible for a frontal picture


def mouth_transform(landmarks: Float[np.ndarray, "68 2"], size_px: int) -> Float[np.ndarray, "2 3"] | None:
    """Affine map from landmark coordinates to pixels of the canonical mouth picture.

    It removes the pose of the plane of the lips, which `head_pose` gets from nose and eye corners only, and centres the
    mouth horizontally, because lips protrude by different amounts, which shifts them in a turned head. It does not
    depend on the mouth's opening or width. None if points are missing (not finite) or the head is turned too far.
    """
    if not np.isfinite(landmarks).all():
        return None
    pose = head_pose(landmarks[None])
    plane = pose.scale[0] * pose.rotation[0, :2, :2]
    stretch = np.linalg.svd(plane, compute_uv=False)
    if stretch[1] <= 0 or stretch[0] > _MAX_SHRINK * stretch[1] or np.linalg.det(plane) <= 0:
        return None
    to_face = np.linalg.inv(plane)
    origin = -to_face @ pose.project(np.array([0.0, _VIEW_TOP, _LIPS_Z]))[0]
    origin[0] = _VIEW_SIDE / 2 - to_face[0] @ landmarks[_MOUTH_CORNERS].mean(axis=0)
    return np.column_stack([to_face, origin]) * (size_px / _VIEW_SIDE)


def mouth_picture(
    face: UInt8[np.ndarray, "h w 3"], landmarks: Float[np.ndarray, "68 2"], size_px: int
) -> UInt8[np.ndarray, "{size_px} {size_px} 3"] | None:
    """The mouth of a face crop in the canonical frame: Liplet's training target.

    Pixels outside the face get the colour of its skin, because sound does not determine hair, collar and room.
    landmarks: iBUG order, crop coordinates 0..1. None if `mouth_transform` returns None.
    """
    points = landmarks * np.array(face.shape[1::-1])
    transform = mouth_transform(points, size_px)
    if transform is None:
        return None
    outline = points @ transform[:, :2].T + transform[:, 2]
    # In OpenCV integers are pixel centres; in landmark coordinates they are pixel edges.
    transform[:, 2] += transform[:, :2].sum(axis=1) * 0.5 - 0.5
    shrink = np.linalg.det(transform[:, :2]) ** -0.5
    if shrink > 1.5:  # a bilinear warp without blur would alias
        face = cv2.GaussianBlur(face, (0, 0), 0.4 * float(shrink))
    size = (size_px, size_px)
    picture = cv2.warpAffine(face, transform, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    face_mask = np.zeros(size, np.uint8)
    cv2.fillConvexPoly(face_mask, cv2.convexHull(np.round(outline).astype(np.int32)), 1)
    # Jaw points lie on the edge of the face, where pixels contain background.
    inside = cv2.erode(face_mask, np.ones((3, 3), np.uint8), iterations=max(1, size_px // 32)).astype(bool)
    skin = inside & ~mouth_region(size_px)
    if skin.any():
        picture[~inside] = np.median(picture[skin], axis=0)
    return picture


def mouth_region(size_px: int) -> Bool[np.ndarray, "{size_px} {size_px}"]:
    """Possible positions of lips in the canonical mouth picture: an ellipse around the mouth, with an open jaw."""
    y, x = (np.indices((size_px, size_px)) + 0.5) * (_VIEW_SIDE / size_px)
    return ((x - _VIEW_SIDE / 2) / 0.38) ** 2 + ((y + _VIEW_TOP - 0.93) / 0.34) ** 2 <= 1


def identity_picture(identity: UInt8[np.ndarray, "h w 3"], size_px: int) -> UInt8[np.ndarray, "{size_px} {size_px} 3"]:
    """The whole identity head crop at Liplet's size. It needs no landmarks, so inference needs no detector."""
    return cv2.resize(identity, (size_px, size_px), interpolation=cv2.INTER_AREA)


class _Modulated(nn.Module):
    """Convolution, group norm, scale and shift computed from a code, SiLU."""

    def __init__(self, c_in: int, c_out: int, code_dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm = nn.GroupNorm(4, c_out, affine=False)
        self.modulation = nn.Linear(code_dim, 2 * c_out)

    def forward(self, x: Float[Tensor, "b c h w"], code: Float[Tensor, "b d"]) -> Float[Tensor, "b e h w"]:
        scale, shift = self.modulation(code)[:, :, None, None].chunk(2, dim=1)
        return functional.silu(self.norm(self.conv(x)) * (1 + scale) + shift)


def _encode(c_in: int, c_out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(c_in, c_out, 3, stride, 1), nn.GroupNorm(4, c_out), nn.SiLU())


class Liplet(Pretrained):
    """The lip network. size_px: side of its pictures, a multiple of 8. channels: its width, a multiple of 4.

    Raises TccpError for other numbers.
    """

    @with_config
    def __init__(self, size_px: int = 32, channels: int = 16) -> None:
        super().__init__()
        if size_px % 8 or channels % 4 or min(size_px, channels) <= 0:
            raise TccpError(
                f"liplet of {size_px} px and {channels} channels: give a size that is a multiple of 8, channels of 4"
            )
        c, base, code = channels, size_px // 8, 8 * channels
        self.audio_encoder = (
            nn.Sequential(  # mel bands are channels, because the absolute position of a formant matters
                nn.Conv1d(80, 4 * c, 3, padding=1),
                nn.SiLU(),
                nn.Conv1d(4 * c, 4 * c, 3, stride=2, padding=1),
                nn.SiLU(),
                nn.Conv1d(4 * c, 4 * c, 3, stride=2, padding=1),
                nn.SiLU(),
                nn.Flatten(),
                nn.Linear(4 * c * 4, code),
            )
        )
        self.picture_encoder = nn.Sequential(
            nn.PixelUnshuffle(2), _encode(12, c, 1), _encode(c, 2 * c, 2), _encode(2 * c, 4 * c, 2)
        )
        self.picture_code = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(4 * c * 16, code))
        self.start = nn.Parameter(torch.randn(4 * c, base, base))
        self.decoder = nn.ModuleList(
            [
                _Modulated(4 * c + 4 * c, 4 * c, code),
                _Modulated(4 * c, 2 * c, code),
                _Modulated(2 * c, 2 * c, code),
                _Modulated(2 * c, c, code),
                _Modulated(c, c, code),
            ]
        )
        self.output = nn.Conv2d(c, 3, 3, padding=1)

    def forward(self, mel: Float[Tensor, "b 80 16"], identity: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b 3 s s"]:
        """The person's mouth for this sound, in the canonical frame, RGB in [-1, 1].

        mel: the networks' centred window (`tccp.media.mel.mel_windows`), in [-4, 4].
        identity: the whole head crop (`identity_picture`), RGB in [-1, 1].
        """
        features = self.picture_encoder(identity)
        code = functional.silu(self.audio_encoder(mel / 4) + self.picture_code(features))
        x = torch.cat((self.start.expand(len(mel), -1, -1, -1), features), dim=1)
        for level, block in enumerate(self.decoder):
            if level in (1, 3):
                x = functional.interpolate(x, scale_factor=2, mode="nearest")
            x = block(x, code)
        # Bilinear upsampling before the last convolution: a pixel shuffle left a checkerboard in short trainings.
        return torch.tanh(self.output(functional.interpolate(x, scale_factor=2, mode="bilinear")))
