"""The keys under `cluster`: the machine that a plan is for."""

from __future__ import annotations

from dataclasses import dataclass

from cantata.core.errors import ConfigError


@dataclass(frozen=True)
class ClusterConfig:
    """Read by `cantata plan` alone: a run is as large as its launcher makes it."""

    gpus: int
    """Ranks to plan for."""
    memory_gib: float | None
    """Memory of one of them, to say whether the run fits; null says nothing of it."""

    def __post_init__(self) -> None:
        if self.gpus < 1:
            raise ConfigError(f"cluster.gpus={self.gpus} must be at least 1")
        if self.memory_gib is not None and self.memory_gib <= 0:
            raise ConfigError(f"cluster.memory_gib={self.memory_gib} must be above 0, or null")
