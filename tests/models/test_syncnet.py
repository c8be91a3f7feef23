"""SyncNet and its cepstra match the published definitions; the search finds planted offsets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.fft
import torch
from tiny_syncnet import brightness_reader, hiss, story
from torch.nn import functional

from tccp.config import SAMPLES_PER_FRAME
from tccp.errors import TccpError
from tccp.models.mfcc import mfcc
from tccp.models.syncnet import (
    SyncNet,
    distances,
    lip_embeddings,
    load_syncnet,
    read_offset,
    sound_embeddings,
    syncnet_offset,
)

# The published network, by hand. Position in its Sequential: (in, out, kernel, stride, padding), pools: (kernel, ...).
SOUND_CONVS = {
    0: (1, 64, (3, 3), (1, 1), (1, 1)),
    4: (64, 192, (3, 3), (1, 1), (1, 1)),
    8: (192, 384, (3, 3), (1, 1), (1, 1)),
    11: (384, 256, (3, 3), (1, 1), (1, 1)),
    14: (256, 256, (3, 3), (1, 1), (1, 1)),
    18: (256, 512, (5, 4), (1, 1), (0, 0)),
}
SOUND_POOLS = {7: ((3, 3), (1, 2), (0, 0)), 17: ((3, 3), (2, 2), (0, 0))}
LIP_CONVS = {
    0: (3, 96, (5, 7, 7), (1, 2, 2), (0, 0, 0)),
    4: (96, 256, (1, 5, 5), (1, 2, 2), (0, 1, 1)),
    8: (256, 256, (1, 3, 3), (1, 1, 1), (0, 1, 1)),
    11: (256, 256, (1, 3, 3), (1, 1, 1), (0, 1, 1)),
    14: (256, 256, (1, 3, 3), (1, 1, 1), (0, 1, 1)),
    18: (256, 512, (1, 6, 6), (1, 1, 1), (0, 0, 0)),
}
LIP_POOLS = {
    3: ((1, 3, 3), (1, 2, 2), (0, 0, 0)),
    7: ((1, 3, 3), (1, 2, 2), (0, 1, 1)),
    17: ((1, 3, 3), (1, 2, 2), (0, 0, 0)),
}


def _norm_shapes(name: str, channels: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        f"{name}.{leaf}": (channels,) for leaf in ("weight", "bias", "running_mean", "running_var")
    }
    return shapes | {f"{name}.num_batches_tracked": ()}


def _published_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for branch, convs in (("netcnnaud", SOUND_CONVS), ("netcnnlip", LIP_CONVS)):
        for at, (c_in, c_out, kernel, _, _) in convs.items():
            shapes |= {f"{branch}.{at}.weight": (c_out, c_in, *kernel), f"{branch}.{at}.bias": (c_out,)}
            shapes |= _norm_shapes(f"{branch}.{at + 1}", c_out)
    for branch in ("netfcaud", "netfclip"):
        shapes |= {f"{branch}.0.weight": (512, 512), f"{branch}.0.bias": (512,)} | _norm_shapes(f"{branch}.1", 512)
        shapes |= {f"{branch}.3.weight": (1024, 512), f"{branch}.3.bias": (1024,)}
    return shapes


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
        elif len(shape) > 1:
            tensors[name] = torch.randn(shape, generator=rng) * (2 / float(np.prod(shape[1:]))) ** 0.5
        else:
            tensors[name] = torch.randn(shape, generator=rng) * 0.1 + name.endswith("weight")
    tensors["netcnnlip.0.weight"] /= 100  # pictures come as 0..255
    return tensors


@pytest.fixture(scope="module")
def network(state: dict[str, torch.Tensor]) -> SyncNet:
    network = SyncNet()
    network.load_state_dict(state)
    return network.eval()


def _norm(state: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    shape = (1, -1) + (1,) * (x.dim() - 2)
    mean, var, weight, bias = (
        state[f"{name}.{leaf}"].reshape(shape) for leaf in ("running_mean", "running_var", "weight", "bias")
    )
    return functional.relu((x - mean) / (var + 1e-5).sqrt() * weight + bias)


def _reference(state: dict[str, torch.Tensor], branch: str, x: torch.Tensor) -> torch.Tensor:
    sound = branch == "aud"
    convs, pools = (SOUND_CONVS, SOUND_POOLS) if sound else (LIP_CONVS, LIP_POOLS)
    conv, pool = (functional.conv2d, functional.max_pool2d) if sound else (functional.conv3d, functional.max_pool3d)
    for at in sorted([*convs, *pools]):
        if at in pools:
            x = pool(x, *pools[at])
        else:
            name = f"netcnn{branch}.{at}"
            x = conv(x, state[f"{name}.weight"], state[f"{name}.bias"], *convs[at][3:])
            x = _norm(state, f"netcnn{branch}.{at + 1}", x)
    x = functional.linear(x.flatten(1), state[f"netfc{branch}.0.weight"], state[f"netfc{branch}.0.bias"])
    x = _norm(state, f"netfc{branch}.1", x)
    return functional.linear(x, state[f"netfc{branch}.3.weight"], state[f"netfc{branch}.3.bias"])


# ---- cepstra


def _cepstra_by_loops(samples: np.ndarray) -> np.ndarray:
    """python_speech_features' definition, one step and one band at a time."""
    sharpened = [samples[0]] + [samples[i] - 0.97 * samples[i - 1] for i in range(1, len(samples))]
    steps = 1 if len(samples) <= 400 else 1 + int(np.ceil((len(samples) - 400) / 160))
    sharpened += [0.0] * ((steps - 1) * 160 + 400 - len(samples))
    mels = np.linspace(0, 2595 * np.log10(1 + 8000 / 700.0), 28)
    corners = np.floor(513 * 700 * (10 ** (mels / 2595) - 1) / 16000)
    rows = []
    for step in range(steps):
        frame = np.zeros(512)
        frame[:400] = sharpened[step * 160 : step * 160 + 400]
        power = np.abs(scipy.fft.fft(frame)[:257]) ** 2 / 512
        logs = []
        for low, middle, high in zip(corners, corners[1:], corners[2:], strict=False):
            total = 0.0
            for k in range(257):
                if low <= k < middle:
                    total += power[k] * (k - low) / (middle - low)
                elif middle <= k < high:
                    total += power[k] * (high - k) / (high - middle)
            logs.append(np.log(total))
        row = []
        for i in range(13):
            cosines = np.cos(np.pi * i * (2 * np.arange(26) + 1) / 52)
            scale = np.sqrt((1 if i == 0 else 2) / 26)
            row.append(scale * float(cosines @ logs) * (1 + 11 * np.sin(np.pi * i / 22)))
        row[0] = np.log(power.sum())
        rows.append(row)
    return np.array(rows)


@pytest.mark.parametrize("length", [200, 400, 401, 560, 3000])
def test_cepstra_equal_the_definition(length: int) -> None:
    rng = np.random.default_rng(length)
    samples = rng.normal(0, 2000, length) + 5000 * np.sin(np.arange(length) / 5)
    np.testing.assert_allclose(mfcc(samples), _cepstra_by_loops(samples), rtol=1e-5, atol=1e-4)


def test_cepstra_options() -> None:
    samples = np.random.default_rng(0).integers(-9000, 9000, 4000).astype(np.int16)
    plain = mfcc(samples, lifter=0, energy_first=False)
    np.testing.assert_allclose(mfcc(samples)[:, 5], plain[:, 5] * (1 + 11 * np.sin(np.pi * 5 / 22)), rtol=1e-5)
    assert np.abs(mfcc(samples)[:, 0] - plain[:, 0]).min() > 1
    np.testing.assert_array_equal(mfcc(samples.astype(np.float64)), mfcc(samples))
    np.testing.assert_array_equal(mfcc(samples, window=np.ones(400)), mfcc(samples))
    assert np.abs(mfcc(samples, window=np.hamming(400)) - mfcc(samples)).max() > 0.1
    assert mfcc(samples, step_seconds=0.02).shape == (13, 13)
    assert np.isfinite(mfcc(np.zeros(0))).all() and np.isfinite(mfcc(np.zeros(1000))).all()


def test_cepstra_of_loud_int16_samples_do_not_overflow() -> None:
    samples = np.tile(np.array([32767, -32768], np.int16), 500)
    np.testing.assert_array_equal(mfcc(samples), mfcc(samples.astype(np.float64)))


# ---- the network


def test_layout_matches_the_published_network() -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in SyncNet().state_dict().items()}
    assert shapes == _published_shapes()


def test_forward_matches_an_independent_implementation(network: SyncNet, state: dict[str, torch.Tensor]) -> None:
    rng = torch.Generator().manual_seed(1)
    cepstra = torch.randn(3, 1, 13, 20, generator=rng)
    pictures = torch.rand(3, 7, 224, 224, generator=rng) * 255
    with torch.inference_mode():
        sound, lips = network.embed_sound(cepstra), network.embed_lips(pictures)
        windows = torch.stack([pictures[:, at : at + 5] for at in range(3)])
        wanted_sound, wanted_lips = _reference(state, "aud", cepstra), _reference(state, "lip", windows)
    for found, wanted in ((sound, wanted_sound), (lips, wanted_lips)):
        assert found.shape == (3, 1024)
        assert (found[0] - found[1]).norm() > 1e-2 * found[0].norm()  # a constant output would match too easily
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def test_embedding_windows_match_the_definition(network: SyncNet, state: dict[str, torch.Tensor]) -> None:
    """Pictures BGR 0..255, 5 at stride 1, across the seam between batches too; sound 20 steps at stride 4."""
    rng = np.random.default_rng(2)
    patches = rng.integers(256, size=(22, 14, 14, 3), dtype=np.uint8)
    pictures = np.repeat(np.repeat(patches, 16, 1), 16, 2)
    pcm = rng.normal(0, 3000, 22 * SAMPLES_PER_FRAME + 300).astype(np.int16)
    lips, sound = lip_embeddings(network, iter(pictures)), sound_embeddings(network, pcm)
    assert len(lips) == 18
    assert len(sound) == 17
    cepstra = mfcc(pcm)
    for at in (0, 15, 16):
        window = torch.from_numpy(pictures[at : at + 5, :, :, ::-1].astype(np.float32)).permute(3, 0, 1, 2)[None]
        steps = torch.from_numpy(cepstra[4 * at : 4 * at + 20].T[None, None].copy())
        wanted = _reference(state, "lip", window), _reference(state, "aud", steps)
        for found, reference in zip((lips[at], sound[at]), wanted, strict=True):
            np.testing.assert_allclose(found, reference[0].numpy(), rtol=1e-3, atol=1e-3 * np.abs(found).max())
    assert lip_embeddings(network, iter(pictures[:4])).shape == (0, 1024)
    assert sound_embeddings(network, pcm[: 5 * SAMPLES_PER_FRAME]).shape == (0, 1024)


# ---- the offset


def _distances_by_loops(lips: np.ndarray, sound: np.ndarray) -> np.ndarray:
    table = np.zeros((len(lips), 31))
    for i in range(len(lips)):
        for k in range(31):
            at = i + k - 15
            other = sound[at] if 0 <= at < len(sound) else np.zeros_like(sound[0])
            table[i, k] = np.sqrt(((lips[i] - other) ** 2).sum())
    return table


def test_distances_equal_the_definition() -> None:
    rng = np.random.default_rng(3)
    lips, sound = (rng.normal(size=(count, 8)).astype(np.float32) for count in (23, 21))
    np.testing.assert_allclose(distances(lips, sound), _distances_by_loops(lips[:21], sound), rtol=1e-4)


@pytest.mark.parametrize("late", [-15, -4, 0, 3, 15])
def test_planted_offset_is_found_with_the_published_sign(late: int) -> None:
    rng = np.random.default_rng(4)
    events = rng.normal(size=(140, 16)).astype(np.float32)
    lips = events[20:120]
    sound = events[20 - late : 120 - late] + rng.normal(0, 0.3, (100, 16)).astype(np.float32)
    found = read_offset(distances(lips, sound))
    assert found.offset == -late
    mean = _distances_by_loops(lips, sound).mean(0)
    assert found.distance == pytest.approx(mean.min(), rel=1e-4)
    assert found.confidence == pytest.approx(np.median(mean) - mean.min(), rel=1e-3)


def test_unrelated_embeddings_give_low_confidence() -> None:
    rng = np.random.default_rng(5)
    lips, sound = (rng.normal(size=(400, 16)).astype(np.float32) for _ in range(2))
    assert read_offset(distances(lips, sound)).confidence < 0.2
    with pytest.raises(ValueError, match="at least 6 frames"):
        read_offset(distances(lips[:0], sound))


@pytest.mark.slow
@pytest.mark.parametrize("late", [-4, 3])
def test_offset_is_found_from_pictures_and_sound(late: int) -> None:
    """End to end, from pictures and samples to the offset."""
    events = story(6, 60)
    pictures = [np.full((224, 224, 3), round(10 * value), np.uint8) for value in events[10:46]]
    found = syncnet_offset(brightness_reader(), pictures, hiss(events[10 - late : 46 - late]))
    assert found.offset == -late


# ---- files


@pytest.mark.parametrize("form", ["whole", "without counters"])
def test_checkpoint_loads(form: str, state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    given = {name: t for name, t in state.items() if form == "whole" or not name.endswith("num_batches_tracked")}
    torch.save(given, tmp_path / "syncnet_v2.model")
    network = load_syncnet(tmp_path / "syncnet_v2.model")
    assert not network.training
    for name, tensor in network.state_dict().items():
        assert name not in given or torch.equal(tensor, given[name])


def test_bad_checkpoints_give_a_one_line_error_with_the_cause(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / "syncnet.model"
    for content, why in (
        (None, r"syncnet\.model: no such file"),
        (b"", "not a readable state dict"),
        (b"this is text", "not a readable state dict"),
        (SyncNet, "not a readable state dict"),  # code, not tensors
        ([1, 2], "holds no state dict"),
        ({"epoch": 3}, "holds no state dict"),
        ({name: t for name, t in state.items() if name != "netfclip.3.bias"}, r"1 tensors are missing.*netfclip\.3"),
        (state | {"extra": torch.zeros(1)}, r"unknown tensors, e\.g\. extra"),
        (state | {"netfcaud.3.bias": torch.zeros(4)}, r"netfcaud\.3\.bias has shape \(4,\), not \(1024,\)"),
    ):
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            torch.save(content, path)
        with pytest.raises(TccpError, match=why) as caught:
            load_syncnet(path)
        assert "\n" not in str(caught.value)
