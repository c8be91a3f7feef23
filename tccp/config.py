"""Typed settings, presets and the project's error class: everything else builds on this module.

Settings are frozen pydantic models that refuse unknown keys by name. A preset is a plain function.
`paper()` is Table 3 of the paper to the letter; where the paper is silent the comment says whose reading it is.
"""

from __future__ import annotations

import difflib
import functools
import json
import os
import re
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from tccp.errors import TccpError

FPS = 25
"""The model's clock in frames per second; media of any other rate is mapped onto it by presentation time."""
SAMPLE_RATE_HZ = 16_000
SAMPLES_PER_FRAME = SAMPLE_RATE_HZ // FPS

VariantName = Literal[
    "landmark_first", "landmark_sequence", "face_first", "face_sequence", "one_stage_first", "one_stage_sequence"
]
PresetName = Literal["paper", "toy"]
Solver = Literal["ddpm", "ddim", "dpmpp"]
LipSource = Literal["wav2lip", "liplet", "none"]


_Decay = Annotated[float, Field(ge=0, lt=1)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


class HeadBoxSettings(_Frozen):
    """Geometry of the mask and its crop. Lengths are fractions of the head box's side."""

    jitter_center: NonNegativeFloat = 0.05  # uniform, drawn once per clip and draw
    jitter_size: NonNegativeFloat = 0.08
    draws: PositiveInt = 2  # jittered views kept per clip in the latent cache
    mirror: bool = False  # every other draw shows the clip mirrored: twice as many scenes (not in the paper)


class AutoencoderSettings(_Frozen):
    """AutoencoderKL. `downsampling` 16 is Table 3's; 16 latent channels are latent diffusion's kl-f16 (our reading)."""

    downsampling: Literal[4, 8, 16, 32] = 16
    latent_channels: PositiveInt = 16
    patch: PositiveInt = 1  # patch x patch pixels are folded into channels before the first convolution
    block_channels: tuple[PositiveInt, ...] = (128, 128, 256, 256, 512)
    layers_per_block: PositiveInt = 2
    norm_groups: PositiveInt = 32
    mid_attention: bool = True
    kl_weight: NonNegativeFloat = 1e-6
    precision: Literal["fp32", "bf16"] = "fp32"  # of the arithmetic in training; weights and encoding stay fp32
    batch_size: PositiveInt = 16
    max_steps: PositiveInt = 200_000
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


class NetworkSettings(_Frozen):
    """MVControlNet, Table 3."""

    base_channels: PositiveInt = 128
    channel_multipliers: tuple[PositiveInt, ...] = (1, 2, 4)
    blocks_per_scale: PositiveInt = 2
    attention_head_dim: PositiveInt = 64
    condition_dim: PositiveInt = 128
    time_embedding_dim: PositiveInt = 128
    dropout: float = Field(0.1, ge=0, lt=1)
    norm_groups: PositiveInt = 32
    pooled_conditions: bool = False  # condition tokens, pooled, added to the time embedding (not in the paper)
    first_frame_channels: bool = False  # clean first frame on every frame's channels (not in the paper)
    control_embedding: tuple[PositiveInt, ...] = ()  # channels between control latents and base_channels; () as these
    gradient_checkpointing: bool = False


class DiffusionSettings(_Frozen):
    """Forward process. T and the linear schedule are Table 3's; the end points are DDPM's (our reading)."""

    num_train_timesteps: PositiveInt = 1000
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
            raise ValueError("zero_terminal_snr needs prediction=v: at zero signal, noise says nothing of the picture")
        return self


class TrainingSettings(_Frozen):
    batch_size: PositiveInt = 192  # windows per optimiser step, over all workers
    accumulation: PositiveInt = 1  # micro-batches per optimiser step; divides batch_size
    max_steps: PositiveInt = 150_000
    learning_rate: PositiveFloat = 2e-4
    schedule: Literal["constant", "linear"] = "constant"  # linear: down to zero at max_steps
    warmup_steps: int = Field(0, ge=0)
    adam_betas: tuple[_Decay, _Decay] = (0.9, 0.999)
    gradient_clip: PositiveFloat | None = None
    ema_decay: _Decay = 0.9999  # reached gradually: (1 + k) / (10 + k) at update k while that is less
    timestep_shift: PositiveFloat = 1.0  # above 1, more of the noisy times: s u / (1 + (s - 1) u), Esser et al. 2024
    condition_dropout: float = Field(0.0, ge=0, lt=1)  # share of windows trained without conditions, for guidance
    initial_frames: Literal["truth", "generated", "mix", "denoised"] = "truth"
    start_from_first: bool = False  # sequence variants start from the weights of their first-frame variant
    initial_frame_noise: NonNegativeFloat = 0.0  # standard deviation, in latent units, of noise on the clean frame
    precision: Literal["fp32", "bf16"] = "fp32"  # of the arithmetic in training; weights and sampling stay fp32
    freeze_video_branch: bool = False
    checkpoint_every: PositiveInt = 1000
    log_every: PositiveInt = 10

    @model_validator(mode="after")
    def _accumulation_divides(self) -> TrainingSettings:
        if self.batch_size % self.accumulation:
            raise ValueError(f"accumulation {self.accumulation} does not divide batch_size {self.batch_size}")
        return self


class DeepSpeedSettings(_Frozen):
    """How DeepSpeed spreads a training over its workers; it decides memory and speed, not results."""

    # What is divided: nothing, optimiser state, gradients too, parameters too. None: see `stage`.
    zero_stage: Literal[0, 1, 2, 3] | None = None
    offload: Literal["none", "optimizer", "parameters"] = "none"  # to the CPU's memory; parameters takes both
    config: dict[str, Any] = Field(default_factory=dict)  # of DeepSpeed's own, laid over what is derived

    @model_validator(mode="after")
    def _offload_needs_a_stage(self) -> DeepSpeedSettings:
        if self.zero_stage is not None and self.zero_stage < self._least:
            raise ValueError(f"offload={self.offload} needs zero_stage {self._least} or more, not {self.zero_stage}")
        return self

    @property
    def _least(self) -> int:
        return {"none": 0, "optimizer": 1, "parameters": 3}[self.offload]

    def stage(self, num_workers: int) -> int:
        """ZeRO stage for so many workers: by default several of them divide the optimiser's state."""
        return max(self._least, min(1, num_workers - 1)) if self.zero_stage is None else self.zero_stage


class SamplingSettings(_Frozen):
    solver: Solver = "ddpm"
    steps: PositiveInt = 1000
    temperature: NonNegativeFloat = 1.0  # scales all noise: below 1, samples lie nearer to what is most likely
    guidance_scale: PositiveFloat = 1.0  # 1 is the network as trained; above it, conditions are pushed
    redraw_landmarks: bool = False  # read stage 1's points back and draw them anew for stage 2


class LipSettings(_Frozen):
    """Lip reference: the same audio-driven source in training and in generation."""

    source: LipSource = "wav2lip"
    size_px: PositiveInt = 96  # Wav2Lip's own
    liplet_channels: PositiveInt = 32
    liplet_steps: PositiveInt = 2000
    liplet_batch_size: PositiveInt = 64
    liplet_learning_rate: PositiveFloat = 1e-3


class Settings(_Frozen):
    """All settings of a run. `variant_overrides` maps a variant to dotted overrides that hold for it alone."""

    preset: PresetName = "paper"
    seed: int = Field(0, ge=0)
    window: PositiveInt = 8  # frames per window of the sequence variants
    picture_px: PositiveInt = 256  # face crops, landmark pictures and fitted scenes are square and of one size
    context: Literal["scene", "none"] = "scene"  # none blinds the networks to the scene: the ablation
    surround: bool = False  # networks that generate faces are shown the colours around the head box (not in the paper)
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
        """These settings with the variant's own overrides applied, and none left to apply."""
        return override(self.model_copy(update={"variant_overrides": {}}), self.variant_overrides.get(variant, {}))


def paper() -> Settings:
    """PAPER.md's Table 3, to the letter: the defaults above."""
    return Settings(preset="paper")


def toy() -> Settings:
    """Trains on two CPU cores in about three core-hours. docs/settings.md lists what differs from `paper`, and why."""
    seeing = {"network.control_embedding": [128, 128]}  # networks that are shown the scene
    likely = {"sampling.temperature": 0.2}  # of a first frame, which decides the turn of the head and the person
    return Settings(
        preset="toy",
        picture_px=64,
        surround=True,
        headbox=HeadBoxSettings(mirror=True),
        autoencoder=AutoencoderSettings(
            downsampling=8,
            latent_channels=16,
            patch=4,
            block_channels=(64, 128),
            layers_per_block=1,
            norm_groups=8,
            mid_attention=False,
            precision="bf16",
            batch_size=8,
            max_steps=16_000,
            learning_rate=3e-3,
        ),
        network=NetworkSettings(
            base_channels=32,
            channel_multipliers=(1, 2, 3),
            attention_head_dim=32,
            condition_dim=64,
            dropout=0.0,
            norm_groups=8,
            pooled_conditions=True,
        ),
        diffusion=DiffusionSettings(prediction="v", zero_terminal_snr=True),
        training=TrainingSettings(
            batch_size=16,
            max_steps=2800,
            learning_rate=1.2e-3,
            schedule="linear",
            warmup_steps=50,
            gradient_clip=1.0,
            ema_decay=0.998,
            condition_dropout=0.1,
            initial_frames="denoised",
            start_from_first=True,
            initial_frame_noise=0.25,
            precision="bf16",
            checkpoint_every=250,
        ),
        sampling=SamplingSettings(solver="dpmpp", steps=12, temperature=0.5),
        lips=LipSettings(source="liplet", size_px=32, liplet_channels=16, liplet_steps=1200, liplet_learning_rate=3e-3),
        variant_overrides={
            "landmark_first": {
                "training.batch_size": 64,
                "training.timestep_shift": 3.0,
                "training.max_steps": 4200,
                **seeing,
                **likely,
            },
            "landmark_sequence": {"training.max_steps": 3500, **seeing},
            "face_first": {"training.batch_size": 64, **likely},
            "face_sequence": {"network.first_frame_channels": True, "training.max_steps": 3500},
            # One stage in place of two: as many steps as the two networks that it replaces.
            "one_stage_first": {
                "training.batch_size": 64,
                "training.timestep_shift": 3.0,
                "training.max_steps": 7000,
                **seeing,
                **likely,
            },
            "one_stage_sequence": {"network.first_frame_channels": True, "training.max_steps": 7000, **seeing},
        },
    )


PRESETS: dict[PresetName, Callable[[], Settings]] = {"paper": paper, "toy": toy}


def _known_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += _known_keys(field.annotation, f"{prefix}{name}.")
    return keys


def override(settings: Settings, values: Mapping[str, Any]) -> Settings:
    """`settings` with dotted keys replaced, validated anew.

    Raises TccpError that names an unknown key and the nearest known one, or the value that is not allowed.
    """
    known = _known_keys(type(settings))
    tree = settings.model_dump()
    for key, value in values.items():
        if key == "preset":
            raise TccpError(f"setting preset cannot be overridden (given: {value}): choose one with --preset")
        if key not in known and not key.startswith("variant_overrides."):
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; known keys are {', '.join(known)}"
            raise TccpError(f"unknown setting {key!r}{hint}")
        *path, leaf = key.split(".", 2) if key.startswith("variant_overrides.") else key.split(".")
        node = functools.reduce(lambda node, part: node.setdefault(part, {}), path, tree)
        node[leaf] = {**node[leaf], **value} if isinstance(value, dict) and isinstance(node.get(leaf), dict) else value
    return _validated(tree)


def _validated(tree: object) -> Settings:
    try:
        return Settings.model_validate(tree)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "settings"
        if first["type"] == "value_error":  # from a validator above: it says what was given itself
            raise TccpError(f"setting {where}: {first['ctx']['error']}") from None
        raise TccpError(f"setting {where}: {first['msg']} (given: {str(first['input'])[:120]})") from None


def load_settings(preset: str = "toy", overrides: Sequence[str] = ()) -> Settings:
    """A preset with `key=value` overrides from the command line; values are JSON where they parse as such.

    What is given holds for all variants: where the preset has a value of its own for some of them, it gives way. A
    variant's own is given as variant_overrides.NAME.KEY.
    """
    if preset not in PRESETS:
        raise TccpError(f"unknown preset {preset!r}: choose one of {', '.join(PRESETS)}")
    return changed(PRESETS[preset](), overrides)


def changed(settings: Settings, overrides: Sequence[str]) -> Settings:
    """Settings with `key=value` overrides, as `load_settings` takes them."""
    values: dict[str, Any] = {}
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals:
            raise TccpError(f"override {item!r} is not of the form key=value, e.g. training.max_steps=100")
        try:
            values[key.strip()] = json.loads(text)
        except json.JSONDecodeError:
            values[key.strip()] = text
    given = {inner for key, value in values.items() for inner in (key, *_inside(key, value))}
    own = {
        variant: {key: value for key, value in overrides.items() if key not in given}
        for variant, overrides in settings.variant_overrides.items()
    }
    return override(settings.model_copy(update={"variant_overrides": own}), values)


def _inside(key: str, value: object) -> Iterable[str]:
    return [f"{key}.{name}" for name in value] if isinstance(value, dict) else []


def settings_to_json(settings: Settings) -> str:
    return settings.model_dump_json(indent=2) + "\n"


def settings_from_json(text: str) -> Settings:
    """Inverse of `settings_to_json`. Raises TccpError on unknown keys and values out of range."""
    try:
        return _validated(json.loads(text))
    except json.JSONDecodeError as error:
        raise TccpError(f"settings are not JSON: {error}") from None


def git_commit() -> str:
    """Commit of the code in use, with `+changes` if the tree differs from it; `unknown` outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    try:
        run = functools.partial(subprocess.run, cwd=root, capture_output=True, text=True, timeout=10, check=True)
        if Path(run(["git", "rev-parse", "--show-toplevel"]).stdout.strip()) != root:
            return "unknown"
        commit = run(["git", "rev-parse", "HEAD"]).stdout.strip()
        return commit + ("+changes" if run(["git", "status", "--porcelain"]).stdout.strip() else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def storage_root(given: str | Path | None = None) -> Path:
    """Where runs and artifacts live: `--storage`, else `TCCP_STORAGE`, else `~/.tccp`. Raises TccpError for a URL."""
    storage = str(given or os.environ.get("TCCP_STORAGE") or "~/.tccp")
    if re.match(r"[a-z][a-z0-9+]*:/", storage):  # one slash: what a Path makes of two
        raise TccpError(f"storage {storage} is a URL: give a folder of this machine or a mounted one")
    return Path(storage).expanduser()
