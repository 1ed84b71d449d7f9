import pytest

from cantata.core.errors import ConfigError
from cantata.train.cluster import ClusterConfig


def test_what_no_machine_has_is_refused() -> None:
    assert ClusterConfig(gpus=1, memory_gib=None).memory_gib is None
    with pytest.raises(ConfigError, match=r"cluster\.gpus=0 must be at least 1"):
        ClusterConfig(gpus=0, memory_gib=None)
    with pytest.raises(ConfigError, match=r"cluster\.memory_gib=0\.0 must be above 0, or null"):
        ClusterConfig(gpus=8, memory_gib=0.0)
