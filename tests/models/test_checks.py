"""Sizes that must divide each other."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from cantata.core.errors import ConfigError
from cantata.models.checks import check_divides


def test_a_divisor_passes() -> None:
    for heads in (1, 3, 12):
        check_divides(SimpleNamespace(heads=heads, size=12), "text", "heads", "size")


@pytest.mark.parametrize("heads", [5, 24, 0, -3])
def test_what_does_not_divide_is_named(heads: int) -> None:
    with pytest.raises(ConfigError) as caught:
        check_divides(SimpleNamespace(heads=heads, size=12), "text", "heads", "size")
    assert str(caught.value) == f"model.text.heads is {heads}; it must divide size (12)"
