from typing import Any

import pytest

from cantata.core.errors import ConfigError
from cantata.train.cluster import ClusterConfig


def cluster(**given: Any) -> ClusterConfig:
    return ClusterConfig(**{"gpus": 1, "gpu": None, "memory_gib": None, "mfu": 0.4} | given)


def test_what_no_machine_has_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"cluster\.gpus=0 must be at least 1"):
        cluster(gpus=0)
    with pytest.raises(ConfigError, match=r"cluster\.memory_gib=0\.0 must be above 0, or null"):
        cluster(memory_gib=0.0)
    with pytest.raises(ConfigError, match=r"cluster\.gpu=L40X is no GPU that is known; nearest: l40s?$"):
        cluster(gpu="L40X")
    for mfu in (0.0, 1.1):
        with pytest.raises(ConfigError, match=r"cluster\.mfu=.* must be above 0, and at most 1"):
            cluster(mfu=mfu)


def test_the_gpu_says_how_much_memory_there_is_unless_the_user_does() -> None:
    assert cluster().limit_gib is None
    assert cluster(gpu="h200").limit_gib == 141
    assert cluster(gpu="a100", memory_gib=40.0).limit_gib == 40
    assert cluster(memory_gib=40.0).limit_gib == 40
    assert cluster(gpu="cpu").limit_gib is None
    assert cluster(gpu="cpu").is_cpu
    assert not cluster(gpu="h200").is_cpu
