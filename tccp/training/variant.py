"""Training one variant of MVControlNet on cached latents."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from diffusers.training_utils import EMAModel
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tccp.config import Settings, TccpError, VariantName
from tccp.data import PlannedWindow, TrainingOrder, rng_seed, window_ids
from tccp.diffusion import NoiseSchedule, window_loss
from tccp.models.mvcontrolnet import MVControlNet
from tccp.sampling import advance, start_window
from tccp.training.engine import TorchEngine
from tccp.training.latents import LatentCache, TrainingBatch
from tccp.training.loop import FitResult, RunFolder, fit
from tccp.variants import FIRST_OF, VARIANTS

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


class VariantLoss:
    """`loss_of(step, micro)` for the training loop."""

    def __init__(
        self,
        model: MVControlNet,
        variant: VariantName,
        settings: Settings,
        cache: LatentCache,
        first: MVControlNet | None = None,
        stride: int = 1,
    ):
        self.model = model
        self.row = VARIANTS[variant]
        self.settings = settings.for_variant(variant)
        self.first_sampling = settings.for_variant(FIRST_OF.get(variant, variant)).sampling
        self.cache = cache
        self.first = first.eval().requires_grad_(False) if first is not None else None
        self.schedule = NoiseSchedule.from_settings(self.settings.diffusion)
        self.num_frames = self.row.num_frames(settings.window)
        table = cache.table
        ids = window_ids(table.ids, [table.num_frames[c] for c in table.ids], self.num_frames, stride)
        self.order = TrainingOrder(ids, self.settings.seed)

    def planned(self, step: int) -> list[PlannedWindow]:
        return self.order.step(step, self.settings.training.batch_size)

    def describe_step(self, step: int) -> list[str]:
        return [f"{clip_id[:12]}:{start}" for _, (clip_id, start) in self.planned(step)]

    def __call__(self, step: int, micro: int) -> Tensor:
        settings = self.settings.training
        size = settings.batch_size // settings.accumulation
        planned = self.planned(step)[micro * size : (micro + 1) * size]
        batch = self.cache.batch(planned, self.row, self.num_frames)
        return self.loss(planned, batch).mean()

    def loss(self, planned: Sequence[PlannedWindow], batch: TrainingBatch) -> Float[Tensor, " b"]:
        device = next(self.model.parameters()).device
        latents, control = batch.latents.to(device), batch.control.to(device)
        draws = draw(planned, tuple(latents.shape[1:]), self.settings, self.schedule.num_train_timesteps)
        conditions = batch.conditions.drop(draws.dropped).to(device)
        initial = self._initial(batch, draws, planned).to(device) if self.row.continues else None
        with self._precision(device.type):
            return window_loss(
                self.model,
                self.schedule,
                latents,
                draws.noise.to(device),
                draws.t.to(device),
                conditions,
                control,
                initial,
            )

    @contextmanager
    def _precision(self, device_type: str) -> Iterator[None]:
        if self.settings.training.precision == "fp32":
            yield
            return
        # On CPUs the fused attention's backward pass is several times slower in bf16 than plain products are.
        plain = sdpa_kernel(SDPBackend.MATH) if device_type == "cpu" else nullcontext()
        with torch.autocast(device_type, torch.bfloat16), plain:
            yield

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
                first, shown = self._first_network(), [planned[i] for i in rows]
                if settings.initial_frames == "denoised":
                    made = self._denoise_first(
                        first, shown, initial[rows], draws.noise[rows, :, 0], draws.initial_t[rows]
                    )
                else:
                    made = self._generate_first(first, shown)
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
        self,
        first: MVControlNet,
        planned: Sequence[PlannedWindow],
        latents: Float[Tensor, "b c h w"],
        noise: Float[Tensor, "b c h w"],
        t: Int[Tensor, " b"],
    ) -> Float[Tensor, "b c h w"]:
        batch = self.cache.batch(planned, VARIANTS[FIRST_OF[self.row.name]], 1)
        device = next(first.parameters()).device
        conditions, control = batch.conditions.to(device), batch.control.to(device)
        clean, noise = latents[:, :, None].to(device), noise[:, :, None].to(device)
        for k in range(DENOISING_STEPS, 0, -1):
            times = (t[:, None] * k // DENOISING_STEPS).to(device)
            noisy = self.schedule.add_noise(clean, noise, times)
            predicted = first(noisy, times, conditions, control)
            clean, noise = self.schedule.clean(noisy, predicted, times), self.schedule.noise(noisy, predicted, times)
        return clean[:, :, 0].to(latents)

    def _generate_first(self, first: MVControlNet, planned: Sequence[PlannedWindow]) -> Float[Tensor, "b c h w"]:
        batch = self.cache.batch(planned, VARIANTS[FIRST_OF[self.row.name]], 1)
        states = [
            start_window(
                self.schedule,
                self.first_sampling,
                batch.conditions[i : i + 1],
                batch.control[i],
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


def train_variant(
    variant: VariantName,
    settings: Settings,
    cache: LatentCache,
    run: RunFolder | None,
    *,
    first: MVControlNet | None = None,
    start_from: MVControlNet | None = None,
    device: torch.device | str = "cpu",
    stop_at: int | None = None,
) -> tuple[MVControlNet, FitResult]:
    """Trains `variant` and returns it with its EMA weights.

    first: the trained first-frame variant, which sequence variants need where they start from its weights or on its
        frames (`needs_first`).
    start_from: a network whose video branch is taken over and copied into the control branch.
    """
    resolved = settings.for_variant(variant)
    torch.manual_seed(rng_seed(resolved.seed, "init", variant))
    model = MVControlNet.from_settings(resolved, variant).to(device)
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
    losses = VariantLoss(model, variant, settings, cache, first)
    ema = EMAModel(model.parameters(), decay=resolved.training.ema_decay)
    result = fit(
        TorchEngine(model, resolved.training),
        losses,
        resolved.training,
        seed=resolved.seed,
        ema=ema,
        run=run,
        title=variant,
        stop_at=stop_at,
        describe_step=losses.describe_step,
    )
    ema.copy_to(model.parameters())
    return model.eval(), result
