"""Wav2Lip: published layout and numbers; as a lip source, it never sees the target."""

from collections.abc import Iterator

import cv2
import numpy as np
import pytest
import torch
from torch.nn import functional

from tccp.config import LipSettings
from tccp.errors import TccpError
from tccp.headbox import head_boxes
from tccp.landmarks import MEAN_FACE
from tccp.models.lip_sources import Wav2LipSource, open_lip_source
from tccp.models.wav2lip import Wav2Lip, load_wav2lip

# The published generator, by hand: (in, out, kernel, stride, padding, kind) of every block.
# Kinds: c convolution, r residual convolution, t transposed (output padding 1 at stride 2).
_Block = tuple[int, int, int, int | tuple[int, int], int, str]
_R: dict[int, _Block] = {c: (c, c, 3, 1, 1, "r") for c in (32, 64, 128, 256, 384, 512)}
FACE_ENCODER: list[list[_Block]] = [
    [(6, 16, 7, 1, 3, "c")],
    [(16, 32, 3, 2, 1, "c"), _R[32], _R[32]],
    [(32, 64, 3, 2, 1, "c"), _R[64], _R[64], _R[64]],
    [(64, 128, 3, 2, 1, "c"), _R[128], _R[128]],
    [(128, 256, 3, 2, 1, "c"), _R[256], _R[256]],
    [(256, 512, 3, 2, 1, "c"), _R[512]],
    [(512, 512, 3, 1, 0, "c"), (512, 512, 1, 1, 0, "c")],
]
AUDIO_ENCODER: list[_Block] = [
    *[(1, 32, 3, 1, 1, "c"), _R[32], _R[32]],
    *[(32, 64, 3, (3, 1), 1, "c"), _R[64], _R[64]],
    *[(64, 128, 3, 3, 1, "c"), _R[128], _R[128]],
    *[(128, 256, 3, (3, 2), 1, "c"), _R[256]],
    *[(256, 512, 3, 1, 0, "c"), (512, 512, 1, 1, 0, "c")],
]
FACE_DECODER: list[list[_Block]] = [
    [(512, 512, 1, 1, 0, "c")],
    [(1024, 512, 3, 1, 0, "t"), _R[512]],
    [(1024, 512, 3, 2, 1, "t"), _R[512], _R[512]],
    [(768, 384, 3, 2, 1, "t"), _R[384], _R[384]],
    [(512, 256, 3, 2, 1, "t"), _R[256], _R[256]],
    [(320, 128, 3, 2, 1, "t"), _R[128], _R[128]],
    [(160, 64, 3, 2, 1, "t"), _R[64], _R[64]],
]
OUTPUT: _Block = (80, 32, 3, 1, 1, "c")


def _blocks() -> Iterator[tuple[str, _Block]]:
    """(prefix, block) of every convolution with batch norm."""
    for name, stages in (("face_encoder_blocks", FACE_ENCODER), ("face_decoder_blocks", FACE_DECODER)):
        for i, stage in enumerate(stages):
            yield from ((f"{name}.{i}.{j}", block) for j, block in enumerate(stage))
    yield from ((f"audio_encoder.{j}", block) for j, block in enumerate(AUDIO_ENCODER))
    yield "output_block.0", OUTPUT


def _published_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"output_block.1.weight": (3, 32, 1, 1), "output_block.1.bias": (3,)}
    for prefix, (c_in, c_out, kernel, _, _, kind) in _blocks():
        channels = (c_in, c_out) if kind == "t" else (c_out, c_in)
        shapes[f"{prefix}.conv_block.0.weight"] = (*channels, kernel, kernel)
        shapes[f"{prefix}.conv_block.0.bias"] = (c_out,)
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{prefix}.conv_block.1.{leaf}"] = (c_out,)
        shapes[f"{prefix}.conv_block.1.num_batches_tracked"] = ()
    return shapes


def _reference_forward(state: dict[str, torch.Tensor], mel: torch.Tensor, faces: torch.Tensor) -> torch.Tensor:
    def run(prefix, block, x):
        _, _, _, stride, padding, kind = block
        part = {name: state[f"{prefix}.conv_block.{name}"] for name in ("0.weight", "0.bias", "1.weight", "1.bias")}
        if kind == "t":
            y = functional.conv_transpose2d(x, part["0.weight"], part["0.bias"], stride, padding, stride - 1)
        else:
            y = functional.conv2d(x, part["0.weight"], part["0.bias"], stride, padding)
        mean, var = (state[f"{prefix}.conv_block.1.running_{name}"][None, :, None, None] for name in ("mean", "var"))
        y = (y - mean) / (var + 1e-5).sqrt() * part["1.weight"][:, None, None] + part["1.bias"][:, None, None]
        return functional.relu(x + y if kind == "r" else y)

    skips = []
    x = faces
    for i, stage in enumerate(FACE_ENCODER):
        for j, block in enumerate(stage):
            x = run(f"face_encoder_blocks.{i}.{j}", block, x)
        skips.append(x)
    x = mel
    for j, block in enumerate(AUDIO_ENCODER):
        x = run(f"audio_encoder.{j}", block, x)
    for i, stage in enumerate(FACE_DECODER):
        for j, block in enumerate(stage):
            x = run(f"face_decoder_blocks.{i}.{j}", block, x)
        x = torch.cat([x, skips[-1 - i]], dim=1)
    x = run("output_block.0", OUTPUT, x)
    return torch.sigmoid(functional.conv2d(x, state["output_block.1.weight"], state["output_block.1.bias"]))


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    """A checkpoint of the published layout with weights that keep activations in range."""
    rng = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for name, shape in _published_shapes().items():
        if name.endswith("num_batches_tracked"):
            tensors[name] = torch.tensor(7)
        elif name.endswith("running_var"):
            tensors[name] = 0.5 + torch.rand(shape, generator=rng)
        elif len(shape) == 4:
            fan = shape[1] * shape[2] * shape[3]
            tensors[name] = torch.randn(shape, generator=rng) * fan**-0.5
        else:
            tensors[name] = torch.randn(shape, generator=rng) * 0.1 + (name.endswith("1.weight"))
    return tensors


@pytest.fixture(scope="module")
def network(state: dict[str, torch.Tensor]) -> Wav2Lip:
    network = Wav2Lip()
    network.load_state_dict(state)
    return network.eval()


def test_layout_matches_the_published_network():
    shapes = {name: tuple(tensor.shape) for name, tensor in Wav2Lip().state_dict().items()}
    assert shapes == _published_shapes()


def test_parameter_count_matches_the_published_layout():
    # Each block: kernel x kernel x in x out weights, out biases, out scales and out shifts of its batch norm.
    count = sum(k * k * c_in * c_out + 3 * c_out for _, (c_in, c_out, k, *_) in _blocks()) + 32 * 3 + 3
    assert count == 36_298_035
    assert sum(parameter.numel() for parameter in Wav2Lip().parameters()) == count


def test_forward_matches_an_independent_implementation(network, state):
    rng = torch.Generator().manual_seed(1)
    mel, faces = torch.randn(2, 1, 80, 16, generator=rng), torch.rand(2, 6, 96, 96, generator=rng)
    with torch.no_grad():
        lips = network(mel, faces)
    assert lips.shape == (2, 3, 96, 96)
    assert lips.std() > 0.01  # a saturated or constant output would match too easily
    torch.testing.assert_close(lips, _reference_forward(state, mel, faces), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["published", "bare"])
def test_checkpoint_loads(form, state, tmp_path):
    path = tmp_path / "wav2lip.pth"
    published = {"state_dict": {f"module.{name}": t for name, t in state.items()}, "global_step": 3, "optimizer": None}
    torch.save(published if form == "published" else state, path)
    network = load_wav2lip(path)
    assert not network.training
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, state[name])


def test_bad_checkpoints_are_refused_with_the_cause(state, tmp_path):
    path = tmp_path / "wav2lip.pth"
    with pytest.raises(TccpError, match=r"wav2lip\.pth: no such file"):
        load_wav2lip(path)
    path.write_bytes(b"")
    with pytest.raises(TccpError, match="not a readable state dict"):
        load_wav2lip(path)
    path.write_text("this is text")
    with pytest.raises(TccpError, match="not a readable state dict"):
        load_wav2lip(path)
    torch.save({"state_dict": Wav2Lip}, path)  # code, not tensors
    with pytest.raises(TccpError, match="not a readable state dict"):
        load_wav2lip(path)
    torch.save([1, 2], path)
    with pytest.raises(TccpError, match="holds no state dict"):
        load_wav2lip(path)
    torch.save({name: t for name, t in state.items() if name != "audio_encoder.3.conv_block.0.bias"}, path)
    with pytest.raises(TccpError, match=r"1 tensors are missing, e\.g\. audio_encoder\.3\.conv_block\.0\.bias"):
        load_wav2lip(path)
    torch.save(state | {"extra": torch.zeros(1)}, path)
    with pytest.raises(TccpError, match=r"unknown tensors, e\.g\. extra"):
        load_wav2lip(path)
    torch.save(state | {"output_block.1.bias": torch.zeros(4)}, path)
    with pytest.raises(TccpError, match=r"output_block\.1\.bias has shape \(4,\), not \(3,\)"):
        load_wav2lip(path)


def test_source_prepares_its_input_as_published(network, state):
    """Masked identity first, whole identity second, BGR 0..1; the output is RGB."""
    rng = np.random.default_rng(2)
    identity = rng.integers(256, size=(360, 360, 3), dtype=np.uint8)
    mel = rng.normal(size=(2, 80, 16)).astype(np.float32)
    lips = Wav2LipSource(network).lips(mel, identity)

    x0, y0, x1, y1 = (round(360 * edge) for edge in Wav2LipSource.FACE_REGION)
    face = cv2.resize(identity[y0:y1, x0:x1, ::-1], (96, 96), interpolation=cv2.INTER_AREA)
    reference = torch.from_numpy(face).permute(2, 0, 1)[None] / 255
    masked = reference * (torch.arange(96)[:, None] < 48)
    faces = torch.cat([masked, reference], 1).repeat(2, 1, 1, 1)
    expected = _reference_forward(state, torch.from_numpy(mel)[:, None], faces) * 255
    assert np.abs(lips[..., ::-1].astype(float) - expected.permute(0, 2, 3, 1).numpy()).max() <= 0.51


def test_face_region_encloses_the_face_of_a_head_crop():
    points = (MEAN_FACE[:, :2] * 50 + (200, 160)).astype(np.float32)
    box = head_boxes(points[None])[0]
    in_crop = (points - box[:2]) / (box[2:] - box[:2])
    x0, y0, x1, y1 = Wav2LipSource.FACE_REGION
    in_face = (in_crop - (x0, y0)) / (x1 - x0, y1 - y0)
    assert (in_face > 0).all()
    assert (in_face < 1).all()
    assert np.abs((in_face[:, 0].min() + in_face[:, 0].max()) / 2 - 0.5) < 0.02
    assert np.ptp(in_face[:, 0]) > 0.85
    assert (in_face[48:68, 1] > 0.55).all()  # Wav2Lip draws the lower half: all of the mouth must lie in it
    assert (in_face[27:29, 1] < 0.5).all()


def test_source_size_and_hash(network, state, tmp_path):
    identity, mel = np.full((64, 64, 3), 90, np.uint8), np.zeros((33, 80, 16), np.float32)
    small = Wav2LipSource(network, size_px=32)
    lips = small.lips(mel, identity)
    assert lips.shape == (33, 32, 32, 3)
    assert np.abs(lips[32].astype(int) - lips[0]).max() <= 1  # no step between batches
    assert small.hash != Wav2LipSource(network).hash

    torch.save(state | {"output_block.1.bias": torch.ones(3)}, tmp_path / "other.pth")
    torch.save(state, tmp_path / "same.pth")
    settings = LipSettings(source="wav2lip", size_px=32)
    same, other = (open_lip_source(settings, tmp_path / f"{name}.pth") for name in ("same", "other"))
    assert same is not None
    assert other is not None
    assert same.hash == small.hash != other.hash

    same.save(tmp_path / "lips")
    assert [path.name for path in (tmp_path / "lips").iterdir()] == ["wav2lip.safetensors"]
    exported = open_lip_source(settings, tmp_path / "lips")
    assert exported is not None
    assert exported.hash == same.hash
    np.testing.assert_array_equal(exported.lips(mel[:2], identity), same.lips(mel[:2], identity))


def test_source_uses_the_look_ahead_window(network):
    from tccp.media.mel import mel_windows, wav2lip_windows

    samples = np.random.default_rng(3).normal(scale=0.1, size=16_000).astype(np.float32)
    windows = Wav2LipSource(network).windows(samples, 2, 5)
    np.testing.assert_array_equal(windows, wav2lip_windows(samples, 2, 5))
    assert not np.allclose(windows, mel_windows(samples, 2, 5))


def test_lip_source_requires_weights_unless_it_is_none():
    assert open_lip_source(LipSettings(source="none"), None) is None
    with pytest.raises(TccpError, match=r"lips\.source=wav2lip needs weights"):
        open_lip_source(LipSettings(source="wav2lip"), None)
