from typing import Any

import pytest

from cantata.core.errors import ConfigError
from cantata.data.config import DataConfig, OnError, SourceConfig, TooLong


def config(**changes: Any) -> DataConfig:
    source = SourceConfig(1.0, OnError["raise"], TooLong.drop, {"_target_": "x"})
    settings = {
        "num_workers": 0,
        "prefetch": 1,
        "streams": 1,
        "window": 1,
        "sources": {"a": source},
        "held_out": {},
    }
    return DataConfig(**(settings | changes))


@pytest.mark.parametrize("change", [{"num_workers": -1}, {"prefetch": 0}, {"streams": 0}, {"window": 0}])
def test_numbers_out_of_range(change: dict[str, int]) -> None:
    [key] = change
    with pytest.raises(ConfigError, match=rf"data\.{key}="):
        config(**change)


def test_no_source_and_no_weight() -> None:
    with pytest.raises(ConfigError, match=r"data\.sources is empty"):
        config(sources={})
    for weight in (0.0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match="weight="):
            SourceConfig(weight, OnError.skip, TooLong.drop, {"_target_": "x"})
