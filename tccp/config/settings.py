"""The settings of a run as frozen pydantic models."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, model_validator

from tccp.errors import TccpError

VariantName = Literal[
    "landmark_first", "landmark_sequence", "face_first", "face_sequence", "one_stage_first", "one_stage_sequence"
]
PresetName = Literal["paper", "toy"]
Solver = Literal["ddpm", "ddim", "dpmpp"]
LipSource = Literal["wav2lip", "liplet", "none"]


Count = Annotated[int, Field(gt=0, le=10**9)]
_Share = Annotated[float, Field(ge=0, le=1)]
_Decay = Annotated[float, Field(ge=0, lt=1)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


class HeadBoxSettings(_Frozen):
    """Geometry of the mask and its crop. Lengths are fractions of the head box's side."""

    jitter_center: NonNegativeFloat = 0.05  # bound of a uniform sample, one per jittered view of a clip
    jitter_size: NonNegativeFloat = 0.08
    draws: Count = 2  # number of jittered views per clip in the latent cache
    mirror: bool = False  # every second view is mirrored, for twice as many scenes (not in the paper)


class AutoencoderSettings(_Frozen):
    """AutoencoderKL. `downsampling` 16 is from Table 3. 16 latent channels are our choice, as in latent diffusion's
    kl-f16."""

    downsampling: Literal[4, 8, 16, 32] = 16
    latent_channels: Count = 16
    patch: Count = 1  # folds patch x patch pixels into channels before the first convolution
    block_channels: tuple[Count, ...] = (128, 128, 256, 256, 512)
    layers_per_block: Count = 2
    norm_groups: Count = 32
    mid_attention: bool = True
    decoder_folded_levels: int = Field(0, ge=0)  # light decoder: its n finest levels become patches of 2^n pixels
    kl_weight: NonNegativeFloat = 1e-6
    precision: Literal["fp32", "bf16"] = "fp32"  # of arithmetic in training; weights and encoding use fp32
    batch_size: Count = 16
    max_steps: Count = 200_000
    learning_rate: PositiveFloat = 1e-4

    @model_validator(mode="after")
    def _levels_fit(self) -> AutoencoderSettings:
        factor = self.patch * 2 ** (len(self.block_channels) - 1)
        if factor != self.downsampling:
            raise ValueError(
                f"patch {self.patch} and {len(self.block_channels)} levels of block_channels downsample by {factor}; "
                f"downsampling is {self.downsampling}"
            )
        return self

    @model_validator(mode="after")
    def _decoder_keeps_a_level(self) -> AutoencoderSettings:
        levels = len(self.block_channels)
        if self.decoder_folded_levels >= levels:
            raise ValueError(
                f"decoder_folded_levels {self.decoder_folded_levels} leaves the decoder none of the {levels} levels of "
                f"block_channels: give at most {levels - 1}"
            )
        return self


class NetworkSettings(_Frozen):
    """MVControlNet, from Table 3."""

    base_channels: Count = 128
    channel_multipliers: tuple[Count, ...] = (1, 2, 4)
    blocks_per_scale: Count = 2
    attention_head_dim: Count = 64
    condition_dim: Count = 128
    time_embedding_dim: Count = 128
    dropout: float = Field(0.1, ge=0, lt=1)
    norm_groups: Count = 32
    pooled_conditions: bool = False  # adds pooled condition tokens to the time embedding (not in the paper)
    first_frame_channels: bool = False  # repeats the clean first frame in the channels of all frames (not in the paper)
    control_embedding: tuple[Count, ...] = ()  # channels of additional convolutions for control latents
    gradient_checkpointing: bool = False


class DiffusionSettings(_Frozen):
    """The forward process. T and the linear schedule are from Table 3. The end points are our choice, as in DDPM."""

    num_train_timesteps: Count = 1000
    beta_start: float = Field(1e-4, gt=0, lt=1)
    beta_end: float = Field(0.02, gt=0, lt=1)
    prediction: Literal["epsilon", "v"] = "epsilon"
    zero_terminal_snr: bool = False

    @model_validator(mode="after")
    def _betas_rise(self) -> DiffusionSettings:
        if self.beta_start > self.beta_end:
            raise ValueError(f"beta_start {self.beta_start} is above beta_end {self.beta_end}: noise must not shrink")
        return self

    @model_validator(mode="after")
    def _epsilon_needs_signal(self) -> DiffusionSettings:
        if self.zero_terminal_snr and self.prediction == "epsilon":
            raise ValueError("zero_terminal_snr needs prediction=v: without signal, predicting noise is meaningless")
        return self


class TrainingSettings(_Frozen):
    batch_size: Count = 192  # windows per optimiser step, over all workers
    accumulation: Count = 1  # micro-batches per optimiser step; divides batch_size
    max_steps: Count = 150_000
    learning_rate: PositiveFloat = 2e-4
    schedule: Literal["constant", "linear"] = "constant"  # linear: down to zero at max_steps
    warmup_steps: int = Field(0, ge=0)
    adam_betas: tuple[_Decay, _Decay] = (0.9, 0.999)
    gradient_clip: PositiveFloat | None = None
    ema_decay: _Decay = 0.9999  # starts lower: (1 + k) / (10 + k) at update k while that is smaller
    timestep_shift: PositiveFloat = 1.0  # above 1: more noisy times, s u / (1 + (s - 1) u), Esser et al. 2024
    condition_dropout: float = Field(0.0, ge=0, lt=1)  # share of windows trained without conditions, for guidance
    initial_frames: Literal["truth", "generated", "mix", "denoised"] = "truth"
    start_from_first: bool = False  # sequence variants start from the weights of their first-frame variant
    initial_frame_noise: NonNegativeFloat = 0.0  # standard deviation, in latent units, of noise on the clean frame
    precision: Literal["fp32", "bf16"] = "fp32"  # of arithmetic in training; weights and sampling use fp32
    freeze_video_branch: bool = False
    checkpoint_every: Count = 1000
    log_every: Count = 10

    @model_validator(mode="after")
    def _accumulation_divides(self) -> TrainingSettings:
        if self.batch_size % self.accumulation:
            raise ValueError(f"accumulation {self.accumulation} does not divide batch_size {self.batch_size}")
        return self


class DeepSpeedSettings(_Frozen):
    """How DeepSpeed distributes a training over its workers. It affects memory and speed, not results."""

    # Partitions 0: nothing, 1: optimiser state, 2: also gradients, 3: also parameters. None: see `stage`.
    zero_stage: Literal[0, 1, 2, 3] | None = None
    offload: Literal["none", "optimizer", "parameters"] = "none"  # to CPU memory; parameters: both of them
    config: dict[str, Any] = Field(default_factory=dict)  # DeepSpeed's own options, merged over the derived ones

    @model_validator(mode="after")
    def _offload_needs_a_stage(self) -> DeepSpeedSettings:
        if self.zero_stage is not None and self.zero_stage < self._least:
            raise ValueError(f"offload={self.offload} needs zero_stage {self._least} or more, not {self.zero_stage}")
        return self

    @property
    def _least(self) -> int:
        return {"none": 0, "optimizer": 1, "parameters": 3}[self.offload]

    def stage(self, num_workers: int) -> int:
        """The ZeRO stage for this number of workers. By default several workers partition the optimiser's state."""
        return max(self._least, min(1, num_workers - 1)) if self.zero_stage is None else self.zero_stage


class SamplingSettings(_Frozen):
    solver: Solver = "ddpm"
    steps: Count = 1000
    time_power: PositiveFloat = 1.0  # spacing of the steps in diffusion time: 1 even, above 1 closer at the clean end
    temperature: NonNegativeFloat = 1.0  # factor of all noise; below 1, samples are closer to the most likely ones
    guidance_scale: PositiveFloat = 1.0  # 1: no guidance; above 1: stronger influence of the conditions
    guidance_interval: tuple[_Share, _Share] = (0.0, 1.0)  # guidance acts in this part of diffusion time (1: noise)
    redraw_landmarks: bool = False  # for stage 2, read the points of stage 1's pictures and draw new pictures

    @model_validator(mode="after")
    def _interval_ascends(self) -> SamplingSettings:
        if self.guidance_interval[0] > self.guidance_interval[1]:
            raise ValueError(f"guidance_interval is {self.guidance_interval}: give the smaller time first")
        return self


class LipSettings(_Frozen):
    """The lip reference. Training and generation use the same audio-driven source."""

    source: LipSource = "wav2lip"
    size_px: Count = 96  # of Wav2Lip
    liplet_channels: Count = 32
    liplet_steps: Count = 2000
    liplet_batch_size: Count = 64
    liplet_learning_rate: PositiveFloat = 1e-3


class Settings(_Frozen):
    """All settings of a run. `variant_overrides` maps a variant to dotted overrides for this variant only."""

    preset: PresetName = "paper"
    seed: int = Field(0, ge=0)
    window: int = Field(8, gt=0, le=1024)  # frames per window of the sequence variants
    picture_px: int = Field(256, gt=0, le=4096)  # side of face crops, landmark pictures and fitted scenes
    context: Literal["scene", "none"] = "scene"  # none: the networks do not see the scene (ablation)
    surround: bool = False  # networks that generate faces see the colours around the head box (not in the paper)
    headbox: HeadBoxSettings = HeadBoxSettings()
    autoencoder: AutoencoderSettings = AutoencoderSettings()
    network: NetworkSettings = NetworkSettings()
    diffusion: DiffusionSettings = DiffusionSettings()
    training: TrainingSettings = TrainingSettings()
    sampling: SamplingSettings = SamplingSettings()
    lips: LipSettings = LipSettings()
    variant_overrides: dict[VariantName, dict[str, Any]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _picture_divides(self) -> Settings:
        factor = self.autoencoder.downsampling * 2 ** (len(self.network.channel_multipliers) - 1)
        if self.picture_px % factor:
            raise ValueError(
                f"picture_px {self.picture_px} is not a multiple of {factor} (auto-encoder x U-Net downsampling)"
            )
        return self

    @model_validator(mode="after")
    def _variant_overrides_fit(self) -> Settings:
        for variant in self.variant_overrides:
            try:
                self.for_variant(variant)
            except TccpError as error:
                raise ValueError(f"variant_overrides.{variant}: {error}") from None
        return self

    @property
    def latent_px(self) -> int:
        return self.picture_px // self.autoencoder.downsampling

    def for_variant(self, variant: VariantName) -> Settings:
        """These settings with the variant's overrides applied and removed from `variant_overrides`."""
        return override(self.model_copy(update={"variant_overrides": {}}), self.variant_overrides.get(variant, {}))


def _known_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += _known_keys(field.annotation, f"{prefix}{name}.")
    return keys


def _similar(key: str, known: list[str]) -> list[str]:
    """Up to three known keys that look like `key`, or whose last part does."""
    if same := difflib.get_close_matches(key, known, n=1, cutoff=0.92):
        return same
    leaf = key.rpartition(".")[2]
    close = difflib.get_close_matches(key, known, n=3, cutoff=0.7)
    leaves = {name: name.rpartition(".")[2] for name in known}
    near = [leaf, *difflib.get_close_matches(leaf, sorted(set(leaves.values())), n=3, cutoff=0.75)]
    alike = [name for one in near for name in known if leaves[name] == one]
    return list(dict.fromkeys([*alike, *close, *(name for name in known if leaves[name].startswith(leaf))]))[:3]


def override(settings: Settings, values: Mapping[str, Any]) -> Settings:
    """Replaces dotted keys in `settings` and validates the result.

    Raises TccpError that names an unknown key and similar known ones, or the invalid value.
    """
    known = _known_keys(type(settings))
    tree = settings.model_dump()
    for key, value in values.items():
        if key == "preset":
            raise TccpError(f"setting preset cannot be overridden (given: {value}): choose one with --preset")
        if key not in known and not key.startswith("variant_overrides."):
            near = _similar(key, known)
            named = " or ".join(filter(None, [", ".join(near[:-1]), *near[-1:]]))
            hint = f"did you mean {named}?" if near else "tccp/config/settings.py lists all settings"
            raise TccpError(f"unknown setting {key!r}; {hint}")
        *path, leaf = key.split(".", 2) if key.startswith("variant_overrides.") else key.split(".")
        node = functools.reduce(lambda node, part: node.setdefault(part, {}), path, tree)
        node[leaf] = {**node[leaf], **value} if isinstance(value, dict) and isinstance(node.get(leaf), dict) else value
    return validated(tree)


def validated(tree: object) -> Settings:
    """Converts nested dicts to Settings. Raises TccpError that names the first invalid setting."""
    try:
        return Settings.model_validate(tree)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "settings"
        if first["type"] == "value_error":  # the message of a validator above already contains the value
            raise TccpError(f"setting {where}: {first['ctx']['error']}") from None
        raise TccpError(f"setting {where}: {first['msg']} (given: {str(first['input'])[:120]})") from None
