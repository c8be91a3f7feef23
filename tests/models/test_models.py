"""MVControlNet, its condition encoders and the auto-encoder, at tiny sizes."""

import json

import pytest
import torch
from tiny_networks import inputs, tiny
from torch.utils.flop_counter import FlopCounterMode

from tccp.config import AutoencoderSettings, load_settings, paper
from tccp.errors import TccpError
from tccp.inference.manifest import TOY_WEIGHTS
from tccp.models.autoencoder import PictureAutoencoder, to_bytes, to_model
from tccp.models.conditions import ConditionEncoders, Conditions
from tccp.models.mvcontrolnet import MVControlNet
from tccp.models.variants import FIRST_OF, TWO_STAGE, VARIANTS
from tccp.models.video_unet import SpaceTimeTransformer, TemporalConv


@pytest.mark.parametrize("name", VARIANTS)
def test_fresh_model_equals_its_video_branch(name):
    settings = tiny()
    model = MVControlNet.from_settings(settings, name).eval()
    latents, t, conditions, control = inputs(settings, VARIANTS[name])
    with torch.no_grad():
        controlled = model(latents, t, conditions, control)
        other = model(latents, t, conditions, control * 3 + 1)
        alone = model(latents, t, conditions, None)
    assert controlled.shape == latents.shape
    assert torch.equal(controlled, other)
    assert torch.equal(controlled, alone)


def test_control_changes_the_output_once_zero_convolutions_are_nonzero():
    settings = tiny()
    model = MVControlNet.from_settings(settings, "landmark_sequence").eval()
    for zero in (model.control.zero_in, *model.control.zero_out):
        torch.nn.init.normal_(zero.weight, std=0.1)
    latents, t, conditions, control = inputs(settings, VARIANTS["landmark_sequence"])
    with torch.no_grad():
        assert not torch.allclose(model(latents, t, conditions, control), model(latents, t, conditions, -control))


def test_control_encoder_starts_as_a_copy_of_the_video_encoder():
    model = MVControlNet.from_settings(tiny(), "face_sequence")
    video, control = model.video.encoder.state_dict(), model.control.encoder.state_dict()
    assert video.keys() == control.keys()
    assert all(torch.equal(video[k], control[k]) for k in video)
    assert all(v.data_ptr() != control[k].data_ptr() for k, v in video.items())


def test_every_parameter_has_a_gradient_once_zero_convolutions_are_nonzero():
    settings = tiny()
    model = MVControlNet.from_settings(settings, "face_sequence")
    temporal = [module.conv for module in model.modules() if isinstance(module, TemporalConv)]
    for zero in (model.control.zero_in, *model.control.zero_out, *temporal):
        torch.nn.init.normal_(zero.weight, std=0.1)
    latents, t, conditions, control = inputs(settings, VARIANTS["face_sequence"])
    model(latents, t, conditions.drop(torch.tensor([True, False])), control).square().mean().backward()
    without_gradient = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without_gradient == []


def test_frozen_video_branch_leaves_only_the_control_branch_to_train():
    settings = tiny()
    model = MVControlNet.from_settings(settings, "face_sequence")
    model.freeze_video_branch()
    trained = {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"control"}


def test_start_control_from_copies_video_and_resets_the_zero_convolutions():
    settings = tiny()
    source = MVControlNet.from_settings(settings, "landmark_sequence").eval()
    target = MVControlNet.from_settings(settings, "landmark_sequence").eval()
    for parameter in target.control.parameters():
        torch.nn.init.normal_(parameter)
    target.start_control_from(source)
    latents, t, conditions, control = inputs(settings, VARIANTS["landmark_sequence"])
    with torch.no_grad():
        assert torch.equal(target(latents, t, conditions, control), source(latents, t, conditions, None))
    with pytest.raises(ValueError, match="another shape"):
        target.start_control_from(
            MVControlNet.from_settings(tiny(**{"network.base_channels": 32}), "landmark_sequence")
        )


def test_cross_attention_stays_within_a_frame():
    """Eq. 7: frame i of the input attends to the tokens of frame i alone."""
    torch.manual_seed(0)
    block = SpaceTimeTransformer(channels=16, condition_dim=8, head_dim=8, dropout=0.0).eval()
    x, tokens = torch.randn(4, 9, 16), torch.randn(4, 5, 8)
    changed = tokens.clone()
    changed[2] += 1
    with torch.no_grad():
        one, other = (block.cross_attend(x, block.cross.keys_values(given)) for given in (tokens, changed))
    difference = (one - other).abs().amax(dim=(1, 2))
    assert difference[2] > 1e-3
    assert torch.equal(difference[[0, 1, 3]], torch.zeros(3))


def test_condition_tokens_of_a_frame_come_from_that_frame():
    encoders = ConditionEncoders(("audio", "lips", "identity"), 16, picture_px=32, lip_px=16).eval()
    _, _, conditions, _ = inputs(tiny(), VARIANTS["one_stage_sequence"], batch=1)
    changed = Conditions(conditions.audio.clone(), conditions.identity, conditions.lips.clone())
    changed.audio[:, 2] += 1
    changed.lips[:, 2] += 1
    with torch.no_grad():
        difference = (encoders(conditions, 4)[0] - encoders(changed, 4)[0]).abs().amax(dim=(0, 2, 3))
    assert difference[2] > 1e-3
    assert torch.equal(difference[[0, 1, 3]], torch.zeros(3))


def test_dropped_conditions_do_not_reach_the_output():
    settings = tiny()
    row = VARIANTS["face_sequence"]
    model = MVControlNet.from_settings(settings, row.name).eval()
    latents, t, conditions, control = inputs(settings, row)
    _, _, other, _ = inputs(settings, row, seed=1)
    drop = torch.tensor([True, False])
    with torch.no_grad():
        a, b = model(latents, t, conditions.drop(drop), control), model(latents, t, other.drop(drop), control)
    assert torch.equal(a[0], b[0])
    assert not torch.allclose(a[1], b[1])


def test_conditions_of_different_kinds_cannot_be_concatenated():
    with pytest.raises(ValueError, match="identity"):
        Conditions.cat(
            [
                Conditions(audio=torch.zeros(1, 1, 80, 16)),
                Conditions(torch.zeros(1, 1, 80, 16), torch.zeros(1, 3, 8, 8)),
            ]
        )


def test_gradient_checkpointing_changes_no_gradient():
    settings = tiny()
    row = VARIANTS["landmark_sequence"]
    model = MVControlNet.from_settings(settings, row.name)
    latents, t, conditions, control = inputs(settings, row)

    def gradients():
        model.zero_grad()
        model(latents, t, conditions, control).square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = gradients()
    model.enable_gradient_checkpointing()
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(plain, gradients(), strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [("latents", "this network takes"), ("t", "one time per frame"), ("control", "this network takes")],
)
def test_wrong_shapes_are_named_in_the_error(change, message):
    settings = tiny()
    model = MVControlNet.from_settings(settings, "landmark_sequence")
    latents, t, _, control = inputs(settings, VARIANTS["landmark_sequence"])

    def check(latents, t, control):  # directly: under pytest, the type checks of forward() would raise first
        model._check(latents, t)
        model._check_control(len(latents), control, latents.shape[2])

    check(latents, t, control)
    wrong = {
        "latents": (latents[..., :2], t, control),
        "t": (latents, t[:, :1], control),
        "control": (latents, t, control[:, :, :1]),
    }
    with pytest.raises(ValueError, match=message):
        check(*wrong[change])


def test_missing_condition_is_named_in_the_error():
    settings = tiny()
    model = MVControlNet.from_settings(settings, "landmark_sequence")
    latents, t, _, control = inputs(settings, VARIANTS["landmark_sequence"])
    with pytest.raises(ValueError, match="'audio' is missing"):
        model(latents, t, Conditions(), control)


def test_control_embedding_widths_change_only_the_embedding():
    none, same, wide = (
        MVControlNet.from_settings(tiny(**{"network.control_embedding": widths}), "face_first")
        for widths in ((), (16,), (24, 40))
    )
    shapes = [{name: tuple(p.shape) for name, p in model.named_parameters()} for model in (none, same, wide)]
    assert shapes[0] == shapes[1]
    inner = [name for name in shapes[2] if name.startswith("control.embed")]
    assert [shapes[2][name][0] for name in inner if name.endswith("weight")] == [24, 40, 16]
    assert {n: s for n, s in shapes[0].items() if "embed" not in n} == {
        n: s for n, s in shapes[2].items() if "embed" not in n
    }


def test_save_pretrained_round_trip(tmp_path):
    settings = tiny()
    row = VARIANTS["face_sequence"]
    model = MVControlNet.from_settings(settings, row.name).eval()
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    loaded = MVControlNet.from_pretrained(tmp_path).eval()
    arguments = inputs(settings, row)
    with torch.no_grad():
        assert torch.equal(model(*arguments), loaded(*arguments))


@pytest.mark.slow
@pytest.mark.parametrize("name", TWO_STAGE)
def test_paper_size(name):
    """Table 3's network: about 116 M parameters a variant, about 66 GFLOP for 8 frames (PAPER.md)."""
    settings = paper()
    with torch.device("meta"):
        model = MVControlNet.from_settings(settings, name)
        row = VARIANTS[name]
        frames = row.num_frames(settings.window)
        shape = (1, 16, frames, 16, 16)
        conditions = Conditions(
            torch.empty(1, frames, 80, 16), torch.empty(1, 3, 256, 256), torch.empty(1, frames, 3, 96, 96)
        )
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(shape), torch.zeros(1, frames, dtype=torch.long), conditions, torch.empty(shape))
    assert 105e6 < sum(p.numel() for p in model.parameters()) < 130e6
    if row.continues:
        assert 50e9 < counter.get_total_flops() < 80e9


def test_pictures_round_trip_through_the_models_range():
    pictures = torch.arange(256, dtype=torch.uint8).repeat(3).reshape(1, 16, 16, 3)
    assert torch.equal(to_bytes(to_model(pictures)), pictures)
    assert to_model(pictures).min() == -1
    assert to_model(pictures).max() == 1


@pytest.fixture(params=[1, 2])
def autoencoder(request):
    """One on plain pixels, one on patches folded into channels; both downsample by 4."""
    torch.manual_seed(0)
    settings = AutoencoderSettings(
        downsampling=4,
        latent_channels=4,
        patch=request.param,
        block_channels=(8, 8, 16) if request.param == 1 else (8, 16),
        layers_per_block=1,
        norm_groups=4,
    )
    autoencoder = PictureAutoencoder.from_settings(settings).eval()
    assert (autoencoder.patch, autoencoder.downsampling) == (request.param, 4)
    return autoencoder


def test_latents_are_normalised_per_kind_and_channel(autoencoder, tmp_path):
    torch.manual_seed(1)
    pictures = {
        "face": torch.rand(32, 3, 16, 16) * 2 - 1,
        "landmark": (torch.rand(32, 3, 16, 16) > 0.9).float() * 2 - 1,
        "scene": torch.rand(32, 3, 16, 16) * 0.1,
    }
    autoencoder.fit_statistics({kind: iter(batch.split(8)) for kind, batch in pictures.items()})
    with torch.no_grad():
        for kind, batch in pictures.items():
            latents = autoencoder.encode(batch.unsqueeze(2), kind)
            assert latents.shape == (32, 4, 1, 4, 4)
            torch.testing.assert_close(latents.mean(dim=(0, 2, 3, 4)), torch.zeros(4), atol=1e-4, rtol=0)
            torch.testing.assert_close(latents.std(dim=(0, 2, 3, 4), correction=0), torch.ones(4), atol=1e-3, rtol=0)
        face = autoencoder.encode(pictures["face"].unsqueeze(2), "face")
        raw = autoencoder.posterior(pictures["face"]).mean
        torch.testing.assert_close(
            autoencoder.decode(face, "face")[:, :, 0], autoencoder.reconstruct(raw), atol=1e-4, rtol=0
        )
        autoencoder.save(tmp_path)
        loaded = PictureAutoencoder.load(tmp_path).eval()
        assert torch.equal(loaded.encode(pictures["face"].unsqueeze(2), "face"), face)


PAPER_SHAPE = AutoencoderSettings(
    downsampling=8,
    latent_channels=4,
    block_channels=(8, 8, 8, 16),
    layers_per_block=1,
    norm_groups=4,
)


def with_decoder(folded, settings=PAPER_SHAPE):
    return settings.model_copy(update={"decoder_folded_levels": folded})


@pytest.mark.parametrize("folded", [0, 1, 3])
def test_light_decoder_restores_whole_pictures_and_survives_its_folder(folded, tmp_path):
    torch.manual_seed(0)
    autoencoder = PictureAutoencoder.from_settings(with_decoder(folded)).eval()
    assert autoencoder.downsampling == 8
    assert len(autoencoder.vae.decoder.up_blocks) == 4 - folded
    pictures = torch.rand(2, 3, 16, 24) * 2 - 1
    raw = autoencoder.posterior(pictures).mean
    restored = autoencoder.reconstruct(raw)
    assert raw.shape == (2, 4, 2, 3)
    assert restored.shape == pictures.shape
    restored.sum().backward()
    without = [name for name, p in autoencoder.vae.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []

    autoencoder.save(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored.get("decoder_folded_levels", "not stored") == (folded or "not stored")
    loaded = PictureAutoencoder.load(tmp_path)
    assert loaded.decoder_folded_levels == folded
    assert torch.equal(loaded.reconstruct(raw), restored)


def test_light_decoder_of_an_existing_autoencoder_keeps_encoder_and_shared_levels():
    torch.manual_seed(0)
    full = PictureAutoencoder.from_settings(PAPER_SHAPE).eval()
    full.mean.normal_()
    full.std.uniform_(1, 2)
    light = full.with_folded_decoder(2).eval()
    pictures = torch.rand(2, 3, 1, 16, 16) * 2 - 1
    for kind in ("face", "landmark", "scene"):
        assert torch.equal(light.encode(pictures, kind), full.encode(pictures, kind))
    before, after = full.vae.state_dict(), light.vae.state_dict()
    new = {name for name in after if name not in before or not torch.equal(before[name], after[name])}
    assert {".".join(name.split(".")[:2]) for name in new} == {"decoder.conv_out", "decoder.pixels"}
    assert {name.split(".")[2] for name in after if name.startswith("decoder.up_blocks")} == {"0", "1"}
    again = light.with_folded_decoder(0)
    assert again.vae.state_dict().keys() == before.keys()


def test_light_decoder_of_the_paper_is_several_times_cheaper():
    def flops(folded):
        with torch.device("meta"):
            autoencoder = PictureAutoencoder.from_settings(with_decoder(folded, paper().autoencoder))
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                assert autoencoder.reconstruct(torch.empty(1, 16, 16, 16)).shape == (1, 3, 256, 256)
        return counter.get_total_flops()

    full, one, two = (flops(folded) for folded in range(3))
    assert full > 2 * one
    assert full > 3 * two


def test_impossible_numbers_of_folded_levels_are_refused(tmp_path):
    PictureAutoencoder.from_settings(with_decoder(1)).save(tmp_path)
    config = tmp_path / "config.json"
    for value in ("4", "-1", '"two"'):
        config.write_text(config.read_text().replace('"decoder_folded_levels": 1', f'"decoder_folded_levels": {value}'))
        with pytest.raises(TccpError, match=r"decoder_folded_levels|TypeError") as refusal:
            PictureAutoencoder.load(tmp_path)
        assert "\n" not in str(refusal.value)
        config.write_text(config.read_text().replace(f'"decoder_folded_levels": {value}', '"decoder_folded_levels": 1'))
    with pytest.raises(ValueError, match="4 levels"):
        PictureAutoencoder.load(tmp_path).with_folded_decoder(4)


def test_packaged_autoencoder_has_a_full_decoder_and_its_own_files(tmp_path):
    packaged = TOY_WEIGHTS / "autoencoder"
    autoencoder = PictureAutoencoder.load(packaged)
    assert autoencoder.decoder_folded_levels == 0
    autoencoder.save(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == {
        key: value
        for key, value in json.loads((packaged / "config.json").read_text()).items()
        if key in autoencoder.vae.config or key == "_class_name"
    }


def test_folder_without_an_autoencoder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not a diffusers AutoencoderKL folder"):
        PictureAutoencoder.load(tmp_path)


def test_lip_source_none_removes_the_lip_condition():
    settings = load_settings("toy", ["lips.source=none"])
    assert MVControlNet.from_settings(settings, "face_first").config.condition_kinds == ("identity",)


@pytest.mark.parametrize("name", [name for name in VARIANTS if VARIANTS[name].continues])
def test_sequence_network_starts_from_its_first_frame_network(name):
    settings = tiny(**{"network.pooled_conditions": True})
    torch.manual_seed(0)
    first = MVControlNet.from_settings(settings.for_variant(FIRST_OF[name]), FIRST_OF[name])
    model = MVControlNet.from_settings(settings.for_variant(name), name)
    model.start_from_first(first)
    mine, theirs = model.state_dict(), first.state_dict()
    assert {key for key in theirs if key not in mine} == {
        key for key in theirs if ".identity" in key and "identity" not in VARIANTS[name].conditions
    }
    differ = {key for key in mine if mine[key].shape != theirs[key].shape}
    assert all(torch.equal(mine[key], theirs[key]) for key in mine if key not in differ)
    dim = settings.network.condition_dim
    for branch in ("video", "control"):
        pooled, own = (state[f"{branch}.encoder.time.pooled.0.weight"] for state in (mine, theirs))
        for place, kind in enumerate(model.config.condition_kinds):
            there = first.config.condition_kinds.index(kind)
            assert torch.equal(pooled[:, place * dim :][:, :dim], own[:, there * dim :][:, :dim])
        wide, narrow = (state[f"{branch}.encoder.conv_in.weight"] for state in (mine, theirs))
        assert torch.equal(wide[:, : narrow.shape[1]], narrow)
        assert not wide[:, narrow.shape[1] :].any()


def test_first_frame_network_of_another_size_is_refused():
    first = MVControlNet.from_settings(tiny(**{"network.condition_dim": 24}), "face_first")
    with pytest.raises(ValueError, match="the first-frame network has another shape"):
        MVControlNet.from_settings(tiny(), "face_sequence").start_from_first(first)
