"""What the DeepSpeed engine refuses."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from cantata.core.errors import ConfigError
from cantata.train.deepspeed import validate
from cantata.train.options import Offload


def mesh(dp_replicate: int = 1, ep: int = 1) -> Any:
    return SimpleNamespace(dense={"dp_replicate": SimpleNamespace(size=lambda: dp_replicate)}, ep=ep)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"zero_stage": 4}, r"engine\.zero_stage=4 must be 0, 1, 2 or 3"),
        (
            {"offload": Offload.parameters, "zero_stage": 2},
            r"engine\.offload=parameters needs .*zero_stage=3",
        ),
        (
            {"offload": Offload.optimizer, "zero_stage": 0},
            r"engine\.offload=optimizer needs .*zero_stage=1, 2",
        ),
        ({"mesh": mesh(2)}, r"mesh\.dp_replicate=2 is not offered by deepspeed"),
        (
            {"mesh": mesh(ep=2), "zero_stage": 3},
            r"mesh\.ep=2 is not offered with engine\.zero_stage=3, .* ranks hold different experts",
        ),
        ({"compile": True, "zero_stage": 3}, r"train\.compile=true is not offered with engine\.zero_stage=3"),
    ],
)
def test_what_it_cannot_do_names_the_option(options: dict[str, Any], message: str) -> None:
    fine: dict[str, Any] = {"mesh": mesh(), "offload": Offload.none, "zero_stage": 2, "compile": False}
    validate(**fine)
    validate(**(fine | {"mesh": mesh(ep=2)}))
    with pytest.raises(ConfigError, match=message):
        validate(**(fine | options))
