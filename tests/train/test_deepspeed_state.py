"""Adam's state from the start. Whole states over ranks are tested in tests/distributed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from cantata.core.errors import ConfigError
from cantata.train.deepspeed_state import start_adam


@pytest.mark.parametrize("options", [{"fused": True}, {"fused": False}, {"amsgrad": True}])
def test_adams_first_state_is_what_its_first_step_makes(options: dict[str, Any]) -> None:
    ready, lazy = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    ours, theirs = torch.optim.AdamW([ready], **options), torch.optim.AdamW([lazy], **options)
    moments = start_adam(ours, [ready])
    assert {float(value.abs().max()) for value in ours.state[ready].values()} == {0.0}
    for parameter, optimizer in ((ready, ours), (lazy, theirs)):
        parameter.grad = torch.tensor([1.0, -2.0, 3.0])
        optimizer.step()
    assert torch.equal(ready, lazy)
    assert ours.state[ready].keys() == theirs.state[lazy].keys() == {*moments, "step"}
    for name, value in theirs.state[lazy].items():
        assert torch.equal(ours.state[ready][name], value)
        assert ours.state[ready][name].dtype == value.dtype


def test_other_optimizers_are_refused() -> None:
    parameter = nn.Parameter(torch.ones(3))
    with pytest.raises(ConfigError, match="SGD: deepspeed supports"):
        start_adam(torch.optim.SGD([parameter], lr=0.1), [parameter])
