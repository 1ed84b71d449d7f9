"""Adapted embedding and head against W + scaling B A, and the embedding against PEFT's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cantata.core.types import IGNORE_INDEX
from cantata.nn.head import LanguageHead
from cantata.nn.lora import LoRAEmbedding, LoRAHead, LoRASettings
from cantata.nn.lora import settings as settings_module
from tests.nn.lora.factors import DROPPED, PLAIN, adapted, assert_equal_to_a_millionth

LABELS = torch.tensor([3, IGNORE_INDEX, 7, 19, IGNORE_INDEX])
TARGETS = torch.tensor([0, 2, 3])
IDS = torch.tensor([[1, 4, 4], [0, 19, 7]])


def head(settings: LoRASettings, tied: bool) -> LoRAHead:
    torch.manual_seed(0)
    base = LanguageHead(8, 20, 1e-6, tied=tied)
    if base.weight is not None:
        nn.init.normal_(base.weight)
    made = adapted(base, settings)
    assert isinstance(made, LoRAHead)
    return made


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(2)).requires_grad_()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("with_logits", [False, True])
@pytest.mark.parametrize("settings", [PLAIN, DROPPED])
def test_head_equals_the_matrix_made_whole(
    monkeypatch: pytest.MonkeyPatch, x: Tensor, tied: bool, with_logits: bool, settings: LoRASettings
) -> None:
    drawn: list[Tensor] = []
    original: Callable[..., Tensor] = settings_module.draw_kept

    def spy(*args: object) -> Tensor:
        drawn.append(original(*args))
        return drawn[-1]

    monkeypatch.setattr(settings_module, "draw_kept", spy)
    module = head(settings, tied)
    embedding = torch.randn(20, 8, requires_grad=True)
    weight = embedding if module.weight is None else module.weight
    leaves = [x, weight, module.norm.weight, module.lora_A, module.lora_B]
    row_weights = torch.tensor([1.0, 0.5, 2.0])
    out = module(x, LABELS, TARGETS, row_weights, embedding if tied else None, with_logits)
    normed = module.norm(x)
    inputs = normed
    if drawn:
        # Without logits only the rows with targets are computed.
        kept = drawn[0] if with_logits else torch.ones(5, 8).index_copy(0, TARGETS, drawn[0].float())
        assert not kept.all()
        inputs = normed * kept / (1 - settings.dropout)
    assert len(drawn) == (settings.dropout > 0)
    logits = normed @ weight.t() + 2.0 * inputs @ module.lora_A.t() @ module.lora_B.t()
    losses = F.cross_entropy(logits, LABELS, reduction="none")[TARGETS]
    expected = (losses * row_weights).sum()
    found = [out.loss_sum, out.loss_N, *torch.autograd.grad(out.loss_sum, leaves)]
    wanted = [expected, losses, *torch.autograd.grad(expected, leaves)]
    if with_logits:
        assert out.logits_TV is not None
        found, wanted = [*found, out.logits_TV], [*wanted, logits]
    assert_equal_to_a_millionth(found, wanted)


def test_head_with_b_of_zeros_changes_no_bit(x: Tensor) -> None:
    module = head(DROPPED, False)
    with torch.no_grad():
        module.lora_B.zero_()
    base = LanguageHead(8, 20, 1e-6, tied=False)
    base.load_state_dict({"weight": module.weight, "norm.weight": module.norm.weight})
    found, expected = (part(x, LABELS, TARGETS, None, None, True) for part in (module, base))
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_frozen_matrix_of_a_head_gets_no_gradient(x: Tensor) -> None:
    module = head(PLAIN, False)
    assert module.weight is not None
    module.weight.requires_grad_(False)
    module(x, LABELS, TARGETS, None, None, False).loss_sum.backward()
    assert module.weight.grad is None
    assert module.lora_A.grad is not None
    assert module.lora_B.grad is not None


def test_half_precision_head_takes_wider_factors(x: Tensor) -> None:
    module = head(PLAIN, False)
    assert module.weight is not None
    module.weight.data = module.weight.data.bfloat16()
    module.norm.bfloat16()
    out = module(x.bfloat16(), LABELS, TARGETS, None, None, True)
    out.loss_sum.backward()
    assert out.logits_TV is not None
    assert out.logits_TV.dtype == torch.bfloat16
    assert module.lora_B.grad is not None
    assert module.lora_B.grad.dtype == torch.float32


def embedding(settings: LoRASettings) -> LoRAEmbedding:
    torch.manual_seed(0)
    made = adapted(nn.Embedding(20, 8), settings)
    assert isinstance(made, LoRAEmbedding)
    return made


@pytest.mark.parametrize("settings", [PLAIN, DROPPED])
def test_embedding_equals_the_matrix_made_whole(settings: LoRASettings) -> None:
    module = embedding(settings)
    leaves = list(module.parameters())
    y = module(IDS)
    expected = F.embedding(IDS, module.weight + 2.0 * (module.lora_B @ module.lora_A).t())
    found = [y, *torch.autograd.grad(y.square().sum(), leaves)]
    assert_equal_to_a_millionth(found, [expected, *torch.autograd.grad(expected.square().sum(), leaves)])


def test_embedding_with_a_of_zeros_changes_no_bit() -> None:
    module = embedding(PLAIN)
    with torch.no_grad():
        module.lora_A.zero_()
    assert torch.equal(module(IDS), F.embedding(IDS, module.weight))


def test_half_precision_embedding_takes_wider_factors() -> None:
    module = embedding(PLAIN)
    expected = module(IDS)
    module.weight.data = module.weight.data.bfloat16()
    assert module(IDS).dtype == torch.bfloat16
    torch.testing.assert_close(module(IDS).float(), expected, rtol=2**-6, atol=2**-6)


def test_embedding_equals_pefts() -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    ours = embedding(PLAIN)
    base = nn.Sequential(nn.Embedding(20, 8))
    base[0].load_state_dict({"weight": ours.weight})
    config = peft.LoraConfig(r=PLAIN.r, lora_alpha=PLAIN.alpha, target_modules=["0"])
    theirs = peft.get_peft_model(base, config)
    inner = theirs.base_model.model[0]
    with torch.no_grad():
        inner.lora_embedding_A["default"].copy_(ours.lora_A)
        inner.lora_embedding_B["default"].copy_(ours.lora_B)
    torch.testing.assert_close(ours(IDS), theirs(IDS))
