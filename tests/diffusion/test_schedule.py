"""Forward process and loss against diffusers' schedulers and first principles."""

import pytest
import torch
from diffusers import DDPMScheduler
from tiny_networks import inputs, tiny

from tccp.config import DiffusionSettings
from tccp.diffusion.schedule import NoiseSchedule, window_loss
from tccp.models.mvcontrolnet import MVControlNet
from tccp.models.variants import VARIANTS


@pytest.mark.parametrize(("prediction", "zero_terminal_snr"), [("epsilon", False), ("v", False), ("v", True)])
def test_schedule_equals_diffusers(prediction, zero_terminal_snr):
    ours = NoiseSchedule.from_settings(DiffusionSettings(prediction=prediction, zero_terminal_snr=zero_terminal_snr))
    theirs = DDPMScheduler(
        beta_start=1e-4, beta_end=0.02, beta_schedule="linear", rescale_betas_zero_snr=zero_terminal_snr
    )
    torch.testing.assert_close(ours.alphas_cumprod.float(), theirs.alphas_cumprod, rtol=1e-4, atol=1e-7)
    latents, noise, t = torch.randn(3, 2, 4, 5, 5), torch.randn(3, 2, 4, 5, 5), torch.tensor([0, 400, 999])
    times = t[:, None].expand(-1, 4)
    torch.testing.assert_close(
        ours.add_noise(latents, noise, times), theirs.add_noise(latents, noise, t), rtol=1e-3, atol=1e-5
    )
    if prediction == "v":
        torch.testing.assert_close(
            ours.target(latents, noise, times), theirs.get_velocity(latents, noise, t), rtol=1e-3, atol=1e-5
        )
    else:
        assert torch.equal(ours.target(latents, noise, times), noise)


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_perfect_prediction_recovers_latents_and_noise(prediction):
    schedule = NoiseSchedule.from_settings(DiffusionSettings(prediction=prediction))
    latents, noise = torch.randn(3, 2, 4, 5, 5), torch.randn(3, 2, 4, 5, 5)
    times = torch.tensor([0, 400, 700])[:, None].expand(-1, 4)
    noisy, predicted = schedule.add_noise(latents, noise, times), schedule.target(latents, noise, times)
    torch.testing.assert_close(schedule.clean(noisy, predicted, times), latents, rtol=0, atol=1e-4)
    torch.testing.assert_close(schedule.noise(noisy, predicted, times), noise, rtol=0, atol=1e-4)


def test_zero_terminal_snr_leaves_no_signal():
    schedule = NoiseSchedule.from_settings(DiffusionSettings(prediction="v", zero_terminal_snr=True))
    assert schedule.alphas_cumprod[-1] == 0


def test_epsilon_with_zero_terminal_snr_is_refused():
    with pytest.raises(ValueError, match="zero_terminal_snr needs prediction=v"):
        DiffusionSettings(zero_terminal_snr=True)


@pytest.mark.parametrize("first_frame_channels", [False, True])
def test_loss_does_not_depend_on_the_output_for_the_first_frame(first_frame_channels):
    """Eq. 8: the first frame is given, so the network's output for it does not count."""
    settings = tiny(variant_overrides={"face_sequence": {"network.first_frame_channels": first_frame_channels}})
    model = MVControlNet.from_settings(settings, "face_sequence").eval()
    schedule = NoiseSchedule.from_settings(settings.diffusion)
    latents, _, conditions, control = inputs(settings, VARIANTS["face_sequence"])
    noise, t, initial = torch.randn_like(latents), torch.tensor([10, 700]), torch.randn_like(latents[:, :, 0])
    seen = {}

    def first_frame_changed(module, args, output):
        seen["noisy"], seen["t"] = args[0], args[1]
        changed = output.clone()
        changed[:, :, 0] += 100
        return changed

    with torch.no_grad():
        plain = window_loss(model, schedule, latents, noise, t, conditions, control, initial)
        handle = model.register_forward_hook(first_frame_changed)
        changed = window_loss(model, schedule, latents, noise, t, conditions, control, initial)
        handle.remove()
    assert torch.equal(plain, changed)
    assert plain.shape == (2,)
    assert torch.equal(seen["noisy"][:, :, 0], initial)
    assert seen["t"].tolist() == [[0, 10, 10, 10], [0, 700, 700, 700]]


def test_loss_leaves_out_what_has_no_weight():
    """Equal to the plain mean over the latents of weight 1, whatever the others are; 0 if there are none."""
    settings = tiny()
    model = MVControlNet.from_settings(settings, "face_sequence").eval()
    schedule = NoiseSchedule.from_settings(settings.diffusion)
    latents, _, conditions, control = inputs(settings, VARIANTS["face_sequence"])
    noise, t, initial = torch.randn_like(latents), torch.tensor([10, 700]), torch.randn_like(latents[:, :, 0])
    weight = torch.ones(2, *latents.shape[2:])
    weight[0, 2] = 0
    weight[0, 3, :, :2] = 0
    weight[1] = 0
    shape = latents[:, :, 1:].shape
    seen = {}

    def hook(module, args, output):
        seen["error"] = (output - schedule.target(latents, noise, t[:, None].expand(-1, latents.shape[2]))) ** 2

    handle = model.register_forward_hook(hook)
    with torch.no_grad():
        found = window_loss(model, schedule, latents, noise, t, conditions, control, initial, weight)
        plain = window_loss(model, schedule, latents, noise, t, conditions, control, initial)
        ones = window_loss(model, schedule, latents, noise, t, conditions, control, initial, torch.ones_like(weight))
    handle.remove()
    counted = (weight[:, None].expand(latents.shape) == 1)[:, :, 1:].expand(shape)
    torch.testing.assert_close(found[0], seen["error"][:, :, 1:][0][counted[0]].mean())
    assert found[1] == 0
    torch.testing.assert_close(ones, plain)


def test_loss_counts_every_frame_without_an_initial_frame():
    settings = tiny()
    model = MVControlNet.from_settings(settings, "landmark_first").eval()
    schedule = NoiseSchedule.from_settings(settings.diffusion)
    latents, _, conditions, control = inputs(settings, VARIANTS["landmark_first"])
    noise, t = torch.randn_like(latents), torch.tensor([10, 700])
    with torch.no_grad():
        loss = window_loss(model, schedule, latents, noise, t, conditions, control)
        times = t[:, None]
        predicted = model(schedule.add_noise(latents, noise, times), times, conditions, control)
    torch.testing.assert_close(
        loss, (predicted - schedule.target(latents, noise, times)).square().mean(dim=(1, 2, 3, 4))
    )
