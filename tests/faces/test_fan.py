"""The FAN backend reads local files only, and returns the boxes and points that its networks detect.

The published weights are not available in tests. These networks have the same layout, and weights with a known
response: S3FD detects grey squares, and FAN's heat map k is bright where the picture has colour k.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from tccp import faces
from tccp.errors import TccpError
from tccp.faces.fan import FanBackend

pytest.importorskip("face_alignment")

needs_compiling = pytest.mark.slow  # numba compiles for 15 s at a process's first points
POINTS = 68
CELLS = 64  # along a side of a heat map
SEEN_FACE = {"small": (30.0, 34.0), "large": (120.0, 136.0)}  # width and height at S3FD's scale
GREY = {"small": 60, "large": 75}  # of the 8 px square that S3FD detects as a face centre
PEAKS = np.linspace(0.5, 0.9, POINTS)  # of the heat maps


def colours() -> UInt8[np.ndarray, "68 3"]:
    """RGB colours of one length and different directions, each far from the others."""
    angles = np.linspace(0, np.pi / 2, 30)
    lattice = np.array(
        [[math.cos(a) * math.cos(b), math.cos(a) * math.sin(b), math.sin(a)] for a in angles for b in angles]
    )
    chosen = [0]
    for _ in range(POINTS - 1):
        chosen.append(int((lattice @ lattice[chosen].T).max(1).argmin()))
    return np.round(lattice[chosen] * 255).astype(np.uint8)


def layout(network: torch.nn.Module) -> dict[str, Tensor]:
    """A state dict of zeros, stored as expanded scalars to save disk space, with identity batch norms."""
    state = {}
    for name, tensor in network.state_dict().items():
        norm = isinstance(network.get_submodule(name.rpartition(".")[0]), torch.nn.BatchNorm2d)
        one = norm and name.endswith(("weight", "running_var"))
        state[name] = torch.full((), float(one)).to(tensor.dtype).expand(tensor.shape)
    return state


def centre_tap(like: Tensor, taps: Float[np.ndarray, "c_out c_in"]) -> Tensor:
    """Weights of a convolution that maps the first channels, pixel by pixel."""
    weight = torch.zeros(like.shape)
    at = like.shape[-1] // 2
    weight[: taps.shape[0], : taps.shape[1], at, at] = torch.from_numpy(taps).float()
    return weight


def known_fan() -> dict[str, Tensor]:
    from face_alignment.models import FAN

    with torch.device("meta"):
        network = FAN(4)
    state = layout(network)
    shown = colours() / 255
    filters = shown / (shown**2).sum(1, keepdims=True)  # response of 1 to its own colour
    others = filters @ shown.T - 2 * np.eye(POINTS)
    threshold = (1 + others.max()) / 2
    assert threshold < 0.998
    # The last hourglass sums a cell over five resolutions, each with a quarter of the weight of the one before.
    gain = PEAKS / (1 - threshold) / sum(0.25**level for level in range(5))
    state["conv1.weight"] = centre_tap(state["conv1.weight"], np.eye(3))
    state["conv2.downsample.2.weight"] = centre_tap(state["conv2.downsample.2.weight"], filters)
    state["conv4.downsample.0.bias"] = torch.full((128,), -threshold)
    state["conv4.downsample.2.weight"] = centre_tap(state["conv4.downsample.2.weight"], np.diag(gain))
    for name in ("conv_last3.weight", "l3.weight"):
        state[name] = centre_tap(state[name], np.eye(POINTS))
    return state


def known_s3fd() -> dict[str, Tensor]:
    from face_alignment.detection.sfd.net_s3fd import s3fd

    with torch.device("meta"):
        network = s3fd()
    state = layout(network)
    # Channels of sums of a pixel's colours: above 150 (both greys), above 200 (the lighter one), above 250 (neither).
    state["conv1_1.weight"] = centre_tap(state["conv1_1.weight"], np.ones((3, 3)))
    state["conv1_1.bias"] = torch.zeros(64)
    state["conv1_1.bias"][:3] = torch.tensor([104.0 + 117 + 123]) - torch.tensor([150.0, 200, 250])
    bands = np.array([[1.0, 0, -100], [0, 1000, -100_000]])
    state["conv1_2.weight"] = centre_tap(state["conv1_2.weight"], bands)
    for name in ("conv2_1", "conv2_2", "conv3_1", "conv3_2", "conv3_3", "conv4_1", "conv4_2", "conv4_3"):
        state[f"{name}.weight"] = centre_tap(state[f"{name}.weight"], np.eye(2))
    state["conv4_3_norm.weight"] = torch.ones(512)
    for name in state:
        if name.endswith("mbox_conf.bias"):  # no face anywhere
            state[name] = torch.tensor([10.0, 10, 10, 0]) if len(state[name]) == 4 else torch.tensor([10.0, 0])
    head = "conv4_3_norm_mbox"  # anchors of 32 pixels, every 8 pixels
    state[f"{head}_conf.weight"] = centre_tap(state[f"{head}_conf.weight"], np.array([[0.0, 0], [20, 20]]))
    sides = np.log(np.array([SEEN_FACE["small"], SEEN_FACE["large"]]).T / 32) / 0.2
    state[f"{head}_loc.weight"] = centre_tap(state[f"{head}_loc.weight"], np.concatenate([np.zeros((2, 2)), sides]))
    return state


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fan")
    torch.save(known_fan(), folder / "2DFAN4-11f355bf06.pth.tar")
    torch.save(known_s3fd(), folder / "s3fd-619a316812.pth")
    return folder


@pytest.fixture(scope="module")
def backend(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FanBackend]:
    """Opened with an empty TORCH_HOME, which must still be empty after closing."""
    cache = tmp_path_factory.mktemp("torch_home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", str(cache))
        backend = faces.open_backend("fan", folder)
        assert isinstance(backend, FanBackend)
        yield backend
        backend.close()
    assert list(cache.iterdir()) == []


def seen_square(box: Float32[np.ndarray, "4"]) -> tuple[float, float, float]:
    """FAN's input crop: left, top and side of a square around the box, raised by 12% of its height."""
    width, height = float(box[2] - box[0]), float(box[3] - box[1])
    side = (width + height) / 195 * 200
    x, y = float(box[0] + box[2]) / 2, float(box[1] + box[3]) / 2 - 0.12 * height
    return x - side / 2, y - side / 2, side


def paint_points(
    frame: UInt8[np.ndarray, "h w 3"], box: Float32[np.ndarray, "4"], seed: int = 0, scale: int = 1
) -> Float[np.ndarray, "68 2"]:
    """Paints a square of colour k for point k in the middle of random heat-map cells; returns the centres.

    Edges are at multiples of `scale` pixels, so that downscaling by `scale` does not blur them.
    """
    rng = np.random.default_rng(seed)
    left, top, side = seen_square(box)
    grid = [(x, y) for x in range(4, CELLS - 4, 5) for y in range(4, CELLS - 4, 5)]
    # Equal numbers of even and odd cells: the package moves a point a quarter of a cell in either direction.
    cells = [
        cell
        for parity in ((0, 0), (0, 1), (1, 0), (1, 1))
        for cell in rng.permutation([c for c in grid if (c[0] % 2, c[1] % 2) == parity])[: POINTS // 4]
    ]
    centers = (rng.permutation(cells) + 0.5) * side / CELLS + [left, top]
    half = 0.75 * side / CELLS
    for (x, y), colour in zip(centers, colours(), strict=True):
        edges = scale * np.round(np.array([x - half, x + half, y - half, y + half]) / scale).astype(int)
        x0, x1, y0, y1 = np.maximum(edges, 0)
        frame[y0:y1, x0:x1] = colour
    return centers


def paint_face(frame: UInt8[np.ndarray, "h w 3"], size: str, x: int, y: int, scale: int) -> Float32[np.ndarray, "4"]:
    """Paints the grey square that S3FD detects as a face at cell (x, y), enlarged by `scale`; returns the box."""
    frame[8 * scale * y : 8 * scale * (y + 1), 8 * scale * x : 8 * scale * (x + 1)] = GREY[size]
    center = 8 * scale * np.array([x + 0.5, y + 0.5])
    half = scale * np.array(SEEN_FACE[size]) / 2
    return np.concatenate([center - half, center + half]).astype(np.float32)


@needs_compiling
def test_points_are_at_the_peaks_of_the_heat_maps(backend: FanBackend) -> None:
    frame = np.zeros((700, 900, 3), np.uint8)
    box = np.array([300, 250, 544.45, 522], np.float32)  # its cells have many fractional positions
    centers = paint_points(frame, box)
    (face,) = backend.align(frame, box[None])
    assert face.landmarks_px is not None
    error = face.landmarks_px - centers
    # The package moves points a quarter of a cell towards the brighter neighbour, and rounds.
    assert np.abs(error).max() < seen_square(box)[2] / CELLS / 4 + 0.51
    assert np.abs(error.mean(0)).max() < 0.15  # continuous coordinates; without the half-pixel shift: 0.5
    assert face.confidence == pytest.approx(PEAKS.mean(), abs=0.01)
    np.testing.assert_array_equal(face.box, box)
    # Frames are independent, and rows may be padded.
    backend.align(frame[::-1], box[None])
    padded = np.zeros((700, 1000, 3), np.uint8)[:, :900]
    padded[:] = frame
    (again,) = backend.align(padded, box[None])
    np.testing.assert_array_equal(again.landmarks_px, face.landmarks_px)


@needs_compiling
def test_face_at_the_picture_edge_has_correct_points(backend: FanBackend) -> None:
    frame = np.zeros((360, 500, 3), np.uint8)
    box = np.array([-60, -40, 180, 232], np.float32)
    centers = paint_points(frame, box, seed=1)
    inside = ((centers > 8) & (centers < [492, 352])).all(1)
    assert 20 < inside.sum() < 60
    (face,) = backend.align(frame, box[None])
    assert face.landmarks_px is not None
    assert np.abs(face.landmarks_px - centers)[inside].max() < seen_square(box)[2] / CELLS / 4 + 1.1
    assert 0.2 < face.confidence < 0.6  # points outside the picture have no response


@needs_compiling
def test_faces_are_found_in_pictures_of_any_size(backend: FanBackend) -> None:
    """Boxes are in frame pixels, largest first, for the grey squares only; painted points belong to the large face."""
    frame = np.zeros((720, 1280, 3), np.uint8)  # S3FD gets it at half size
    small = paint_face(frame, "small", 60, 9, scale=2)
    large = paint_face(frame, "large", 30, 24, scale=2)
    centers = paint_points(frame, large, scale=2)
    found = backend.detect(frame)
    np.testing.assert_allclose([face.box for face in found], [large, small], atol=0.1)
    assert found[0].side > found[1].side
    assert found[0].landmarks_px is not None
    assert np.abs(found[0].landmarks_px - centers).max() < seen_square(large)[2] / CELLS / 4 + 0.51
    assert found[0].confidence == pytest.approx(PEAKS.mean(), abs=0.01)
    assert found[1].confidence == 0
    assert not torch.backends.cudnn.benchmark  # the package sets it globally


def test_no_faces_give_an_empty_list_without_a_warning(backend: FanBackend) -> None:
    assert backend.detect(np.zeros((120, 160, 3), np.uint8)) == []
    frame = np.zeros((120, 160, 3), np.uint8)
    outside = np.array([[200, 10, 260, 70], [10, 130, 50, 170], [30, 30, 30, 60]], np.float32)
    assert backend.align(frame, outside) == []


@needs_compiling
def test_the_largest_faces_are_kept(backend: FanBackend) -> None:
    frame = np.zeros((80, 400, 3), np.uint8)
    sides = np.array([20, 36, 24, 40, 28, 32, 44], np.float32)
    boxes = np.stack([np.array([50 * i, 10, 50 * i + side, 10 + side], np.float32) for i, side in enumerate(sides)])
    assert [face.side for face in backend.align(frame, boxes)] == sorted(sides, reverse=True)[: faces.MAX_FACES]


def test_backend_key_contains_package_version_and_both_digests(backend: FanBackend, folder: Path) -> None:
    digests = [
        hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in ("2DFAN4-11f355bf06.pth.tar", "s3fd-619a316812.pth")
    ]
    assert backend.key == f"fan face-alignment {importlib.metadata.version('face-alignment')} {' '.join(digests)}"


def test_weight_files_are_found_and_missing_ones_named(
    folder: Path, tmp_path: Path, storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TCCP_WEIGHTS", raising=False)
    with pytest.raises(TccpError, match=r"no FAN landmark weights at .*2DFAN4.*tccp weights fetch fan"):
        faces.open_backend("fan")
    fan = tmp_path / "2DFAN4-11f355bf06.pth.tar"
    shutil.copy(folder / fan.name, fan)
    for given in (fan, tmp_path):
        with pytest.raises(TccpError, match=rf"no S3FD face detector weights at {tmp_path}.*tccp weights fetch s3fd"):
            faces.open_backend("fan", given)
    shutil.copytree(folder, storage / "weights")
    assert faces.open_backend("fan").key == faces.open_backend("fan", folder).key


@pytest.mark.parametrize("broken", ["2DFAN4-11f355bf06.pth.tar", "s3fd-619a316812.pth"])
@pytest.mark.parametrize("how", ["text", "other layout"])
def test_invalid_weight_files_give_a_one_line_error(folder: Path, tmp_path: Path, broken: str, how: str) -> None:
    for path in folder.iterdir():
        shutil.copy(path, tmp_path)
    if how == "text":
        (tmp_path / broken).write_bytes(b"not found")
    else:
        torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / broken)
    with pytest.raises(TccpError, match=rf"{broken} is not a usable .* model") as caught:
        faces.open_backend("fan", tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
