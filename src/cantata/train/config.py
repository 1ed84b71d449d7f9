"""The keys under `train`."""

from __future__ import annotations

from dataclasses import dataclass

from cantata.core.errors import ConfigError
from cantata.parallel.recompute import Recompute
from cantata.train.early_stopping import EarlyStoppingConfig

LEAST_PATIENCE = 600.0
"""Seconds; ranks of one run may start minutes apart."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, how much at a time, and how often the user hears of it."""

    max_steps: int
    """Optimizer steps of the whole run."""
    micro_batch_size: int
    """Packed rows, or images, that a rank runs through the model at once."""
    gradient_accumulation_steps: int
    """Micro-batches of a rank that make one optimizer step."""
    clip_grad_norm: float | None
    """Largest global gradient norm; null leaves gradients as they are."""
    log_every: int
    """Steps between two lines of `metrics.jsonl`."""
    eval_every: int
    """Steps between two evaluations on the held-out samples, made at the start and the end too; 0: never."""
    early_stopping: EarlyStoppingConfig | None
    """When to end before `max_steps`; null: never."""
    recompute: Recompute
    """Activations that backward computes again: `none`, `selective` (keeps matrix products) or `full`."""
    compile: bool
    """Compile each block with `torch.compile`."""
    hang_seconds: float | None
    """How long a micro-batch, or the wait for one, may take before every rank writes its stack to its log and
    the run ends; the first step may take twice as long, evaluations and saves any time; null: for ever."""

    @property
    def patience(self) -> float | None:
        """Seconds that a rank waits for others in a collective, evaluations included."""
        return None if self.hang_seconds is None else max(2 * self.hang_seconds, LEAST_PATIENCE)

    def __post_init__(self) -> None:
        for key in ("max_steps", "micro_batch_size", "gradient_accumulation_steps", "log_every"):
            check_positive(self, key)
        if self.eval_every < 0:
            raise ConfigError(f"train.eval_every={self.eval_every} must be 0 (never) or a number of steps")
        if self.clip_grad_norm is not None and self.clip_grad_norm <= 0:
            raise ConfigError(
                f"train.clip_grad_norm={self.clip_grad_norm} must be above 0, or null for no clipping"
            )
        if self.hang_seconds is not None and self.hang_seconds <= 0:
            raise ConfigError(
                f"train.hang_seconds={self.hang_seconds} must be above 0, or null to wait for ever"
            )


@dataclass(frozen=True, kw_only=True)
class LanguageTrainConfig(TrainConfig):
    """What besides concerns language models."""

    sequence_length: int
    """Tokens of a packed row; a longer sample is dropped or an error, as its source says."""
    expert_every: int
    """Steps between two entries of `experts/counts.npy`, each with pictures by modality; 0: never."""
    expert_load_warning: float | None
    """Warn when a rank receives this many times its even share of rows, where `mesh.ep` ranks share the
    experts and rows are memory; null: never."""
    neftune_alpha: float
    """Noise on the token embeddings in training (NEFTune, arXiv:2310.05914); 5 to 15 are usual, 0: none."""

    @property
    def tokens_per_micro_batch(self) -> int:
        return self.micro_batch_size * self.sequence_length

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "sequence_length")
        if self.expert_every < 0:
            raise ConfigError(
                f"train.expert_every={self.expert_every} must be 0 (never) or a number of steps"
            )
        if self.expert_load_warning is not None and self.expert_load_warning <= 1:
            raise ConfigError(
                f"train.expert_load_warning={self.expert_load_warning} must be above 1 (the even share), "
                "or null for no warning"
            )
        if not 0 <= self.neftune_alpha < float("inf"):
            raise ConfigError(f"train.neftune_alpha={self.neftune_alpha} must be a number, at least 0")


def check_positive(config: TrainConfig, key: str) -> None:
    """Raise `ConfigError` where a key under `train` is below 1."""
    if getattr(config, key) < 1:
        raise ConfigError(f"train.{key}={getattr(config, key)} must be at least 1")
