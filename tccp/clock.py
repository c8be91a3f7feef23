"""The model's clock: how fast pictures and sound run. Media with other rates are converted by presentation time."""

FPS = 25
SAMPLE_RATE_HZ = 16_000
SAMPLES_PER_FRAME = SAMPLE_RATE_HZ // FPS
