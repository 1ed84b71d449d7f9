"""What `adapt` shares, where factors land, and what they start as."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cantata.nn.head import LanguageHead
from cantata.nn.lora import MAGNITUDE, LoRALinear, adapt, fill_factor, is_adaptable, is_factor
from cantata.nn.matmul import Linear
from cantata.nn.moe.experts import Experts
from tests.nn.lora.factors import DORA, PLAIN

KINDS = {
    "linear": (lambda: Linear(6, 4), PLAIN, {"lora_A": (3, 6), "lora_B": (4, 3)}),
    "dora": (
        lambda: Linear(6, 4, bias=False),
        DORA,
        {"lora_A": (3, 6), "lora_B": (4, 3), "lora_magnitude": (4,)},
    ),
    "embedding": (lambda: nn.Embedding(9, 4), PLAIN, {"lora_A": (3, 9), "lora_B": (4, 3)}),
    "head": (
        lambda: LanguageHead(6, 9, 1e-5, tied=False),
        PLAIN,
        {"lora_A": (3, 6), "lora_B": (9, 3)},
    ),
    "tied head": (
        lambda: LanguageHead(6, 9, 1e-5, tied=True),
        PLAIN,
        {"lora_A": (3, 6), "lora_B": (9, 3)},
    ),
    "experts": (
        lambda: Experts(2, 6, 5),
        {"fc1": PLAIN, "fc2": PLAIN},
        {
            "fc1_lora_A": (2, 6, 3),
            "fc1_lora_B": (2, 3, 10),
            "fc2_lora_A": (2, 5, 3),
            "fc2_lora_B": (2, 3, 6),
        },
    ),
    "half of the experts": (
        lambda: Experts(2, 6, 5),
        {"fc2": PLAIN},
        {"fc2_lora_A": (2, 5, 3), "fc2_lora_B": (2, 3, 6)},
    ),
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_twin_shares_all_parameters_and_adds_its_factors(kind: str, device: str) -> None:
    make, settings, factors = KINDS[kind]
    with torch.device(device):
        module = make()
    before = dict(module.named_parameters())
    assert is_adaptable(module)
    twin = adapt(module, settings)
    after = dict(twin.named_parameters())
    assert dict(module.named_parameters()).keys() == before.keys()
    assert all(after[name] is parameter for name, parameter in before.items())
    assert {name: tuple(p.shape) for name, p in after.items() if name not in before} == factors
    assert all(is_factor(f"layers.0.{name}") == (name in factors) for name in after)
    assert {after[name].device.type for name in factors} == {device}
    assert isinstance(twin, type(module))
    assert not is_adaptable(twin)


def test_what_has_another_forward_takes_no_adapter() -> None:
    class Other(Linear):
        pass

    for module in (Other(2, 2), nn.LayerNorm(2), nn.Linear(2, 2)):
        assert not is_adaptable(module)
        with pytest.raises(TypeError, match=f"{type(module).__name__} takes no adapter"):
            adapt(module, PLAIN)


def filled(name: str, *shape: int, embedding: bool = False) -> Tensor:
    tensor = torch.full(shape, torch.nan)
    fill_factor(name, tensor, torch.Generator().manual_seed(3), embedding=embedding)
    return tensor


@pytest.mark.parametrize(
    ("name", "shape"), [("lora_A", (64, 25)), ("fc1_lora_A", (8, 25, 64)), ("fc2_lora_A", (8, 25, 64))]
)
def test_a_starts_uniform_within_the_root_of_its_inputs_and_b_at_zero(
    name: str, shape: tuple[int, ...]
) -> None:
    a = filled(name, *shape)
    assert float(a.abs().max()) <= 0.2
    torch.testing.assert_close(a.std(), torch.tensor(0.2 / 3**0.5), rtol=0.05, atol=0)
    assert torch.equal(filled(name, *shape), a)
    assert not filled(name.replace("A", "B"), *shape).any()


def test_an_embeddings_a_starts_at_zero_and_its_b_normal() -> None:
    assert not filled("lora_A", 4, 100, embedding=True).any()
    b = filled("lora_B", 100, 40, embedding=True)
    torch.testing.assert_close(b.std(), torch.tensor(1.0), rtol=0.05, atol=0)


def test_a_starts_as_pefts_does() -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = nn.Sequential(nn.Linear(400, 4), nn.Embedding(300, 400))
    made = peft.get_peft_model(model, peft.LoraConfig(r=64, target_modules=["0", "1"])).base_model.model
    theirs = made[0].lora_A["default"].weight
    ours = filled("lora_A", 64, 400)
    torch.testing.assert_close(ours.std(), theirs.std(), rtol=0.05, atol=0)
    torch.testing.assert_close(ours.abs().max(), theirs.abs().max(), rtol=0.01, atol=0)
    inner = made[1]
    assert not inner.lora_embedding_A["default"].any()
    ours_b = filled("lora_B", 400, 64, embedding=True)
    torch.testing.assert_close(ours_b.std(), inner.lora_embedding_B["default"].std(), rtol=0.05, atol=0)


def test_other_names_are_refused() -> None:
    with pytest.raises(ValueError, match="weight is no factor"):
        filled("weight", 3)
    assert not filled(MAGNITUDE, 3).any()


def test_twins_of_one_module_do_not_share_factors() -> None:
    module = Linear(6, 4)
    first, second = adapt(module, PLAIN), adapt(module, PLAIN)
    assert isinstance(first, LoRALinear)
    assert isinstance(second, LoRALinear)
    assert first.lora_A is not second.lora_A
    assert first.weight is second.weight
