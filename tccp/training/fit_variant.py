"""Trains one variant of MVControlNet on windows of latents."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tccp.clips.order import PlannedWindow
from tccp.config import Settings, TrainingSettings, VariantName
from tccp.diffusion.sampling import advance, start_window
from tccp.diffusion.schedule import NoiseSchedule, window_loss
from tccp.errors import TccpError
from tccp.models.conditions import Conditions
from tccp.models.mvcontrolnet import MVControlNet
from tccp.models.variants import FIRST_OF, VARIANTS
from tccp.seeds import rng_seed
from tccp.training.averaged_weights import AveragedWeights
from tccp.training.engine import Engine, TorchEngine, with_weights
from tccp.training.latent_cache import TrainingBatch, Unplanned, Windows
from tccp.training.loop import FitResult, SettingKeys, fit
from tccp.training.precision import arithmetic
from tccp.training.run_folder import Run, TransientRun
from tccp.training.window_files import micro_batch, training_order

DENOISING_STEPS = 4
"""Steps in which the first-frame variant denoises a noised true frame (`initial_frames=denoised`)."""


@dataclass(frozen=True)
class WindowNoise:
    """All random numbers of a batch of windows. They depend on (seed, window id, epoch) only.

    noise: added to the latents at diffusion time `t`. dropped: windows trained without conditions. initial_noise:
    added to the initial frames. generated: windows whose initial frame is not the true one (`initial_frames` mix and
    denoised). initial_t: diffusion time up to which a true initial frame is noised (`initial_frames=denoised`).
    """

    noise: Float[Tensor, "b c f h w"]
    t: Int[Tensor, " b"]
    dropped: Bool[Tensor, " b"]
    initial_noise: Float[Tensor, "b c h w"]
    generated: Bool[Tensor, " b"]
    initial_t: Int[Tensor, " b"]


def sample_noise(
    planned: Sequence[PlannedWindow], shape: tuple[int, ...], settings: Settings, num_train_timesteps: int
) -> WindowNoise:
    """Samples the random numbers of windows whose latents have the shape `shape` = (c, f, h, w)."""
    noise, t, dropped, initial, generated, initial_t = [], [], [], [], [], []
    # Half the times for noise prediction: at later times, predicted noise says little about the picture.
    last = num_train_timesteps // (1 if settings.diffusion.prediction == "v" else 2)
    shift = settings.training.timestep_shift
    for epoch, (clip_id, start) in planned:
        generator = torch.Generator().manual_seed(rng_seed(settings.seed, "diffusion", clip_id, start, epoch))
        noise.append(torch.randn(shape, generator=generator))
        u = (int(torch.randint(num_train_timesteps, (), generator=generator)) + 0.5) / num_train_timesteps
        t.append(torch.tensor(int(num_train_timesteps * shift * u / (1 + (shift - 1) * u))))
        dropped.append(torch.rand((), generator=generator) < settings.training.condition_dropout)
        initial.append(torch.randn((shape[0], *shape[2:]), generator=generator))
        generated.append(torch.rand((), generator=generator) < 0.5)
        initial_t.append(torch.randint(last, (), generator=generator))
    return WindowNoise(*(torch.stack(values) for values in (noise, t, dropped, initial, generated, initial_t)))


class _NoisePrefetch:
    """Samples the noise of the next windows in a thread while the GPU trains on the current ones.

    `sample_noise` takes about 40 ms of CPU time for 64 windows.
    """

    def __init__(self, settings: Settings, num_train_timesteps: int):
        self.settings, self.num_train_timesteps = settings, num_train_timesteps
        self.thread = ThreadPoolExecutor(1)
        self.next: tuple[list[PlannedWindow], Future[WindowNoise]] | None = None

    def get(
        self, planned: Sequence[PlannedWindow], shape: tuple[int, ...], following: Sequence[PlannedWindow] = ()
    ) -> WindowNoise:
        """The noise of `planned`; starts sampling that of `following`."""
        prefetched, self.next = self.next, None
        if prefetched is not None and prefetched[0] == list(planned):
            sampled = prefetched[1].result()
        else:
            sampled = sample_noise(planned, shape, self.settings, self.num_train_timesteps)
        if following:
            future = self.thread.submit(sample_noise, following, shape, self.settings, self.num_train_timesteps)
            self.next = list(following), future
        return sampled


class WindowLoss(nn.Module):
    """The module that an engine trains: the network and its loss, computed in the training precision."""

    def __init__(self, network: MVControlNet, schedule: NoiseSchedule, precision: str):
        super().__init__()
        self.network = network
        self.schedule = schedule
        self.precision = precision

    def forward(
        self,
        latents: Float[Tensor, "b c f h w"],
        noise: Float[Tensor, "b c f h w"],
        t: Int[Tensor, " b"],
        conditions: Conditions,
        control: Float[Tensor, "b c2 f h w"],
        initial: Float[Tensor, "b c h w"] | None,
        weight: Float[Tensor, "b f h w"] | None = None,
    ) -> Float[Tensor, " b"]:
        """`window_loss` in the training precision."""
        with arithmetic(self.precision, latents.device.type):
            return window_loss(self.network, self.schedule, latents, noise, t, conditions, control, initial, weight)


class VariantLoss:
    """The loss of one rank's micro-batch, `loss_of(step, micro)` of the training loop."""

    def __init__(
        self,
        model: MVControlNet,
        variant: VariantName,
        settings: Settings,
        windows: Windows | Unplanned,
        first: MVControlNet | None = None,
        rank: int = 0,
        num_ranks: int = 1,
    ):
        self.row = VARIANTS[variant]
        self.settings = settings.for_variant(variant)
        self.first_sampling = settings.for_variant(FIRST_OF.get(variant, variant)).sampling
        self.windows = windows
        self.first = first.eval().requires_grad_(False) if first is not None else None
        self.schedule = NoiseSchedule.from_settings(self.settings.diffusion)
        self.module = WindowLoss(model, self.schedule, self.settings.training.precision)
        self.forward: Callable[..., Any] = self.module  # replaced by the engine's forward
        self.device = next(model.parameters()).device
        self.num_frames = self.row.num_frames(settings.window)
        self.order = training_order(windows.lengths, variant, self.settings) if isinstance(windows, Windows) else None
        self.taken: list[PlannedWindow] = []
        self.noise = _NoisePrefetch(self.settings, self.schedule.num_train_timesteps)
        self.rank, self.num_ranks = rank, num_ranks
        self.waited_s = 0.0  # total time spent waiting for windows

    def describe_step(self, step: int) -> list[str]:
        """The windows of a step as `clip:start`: those of all ranks, or of this rank if they cannot be planned."""
        planned = self.order.step(step, self.settings.training.batch_size) if self.order else self.taken
        id_length = 12 if self.order else None  # without an order, ids are hashes and are given whole
        return [f"{clip_id[:id_length]}:{start}" for _, (clip_id, start) in planned]

    def __call__(self, step: int, micro: int) -> Tensor:
        started = time.monotonic()
        following: Sequence[PlannedWindow] = ()
        if self.order is not None and isinstance(self.windows, Windows):
            planned = self._planned(step, micro)
            batch = self.windows.batch(planned, self.row, self.num_frames)
            if self.device.type != "cpu":  # on a CPU, sampling would compete with training
                last = micro + 1 == self.settings.training.accumulation
                following = self._planned(step + 1, 0) if last else self._planned(step, micro + 1)
        else:
            assert isinstance(self.windows, Unplanned)
            planned, batch = self.windows.take(self.row)
            self.taken = [*(self.taken if micro else ()), *planned]
        self.waited_s += time.monotonic() - started
        return self.loss(planned, batch, following).mean()

    def _planned(self, step: int, micro: int) -> list[PlannedWindow]:
        assert self.order is not None
        return micro_batch(self.order, self.settings.training, step, micro, self.rank, self.num_ranks)

    def loss(
        self, planned: Sequence[PlannedWindow], batch: TrainingBatch, following: Sequence[PlannedWindow] = ()
    ) -> Float[Tensor, " b"]:
        """The loss of each window. The batch may hold more kinds of conditions than the network takes.

        following: the windows of the next call; their random numbers are sampled during this one.
        """
        conditions = batch.only(self.row.conditions_with(self.settings.lips.source)).conditions
        sampled = self.noise.get(planned, tuple(batch.latents.shape[1:]), following)
        initial = self._initial(batch, sampled, planned).to(self.device) if self.row.continues else None
        weight = batch.target_weight(self.row.generates)
        return self.forward(
            batch.latents.to(self.device),
            sampled.noise.to(self.device),
            sampled.t.to(self.device),
            conditions.drop(sampled.dropped).to(self.device),
            batch.control.to(self.device),
            initial,
            None if weight is None else weight.to(self.device),
        )

    def _initial(
        self, batch: TrainingBatch, sampled: WindowNoise, planned: Sequence[PlannedWindow]
    ) -> Float[Tensor, "b c h w"]:
        """The frame that each window continues from: the true one, or one from the first-frame variant (section 4.4).

        The setting `initial_frames` selects which. `truth`: all frames are true. `generated`: the first-frame variant
        generates all of them. `mix`: it generates half of them. `denoised`: half of them are true frames, noised to a
        random time and denoised by the first-frame variant in a few steps (SDEdit, Meng et al. 2022). Like the frames
        along a chain, they are partly generated, but they cost a fraction of a full generation.
        """
        settings = self.settings.training
        initial = batch.latents[:, :, 0]
        if settings.initial_frames != "truth":
            all_generated = settings.initial_frames == "generated"
            chosen = torch.ones_like(sampled.generated) if all_generated else sampled.generated
            rows = [i for i in range(len(planned)) if chosen[i]]
            if rows:
                first = self._first_network()
                kinds = VARIANTS[FIRST_OF[self.row.name]].conditions_with(self.settings.lips.source)
                frames = batch[rows].first_frame().only(kinds)
                if settings.initial_frames == "denoised":
                    made = self._denoise_first(first, frames, sampled.noise[rows, :, 0], sampled.initial_t[rows])
                else:
                    made = self._generate_first(first, frames, [planned[i] for i in rows])
                initial = initial.clone()
                initial[rows] = made
        return initial + settings.initial_frame_noise * sampled.initial_noise

    def _first_network(self) -> MVControlNet:
        if self.first is None:
            raise ValueError(
                f"training.initial_frames={self.settings.training.initial_frames} needs a trained "
                f"{FIRST_OF[self.row.name]}: train it first, or set training.initial_frames=truth"
            )
        return self.first

    @torch.no_grad()
    def _denoise_first(
        self, first: MVControlNet, frames: TrainingBatch, noise: Float[Tensor, "b c h w"], t: Int[Tensor, " b"]
    ) -> Float[Tensor, "b c h w"]:
        device = next(first.parameters()).device
        prepared = first.prepare(frames.conditions.to(device), frames.control.to(device), 1)
        clean, noise = frames.latents.to(device), noise[:, :, None].to(device)
        for k in range(DENOISING_STEPS, 0, -1):
            times = (t[:, None] * k // DENOISING_STEPS).to(device)
            noisy = self.schedule.add_noise(clean, noise, times)
            predicted = first(noisy, times, prepared)
            clean, noise = self.schedule.clean(noisy, predicted, times), self.schedule.noise(noisy, predicted, times)
        return clean[:, :, 0].to(frames.latents)

    def _generate_first(
        self, first: MVControlNet, frames: TrainingBatch, planned: Sequence[PlannedWindow]
    ) -> Float[Tensor, "b c h w"]:
        states = [
            start_window(
                self.schedule,
                self.first_sampling,
                frames.conditions[i : i + 1],
                frames.control[i],
                None,
                rng_seed(self.settings.seed, "initial", clip_id, start, epoch),
                first.config.latent_channels,
            )
            for i, (epoch, (clip_id, start)) in enumerate(planned)
        ]
        while not states[0].finished:
            states = advance(first, self.schedule, states)
        return torch.stack([state.latents[:, 0] for state in states])


def needs_first(variant: VariantName, settings: Settings) -> bool:
    """Whether training this variant needs the trained network of its first-frame variant."""
    training = settings.for_variant(variant).training
    return variant in FIRST_OF and (training.start_from_first or training.initial_frames != "truth")


def _copy_weights(copy: Callable[[MVControlNet], None], source: MVControlNet, message: str) -> None:
    """Calls `copy(source)`; raises TccpError with `message` if the networks do not fit."""
    try:
        copy(source)
    except ValueError as error:
        raise TccpError(f"{message} ({error})") from None


def new_network(
    variant: VariantName,
    settings: Settings,
    *,
    first: MVControlNet | None = None,
    start_from: MVControlNet | None = None,
) -> MVControlNet:
    """A network ready for training. The same seed gives the same weights.

    first: the trained first-frame variant. With `training.start_from_first`, sequence variants start from its weights.
    start_from: a network whose video branch is copied into the new network's video and control branches.
    Raises ValueError if `first` is needed and missing, TccpError if `first` or `start_from` does not fit.
    """
    resolved = settings.for_variant(variant)
    torch.manual_seed(rng_seed(resolved.seed, "init", variant))
    model = MVControlNet.from_settings(resolved, variant)
    if resolved.training.start_from_first and variant in FIRST_OF:
        if first is None:
            raise ValueError(f"training.start_from_first needs a trained {FIRST_OF[variant]}: train it first")
        _copy_weights(
            model.start_from_first, first, f"training.start_from_first: {FIRST_OF[variant]} cannot start {variant}"
        )
    if start_from is not None:
        _copy_weights(model.start_control_from, start_from, f"--control-from: its {variant} does not fit the settings")
    if resolved.training.freeze_video_branch:
        model.freeze_video_branch()
    return model


def _keys_of(variant: VariantName, settings: Settings) -> SettingKeys:
    """Keys that have an effect on this variant: its own ones, where the settings have such."""
    own = settings.variant_overrides.get(variant, {})

    def key(name: str) -> str:
        is_own = f"training.{name}" in own or name in own.get("training", {})
        return f"variant_overrides.{variant}.training.{name}" if is_own else f"training.{name}"

    return SettingKeys(key("learning_rate"), key("gradient_clip"))


def train_variant(
    variant: VariantName,
    settings: Settings,
    windows: Windows | Unplanned,
    run: Run | None,
    *,
    first: MVControlNet | None = None,
    start_from: MVControlNet | None = None,
    device: torch.device | str = "cpu",
    stop_at: int | None = None,
    engine_of: Callable[[nn.Module, TrainingSettings], Engine] = TorchEngine,
    validate: Callable[[int, list[Tensor]], Mapping[str, float]] | None = None,
    compiled: bool = False,
) -> tuple[MVControlNet | None, FitResult]:
    """Trains `variant` and returns it with its EMA weights, on the CPU. Ranks above 0 get None in place of the network.

    first: the trained first-frame variant, for sequence variants that start from its weights or train on its frames
    (see `needs_first`). start_from: as for `new_network`. stop_at, validate: as for `fit`. compiled: whether the
    network's blocks are compiled with torch.compile.
    """
    run = run or TransientRun()
    resolved = settings.for_variant(variant)
    model = new_network(variant, settings, first=first, start_from=start_from).to(device)
    if compiled:
        model.compile_blocks()
    losses = VariantLoss(model, variant, settings, windows, first, run.rank, run.num_ranks)
    engine = engine_of(losses.module, resolved.training)
    losses.forward = engine.forward
    ema = AveragedWeights(engine.local_parameters(), decay=resolved.training.ema_decay)
    result = fit(
        engine,
        losses,
        resolved.training,
        seed=resolved.seed,
        ema=ema,
        run=run,
        title=variant,
        stop_at=stop_at,
        describe_step=losses.describe_step,
        keys=_keys_of(variant, settings),
        waited_s=lambda: losses.waited_s,
        validate=validate,
    )
    weights = engine.gather(ema.weights)
    return (with_weights(MVControlNet.from_settings(resolved, variant), weights) if run.rank == 0 else None), result
