"""The keys under `cluster`: the machine that a plan is for."""

from __future__ import annotations

from dataclasses import dataclass

from cantata.core.errors import ConfigError
from cantata.core.suggest import hint
from cantata.train.flops import GPUS, Gpu, find_gpu

CPU = "cpu"


@dataclass(frozen=True)
class ClusterConfig:
    """Read by `cantata plan` alone: a run is as large as its launcher makes it."""

    gpus: int
    """Ranks to plan for."""
    gpu: str | None
    """Name of one of them, such as `h100`, to say how long the run takes and whether it fits; `cpu` plans for
    what a processor computes by, and says neither; null plans for a device that is not named."""
    memory_gib: float | None
    """Memory of one of them, to say whether the run fits; null: what the GPU that is named has."""
    mfu: float
    """Share of the GPU's peak that the model's own operations are taken to reach; 0.3 to 0.5 are usual of
    large models, and a mixture of experts stays below a dense one."""

    def __post_init__(self) -> None:
        if self.gpus < 1:
            raise ConfigError(f"cluster.gpus={self.gpus} must be at least 1")
        if self.gpu is not None and not self.is_cpu and self.device is None:
            known = [CPU, *(name.lower() for name in GPUS)]
            raise ConfigError(
                f"cluster.gpu={self.gpu} is no GPU that is known{hint(self.gpu.lower(), known)}"
            )
        if self.memory_gib is not None and self.memory_gib <= 0:
            raise ConfigError(f"cluster.memory_gib={self.memory_gib} must be above 0, or null")
        if not 0 < self.mfu <= 1:
            raise ConfigError(f"cluster.mfu={self.mfu} must be above 0, and at most 1")

    @property
    def is_cpu(self) -> bool:
        return self.gpu is not None and self.gpu.lower() == CPU

    @property
    def device(self) -> Gpu | None:
        """What is known of the GPU that is named; None where none is."""
        return None if self.gpu is None else find_gpu(self.gpu)

    @property
    def limit_gib(self) -> float | None:
        """Memory of one device; None where nothing is said of it."""
        known = None if self.device is None else self.device.memory_gib
        return known if self.memory_gib is None else self.memory_gib
