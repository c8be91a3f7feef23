"""Training of tiny networks on RoundTable: resuming, gradient accumulation, and overfitting of every variant."""

import dataclasses
import json

import pytest
import torch
from tiny_networks import WITH_DENOISED, small

from tccp import headbox
from tccp.clips.clip_table import ClipTable
from tccp.clips.order import PlannedWindow, WindowId
from tccp.clips.windows import mirrored, view
from tccp.config import override
from tccp.diffusion.batching import run_windows
from tccp.diffusion.sampling import start_window
from tccp.errors import TccpError
from tccp.inference.conditioning import picture_of
from tccp.models.autoencoder import STATISTICS_FILE, PictureAutoencoder, to_model
from tccp.models.mvcontrolnet import MVControlNet
from tccp.models.variants import PICTURE_KINDS, VARIANTS
from tccp.seeds import rng_seed
from tccp.training import precision as precision_module
from tccp.training.averaged_weights import AveragedWeights
from tccp.training.engine import TorchEngine, learning_rate_factor
from tccp.training.fit_autoencoder import (
    fit_latent_statistics,
    pretrained_autoencoder,
    train_autoencoder,
    with_new_decoder,
)
from tccp.training.fit_variant import VariantLoss, _NoisePrefetch, sample_noise, train_variant
from tccp.training.latent_cache import LatentCache
from tccp.training.lip_folds import open_lip_sources, train_liplets
from tccp.training.loop import NonFiniteLoss, fit
from tccp.training.run_folder import RunFolder
from tccp.training.window_files import TablePictures


@pytest.fixture(scope="module")
def data(training_data):
    """Clip table of four RoundTable films of one second."""
    clips, _ = training_data
    return clips


@pytest.fixture(scope="module")
def cache(data, tmp_path_factory):
    """Latents and lips of those clips, from untrained networks."""
    settings, root = small(), tmp_path_factory.mktemp("storage")
    table = ClipTable(data)
    torch.manual_seed(0)
    autoencoder = PictureAutoencoder.from_settings(settings.autoencoder).eval()
    fit_latent_statistics(autoencoder, table, settings)
    lips = open_lip_sources(settings.lips, train_liplets(table, settings, root / "liplets", seed=0))
    cache = LatentCache(root, table, settings, autoencoder, lips)
    cache.build()
    return cache


def with_settings(cache, settings):
    """The same cache with other training settings."""
    other = LatentCache.__new__(LatentCache)
    other.__dict__.update(cache.__dict__ | {"settings": settings})
    return other


def weights_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize(
    ("accumulation", "changes"), [(1, {}), (2, {}), (1, {"training.precision": "bf16"}), (1, WITH_DENOISED)]
)
def test_resumed_training_is_the_same_run_bit_for_bit(cache, tmp_path, accumulation, changes):
    settings = small(
        **{
            "training.max_steps": 6,
            "training.checkpoint_every": 2,
            "training.accumulation": accumulation,
            "training.condition_dropout": 0.3,
            "network.dropout": 0.2,
            **changes,
        }
    )
    here = with_settings(cache, settings)
    torch.manual_seed(9)
    network = MVControlNet.from_settings(settings, "landmark_first")

    def trained(run, **options):
        return train_variant("landmark_sequence", settings, here, run, first=network, **options)

    whole_run = RunFolder.open(tmp_path / "whole", settings, "landmark_sequence", resume=False)
    whole, whole_result = trained(whole_run)

    cut_run = RunFolder.open(tmp_path / "cut", settings, "landmark_sequence", resume=False)
    _, before = trained(cut_run, stop_at=3)
    # The next call resumes from the checkpoint at step 3, whatever the random state of its process.
    torch.manual_seed(123)
    resumed_run = RunFolder.open(tmp_path / "cut", settings, "landmark_sequence", resume=True)
    resumed, after = trained(resumed_run)

    assert before.losses + after.losses == whole_result.losses
    assert after.seconds > before.seconds > 0  # of all calls together
    assert len(set(whole_result.losses)) == 6
    for (name, a), b in zip(weights_of(whole).items(), weights_of(resumed).values(), strict=True):
        assert torch.equal(a, b), name

    def logged(run):
        records = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
        return [{k: record[k] for k in ("step", "loss", "grad_norm", "learning_rate")} for record in records]

    assert logged(whole_run) == logged(resumed_run)


def test_bf16_arithmetic_gives_nearly_the_same_loss_and_gradients(cache, monkeypatch):
    monkeypatch.setattr(precision_module, "has_bf16", lambda device_type: True)  # emulated if the CPU has no bf16

    def measured(precision):
        settings = small(**{"training.precision": precision})
        torch.manual_seed(0)
        model = MVControlNet.from_settings(settings, "face_sequence")
        for zero in (model.control.zero_in, *model.control.zero_out):
            torch.nn.init.normal_(zero.weight, std=0.1)
        loss = VariantLoss(model, "face_sequence", settings, with_settings(cache, settings))(0, 0)
        loss.backward()
        return loss, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    (full, full_gradient), (reduced, reduced_gradient) = measured("fp32"), measured("bf16")
    assert full_gradient.dtype == reduced_gradient.dtype == torch.float32
    assert not torch.equal(full, reduced)
    assert abs(full - reduced) < 0.02 * full
    assert torch.cosine_similarity(full_gradient, reduced_gradient, dim=0) > 0.99


def test_bf16_is_not_emulated_on_cpus_without_it(cache, monkeypatch):
    def loss(precision):
        settings = small(**{"training.precision": precision})
        torch.manual_seed(0)
        model = MVControlNet.from_settings(settings, "landmark_first")
        return VariantLoss(model, "landmark_first", settings, with_settings(cache, settings))(0, 0)

    monkeypatch.setattr(precision_module, "has_bf16", lambda device_type: False)
    assert torch.equal(loss("bf16"), loss("fp32"))


def test_networks_get_no_scene_with_context_none_and_their_control_otherwise(cache):
    planned = [PlannedWindow(0, WindowId(cache.table.ids[0], 0))]
    blind = with_settings(cache, small(context="none"))
    for name, row in VARIANTS.items():
        with_scene, without = (which.batch(planned, row, 4) for which in (cache, blind))
        assert with_scene.control.any()
        assert torch.equal(with_scene.latents, without.latents)
        channels = cache.autoencoder.latent_channels
        assert without.control[:, :channels].any() == (row.control != "scene"), name
        assert with_scene.control.shape[1] == channels * (2 if row.generates == "face" else 1)
        assert not without.control[:, channels:].any(), name


def test_timestep_shift_trains_more_on_noisy_times(cache):
    planned = [PlannedWindow(epoch, WindowId(cache.table.ids[0], 0)) for epoch in range(400)]
    plain, shifted = (
        sample_noise(planned, (1, 1, 1, 1), small(**{"training.timestep_shift": shift}), 1000).t.double()
        for shift in (1, 3)
    )
    assert abs(plain.mean() - 500) < 45
    assert torch.equal(shifted, (3000 * (u := (plain + 0.5) / 1000) / (1 + 2 * u)).floor())
    assert 0 <= shifted.min() < shifted.max() <= 999


def test_latents_encoded_in_parts_equal_latents_encoded_at_once(cache, tmp_path):
    parts = LatentCache(tmp_path, cache.table, cache.settings, cache.autoencoder, cache.lips.sources)
    parts.build(1, 2)
    assert 0 < len(parts.folder.names()) < len(cache.folder.names())
    parts.build(0, 2)
    for name in cache.folder.names():
        assert parts.folder.read(name) == cache.folder.read(name)
    for name in map(cache.lips.name, cache.table.ids):
        assert parts.lips.folder.read(name) == cache.lips.folder.read(name)


def test_only_files_that_a_variant_reads_are_encoded(cache, tmp_path):
    landmarks = LatentCache(tmp_path, cache.table, small(), cache.autoencoder, None, ["landmark_first"])
    landmarks.build()
    first = {name.split(".")[1] for name in landmarks.folder.names()}
    assert first == {"inputs", "scene", "landmark"}
    for name in ("landmark_first", "landmark_sequence"):
        a, b = (
            c.batch([PlannedWindow(0, WindowId(cache.table.ids[0], 1))], VARIANTS[name], 3) for c in (landmarks, cache)
        )
        assert torch.equal(a.latents, b.latents)
        assert torch.equal(a.control, b.control)
    LatentCache(tmp_path, cache.table, small(), cache.autoencoder, None, ["face_first"]).build()
    assert {name.split(".")[1] for name in landmarks.folder.names()} == first | {"face"} | (
        {"surround"} if small().surround else set()
    )


def test_the_newest_complete_checkpoints_are_kept(cache, tmp_path):
    settings = small(**{"training.max_steps": 5, "training.checkpoint_every": 1})
    run = RunFolder.open(tmp_path / "run", settings, "landmark_first", resume=False)
    train_variant("landmark_first", settings, with_settings(cache, settings), run)
    names = sorted(path.name for path in (run.path / "checkpoints").iterdir())
    assert names == ["step-0000004", "step-0000005"]
    assert run.latest() == 5


def test_accumulated_gradients_equal_the_whole_batch(cache):
    def gradients(accumulation):
        settings = small(**{"training.accumulation": accumulation})
        torch.manual_seed(0)
        model = MVControlNet.from_settings(settings, "face_sequence")
        engine = TorchEngine(model, settings.training)
        losses = VariantLoss(model, "face_sequence", settings, with_settings(cache, settings))
        for micro in range(accumulation):
            engine.backward(losses(0, micro))
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    whole, parts = gradients(1), gradients(4)
    assert whole.keys() == parts.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-4, atol=1e-7)
    assert sum(float(g.abs().sum()) for g in whole.values()) > 0


def test_random_numbers_of_a_window_depend_on_seed_id_and_epoch_only(cache):
    settings = small()
    a, b = WindowId(cache.table.ids[0], 3), WindowId(cache.table.ids[1], 0)
    shape = (4, 4, 4, 4)
    together = sample_noise([PlannedWindow(0, a), PlannedWindow(0, b)], shape, settings, 1000)
    alone = sample_noise([PlannedWindow(0, b)], shape, settings, 1000)
    later = sample_noise([PlannedWindow(1, b)], shape, settings, 1000)
    assert torch.equal(together.noise[1], alone.noise[0])
    assert together.t[1] == alone.t[0]
    assert not torch.equal(alone.noise, later.noise)


def test_times_and_dropout_follow_the_settings(cache):
    settings = small(**{"training.condition_dropout": 0.25})
    planned = [PlannedWindow(e, WindowId(cache.table.ids[0], 0)) for e in range(2000)]
    sampled = sample_noise(planned, (1, 1, 1, 1), settings, 1000)
    assert 0.2 < float(sampled.dropped.float().mean()) < 0.3
    assert 450 < float(sampled.t.float().mean()) < 550
    assert (int(sampled.t.min()) < 10, int(sampled.t.max()) > 990) == (True, True)
    assert abs(float(sampled.noise.mean())) < 0.1


OVERFIT = [pytest.param(name, marks=() if name == "face_sequence" else pytest.mark.soak) for name in VARIANTS]
"""The default suite covers the variant with most inputs."""


@pytest.mark.slow
@pytest.mark.parametrize("name", OVERFIT)
def test_overfit(cache, name):
    """Each variant's loss on four windows, at fixed noise and times, falls below 5% of its initial value."""
    single = not VARIANTS[name].continues
    settings = small(
        **{
            "network.base_channels": 32,
            "network.blocks_per_scale": 1,
            "network.condition_dim": 32,
            "network.time_embedding_dim": 64,
            "headbox.draws": 1,
            "training.max_steps": 300,
            "training.batch_size": 32 if single else 8,
            "training.learning_rate": 4e-3,
            "training.warmup_steps": 20,
            "training.condition_dropout": 0.0,
            "training.initial_frame_noise": 0.0,
            "training.ema_decay": 0.98,
        }
    )
    here = with_settings(cache, settings)
    four = [WindowId(clip_id, 5) for clip_id in cache.table.ids]

    copies = settings.training.batch_size // len(four)
    row = VARIANTS[name]
    batch = here.batch([PlannedWindow(0, w) for _ in range(copies) for w in four], row, row.num_frames(settings.window))

    class FourWindows(VariantLoss):
        def __call__(self, step, micro):
            planned = [PlannedWindow(copies * step + copy, window) for copy in range(copies) for window in four]
            return self.loss(planned, batch).mean()  # the same pictures, new noise and times

    torch.manual_seed(0)
    model = MVControlNet.from_settings(settings, name)
    losses = FourWindows(model, name, settings, here)

    def measured():
        model.eval()
        with torch.no_grad():
            value = torch.stack([losses(step, 0) for step in range(10_000, 10_008)]).mean()
        model.train()
        return float(value)

    before = measured()
    ema = AveragedWeights(model.parameters(), decay=settings.training.ema_decay)
    fit(TorchEngine(model, settings.training), losses, settings.training, seed=0, ema=ema)
    with torch.no_grad():
        for parameter, average in zip(model.parameters(), ema.weights, strict=True):
            parameter.copy_(average)
    after = measured()
    print(f"{name}: {before:.4f} -> {after:.4f} ({after / before:.1%})")
    assert after < 0.05 * before


def test_prefetched_noise_equals_noise_sampled_directly():
    settings, shape = small(), (4, 4, 4, 4)
    planned = [
        [PlannedWindow(epoch, WindowId("a", epoch)), PlannedWindow(epoch, WindowId("b", 0))] for epoch in range(3)
    ]
    prefetch = _NoisePrefetch(settings, 1000)
    # The third call asks for other windows than were prefetched.
    for k, following in ((0, planned[1]), (1, planned[2]), (0, planned[1]), (2, ())):
        prefetched, plain = prefetch.get(planned[k], shape, following), sample_noise(planned[k], shape, settings, 1000)
        assert all(torch.equal(getattr(prefetched, name), getattr(plain, name)) for name in vars(plain))
        assert (prefetch.next is None) == (not following)


def test_frozen_video_branch_is_not_trained(cache):
    settings = small(**{"training.max_steps": 3, "training.freeze_video_branch": True})
    torch.manual_seed(1)
    source = MVControlNet.from_settings(settings, "landmark_first").eval()
    model, _ = train_variant("landmark_first", settings, with_settings(cache, settings), None, start_from=source)
    before, after = source.state_dict(), model.state_dict()
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"control"}


def sixteen_windows(cache, mode):
    """face_sequence with an untrained face_first, and sixteen windows whose initial frames are made in mode `mode`."""
    settings = small(
        **{
            "training.initial_frames": mode,
            "training.initial_frame_noise": 0.0,
            "sampling.steps": 2,
            "variant_overrides.face_first": {"sampling.temperature": 0.5},
        }
    )
    here = with_settings(cache, settings)
    torch.manual_seed(0)
    first = MVControlNet.from_settings(settings, "face_first")
    losses = VariantLoss(MVControlNet.from_settings(settings, "face_sequence"), "face_sequence", settings, here, first)
    planned = [PlannedWindow(epoch, WindowId(c, 2)) for epoch in range(4) for c in cache.table.ids]
    batch = here.batch(planned, VARIANTS["face_sequence"], settings.window)
    return losses, planned, batch, sample_noise(planned, tuple(batch.latents.shape[1:]), settings, 1000)


@pytest.mark.parametrize("mode", ["generated", "mix", "denoised"])
def test_initial_frames_can_be_generated(cache, mode):
    losses, planned, batch, sampled = sixteen_windows(cache, mode)
    initial = losses._initial(batch, sampled, planned)
    again = losses._initial(batch, sampled, planned)
    true = [torch.equal(a, b) for a, b in zip(initial, batch.latents[:, :, 0], strict=True)]
    assert torch.equal(initial, again)
    assert true == ([False] * 16 if mode == "generated" else (~sampled.generated).tolist())
    assert mode == "generated" or 0 < sum(true) < 16
    assert torch.isfinite(initial).all()


def test_a_generated_initial_frame_equals_sampling_the_first_network_directly(cache):
    losses, planned, batch, sampled = sixteen_windows(cache, "generated")
    frame = cache.batch(planned[:1], VARIANTS["face_first"], 1)
    sampling = losses.settings.sampling.model_copy(update={"temperature": 0.5})
    epoch, (clip_id, start) = planned[0]
    seed = rng_seed(losses.settings.seed, "initial", clip_id, start, epoch)
    state = start_window(losses.schedule, sampling, frame.conditions, frame.control[0], None, seed, 4)
    (alone,) = run_windows(losses.first, losses.schedule, [state])
    torch.testing.assert_close(losses._initial(batch, sampled, planned)[0], alone[:, 0], rtol=1e-4, atol=1e-4)


def test_a_denoised_initial_frame_is_true_without_noise_and_independent_of_the_truth_at_full_noise(cache):
    losses, planned, batch, sampled = sixteen_windows(cache, "denoised")
    truth, restored = batch.latents[:, :, 0], sampled.generated
    assert 0 < int(sampled.initial_t.min()) < 300 < 700 < int(sampled.initial_t.max()) < 1000
    other = dataclasses.replace(batch, latents=batch.latents.flip(0))
    distances = []
    for t in (0, 500, 999):
        at_t = dataclasses.replace(sampled, initial_t=torch.full_like(sampled.initial_t, t))
        initial = losses._initial(batch, at_t, planned)
        assert torch.equal(initial[~restored], truth[~restored])
        distances.append(float((initial - truth)[restored].abs().mean()))
    assert distances[0] < 0.02 < distances[0] * 5 < distances[1] < distances[2]
    torch.testing.assert_close(initial[restored], losses._initial(other, at_t, planned)[restored], rtol=0, atol=1e-6)


def test_a_sequence_network_starts_with_the_outputs_of_its_first_network(cache):
    settings = small(
        **{"training.start_from_first": True, "network.first_frame_channels": True, "training.max_steps": 1}
    )
    still = override(settings, {"training.learning_rate": 1e-12, "training.warmup_steps": 0})
    torch.manual_seed(0)
    first = MVControlNet.from_settings(settings, "face_first").eval()
    model, _ = train_variant("face_sequence", still, with_settings(cache, still), None, first=first)
    batch = cache.batch([PlannedWindow(0, WindowId(c, 2)) for c in cache.table.ids], VARIANTS["face_first"], 1)
    inputs = batch.latents, torch.full((4, 1), 500), batch.conditions, batch.control
    with torch.no_grad():
        torch.testing.assert_close(model(*inputs), first(*inputs), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="start_from_first needs a trained face_first"):
        train_variant("face_sequence", still, with_settings(cache, still), None)


def test_generated_initial_frames_need_the_first_network(cache):
    settings = small(**{"training.initial_frames": "generated"})
    losses = VariantLoss(
        MVControlNet.from_settings(settings, "face_sequence"), "face_sequence", settings, with_settings(cache, settings)
    )
    with pytest.raises(ValueError, match="needs a trained face_first"):
        losses(0, 0)


def test_a_loss_that_is_not_finite_stops_training_and_names_its_windows(cache, tmp_path):
    settings = small(**{"training.max_steps": 9, "training.checkpoint_every": 2})
    here = with_settings(cache, settings)
    model = MVControlNet.from_settings(settings, "landmark_first")
    losses = VariantLoss(model, "landmark_first", settings, here)
    run = RunFolder.open(tmp_path / "run", settings, "landmark_first", resume=False)

    def broken(step, micro):
        return losses(step, micro) * (float("nan") if step == 5 else 1.0)

    with pytest.raises(NonFiniteLoss, match="at step 5") as caught:
        fit(
            TorchEngine(model, settings.training),
            broken,
            settings.training,
            seed=0,
            ema=AveragedWeights(model.parameters(), 0.9999),
            run=run,
            describe_step=losses.describe_step,
        )
    assert run.latest() == 4
    assert losses.describe_step(5)[0] in str(caught.value)
    assert "checkpoint at step 4 is kept" in str(caught.value)


def test_a_gradient_that_is_not_finite_stops_before_the_update(cache):
    settings = small(**{"training.max_steps": 3})
    model = MVControlNet.from_settings(settings, "landmark_first")
    losses = VariantLoss(model, "landmark_first", settings, with_settings(cache, settings))
    engine = TorchEngine(model, settings.training)

    def broken(step, micro):
        weight = next(model.parameters())
        return losses(step, micro) + ((0 * weight).sqrt().sum() if step == 1 else 0)  # finite loss, infinite gradient

    with pytest.raises(NonFiniteLoss, match="gradient's norm is nan at step 1"):
        fit(engine, broken, settings.training, seed=0, ema=AveragedWeights(model.parameters(), 0.9999))
    assert all(torch.isfinite(weight).all() for weight in model.parameters())


def test_a_run_is_resumed_only_on_request_and_with_the_same_settings(tmp_path):
    settings = small()
    RunFolder.open(tmp_path / "run", settings, "landmark_first", resume=False)
    RunFolder.open(tmp_path / "run", settings, "landmark_first", resume=True)
    with pytest.raises(TccpError, match="--resume"):
        RunFolder.open(tmp_path / "run", settings, "landmark_first", resume=False)
    with pytest.raises(TccpError, match=r"other settings .*: seed was 0 and is 1 now"):
        RunFolder.open(tmp_path / "run", small(seed=1), "landmark_first", resume=True)
    own = {"variant_overrides.landmark_first": {"training.max_steps": 7}}
    with pytest.raises(TccpError, match=r"other settings .*: training\.max_steps was \d+ and is 7 now"):
        RunFolder.open(tmp_path / "run", small(**own), "landmark_first", resume=True)
    others = {"variant_overrides.face_first": {"training.max_steps": 7}, "sampling.temperature": 0.1}
    RunFolder.open(tmp_path / "run", small(**others), "landmark_first", resume=True)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert set(record) == {"git_commit", "command"}


def test_learning_rate_warms_up_and_falls_to_zero():
    settings = small(**{"training.max_steps": 100, "training.warmup_steps": 10}).training
    factor = learning_rate_factor(settings)
    values = [factor(k) for k in range(100)]
    assert values[0] == pytest.approx(0.1)
    assert max(values) == 1.0
    assert values[9:] == sorted(values[9:], reverse=True)
    assert values[-1] == pytest.approx(1 / 90)


@pytest.mark.parametrize("name", ["landmark_sequence", "face_sequence"])
def test_a_window_from_the_cache_equals_its_encoded_pictures(cache, name):
    """Latents of every kind, mel, identity and lips, frame for frame."""
    row, settings = VARIANTS[name], cache.settings
    window = PlannedWindow(3, WindowId(cache.table.ids[1], 7))
    batch = cache.batch([window], row, settings.window)
    clip = cache.table[window.id.clip_id]
    fits = []
    for jitter in range(settings.headbox.draws):
        window_view = view(clip, settings, jitter, settings.seed, 7, settings.window)
        pictures = {kind: picture_of(kind, vars(window_view)) for kind in PICTURE_KINDS}
        pictures["surround"] = headbox.surround(window_view.masked_scene, window_view.mask_box)
        latents = {}
        for kind, frames in pictures.items():
            inputs = to_model(torch.from_numpy(frames)).transpose(0, 1)[None]
            with torch.no_grad():
                latents[kind] = cache.autoencoder.encode(inputs, "scene" if kind == "surround" else kind)
        control = [latents[row.control]] + ([latents["surround"]] if row.generates == "face" else [])
        expected = (latents[row.generates], torch.cat(control, dim=1))
        found = (batch.latents, batch.control)
        fits.append(all(torch.allclose(a, b, atol=5e-3) for a, b in zip(expected, found, strict=True)))
        if fits[-1] and batch.conditions.audio is not None:
            assert torch.equal(batch.conditions.audio[0], torch.from_numpy(window_view.mel))
        if fits[-1] and batch.conditions.identity is not None:
            assert torch.equal(batch.conditions.identity[0], to_model(torch.from_numpy(window_view.identity)))
    assert fits.count(True) == 1
    if batch.conditions.lips is not None:
        assert cache.lips is not None
        lips = cache.lips.read(window.id.clip_id, 7, settings.window)
        if mirrored(settings, fits.index(True)):
            lips = lips[..., ::-1, :].copy()
        assert torch.equal(batch.conditions.lips[0], to_model(torch.from_numpy(lips)))


def test_every_jittered_view_has_its_own_latents(cache):
    clip_id = cache.table.ids[0]
    settings = cache.settings
    starts = [PlannedWindow(epoch, WindowId(clip_id, 0)) for epoch in range(8)]
    batch = cache.batch(starts, VARIANTS["landmark_first"], 1)
    distinct = {tuple(window.flatten()[:8].tolist()) for window in batch.control}
    assert len(distinct) == settings.headbox.draws


def test_autoencoder_learns_and_resumes(data, tmp_path):
    settings = small(**{"autoencoder.max_steps": 12, "training.checkpoint_every": 5})
    table = ClipTable(data)
    run = RunFolder.open(tmp_path / "whole", settings, "autoencoder", resume=False)
    whole, result = train_autoencoder(settings, table, run)
    cut = RunFolder.open(tmp_path / "cut", settings, "autoencoder", resume=False)
    train_autoencoder(settings, table, cut, stop_at=7)
    resumed, _ = train_autoencoder(
        settings, table, RunFolder.open(tmp_path / "cut", settings, "autoencoder", resume=True)
    )
    assert sum(result.losses[-3:]) < sum(result.losses[:3])
    for (name, a), b in zip(weights_of(whole).items(), weights_of(resumed).values(), strict=True):
        assert torch.equal(a, b), name


def test_only_the_statistics_of_a_pretrained_autoencoder_change(data, tmp_path):
    settings = small()
    torch.manual_seed(5)
    given = PictureAutoencoder.from_settings(settings.autoencoder)
    given.vae.save_pretrained(tmp_path)  # as any diffusers folder, it has no latent statistics
    taken, result = train_autoencoder(settings, ClipTable(data), None, pretrained=tmp_path)
    assert result.losses == []
    for (name, a), b in zip(given.vae.state_dict().items(), taken.vae.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert not torch.equal(taken.std, given.std)
    with pytest.raises(TccpError, match="latent_channels 4, the settings 8"):
        train_autoencoder(small(**{"autoencoder.latent_channels": 8}), ClipTable(data), None, pretrained=tmp_path)


@pytest.fixture
def trained(data, tmp_path):
    """The folder of an auto-encoder that was trained for networks, with statistics that no data would give."""
    torch.manual_seed(5)
    autoencoder = PictureAutoencoder.from_settings(small().autoencoder)
    autoencoder.mean.fill_(0.5)
    autoencoder.save(tmp_path / "trained")
    return tmp_path / "trained"


def test_only_the_decoder_is_trained_if_the_settings_ask_for_another(data, trained, tmp_path):
    settings = small(
        **{"autoencoder.decoder_folded_levels": 1, "autoencoder.max_steps": 12, "training.checkpoint_every": 5}
    )
    table, given = ClipTable(data), PictureAutoencoder.load(trained)

    def light(run, **options):
        return train_autoencoder(settings, table, run, pretrained=trained, **options)

    whole, _ = light(RunFolder.open(tmp_path / "whole", settings, "autoencoder", resume=False))
    assert whole.decoder_folded_levels == 1
    pictures = to_model(torch.from_numpy(TablePictures(table, settings).batch(0).pictures))
    with torch.no_grad():
        start, end = (
            ((one.reconstruct(one.posterior(pictures).mean) - pictures) ** 2).mean()
            for one in (with_new_decoder(settings, given), whole)
        )
    assert end < start
    before, after = weights_of(given), weights_of(whole)
    encoder = {name for name in before if not name.startswith(("vae.decoder", "vae.post_quant_conv"))}
    assert {"mean", "std", "vae.quant_conv.weight"} < encoder
    for name in after:
        assert (name in before and torch.equal(before[name], after[name])) == (name in encoder), name
    assert all(parameter.requires_grad for parameter in whole.parameters())

    light(RunFolder.open(tmp_path / "cut", settings, "autoencoder", resume=False), stop_at=7)
    resumed, _ = light(RunFolder.open(tmp_path / "cut", settings, "autoencoder", resume=True))
    for (name, a), b in zip(after.items(), weights_of(resumed).values(), strict=True):
        assert torch.equal(a, b), name


def test_a_new_decoder_for_a_foreign_autoencoder_comes_with_statistics(data, trained):
    (trained / STATISTICS_FILE).unlink()  # as diffusers writes it
    settings = small(**{"autoencoder.decoder_folded_levels": 1, "autoencoder.max_steps": 1})
    fitted, _ = train_autoencoder(settings, ClipTable(data), None, pretrained=trained)
    assert fitted.mean.any()
    assert not torch.equal(fitted.std, torch.ones_like(fitted.std))


def test_a_decoder_that_cannot_be_is_refused_in_one_line(data, trained):
    deeper = small(**{"autoencoder.block_channels": (8, 8, 8, 8), "autoencoder.patch": 1})
    settings = override(deeper, {"autoencoder.decoder_folded_levels": 3})
    with pytest.raises(TccpError, match=r"3, but there are 2 levels .*: lower autoencoder.decoder_folded_levels$"):
        train_autoencoder(settings, ClipTable(data), None, pretrained=trained)
    with pytest.raises(TccpError, match=r"is 0 in .* and 3 here: .*this job cannot"):
        pretrained_autoencoder(settings, trained)
