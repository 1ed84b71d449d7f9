from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from cantata.core import target
from cantata.core.build import build
from cantata.core.errors import ConfigError
from tests.core.test_schema import HERE, Colour, Leaf, Part, part


@pytest.fixture(autouse=True)
def _allow_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "ALLOWED", ("cantata.", "torch.", "tests."))


def test_builds_with_runtime_arguments_and_typed_values() -> None:
    model = object()
    built = build(part(), model=model)
    assert isinstance(built, Part)
    assert built.model is model
    assert built.leaf == Leaf(1, Colour.red)


def test_nested_targets_are_built_first() -> None:
    runner = {"_target_": "torch.nn.Linear", "in_features": 2, "out_features": 3}
    built = build(part(runner=runner), model=None)
    assert isinstance(built.runner, torch.nn.Linear)


def test_partial_waits_for_the_rest() -> None:
    node: dict[str, Any] = {
        "_target_": "torch.optim.AdamW",
        "_partial_": True,
        "lr": 1e-3,
        "betas": [0.9, 0.95],
    }
    optimizer = build(node)
    assert isinstance(optimizer, partial)
    made = optimizer([torch.nn.Parameter(torch.zeros(2))])
    assert made.param_groups[0]["betas"] == (0.9, 0.95)


def test_paths_into_the_package_stay_as_they_are() -> None:
    node = {"_target_": f"{HERE}.Unhinted", "value": "embedded:tokenizer.json"}
    assert build(node).value == "embedded:tokenizer.json"


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="width must be an integer"):
        build(part(width="wide"), model=None)
    with pytest.raises(ConfigError, match="model is missing"):
        build(part())
