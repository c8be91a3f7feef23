"""Training one variant of MVControlNet on windows of latents."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.training_utils import EMAModel
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
from tccp.training.engine import Engine, TorchEngine, with_weights
from tccp.training.latent_cache import TrainingBatch, Unplanned, Windows
from tccp.training.loop import FitResult, fit
from tccp.training.precision import arithmetic
from tccp.training.run_folder import Run, TransientRun
from tccp.training.window_files import micro_batch, training_order

DENOISING_STEPS = 4
"""Steps in which the first-frame variant makes an initial frame out of a noised one."""


@dataclass(frozen=True)
class Draws:
    """Every random number of a batch of windows, from (seed, window id, epoch) alone."""

    noise: Float[Tensor, "b c f h w"]
    t: Int[Tensor, " b"]
    dropped: Bool[Tensor, " b"]
    initial_noise: Float[Tensor, "b c h w"]
    generated: Bool[Tensor, " b"]  # windows whose initial frame is not the true one, when settings ask for a mix
    initial_t: Int[Tensor, " b"]  # the time up to which those of `denoised` are noised


def draw(
    planned: Sequence[PlannedWindow], shape: tuple[int, ...], settings: Settings, num_train_timesteps: int
) -> Draws:
    """Draws for windows whose latents have `shape` c f h w."""
    noise, t, dropped, initial, generated, initial_t = [], [], [], [], [], []
    # Half the way where noise is predicted: beyond, that says little of the picture.
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
    return Draws(*(torch.stack(values) for values in (noise, t, dropped, initial, generated, initial_t)))


class _DrawsAhead:
    """`draw`, for the next windows while a GPU is at work on these: some 40 ms of a processor for 64 windows."""

    def __init__(self, settings: Settings, num_train_timesteps: int):
        self.settings, self.num_train_timesteps = settings, num_train_timesteps
        self.thread = ThreadPoolExecutor(1)
        self.next: tuple[list[PlannedWindow], Future[Draws]] | None = None

    def of(
        self, planned: Sequence[PlannedWindow], shape: tuple[int, ...], following: Sequence[PlannedWindow] = ()
    ) -> Draws:
        foreseen, self.next = self.next, None
        if foreseen is not None and foreseen[0] == list(planned):
            draws = foreseen[1].result()
        else:
            draws = draw(planned, shape, self.settings, self.num_train_timesteps)
        if following:
            begun = self.thread.submit(draw, following, shape, self.settings, self.num_train_timesteps)
            self.next = list(following), begun
        return draws


class WindowLoss(nn.Module):
    """The module that an engine trains: the network, and around it its loss, in the precision of training."""

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
    ) -> Float[Tensor, " b"]:
        """As `window_loss`."""
        with arithmetic(self.precision, latents.device.type):
            return window_loss(self.network, self.schedule, latents, noise, t, conditions, control, initial)


class VariantLoss:
    """`loss_of(step, micro)` for the training loop, of one rank."""

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
        self.forward: Callable[..., Any] = self.module  # or the engine's
        self.device = next(model.parameters()).device
        self.num_frames = self.row.num_frames(settings.window)
        self.order = training_order(windows.lengths, variant, self.settings) if isinstance(windows, Windows) else None
        self.taken: list[PlannedWindow] = []
        self.draws = _DrawsAhead(self.settings, self.schedule.num_train_timesteps)
        self.rank, self.num_ranks = rank, num_ranks
        self.waited_s = 0.0  # for windows, since the start

    def describe_step(self, step: int) -> list[str]:
        """The windows of a step, those of all ranks; where there is no plan, those that this rank took for it."""
        planned = self.order.step(step, self.settings.training.batch_size) if self.order else self.taken
        shown = 12 if self.order else None  # a hash, where the clip's own id is not known
        return [f"{clip_id[:shown]}:{start}" for _, (clip_id, start) in planned]

    def __call__(self, step: int, micro: int) -> Tensor:
        asked = time.monotonic()
        following: Sequence[PlannedWindow] = ()
        if self.order is not None and isinstance(self.windows, Windows):
            planned = self._planned(step, micro)
            batch = self.windows.batch(planned, self.row, self.num_frames)
            if self.device.type != "cpu":  # which would have to do both
                last = micro + 1 == self.settings.training.accumulation
                following = self._planned(step + 1, 0) if last else self._planned(step, micro + 1)
        else:
            assert isinstance(self.windows, Unplanned)
            planned, batch = self.windows.take(self.row)
            self.taken = [*(self.taken if micro else ()), *planned]
        self.waited_s += time.monotonic() - asked
        return self.loss(planned, batch, following).mean()

    def _planned(self, step: int, micro: int) -> list[PlannedWindow]:
        assert self.order is not None
        return micro_batch(self.order, self.settings.training, step, micro, self.rank, self.num_ranks)

    def loss(
        self, planned: Sequence[PlannedWindow], batch: TrainingBatch, following: Sequence[PlannedWindow] = ()
    ) -> Float[Tensor, " b"]:
        """Of each window. The batch may hold more kinds of conditions than the network takes.

        following: the windows of the next call, for which random numbers are drawn meanwhile.
        """
        told = batch.only(self.row.conditions_with(self.settings.lips.source))
        draws = self.draws.of(planned, tuple(batch.latents.shape[1:]), following)
        initial = self._initial(batch, draws, planned).to(self.device) if self.row.continues else None
        return self.forward(
            batch.latents.to(self.device),
            draws.noise.to(self.device),
            draws.t.to(self.device),
            told.conditions.drop(draws.dropped).to(self.device),
            batch.control.to(self.device),
            initial,
        )

    def _initial(
        self, batch: TrainingBatch, draws: Draws, planned: Sequence[PlannedWindow]
    ) -> Float[Tensor, "b c h w"]:
        """The frame a window continues from: true, or one as the first-frame variant makes them (section 4.4).

        `generated`: all are; `mix`: half of them. `denoised`: half of them are true frames, noised up to a random time
        and denoised by the first-frame variant in a few steps (Meng et al. 2022, SDEdit): true in part, its guess for
        the rest, as frames along a chain are, at a fraction of the price.
        """
        settings = self.settings.training
        initial = batch.latents[:, :, 0]
        if settings.initial_frames != "truth":
            chosen = torch.ones_like(draws.generated) if settings.initial_frames == "generated" else draws.generated
            rows = [i for i in range(len(planned)) if chosen[i]]
            if rows:
                first = self._first_network()
                kinds = VARIANTS[FIRST_OF[self.row.name]].conditions_with(self.settings.lips.source)
                shown = batch[rows].first_frame().only(kinds)
                if settings.initial_frames == "denoised":
                    made = self._denoise_first(first, shown, draws.noise[rows, :, 0], draws.initial_t[rows])
                else:
                    made = self._generate_first(first, shown, [planned[i] for i in rows])
                initial = initial.clone()
                initial[rows] = made
        return initial + settings.initial_frame_noise * draws.initial_noise

    def _first_network(self) -> MVControlNet:
        if self.first is None:
            raise ValueError(
                f"training.initial_frames={self.settings.training.initial_frames} needs a trained "
                f"{FIRST_OF[self.row.name]}: train it first, or set training.initial_frames=truth"
            )
        return self.first

    @torch.no_grad()
    def _denoise_first(
        self, first: MVControlNet, shown: TrainingBatch, noise: Float[Tensor, "b c h w"], t: Int[Tensor, " b"]
    ) -> Float[Tensor, "b c h w"]:
        device = next(first.parameters()).device
        conditions, control = shown.conditions.to(device), shown.control.to(device)
        clean, noise = shown.latents.to(device), noise[:, :, None].to(device)
        for k in range(DENOISING_STEPS, 0, -1):
            times = (t[:, None] * k // DENOISING_STEPS).to(device)
            noisy = self.schedule.add_noise(clean, noise, times)
            predicted = first(noisy, times, conditions, control)
            clean, noise = self.schedule.clean(noisy, predicted, times), self.schedule.noise(noisy, predicted, times)
        return clean[:, :, 0].to(shown.latents)

    def _generate_first(
        self, first: MVControlNet, shown: TrainingBatch, planned: Sequence[PlannedWindow]
    ) -> Float[Tensor, "b c h w"]:
        states = [
            start_window(
                self.schedule,
                self.first_sampling,
                shown.conditions[i : i + 1],
                shown.control[i],
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
    """Whether training this variant takes the network of its first-frame variant."""
    training = settings.for_variant(variant).training
    return variant in FIRST_OF and (training.start_from_first or training.initial_frames != "truth")


def _taken_over(take: Callable[[MVControlNet], None], source: MVControlNet, what: str) -> None:
    try:
        take(source)
    except ValueError as error:
        raise TccpError(f"{what} ({error})") from None


def new_network(
    variant: VariantName,
    settings: Settings,
    *,
    first: MVControlNet | None = None,
    start_from: MVControlNet | None = None,
) -> MVControlNet:
    """The network as its training starts, the same for the same seed.

    first: the trained first-frame variant, from whose weights sequence variants start where settings say so.
    start_from: a network whose video branch is taken over and copied into the control branch.
    """
    resolved = settings.for_variant(variant)
    torch.manual_seed(rng_seed(resolved.seed, "init", variant))
    model = MVControlNet.from_settings(resolved, variant)
    if resolved.training.start_from_first and variant in FIRST_OF:
        if first is None:
            raise ValueError(f"training.start_from_first needs a trained {FIRST_OF[variant]}: train it first")
        _taken_over(
            model.start_from_first, first, f"training.start_from_first: {FIRST_OF[variant]} cannot start {variant}"
        )
    if start_from is not None:
        _taken_over(model.start_control_from, start_from, f"--control-from: its {variant} does not fit these settings")
    if resolved.training.freeze_video_branch:
        model.freeze_video_branch()
    return model


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
    """Trains `variant` and returns it with its EMA weights, on the CPU; on ranks above 0 of many, None.

    first: needed by sequence variants that start from its weights or on its frames (`needs_first`).
    start_from: as for `new_network`. stop_at, validate: as for `fit`. compiled: by torch.compile.
    """
    run = run or TransientRun()
    resolved = settings.for_variant(variant)
    model = new_network(variant, settings, first=first, start_from=start_from).to(device)
    if compiled:
        model.compile_blocks()
    losses = VariantLoss(model, variant, settings, windows, first, run.rank, run.num_ranks)
    engine = engine_of(losses.module, resolved.training)
    losses.forward = engine.forward
    ema = EMAModel(engine.local_parameters(), decay=resolved.training.ema_decay, foreach=True)
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
        waited_s=lambda: losses.waited_s,
        validate=validate,
    )
    weights = engine.gather(ema.shadow_params)
    return (with_weights(MVControlNet.from_settings(resolved, variant), weights) if run.rank == 0 else None), result
