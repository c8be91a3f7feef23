"""Networks' lean layers against diffusers' general ones, and recordings against the networks."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from diffusers import AutoencoderKL
from diffusers.models.attention import FeedForward as GeneralFeedForward
from diffusers.models.attention_processor import Attention as GeneralAttention
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.resnet import Downsample2D, ResnetBlock2D, Upsample2D
from diffusers.training_utils import EMAModel
from torch import nn

from tccp.models.autoencoder_network import AutoencoderNetwork
from tccp.models.conditions import Conditions
from tccp.models.layers import (
    Conv,
    CrossAttention,
    Downsample,
    FeedForward,
    FrameConv,
    GroupNorm,
    Pointwise,
    ResnetBlock,
    SelfAttention,
    TimeMlp,
    Upsample,
    attend,
    join_weights,
    time_sinusoids,
)
from tccp.models.mvcontrolnet import MVControlNet, Prepared
from tccp.models.traced import EAGER_CALLS, TracedNetwork
from tccp.training.averaged_weights import AveragedWeights

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
SHAPE = {
    "in_channels": 12,
    "out_channels": 12,
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (16, 32, 32),
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 8,
}


def pair(lean: nn.Module, general: nn.Module) -> None:
    """Gives both the same random weights. Their names must be equal."""
    for parameter in lean.parameters():
        nn.init.normal_(parameter, std=0.3)
    general.load_state_dict(lean.state_dict())


@torch.no_grad()
@pytest.mark.parametrize("tokens", [None, 24])
def test_attention_equals_the_general_one(tokens: int | None) -> None:
    torch.manual_seed(0)
    general = GeneralAttention(32, cross_attention_dim=tokens, heads=4, dim_head=8)
    x = torch.randn(3, 10, 32)
    if tokens is None:
        own = SelfAttention(32, 4, 0.0)
        pair(own, general)
        torch.testing.assert_close(own(x), general(x), **TOLERANCE)
        return
    cross, source = CrossAttention(32, tokens, 4, 0.0), torch.randn(3, 7, tokens)
    pair(cross, general)
    expected = general(x, encoder_hidden_states=source)
    torch.testing.assert_close(cross(x, cross.keys_values(source)), expected, **TOLERANCE)


@torch.no_grad()
def test_other_layers_equal_the_general_ones() -> None:
    torch.manual_seed(0)
    x, time, tokens = torch.randn(2, 16, 8, 8), torch.randn(2, 12), torch.randn(2, 5, 16)
    for channels in (16, 24):
        lean = ResnetBlock(16, channels, 12, 0.0, 4)
        general = ResnetBlock2D(in_channels=16, out_channels=channels, temb_channels=12, groups=4)
        pair(lean, general)
        torch.testing.assert_close(lean(x, nn.functional.silu(time)), general(x, time), **TOLERANCE)
    for one, other, given in (
        (Downsample(16), Downsample2D(16, use_conv=True, name="op"), x),
        (Upsample(16), Upsample2D(16, use_conv=True), x),
        (FeedForward(16, 0.0), GeneralFeedForward(16), tokens),
        (TimeMlp(12), TimestepEmbedding(12, 12), time),
    ):
        pair(one, other)
        torch.testing.assert_close(one(given), other(given), **TOLERANCE)
    times = torch.tensor([0, 1, 500, 999])
    general_times = Timesteps(12, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(time_sinusoids(times, 12), general_times(times), **TOLERANCE)


@torch.no_grad()
def test_convolutions_as_products_of_matrices_equal_convolutions() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 6, 4, 5)
    pointwise = Pointwise(6, 3)
    expected = nn.functional.conv2d(x, pointwise.weight, pointwise.bias)
    torch.testing.assert_close(pointwise(x), expected, **TOLERANCE)
    over_frames, frames = FrameConv(6), torch.randn(2, 7, 20, 6)
    expected = nn.functional.conv2d(frames.permute(0, 3, 1, 2), over_frames.weight, over_frames.bias, padding=(1, 0))
    torch.testing.assert_close(over_frames(frames), expected.permute(0, 2, 3, 1), **TOLERANCE)
    for height, width in ((2, 2), (1, 3), (5, 4)):  # the last has too many positions for a product of matrices
        conv, x = Conv(48, 16).to(memory_format=torch.channels_last), torch.randn(3, 48, height, width)
        expected = nn.functional.conv2d(x, conv.weight, conv.bias, padding=1)
        torch.testing.assert_close(conv(x), expected, **TOLERANCE)


@torch.no_grad()
def test_joined_weights_give_the_same_numbers() -> None:
    torch.manual_seed(0)
    for layer, x in (
        (Upsample(8), torch.randn(2, 8, 5, 7)),
        (FrameConv(8), torch.randn(2, 6, 3, 8)),
        (SelfAttention(8, 2, 0.0), torch.randn(2, 6, 8)),
    ):
        expected = layer(x)
        join_weights(layer)
        assert layer.joined is not None
        torch.testing.assert_close(layer(x), expected, **TOLERANCE)
        nn.init.zeros_(next(layer.parameters()))
        torch.testing.assert_close(layer(x), expected, **TOLERANCE)  # what was joined is in use
    network, latents, t, conditions, control = network_and_inputs()
    for parameter in network.parameters():
        if not parameter.any():  # convolutions that start at zero
            nn.init.normal_(parameter, std=0.1)
    expected = network(latents, t, conditions, control)
    names = set(network.state_dict())
    join_weights(network)
    torch.testing.assert_close(network(latents, t, conditions, control), expected, **TOLERANCE)
    assert set(network.state_dict()) == names


@pytest.mark.parametrize("attention", [True, False])
def test_the_autoencoder_is_that_of_diffusers(attention: bool, tmp_path: Path) -> None:
    """Same names, same random initialisation, same numbers, and each reads the other's folder."""
    torch.manual_seed(0)
    general = AutoencoderKL(**SHAPE, mid_block_add_attention=attention)
    torch.manual_seed(0)
    lean = AutoencoderNetwork(**SHAPE, mid_block_add_attention=attention)
    weights = general.state_dict()
    assert {name: value.tolist() for name, value in lean.state_dict().items()} == {
        name: value.tolist() for name, value in weights.items()
    }
    general.save_pretrained(tmp_path / "general")
    lean.save_pretrained(tmp_path / "lean")
    pictures = torch.randn(2, 12, 16, 16)
    with torch.no_grad():
        expected, posterior = general.encode(pictures).latent_dist, lean.encode(pictures)
        torch.testing.assert_close(posterior.mean, expected.mean, **TOLERANCE)
        torch.testing.assert_close(posterior.std, expected.std, **TOLERANCE)
        torch.testing.assert_close(posterior.kl(), expected.kl(), **TOLERANCE)
        decoded = lean.decode(posterior.mean)
        torch.testing.assert_close(decoded, general.decode(posterior.mean).sample, **TOLERANCE)
        assert torch.equal(AutoencoderNetwork.from_pretrained(tmp_path / "general").decode(posterior.mean), decoded)
        again = AutoencoderKL.from_pretrained(tmp_path / "lean", low_cpu_mem_usage=False)
        torch.testing.assert_close(again.decode(posterior.mean).sample, decoded, **TOLERANCE)


def test_other_autoencoders_and_damaged_files_are_refused(tmp_path: Path) -> None:
    lean = AutoencoderNetwork(**SHAPE, mid_block_add_attention=False)
    lean.save_pretrained(tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / "diffusion_pytorch_model.safetensors"
    text, data = config.read_text(), weights.read_bytes()
    for change, message in (
        (('"DownEncoderBlock2D"', '"AttnDownEncoderBlock2D"'), "down_block_types is .*; only DownEncoderBlock2D"),
        (('"AutoencoderKL"', '"VQModel"'), "is not that of AutoencoderKL"),
        (('"in_channels"', '"channels_in"'), "unexpected keyword argument 'channels_in'"),
        (('"latent_channels": 4', '"latent_channels": 8'), "size mismatch"),
        (('"latent_channels": 4', '"latent_channels": -4'), "config.json: RuntimeError: .*negative"),
        (('"norm_num_groups": 8', '"norm_num_groups": 0'), "config.json: ZeroDivisionError"),
    ):
        config.write_text(text.replace(*change))
        with pytest.raises(ValueError, match=message):
            AutoencoderNetwork.from_pretrained(tmp_path)
    config.write_text(text)
    weights.write_bytes(data[:-10])
    with pytest.raises(ValueError, match="is damaged"):
        AutoencoderNetwork.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(FileNotFoundError):
        AutoencoderNetwork.from_pretrained(tmp_path)


def test_loading_makes_no_random_weights(tmp_path: Path) -> None:
    AutoencoderNetwork(**SHAPE, mid_block_add_attention=True).save_pretrained(tmp_path / "autoencoder")
    MVControlNet.from_settings(tiny.SETTINGS, "face_sequence").save_pretrained(tmp_path / "network")
    before = torch.get_rng_state()
    AutoencoderNetwork.from_pretrained(tmp_path / "autoencoder")
    MVControlNet.from_pretrained(tmp_path / "network")
    assert torch.equal(torch.get_rng_state(), before)


def test_averaged_weights_equal_those_of_diffusers() -> None:
    torch.manual_seed(0)
    network = nn.Linear(3, 2)
    network.bias.requires_grad_(False)
    ours, theirs = AveragedWeights(network.parameters(), 0.9), EMAModel(network.parameters(), 0.9, foreach=True)
    for step in range(30):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter += torch.randn_like(parameter)
        ours.step(network.parameters())
        theirs.step(network.parameters())
        for one, other in zip(ours.weights, theirs.shadow_params, strict=True):
            torch.testing.assert_close(one, other)
        if step == 10:  # checkpoints of either can be continued
            ours.load_state_dict(theirs.state_dict())


# Recordings and prepared windows


def network_and_inputs() -> tuple[MVControlNet, torch.Tensor, torch.Tensor, Conditions, torch.Tensor]:
    torch.manual_seed(0)
    network = MVControlNet.from_settings(tiny.SETTINGS, "face_sequence").eval()
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    config, frames = network.config, network.config.num_frames
    given = {
        "audio": torch.randn(3, frames, 80, 16),
        "identity": torch.randn(3, 3, config.picture_px, config.picture_px),
        "lips": torch.randn(3, frames, 3, config.lip_px, config.lip_px),
    }
    shape = 3, config.latent_channels, frames, config.latent_px, config.latent_px
    control = torch.randn(3, network.control_channels, *shape[2:])
    conditions = Conditions(**{kind: given[kind] for kind in config.condition_kinds})
    return network, torch.randn(shape), torch.randint(0, 1000, (3, frames)), conditions, control


@torch.no_grad()
def test_a_prepared_window_gives_the_same_prediction() -> None:
    network, latents, t, conditions, control = network_and_inputs()
    frames = latents.shape[2]
    expected = network(latents, t, conditions, control)
    prepared = network.prepare(conditions, control, frames)
    assert torch.equal(network(latents, t, prepared), expected)
    windows = [prepared.windows(number, number + 1, frames) for number in range(3)]
    assert torch.equal(network(latents, t, Prepared.cat(windows)), expected)
    swapped = network(latents[[2, 0]], t[[2, 0]], Prepared.cat([windows[2], windows[0]]))
    torch.testing.assert_close(swapped, expected[[2, 0]], **TOLERANCE)


@torch.no_grad()
def test_a_recording_gives_the_same_numbers_for_other_inputs() -> None:
    network, latents, t, conditions, control = network_and_inputs()
    recorded, calls = TracedNetwork(network), []
    network.register_forward_pre_hook(lambda module, given: calls.append(1))
    for call in range(EAGER_CALLS + 4):
        prepared = network.prepare(conditions, control + call, latents.shape[2])
        result = recorded(latents + call, t, prepared)
        made = len(calls)
        assert torch.equal(result, network(latents + call, t, prepared)), call
        calls[made:] = []
    assert len(calls) == EAGER_CALLS + 1  # the last one was recorded
    one = network.prepare(conditions[:1], control[:1], latents.shape[2])
    assert torch.equal(recorded(latents[:1], t[:1], one), network(latents[:1], t[:1], one))


def test_on_a_cpu_attention_and_group_norm_compute_in_single_precision_and_round_once() -> None:
    torch.manual_seed(0)
    query, keys, values = (torch.randn(2, 3, 5, 8).bfloat16() for _ in range(3))
    exact = torch.nn.functional.scaled_dot_product_attention(query.float(), keys.float(), values.float())
    norm, x = GroupNorm(4, 8), torch.randn(2, 8, 3, 3).bfloat16()
    normalised = torch.nn.functional.group_norm(x.float(), 4, norm.weight, norm.bias, norm.eps)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(attend(query, keys, values), exact.bfloat16(), rtol=0, atol=0)
        torch.testing.assert_close(norm(x), normalised.bfloat16(), rtol=0, atol=0)
