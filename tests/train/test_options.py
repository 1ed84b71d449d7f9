"""Names of options, and what is said of a wrong one."""

from __future__ import annotations

import pytest

from cantata.core.errors import ConfigError
from cantata.train.options import Offload, Precision, choice


def test_names_and_members_are_taken() -> None:
    assert choice(Precision, "bf16", "engine.precision") is Precision.bf16
    assert choice(Precision, Precision.fp32, "engine.precision") is Precision.fp32


def test_a_wrong_name_is_answered_with_the_right_ones() -> None:
    with pytest.raises(
        ConfigError,
        match=r"engine\.offload=optimiser is not one of none, optimizer, parameters; nearest: optimizer",
    ):
        choice(Offload, "optimiser", "engine.offload")
