"""Training: the training loop, its data readers, and its checkpoints and metrics."""
