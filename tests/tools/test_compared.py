"""What comparisons share: errors, bounds, and a reference that must find its own keys."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cantata.core.errors import CantataError, ConfigError
from cantata.tools.compared import Check, relative_error, transformers_model


def test_a_check_passes_up_to_its_bound_and_nothing_passes_for_nan() -> None:
    assert Check("x", 1e-5, 1e-5).passed
    assert not Check("x", 1.1e-5, 1e-5).passed
    assert not Check("x", math.nan, 1e-5).passed


def test_an_error_is_relative_to_the_largest_value_of_the_scale() -> None:
    value, reference = torch.tensor([1.0, -4.0]), torch.tensor([1.5, -4.25])
    assert relative_error(value, reference, torch.tensor([0.1, -2.0])) == 0.25
    assert relative_error(value, reference, torch.tensor([0.1, -0.25])) == 2.0
    assert relative_error(value, reference, torch.zeros(2)) == 0.5
    assert math.isnan(relative_error(value, torch.tensor([math.nan, 0.0]), reference))


def library(missing: set[str], unexpected: set[str], asked: list[Any]) -> SimpleNamespace:
    def from_pretrained(*given: Any, **options: Any) -> tuple[str, dict[str, set[str]]]:
        asked.append((given, options))
        return "the model", {"missing_keys": missing, "unexpected_keys": unexpected}

    return SimpleNamespace(SomeModel=SimpleNamespace(from_pretrained=from_pretrained))


def test_the_reference_is_of_the_class_asked_for_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setitem(sys.modules, "transformers", library(set(), set(), asked))
    assert transformers_model(Path("hub"), "SomeModel", attn_implementation="eager") == "the model"
    [(given, options)] = asked
    assert given == (Path("hub"),)
    assert (options["dtype"], options["attn_implementation"]) == (torch.float32, "eager")


def test_keys_that_it_does_not_find_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would fill them at random, and the comparison would be of something else."""
    monkeypatch.setitem(sys.modules, "transformers", library({"b", "a"}, {"z"}, []))
    with pytest.raises(CantataError, match="hub: transformers does not find its own keys: a, b, z"):
        transformers_model(Path("hub"), "SomeModel")


def test_without_the_library_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match="compares with transformers, which is not installed here"):
        transformers_model(Path("hub"), "SomeModel")
