"""Index backpropagation against the whole N x K softmax, in chunks of every size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cantata.core.errors import ConfigError
from cantata.nn.quantize import ibq
from tests.nn.quantize.small import CODES, LargestTensor, close, gradients, rows, small


def slow(z_ND: Tensor, codes_KD: Tensor, temperature: float) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    logits_NK = z_ND @ codes_KD.t()
    soft_NK = logits_NK.softmax(1)
    hard_NK = torch.nn.functional.one_hot(logits_NK.argmax(1), len(codes_KD)).to(z_ND.dtype)
    values_ND = (hard_NK + soft_NK - soft_NK.detach()) @ codes_KD
    chosen_ND = hard_NK @ codes_KD
    p_NK = (logits_NK / temperature).softmax(1)
    mean_K = p_NK.mean(0)
    terms = {
        "soft": (values_ND - z_ND).square().mean(1).sum(),
        "hard": (chosen_ND.detach() - z_ND).square().mean(1).sum(),
        "codebook": (chosen_ND - z_ND.detach()).square().mean(1).sum(),
        "row_entropy": -torch.special.xlogy(p_NK, p_NK).sum(),
        "batch_entropy": -len(z_ND) * torch.special.xlogy(mean_K, mean_K).sum(),
    }
    return values_ND, logits_NK.argmax(1), terms


@pytest.mark.parametrize("chunk_rows", [1, 5, 100])
@pytest.mark.parametrize("temperature", [0.3, 2.0])
def test_equals_the_whole_softmax(
    chunk_rows: int, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ibq, "_CPU_CHUNK", chunk_rows * CODES)
    quantizer = small("ibq", entropy_temperature=temperature)
    z_ND, weight_ND = rows(12, seed=1), rows(12, seed=2).detach()
    made, found = gradients(quantizer, z_ND, weight_ND)

    slow_z, codes_KD = (t.detach().double().requires_grad_() for t in (z_ND, quantizer.codebook_KD))
    values_ND, indices_N, terms = slow(slow_z, codes_KD, temperature)
    loss = terms["soft"] + terms["hard"] + 0.25 * terms["codebook"]
    loss = loss + 0.3 * terms["row_entropy"] - 0.2 * terms["batch_entropy"]
    ((values_ND * weight_ND).sum() + loss).backward()

    assert made.indices_N.tolist() == indices_N.tolist()
    close(made.values_ND, values_ND)
    for name, term in terms.items():
        close(made.parts[name], term)
    close(made.loss_sum, loss)
    close(found["z"], slow_z.grad)
    close(found["codebook_KD"], codes_KD.grad)
    assert found["codebook_KD"].abs().sum(1).min() > 0, "every code has a gradient"


def test_never_holds_all_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ibq, "_CPU_CHUNK", 4 * 512)
    quantizer = small("ibq", num_codes=512)
    with LargestTensor() as largest:
        gradients(quantizer, rows(256), torch.ones(256, 3))
    assert largest.elements <= 4 * 512


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_codes": 1}, r"num_codes=1 must be at least 2"),
        ({"dim": 0}, r"dim=0 must be"),
        ({"entropy_temperature": -1.0}, r"entropy_temperature=-1\.0 must be"),
        ({"batch_entropy": -1.0}, r"batch_entropy=-1\.0 must be"),
    ],
)
def test_bad_settings_are_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^model\.quantizer\.{message}"):
        small("ibq", **changes)
