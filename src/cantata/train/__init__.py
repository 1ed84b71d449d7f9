"""The one loop, its engines, objectives, optimizers, checkpoints and metrics."""
