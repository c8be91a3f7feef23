"""The presets: `paper`, the paper's Table 3, and `toy`, which trains on two CPU cores."""

from __future__ import annotations

from collections.abc import Callable

from tccp.config.settings import (
    AutoencoderSettings,
    DiffusionSettings,
    HeadBoxSettings,
    LipSettings,
    NetworkSettings,
    PresetName,
    SamplingSettings,
    Settings,
    TrainingSettings,
)


def paper() -> Settings:
    """The paper's Table 3, which the defaults of the settings contain."""
    return Settings(preset="paper")


def toy() -> Settings:
    """Trains on two CPU cores in about three core-hours. docs/settings.md lists what differs from `paper`, and why."""
    sees_scene = {"network.control_embedding": [128, 128]}  # for networks with the scene as control input
    low_noise = {"sampling.temperature": 0.2}  # for first frames, which determine the head's turn and the person
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
            start_from_first=True,
            initial_frame_noise=0.25,
            precision="bf16",
            checkpoint_every=250,
        ),
        sampling=SamplingSettings(solver="dpmpp", steps=2, temperature=0.5),
        lips=LipSettings(source="liplet", size_px=32, liplet_channels=16, liplet_steps=1200, liplet_learning_rate=3e-3),
        variant_overrides={
            "landmark_first": {
                "training.batch_size": 64,
                "training.timestep_shift": 3.0,
                "training.max_steps": 4200,
                **sees_scene,
                **low_noise,
            },
            "landmark_sequence": {"training.max_steps": 3500, **sees_scene},
            "face_first": {"training.batch_size": 64, **low_noise},
            "face_sequence": {"network.first_frame_channels": True, "training.max_steps": 3500},
            # One stage instead of two, with as many steps as the two networks that it replaces.
            "one_stage_first": {
                "training.batch_size": 64,
                "training.timestep_shift": 3.0,
                "training.max_steps": 7000,
                **sees_scene,
                **low_noise,
            },
            "one_stage_sequence": {"network.first_frame_channels": True, "training.max_steps": 7000, **sees_scene},
        },
    )


PRESETS: dict[PresetName, Callable[[], Settings]] = {"paper": paper, "toy": toy}
