import pytest
import torch

from cantata.core.errors import ConfigError
from cantata.core.target import find_target


def test_finds_classes_and_functions() -> None:
    assert find_target("torch.optim.AdamW") is torch.optim.AdamW
    assert find_target("torch.nn.functional.silu") is torch.nn.functional.silu


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("os.system", "must begin with"),
        ("torchvision.ops.nms", "must begin with"),
        ("torch.os.system", "not defined by"),
        ("torch.optim", "not defined by|neither"),
        ("torch.optim.AdamWW", "nearest: AdamW"),
        ("cantata.core.tragets.find", "cantata.core has no tragets; nearest: target"),
        ("cantata.core.target.TARGET", "not defined by"),
        ("torch.", "has no"),
    ],
)
def test_refuses_what_is_not_allowed_or_not_there(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_target(name)
