from typing import Any

import pytest

from cantata.core.errors import ConfigError
from cantata.data.config import DataConfig, OnError, SourceConfig, TooLong, WeightUnit


def source_config(**changes: Any) -> SourceConfig:
    settings = {
        "weight": 1.0,
        "on_error": OnError["raise"],
        "too_long": TooLong.drop,
        "max_skipped": None,
        "augment": None,
        "dataset": {"_target_": "x"},
    }
    return SourceConfig(**(settings | changes))


def config(**changes: Any) -> DataConfig:
    source = source_config()
    settings = {
        "num_workers": 0,
        "prefetch": 1,
        "stall_warning": None,
        "streams": 1,
        "window": 1,
        "weight_unit": WeightUnit.samples,
        "cache": None,
        "sources": {"a": source},
        "held_out": {},
    }
    return DataConfig(**(settings | changes))


@pytest.mark.parametrize(
    "change", [{"num_workers": -1}, {"prefetch": 0}, {"streams": 0}, {"window": 0}, {"stall_warning": 0}]
)
def test_numbers_out_of_range(change: dict[str, int]) -> None:
    [key] = change
    with pytest.raises(ConfigError, match=rf"data\.{key}="):
        config(**change)


def test_no_source_and_no_weight() -> None:
    with pytest.raises(ConfigError, match=r"data\.sources is empty"):
        config(sources={})
    for weight in (0.0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match="weight="):
            source_config(weight=weight)
    for share in (0.0, -0.1, 1.1, float("nan")):
        with pytest.raises(ConfigError, match="max_skipped="):
            source_config(max_skipped=share)
    assert source_config(max_skipped=1.0).max_skipped == 1


def test_held_out_data_is_never_augmented() -> None:
    augmented = source_config(augment={"_target_": "x"})
    assert config(sources={"a": augmented}).sources["a"].augment
    with pytest.raises(ConfigError, match=r"data\.held_out\.b\.augment must be null"):
        config(held_out={"b": augmented})
